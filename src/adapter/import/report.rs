//! What was converted, in numbers.

use serde::Serialize;

/// What was converted.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct ConvertReport {
    /// The input's format.
    pub from: String,
    /// The output's format.
    pub to: String,
    /// The base's name, where one was given.
    pub base: Option<String>,
    /// Whether no delta was rounded, nor will be by the output's reader: both do the same, bit for bit.
    pub exact: bool,
    /// The adapter's id, 64 hexadecimal digits, where the output or the input is one.
    pub id: Option<String>,
    /// Deltas read.
    pub n_entries: u64,
    /// Deltas written, padding counted.
    pub n_written: u64,
    /// Deltas that were rounded, or will be by the output's reader.
    pub n_rounded: u64,
    /// Per tensor, by name.
    pub tensors: Vec<ConvertedTensor>,
    /// Bytes of all files that were written.
    pub n_bytes: u64,
    /// What the output's format cannot say or its reader must know, in words.
    pub remarks: Vec<String>,
}

/// What became of one tensor's deltas.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct ConvertedTensor {
    /// The tensor's name in the base.
    pub tensor: String,
    /// The type of the deltas that were read.
    pub dtype: String,
    /// The type of the deltas that were written.
    pub stored_dtype: String,
    /// The type of the deltas as they are added to the weights: another one than they are written in where their reader rounds them.
    pub applied_dtype: String,
    /// Deltas read, duplicates and padding counted.
    pub n_entries: u64,
    /// Deltas written, padding counted.
    pub n_written: u64,
    /// Deltas that were added to another of the same position.
    pub n_summed: u64,
    /// Neutral entries (-0) that were added or dropped, since the foreign format asks for a fixed number.
    pub n_padding: u64,
    /// Deltas that were rounded to the type they are stored in, or will be to the type they are added in.
    pub n_rounded: u64,
    /// The largest difference that made.
    pub largest_error: f64,
}

impl ConvertedTensor {
    /// Whether the deltas are the same, in words.
    pub fn exactness(&self) -> String {
        let mut words = match self.n_rounded {
            0 => "exact".to_owned(),
            n => format!("{n} rounded to {}, by {:.2e} at most", self.applied_dtype, self.largest_error),
        };
        if self.n_summed > 0 {
            words += &format!("; {} summed with another of their position", self.n_summed);
        }
        words
    }
}

impl ConvertReport {
    pub(crate) fn new(from: &str, to: &str, tensors: Vec<ConvertedTensor>) -> Self {
        let sum = |of: fn(&ConvertedTensor) -> u64| tensors.iter().map(of).sum::<u64>();
        let n_rounded = sum(|tensor| tensor.n_rounded);
        Self {
            from: from.to_owned(),
            to: to.to_owned(),
            base: None,
            exact: n_rounded == 0,
            id: None,
            n_entries: sum(|tensor| tensor.n_entries),
            n_written: sum(|tensor| tensor.n_written),
            n_rounded,
            tensors,
            n_bytes: 0,
            remarks: Vec::new(),
        }
    }

    /// This conversion, and then `next` from what it wrote.
    pub(crate) fn then(mut self, next: Self) -> Self {
        for (tensor, next) in self.tensors.iter_mut().zip(&next.tensors) {
            debug_assert_eq!(tensor.tensor, next.tensor, "both list the same tensors by name");
            tensor.stored_dtype.clone_from(&next.stored_dtype);
            tensor.applied_dtype.clone_from(&next.applied_dtype);
            tensor.n_written = next.n_written;
            tensor.n_padding += next.n_padding;
            tensor.n_rounded += next.n_rounded;
            tensor.largest_error = tensor.largest_error.max(next.largest_error);
        }
        let Self { from, base, tensors, .. } = self;
        let Self { to, n_bytes, remarks, id, .. } = next;
        Self { base, n_bytes, remarks, id, ..Self::new(&from, &to, tensors) }
    }
}
