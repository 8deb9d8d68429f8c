//! The gradient of the deltas, and the optimizer step.

use rayon::prelude::*;

use super::{
    super::device::{AdamScalars, AdamW},
    rows::dot,
};

/// Tokens per transposed tile: a tile of `x` stays in the L2 cache.
const TOKENS: usize = 256;
/// Rows per task.
const ROWS: usize = 64;
/// Values per task of a sum.
const VALUES: usize = 1 << 14;
/// Side of the square tiles of a transposition.
const SQUARE: usize = 16;

/// `grad[e] += sum_t dy[t, i] * x[t, columns[e]]` for each entry `e` of each row `i`.
///
/// `dy` is `[n, d_out]`, `x` `[n, d_in]`. Both are transposed one tile of tokens at a time, so that each entry is a
/// dot product of two contiguous runs; tiles are added in order.
pub(super) fn gather_dot(dy: &[f32], x: &[f32], n: usize, offsets: &[u32], columns: &[u32], grad: &mut [f32]) {
    if n == 0 {
        return;
    }
    let (d_out, d_in) = (dy.len() / n, x.len() / n);
    let mut x_tile = vec![0.0; d_in * TOKENS.min(n)];
    for first in (0..n).step_by(TOKENS) {
        let n_tile = TOKENS.min(n - first);
        let x = &x[first * d_in..][..n_tile * d_in];
        let x_tile = &mut x_tile[..d_in * n_tile];
        x_tile
            .par_chunks_mut(ROWS * n_tile)
            .enumerate()
            .for_each(|(i, tile)| transpose(x, n_tile, d_in, i * ROWS, tile));
        let dy = &dy[first * d_out..][..n_tile * d_out];
        by_rows(offsets, grad).into_par_iter().for_each_init(
            || vec![0.0; ROWS * n_tile],
            |dy_tile, (first_row, offsets, grad)| {
                let n_rows = offsets.len() - 1;
                transpose(dy, n_tile, d_out, first_row, &mut dy_tile[..n_rows * n_tile]);
                for row in 0..n_rows {
                    let dy = &dy_tile[row * n_tile..][..n_tile];
                    for e in offsets[row] as usize..offsets[row + 1] as usize {
                        let x = &x_tile[columns[e] as usize * n_tile..][..n_tile];
                        grad[e - offsets[0] as usize] += dot(dy, x);
                    }
                }
            },
        );
    }
}

/// `grad[e] += sum_t dy[t, i]` for each row `i` that has an entry `e`; `dy` is `[n, d_out]`.
///
/// Tokens are summed in order within a tile, and tiles are added in order.
pub(super) fn sum_tokens(dy: &[f32], d_out: usize, offsets: &[u32], grad: &mut [f32]) {
    by_rows(offsets, grad).into_par_iter().for_each(|(first_row, offsets, grad)| {
        let n_rows = offsets.len() - 1;
        for tile in dy.chunks(TOKENS * d_out) {
            let mut sums = [0.0; ROWS];
            for token in tile.chunks_exact(d_out) {
                sums.iter_mut().zip(&token[first_row..first_row + n_rows]).for_each(|(sum, dy)| *sum += dy);
            }
            for (sum, span) in sums.iter().zip(offsets.windows(2)) {
                for e in span[0]..span[1] {
                    grad[(e - offsets[0]) as usize] += sum;
                }
            }
        }
    });
}

/// Splits the rows into runs: first row, offsets and slice of `grad` of each.
fn by_rows<'a>(offsets: &'a [u32], mut grad: &'a mut [f32]) -> Vec<(usize, &'a [u32], &'a mut [f32])> {
    let n_rows = offsets.len() - 1;
    let mut runs = Vec::with_capacity(n_rows.div_ceil(ROWS));
    for first in (0..n_rows).step_by(ROWS) {
        let offsets = &offsets[first..=(first + ROWS).min(n_rows)];
        let (own, rest) = grad.split_at_mut((offsets[offsets.len() - 1] - offsets[0]) as usize);
        grad = rest;
        if !own.is_empty() {
            runs.push((first, offsets, own));
        }
    }
    runs
}

