//! What becomes of the deltas at one position.

use crate::backend::mix;

/// How several deltas become one. Below, `d_i` is adapter `i`'s delta times its scale, `w_i` its weight.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum Method {
    /// `sum(w_i * d_i)`.
    Linear,
    /// Each adapter keeps the share `density` of its deltas that are largest; at each position the sign is elected that
    /// `sum(d_i)` has, plus where it is zero; the result is the mean of `w_i * d_i` over the adapters whose `d_i` has that sign.
    ///
    /// Source: TIES-Merging, <https://arxiv.org/abs/2306.01708>.
    Ties {
        /// Above 0, at most 1.
        density: f64,
    },
    /// Each adapter keeps a random share `density` of its deltas, divided by `density`; the result is `sum(w_i * d_i)`.
    ///
    /// Source: DARE, <https://arxiv.org/abs/2311.03099>.
    Dare {
        /// Above 0, at most 1.
        density: f64,
        /// Of what is random.
        seed: u64,
    },
    /// Deltas are kept as [`Self::Dare`] keeps them, then combined as [`Self::Ties`] combines them.
    DareTies {
        /// Above 0, at most 1.
        density: f64,
        /// Of what is random.
        seed: u64,
    },
    /// `w_i * d_i` of the first adapter that has the position.
    Priority,
}

impl Method {
    /// The name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Ties { .. } => "ties",
            Self::Dare { .. } => "dare",
            Self::DareTies { .. } => "dare-ties",
            Self::Priority => "priority",
        }
    }
    /// The share of deltas that each adapter keeps, where not all are.
    pub fn density(self) -> Option<f64> {
        match self {
            Self::Ties { density } | Self::Dare { density, .. } | Self::DareTies { density, .. } => Some(density),
            Self::Linear | Self::Priority => None,
        }
    }
    /// The seed of what is random.
    pub fn seed(self) -> Option<u64> {
        match self {
            Self::Dare { seed, .. } | Self::DareTies { seed, .. } => Some(seed),
            _ => None,
        }
    }

    /// One delta out of those at a position, in the adapters' order: each with its weight. What was dropped is zero.
    pub(super) fn combine(self, deltas: &[(f64, f64)]) -> f64 {
        match self {
            Self::Linear | Self::Dare { .. } => deltas.iter().map(|(weight, delta)| weight * delta).sum(),
            Self::Ties { .. } | Self::DareTies { .. } => {
                let is_plus = deltas.iter().map(|(_, delta)| delta).sum::<f64>() >= 0.0;
                let agrees = |delta: f64| if is_plus { delta > 0.0 } else { delta < 0.0 };
                let (mut sum, mut n) = (0.0, 0u32);
                for (weight, delta) in deltas.iter().filter(|(_, delta)| agrees(*delta)) {
                    sum += weight * delta;
                    n += 1;
                }
                sum / f64::from(n.max(1))
            }
            Self::Priority => deltas.first().map_or(0.0, |(weight, delta)| weight * delta),
        }
    }
}

/// Random choices of one adapter in one tensor: a pure function of seed, adapter, tensor, row and column.
#[derive(Clone, Copy)]
pub(super) struct Dice {
    seed: u64,
    density: f64,
}

impl Dice {
    /// The seed of a tensor is the first 8 bytes of the BLAKE3 of the seed, the adapter's id and the tensor's name.
    pub(super) fn new(seed: u64, id: &str, tensor: &str, density: f64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(id.as_bytes()).update(tensor.as_bytes());
        let seed = u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"));
        Self { seed, density }
    }

    /// Whether the delta at this position is kept.
    pub(super) fn keep(self, row: u64, column: u32) -> bool {
        let random = mix(mix(self.seed.wrapping_add(row)).wrapping_add(column.into()));
        // 53 bits of it as a number below 1.
        ((random >> 11) as f64) / ((1u64 << 53) as f64) < self.density
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_combined_as_the_papers_say() {
        // Three tasks at one position, as in the figure of TIES: two small ones up, a large one down.
        let deltas = [(1.0, 2.0), (1.0, 1.0), (1.0, -4.0)];
        assert_eq!(Method::Linear.combine(&deltas), -1.0);
        assert_eq!(Method::Ties { density: 1.0 }.combine(&deltas), -4.0);
        // With the last trimmed away the sign is plus, and the mean is over those that agree.
        assert_eq!(Method::Ties { density: 0.5 }.combine(&[(1.0, 2.0), (1.0, 1.0), (1.0, 0.0)]), 1.5);
        // The vote is not weighted, the mean is: (3 * 2 + 1 * 1) / 2.
        assert_eq!(Method::Ties { density: 1.0 }.combine(&[(3.0, 2.0), (1.0, 1.0), (9.0, -1.0)]), 3.5);
        // A draw elects plus.
        assert_eq!(Method::Ties { density: 1.0 }.combine(&[(1.0, 2.0), (1.0, -2.0)]), 2.0);
        assert_eq!(Method::Ties { density: 1.0 }.combine(&[(1.0, 0.0)]), 0.0);
        assert_eq!(Method::Priority.combine(&deltas), 2.0);
    }

    #[test]
    fn dice_keep_their_share_and_differ_by_adapter_and_tensor() {
        let kept = |dice: Dice| {
            (0..200u64).map(|row| (0..50).filter(|&column| dice.keep(row, column)).count()).collect::<Vec<_>>()
        };
        let dice = kept(Dice::new(1, "a", "w", 0.3));
        let n: usize = dice.iter().sum();
        // 10,000 throws of 0.3: within four standard deviations of 3,000.
        assert!((2817..3183).contains(&n), "{n}");
        assert_eq!(dice, kept(Dice::new(1, "a", "w", 0.3)));
        for other in [Dice::new(2, "a", "w", 0.3), Dice::new(1, "b", "w", 0.3), Dice::new(1, "a", "v", 0.3)] {
            assert_ne!(dice, kept(other));
        }
        assert!(kept(Dice::new(1, "a", "w", 1.0)).iter().all(|&n| n == 50));
    }
}
