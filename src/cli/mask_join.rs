use std::path::PathBuf;

use clap::Args;

use super::{Answer, env::Env, failure::CliResult, page::count};
use crate::{checkpoint::Existing, mask};

/// Join the parts of a mask
///
/// The parts are the N files that `mask --partition I/N` wrote, in any order. The result equals the mask of one run, byte for byte.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct MaskJoinArgs {
    /// Files of all parts
    #[arg(required = true, value_name = "PART")]
    parts: Vec<PathBuf>,
    /// File of the joined mask
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt mask llama --k 1 --partition 1/2 -o part-1.safetensors
  neuroada-ckpt mask llama --k 1 --partition 2/2 -o part-2.safetensors
  neuroada-ckpt mask-join part-1.safetensors part-2.safetensors -o mask.safetensors";

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
