//! Other tools' sparse adapters, given to a command that takes this program's: converted on the way.

use std::path::Path;

use anyhow::Context as _;
use neuroada_ckpt::{
    adapter::{self, AdapterNotes},
    checkpoint::{Checkpoint, Existing},
    foreign::ForeignAdapter,
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
    let opened =
        inputs.iter().map(|input| ForeignAdapter::open(&ctx, &input.adapter)).collect::<Result<Vec<_>, _>>()?;
    if opened.iter().all(Option::is_none) {
        return Ok((inputs, None));
    }
    let checkpoint = Checkpoint::open(base)?;
    let remembered = Originals::open(&ctx, &checkpoint)?;
    let originals = remembered.values()?;
    let map = WeightMap::new(&checkpoint, answers.clone())?;
    let folder = TempDir::with_prefix("neuroada-").context("cannot make a temporary folder")?;
    let mut adopted = Vec::new();
    for (i, (input, foreign)) in inputs.into_iter().zip(opened).enumerate() {
        let Some(foreign) = foreign else {
            adopted.push(input);
            continue;
        };
        let name = input.adapter.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let path = folder.path().join(format!("{i}-{name}.safetensors"));
        let notes = AdapterNotes::default();
        let report = adapter::import(&ctx, &foreign, &map, &originals, &notes, &path, Existing::Keep)?;
        if !report.exact {
            let (n, of) = (report.n_rounded, report.n_entries);
            env.note(&format!("{}: {n} of {of} deltas were rounded, as {} does it", name, report.from));
        }
        adopted.push(MergeInput { adapter: path, scale: input.scale });
    }
    Ok((adopted, Some(folder)))
}
