//! Whole checkpoints in another type and in shards of another size: quantized weights decoded, plain ones cast.
//!
//! A checkpoint is planned from its headers ([`plan`]): which tensors the new one has, in which shards. Then each shard is written piece by
//! piece on all threads ([`write`]), and the index and `config.json` are made to fit ([`texts`]). Numbers are rounded once, from what is stored
//! or from the float32 product that a quantized weight is decoded to.

mod error;
mod plan;
mod texts;
mod write;

use std::path::Path;

use serde::Serialize;

pub use error::CastError;

use self::plan::{Plan, Shard};
use crate::{
    checkpoint::{
        AtomicDir, AtomicFile, Checkpoint, Context, Existing, Layout, LeftOut, Resume, check_free_space,
        copy_side_files, folder_of, rename_into_place,
    },
    tensor::Dtype,
};

/// How to cast a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct CastOptions {
    /// BF16, F16 or F32; without one every tensor stays as it is stored.
    pub dtype: Option<Dtype>,
    /// The most bytes of tensor data in one shard; a larger tensor gets a shard of its own. Without a limit 5 GB, as transformers has it.
    pub max_shard_bytes: Option<u64>,
    /// Whether finite numbers may become infinite in the new type.
    pub allow_overflow: bool,
    /// Whether files beside the shards come along that contradict the new weights, such as other copies of the old ones.
    pub keep_other_files: bool,
    /// Whether a run that is cut short leaves its finished shards, and a later one with the same request proves them and goes on. Of
    /// folders only.
    pub resume: bool,
}

/// What was cast.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct CastReport {
    /// The old checkpoint's name.
    pub base: String,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// The new type, where there is one.
    pub dtype: Option<String>,
    /// Tensors of the new checkpoint.
    pub n_tensors: u64,
    /// Of those, quantized weights that were decoded.
    pub n_decoded: u64,
    /// Of those, plain tensors that were cast.
    pub n_cast: u64,
    /// Elements of all tensors.
    pub n_parameters: u64,
    /// Finite numbers that became infinite.
    pub n_overflowed: u64,
    /// The new shards.
    pub n_shards: u64,
    /// Bytes of the old shards.
    pub bytes_read: u64,
    /// Bytes of the new shards.
    pub bytes_written: u64,
    /// Files beside the old shards that did not come along, since they contradict the new weights.
    pub left_out: Vec<LeftOut>,
    /// What else there is to say.
    pub notes: Vec<String>,
}

/// Writes `base` in another type, or in shards of another size, as a new checkpoint at `output`; without an output only reports what it would be.
///
/// Of a quantized checkpoint the quantized weights are decoded to `dtype` and the other tensors keep their types, which its makers chose;
/// of a plain one all floating-point tensors are cast. A folder becomes a folder with `config.json` and index to match, a single file a single
/// file. Reads the checkpoint once. Memory: a few windows per thread; of weights that models hold transposed (gpt-oss), one expert's matrix.
///
/// # Errors
/// [`CastError`]; nothing was written.
pub fn cast(
    ctx: &Context<'_>,
    base: &Checkpoint,
    options: &CastOptions,
    output: Option<(&Path, Existing)>,
) -> Result<CastReport, CastError> {
    if let Some(dtype) = options.dtype.filter(|dtype| !matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)) {
        return Err(CastError::Usage(format!(
            "{} is no type to cast to: BF16, F16 or F32",
            crate::tensor::dtype_name(dtype)
        )));
    }
    let plan = Plan::new(base, options)?;
    let mut report = plan.report(base);
    let Some((path, existing)) = output else {
        report.dry_run = true;
        return Ok(report);
    };
    match base.layout() {
        Layout::File => write_file(ctx, base, options, &plan, (path, existing), &mut report)?,
        Layout::Folder | Layout::Sharded => write_folder(ctx, base, options, &plan, (path, existing), &mut report)?,
    }
    Ok(report)
}

fn write_folder(
    ctx: &Context<'_>,
    base: &Checkpoint,
    options: &CastOptions,
    plan: &Plan<'_>,
    (path, existing): (&Path, Existing),
    report: &mut CastReport,
) -> Result<(), CastError> {
    let output = match options.resume {
        true => AtomicDir::create_resumable(path, existing, &plan.text(base))?,
        false => AtomicDir::create(path, existing)?,
    };
    check_free_space(folder_of(path), plan.n_bytes())?;
    let names: Vec<String> = plan.shards.iter().map(|shard| shard.name.clone()).collect();
    let resume = match options.resume {
        true => Some(Resume::begin(ctx, output.path(), &plan.text(base), &names)?),
        false => None,
    };
    ctx.observer.begin("casting", plan.n_data_bytes());
    for shard in &plan.shards {
        if resume.as_ref().is_some_and(|resume| resume.has(&shard.name)) {
            continue;
        }
        let path = output.path().join(&shard.name);
        let part = path.with_extension("part");
        report.n_overflowed += write::shard(ctx, shard, &part, options)?;
        if let Some(resume) = &resume {
            resume.record_file(ctx, &shard.name, &part)?;
        }
        rename_into_place(&part, &path)?;
    }
    if let Some(resume) = resume {
        report.notes.extend(resume.finish(&names)?);
    }
    report.left_out = copy_side_files(ctx, base, output.path(), options.keep_other_files)?;
    texts::write(base, plan, output.path(), report)?;
    base.unchanged()?;
    Ok(output.commit()?)
}

/// A single file: its only shard, which appears whole.
fn write_file(
    ctx: &Context<'_>,
    base: &Checkpoint,
    options: &CastOptions,
    plan: &Plan<'_>,
    (path, existing): (&Path, Existing),
    report: &mut CastReport,
) -> Result<(), CastError> {
    let [shard]: &[Shard<'_>; 1] = plan.shards[..].try_into().map_err(|_| {
        let what = "a single file stays one: shards of another size are for checkpoints in folders".to_owned();
        CastError::Usage(what)
    })?;
    let file = AtomicFile::create(path, existing)?;
    check_free_space(folder_of(path), plan.n_bytes())?;
    ctx.observer.begin("casting", plan.n_data_bytes());
    report.n_overflowed = write::shard_into(ctx, shard, file.file(), path, options)?;
    base.unchanged()?;
    Ok(file.commit()?)
}
