//! What a merge refuses and warns about, of both kinds of adapters: finite weights that it would make infinite, and deltas of no
//! plausible size.

use std::{collections::BTreeMap, path::Path};

use super::MergeError;
use crate::{checkpoint::Printable, tensor::Dtype};

/// Deltas up to this size are never warned about.
const MIN_IMPLAUSIBLE: f64 = 1.0;
/// Larger deltas are plausible up to this many times the largest original weight.
const MAX_RATIO: f64 = 100.0;

/// Finite weights that a merge would make infinite or NaN.
#[derive(Default)]
pub(super) struct Overflows {
    n: u64,
    /// Tensor, row and column.
    first: Option<(String, u64, u64)>,
}

impl Overflows {
    /// Takes in `n` weights of a block of rows, of which the one at `first` (row and column) comes first. A tensor's blocks come in
    /// order, tensors in any.
    pub(super) fn add(&mut self, tensor: &str, n: u64, first: (u64, u64)) {
        self.n += n;
        if self.first.as_ref().is_none_or(|(earliest, ..)| tensor < earliest.as_str()) {
            self.first = Some((tensor.to_owned(), first.0, first.1));
        }
    }

    /// Fails where there are any.
    ///
    /// # Errors
    /// [`MergeError::Overflow`].
    pub(super) fn refuse(&self, checkpoint: &Path) -> Result<(), MergeError> {
        let Some((tensor, row, column)) = self.first.clone() else { return Ok(()) };
        Err(MergeError::Overflow { path: checkpoint.to_owned(), tensor, row, column, n_overflowed: self.n })
    }
}

/// Whether a sum of deltas of this size can make a finite weight of type `dtype` infinite.
pub(super) fn can_overflow(dtype: Dtype, sum: f64) -> bool {
    // Not a number counts as too large.
    !matches!(sum.partial_cmp(&crate::backend::overflow_margin(dtype)), Some(std::cmp::Ordering::Less))
}

/// Whether the originals have to be measured before a delta of this size can be called plausible.
pub(super) fn needs_originals(delta: f64) -> bool {
    delta > MIN_IMPLAUSIBLE || delta.is_nan()
}

/// Deltas that are larger than the weights they are added to by orders of magnitude, as a flipped bit of an exponent makes them.
#[derive(Default)]
pub(super) struct Implausible {
    /// By the adapter's index.
    by_adapter: BTreeMap<usize, Worst>,
}

struct Worst {
    tensor: String,
    delta: f64,
    original: f64,
    n_tensors: u64,
}

impl Implausible {
    /// Compares an adapter's largest scaled delta on a tensor with the largest original weight there.
    pub(super) fn compare(&mut self, adapter: usize, tensor: &str, delta: f64, original: f64) {
        if !needs_originals(delta) || delta <= MAX_RATIO * original {
            return;
        }
        let n_tensors = self.by_adapter.get(&adapter).map_or(0, |worst| worst.n_tensors) + 1;
        let worst = self.by_adapter.entry(adapter).or_insert_with(|| Worst {
            tensor: tensor.to_owned(),
            delta,
            original,
            n_tensors,
        });
        worst.n_tensors = n_tensors;
        let order = worst.delta.total_cmp(&delta).then_with(|| tensor.cmp(&worst.tensor));
        if order == std::cmp::Ordering::Less {
            *worst = Worst { tensor: tensor.to_owned(), delta, original, n_tensors };
        }
    }

    /// A warning for each adapter, which `name` names by its index.
    pub(super) fn notes(&self, name: impl Fn(usize) -> String) -> Vec<String> {
        let note = |(&adapter, worst): (&usize, &Worst)| {
            let Worst { tensor, delta, original, n_tensors } = worst;
            let more = match n_tensors - 1 {
                0 => String::new(),
                n => format!(" ({n} more of its tensors are like it)"),
            };
            format!(
                "warning: adapter {}: tensor \"{}\": deltas of up to {delta:.1e} on weights of at most {original:.1e}{more}: is the \
                 file damaged, or the scale wrong?",
                name(adapter),
                Printable(tensor),
            )
        };
        self.by_adapter.iter().map(note).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deltas_are_implausible_above_one_and_a_hundred_times_the_originals() {
        let mut found = Implausible::default();
        for (delta, original) in [(1.0, 0.0), (0.5, 1e-9), (3.0, 0.03), (99.0, 1.0), (0.0, 0.0)] {
            found.compare(0, "plausible", delta, original);
        }
        assert!(found.notes(|_| String::new()).is_empty());
        found.compare(0, "b", 1.1, 0.01);
        found.compare(0, "a", f64::NAN, 0.01);
        found.compare(0, "c", 1e36, 0.25);
        found.compare(1, "d", 1e36, 0.25);
        let notes = found.notes(|adapter| format!("number {adapter}"));
        assert_eq!(notes.len(), 2);
        assert!(notes[0].starts_with("warning: adapter number 0: tensor \"a\": deltas of up to NaN"), "{notes:?}");
        assert!(notes[0].contains(" (2 more of its tensors are like it)"), "{notes:?}");
        assert!(notes[1].contains("tensor \"d\": deltas of up to 1.0e36 on weights of at most 2.5e-1"), "{notes:?}");
    }

    #[test]
    fn the_first_overflow_is_that_of_the_first_tensor_by_name() {
        let mut found = Overflows::default();
        found.refuse(Path::new("m")).unwrap();
        found.add("b", 2, (0, 1));
        found.add("a", 1, (5, 6));
        found.add("a", 1, (7, 0));
        let error = found.refuse(Path::new("m")).unwrap_err().to_string();
        assert_eq!(error, "m: \"a\" [5, 6]: the merge would make this finite weight infinite or NaN, and 3 more");
    }
}
