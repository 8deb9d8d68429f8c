use std::path::PathBuf;

use clap::Args;

use super::{
    Answer,
    about::{DtypeChoice, NotesArgs},
    env::Env,
    failure::{CliError, CliResult},
    page::{bytes, count},
};
use crate::{
    adapter::{self, InitOptions},
    checkpoint::{Checkpoint, Existing},
    mask::MaskFile,
};

/// Start an adapter from a mask: zeros, or values trained elsewhere
///
/// One delta for each entry that the mask chose. The base must be the one the mask was made from, down to its values at the
/// chosen positions.
#[derive(Args)]
pub(super) struct InitArgs {
    /// Directory or .safetensors file of the base checkpoint
    base: PathBuf,
    /// Mask made from that base
    #[arg(short, long, value_name = "FILE")]
    mask: PathBuf,
    /// Where to write the adapter
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// A safetensors file with T.values for each target T, of the mask's shape [default: zeros]
    #[arg(long, value_name = "FILE")]
    values: Option<PathBuf>,
    /// The type that values are stored in
    #[arg(long, value_enum, default_value_t = DtypeChoice::F32)]
    dtype: DtypeChoice,
    /// What every delta is multiplied by when the adapter is merged
    #[arg(long, value_name = "SCALE", default_value_t = 1.0, allow_negative_numbers = true)]
    scale: f64,
    #[command(flatten)]
    notes: NotesArgs,
    /// Replace an existing adapter
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: InitArgs, env: &Env) -> CliResult<Answer> {
    if !args.scale.is_finite() {
        return Err(CliError::usage(format!("--scale {} is not a finite number", args.scale)));
    }
    let base = Checkpoint::open(&args.base)?;
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
    Ok(Answer::Yes)
}
