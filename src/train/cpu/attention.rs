//! Causal attention within each example.

use rayon::prelude::*;

use super::{
    super::config::Heads,
    rows::{dot, exp},
};
use crate::backend::{Mat, MatMut, Threads, matmul};

/// Queries per block; a block's scores are computed together.
const QUERIES: usize = 128;

/// Blocks of at most [`QUERIES`] tokens of each example: the example's start, and the block's range within the
/// example.
fn blocks(starts: &[usize]) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> + '_ {
    starts.windows(2).flat_map(|span| {
        let length = span[1] - span[0];
        (0..length).step_by(QUERIES).map(move |first| (span[0], first..(first + QUERIES).min(length)))
    })
}

fn scale(heads: Heads) -> f32 {
    1.0 / (heads.d_head as f32).sqrt()
}

/// Splits the first `n` elements off `rest`.
fn cut<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (front, tail) = std::mem::take(rest).split_at_mut(n);
    *rest = tail;
    front
}

/// See [`super::super::Device::attention`].
pub(super) fn forward(qkv: &[f32], starts: &[usize], heads: Heads, out: &mut [f32], lse: &mut [f32]) {
    let (width, d_q) = (heads.d_qkv(), heads.d_q());
    let (mut out, mut lse) = (out, lse);
    let tasks: Vec<_> = blocks(starts)
        .map(|(start, block)| {
            let n = block.len();
            (start, block, cut(&mut out, n * d_q), cut(&mut lse, n * heads.n_q))
        })
        .collect();
    tasks.into_par_iter().for_each_init(Vec::new, |scratch, (start, block, out, lse)| {
        let example = &qkv[start * width..];
        let keys = Keys { k: &example[d_q..], v: &example[d_q + heads.d_kv()..], stride: width };
        attend(&example[block.start * width..], block, keys, heads, out, Some(lse), scratch);
    });
}

/// Keys and values of one sequence, all heads, starting at its first position.
#[derive(Clone, Copy)]
struct Keys<'a> {
    k: &'a [f32],
    v: &'a [f32],
    /// Elements from one position to the next.
    stride: usize,
}

impl<'a> Keys<'a> {
    /// `[n, d_head]` keys and values of one head.
    fn head(self, head: usize, n: usize, d_head: usize) -> (Mat<'a>, Mat<'a>) {
        let of = |values: &'a [f32]| Mat::strided(&values[head * d_head..], n, d_head, self.stride);
        (of(self.k), of(self.v))
    }
}

/// Attends from the queries at `positions` (rows `qkv`) to all earlier positions and their own.
fn attend(
    qkv: &[f32],
    positions: std::ops::Range<usize>,
    keys: Keys<'_>,
    heads: Heads,
    out: &mut [f32],
    mut lse: Option<&mut [f32]>,
    scratch: &mut Vec<f32>,
) {
    let (n, n_keys, d_head) = (positions.len(), positions.end, heads.d_head);
    scratch.resize(n * n_keys, 0.0);
    for head in 0..heads.n_q {
        let (k, v) = keys.head(head / heads.group(), n_keys, d_head);
        let q = Mat::strided(&qkv[head * d_head..], n, d_head, heads.d_qkv());
        matmul(Threads::One, scale(heads), q, k.t(), 0.0, MatMut::new(scratch, n, n_keys));
        for (i, scores) in scratch.chunks_exact_mut(n_keys).enumerate() {
            let (seen, unseen) = scores.split_at_mut(positions.start + i + 1);
            unseen.fill(0.0);
            let log_sum = softmax(seen);
            if let Some(lse) = &mut lse {
                lse[i * heads.n_q + head] = log_sum;
            }
        }
        let out = MatMut::strided(&mut out[head * d_head..], n, d_head, heads.d_q());
        matmul(Threads::One, 1.0, Mat::new(scratch, n, n_keys), v, 0.0, out);
    }
}

