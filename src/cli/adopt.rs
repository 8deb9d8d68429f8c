//! Other tools' sparse adapters, given to a command that takes this program's: converted on the way.

use std::path::Path;

use anyhow::Context as _;
use neuroada_ckpt::{
    adapter::AdapterNotes,
    checkpoint::{Checkpoint, Existing},
    convert::{self, ForeignAdapter},
    merge::{MergeInput, Originals},
    weights::{Answers, WeightMap},
};
use tempfile::TempDir;

use super::env::Env;

/// Converts every input that is a foreign sparse adapter against `base`; the others stay as they are. What was converted lies in
/// a temporary folder that goes with the second value.
pub(super) fn adopt(
    base: &Path,
    inputs: Vec<MergeInput>,
    answers: &Answers,
    env: &Env,
) -> anyhow::Result<(Vec<MergeInput>, Option<TempDir>)> {
    let ctx = env.context();
    let (mut adopted, mut opened, mut folder) = (Vec::new(), None, None);
    for (i, input) in inputs.into_iter().enumerate() {
        let Some(foreign) = ForeignAdapter::open(&ctx, &input.adapter)? else {
            adopted.push(input);
            continue;
        };
        if opened.is_none() {
            let checkpoint = Checkpoint::open(base)?;
            let originals = Originals::open(&ctx, &checkpoint)?;
            opened = Some((checkpoint, originals));
            folder = Some(TempDir::with_prefix("neuroada-").context("cannot make a temporary folder")?);
        }
        let ((checkpoint, originals), folder) = (opened.as_ref().expect("set"), folder.as_ref().expect("set"));
        let name = input.adapter.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let path = folder.path().join(format!("{i}-{name}.safetensors"));
        let notes = AdapterNotes::default();
        let map = WeightMap::new(checkpoint, answers.clone())?;
        let report = convert::import(&ctx, &foreign, &map, originals, &notes, &path, Existing::Keep)?;
        if !report.exact {
            let (n, of) = (report.n_rounded, report.n_entries);
            env.note(&format!("{}: {n} of {of} deltas were rounded, as {} does it", name, report.from));
        }
        adopted.push(MergeInput { adapter: path, scale: input.scale });
    }
    Ok((adopted, folder))
}
