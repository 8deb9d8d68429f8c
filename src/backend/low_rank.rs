//! Low-rank products and their merge into weights.
//!
//! For each element the products are summed in `f32` over the rank, ascending from zero, with fused multiply-adds:
//! `sum = u[i, t] * v[t, j] + sum`, rounded once. Then `weight + sum * scale`, with two roundings, and one rounding to
//! the weight's dtype. The result does not depend on how the work is split, and the device's kernels use the same
//! steps. A different order of the sum, as in matrix libraries, changes it by a few units in the last place of `f32`.

use super::{PatchCounts, simd};
use crate::tensor::{Accumulator, Dtype, Float, with_float};

/// Columns that are summed for all rows before the next ones: their part of `v` stays in the L1 cache.
const STRIP: usize = 256;
/// Rows that share the loaded part of `v`.
const ROWS: usize = 4;

/// Adds the product of `u` (`[n_rows, rank]`) and `v` (`[rank, n_columns]`) to `sums` (`[n_rows, n_columns]`), one
/// step of the rank after another.
///
/// Calls with consecutive parts of the rank give the same result as one call with the whole rank.
///
/// # Panics
/// If the lengths are inconsistent.
pub fn add_low_rank(u: &[f32], v: &[f32], rank: usize, n_columns: usize, sums: &mut [f32]) {
    if rank == 0 || n_columns == 0 {
        return;
    }
    assert_eq!(v.len(), rank * n_columns, "v is [rank, n_columns]");
    assert_eq!(u.len() * n_columns, sums.len() * rank, "u is [n_rows, rank], sums is [n_rows, n_columns]");
    simd::add_low_rank(u, v, rank, n_columns, sums);
}

/// Replaces `weights` by `weights + sums * scale`, rounded once to their dtype, and counts the effects; a NaN weight
/// keeps its bits. `weights` are little-endian elements of `dtype`, as many as `sums`.
///
/// # Panics
/// If the lengths are inconsistent, or `dtype` is not a float.
pub fn merge_sums(dtype: Dtype, weights: &mut [u8], sums: &[f32], scale: f32) -> PatchCounts {
    assert_eq!(weights.len() * 8, sums.len() * dtype.bitsize(), "one sum per weight");
    simd::merge_sums(dtype, weights, sums, scale)
}

/// The reference implementation of [`add_low_rank`], `WIDTH` columns at a time.
#[inline(always)]
pub(super) fn add_products<const WIDTH: usize>(u: &[f32], v: &[f32], rank: usize, n_columns: usize, sums: &mut [f32]) {
    for strip in (0..n_columns).step_by(STRIP) {
        let strip_end = n_columns.min(strip + STRIP);
        for (u, sums) in u.chunks(ROWS * rank).zip(sums.chunks_mut(ROWS * n_columns)) {
            let mut column = strip;
            if u.len() == ROWS * rank {
                while column + WIDTH <= strip_end {
                    add_tile::<WIDTH>(u, v, rank, n_columns, column, sums);
                    column += WIDTH;
                }
            }
            for (u, sums) in u.chunks_exact(rank).zip(sums.chunks_exact_mut(n_columns)) {
                for (sum, column) in sums[column..strip_end].iter_mut().zip(column..) {
                    *sum = (0..rank).fold(*sum, |sum, t| u[t].mul_add(v[t * n_columns + column], sum));
                }
            }
        }
    }
}

#[inline(always)]
fn add_tile<const WIDTH: usize>(u: &[f32], v: &[f32], rank: usize, n_columns: usize, column: usize, sums: &mut [f32]) {
    let mut tile = [[0.0f32; WIDTH]; ROWS];
    for (row, tile) in tile.iter_mut().enumerate() {
        tile.copy_from_slice(&sums[row * n_columns + column..][..WIDTH]);
    }
    for t in 0..rank {
        let v = &v[t * n_columns + column..][..WIDTH];
        for (row, tile) in tile.iter_mut().enumerate() {
            let u = u[row * rank + t];
            for (sum, &v) in tile.iter_mut().zip(v) {
                *sum = u.mul_add(v, *sum);
            }
        }
    }
    for (row, tile) in tile.iter().enumerate() {
        sums[row * n_columns + column..][..WIDTH].copy_from_slice(tile);
    }
}

/// The reference implementation of [`merge_sums`].
#[inline(always)]
pub(super) fn merge_with_sums(dtype: Dtype, weights: &mut [u8], sums: &[f32], scale: f32) -> PatchCounts {
    with_float!(dtype, T => merge_as::<T>(weights, sums, scale), else unreachable!("weights are floats"))
}