/// Softmax in place: scores become probabilities that add up to 1. Returns the logarithm of the sum of the
/// exponentials.
pub(super) fn softmax(scores: &mut [f32]) -> f32 {
    let (max, sum) = exponentials(scores);
    let prob = 1.0 / sum;
    for score in scores {
        *score *= prob;
    }
    max + sum.ln()
}

/// Replaces each score by `e^(score - max)`. Returns the maximum and the sum; sixteen partial sums keep the order
/// fixed.
pub(super) fn exponentials(scores: &mut [f32]) -> (f32, f32) {
    const LANES: usize = 16;
    let mut max = [f32::NEG_INFINITY; LANES];
    for scores in scores.chunks(LANES) {
        for (max, &score) in max.iter_mut().zip(scores) {
            *max = if score > *max { score } else { *max };
        }
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0; LANES];
    for scores in scores.chunks_mut(LANES) {
        for (sum, score) in sums.iter_mut().zip(scores) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    (max, sums.iter().sum())
}

/// See [`super::super::Device::attention_backward`].
pub(super) fn backward(
    dout: &[f32],
    qkv: &[f32],
    out: &[f32],
    lse: &[f32],
    starts: &[usize],
    heads: Heads,
    dqkv: &mut [f32],
) {
    let (width, d_q, d_head, group) = (heads.d_qkv(), heads.d_q(), heads.d_head, heads.group());
    let tasks: Vec<(usize, usize)> =
        (0..starts.len() - 1).flat_map(|example| (0..heads.n_kv).map(move |kv_head| (example, kv_head))).collect();
    // Gradients of one key head and its query heads: `[length, group * d_head | d_head | d_head]`.
    let parts: Vec<Vec<f32>> = tasks
        .into_par_iter()
        .map_init(Vec::new, |scratch, (example, kv_head)| {
            let (start, end) = (starts[example], starts[example + 1]);
            let tokens = Tokens {
                dout: &dout[start * d_q..end * d_q],
                qkv: &qkv[start * width..end * width],
                out: &out[start * d_q..end * d_q],
                lse: &lse[start * heads.n_q..end * heads.n_q],
            };
            tokens.gradient(kv_head, heads, scratch)
        })
        .collect();
    let mut rest = dqkv;
    let examples: Vec<_> = starts.windows(2).map(|span| cut(&mut rest, (span[1] - span[0]) * width)).collect();
    examples.into_par_iter().zip(parts.par_chunks(heads.n_kv)).for_each(|(dqkv, parts)| {
        for (t, token) in dqkv.chunks_exact_mut(width).enumerate() {
            for (kv_head, part) in parts.iter().enumerate() {
                let part = &part[t * (group + 2) * d_head..][..(group + 2) * d_head];
                let (dq, dkv) = part.split_at(group * d_head);
                let (dk, dv) = dkv.split_at(d_head);
                token[kv_head * group * d_head..][..group * d_head].copy_from_slice(dq);
                token[d_q + kv_head * d_head..][..d_head].copy_from_slice(dk);
                token[d_q + heads.d_kv() + kv_head * d_head..][..d_head].copy_from_slice(dv);
            }
        }
    });
}

/// The rows of one example.
#[derive(Clone, Copy)]
struct Tokens<'a> {
    dout: &'a [f32],
    qkv: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
}

