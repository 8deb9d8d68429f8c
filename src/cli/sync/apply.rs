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
/// The checksum of every changed tensor is compared before the output appears, so an update for another checkpoint, and one that was
/// applied before, is refused. Example: neuroada-ckpt sync apply updates/weight_v000001 --base smollm2 -o updated
#[derive(Args)]
pub(in crate::cli) struct ApplyArgs {
    /// The update, a weight_vNNNNNN folder
    pub(in crate::cli) input: PathBuf,
    /// The checkpoint to apply it to; it stays as it is
    #[arg(long, value_name = "BASE")]
    pub(in crate::cli) base: PathBuf,
    /// Where to write the new checkpoint
    #[arg(short, long, value_name = "PATH")]
    pub(in crate::cli) output: PathBuf,
    /// List every changed tensor
    #[arg(long)]
    pub(in crate::cli) tensors: bool,
    /// Replace an existing output
    #[arg(long)]
    pub(in crate::cli) force: bool,
}

pub(in crate::cli) fn run(args: &ApplyArgs, env: &Env) -> CliResult<Answer> {
    let (ctx, base) = (env.context(), Checkpoint::open(&args.base)?);
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let report = sync::apply(&ctx, &base, &args.input, &args.output, existing)?;
    env.report_work(&report, |report, page| print(report, args.tensors, page))?;
    Ok(Answer::Yes)
}
