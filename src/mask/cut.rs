//! Finds the key at which a budget is exhausted, without sorting.
//!
//! Keys are counted by their leading 16 bits, which gives the first 16 bits of the cut. Counting the next 16 bits of
//! the keys with that prefix refines it. Once enough keys have been seen, keys too small to matter are skipped and few
//! remain. If those fit in the allowed memory, all their bits are kept, and one pass over the data suffices.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use super::{MaskError, source::Source};
use crate::{
    backend::{Digit, KeySpace, count_keys, keys_from},
    checkpoint::{Context, Held, RowScan, scan_rows},
};

/// The key of the last chosen entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Cut {
    pub(super) key: u64,
    /// Number of chosen entries with exactly this key.
    pub(super) n_ties: u64,
}

/// Finds the key of the `n`-th best entry of all rows of `sources`.
///
/// Reads them once, or once per 16 bits of a key if the best keys do not fit in a quarter of the allowed memory.
pub(super) fn find_cut(ctx: &Context<'_>, sources: &[&Source<'_>], space: KeySpace, n: u64) -> Result<Cut, MaskError> {
    let scans: Vec<RowScan<'_>> = sources.iter().map(|source| source.scan).collect();
    // The counts twice: those of a block, and temporarily widened. At first all keys of a block are kept, and copied
    // once.
    let found_bytes = 12 * Digit::VALUES as u64;
    let mut digit = Digit::first(space);
    let mut left = n;
    loop {
        let mut counts = vec![0u64; Digit::VALUES];
        // The bound below which keys cannot be among the best; once enough keys have been seen, few are above it.
        let floor = AtomicU64::new(digit.floor());
        let best = Best::new(if digit.shift == 0 { 0 } else { (ctx.max_memory / 4 / 8) as usize });
        let mut kept = Vec::new();
        scan_rows(
            ctx,
            "ranking",
            &scans,
            |target| Held { span: found_bytes, ..sources[target].held(sources[target].scan.layout.d_in * 16) },
            |span, block| {
                let mut found = Found::default();
                let floor = floor.load(Relaxed);
                sources[span.target].for_each_run(ctx, space, span, block, |_, scored| {
                    if floor == 0 && !best.fits() {
                        // If most keys are counted, filtering them first does not pay off.
                        return Ok(count_keys(scored, digit, &mut found.counts)?);
                    }
                    let keys = keys_from(scored, floor)?;
                    keys.iter().filter_map(|&key| digit.of(key)).for_each(|value| found.counts[value] += 1);
                    if best.fits() {
                        found.keys.extend(keys);
                        found.keep_best(digit, left);
                    }
                    Ok(())
                })?;
                Ok::<_, MaskError>(found)
            },
            |_, found| {
                counts.iter_mut().zip(found.counts).for_each(|(count, n)| *count += u64::from(n));
                if let Some((value, _)) = reach(&counts, left) {
                    floor.store(digit.then(value).0, Relaxed);
                }
                best.keep(&mut kept, found.keys, floor.load(Relaxed));
                Ok(())
            },
        )?;
        let (value, n_above) = reach(&counts, left).expect("n is at most the number of keys");
        left -= n_above;
        let (key, below) = digit.then(value);
        let Some(below) = below else { return Ok(Cut { key, n_ties: left }) };
        if best.fits() {
            kept.retain(|&key| digit.of(key) == Some(value));
            return Ok(nth_largest(&mut kept, left));
        }
        digit = below;
    }
}

/// The counts and keys of a block of rows.
struct Found {
    counts: Vec<u32>,
    /// Keys that may be among the best.
    keys: Vec<u64>,
}

impl Default for Found {
    fn default() -> Self {
        Self { counts: vec![0; Digit::VALUES], keys: Vec::new() }
    }
}

impl Found {
    /// Drops keys that cannot be among the `n` best, judging by this block alone.
    fn keep_best(&mut self, digit: Digit, n: u64) {
        let counts: Vec<u64> = self.counts.iter().map(|&count| count.into()).collect();
        if let Some((value, _)) = reach(&counts, n) {
            let floor = digit.then(value).0;
            self.keys.retain(|&key| key >= floor);
            self.keys.shrink_to_fit();
        }
    }
}

/// Whether the best keys fit in memory.
struct Best {
    max_keys: usize,
    fit: AtomicBool,
}

impl Best {
    fn new(max_keys: usize) -> Self {
        Self { max_keys, fit: AtomicBool::new(max_keys > 0) }
    }
    fn fits(&self) -> bool {
        self.fit.load(Relaxed)
    }
    /// Adds `keys` to `kept`, or gives up if they do not fit.
    fn keep(&self, kept: &mut Vec<u64>, keys: Vec<u64>, floor: u64) {
        if !self.fits() {
            return;
        }
        if kept.len() + keys.len() > self.max_keys {
            kept.retain(|&key| key >= floor);
        }
        if kept.len() + keys.len() > self.max_keys {
            self.fit.store(false, Relaxed);
            *kept = Vec::new();
        } else {
            kept.extend(keys.into_iter().filter(|&key| key >= floor));
        }
    }
}

/// The value at which the count from the largest value down reaches `n`, and the count above that value.
fn reach(counts: &[u64], n: u64) -> Option<(usize, u64)> {
    let mut n_above = 0;
    for (value, count) in counts.iter().enumerate().rev() {
        if n_above + count >= n {
            return Some((value, n_above));
        }
        n_above += count;
    }
    None
}

/// The `n`-th largest of `keys` (from 1), and how many of the `n` largest are equal to it.
fn nth_largest(keys: &mut [u64], n: u64) -> Cut {
    let (above, &mut key, _) = keys.select_nth_unstable_by(n as usize - 1, |a, b| b.cmp(a));
    Cut { key, n_ties: n - above.iter().filter(|&&other| other > key).count() as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_largest_counts_its_ties() {
        for n in 1..=7 {
            let cut = nth_largest(&mut [5, 9, 5, 1, 5, 9, 0], n);
            let expected = [(9, 1), (9, 2), (5, 1), (5, 2), (5, 3), (1, 1), (0, 1)][n as usize - 1];
            assert_eq!((cut.key, cut.n_ties), expected);
        }
    }

    #[test]
    fn keys_that_do_not_fit_are_dropped_for_good() {
        let best = Best::new(4);
        let mut kept = Vec::new();
        best.keep(&mut kept, vec![1, 2, 3], 2);
        best.keep(&mut kept, vec![5, 6, 7], 3);
        assert_eq!(kept, [3, 5, 6, 7]);
        best.keep(&mut kept, vec![8], 3);
        assert!(!best.fits() && kept.is_empty());
        best.keep(&mut kept, vec![9], 9);
        assert!(kept.is_empty());
    }
}
