use std::path::PathBuf;

use anyhow::{anyhow, bail};
use clap::{ArgGroup, Args};
use neuroada_ckpt::{
    checkpoint::Existing,
    merge::{self, KindReport, MergeError, MergeInput, MergeOptions, MergeOutput, MergeReport},
};

use super::{
    Answer,
    adopt::adopt,
    env::Env,
    failure::Hint,
    page::{Page, Table, bytes, count, number, percent},
};

/// Add adapters to a checkpoint
///
/// Every weight becomes round(original + delta * scale + …) over all adapters in it, in one fixed order, whatever the order they
/// were merged in. Everything is checked before the first byte is written: each tensor of each adapter must match, and the
/// base's values must be those the adapter was made from. The result remembers the original bits (in .neuroada/), so
/// that unmerge can take any adapter out again, exactly.
#[derive(Args)]
#[command(group = ArgGroup::new("where").args(["output", "in_place"]).required(true))]
pub(super) struct MergeArgs {
    /// Directory or .safetensors file of the base checkpoint
    base: PathBuf,
    /// Adapter made from that base, or a sparse one of PEFT, SpIEL or the published code; =SCALE replaces the scale it carries; may be given several times
    #[arg(short, long = "adapter", value_name = "FILE[=SCALE]", required = true)]
    adapters: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
    /// Write no ledger: the merge cannot be undone
    #[arg(long, requires = "output")]
    no_ledger: bool,
}

/// Where the changed checkpoint goes.
#[derive(Args)]
pub(super) struct OutputArgs {
    /// Where to write the new checkpoint
    #[arg(short, long, value_name = "PATH", conflicts_with = "in_place")]
    output: Option<PathBuf>,
    /// Change the checkpoint itself, journaled
    #[arg(long)]
    in_place: bool,
    /// In place: work on files that other paths lead to as well
    #[arg(long, conflicts_with = "output")]
    break_links: bool,
    /// Replace an existing output
    #[arg(long, requires = "output")]
    force: bool,
    /// Hard-link shards that no delta touches instead of copying them
    #[arg(long, requires = "output")]
    link: bool,
    /// Keep finished shards when cut short, and go on from those of an earlier run
    #[arg(long, requires = "output")]
    resume: bool,
    /// Check everything, say what would be written, write nothing
    #[arg(long)]
    dry_run: bool,
}

impl OutputArgs {
    pub(super) fn options(self, ledger: bool) -> MergeOptions {
        let output = match self.output {
            Some(path) => {
                let existing = if self.force { Existing::Replace } else { Existing::Keep };
                MergeOutput::New { path, existing, ledger, link: self.link, resume: self.resume }
            }
            None => MergeOutput::InPlace { through_links: self.break_links },
        };
        MergeOptions { output, dry_run: self.dry_run }
    }
}

pub(super) fn run(args: MergeArgs, env: &Env) -> anyhow::Result<Answer> {
    let inputs = args.adapters.iter().map(|text| parse_input(text)).collect::<anyhow::Result<Vec<_>>>()?;
    // The folder holds what was converted until it is merged.
    let (inputs, _folder) = adopt(&args.base, inputs, env)?;
    let options = args.output.options(!args.no_ledger);
    let merged = merge::merge(&env.context(), &args.base, &inputs, &options);
    let report = match merged {
        Err(e @ MergeError::AlreadyMerged { .. }) => {
            Err(e).hint("take it out with unmerge first, to merge it with another scale")?
        }
        Err(e @ MergeError::WrongBase { .. }) => Err(e).hint("merge into the checkpoint the adapter was made from")?,
        merged => merged?,
    };
    tell(&report, env)?;
    Ok(Answer::Yes)
}

/// Reads `FILE` or `FILE=SCALE`; what follows the last `=` is a scale if it is a number.
pub(super) fn parse_input(text: &str) -> anyhow::Result<MergeInput> {
    let Some((file, scale)) = text.rsplit_once('=') else {
        return Ok(MergeInput { adapter: text.into(), scale: None });
    };
    match scale.parse::<f64>() {
        Ok(scale) if scale.is_finite() && !file.is_empty() => {
            Ok(MergeInput { adapter: file.into(), scale: Some(scale) })
        }
        // A file whose own name holds an equals sign.
        _ if PathBuf::from(text).exists() => Ok(MergeInput { adapter: text.into(), scale: None }),
        Ok(scale) if !scale.is_finite() => bail!("{text}: scale {scale} is not a finite number"),
        _ => Err(anyhow!("{text}: expected FILE or FILE=SCALE, and {scale:?} is not a number")),
    }
}

/// Prints the report of a merge or an unmerge.
pub(super) fn tell(report: &MergeReport, env: &Env) -> anyhow::Result<()> {
    env.report(report, print)?;
    if report.total.n_overflowed > 0 {
        env.note(&format!(
            "warning: {} finite weights overflowed to infinity or NaN",
            count(report.total.n_overflowed)
        ));
    }
    Ok(())
}

fn print(report: &MergeReport, page: &mut Page) {
    if report.kinds.is_empty() {
        page.line("no adapter is left: the base's bytes");
    } else {
        let mut table = Table::new(["kind", "tensors>", "touched>", "changed>", "absorbed>", "share>"]);
        for kind in report.kinds.iter().chain([&report.total]) {
            table.row(kind_cells(kind));
        }
        page.table(&table);
        page.blank();
        let mut adapters = Table::new(["adapter", "scale>", "tensors>", "deltas>", "made from"]);
        for entry in &report.active {
            let mark = if report.added.contains(&entry.id) { "+ " } else { "  " };
            let id = format!("{mark}{}", &entry.id[..12]);
            adapters.row([
                id,
                number(entry.scale),
                count(entry.n_tensors as u64),
                count(entry.n_deltas),
                entry.base.clone(),
            ]);
        }
        page.table(&adapters);
    }
    page.blank();
    let verb = if report.dry_run { "would write" } else { "wrote" };
    let mut facts = Vec::new();
    if !report.removed.is_empty() {
        facts.push(("removed", report.removed.iter().map(|id| id[..12].to_owned()).collect::<Vec<_>>().join(" ")));
    }
    facts.push(("matched", format!("{} tensors, none unmatched", count(report.n_matched as u64))));
    facts.push(("shards", format!("{} of {} patched", report.n_shards_patched, report.n_shards)));
    facts.push((verb, bytes(report.bytes_written)));
    if report.ledger_bytes > 0 {
        facts.push(("ledger", bytes(report.ledger_bytes)));
    }
    page.facts(&facts);
}

fn kind_cells(kind: &KindReport) -> [String; 6] {
    [
        kind.kind.clone(),
        count(kind.n_tensors),
        count(kind.n_touched),
        count(kind.n_changed),
        count(kind.n_absorbed),
        percent(kind.n_absorbed, kind.n_nonzero),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_follows_the_last_equals_sign() {
        let input = |text: &str| parse_input(text).map(|input| (input.adapter, input.scale)).ok();
        assert_eq!(input("a.safetensors"), Some(("a.safetensors".into(), None)));
        assert_eq!(input("a=b=0.5"), Some(("a=b".into(), Some(0.5))));
        assert_eq!(input("a=-1"), Some(("a".into(), Some(-1.0))));
        for bad in ["a=half", "a=nan", "a=inf", "=1", "a="] {
            assert_eq!(input(bad), None, "{bad}");
        }
    }
}
