//! The head: logits of a few tokens at a time.

use rayon::prelude::*;

use super::{attention::exponentials, weight::CpuWeight};
use crate::backend::{Mat, MatMut, Threads, matmul};

/// The maximum number of logits in memory: 64 MiB, or those of one token.
const MAX_LOGITS: usize = 16 << 20;
/// The maximum number of tokens per chunk. With more tokens, widening the head again costs nothing next to the
/// product.
const MAX_TOKENS: usize = 512;

/// Tokens per chunk of logits.
fn tokens_at_once(n_vocab: usize) -> usize {
    (MAX_LOGITS / n_vocab).clamp(1, MAX_TOKENS)
}

/// The number of logits held in memory for `n_tokens` tokens.
pub(super) fn n_logits(n_vocab: usize, n_tokens: usize) -> usize {
    tokens_at_once(n_vocab).min(n_tokens) * n_vocab
}

/// See [`super::super::Device::cross_entropy`].
pub(super) fn cross_entropy(
    x: &mut [f32],
    head: &CpuWeight,
    labels: &[u32],
    grad_scale: Option<f32>,
    losses: &mut [f32],
    widened: &mut Vec<f32>,
) {
    let (d, n_vocab) = (head.d_in(), head.d_out());
    let at_once = tokens_at_once(n_vocab);
    let mut logits = vec![0.0; n_logits(n_vocab, labels.len())];
    let chunks = x.chunks_mut(at_once * d).zip(labels.chunks(at_once)).zip(losses.chunks_mut(at_once));
    for ((x, labels), losses) in chunks {
        let n = labels.len();
        let logits = &mut logits[..n * n_vocab];
        head.times(x, n, 0.0, logits, widened);
        logits.par_chunks_mut(n_vocab).zip(labels).zip(losses).for_each(|((logits, &label), loss)| {
            let of_label = logits[label as usize];
            let (largest, sum) = exponentials(logits);
            *loss = largest + sum.ln() - of_label;
            if let Some(grad_scale) = grad_scale {
                // The gradient with respect to the logits: softmax minus one at the label.
                let share = grad_scale / sum;
                for logit in logits.iter_mut() {
                    *logit *= share;
                }
                logits[label as usize] -= grad_scale;
            }
        });
        if grad_scale.is_some() {
            head.transposed_times(logits, n, x, widened);
        }
    }
}

/// See [`super::super::Device::argmax`].
pub(super) fn argmax(x: &[f32], head: &CpuWeight, widened: &mut Vec<f32>) -> Vec<u32> {
    let (d, n_vocab) = (head.d_in(), head.d_out());
    let mut best = Vec::with_capacity(x.len() / d);
    for x in x.chunks(tokens_at_once(n_vocab) * d) {
        let n = x.len() / d;
        let mut largest = vec![(f32::NEG_INFINITY, 0); n];
        for rows in head.blocks() {
            let mut logits = vec![0.0; n * rows.len()];
            let w = Mat::new(head.widened(rows.clone(), widened), rows.len(), d);
            matmul(Threads::Pool, 1.0, Mat::new(x, n, d), w.t(), 0.0, MatMut::new(&mut logits, n, rows.len()));
            largest.par_iter_mut().zip(logits.par_chunks(rows.len())).for_each(|(largest, logits)| {
                for (token, &logit) in (rows.start as u32..).zip(logits) {
                    if logit > largest.0 {
                        *largest = (logit, token);
                    }
                }
            });
        }
        best.extend(largest.into_iter().map(|(_, token)| token));
    }
    best
}
