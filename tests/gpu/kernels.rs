//! Every kernel equals its reference implementation, with `==`.

use std::sync::Arc;

use half::{bf16, f16};
use neuroada_ckpt::{
    Dtype, RowColumns,
    internals::{
        backend::{
            ColumnNorms, PatchCounts, ScaledDeltas, Score, ScoredRows, add_low_rank, merge_sums, merged_values,
            topk_rows, union_columns,
        },
        gpu::{
            DeviceMatrix, DevicePatch, DeviceTerms, Factor, GpuError, LowRank, LowRankCounts, LowRankFactors, Queue,
            RowRanker, merged_low_rank,
        },
        tensor::RowBlock,
    },
};

use crate::{
    driver::queue,
    samples::{DTYPES, N_ROWS, bell, bytes_of, random, rows},
};

const D_IN: [usize; 15] = [1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 256, 257, 1000, 4096, 4097];
const K: [usize; 9] = [1, 2, 5, 20, 31, 32, 33, 100, 5000];

/// A ranker with two lanes and small pieces, so that even a few rows take several pieces.
fn ranker(queue: &Queue) -> RowRanker {
    RowRanker::new(queue.gpu(), 2, 1 << 20, 1 << 18)
}

#[test]
fn topk_equals_the_cpu_at_awkward_sizes() {
    let Some(queue) = queue() else { return };
    let ranker = ranker(&queue);
    for (dtype, d_in) in DTYPES.into_iter().flat_map(|dtype| D_IN.map(|d_in| (dtype, d_in))) {
        let bytes = rows(dtype, d_in, 1);
        let block = RowBlock::new(&bytes, dtype, N_ROWS, d_in);
        for k in K {
            let ranked = ranker.topk_rows(block, &Factor::None, k).unwrap();
            let expected = topk_rows(&ScoredRows::new(block, Score::Magnitude), k).unwrap();
            assert_eq!(ranked.first_nan, None);
            assert!(ranked.columns == expected, "{dtype:?} {d_in} {k}");
        }
    }
}

#[test]
fn rows_of_the_greatest_length_are_supported() {
    let Some(queue) = queue() else { return };
    let ranker = RowRanker::new(queue.gpu(), 1, 32 << 20, 32 << 20);
    let d_in = neuroada_ckpt::internals::gpu::MAX_COLUMNS;
    for dtype in [Dtype::BF16, Dtype::F32] {
        // The last columns are the largest; also a row of zeros, where the first columns win.
        let values = (0..2 * d_in as u64).map(|i| if i < d_in as u64 { (i / 7) as f64 } else { 0.0 });
        let bytes = bytes_of(dtype, values);
        let block = RowBlock::new(&bytes, dtype, 2, d_in);
        for k in [1, 20, 4096] {
            let ranked = ranker.topk_rows(block, &Factor::None, k).unwrap();
            let expected = topk_rows(&ScoredRows::new(block, Score::Magnitude), k).unwrap();
            assert!(ranked.columns == expected, "{dtype:?} {k}");
        }
        assert!(RowRanker::supports(dtype, d_in, &Factor::None));
        assert!(!RowRanker::supports(dtype, d_in + 1, &Factor::None));
    }
}

#[test]
fn the_first_nan_is_found_at_any_position() {
    let Some(queue) = queue() else { return };
    let ranker = RowRanker::new(queue.gpu(), 1, 8 << 20, 8 << 20);
    let (n_rows, d_in) = (9, 1030);
    let with_nans = |dtype: Dtype, places: &[usize]| {
        let mut bytes = bytes_of(dtype, (0..n_rows * d_in).map(|i| bell(i as u64)));
        let nan = if dtype == Dtype::F16 {
            f16::from_bits(0xfc01).to_le_bytes()
        } else {
            bf16::from_bits(0xff81).to_le_bytes()
        };
        for &at in places {
            let n = dtype.bitsize() / 8;
            bytes[(at + 1) * n - 2..(at + 1) * n].copy_from_slice(&nan);
        }
        bytes
    };
    for dtype in DTYPES {
        for places in [
            &[0][..],
            &[n_rows * d_in - 1],
            &[3 * d_in + 7, 3 * d_in + 6, 3 * d_in + 900],
            &[8 * d_in, d_in + 1029, d_in + 5],
        ] {
            let bytes = with_nans(dtype, places);
            let block = RowBlock::new(&bytes, dtype, n_rows, d_in);
            for k in [1, 3, 40] {
                let expected = topk_rows(&ScoredRows::new(block, Score::Magnitude), k).unwrap_err();
                let ranked = ranker.topk_rows(block, &Factor::None, k).unwrap();
                assert_eq!(ranked.first_nan, Some((expected.row, expected.column)), "{dtype:?} {places:?} {k}");
            }
        }
    }
}

