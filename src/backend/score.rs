//! The scores by which weights are ranked.

use serde::{Deserialize, Serialize};

use super::keys::{Key, KeySpace, magnitude_key, score_key};
use crate::tensor::{Dtype, Float, RowBlock, with_float};

/// A kind of score, by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ScoreKind {
    /// `|w|`.
    #[default]
    Magnitude,
    /// `|w|`, smallest first.
    Smallest,
    /// A random rank, from a seed.
    Random,
    /// `|g|` of a gradient.
    Gradient,
    /// `|w * g|`.
    Snip,
    /// `|w| * norm[column]`, of the column's activations.
    Wanda,
    /// `g * g`.
    Fisher,
}

impl ScoreKind {
    /// The name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::Smallest => "smallest",
            Self::Random => "random",
            Self::Gradient => "gradient",
            Self::Snip => "snip",
            Self::Wanda => "wanda",
            Self::Fisher => "fisher",
        }
    }

    /// Whether it needs gradients.
    pub fn needs_gradients(self) -> bool {
        matches!(self, Self::Gradient | Self::Snip | Self::Fisher)
    }

    /// The space of its keys, for weights and gradients of these dtypes.
    ///
    /// Products are computed in `f32`, or in `f64` if weights or gradients are `f64`.
    pub fn key_space(self, weights: Dtype, gradients: Option<Dtype>) -> KeySpace {
        let gradients = gradients.unwrap_or(weights);
        let product = |double: bool| if double { KeySpace::F64 } else { KeySpace::F32 };
        match self {
            Self::Magnitude | Self::Smallest => KeySpace::of_magnitudes(weights),
            Self::Random => KeySpace::Random,
            Self::Gradient => KeySpace::of_magnitudes(gradients),
            Self::Fisher => product(gradients == Dtype::F64),
            Self::Wanda => product(weights == Dtype::F64),
            Self::Snip => product(weights == Dtype::F64 || gradients == Dtype::F64),
        }
    }
}

