//! Merged rows of tensors that change as a whole, from their originals.
//!
//! The formula, per element: `value = round(original + sum_1 * s_1 + sum_2 * s_2 + …)` in float32 (float64 for float64 weights),
//! in ascending order of the adapters' ids, where `sum_k` is the product of the factors as [`crate::backend::add_low_rank`] sums it, and
//! `s_k` the adapter's scaling times the scale of the merge, rounded once to float32. With magnitudes (DoRA): `value = round((m / norm) *
//! (original + sum * s))`, where `norm` is that of the row of `original + sum * s`, its squares summed in float64; beside other adapters
//! such a one adds the same value, unrounded, less the original. A tensor that the adapter holds in full stands in for the original.
//!
//! On a GPU, the same bytes: where one product and nothing else is added to bf16, f16 or f32 weights ([`crate::backend::Merger`]). What
//! adds more to a weight (several adapters, sparse deltas, biases), magnitudes and tensors in full are the CPU's work.

mod bounds;
mod hash;
mod norms;
mod prepare;
mod prepared;
mod rows;

pub(super) use bounds::{Bound, bound_of};
pub(super) use hash::RowsHasher;
pub(super) use prepare::prepare;
pub(super) use prepared::Prepared;
pub(super) use rows::{Computer, HASH_ROWS, merge_cost, merge_rows, row_blocks};