#[test]
fn scores_of_gradients_and_norms_rank_as_on_the_cpu() {
    let Some(queue) = queue() else { return };
    let ranker = ranker(&queue);
    let d_in = 97;
    let finite = |dtype, seed| bytes_of(dtype, (0..N_ROWS * d_in).map(|i| bell(seed + i as u64)));
    for (of_weights, of_gradients) in DTYPES.into_iter().flat_map(|w| DTYPES.map(|g| (w, g))) {
        let (weight_bytes, gradient_bytes) = (finite(of_weights, 1), finite(of_gradients, 5_000));
        let weights = RowBlock::new(&weight_bytes, of_weights, N_ROWS, d_in);
        let gradients = RowBlock::new(&gradient_bytes, of_gradients, N_ROWS, d_in);
        // Three matrices of four rows; the block begins in the second row of the first.
        let norms: Vec<f64> = (0..3 * d_in).map(|i| bell(9_000 + i as u64).abs()).collect();
        let single: Vec<f32> = norms.iter().map(|&norm| norm as f32).collect();
        for (score, factor) in [
            (Score::Smallest, Factor::Smallest),
            (Score::Gradient(gradients), Factor::Gradient(gradients)),
            (Score::Snip(gradients), Factor::Product(gradients)),
            (Score::Fisher(gradients), Factor::Square(gradients)),
            (
                Score::Wanda(ColumnNorms { norms: &norms, first_row: 1, d_out: 4 }),
                Factor::Norms { norms: &single, first_row: 1, d_out: 4 },
            ),
        ] {
            for k in [1, 7, 50] {
                let ranked = ranker.topk_rows(weights, &factor, k).unwrap();
                let expected = topk_rows(&ScoredRows::new(weights, score), k).unwrap();
                assert_eq!(ranked.columns, expected, "{of_weights:?} {of_gradients:?} {k}");
            }
        }
    }
}

#[test]
fn a_nan_score_is_found_at_the_same_position_as_on_the_cpu() {
    let Some(queue) = queue() else { return };
    let ranker = ranker(&queue);
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    for (weights, gradients) in [
        ([1.0, 1.0, 1.0, nan], [1.0, 1.0, 1.0, 1.0]),
        ([1.0, 1.0, 1.0, 1.0], [1.0, nan, 1.0, nan]),
        ([1.0, 0.0, inf, 1.0], [1.0, inf, 0.0, 1.0]),
        ([1.0, 0.0, inf, 1.0], [1.0, 1.0, 0.0, 1.0]),
        ([1.0, 0.0, inf, 1.0], [1.0, 1.0, 1.0, 1.0]),
    ] {
        let (weights, gradients) = (bytes_of(Dtype::F32, weights), bytes_of(Dtype::BF16, gradients));
        let weights = RowBlock::new(&weights, Dtype::F32, 2, 2);
        let gradients = RowBlock::new(&gradients, Dtype::BF16, 2, 2);
        let norms = ColumnNorms { norms: &[1.0, 0.0], first_row: 0, d_out: 2 };
        for (score, factor) in [
            (Score::Smallest, Factor::Smallest),
            (Score::Gradient(gradients), Factor::Gradient(gradients)),
            (Score::Snip(gradients), Factor::Product(gradients)),
            (Score::Fisher(gradients), Factor::Square(gradients)),
            (Score::Wanda(norms), Factor::Norms { norms: &[1.0, 0.0], first_row: 0, d_out: 2 }),
        ] {
            let expected = topk_rows(&ScoredRows::new(weights, score), 1);
            let ranked = ranker.topk_rows(weights, &factor, 1).unwrap();
            assert_eq!(ranked.first_nan, expected.as_ref().err().map(|found| (found.row, found.column)));
            if let Ok(columns) = expected {
                assert_eq!(ranked.columns, columns);
            }
        }
    }
}