#[inline(always)]
fn merge_as<T: Float>(weights: &mut [u8], sums: &[f32], scale: f32) -> PatchCounts {
    let mut counts = PatchCounts { touched: sums.len() as u64, ..PatchCounts::default() };
    // Counted in pieces, so that the counters of the inner loop stay narrow.
    for (weights, sums) in weights.chunks_mut(1024 * T::BYTES).zip(sums.chunks(1024)) {
        let (mut nonzero, mut absorbed, mut changed, mut overflowed) = (0u32, 0u32, 0u32, 0u32);
        for (element, &sum) in weights.chunks_exact_mut(T::BYTES).zip(sums) {
            let delta = sum * scale;
            let weight = T::from_le(element);
            let value = T::from_acc(weight.widen().add(T::Acc::from_f64(f64::from(delta))));
            let is_number = !weight.is_nan();
            let value = if is_number { value } else { weight };
            let (is_nonzero, is_same) = (delta != 0.0, value.same_bits(weight));
            nonzero += u32::from(is_nonzero);
            absorbed += u32::from(is_nonzero & is_same & is_number);
            changed += u32::from(!is_same);
            overflowed += u32::from(weight.is_finite() & !value.is_finite());
            value.write_le(element);
        }
        counts.nonzero += u64::from(nonzero);
        counts.absorbed += u64::from(absorbed);
        counts.changed += u64::from(changed);
        counts.overflowed += u64::from(overflowed);
    }
    counts
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let number = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8e6 - 1.0;
        (0..n).map(number).collect()
    }

    #[test]
    fn sums_have_the_same_bits_however_the_work_is_split() {
        for (n_rows, rank, n_columns) in [(1, 1, 1), (3, 2, 15), (4, 5, 16), (5, 16, 33), (9, 7, 300), (8, 1, 257)] {
            let (u, v) = (numbers(n_rows * rank, 1), numbers(rank * n_columns, 2));
            let mut plain = vec![0.0f32; n_rows * n_columns];
            for (at, sum) in plain.iter_mut().enumerate() {
                let (row, column) = (at / n_columns, at % n_columns);
                *sum = (0..rank).fold(0.0, |sum, t| u[row * rank + t].mul_add(v[t * n_columns + column], sum));
            }
            let mut sums = vec![0.0; plain.len()];
            add_low_rank(&u, &v, rank, n_columns, &mut sums);
            assert_eq!(sums, plain, "{n_rows} {rank} {n_columns}");
            let mut portable = vec![0.0; plain.len()];
            add_products::<8>(&u, &v, rank, n_columns, &mut portable);
            assert_eq!(portable, plain);
            // The rank in two parts.
            let cut = rank / 2;
            let part = |from: usize, to: usize| -> Vec<f32> {
                u.chunks(rank).flat_map(|row| row[from..to].iter().copied()).collect()
            };
            let mut sums = vec![0.0; plain.len()];
            add_low_rank(&part(0, cut), &v[..cut * n_columns], cut, n_columns, &mut sums);
            add_low_rank(&part(cut, rank), &v[cut * n_columns..], rank - cut, n_columns, &mut sums);
            assert_eq!(sums, plain);
        }
    }

    #[test]
    fn weights_are_rounded_once_and_counted() {
        let bytes = |values: &[f32]| values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect::<Vec<u8>>();
        let mut weights = bytes(&[1.0, 1.0, 1.0, 3e38, f32::NAN]);
        weights[8..].copy_from_slice(&0xffc1u16.to_le_bytes());
        let counts = merge_sums(Dtype::BF16, &mut weights, &[1.0, 0.001, 0.0, 3e38, 1.0], 0.5);
        assert_eq!(weights[..6], bytes(&[1.5, 1.0, 1.0]));
        assert_eq!(weights[8..], 0xffc1u16.to_le_bytes());
        let expected = PatchCounts { touched: 5, nonzero: 4, absorbed: 1, changed: 2, overflowed: 1 };
        assert_eq!(counts, expected);
    }

    #[test]
    fn every_dtype_is_merged_as_by_the_portable_loop() {
        let sums = numbers(1500, 3);
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
            let weights: Vec<u8> = (0..sums.len() * dtype.bitsize() / 8).map(|i| (i * 131 % 251) as u8).collect();
            let (mut fast, mut plain) = (weights.clone(), weights);
            let counts = merge_sums(dtype, &mut fast, &sums, 0.3);
            assert_eq!(counts, merge_with_sums(dtype, &mut plain, &sums, 0.3), "{dtype:?}");
            assert_eq!(fast, plain, "{dtype:?}");
        }
    }
}
