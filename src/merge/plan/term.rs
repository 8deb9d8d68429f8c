//! What adapters do to a stored tensor.

use std::{ops::Range, sync::Arc};

use super::super::{
    factors::{Matrix, read_f32},
    source::Source,
};
use crate::{
    adapter::Adapter,
    checkpoint::{CheckpointError, Shard, TensorInfo, TensorRef},
    mask::TargetInfo,
    tensor::RowLayout,
    weights::Columns,
};

/// A stored tensor that adapters change, and how.
#[derive(Clone, Debug)]
pub(in crate::merge) struct MergeTarget<'a> {
    pub(in crate::merge) tensor: TensorRef<'a>,
    /// The tensor as a matrix.
    pub(in crate::merge) n_rows: u64,
    pub(in crate::merge) n_columns: u64,
    /// In ascending order of the adapters' ids; those of one adapter in the order that its reader gave them.
    pub(in crate::merge) terms: Vec<Term<'a>>,
}

/// What one adapter does to a tensor.
#[derive(Clone, Debug)]
pub(in crate::merge) struct Term<'a> {
    pub(in crate::merge) source: &'a Source,
    pub(in crate::merge) does: Does<'a>,
}

/// A kind of change.
#[derive(Clone, Debug)]
pub(in crate::merge) enum Does<'a> {
    /// Adds deltas on chosen columns.
    Sparse { adapter: &'a Adapter, target: &'a TargetInfo },
    /// Adds a low-rank product.
    LowRank(Product<'a>),
    /// Adds the bias of a second factor, `[n_rows]`.
    Bias { shard: &'a Shard, info: &'a TensorInfo, scale: f32 },
    /// Stands in for the original.
    Full { shard: &'a Shard, info: &'a TensorInfo },
    /// Stands in for some rows of it.
    Rows(ReplacedRows<'a>),
}

/// Rows that stand in for those of the original.
#[derive(Clone, Debug)]
pub(in crate::merge) struct ReplacedRows<'a> {
    pub(in crate::merge) shard: &'a Shard,
    /// `[places.len(), n_columns]`.
    pub(in crate::merge) info: &'a TensorInfo,
    /// Which row of the target each is for, and which of the tensor it is; ascending.
    pub(in crate::merge) places: Arc<[(u64, u64)]>,
}

impl ReplacedRows<'_> {
    /// Those among `rows` of the target.
    pub(in crate::merge) fn among(&self, rows: &Range<u64>) -> &[(u64, u64)] {
        let first = self.places.partition_point(|(row, _)| *row < rows.start);
        let n = self.places[first..].partition_point(|(row, _)| *row < rows.end);
        &self.places[first..first + n]
    }
    /// The values of one of them, by its row in the tensor.
    pub(in crate::merge) fn read(&self, row: u64) -> Result<Vec<f32>, CheckpointError> {
        let n_columns = self.info.n_elements() / self.places.len() as u64;
        read_f32(self.shard, self.info, row * n_columns..(row + 1) * n_columns)
    }
}

/// `u v * scale`, for a run of rows of the tensor, and for all of its columns or some.
#[derive(Clone, Copy, Debug)]
pub(in crate::merge) struct Product<'a> {
    pub(in crate::merge) first_row: u64,
    pub(in crate::merge) n_rows: u64,
    /// Whose number is `columns.n`.
    pub(in crate::merge) columns: Columns,
    /// `[n_rows, rank]`.
    pub(in crate::merge) u: Matrix<'a>,
    /// `[rank, columns.n]`.
    pub(in crate::merge) v: Matrix<'a>,
    pub(in crate::merge) rank: u64,
    pub(in crate::merge) scale: f32,
    pub(in crate::merge) magnitude: Option<Magnitude<'a>>,
}

impl Product<'_> {
    pub(in crate::merge) fn rows(&self) -> Range<u64> {
        self.first_row..self.first_row + self.n_rows
    }
}