impl Tokens<'_> {
    /// With `P` the probabilities and `D = dO . O`: `dS = P * (dO V^T - D)`, `dQ = dS K`, `dK = dS^T Q`, `dV = P^T
    /// dO`.
    ///
    /// Source: Dao et al., <https://arxiv.org/abs/2205.14135>.
    fn gradient(self, kv_head: usize, heads: Heads, scratch: &mut Vec<f32>) -> Vec<f32> {
        let (width, d_q, d_head, group) = (heads.d_qkv(), heads.d_q(), heads.d_head, heads.group());
        let n_tokens = self.lse.len() / heads.n_q;
        let part_width = (group + 2) * d_head;
        let mut part = vec![0.0; n_tokens * part_width];
        let keys = Keys { k: &self.qkv[d_q..], v: &self.qkv[d_q + heads.d_kv()..], stride: width };
        for (_, block) in blocks(&[0, n_tokens]) {
            let (n, n_keys) = (block.len(), block.end);
            scratch.resize(2 * n * n_keys, 0.0);
            let (probs, ds) = scratch.split_at_mut(n * n_keys);
            let (k, v) = keys.head(kv_head, n_keys, d_head);
            for g in 0..group {
                let head = kv_head * group + g;
                let q = Mat::strided(&self.qkv[block.start * width + head * d_head..], n, d_head, width);
                let dout = Mat::strided(&self.dout[block.start * d_q + head * d_head..], n, d_head, d_q);
                matmul(Threads::One, scale(heads), q, k.t(), 0.0, MatMut::new(probs, n, n_keys));
                matmul(Threads::One, 1.0, dout, v.t(), 0.0, MatMut::new(ds, n, n_keys));
                let rows = probs.chunks_exact_mut(n_keys).zip(ds.chunks_exact_mut(n_keys));
                for (i, (probs, ds)) in rows.enumerate() {
                    let t = block.start + i;
                    let at = t * d_q + head * d_head;
                    let (dout, out) = (&self.dout[at..at + d_head], &self.out[at..at + d_head]);
                    let (d_dot, log_sum) = (dot(dout, out), self.lse[t * heads.n_q + head]);
                    for (prob, ds) in probs[..=t].iter_mut().zip(&mut ds[..=t]) {
                        *prob = exp(*prob - log_sum);
                        *ds = *prob * (*ds - d_dot);
                    }
                    probs[t + 1..].fill(0.0);
                    ds[t + 1..].fill(0.0);
                }
                let (probs, ds) = (Mat::new(probs, n, n_keys), Mat::new(ds, n, n_keys));
                let mut add = |a: Mat<'_>, b: Mat<'_>, alpha: f32, first: usize, column: usize, n_rows: usize| {
                    let to = &mut part[first * part_width + column * d_head..];
                    matmul(Threads::One, alpha, a, b, 1.0, MatMut::strided(to, n_rows, d_head, part_width));
                };
                add(ds, k, scale(heads), block.start, g, n);
                add(ds.t(), q, scale(heads), 0, group, n_keys);
                add(probs.t(), dout, 1.0, 0, group + 1, n_keys);
            }
        }
        part
    }
}

/// See [`super::super::Device::attention_cached`].
pub(super) fn cached(
    qkv: &[f32],
    starts: &[usize],
    past: &[usize],
    heads: Heads,
    cache: &mut [f32],
    capacity: usize,
    out: &mut [f32],
) {
    let (width, d_q, d_kv) = (heads.d_qkv(), heads.d_q(), heads.d_kv());
    let mut out = out;
    let slots = cache.chunks_exact_mut(capacity * 2 * d_kv);
    let tasks: Vec<_> = starts
        .windows(2)
        .zip(past)
        .zip(slots)
        .map(|((span, &past), slot)| (span[0]..span[1], past, slot, cut(&mut out, (span[1] - span[0]) * d_q)))
        .collect();
    tasks.into_par_iter().for_each_init(Vec::new, |scratch, (tokens, past, slot, out)| {
        let qkv = &qkv[tokens.start * width..tokens.end * width];
        for (token, to) in qkv.chunks_exact(width).zip(slot[past * 2 * d_kv..].chunks_exact_mut(2 * d_kv)) {
            to.copy_from_slice(&token[d_q..]);
        }
        let keys = Keys { k: slot, v: &slot[d_kv..], stride: 2 * d_kv };
        for (_, block) in blocks(&[0, tokens.len()]) {
            let (from, to) = (&qkv[block.start * width..], &mut out[block.start * d_q..block.end * d_q]);
            attend(from, past + block.start..past + block.end, keys, heads, to, None, scratch);
        }
    });
}
