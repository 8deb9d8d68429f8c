//! Columns that need not be sent: the recipe chooses them again from the base.
//!
//! A recipe can be followed again where rows compete among themselves and scores need nothing but the base: magnitude,
//! smallest and random, of all rows or of a seeded share of them. Following it is [`create_mask`], out of core; the mask
//! lies in a temporary folder while the adapter is open. Biases that are there whole need no recipe: a row has one column.

use std::{ops::Range, path::Path};

use super::super::{AdapterError, id::hash_positions};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, Context, Existing, Printable, TensorRef},
    mask::{MaskFile, MaskOptions, Recipe, TargetInfo, create_mask},
    tensor::RowColumns,
};

/// Positions that are read in one piece.
const RUN: u64 = 1 << 18;

/// Columns chosen again.
#[derive(Debug)]
pub(super) struct DerivedColumns {
    mask: MaskFile,
    /// Gone when dropped.
    _folder: tempfile::TempDir,
}

impl DerivedColumns {
    /// Follows `recipe` on `base`; none where it does not choose columns of just these targets, with a reason.
    ///
    /// The columns may still be others: that is for the caller to compare.
    pub(super) fn follow(
        ctx: &Context<'_>,
        recipe: &Recipe,
        targets: &[TargetInfo],
        base: &Checkpoint,
    ) -> Result<Result<Self, String>, AdapterError> {
        let (vectors, targets): (Vec<_>, Vec<_>) = targets.iter().partition(|target| is_vector(target));
        let names = targets.iter().map(|target| (target.name.clone(), target.transposed)).collect();
        let Some(options) = MaskOptions::following(recipe, names) else {
            return Ok(Err("its columns come from no recipe that can be followed with the base alone".to_owned()));
        };
        for target in vectors.iter().chain(&targets) {
            let fits = base
                .tensor(&target.name)
                .is_some_and(|tensor| (tensor.info.dtype, &tensor.info.shape) == (target.dtype, &target.shape));
            if !fits {
                let name = Printable(&target.name);
                return Ok(Err(format!("tensor \"{name}\": the base has none of this type and shape")));
            }
        }
        if let Some(part) = vectors.iter().find(|vector| vector.uniform_k.is_none()) {
            return Ok(Err(format!("tensor \"{}\": it has some of its elements only", Printable(&part.name))));
        }
        // What the mask would hold is known before it is made: a recipe that lies makes no large file.
        let plan = create_mask(ctx, base, &options, None)?;
        let nnz = targets.iter().map(|target| target.nnz).sum::<u64>();
        if (plan.total.n_tensors, plan.total.n_chosen) != (targets.len() as u64, nnz) {
            return Ok(Err(format!(
                "its recipe chooses {} columns in {} tensors of this base, it has {nnz} in {}",
                plan.total.n_chosen,
                plan.total.n_tensors,
                targets.len()
            )));
        }
        let io = |e| CheckpointError::io("create", &std::env::temp_dir(), e);
        let folder = tempfile::Builder::new().prefix("neuroada-").tempdir().map_err(io)?;
        let path = folder.path().join("mask.safetensors");
        create_mask(ctx, base, &options, Some((&path, Existing::Keep)))?;
        let mask = MaskFile::open(&path)?;
        for target in &targets {
            let fits = mask.target(&target.name).is_some_and(|chosen| {
                (chosen.nnz, chosen.uniform_k, chosen.transposed) == (target.nnz, target.uniform_k, target.transposed)
            });
            if !fits {
                let name = Printable(&target.name);
                return Ok(Err(format!("tensor \"{name}\": its recipe chooses other numbers of columns")));
            }
        }
        Ok(Ok(Self { mask, _folder: folder }))
    }

    /// The columns of a packed adapter, proven by their digest.
    pub(super) fn of_packed(
        ctx: &Context<'_>,
        path: &Path,
        recipe: &Recipe,
        targets: &[TargetInfo],
        digest: &str,
        base: &Checkpoint,
    ) -> Result<Self, AdapterError> {
        let wrong = |tensor: &str, what: String| AdapterError::WrongBase {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            what: format!("{what}; its columns cannot be derived from {}", Printable(&base.name())),
        };
        let derived = match Self::follow(ctx, recipe, targets, base)? {
            Ok(derived) => derived,
            Err(what) => return Err(wrong(&targets[0].name, what)),
        };
        derived.check_anchors(ctx, path, targets, base)?;
        if derived.digest(ctx, targets)?.to_hex().as_str() != digest {
            let what = "the columns that its recipe chooses do not have the digest in its document";
            return Err(CheckpointError::bad_file(path, what).into());
        }
        Ok(derived)
    }

    /// Fails where the base has other values at the columns than the targets were made from.
    pub(super) fn check_anchors(
        &self,
        ctx: &Context<'_>,
        path: &Path,
        targets: &[TargetInfo],
        base: &Checkpoint,
    ) -> Result<(), AdapterError> {
        for target in targets {
            let found = match self.mask.target(&target.name) {
                Some(chosen) => chosen.anchor,
                None => whole_anchor(ctx, base.tensor(&target.name).expect("it was found when followed"))?,
            };
            if found != target.anchor {
                return Err(AdapterError::WrongBase {
                    path: path.to_owned(),
                    tensor: target.name.clone(),
                    what: format!(
                        "it was made from other values than {} has where its recipe leads",
                        Printable(&base.name())
                    ),
                });
            }
        }
        Ok(())
    }

    /// BLAKE3 of all columns, as ids hash them.
    pub(super) fn digest(&self, ctx: &Context<'_>, targets: &[TargetInfo]) -> Result<blake3::Hash, AdapterError> {
        let mut hasher = blake3::Hasher::new();
        for target in targets {
            let n_rows = target.layout.n_rows();
            let runs = match self.mask.target(&target.name) {
                Some(chosen) => self.mask.row_ranges(ctx, chosen, RUN)?,
                None => (0..n_rows).step_by(RUN as usize).map(|row| row..n_rows.min(row + RUN)).collect(),
            };
            for rows in runs {
                hash_positions(&mut hasher, &self.read(ctx, &target.name, rows)?);
            }
        }
        Ok(hasher.finalize())
    }

    /// The columns of a run of rows.
    pub(super) fn read(&self, ctx: &Context<'_>, target: &str, rows: Range<u64>) -> Result<RowColumns, AdapterError> {
        match self.mask.target(target) {
            Some(chosen) => Ok(self.mask.read_columns(ctx, chosen, rows)?),
            // A whole vector: it was proven when the recipe was followed.
            None => Ok(RowColumns::uniform(vec![0; (rows.end - rows.start) as usize], 1)),
        }
    }
}

fn is_vector(target: &TargetInfo) -> bool {
    target.shape.len() == 1
}

/// BLAKE3 of all of a tensor's bytes.
fn whole_anchor(ctx: &Context<'_>, tensor: TensorRef<'_>) -> Result<blake3::Hash, CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    let n_bytes = tensor.info.n_bytes();
    for start in (0..n_bytes).step_by(ctx.window_bytes() as usize) {
        ctx.check()?;
        let window = tensor.window(ctx, start..n_bytes.min(start + ctx.window_bytes()))?;
        hasher.update(&window);
        tensor.shard.confirm(&window)?;
    }
    Ok(hasher.finalize())
}
