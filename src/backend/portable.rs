//! The plain reference implementations of the loops that choose.

use super::{CutRows, Digit, NotANumber, ScoredRows, keys::Key, score::Scratch};
use crate::tensor::{RowBlock, RowColumns};

/// Reference implementation of [`super::topk_rows`].
pub(super) fn topk_rows<K: Key>(rows: &ScoredRows<'_>, k: usize) -> Result<Vec<u32>, NotANumber> {
    let k = k.min(rows.weights().d_in());
    let mut columns = Vec::with_capacity(rows.weights().n_rows() * k);
    let mut topk = TopK::new(k);
    for_each_row::<K>(rows, |keys| topk.choose(keys, &mut columns))?;
    Ok(columns)
}

/// Reference implementation of [`super::count_keys`].
pub(super) fn count_keys<K: Key>(rows: &ScoredRows<'_>, digit: Digit, counts: &mut [u32]) -> Result<(), NotANumber> {
    for_each_row::<K>(rows, |keys| {
        for key in keys {
            if let Some(value) = digit.of(key.to_u64()) {
                counts[value] += 1;
            }
        }
    })
}

/// Reference implementation of [`super::keys_from`].
pub(super) fn keys_from<K: Key>(rows: &ScoredRows<'_>, bound: u64) -> Result<Vec<u64>, NotANumber> {
    let mut found = Vec::new();
    for_each_row::<K>(rows, |keys| for_each_from(keys, K::from_u64(bound), |key, _| found.push(key.to_u64())))?;
    Ok(found)
}

/// Reference implementation of [`super::cut_rows`].
pub(super) fn cut_rows<K: Key>(rows: &ScoredRows<'_>, cut: u64, max_ties: u64) -> Result<CutRows, NotANumber> {
    let cut = K::from_u64(cut);
    let mut chosen = CutRows::default();
    let mut row_columns = Vec::new();
    let mut ties_left = max_ties;
    for_each_row::<K>(rows, |keys| {
        row_columns.clear();
        for_each_from(keys, cut, |key, column| {
            let is_tie = key == cut;
            if is_tie && ties_left == 0 {
                return;
            }
            ties_left -= u64::from(is_tie);
            row_columns.push(column);
            chosen.is_tie.push(is_tie);
        });
        chosen.columns.push_row(&row_columns);
    })?;
    Ok(chosen)
}

/// Reference implementation of [`super::gather`].
pub(super) fn gather(rows: RowBlock<'_>, columns: &RowColumns) -> Vec<u8> {
    assert_eq!(rows.n_rows(), columns.n_rows(), "columns for each row");
    match rows.dtype().bitsize() / 8 {
        1 => gather_elements::<1>(rows, columns),
        2 => gather_elements::<2>(rows, columns),
        4 => gather_elements::<4>(rows, columns),
        8 => gather_elements::<8>(rows, columns),
        other => unreachable!("rows hold floats, none has {other} bytes"),
    }
}

fn gather_elements<const BYTES: usize>(rows: RowBlock<'_>, columns: &RowColumns) -> Vec<u8> {
    let mut gathered = Vec::with_capacity(columns.nnz());
    for row in 0..rows.n_rows() {
        let (elements, _) = rows.row(row).as_chunks::<BYTES>();
        gathered.extend(columns.row(row).iter().map(|&column| elements[column as usize]));
    }
    gathered.into_flattened()
}

fn for_each_row<K: Key>(rows: &ScoredRows<'_>, mut visit: impl FnMut(&[K])) -> Result<(), NotANumber> {
    let mut scratch = Scratch::default();
    let mut keys = vec![K::default(); rows.weights().d_in()];
    for row in 0..rows.weights().n_rows() {
        rows.keys(row, &mut scratch, &mut keys)?;
        visit(&keys);
    }
    Ok(())
}

/// Visits the keys of at least `bound`, in the order of their columns.
fn for_each_from<K: Key>(keys: &[K], bound: K, mut visit: impl FnMut(K, u32)) {
    // Most chunks contain none, which their maximum shows; compilers vectorize maxima.
    const CHUNK: usize = 64;
    for (i, chunk) in keys.chunks(CHUNK).enumerate() {
        if chunk.iter().fold(K::default(), |max, &key| max.max(key)) >= bound {
            for (j, &key) in chunk.iter().enumerate() {
                if key >= bound {
                    visit(key, (i * CHUNK + j) as u32);
                }
            }
        }
    }
}