/// What the norms of rows, or of columns, are brought to.
#[derive(Clone, Copy, Debug)]
pub(in crate::merge) struct Magnitude<'a> {
    pub(in crate::merge) shard: &'a Shard,
    pub(in crate::merge) info: &'a TensorInfo,
    /// Whether each column has a norm, not each row: weights stored the other way round, and embeddings.
    pub(in crate::merge) of_columns: bool,
    /// The first row's.
    pub(in crate::merge) start: u64,
}

impl Term<'_> {
    /// The product with magnitudes, where it is one.
    pub(in crate::merge) fn magnitude(&self) -> Option<(&Product<'_>, &Magnitude<'_>)> {
        let Does::LowRank(product) = &self.does else { return None };
        Some((product, product.magnitude.as_ref()?))
    }
}

impl<'a> MergeTarget<'a> {
    pub(in crate::merge) fn name(&self) -> &'a str {
        &self.tensor.info.name
    }
    /// Bytes of a row.
    pub(in crate::merge) fn row_bytes(&self) -> u64 {
        self.tensor.info.n_bytes() / self.n_rows
    }

    /// How the tensor is read as rows, where single elements change and no others: there positions and their originals are all that a
    /// ledger keeps. None where some adapter changes it as a whole.
    pub(in crate::merge) fn positions(&self) -> Option<RowLayout> {
        let mut layouts = self.terms.iter().map(|term| match &term.does {
            Does::Sparse { target, .. } => Some(target.layout),
            Does::Rows(_) => RowLayout::new(&self.tensor.info.shape, false),
            _ => None,
        });
        let first = layouts.next()??;
        layouts.all(|layout| layout == Some(first)).then_some(first)
    }

    /// The deltas of its sparse terms, each with its adapter and scale.
    pub(in crate::merge) fn sparse(&self) -> impl Iterator<Item = (&'a Source, &'a Adapter, &'a TargetInfo)> {
        self.terms.iter().filter_map(|term| match term.does {
            Does::Sparse { adapter, target } => Some((term.source, adapter, target)),
            _ => None,
        })
    }

    /// Its replaced rows, each with its adapter.
    pub(in crate::merge) fn replaced(&self) -> impl Iterator<Item = (&'a Source, &ReplacedRows<'a>)> {
        self.terms.iter().filter_map(|term| match &term.does {
            Does::Rows(rows) => Some((term.source, rows)),
            _ => None,
        })
    }

    /// The same tensor with its sparse terms alone.
    pub(in crate::merge) fn sparse_alone(&self) -> Self {
        let mut target = self.clone();
        target.terms.retain(|term| matches!(term.does, Does::Sparse { .. }));
        target
    }

    /// Whether every row gets at most one product and nothing else.
    pub(in crate::merge) fn is_simple(&self) -> bool {
        // Products of one adapter lie on different rows.
        self.n_sources() <= 1
            && self.terms.iter().all(|term| match &term.does {
                Does::LowRank(product) => product.magnitude.is_none() && product.columns.is_all(),
                _ => false,
            })
    }

    /// Adapters that change it.
    pub(in crate::merge) fn n_sources(&self) -> usize {
        self.terms.chunk_by(|a, b| a.source.id == b.source.id).count()
    }

    /// Whether the same adapters change it, with the same scales.
    pub(in crate::merge) fn is_same_as(&self, other: &Self) -> bool {
        let sources = |target: &Self| {
            let key = |term: &Term<'_>| (term.source.id, term.source.scale.to_bits());
            target.terms.iter().map(key).collect::<Vec<_>>()
        };
        sources(self) == sources(other)
    }

    /// The largest magnitude of a scaled sparse delta of `source` on it; infinite before the adapter was read.
    pub(in crate::merge) fn largest_delta(source: &Source, adapter: &Adapter, target: &TargetInfo) -> f64 {
        let largest = adapter.largest_delta(target).map_or(f64::INFINITY, f64::from);
        let scale = source.scale.abs();
        match scale {
            0.0 => 0.0,
            // As the arithmetic has it, which may turn a delta of zero into a NaN.
            _ if (scale as f32).is_infinite() => f64::INFINITY,
            _ => largest * scale,
        }
    }
}
