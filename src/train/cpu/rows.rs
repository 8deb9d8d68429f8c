//! Operations that process each token independently.

use rayon::prelude::*;

use super::super::config::Heads;

/// Minimum number of tokens per task.
const TOKENS: usize = 16;

/// Initializes every row with `bias`, or adds `bias` to it.
pub(super) fn start_with(bias: &[f32], accumulate: bool, y: &mut [f32]) {
    y.par_chunks_mut(bias.len()).with_min_len(TOKENS).for_each(|y| {
        for (y, bias) in y.iter_mut().zip(bias) {
            *y = if accumulate { *y + bias } else { *bias };
        }
    });
}

/// The dot product, with sixteen partial sums: the compiler vectorizes them, and their order is fixed.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_lanes.zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0] + rest
}

/// `1 / sqrt(mean(x^2) + eps)`.
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// See [`super::super::Device::rms_norm`].
pub(super) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) {
    let d = gain.len();
    y.par_chunks_mut(d).zip(x.par_chunks(d)).with_min_len(TOKENS).for_each(|(y, x)| {
        let scale = inverse_rms(x, eps);
        for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
            *y = x * scale * gain;
        }
    });
}

/// See [`super::super::Device::rms_norm_backward`].
pub(super) fn rms_norm_backward(dy: &[f32], x: &[f32], gain: &[f32], eps: f32, dx: &mut [f32]) {
    let d = gain.len();
    let rows = dx.par_chunks_mut(d).zip(dy.par_chunks(d)).zip(x.par_chunks(d)).with_min_len(TOKENS);
    rows.for_each_init(Vec::new, |scratch, ((dx, dy), x)| {
        norm_gradient(dy, x, gain, eps, scratch, |i, by_x| dx[i] += by_x);
    });
}

/// With `s = 1 / rms(x)` and `g = dy * gain`: `dx = s * g - x * s^3 * (g . x) / d`.
fn norm_gradient(
    dy: &[f32],
    x: &[f32],
    gain: &[f32],
    eps: f32,
    scratch: &mut Vec<f32>,
    mut take: impl FnMut(usize, f32),
) {
    scratch.clear();
    scratch.extend(dy.iter().zip(gain).map(|(dy, gain)| dy * gain));
    let scale = inverse_rms(x, eps);
    let projection = scale * scale * scale * dot(scratch, x) / x.len() as f32;
    for (i, (g, x)) in scratch.iter().zip(x).enumerate() {
        take(i, scale * g - x * projection);
    }
}

/// The query and key heads of a token, each with its gain.
fn heads_with_gains<'a>(
    token: &'a mut [f32],
    heads: Heads,
    gains: [&'a [f32]; 2],
) -> impl Iterator<Item = (&'a mut [f32], &'a [f32])> {
    let n_normed = heads.n_q + heads.n_kv;
    let with_gain = move |(h, head)| (head, if h < heads.n_q { gains[0] } else { gains[1] });
    token.chunks_exact_mut(heads.d_head).take(n_normed).enumerate().map(with_gain)
}

/// See [`super::super::Device::head_norm`].
pub(super) fn head_norm(qkv: &mut [f32], heads: Heads, gains: [&Vec<f32>; 2], eps: f32) {
    qkv.par_chunks_mut(heads.d_qkv()).with_min_len(TOKENS).for_each(|token| {
        for (head, gain) in heads_with_gains(token, heads, gains.map(Vec::as_slice)) {
            let scale = inverse_rms(head, eps);
            for (x, gain) in head.iter_mut().zip(gain) {
                *x *= scale * gain;
            }
        }
    });
}

/// See [`super::super::Device::head_norm_backward`].
pub(super) fn head_norm_backward(dqkv: &mut [f32], raw: &[f32], heads: Heads, gains: [&Vec<f32>; 2], eps: f32) {
    let width = heads.d_qkv();
    let rows = dqkv.par_chunks_mut(width).zip(raw.par_chunks(width)).with_min_len(TOKENS);
    rows.for_each_init(Vec::new, |scratch, (token, raw)| {
        let raw = raw.chunks_exact(heads.d_head);
        for ((head, gain), raw) in heads_with_gains(token, heads, gains.map(Vec::as_slice)).zip(raw) {
            let dy = head.to_vec();
            norm_gradient(&dy, raw, gain, eps, scratch, |i, by_x| head[i] = by_x);
        }
    });
}

/// See [`super::super::Device::rope`].
pub(super) fn rope(qkv: &mut [f32], positions: &[u32], heads: Heads, frequencies: &[f32], inverse: bool) {
    let half = heads.d_head / 2;
    let rows = qkv.par_chunks_mut(heads.d_qkv()).zip(positions).with_min_len(TOKENS);
    rows.for_each_init(
        || vec![(0.0, 0.0); half],
        |rotations, (token, &position)| {
            for (rotation, frequency) in rotations.iter_mut().zip(frequencies) {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                *rotation = (if inverse { -sin } else { sin }, cos);
            }
            for head in token.chunks_exact_mut(heads.d_head).take(heads.n_q + heads.n_kv) {
                let (low, high) = head.split_at_mut(half);
                for ((a, b), (sin, cos)) in low.iter_mut().zip(high).zip(rotations.iter()) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        },
    );
}

/// `e^x` within 2 units in the last place, in a form that the compiler vectorizes; it saturates at -87 and 88.
///
/// Source: the reduction by multiples of `ln 2` and the polynomial come from Cephes' `expf`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
    const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    // Written so that NaN stays NaN.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2.0 - n * LN2.1;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits() - 127) << 23);
    (p * r * r + r + 1.0) * power
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// See [`super::super::Device::swiglu`].
pub(super) fn swiglu(gate_up: &[f32], d_ff: usize, h: &mut [f32]) {
    h.par_chunks_mut(d_ff).zip(gate_up.par_chunks(2 * d_ff)).with_min_len(TOKENS).for_each(|(h, gate_up)| {
        let (gate, up) = gate_up.split_at(d_ff);
        for ((h, gate), up) in h.iter_mut().zip(gate).zip(up) {
            *h = gate * sigmoid(*gate) * up;
        }
    });
}

/// See [`super::super::Device::swiglu_backward`].
pub(super) fn swiglu_backward(dh: &[f32], gate_up: &[f32], d_ff: usize, d_gate_up: &mut [f32]) {
    let rows = d_gate_up.par_chunks_mut(2 * d_ff).zip(gate_up.par_chunks(2 * d_ff)).zip(dh.par_chunks(d_ff));
    rows.with_min_len(TOKENS).for_each(|((d_gate_up, gate_up), dh)| {
        let ((gate, up), (d_gate, d_up)) = (gate_up.split_at(d_ff), d_gate_up.split_at_mut(d_ff));
        for i in 0..d_ff {
            let s = sigmoid(gate[i]);
            d_gate[i] = dh[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
            d_up[i] = dh[i] * gate[i] * s;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_the_last_bits() {
        for i in -86_999..88_000 {
            let x = i as f32 * 1e-3;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 2.5e-7, "exp({x}) = {found}, not {expected}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 2e-38 && exp(1e30) > 1e38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn dot_covers_every_element_at_any_length() {
        for n in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(dot(&a, &vec![2.0; n]), (n * n.saturating_sub(1)) as f32);
        }
    }
}
