use std::path::PathBuf;

use clap::Args;

use super::print;
use crate::cli::{Answer, env::Env, failure::CliResult};
use crate::{
    checkpoint::{Checkpoint, Existing},
    sync,
};

/// Apply a weight update to the checkpoint that it was made for
///
/// The checksum of every changed tensor is compared before the output appears, so an update for another checkpoint is refused, and so is an
/// update that is already applied.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct ApplyArgs {
    /// Folder of the update, weight_vNNNNNN
    pub(in crate::cli) input: PathBuf,
    /// Checkpoint to apply the update to; it is not changed
    #[arg(long, value_name = "BASE")]
    pub(in crate::cli) base: PathBuf,
    /// Folder or file of the new checkpoint
    #[arg(short, long, value_name = "PATH")]
    pub(in crate::cli) output: PathBuf,
    /// List all changed tensors
    #[arg(long)]
    pub(in crate::cli) tensors: bool,
    /// Replace an existing output
    #[arg(long)]
    pub(in crate::cli) force: bool,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt sync apply updates/weight_v000001 --base llama -o updated
  neuroada-ckpt sync apply updates/weight_v000001 --base llama -o updated --tensors";

pub(in crate::cli) fn run(args: &ApplyArgs, env: &Env) -> CliResult<Answer> {
    let (ctx, base) = (env.context(), Checkpoint::open(&args.base)?);
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let report = sync::apply(&ctx, &base, &args.input, &args.output, existing)?;
    env.report_work(&report, |report, page| print(report, args.tensors, page))?;
    Ok(Answer::Yes)
}