/// A score with its inputs besides the weights. Gradients are rows of the same shape, of any float dtype.
#[derive(Clone, Copy)]
pub enum Score<'a> {
    /// See [`ScoreKind::Magnitude`].
    Magnitude,
    /// See [`ScoreKind::Smallest`].
    Smallest,
    /// See [`ScoreKind::Random`]: the key of (row, column) is
    /// `mix(mix(seed + (first_row + row + 1) * G) + (column + 1) * G)`, with `mix` and `G` of SplitMix64, so that it
    /// depends on the position alone.
    Random {
        /// The seed, different for each tensor.
        seed: u64,
        /// The row of the tensor at which the block begins.
        first_row: u64,
    },
    /// See [`ScoreKind::Gradient`].
    Gradient(RowBlock<'a>),
    /// See [`ScoreKind::Snip`].
    Snip(RowBlock<'a>),
    /// See [`ScoreKind::Wanda`].
    Wanda(ColumnNorms<'a>),
    /// See [`ScoreKind::Fisher`].
    Fisher(RowBlock<'a>),
}

/// Activation norms, one per column, of one matrix or of several stacked ones.
#[derive(Clone, Copy)]
pub struct ColumnNorms<'a> {
    /// `[n_matrices, d_in]`; finite and at least 0.
    pub norms: &'a [f64],
    /// The row of its matrix at which the block begins.
    pub first_row: u64,
    /// Number of rows of one matrix.
    pub d_out: u64,
}

/// The position of a value that cannot be ranked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("row {row}, column {column}: the {what} is not a number")]
pub struct NotANumber {
    /// The first row with a NaN.
    pub row: usize,
    /// The first column with a NaN in that row.
    pub column: usize,
    /// `weight`, `gradient` or `score`.
    pub what: &'static str,
}

/// Rows with their score.
#[derive(Clone, Copy)]
pub struct ScoredRows<'a> {
    weights: RowBlock<'a>,
    score: Score<'a>,
    space: KeySpace,
}

impl<'a> ScoredRows<'a> {
    /// Rows ranked by `score`, with keys in the score's own space.
    ///
    /// # Panics
    /// If the weights are not floats, or gradients or norms have another shape.
    pub fn new(weights: RowBlock<'a>, score: Score<'a>) -> Self {
        let (kind, gradients) = match score {
            Score::Magnitude => (ScoreKind::Magnitude, None),
            Score::Smallest => (ScoreKind::Smallest, None),
            Score::Random { .. } => (ScoreKind::Random, None),
            Score::Gradient(g) => (ScoreKind::Gradient, Some(g)),
            Score::Snip(g) => (ScoreKind::Snip, Some(g)),
            Score::Fisher(g) => (ScoreKind::Fisher, Some(g)),
            Score::Wanda(norms) => {
                let last = (norms.first_row + weights.n_rows().saturating_sub(1) as u64) / norms.d_out;
                assert!(norms.norms.len() as u64 >= (last + 1) * weights.d_in() as u64, "one norm per column");
                (ScoreKind::Wanda, None)
            }
        };
        if let Some(g) = gradients {
            let shape = |rows: &RowBlock<'_>| (rows.n_rows(), rows.d_in());
            assert_eq!(shape(&g), shape(&weights), "one gradient per weight");
        }
        let space = kind.key_space(weights.dtype(), gradients.map(|g| g.dtype()));
        Self { weights, score, space }
    }

    /// The same with keys in a space shared with other tensors; see [`KeySpace::common`].
    ///
    /// # Panics
    /// If the score's keys do not fit in the space.
    pub fn in_space(self, space: KeySpace) -> Self {
        assert_eq!(self.space.common(space), space, "keys only widen");
        Self { space, ..self }
    }

    /// The space of the keys.
    pub fn space(&self) -> KeySpace {
        self.space
    }
    /// The weights.
    pub fn weights(&self) -> RowBlock<'a> {
        self.weights
    }

    /// The score.
    pub fn score(&self) -> Score<'a> {
        self.score
    }

    /// The run `rows` of these rows, with their scores.
    ///
    /// # Panics
    /// If the range is outside the rows.
    pub fn slice(&self, rows: std::ops::Range<usize>) -> Self {
        let start = rows.start as u64;
        let of = |gradients: RowBlock<'a>| gradients.slice(rows.clone());
        let score = match self.score {
            Score::Magnitude | Score::Smallest => self.score,
            Score::Random { seed, first_row } => Score::Random { seed, first_row: first_row + start },
            Score::Gradient(gradients) => Score::Gradient(of(gradients)),
            Score::Snip(gradients) => Score::Snip(of(gradients)),
            Score::Fisher(gradients) => Score::Fisher(of(gradients)),
            Score::Wanda(norms) => Score::Wanda(ColumnNorms { first_row: norms.first_row + start, ..norms }),
        };
        Self { weights: self.weights.slice(rows), score, ..*self }
    }

    /// Writes the keys of one row, `[d_in]`; larger keys are chosen first. `K` has the width of the space.
    pub(super) fn keys<K: Key>(&self, row: usize, scratch: &mut Scratch, keys: &mut [K]) -> Result<(), NotANumber> {
        debug_assert_eq!(K::BITS, self.space.bits());
        let bytes = self.weights.row(row);
        let has_nan = match self.score {
            Score::Magnitude => magnitudes(self.weights.dtype(), bytes, keys),
            Score::Smallest => {
                let has_nan = magnitudes(self.weights.dtype(), bytes, keys);
                keys.iter_mut().for_each(|key| *key = key.reversed());
                has_nan
            }
            Score::Random { seed, first_row } => {
                random_keys(seed, first_row + row as u64, keys);
                contains_nan(self.weights.dtype(), bytes)
            }
            Score::Gradient(gradients) => {
                magnitudes(gradients.dtype(), gradients.row(row), keys) | contains_nan(self.weights.dtype(), bytes)
            }
            Score::Snip(_) | Score::Wanda(_) | Score::Fisher(_) => {
                self.factors(row, scratch);
                products(&scratch.left, &scratch.right, self.in_single(), keys)
                    | (matches!(self.score, Score::Fisher(_)) && contains_nan(self.weights.dtype(), bytes))
            }
        };
        if has_nan { Err(self.first_nan(row, scratch)) } else { Ok(()) }
    }

    /// If the stored weights are their own keys: the bits of an element that form its key, and the largest key that is
    /// not NaN.
    pub(super) fn stored_keys(&self) -> Option<(u64, u64)> {
        let dtype = self.weights.dtype();
        let is_stored = matches!(self.score, Score::Magnitude) && self.space == KeySpace::of_magnitudes(dtype);
        is_stored.then(|| with_float!(dtype, T => T::KEY_BITS, else unreachable!("only floats are scored")))
    }

    /// Whether products are computed in `f32`.
    fn in_single(&self) -> bool {
        let double = |rows: &RowBlock<'_>| rows.dtype() == Dtype::F64;
        match &self.score {
            Score::Fisher(g) => !double(g),
            Score::Snip(g) => !double(g) && !double(&self.weights),
            _ => !double(&self.weights),
        }
    }

    /// Writes the two factors of a row's scores, widened: the score is `|left * right|`.
    fn factors(&self, row: usize, scratch: &mut Scratch) {
        let Scratch { left, right } = scratch;
        match self.score {
            Score::Fisher(gradients) => {
                widen(gradients, row, left);
                right.clone_from(left);
            }
            Score::Gradient(gradients) | Score::Snip(gradients) => {
                widen(self.weights, row, left);
                widen(gradients, row, right);
            }
            Score::Wanda(ColumnNorms { norms, first_row, d_out }) => {
                widen(self.weights, row, left);
                let matrix = ((first_row + row as u64) / d_out) as usize;
                right.clear();
                right.extend_from_slice(&norms[matrix * left.len()..(matrix + 1) * left.len()]);
            }
            Score::Magnitude | Score::Smallest | Score::Random { .. } => {
                widen(self.weights, row, left);
                right.clear();
                right.resize(left.len(), 1.0);
            }
        }
    }

    /// The position of the first NaN of a row that contains one.
    #[cold]
    fn first_nan(&self, row: usize, scratch: &mut Scratch) -> NotANumber {
        let single = self.in_single();
        let has_gradients = matches!(self.score, Score::Gradient(_) | Score::Snip(_) | Score::Fisher(_));
        self.factors(row, scratch);
        let mut weights = Vec::new();
        widen(self.weights, row, &mut weights);
        let found = (0..weights.len()).find_map(|column| {
            let (left, right) = (scratch.left[column], scratch.right[column]);
            let what = if weights[column].is_nan() {
                "weight"
            } else if has_gradients && right.is_nan() {
                "gradient"
            } else if !matches!(self.score, Score::Gradient(_)) && product(left, right, single).is_nan() {
                "score"
            } else {
                return None;
            };
            Some(NotANumber { row, column, what })
        });
        found.expect("a row reported to contain a NaN contains one")
    }
}

