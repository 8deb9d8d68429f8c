//! Chooses rows on a GPU if it supports the score, otherwise on the CPU.

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{Factor, GpuError, Ranked, RowRanker};
use crate::backend::{AcceleratorError, ChooseError, ChosenRows, RowChooser, Score, ScoredRows, mix, topk_rows};

impl From<GpuError> for ChooseError {
    fn from(error: GpuError) -> Self {
        AcceleratorError::from(error).into()
    }
}

/// Chooses on the GPU what it supports, checks a sample of the results, and counts rows.
pub struct GpuChooser {
    ranker: RowRanker,
    /// The fraction of rows that are chosen again on the CPU.
    check: f64,
    seed: u64,
    n_rows: AtomicU64,
    n_left: AtomicU64,
    n_checked: AtomicU64,
}

impl fmt::Debug for GpuChooser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.ranker.gpu())
    }
}

impl GpuChooser {
    /// A chooser that uses a ranker and chooses the fraction `check` (0 to 1) of all rows again on the CPU: a random
    /// sample, with at least one row of each block unless the fraction is 0.
    pub fn new(ranker: RowRanker, check: f64) -> Self {
        let [n_rows, n_left, n_checked] = [0, 0, 0].map(AtomicU64::new);
        // A different sample in each run, so that intermittent errors are eventually found.
        Self { ranker, check, seed: RandomState::new().hash_one(0), n_rows, n_left, n_checked }
    }

    /// Chooses a random sample of the rows again and compares.
    fn check_sample(&self, rows: &ScoredRows<'_>, k: usize, columns: &[u32]) -> Result<(), ChooseError> {
        let n_rows = rows.weights().n_rows();
        if self.check <= 0.0 || n_rows == 0 || k == 0 {
            return Ok(());
        }
        let block = self.n_checked.load(Ordering::Relaxed);
        let random = |i: usize| mix(self.seed ^ mix(block << 32 | i as u64));
        let at_least = (random(n_rows) % n_rows as u64) as usize;
        let bound = (self.check * u64::MAX as f64) as u64;
        for row in (0..n_rows).filter(|&row| row == at_least || random(row) <= bound) {
            let expected = topk_rows(&rows.slice(row..row + 1), k)?;
            if expected != columns[row * k..(row + 1) * k] {
                return Err(self.wrong(row, n_rows, "its columns are not the largest").into());
            }
            self.n_checked.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn wrong(&self, row: usize, n_rows: usize, why: &'static str) -> GpuError {
        let ordinal = self.ranker.gpu().ordinal();
        GpuError::WrongResult { ordinal, kernel: "topk", row: row as u64, n_rows: n_rows as u64, why }
    }
}

impl RowChooser for GpuChooser {
    fn topk_rows(&self, rows: &ScoredRows<'_>, k: usize) -> Result<Vec<u32>, ChooseError> {
        let weights = rows.weights();
        let n_rows = weights.n_rows();
        let norms;
        let factor = match rows.score() {
            Score::Magnitude => Some(Factor::None),
            Score::Smallest => Some(Factor::Smallest),
            Score::Gradient(gradients) => Some(Factor::Gradient(gradients)),
            Score::Snip(gradients) => Some(Factor::Product(gradients)),
            Score::Fisher(gradients) => Some(Factor::Square(gradients)),
            Score::Wanda(of) => {
                // The matrices that the rows belong to.
                let (first, last) = (of.first_row / of.d_out, (of.first_row + n_rows.max(1) as u64 - 1) / of.d_out);
                let d_in = weights.d_in();
                let range = first as usize * d_in..(last as usize + 1) * d_in;
                norms = of.norms[range].iter().map(|&norm| norm as f32).collect::<Vec<f32>>();
                let narrow = |n: u64| u32::try_from(n).ok();
                narrow(of.first_row % of.d_out).zip(narrow(of.d_out)).map(|(first_row, d_out)| Factor::Norms {
                    norms: &norms,
                    first_row,
                    d_out,
                })
            }
            Score::Random { .. } => None,
        };
        let Some(factor) = factor.filter(|factor| RowRanker::supports(weights.dtype(), weights.d_in(), factor)) else {
            self.n_left.fetch_add(n_rows as u64, Ordering::Relaxed);
            return Ok(topk_rows(rows, k)?);
        };
        let Ranked { columns, first_nan } = self.ranker.topk_rows(weights, &factor, k)?;
        if let Some((row, _)) = first_nan {
            // The CPU reports the NaN, and decides whether there is one.
            topk_rows(&rows.slice(0..row + 1), k)?;
            return Err(self.wrong(row, n_rows, "a NaN was reported, but there is none").into());
        }
        self.n_rows.fetch_add(n_rows as u64, Ordering::Relaxed);
        self.check_sample(rows, k.min(weights.d_in()), &columns)?;
        Ok(columns)
    }

    fn counts(&self) -> ChosenRows {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ChosenRows { on_gpu: read(&self.n_rows), on_cpu: read(&self.n_left), checked: read(&self.n_checked) }
    }
}
