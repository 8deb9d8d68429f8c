//! An adapter's deltas on their way to a foreign format: what all writers share.

use super::{ConvertError, ConvertedTensor};
use crate::{
    adapter::Adapter,
    checkpoint::{CheckpointError, Context, Printable},
    foreign::Format,
    mask::TargetInfo,
    tensor::{Dtype, RowColumns, dtype_name, round_to},
};

/// Positions and rows that are taken in one piece.
const RUN: u64 = 1 << 18;

/// An adapter's deltas as a merge adds them.
pub(super) struct Deltas<'a> {
    pub(super) ctx: &'a Context<'a>,
    pub(super) adapter: &'a Adapter,
}

/// Rounds deltas to the type they are written in, and remembers what that costs, and what their reader's own rounding will.
pub(super) struct Rounder {
    stored: Dtype,
    applied: Dtype,
    n_rounded: u64,
    largest_error: f64,
}

impl Rounder {
    /// For deltas that are written as `dtype` and added as they are.
    pub(super) fn new(dtype: Dtype) -> Self {
        Self { stored: dtype, applied: dtype, n_rounded: 0, largest_error: 0.0 }
    }

    /// The same for a reader that rounds them to `applied` before it adds them.
    pub(super) fn applied_as(self, applied: Dtype) -> Self {
        Self { applied, ..self }
    }

    /// Appends `x` as it is written. Returns it as it will be added; not finite where the type cannot hold it.
    pub(super) fn push(&mut self, x: f64, into: &mut Vec<u8>) -> f64 {
        let stored = match self.stored {
            Dtype::F64 => {
                into.extend(x.to_le_bytes());
                x
            }
            dtype => {
                let rounded = round_to(dtype, x);
                match dtype {
                    Dtype::BF16 => into.extend(half::bf16::from_f32(rounded).to_le_bytes()),
                    Dtype::F16 => into.extend(half::f16::from_f32(rounded).to_le_bytes()),
                    _ => into.extend(rounded.to_le_bytes()),
                }
                f64::from(rounded)
            }
        };
        let applied = match self.applied {
            Dtype::BF16 | Dtype::F16 => f64::from(round_to(self.applied, stored)),
            _ => stored,
        };
        if applied != x {
            self.n_rounded += 1;
            self.largest_error = self.largest_error.max((applied - x).abs());
        }
        applied
    }
}

impl Deltas<'_> {
    /// Hands a target's deltas on, a run of rows at a time: the first row, columns, and deltas times the scale.
    pub(super) fn for_each_run(
        &self,
        target: &TargetInfo,
        mut take: impl FnMut(u64, &RowColumns, &[f64]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let (ctx, adapter) = (self.ctx, self.adapter);
        let scale = adapter.scale();
        for range in adapter.row_ranges(ctx, target, RUN)? {
            ctx.check()?;
            let rows = adapter.read_rows(ctx, target, range.clone())?;
            let scaled: Vec<f64> = match target.dtype {
                Dtype::F64 => rows.values.iter().map(|&x| f64::from(x) * scale).collect(),
                // A merge multiplies in f32: this is what it adds.
                _ => rows.values.iter().map(|&x| f64::from(x * scale as f32)).collect(),
            };
            if let Some(at) = scaled.iter().position(|x| !x.is_finite()) {
                let row = range.start + rows.columns.row_of(at) as u64;
                let what = format!("row {row}: the delta times the scale {scale} is {}", scaled[at]);
                return Err(CheckpointError::bad_tensor(adapter.path(), &target.name, what).into());
            }
            take(range.start, &rows.columns, &scaled)?;
        }
        Ok(())
    }

    /// Appends `scaled` as they are written.
    ///
    /// # Errors
    /// One that is too large for the type it is stored or added in.
    pub(super) fn push(
        &self,
        target: &TargetInfo,
        scaled: &[f64],
        rounder: &mut Rounder,
        into: &mut Vec<u8>,
    ) -> Result<(), ConvertError> {
        for &x in scaled {
            if !rounder.push(x, into).is_finite() {
                let what = format!("the delta {x:e} does not fit {}", dtype_name(rounder.applied));
                return Err(CheckpointError::bad_tensor(self.adapter.path(), &target.name, what).into());
            }
        }
        Ok(())
    }

    /// What becomes of a target whose deltas are written once each.
    pub(super) fn converted(&self, target: &TargetInfo, rounder: &Rounder) -> ConvertedTensor {
        ConvertedTensor {
            tensor: target.name.clone(),
            dtype: dtype_name(self.adapter.values_dtype(target)),
            stored_dtype: dtype_name(rounder.stored),
            applied_dtype: dtype_name(rounder.applied),
            n_entries: target.nnz,
            n_written: target.nnz,
            n_summed: 0,
            n_padding: 0,
            n_rounded: rounder.n_rounded,
            largest_error: rounder.largest_error,
        }
    }

    /// Fails where some target is no plain matrix as stored, which the format needs.
    pub(super) fn need_matrices(&self, format: Format) -> Result<(), ConvertError> {
        let problem = |target: &TargetInfo| {
            let name = Printable(&target.name);
            if target.transposed {
                return Some(format!("\"{name}\": stored as [d_in, d_out]"));
            }
            let what = if target.shape.len() == 1 { "a vector" } else { "a stack of matrices" };
            (target.shape.len() != 2).then(|| format!("\"{name}\": shape {:?} is {what}", target.shape))
        };
        self.need(format, "holds plain matrices only:", problem)
    }

    /// Fails with all problems that targets have.
    pub(super) fn need(
        &self,
        format: Format,
        what: &str,
        problem: impl Fn(&TargetInfo) -> Option<String>,
    ) -> Result<(), ConvertError> {
        let problems: Vec<String> = self.adapter.targets().iter().filter_map(problem).collect();
        if problems.is_empty() {
            return Ok(());
        }
        let what = format!("the format {} {what}", format.name());
        Err(ConvertError::Unfit { path: self.adapter.path().to_owned(), what, problems })
    }
}
