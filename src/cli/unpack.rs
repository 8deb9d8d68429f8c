use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{
    Answer,
    env::Env,
    failure::CliResult,
    page::{bytes, count},
};
use crate::{
    adapter::Adapter,
    checkpoint::{Checkpoint, Existing},
};

/// Unpack a packed adapter into the original file
///
/// The whole file is read and checked against its id first.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct UnpackArgs {
    /// Packed adapter
    packed: PathBuf,
    /// File of the adapter
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Base checkpoint; required for derived columns
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct UnpackReport {
    /// The adapter's id.
    id: String,
    n_tensors: usize,
    n_deltas: u64,
    packed_bytes: u64,
    n_bytes: u64,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt unpack packed.safetensors -o adapter.safetensors
  neuroada-ckpt unpack packed.safetensors --base llama -o adapter.safetensors";

pub(super) fn run(args: UnpackArgs, env: &Env) -> CliResult<Answer> {
    let ctx = env.context();
    let adapter = open_adapter(&args.packed, args.base.as_deref(), env)?;
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let id = adapter.id(&ctx)?;
    adapter.write_plain(&ctx, &args.output, existing)?;
    let report = UnpackReport {
        id: id.to_string(),
        n_tensors: adapter.targets().len(),
        n_deltas: adapter.nnz(),
        packed_bytes: adapter.n_bytes(),
        n_bytes: adapter.plain_bytes(),
    };
    env.report_work(&report, |report, page| {
        page.facts(&[
            ("adapter", report.id[..12].to_owned()),
            ("deltas", format!("{} in {} tensors", count(report.n_deltas), count(report.n_tensors as u64))),
            ("size", format!("{}, packed {}", bytes(report.n_bytes), bytes(report.packed_bytes))),
        ]);
    })?;
    Ok(Answer::Yes)
}

/// Opens an adapter, plain or packed, with its base if one is given.
pub(super) fn open_adapter(path: &std::path::Path, base: Option<&std::path::Path>, env: &Env) -> CliResult<Adapter> {
    Ok(match base {
        Some(base) => Adapter::open_with_base(&env.context(), path, &Checkpoint::open(base)?)?,
        None => Adapter::open(path)?,
    })
}
