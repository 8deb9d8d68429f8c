//! What was extracted, in numbers.

use serde::Serialize;

use super::rows::Survey;

/// What was extracted from one tensor.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct ExtractedTensor {
    /// The tensor's name.
    pub tensor: String,
    /// The base's element type.
    pub dtype: String,
    /// The type that the deltas are stored in.
    pub values_dtype: String,
    /// Elements.
    pub n_elements: u64,
    /// Elements whose bits differ.
    pub n_changed: u64,
    /// Deltas.
    pub n_deltas: u64,
    /// L2 norm of the change.
    pub norm: f64,
    /// L2 norm of the part of it that no delta stands for.
    pub norm_lost: f64,
}

/// What was extracted from one kind of projection.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct ExtractKind {
    /// Such as `q_proj`.
    pub kind: String,
    /// Tensors that changed.
    pub n_tensors: u64,
    /// Their elements.
    pub n_elements: u64,
    /// Elements whose bits differ.
    pub n_changed: u64,
    /// Deltas.
    pub n_deltas: u64,
    /// L2 norm of the change.
    pub norm: f64,
    /// L2 norm of the part of it that no delta stands for.
    pub norm_lost: f64,
}

/// A tensor that changed and of which the adapter holds nothing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LeftOut {
    /// The tensor's name.
    pub tensor: String,
    /// Why.
    pub why: String,
}

/// What was extracted.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct ExtractReport {
    /// The base's name.
    pub base: String,
    /// The tuned checkpoint's name.
    pub tuned: String,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// Whether merging the adapter gives the tuned checkpoint byte for byte: every merged value was computed and compared.
    pub exact: bool,
    /// The adapter's id, 64 hexadecimal digits; none on a dry run.
    pub id: Option<String>,
    /// Deltas per row at most, where that was asked for.
    pub k: Option<u64>,
    /// Per kind of projection.
    pub kinds: Vec<ExtractKind>,
    /// All kinds together.
    pub total: ExtractKind,
    /// Per tensor that changed and takes part, by name.
    pub tensors: Vec<ExtractedTensor>,
    /// Tensors that changed and do not take part.
    pub left_out: Vec<LeftOut>,
    /// Tensors whose bytes are the same.
    pub n_same: u64,
    /// Deltas whose merged value is not the tuned one bit for bit; 0 unless a `k` was asked for.
    pub n_inexact: u64,
    /// Bytes of the adapter; none on a dry run.
    pub n_bytes: Option<u64>,
}

/// Numbers of several tensors on their way to an [`ExtractKind`].
#[derive(Default)]
pub(super) struct Totals {
    n_tensors: u64,
    n_elements: u64,
    n_changed: u64,
    n_deltas: u64,
    kept: f64,
    lost: f64,
}

impl Totals {
    pub(super) fn add(&mut self, n_elements: u64, survey: &Survey) {
        self.n_tensors += 1;
        self.n_elements += n_elements;
        self.n_changed += survey.n_changed;
        self.n_deltas += survey.n_chosen;
        self.kept += survey.kept;
        self.lost += survey.lost;
    }

    pub(super) fn named(&self, kind: &str) -> ExtractKind {
        ExtractKind {
            kind: kind.to_owned(),
            n_tensors: self.n_tensors,
            n_elements: self.n_elements,
            n_changed: self.n_changed,
            n_deltas: self.n_deltas,
            norm: (self.kept + self.lost).sqrt(),
            norm_lost: self.lost.sqrt(),
        }
    }
}