/// Buffers for a row's factors.
#[derive(Default)]
pub(super) struct Scratch {
    left: Vec<f64>,
    right: Vec<f64>,
}

/// Writes magnitude keys; returns whether an element is NaN.
fn magnitudes<K: Key>(dtype: Dtype, bytes: &[u8], keys: &mut [K]) -> bool {
    with_float!(dtype, T => {
        let mut has_nan = false;
        for (key, bytes) in keys.iter_mut().zip(bytes.chunks_exact(T::BYTES)) {
            let w = T::from_le(bytes);
            has_nan |= w.is_nan();
            *key = magnitude_key(w);
        }
        has_nan
    }, else unreachable!("only floats are scored"))
}

fn contains_nan(dtype: Dtype, bytes: &[u8]) -> bool {
    with_float!(dtype, T => {
        bytes.chunks_exact(T::BYTES).fold(false, |has_nan, bytes| has_nan | T::from_le(bytes).is_nan())
    }, else unreachable!("only floats are scored"))
}

fn widen(rows: RowBlock<'_>, row: usize, wide: &mut Vec<f64>) {
    wide.clear();
    with_float!(rows.dtype(), T => wide.extend(
        rows.row(row).chunks_exact(T::BYTES).map(|bytes| crate::tensor::Accumulator::to_f64(T::from_le(bytes).widen())),
    ), else unreachable!("only floats are scored"));
}

/// `left * right`, rounded once to the precision of the score.
#[inline(always)]
fn product(left: f64, right: f64, single: bool) -> f64 {
    if single { f64::from(left as f32 * right as f32) } else { left * right }
}

/// Writes the keys of products; returns whether one is NaN.
fn products<K: Key>(left: &[f64], right: &[f64], single: bool, keys: &mut [K]) -> bool {
    let mut has_nan = false;
    for ((key, &left), &right) in keys.iter_mut().zip(left).zip(right) {
        let score = product(left, right, single);
        has_nan |= score.is_nan();
        *key = score_key(score);
    }
    has_nan
}

/// SplitMix64's increment.
const G: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function, a bijection of 64-bit integers. Source: Steele, Lea, Flood, "Fast splittable
/// pseudorandom number generators", OOPSLA 2014.
#[inline(always)]
pub(crate) fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn random_keys<K: Key>(seed: u64, row: u64, keys: &mut [K]) {
    let mut state = mix(seed.wrapping_add((row + 1).wrapping_mul(G)));
    for key in keys {
        state = state.wrapping_add(G);
        *key = K::from_u64(mix(state));
    }
}
