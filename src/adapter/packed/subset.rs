//! Codes sets of columns at the price of naming one among all of their size: `log2 C(n, k)` bits for `k` of `n`.
//!
//! A set is told by halves: how many of its columns lie in the lower half of the row, then the same for each half, until
//! one column is left, which is told among all of its part. If all sets are alike, that number has the hypergeometric
//! distribution, and the product of all odds on the way is `1 / C(n, k)`. The odds are computed in `f64` with nothing but
//! `+`, `*` and `/`, which IEEE 754 fixes to the last bit, so that both sides compute the same on every machine.

use std::collections::HashMap;

use super::range_coder::{Coder, MAX_TOTAL};

/// Where a half could hold more than so many different numbers of columns, all are taken to be alike: that costs a few bits
/// in a thousand columns.
const MAX_OUTCOMES: u64 = 1024;
/// Tables that are kept, and the most outcomes of one.
const MAX_TABLES: usize = 8192;
const MAX_KEPT: u64 = 64;

/// Codes sets of columns, and remembers the odds of halves that it met.
#[derive(Default)]
pub(super) struct SubsetCoder {
    /// By size of the part and columns in it.
    tables: HashMap<(u64, u64), Vec<u32>>,
}

impl SubsetCoder {
    /// Codes which `columns.len()` of the columns `first..first + n` they are, ascending; a decoder fills them in.
    ///
    /// A damaged code may name columns at or past the end of the row, or one twice.
    pub(super) fn code(&mut self, coder: &mut impl Coder, columns: &mut [u32], first: u64, n: u64) {
        let k = columns.len() as u64;
        debug_assert!(k <= n, "no more columns than there are");
        if k == 0 {
            return;
        }
        if k == n {
            columns.iter_mut().zip(first..).for_each(|(column, at)| *column = at as u32);
            return;
        }
        if let [column] = columns {
            let told = u64::from(*column).saturating_sub(first).min(n - 1);
            *column = (first + coder.below(n, told)).min(u64::from(u32::MAX)) as u32;
            return;
        }
        let middle = first + n / 2;
        let in_lower = columns.partition_point(|&column| u64::from(column) < middle) as u64;
        let in_lower = self.code_split(coder, n, k, in_lower) as usize;
        let (lower, upper) = columns.split_at_mut(in_lower);
        self.code(coder, lower, first, n / 2);
        self.code(coder, upper, middle, n - n / 2);
    }

    /// How many of `k` columns among `n` lie in the lower half.
    fn code_split(&mut self, coder: &mut impl Coder, n: u64, k: u64, in_lower: u64) -> u64 {
        let (lower, upper) = (n / 2, n - n / 2);
        let (least, most) = (k.saturating_sub(upper), k.min(lower));
        // A decoder knows nothing yet; what it hands in is no number of this half.
        let told = in_lower.clamp(least, most) - least;
        if most - least >= MAX_OUTCOMES {
            return least + coder.below(most - least + 1, told).min(most - least);
        }
        if most - least >= MAX_KEPT {
            return least + u64::from(coder.symbol(&split_odds(lower, upper, k), told as u32));
        }
        if self.tables.len() == MAX_TABLES {
            self.tables.clear();
        }
        let table = self.tables.entry((n, k)).or_insert_with(|| split_odds(lower, upper, k));
        least + u64::from(coder.symbol(table, told as u32))
    }
}

/// The odds of every number of columns in the lower half, summed up: `C(lower, j) * C(upper, k - j)`, scaled.
fn split_odds(lower: u64, upper: u64, k: u64) -> Vec<u32> {
    let (least, most) = (k.saturating_sub(upper), k.min(lower));
    let n_outcomes = (most - least + 1) as usize;
    // From the likeliest number on, in both directions: what is too rare for f64 becomes zero.
    let likeliest = ((k as f64 * lower as f64 / (lower + upper) as f64) as u64).clamp(least, most);
    let mut weights = vec![1.0f64; n_outcomes];
    let ratio = |j: u64| (lower - j) as f64 * (k - j) as f64 / ((j + 1) as f64 * (upper + j + 1 - k) as f64);
    for j in likeliest..most {
        weights[(j + 1 - least) as usize] = weights[(j - least) as usize] * ratio(j);
    }
    for j in (least..likeliest).rev() {
        weights[(j - least) as usize] = weights[(j + 1 - least) as usize] / ratio(j);
    }
    let sum = weights.iter().fold(0.0, |sum, weight| sum + weight);
    let room = f64::from(MAX_TOTAL - n_outcomes as u32);
    let mut cumulative = Vec::with_capacity(n_outcomes + 1);
    cumulative.push(0u32);
    for weight in weights {
        // Nothing is impossible; sums stay within the total because each share is rounded down.
        let odds = 1 + (weight / sum * room) as u32;
        cumulative.push((cumulative[cumulative.len() - 1] + odds).min(MAX_TOTAL));
    }
    cumulative
}