/// Chooses the `k` largest keys of one row at a time.
struct TopK<K> {
    k: usize,
    lanes: Vec<K>,
    candidates: Vec<(K, u32)>,
    candidate_keys: Vec<K>,
}

impl<K: Key> TopK<K> {
    fn new(k: usize) -> Self {
        Self { k, lanes: Vec::new(), candidates: Vec::new(), candidate_keys: Vec::new() }
    }

    /// Appends the columns of the `k` largest of `keys`, ascending; ties go to the lower column.
    fn choose(&mut self, keys: &[K], columns: &mut Vec<u32>) {
        if self.k == 0 {
            return;
        }
        if self.k >= keys.len() {
            columns.extend(0..keys.len() as u32);
            return;
        }
        let bound = self.lower_bound(keys);
        let Self { k, candidates, candidate_keys, .. } = self;
        candidates.clear();
        for_each_from(keys, bound, |key, column| candidates.push((key, column)));
        if candidates.len() == *k {
            columns.extend(candidates.iter().map(|&(_, column)| column));
            return;
        }
        candidate_keys.clear();
        candidate_keys.extend(candidates.iter().map(|&(key, _)| key));
        let (_, &mut cut, _) = candidate_keys.select_nth_unstable_by(*k - 1, |a, b| b.cmp(a));
        let mut ties_left = *k - candidates.iter().filter(|&&(key, _)| key > cut).count();
        columns.extend(candidates.iter().filter_map(|&(key, column)| {
            let is_chosen = key > cut || (key == cut && ties_left > 0);
            ties_left -= usize::from(is_chosen && key == cut);
            is_chosen.then_some(column)
        }));
    }

    /// A lower bound of the `k`-th largest key, reached by at least `k` keys and close to it if `k` is small compared
    /// with the row.
    ///
    /// The row is distributed over a few times `k` lanes; the maxima of `k` lanes are `k` different keys.
    fn lower_bound(&mut self, keys: &[K]) -> K {
        let Self { k, lanes, .. } = self;
        if 8 * *k > keys.len() {
            return K::default();
        }
        lanes.clear();
        lanes.resize((4 * *k).next_multiple_of(64), K::default());
        for chunk in keys.chunks(lanes.len()) {
            for (lane, &key) in lanes.iter_mut().zip(chunk) {
                *lane = (*lane).max(key);
            }
        }
        let (_, &mut bound, _) = lanes.select_nth_unstable_by(*k - 1, |a, b| b.cmp(a));
        bound
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        backend::{ColumnNorms, KeySpace, Score, ScoreKind, cut_rows, topk_rows},
        tensor::{Dtype, Float, with_float},
    };

