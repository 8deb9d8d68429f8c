use std::path::PathBuf;

use clap::Args;

use super::{Answer, env::Env, failure::CliResult, page::count};
use crate::{checkpoint::Existing, mask};

/// Put the parts of a mask together
///
/// The parts are those that `mask --partition I/N` wrote, all N of them in any order. The result is what `mask` would have
/// written in one run, byte for byte.
#[derive(Args)]
pub(super) struct MaskJoinArgs {
    /// The parts
    #[arg(required = true, value_name = "PART")]
    parts: Vec<PathBuf>,
    /// Where to write the mask
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace an existing mask
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: MaskJoinArgs, env: &Env) -> CliResult<Answer> {
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let report = mask::join_masks(&env.context(), &args.parts, &args.output, existing)?;
    env.report_work(&report, |report, page| {
        page.facts(&[
            ("made from", report.base.clone()),
            ("parts", count(report.n_parts as u64)),
            ("targets", format!("{}, {} rows", count(report.n_targets as u64), count(report.n_rows))),
            ("connections", count(report.n_chosen)),
        ]);
    })?;
    Ok(Answer::Yes)
}