/// `log2 C(n, k)`: the information in a set of `k` of `n` columns, in bits.
pub(super) fn log2_binomial(n: u64, k: u64) -> f64 {
    let k = k.min(n - k.min(n));
    (1..=k).map(|i| ((n - k + i) as f64 / i as f64).log2()).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::range_coder::{Decoder, Encoder},
        *,
    };

    fn encode(rows: &[Vec<u32>], n: u64) -> Vec<u8> {
        let (mut encoder, mut subsets) = (Encoder::new(), SubsetCoder::default());
        rows.iter().for_each(|row| subsets.code(&mut encoder, &mut row.clone(), 0, n));
        encoder.finish()
    }

    proptest! {
        #[test]
        fn sets_come_back(n in 1u64..3000, seeds in prop::collection::vec(prop::collection::btree_set(any::<u32>(), 0..40), 0..20)) {
            let rows: Vec<Vec<u32>> = seeds
                .iter()
                .map(|row| row.iter().map(|x| (u64::from(*x) % n) as u32).collect::<std::collections::BTreeSet<_>>().into_iter().collect())
                .collect();
            let code = encode(&rows, n);
            let (mut decoder, mut subsets) = (Decoder::new(&code), SubsetCoder::default());
            for row in &rows {
                let mut found = vec![0; row.len()];
                subsets.code(&mut decoder, &mut found, 0, n);
                prop_assert_eq!(&found, row);
            }
            prop_assert!(decoder.is_finished());
        }
    }

    /// `n_rows` rows of `k` columns of `n`, by a small generator of numbers.
    fn random_rows(n_rows: usize, n: u64, k: usize) -> Vec<Vec<u32>> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % n) as u32
        };
        let mut row = || {
            let mut row = std::collections::BTreeSet::new();
            while row.len() < k {
                row.insert(next());
            }
            row.into_iter().collect()
        };
        (0..n_rows).map(|_| row()).collect()
    }

    #[test]
    fn sets_cost_what_they_tell() {
        for (n, k) in
            [(576, 1), (1536, 1), (576, 20), (1536, 20), (14336, 20), (4096, 300), (4096, 4000), (70_000, 1), (2, 1)]
        {
            let n_rows = 40_000 / k.min(2000);
            let limit = log2_binomial(n, k as u64) * n_rows as f64;
            let found = encode(&random_rows(n_rows, n, k), n).len() as f64 * 8.0;
            assert!(found < limit * 1.005 + 40.0, "{k} of {n}: {found} bits, the limit is {limit}");
        }
    }

    #[test]
    fn whole_rows_cost_nothing_and_long_rows_work() {
        assert_eq!(encode(&[(0..500).collect(), vec![]], 500).len(), 5 - 1);
        let dense: Vec<u32> = (0..9000).filter(|x| x % 2 == 0).collect();
        let code = encode(std::slice::from_ref(&dense), 9000);
        let mut found = vec![0; dense.len()];
        SubsetCoder::default().code(&mut Decoder::new(&code), &mut found, 0, 9000);
        assert_eq!(found, dense);
    }

    #[test]
    fn information_is_counted_in_bits() {
        assert_eq!(log2_binomial(8, 1), 3.0);
        assert!((log2_binomial(4, 2) - 6f64.log2()).abs() < 1e-12);
        assert_eq!(log2_binomial(5, 5), 0.0);
        assert_eq!(log2_binomial(5, 0), 0.0);
    }
}
