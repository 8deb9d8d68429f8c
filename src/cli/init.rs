use std::path::PathBuf;

use clap::{Args, ValueEnum};
use neuroada_ckpt::{
    adapter::{self, AdapterNotes, InitOptions},
    checkpoint::{Checkpoint, Existing},
    mask::MaskFile,
    tensor::Dtype,
};

use super::{
    Answer,
    env::Env,
    page::{bytes, count},
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
    /// Under what terms it may be used, as an SPDX expression
    #[arg(long, value_name = "SPDX")]
    license: Option<String>,
    /// What it is for
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Who made it
    #[arg(long, value_name = "NAME")]
    author: Option<String>,
    /// Replace an existing adapter
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum DtypeChoice {
    F32,
    Bf16,
    F16,
}

pub(super) fn run(args: InitArgs, env: &Env) -> anyhow::Result<Answer> {
    if !args.scale.is_finite() {
        anyhow::bail!("--scale {} is not a finite number", args.scale);
    }
    let base = Checkpoint::open(&args.base)?;
    let mask = MaskFile::open(&args.mask)?;
    let dtype = match args.dtype {
        DtypeChoice::F32 => Dtype::F32,
        DtypeChoice::Bf16 => Dtype::BF16,
        DtypeChoice::F16 => Dtype::F16,
    };
    let (license, description, author) = (args.license, args.description, args.author);
    let notes = AdapterNotes { license, description, author, training: None };
    let options = InitOptions { values: args.values.as_deref(), dtype, scale: args.scale, notes };
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let report = adapter::init_adapter(&env.context(), &base, &mask, &options, &args.output, existing)?;
    env.report(&report, |report, page| {
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
