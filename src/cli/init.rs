use std::path::PathBuf;

use clap::Args;

use super::{
    Answer,
    about::{DtypeChoice, NotesArgs},
    env::Env,
    failure::{CliError, CliResult},
    inputs::open_base,
    page::{bytes, count},
};
use crate::{
    adapter::{self, InitOptions},
    checkpoint::Existing,
    mask::MaskFile,
};

/// Create an adapter from a mask, with zeros or with values trained elsewhere
///
/// The adapter has one delta for each entry of the mask. The base must be the one that the mask was made from, including its values at the
/// chosen positions.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct InitArgs {
    /// Folder or .safetensors file of the base checkpoint
    base: PathBuf,
    /// Mask made from that base
    #[arg(short, long, value_name = "FILE")]
    mask: PathBuf,
    /// File of the adapter
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Safetensors file with a tensor T.values for each target T, of the mask's shape [default: zeros]
    #[arg(long, value_name = "FILE")]
    values: Option<PathBuf>,
    /// Dtype of the stored values
    #[arg(long, value_enum, default_value_t = DtypeChoice::F32)]
    dtype: DtypeChoice,
    /// Factor of every delta at a merge
    #[arg(long, value_name = "SCALE", default_value_t = 1.0, allow_negative_numbers = true)]
    scale: f64,
    #[command(flatten)]
    notes: NotesArgs,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt init llama --mask mask.safetensors --values trained.safetensors -o a.safetensors
  neuroada-ckpt init llama --mask mask.safetensors -o zeros.safetensors
  neuroada-ckpt init llama -m m.safetensors --values v.safetensors --dtype bf16 -o a.safetensors";

pub(super) fn run(args: InitArgs, env: &Env) -> CliResult<Answer> {
    if !args.scale.is_finite() {
        return Err(CliError::usage(format!("--scale {} is not a finite number", args.scale)));
    }
    let base = open_base(&args.base)?;
    let mask = MaskFile::open(&args.mask)?;
    let dtype = args.dtype.dtype();
    let options = InitOptions { values: args.values.as_deref(), dtype, scale: args.scale, notes: args.notes.notes() };
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let report = adapter::init_adapter(&env.context(), &base, &mask, &options, &args.output, existing)?;
    env.report_work(&report, |report, page| {
        page.facts(&[
            ("adapter", report.id[..12].to_owned()),
            ("made from", report.base.clone()),
            ("tensors", count(report.n_tensors as u64)),
            ("deltas", format!("{} of {}, {} not zero", count(report.n_deltas), report.dtype, count(report.n_nonzero))),
            ("size", bytes(report.n_bytes)),
        ]);
    })?;
    if report.n_nonzero == 0 && report.n_deltas > 0 {
        env.note("note: all deltas are zero: merging this adapter changes nothing; --values takes trained values");
    }
    Ok(Answer::Yes)
}
