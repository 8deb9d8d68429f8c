//! Hot loops in GB/s of weights, with the speed of just reading the same bytes.
//!
//! `cargo bench --bench kernels`. Every group runs on as many threads as there are cores, over more bytes than any
//! cache holds. `read` takes the maximum of all elements with the widest instructions; it is the limit for the others.
//! Results and the machine: README.md in this folder.

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput};
use neuroada_ckpt::{
    Dtype,
    internals::{
        backend::{Score, ScoredRows, instruction_set, topk_rows},
        tensor::RowBlock,
    },
};
use rayon::prelude::*;

const BYTES: usize = 256 << 20;
/// Bytes per call, about a window of a file.
const BLOCK_BYTES: usize = 4 << 20;

/// Bell-shaped weights, the sum of four uniform ones, in the upper bits of an `f32`.
fn weights(dtype: Dtype) -> Vec<u8> {
    let width = dtype.bitsize() / 8;
    let mut bytes = vec![0u8; BYTES];
    bytes.par_chunks_exact_mut(1 << 16).enumerate().for_each(|(chunk, bytes)| {
        let mut state = chunk as u64 * 0x9e37_79b9_7f4a_7c15 + 1;
        for element in bytes.chunks_exact_mut(width) {
            let mut sum = 0.0f32;
            for _ in 0..4 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                sum += (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            }
            match dtype {
                Dtype::F32 => element.copy_from_slice(&sum.to_le_bytes()),
                Dtype::BF16 => element.copy_from_slice(&half::bf16::from_f32(sum).to_le_bytes()),
                Dtype::F16 => element.copy_from_slice(&half::f16::from_f32(sum).to_le_bytes()),
                // The sign, four exponent bits and three mantissa bits, truncated.
                _ => {
                    element[0] = ((sum.to_bits() >> 24 & 0x80)
                        | ((sum.to_bits() >> 20).wrapping_sub(120 << 3) & 0x7f).min(0x7e))
                        as u8;
                }
            }
        }
    });
    bytes
}

/// The limit: all bytes, read once.
fn read(bytes: &[u8]) -> u64 {
    let max_of = |bytes: &[u8]| {
        let mut max = [0u64; 32];
        for chunk in bytes.chunks_exact(256) {
            for (max, word) in max.iter_mut().zip(chunk.chunks_exact(8)) {
                *max |= u64::from_le_bytes(word.try_into().expect("eight bytes"));
            }
        }
        max.iter().fold(0, |all, max| all | max)
    };
    bytes.par_chunks(BLOCK_BYTES).map(max_of).reduce(|| 0, |a, b| a | b)
}

fn main() {
    println!("instruction set: {}, threads: {}", instruction_set(), rayon::current_num_threads());
    let mut criterion = Criterion::default()
        .configure_from_args()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    for (name, dtype) in [("bf16", Dtype::BF16), ("f32", Dtype::F32), ("f8_e4m3", Dtype::F8_E4M3)] {
        let bytes = weights(dtype);
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(BYTES as u64));
        group.bench_function("read", |b| b.iter(|| read(black_box(&bytes))));
        for d_in in [2048, 4096, 14336] {
            let row_bytes = d_in * dtype.bitsize() / 8;
            let block_bytes = BLOCK_BYTES / row_bytes * row_bytes;
            for k in [1, 20, 256] {
                group.bench_function(format!("topk/d_in={d_in}/k={k}"), |b| {
                    b.iter(|| {
                        let n_chosen = |bytes: &[u8]| {
                            let rows = RowBlock::new(bytes, dtype, bytes.len() / row_bytes, d_in);
                            topk_rows(&ScoredRows::new(rows, Score::Magnitude), k).expect("all are numbers").len()
                        };
                        bytes.par_chunks_exact(block_bytes).map(n_chosen).sum::<usize>()
                    });
                });
            }
        }
        group.finish();
    }
    criterion.final_summary();
}
