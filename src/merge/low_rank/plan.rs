//! What is added to which rows of which tensor.

use std::ops::Range;

use super::{
    LowRankReading,
    factors::Matrix,
    planner::Planner,
    sources::{AnyAdapter, Source},
};
use crate::{
    adapter::Adapter,
    checkpoint::{Checkpoint, Shard, TensorInfo, TensorRef},
    mask::TargetInfo,
    merge::MergeError,
    weights::{Columns, WeightMap},
};

/// A merge, ready to be computed: every tensor of every adapter has its place.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// Touched tensors, by name.
    pub(super) targets: Vec<Target<'a>>,
    /// What had to be decided on the way, in words.
    pub(super) notes: Vec<String>,
    /// How many tensors each source touches.
    pub(super) n_tensors: Vec<usize>,
}

/// A touched tensor.
#[derive(Debug)]
pub(super) struct Target<'a> {
    pub(super) tensor: TensorRef<'a>,
    /// The tensor as a matrix.
    pub(super) n_rows: u64,
    pub(super) n_columns: u64,
    /// What stands in for the originals.
    pub(super) full: Option<(&'a Shard, &'a TensorInfo)>,
    /// The index of the adapter that this is from.
    pub(super) full_source: Option<usize>,
    /// What is added, in ascending order of the adapters' ids.
    pub(super) steps: Vec<Step<'a>>,
    /// Per step the index of its adapter.
    pub(super) step_sources: Vec<usize>,
    /// Whether every row gets at most one product and nothing else.
    pub(super) is_simple: bool,
}

impl<'a> Target<'a> {
    /// A tensor to which nothing is added.
    pub(super) fn untouched(tensor: TensorRef<'a>, n_rows: u64, n_columns: u64) -> Self {
        let (full, steps) = (None, Vec::new());
        Self { tensor, n_rows, n_columns, full, full_source: None, steps, step_sources: Vec::new(), is_simple: false }
    }
}

impl Target<'_> {
    pub(super) fn name(&self) -> &str {
        &self.tensor.info.name
    }
    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> u64 {
        self.tensor.info.n_bytes() / self.n_rows
    }
    pub(super) fn has_magnitudes(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::LowRank(product) if product.magnitude.is_some()))
    }
}

/// What one adapter adds to a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step<'a> {
    LowRank(Product<'a>),
    /// Deltas on chosen columns, and the index of the adapter.
    Sparse {
        adapter: &'a Adapter,
        target: &'a TargetInfo,
        scale: f64,
        source: usize,
    },
    /// The bias of a second factor, `[n_rows]`.
    Bias {
        shard: &'a Shard,
        info: &'a TensorInfo,
        scale: f32,
    },
}

/// `u v * scale`, for a run of rows of the tensor, and for all of its columns or some.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product<'a> {
    pub(super) first_row: u64,
    pub(super) n_rows: u64,
    /// Whose number is `columns.n`.
    pub(super) columns: Columns,
    /// `[n_rows, rank]`.
    pub(super) u: Matrix<'a>,
    /// `[rank, columns.n]`.
    pub(super) v: Matrix<'a>,
    pub(super) rank: u64,
    pub(super) scale: f32,
    pub(super) magnitude: Option<Magnitude<'a>>,
}

impl Product<'_> {
    pub(super) fn rows(&self) -> Range<u64> {
        self.first_row..self.first_row + self.n_rows
    }
}

/// What the norms of rows, or of columns, are brought to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Magnitude<'a> {
    pub(super) shard: &'a Shard,
    pub(super) info: &'a TensorInfo,
    /// Whether each column has a norm, not each row: weights stored the other way round, and embeddings.
    pub(super) of_columns: bool,
    /// The first row's.
    pub(super) start: u64,
}

impl<'a> Plan<'a> {
    /// Brings adapters together with the checkpoint of `map`, whose originals are in `originals` (the same one before a merge).
    ///
    /// # Errors
    /// [`MergeError::Unmatched`] lists everything of an adapter that the checkpoint does not have as the adapter needs it;
    /// [`MergeError::Refused`] where the files leave something open, or adapters cannot be combined.
    pub(super) fn new(
        map: &WeightMap<'a>,
        originals: &'a Checkpoint,
        sources: &'a [Source],
        reading: &LowRankReading,
    ) -> Result<Self, MergeError> {
        let mut planner = Planner::new(map, originals, reading);
        for (index, source) in sources.iter().enumerate() {
            planner.problems.clear();
            let n_targets = match &source.adapter {
                AnyAdapter::Sparse(sparse) => planner.add_sparse(sparse, source.scale, index),
                AnyAdapter::Lora(lora) => planner.add_lora(lora, source, index)?,
            };
            if !planner.problems.is_empty() {
                return Err(MergeError::Unmatched {
                    adapter: source.path().to_owned(),
                    base: map.checkpoint().name(),
                    n_targets,
                    problems: planner.problems,
                });
            }
        }
        planner.finish(sources.len())
    }
}
