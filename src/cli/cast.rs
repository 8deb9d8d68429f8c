use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};

use super::{
    Answer,
    env::{Env, parse_size},
    failure::CliResult,
    page::{Page, bytes, count},
};
use crate::{
    cast::{self, CastOptions, CastReport},
    checkpoint::{Checkpoint, Existing},
    tensor::Dtype,
};

/// Cast or decode a checkpoint, or change the size of its shards
///
/// Decodes quantized weights (FP8, MXFP4, NVFP4, INT4, GPTQ, AWQ, bitsandbytes) to a plain type; the other tensors of such a checkpoint keep
/// their types. Casts all floating-point tensors of a plain checkpoint. Config, index and shard names are those that transformers expects.
#[derive(Args)]
#[command(
    group = ArgGroup::new("what").args(["dtype", "max_shard_size"]).required(true).multiple(true),
    after_help = EXAMPLES
)]
pub(super) struct CastArgs {
    /// Directory or .safetensors file of the checkpoint
    checkpoint: PathBuf,
    /// The new type; every number is rounded to it once
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// The largest shard, such as 5G [default: 5 GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_shard_size: Option<u64>,
    /// Where to write the new checkpoint
    #[arg(short, long, value_name = "PATH", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Write infinity where a number is too large for the new type
    #[arg(long)]
    allow_overflow: bool,
    /// Also copy files that contradict the new weights, such as other copies of the old ones
    #[arg(long)]
    keep_other_files: bool,
    /// Keep finished shards when the command is stopped, and go on with those that an earlier run left
    #[arg(long)]
    resume: bool,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    /// Write nothing; report what would be written
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum DtypeArg {
    Bf16,
    F16,
    F32,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt cast DeepSeek-V3 --dtype bf16 -o DeepSeek-V3-bf16
  neuroada-ckpt cast gpt-oss-20b --dtype bf16 --max-shard-size 2G --resume -o gpt-oss-20b-bf16";

pub(super) fn run(args: CastArgs, env: &Env) -> CliResult<Answer> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let options = CastOptions {
        dtype: args.dtype.map(|dtype| match dtype {
            DtypeArg::Bf16 => Dtype::BF16,
            DtypeArg::F16 => Dtype::F16,
            DtypeArg::F32 => Dtype::F32,
        }),
        max_shard_bytes: args.max_shard_size,
        allow_overflow: args.allow_overflow,
        keep_other_files: args.keep_other_files,
        resume: args.resume,
    };
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let output = args.output.as_deref().filter(|_| !args.dry_run).map(|path| (path, existing));
    let report = cast::cast(&env.context(), &checkpoint, &options, output)?;
    for note in report.notes.iter().chain(&report.left_out.iter().map(ToString::to_string).collect::<Vec<_>>()) {
        env.note(note);
    }
    env.report_work(&report, print)?;
    Ok(Answer::Yes)
}

fn print(report: &CastReport, page: &mut Page) {
    let shards = if report.n_shards == 1 { "1 shard".to_owned() } else { format!("{} shards", count(report.n_shards)) };
    let written = if report.dry_run { "would write" } else { "wrote" };
    let mut facts = vec![("tensors", count(report.n_tensors)), ("parameters", count(report.n_parameters))];
    let dtype = report.dtype.as_deref().unwrap_or_default();
    if report.n_decoded > 0 {
        facts.push(("decoded", format!("{} quantized weights to {dtype}", count(report.n_decoded))));
    }
    if report.n_cast > 0 {
        facts.push(("cast", format!("{} tensors to {dtype}", count(report.n_cast))));
    }
    if report.n_overflowed > 0 {
        facts.push(("infinite", format!("{} numbers are too large for {dtype}", count(report.n_overflowed))));
    }
    facts.push(("read", bytes(report.bytes_read)));
    facts.push((written, format!("{} in {shards}", bytes(report.bytes_written))));
    page.facts(&facts);
}