/// Two or three columns per row, the deltas, and `k`.
fn deltas_of(n_rows: usize, d_in: usize, k: usize, seed: u64) -> (RowColumns, Vec<f32>) {
    let mut columns = RowColumns::default();
    for row in 0..n_rows as u64 {
        let mut of_row: Vec<u32> =
            (0..).map(|i| random(seed + 100 * row + i) as u32 % d_in as u32).take(20 * k).collect();
        of_row.sort_unstable();
        of_row.dedup();
        let skip = of_row.len().saturating_sub(k);
        columns.push_row(&of_row[skip..]);
    }
    let values = (0..columns.nnz() as u64).map(|i| bell(seed + i) as f32).collect();
    (columns, values)
}

#[test]
fn one_adapter_merges_on_the_device_as_on_the_cpu_and_is_removed_exactly() {
    let Some(queue) = queue() else { return };
    for (dtype, d_in) in DTYPES.into_iter().flat_map(|dtype| [40, 333, 4097].map(|d_in| (dtype, d_in))) {
        let base = rows(dtype, d_in, 3);
        let (columns, values) = deltas_of(N_ROWS, d_in, 3, 77);
        let mut matrix = DeviceMatrix::new(&queue, RowBlock::new(&base, dtype, N_ROWS, d_in)).unwrap();
        let patch = DevicePatch::new(&queue, columns.columns(), &values, 3, d_in).unwrap();
        let expected = patched(dtype, &base, d_in, &[ScaledDeltas { columns: &columns, values: &values, scale: 0.7 }]);
        let originals = matrix.patch(&queue, &patch, 0.7_f64 as f32).unwrap();
        assert_eq!(matrix.download(&queue).unwrap(), expected, "{dtype:?} {d_in}");
        // From the originals, so that a second step does not accumulate on the first.
        matrix.patch_from(&queue, &patch, 0.7_f64 as f32, &originals).unwrap();
        assert_eq!(matrix.download(&queue).unwrap(), expected);
        matrix.restore(&queue, &patch, &originals).unwrap();
        assert_eq!(matrix.download(&queue).unwrap(), base);
    }
}

#[test]
fn several_adapters_merge_on_the_device_as_on_the_cpu() {
    let Some(queue) = queue() else { return };
    for (dtype, d_in) in DTYPES.into_iter().flat_map(|dtype| [5, 64, 333].map(|d_in| (dtype, d_in))) {
        let mut base = rows(dtype, d_in, 4);
        // A NaN keeps its payload.
        let nan: &[u8] = if dtype == Dtype::F32 { &[1, 2, 0xff, 0xff] } else { &[3, 0xff] };
        base[..nan.len()].copy_from_slice(nan);
        let made: Vec<_> = (0..3).map(|i| deltas_of(N_ROWS, d_in, 4, 1000 * i)).collect();
        let scales = [1.0, -0.3, 2.5];
        let parts: Vec<_> =
            made.iter().zip(scales).map(|((columns, values), scale)| ScaledDeltas { columns, values, scale }).collect();
        let terms: Vec<_> = parts.iter().map(|deltas| (deltas.columns, deltas.values, deltas.scale as f32)).collect();
        let mut matrix = DeviceMatrix::new(&queue, RowBlock::new(&base, dtype, N_ROWS, d_in)).unwrap();
        matrix.patch_terms(&queue, &DeviceTerms::new(&queue, &terms, d_in).unwrap()).unwrap();
        assert_eq!(matrix.download(&queue).unwrap(), patched(dtype, &base, d_in, &parts), "{dtype:?} {d_in}");
    }
}