/// Transposes columns `first..` of `from`, `[n, d]`, into rows of `to`, `[_, n]`, in square tiles.
fn transpose(from: &[f32], n: usize, d: usize, first: usize, to: &mut [f32]) {
    let n_columns = to.len() / n;
    for column in (0..n_columns).step_by(SQUARE) {
        let columns = column..(column + SQUARE).min(n_columns);
        for token in (0..n).step_by(SQUARE) {
            for t in token..(token + SQUARE).min(n) {
                let from = &from[t * d + first..][..n_columns];
                for c in columns.clone() {
                    to[c * n + t] = from[c];
                }
            }
        }
    }
}

/// See [`super::super::Device::sums_of_squares`].
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    let square = |values: &[f32]| values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>();
    values.par_chunks(VALUES).map(square).collect::<Vec<f64>>().iter().sum()
}

/// See [`super::super::Device::adamw`].
pub(super) fn adamw(theta: &mut [f32], grad: &[f32], mean: &mut [f32], variance: &mut [f32], step: AdamW) {
    let AdamScalars {
        grad_scale,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        decay,
        step_size,
        bias_correction2_sqrt,
        eps,
    } = step.scalars();
    let values = theta.par_iter_mut().zip(grad).zip(mean).zip(variance).with_min_len(VALUES);
    values.for_each(|(((theta, grad), mean), variance)| {
        let grad = grad * grad_scale;
        *mean += (grad - *mean) * one_minus_beta1;
        *variance = *variance * beta2 + one_minus_beta2 * grad * grad;
        *theta = *theta * decay - step_size * (*mean / (variance.sqrt() / bias_correction2_sqrt + eps));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathered_dots_equal_the_dense_gradient() {
        let (n, d_out, d_in) = (300, 70, 33);
        let number = |i: usize| (i * 7919 % 101) as f32 / 50.0 - 1.0;
        let dy: Vec<f32> = (0..n * d_out).map(number).collect();
        let x: Vec<f32> = (0..n * d_in).map(|i| number(i + 13)).collect();
        // Rows of 0, 1 and 2 entries.
        let mut offsets = vec![0];
        let mut columns = Vec::new();
        for row in 0..d_out {
            columns.extend((0..row % 3).map(|j| ((row * 5 + j * 11) % d_in) as u32));
            offsets.push(columns.len() as u32);
        }
        let mut grad = vec![1.0; columns.len()];
        gather_dot(&dy, &x, n, &offsets, &columns, &mut grad);
        for row in 0..d_out {
            for e in offsets[row] as usize..offsets[row + 1] as usize {
                let term = |t: usize| f64::from(dy[t * d_out + row]) * f64::from(x[t * d_in + columns[e] as usize]);
                let expected = 1.0 + (0..n).map(term).sum::<f64>();
                assert!((f64::from(grad[e]) - expected).abs() < 1e-4, "row {row}: {} not {expected}", grad[e]);
            }
        }
    }

    #[test]
    fn the_first_step_of_adamw_is_the_learning_rate() {
        let (mut theta, mut mean, mut variance) = (vec![1.0, 1.0, 1.0], vec![0.0; 3], vec![0.0; 3]);
        let step =
            AdamW { learning_rate: 0.1, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.5, grad_scale: 2.0, step: 1 };
        adamw(&mut theta, &[3.0, -0.5, 0.0], &mut mean, &mut variance, step);
        // 5 % of the value decays, then one learning rate against the gradient's sign.
        for (found, expected) in theta.iter().zip([0.85, 1.05, 0.95]) {
            assert!((found - expected).abs() < 1e-6, "{found} not {expected}");
        }
        assert!((mean[0] - 0.6).abs() < 1e-6 && (variance[0] - 0.036).abs() < 1e-6);
    }
}
