//! Which deltas of an adapter are among its largest, found without sorting.

use super::{
    CombineError,
    input::CombineInput,
    survey::{CombinedTarget, members_bytes, read_members},
};
use crate::checkpoint::{Context, for_each_ordered};

/// The magnitude at which an adapter's largest deltas end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Cut {
    /// The least magnitude that is kept, as bits; of equal ones those that come first.
    key: u32,
    /// How many of that very magnitude are kept.
    n_ties: u64,
    /// Per target and piece: how many of that magnitude come before it.
    ties_before: Vec<Vec<u64>>,
}

/// A magnitude as an integer that orders like it.
fn key(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

impl Cut {
    /// The cut of each adapter at the `density * n_deltas` largest of its deltas, rounded down, at least one. Equal magnitudes
    /// are settled in favour of the smaller tensor name, row and column.
    ///
    /// Reads all adapters three times. Memory: half a megabyte per adapter, 8 bytes per piece.
    pub(super) fn of(
        ctx: &Context<'_>,
        inputs: &[CombineInput],
        targets: &[CombinedTarget<'_>],
        density: f64,
    ) -> Result<Vec<Self>, CombineError> {
        let mut left: Vec<u64> =
            inputs.iter().map(|input| ((density * input.adapter.nnz() as f64) as u64).max(1)).collect();
        // The upper 16 bits of the cut, then the lower 15.
        let mut upper = vec![0u32; inputs.len()];
        let counts = count(ctx, inputs, targets, 1 << 16, |_, key| Some(key >> 15))?;
        for i in 0..inputs.len() {
            (upper[i], left[i]) = reach(&counts[i], left[i]);
        }
        let counts = count(ctx, inputs, targets, 1 << 15, |i, key| (key >> 15 == upper[i]).then_some(key & 0x7fff))?;
        let mut cuts: Vec<Self> = (0..inputs.len())
            .map(|i| {
                let (lower, n_ties) = reach(&counts[i], left[i]);
                Self { key: upper[i] << 15 | lower, n_ties, ties_before: Vec::with_capacity(targets.len()) }
            })
            .collect();
        let mut so_far = vec![0u64; inputs.len()];
        for target in targets {
            cuts.iter_mut().for_each(|cut| cut.ties_before.push(Vec::new()));
            let keys: Vec<u32> = cuts.iter().map(|cut| cut.key).collect();
            for_each_ordered(
                ctx,
                target.pieces.clone(),
                |rows| members_bytes(ctx, inputs, target, rows),
                |rows| {
                    let parts = read_members(ctx, inputs, target, rows)?;
                    let ties = parts
                        .iter()
                        .zip(&target.members)
                        .map(|(part, &i)| part.values.iter().filter(|&&value| key(value) == keys[i]).count() as u64);
                    Ok::<Vec<u64>, CombineError>(ties.collect())
                },
                |_, ties| {
                    for (&i, n) in target.members.iter().zip(ties) {
                        cuts[i].ties_before.last_mut().expect("it was just added").push(so_far[i]);
                        so_far[i] += n;
                    }
                    Ok(())
                },
            )?;
        }
        Ok(cuts)
    }

    /// Makes zero of the deltas of a piece that are not kept.
    pub(super) fn trim(&self, target: usize, piece: usize, values: &mut [f32]) {
        let mut n_before = self.ties_before[target][piece];
        for value in values {
            let is_tie = key(*value) == self.key;
            if key(*value) < self.key || (is_tie && n_before >= self.n_ties) {
                *value = 0.0;
            }
            n_before += u64::from(is_tie);
        }
    }
}

/// Counts the keys of each adapter's deltas by what `digit` makes of them.
fn count(
    ctx: &Context<'_>,
    inputs: &[CombineInput],
    targets: &[CombinedTarget<'_>],
    n_digits: usize,
    digit: impl Fn(usize, u32) -> Option<u32> + Sync,
) -> Result<Vec<Vec<u64>>, CombineError> {
    let mut counts = vec![vec![0u64; n_digits]; inputs.len()];
    ctx.observer.begin("trimming", inputs.iter().map(|input| input.adapter.nnz()).sum());
    for target in targets {
        for_each_ordered(
            ctx,
            target.pieces.clone(),
            |rows| members_bytes(ctx, inputs, target, rows),
            |rows| {
                let parts = read_members(ctx, inputs, target, rows)?;
                ctx.observer.advance(parts.iter().map(|part| part.values.len() as u64).sum());
                let digits = parts.iter().zip(&target.members).map(|(part, &i)| {
                    part.values.iter().filter_map(|&value| digit(i, key(value))).collect::<Vec<u32>>()
                });
                Ok::<Vec<Vec<u32>>, CombineError>(digits.collect())
            },
            |_, digits| {
                for (&i, digits) in target.members.iter().zip(digits) {
                    digits.into_iter().for_each(|digit| counts[i][digit as usize] += 1);
                }
                Ok(())
            },
        )?;
    }
    Ok(counts)
}

/// The digit at which the `n` largest end, and how many of them have that digit.
fn reach(counts: &[u64], n: u64) -> (u32, u64) {
    let mut left = n;
    for (digit, &count) in counts.iter().enumerate().rev() {
        if count >= left {
            return (digit as u32, left);
        }
        left -= count;
    }
    unreachable!("no more are wanted than there are")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_stay_and_ties_go_to_the_first() {
        let mut cut = Cut { key: key(2.0), n_ties: 2, ties_before: vec![vec![0, 1]] };
        let mut values = [2.0, -3.0, 1.0, -2.0, 2.0, 0.0];
        cut.trim(0, 0, &mut values);
        assert_eq!(values, [2.0, -3.0, 0.0, -2.0, 0.0, 0.0]);
        let mut values = [1.0, 2.0, 2.0];
        cut.trim(0, 1, &mut values);
        assert_eq!(values, [0.0, 2.0, 0.0]);
        cut.n_ties = 0;
        cut.trim(0, 1, &mut values);
        assert_eq!(values, [0.0; 3]);
        assert_eq!(reach(&[5, 0, 3, 1], 4), (2, 3));
        assert_eq!(reach(&[5, 0, 3, 1], 5), (0, 1));
    }
}