    fn bytes_of<T: Float<Acc = f32>>(values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * T::BYTES];
        for (bytes, &value) in bytes.chunks_exact_mut(T::BYTES).zip(values) {
            T::from_acc(value).write_le(bytes);
        }
        bytes
    }

    fn top(score: Score<'_>, weights: &[f32], d_in: usize, k: usize) -> Vec<u32> {
        let bytes = bytes_of::<f32>(weights);
        let rows = RowBlock::new(&bytes, Dtype::F32, weights.len() / d_in, d_in);
        topk_rows(&ScoredRows::new(rows, score), k).unwrap()
    }

    #[test]
    fn the_largest_magnitudes_win_and_ties_go_to_the_smaller_column() {
        assert_eq!(top(Score::Magnitude, &[0.5, -3.0, 3.0, 1.0], 4, 1), [1]);
        assert_eq!(top(Score::Magnitude, &[0.5, -3.0, 3.0, 1.0], 4, 3), [1, 2, 3]);
        assert_eq!(top(Score::Magnitude, &[0.0, -0.0, 0.0, f32::NEG_INFINITY, 7.0, 7.0], 3, 2), [0, 1, 0, 1]);
        assert_eq!(top(Score::Smallest, &[0.5, -3.0, -0.5, 1.0], 4, 1), [0]);
        assert_eq!(top(Score::Magnitude, &[1.0, 2.0], 2, 9), [0, 1]);
        assert_eq!(top(Score::Magnitude, &[1.0, 2.0], 2, 0), [0u32; 0]);
    }

    #[test]
    fn gradients_and_norms_enter_the_score() {
        let weights = [1.0, -2.0, 3.0];
        let grad_bytes = bytes_of::<bf16>(&[-9.0, 4.0, 1.0]);
        let grads = RowBlock::new(&grad_bytes, Dtype::BF16, 1, 3);
        assert_eq!(top(Score::Gradient(grads), &weights, 3, 1), [0]);
        assert_eq!(top(Score::Fisher(grads), &weights, 3, 2), [0, 1]);
        // |w * g| = 9, 8, 3.
        assert_eq!(top(Score::Snip(grads), &weights, 3, 2), [0, 1]);
        // The third matrix row belongs to the second matrix: |w| * norm = 3 and 2, then 1 and 6.
        let norms = ColumnNorms { norms: &[3.0, 1.0, 1.0, 3.0], first_row: 1, d_out: 2 };
        assert_eq!(top(Score::Wanda(norms), &[1.0, 2.0, 1.0, -2.0], 2, 1), [0, 1]);
    }

    #[test]
    fn the_first_nan_is_named() {
        let refused = |score: Score<'_>, weights: &[f32]| {
            let bytes = bytes_of::<f32>(weights);
            let rows = RowBlock::new(&bytes, Dtype::F32, weights.len() / 2, 2);
            topk_rows(&ScoredRows::new(rows, score), 1).unwrap_err().to_string()
        };
        let nan = f32::NAN;
        let random = Score::Random { seed: 0, first_row: 0 };
        for score in [Score::Magnitude, Score::Smallest, random] {
            let said = refused(score, &[1.0, 1.0, 1.0, nan, nan, 1.0]);
            assert_eq!(said, "row 1, column 1: the weight is not a number");
        }
        let grad_bytes = bytes_of::<f32>(&[1.0, nan]);
        let grads = RowBlock::new(&grad_bytes, Dtype::F32, 1, 2);
        for score in [Score::Gradient(grads), Score::Fisher(grads), Score::Snip(grads)] {
            assert_eq!(refused(score, &[1.0, 1.0]), "row 0, column 1: the gradient is not a number");
            assert_eq!(refused(score, &[nan, 1.0]), "row 0, column 0: the weight is not a number");
        }
        let norms = ColumnNorms { norms: &[1.0, 0.0], first_row: 0, d_out: 1 };
        assert_eq!(refused(Score::Wanda(norms), &[1.0, f32::INFINITY]), "row 0, column 1: the score is not a number");
    }

    #[test]
    fn random_keys_depend_on_the_position_alone() {
        let weights = vec![1.0; 40];
        let at = |first_row, n_rows: usize| top(Score::Random { seed: 5, first_row }, &weights[..n_rows * 8], 8, 3);
        let whole = at(0, 5);
        assert_eq!(whole[6..], at(2, 3));
        assert_ne!(whole, top(Score::Random { seed: 6, first_row: 0 }, &weights, 8, 3));
    }

    #[test]
    fn random_choice_is_uniform() {
        const N: usize = 24_000;
        let chosen = top(Score::Random { seed: 1, first_row: 0 }, &vec![0.0; N * 8], 8, 2);
        let mut counts = [0; 8];
        chosen.iter().for_each(|&column| counts[column as usize] += 1);
        // Each count has mean N / 4 and deviation below sqrt(N * 3 / 16) = 67; the bound is five deviations.
        assert!(counts.iter().all(|count| (N / 4 - 335..N / 4 + 335).contains(count)), "{counts:?}");
    }

    /// The expected result of any top-k: a full sort of each row.
    fn sorted_topk(keys: &[u64], k: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..keys.len() as u32).collect();
        order.sort_by_key(|&column| std::cmp::Reverse(keys[column as usize]));
        order.truncate(k);
        order.sort_unstable();
        order
    }

    #[test]
    fn awkward_sizes_of_every_dtype_equal_a_full_sort() {
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2] {
            for d_in in [1usize, 7, 8, 9, 31, 32, 33, 4096, 4097] {
                // A cheap sequence with repeats, which coarse dtypes round to many ties.
                let values: Vec<f64> = (0..2 * d_in).map(|i| ((i * 7919) % 613) as f64 / 97.0 - 3.0).collect();
                with_float!(dtype, T => {
                    let mut bytes = vec![0; values.len() * T::BYTES];
                    for (bytes, &value) in bytes.chunks_exact_mut(T::BYTES).zip(&values) {
                        T::from_acc(crate::tensor::Accumulator::from_f64(value)).write_le(bytes);
                    }
                    let rows = RowBlock::new(&bytes, dtype, 2, d_in);
                    let keys: Vec<u64> =
                        bytes.chunks_exact(T::BYTES).map(|bytes| Key::to_u64(T::from_le(bytes).magnitude_key())).collect();
                    for k in [1, 2, 5, 20, 256, d_in] {
                        let expected: Vec<u32> =
                            keys.chunks(d_in).flat_map(|row| sorted_topk(row, k)).collect();
                        let scored = ScoredRows::new(rows, Score::Magnitude);
                        assert_eq!(topk_rows(&scored, k).unwrap(), expected, "{dtype:?} {d_in} {k}");
                        let wide = scored.in_space(KeySpace::F64);
                        assert_eq!(topk_rows(&wide, k).unwrap(), expected, "{dtype:?} {d_in} {k}, widened");
                    }
                }, else unreachable!());
            }
        }
    }

    proptest! {
        #[test]
        fn rows_of_ties_equal_a_full_sort(keys in prop::collection::vec(0u16..6, 1..700), k in 1usize..80) {
            let mut columns = Vec::new();
            TopK::new(k.min(keys.len())).choose(&keys, &mut columns);
            let wide: Vec<u64> = keys.iter().map(|&key| key.into()).collect();
            prop_assert_eq!(columns, sorted_topk(&wide, k));
        }

        #[test]
        fn digits_lead_to_the_cut(weights in prop::collection::vec(-4i8..4, 1..200), rank in 0usize..200) {
            let rank = rank % weights.len();
            let bytes = bytes_of::<f32>(&weights.iter().map(|&w| f32::from(w) / 3.0).collect::<Vec<_>>());
            let rows = ScoredRows::new(RowBlock::new(&bytes, Dtype::F32, 1, weights.len()), Score::Magnitude);
            let (mut digit, mut before) = (Digit::first(rows.space()), 0);
            let cut = loop {
                let mut counts = vec![0; Digit::VALUES];
                super::super::count_keys(&rows, digit, &mut counts).unwrap();
                let value = (0..Digit::VALUES).rev().find(|&value| {
                    let found = before + counts[value] as usize > rank;
                    before += if found { 0 } else { counts[value] as usize };
                    found
                });
                match digit.then(value.unwrap()) {
                    (_, Some(below)) => digit = below,
                    (cut, None) => break cut,
                }
            };
            let chosen = cut_rows(&rows, cut, (rank + 1 - before) as u64).unwrap();
            prop_assert_eq!(chosen.columns.columns(), &topk_rows(&rows, rank + 1).unwrap()[..]);
            let n_ties = chosen.is_tie.iter().filter(|&&is_tie| is_tie).count();
            prop_assert_eq!(n_ties, rank + 1 - before);
        }
    }

    #[test]
    fn score_kinds_choose_their_arithmetic() {
        assert_eq!(ScoreKind::Gradient.key_space(Dtype::F64, Some(Dtype::BF16)), KeySpace::Stored(Dtype::BF16));
        assert_eq!(ScoreKind::Snip.key_space(Dtype::BF16, Some(Dtype::F64)), KeySpace::F64);
        assert_eq!(ScoreKind::Fisher.key_space(Dtype::F64, Some(Dtype::F16)), KeySpace::F32);
        // 1e-30 squared underflows in f32 only.
        let bytes = bytes_of::<f32>(&[0.0, 1e-30]);
        let grads = RowBlock::new(&bytes, Dtype::F32, 1, 2);
        assert_eq!(top(Score::Fisher(grads), &[1.0, 1.0], 2, 1), [0]);
        let wide: Vec<u8> = [0.0f64, 1e-30].iter().flat_map(|g| g.to_le_bytes()).collect();
        let grads = RowBlock::new(&wide, Dtype::F64, 1, 2);
        assert_eq!(top(Score::Fisher(grads), &[1.0, 1.0], 2, 1), [1]);
    }

    #[test]
    fn gathered_elements_follow_their_columns() {
        let bytes = [0u8, 1, 2, 3, 4, 5];
        let rows = RowBlock::new(&bytes, Dtype::F8_E5M2, 2, 3);
        let mut columns = RowColumns::default();
        columns.push_row(&[0, 2]);
        columns.push_row(&[]);
        assert_eq!(super::super::gather(rows, &columns), [0, 2]);
    }
}
