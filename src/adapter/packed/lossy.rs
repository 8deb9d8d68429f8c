//! Values made shorter on request, and what that costs.

use serde::Serialize;

use super::{
    ValuesChoice,
    values::{GROUP, Group, ValueKind},
};
use crate::{
    adapter::{file::widen, writer::narrow},
    tensor::{Accumulator, Dtype, Float, with_float},
};

/// How far shortened deltas are from what they were.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct LossyError {
    /// Deltas that are no longer the same.
    pub n_changed: u64,
    /// The largest difference of two deltas.
    pub largest: f64,
    /// L2 norm of all differences over the L2 norm of all deltas.
    pub relative: f64,
}

/// How far weights merged with shortened deltas are from those merged with the deltas as they were.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct MergedError {
    /// Weights that a delta touches.
    pub n_touched: u64,
    /// Merged weights that are no longer the same.
    pub n_changed: u64,
    /// The largest difference of two merged weights.
    pub largest: f64,
    /// L2 norm of the differences over the L2 norm of what the merge changed.
    pub relative: f64,
}

/// Differences summed up, in the order they are added.
#[derive(Clone, Copy, Default)]
pub(super) struct Differences {
    n: u64,
    n_changed: u64,
    largest: f64,
    squares: f64,
    whole_squares: f64,
}

impl Differences {
    /// Adds a pair, and what its difference is measured by.
    fn pair(&mut self, before: f64, after: f64, whole: f64) {
        self.n += 1;
        self.n_changed += u64::from(before != after);
        // NaN and infinities have no distance.
        let distance = Some((before - after).abs()).filter(|distance| distance.is_finite()).unwrap_or(0.0);
        self.largest = self.largest.max(distance);
        self.squares += distance * distance;
        self.whole_squares += whole * whole;
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.n += other.n;
        self.n_changed += other.n_changed;
        self.largest = self.largest.max(other.largest);
        self.squares += other.squares;
        self.whole_squares += other.whole_squares;
    }

    fn relative(&self) -> f64 {
        if self.squares == 0.0 { 0.0 } else { (self.squares / self.whole_squares).sqrt() }
    }

    pub(super) fn of_deltas(before: &[f32], after: &[f32]) -> Self {
        let mut differences = Self::default();
        for (&before, &after) in before.iter().zip(after) {
            differences.pair(before.into(), after.into(), before.into());
        }
        differences
    }

    /// Of merged weights, as stored; `base` holds them before the merge.
    pub(super) fn of_weights(dtype: Dtype, base: &[u8], before: &[u8], after: &[u8]) -> Self {
        let mut differences = Self::default();
        with_float!(dtype, T => {
            let wide = |le: &[u8]| T::from_le(le).widen().to_f64();
            let elements = base.chunks_exact(T::BYTES).zip(before.chunks_exact(T::BYTES)).zip(after.chunks_exact(T::BYTES));
            for ((base, before), after) in elements {
                let change = Some(wide(before) - wide(base)).filter(|change| change.is_finite()).unwrap_or(0.0);
                differences.pair(wide(before), wide(after), change);
            }
        }, else unreachable!("targets are floats"));
        differences
    }

    pub(super) fn lossy(&self) -> LossyError {
        LossyError { n_changed: self.n_changed, largest: self.largest, relative: self.relative() }
    }
    pub(super) fn merged(&self) -> MergedError {
        let Self { n, n_changed, largest, .. } = *self;
        MergedError { n_touched: n, n_changed, largest, relative: self.relative() }
    }
}

/// The values of a block as they will be packed.
pub(super) struct Shortened {
    pub(super) kind: ValueKind,
    /// As the unpacked adapter stores them.
    pub(super) stored: Vec<u8>,
    /// Where they are quantised.
    pub(super) groups: Vec<Group>,
}

impl ValuesChoice {
    /// The type that values of the type `dtype` are stored in afterwards.
    pub(super) fn dtype(self, dtype: Dtype) -> Dtype {
        match self {
            Self::Keep => dtype,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
            Self::Int8 | Self::Int4 => Dtype::F32,
        }
    }

    pub(super) fn kind(self, dtype: Dtype) -> ValueKind {
        match self {
            Self::Int8 => ValueKind::Int8,
            Self::Int4 => ValueKind::Int4,
            _ => ValueKind::of(self.dtype(dtype)),
        }
    }

    /// Makes the stored values of a block what was chosen.
    ///
    /// # Errors
    /// The index of the first value that the chosen type cannot hold.
    pub(super) fn shorten(self, dtype: Dtype, stored: Vec<u8>) -> Result<Shortened, usize> {
        let kind = self.kind(dtype);
        if kind.quantised().is_some() {
            let groups: Vec<Group> =
                widen(dtype, &stored).chunks(GROUP).map(|values| Group::quantise(kind, values)).collect();
            let stored = groups.iter().flat_map(Group::values).flat_map(f32::to_le_bytes).collect();
            return Ok(Shortened { kind, stored, groups });
        }
        let stored = match self.dtype(dtype) {
            same if same == dtype => stored,
            other => narrow(other, &widen(dtype, &stored))?,
        };
        Ok(Shortened { kind, stored, groups: Vec::new() })
    }
}