/// Whole rows with the deltas merged, on the CPU.
fn patched(dtype: Dtype, base: &[u8], d_in: usize, parts: &[ScaledDeltas<'_>]) -> Vec<u8> {
    let touched = union_columns(&parts.iter().map(|deltas| deltas.columns).collect::<Vec<_>>());
    let block = RowBlock::new(base, dtype, touched.n_rows(), d_in);
    let originals = neuroada_ckpt::internals::backend::gather(block, &touched);
    let (values, _) = merged_values(dtype, parts, &touched, &originals);
    let n = dtype.bitsize() / 8;
    let mut bytes = base.to_vec();
    for row in 0..touched.n_rows() {
        for (&column, at) in touched.row(row).iter().zip(touched.row_range(row)) {
            let to = (row * d_in + column as usize) * n;
            bytes[to..to + n].copy_from_slice(&values[at * n..(at + 1) * n]);
        }
    }
    bytes
}

#[test]
fn every_value_rounds_as_on_the_cpu() {
    let Some(queue) = queue() else { return };
    // Every 16-bit weight, plus zero; and zero, plus floats of every kind.
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let n = 1 << 16;
    let columns: Vec<u32> = (0..n as u32).collect();
    let deltas: Vec<f32> = (0..n as u64)
        .map(|i| match i % 4 {
            0 => f32::from_bits(random(i) as u32),
            // Near the limits of the 16-bit range, and halfway between neighbors.
            1 => f32::from_bits(0x477f_e000 + i as u32),
            2 => f32::from_bits(0x3300_0000 + (i as u32) * 509),
            _ => f32::from_bits((random(i) as u32) << 12),
        })
        .map(|delta| if delta.is_nan() { f32::INFINITY } else { delta })
        .collect();
    let zeros = vec![0.0; n];
    for dtype in DTYPES {
        let zero_weights = bytes_of(dtype, (0..n).map(|_| 0.0));
        let cases: &[(&[u8], &[f32])] =
            if dtype == Dtype::F32 { &[(&zero_weights, &deltas)] } else { &[(&all, &zeros), (&zero_weights, &deltas)] };
        for (base, values) in cases {
            let mut matrix = DeviceMatrix::new(&queue, RowBlock::new(base, dtype, 1, n)).unwrap();
            let patch = DevicePatch::new(&queue, &columns, values, n, n).unwrap();
            matrix.patch(&queue, &patch, 1.0).unwrap();
            let of_row = RowColumns::uniform(columns.clone(), n);
            let expected = patched(dtype, base, n, &[ScaledDeltas { columns: &of_row, values, scale: 1.0 }]);
            assert!(matrix.download(&queue).unwrap() == expected, "{dtype:?}");
        }
    }
}

#[test]
fn low_rank_merges_equal_the_plain_loop() {
    let Some(queue) = queue() else { return };
    // Pieces of a few rows.
    let mut merger = LowRank::new(queue.gpu(), 40_000).unwrap();
    for (dtype, d_in) in DTYPES.into_iter().flat_map(|dtype| [1, 63, 64, 65, 200].map(|d_in| (dtype, d_in))) {
        for (n_rows, rank) in [(1, 1), (5, 16), (130, 17), (N_ROWS, 40)] {
            let bytes = bytes_of(dtype, (0..n_rows * d_in).map(|i| bell(i as u64)));
            let block = RowBlock::new(&bytes, dtype, n_rows, d_in);
            let b: Vec<f32> = (0..n_rows * rank).map(|i| bell(7 + i as u64) as f32).collect();
            let a: Vec<f32> = (0..rank * d_in).map(|i| bell(99 + i as u64) as f32).collect();
            let factors = LowRankFactors { b: &b, a: &a, rank, scale: 0.25 };
            let (merged, counts) = merger.merge(block, &factors).unwrap();
            assert!(merged == merged_low_rank(block, &factors), "{dtype:?} {n_rows} {d_in} {rank}");
            assert!((merged, counts) == on_the_cpu(block, &factors), "{dtype:?} {n_rows} {d_in} {rank}: {counts:?}");
        }
    }
}

/// The rows merged on the CPU, and the counts.
fn on_the_cpu(rows: RowBlock<'_>, factors: &LowRankFactors<'_>) -> (Vec<u8>, LowRankCounts) {
    let LowRankFactors { b, a, rank, scale } = *factors;
    let mut sums = vec![0.0; rows.n_rows() * rows.d_in()];
    add_low_rank(b, a, rank, rows.d_in(), &mut sums);
    let mut bytes = rows.bytes().to_vec();
    let PatchCounts { nonzero, absorbed, changed, overflowed, .. } = merge_sums(rows.dtype(), &mut bytes, &sums, scale);
    (bytes, LowRankCounts { nonzero, absorbed, changed, overflowed })
}

#[test]
fn low_rank_merges_count_what_the_cpu_counts() {
    let Some(queue) = queue() else { return };
    let mut merger = LowRank::new(queue.gpu(), 10_000).unwrap();
    // Edge-case rows, with deltas that are zero, are absorbed, overflow, or are NaN; the same factor twice, and
    // another.
    for (dtype, d_in) in DTYPES.into_iter().flat_map(|dtype| [64, 200].map(|d_in| (dtype, d_in))) {
        let mut bytes = rows(dtype, d_in, 3);
        let nan = if dtype == Dtype::F32 { &[1, 0, 0x80, 0xff][..] } else { &[1, 0xff] };
        bytes[..nan.len()].copy_from_slice(nan);
        let block = RowBlock::new(&bytes, dtype, N_ROWS, d_in);
        let b: Vec<f32> = (0..N_ROWS).map(|row| [1.0, 0.0, 1e-5, 3e38, f32::NAN, -60_000.0][row % 6]).collect();
        for values in [0.5, -1.0] {
            let a: Vec<f32> = (0..d_in).map(|i| if i % 3 == 0 { 0.0 } else { values }).collect();
            let factors = LowRankFactors { b: &b, a: &a, rank: 1, scale: 1.5 };
            let expected = on_the_cpu(block, &factors);
            let LowRankCounts { nonzero, absorbed, changed, overflowed } = expected.1;
            assert!(nonzero > 0 && absorbed > 0 && changed > 0 && overflowed > 0, "{:?}", expected.1);
            assert!(merger.merge(block, &factors).unwrap() == expected, "{dtype:?} {d_in}");
            let shared = Arc::new(a);
            for _ in 0..2 {
                let mut merged = bytes.clone();
                let counts = merger.merge_in_place(dtype, &mut merged, (&b, &shared, 1), 1.5).unwrap();
                assert!((merged, counts) == expected, "{dtype:?} {d_in}: in place");
            }
        }
    }
}

#[test]
fn a_hand_made_low_rank_merge() {
    let bytes = bytes_of(Dtype::F32, [1.0, 2.0, 3.0, 4.0]);
    let factors = LowRankFactors { b: &[1.0, 10.0], a: &[1.0, -1.0], rank: 1, scale: 0.5 };
    let merged = merged_low_rank(RowBlock::new(&bytes, Dtype::F32, 2, 2), &factors);
    assert_eq!(merged, bytes_of(Dtype::F32, [1.5, 1.5, 8.0, -1.0]));
}

#[test]
fn memory_too_small_for_one_row_is_reported() {
    let Some(queue) = queue() else { return };
    let bytes = bytes_of(Dtype::F32, [1.0; 100]);
    let rows = RowBlock::new(&bytes, Dtype::F32, 1, 100);
    let ranker = RowRanker::new(queue.gpu(), 1, 700, 1 << 20);
    match ranker.topk_rows(rows, &Factor::None, 2).unwrap_err() {
        GpuError::OutOfMemory { needed, available, .. } => assert_eq!((needed, available), (416, 350)),
        other => panic!("{other}"),
    }
    let factors = LowRankFactors { b: &[1.0], a: &[1.0; 100], rank: 1, scale: 1.0 };
    let error = LowRank::new(queue.gpu(), 100).unwrap().merge(rows, &factors).unwrap_err();
    assert!(error.to_string().contains("merging one row needs 1272 bytes"), "{error}");
}
