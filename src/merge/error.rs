//! What can go wrong with merges, each error naming the checkpoint and the adapter.

use std::path::{Path, PathBuf};

use crate::{
    adapter::{AdapterError, AdapterId},
    checkpoint::{CheckpointError, Printable, indented_list},
    error::{ErrorKind, Failure},
    foreign::PeftError,
    mask::MaskError,
};

/// What a low-rank adapter may leave open, by the field of [`super::AdapterReading`] that says it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Undecided {
    /// `expert_order`
    ExpertOrder,
    /// `axes`
    Axes {
        /// Of which kind of weight.
        kind: String,
    },
    /// `tied_head`
    TiedHead,
}

/// What can go wrong while merging, unmerging, verifying or recovering.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A file could not be read or written, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An adapter could not be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A PEFT adapter could not be read.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// An adapter's columns could not be read.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// A GPU failed.
    #[error(transparent)]
    Gpu(#[from] crate::backend::AcceleratorError),
    /// The request makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Tensors of an adapter that the base does not have as the adapter needs them.
    #[error("{}: {} of {n_targets} tensors do not match the base {}:{}", Printable::path(.adapter), .problems.len(), Printable(.base), indented_list(.problems))]
    Unmatched {
        /// The adapter.
        adapter: PathBuf,
        /// The base's name.
        base: String,
        /// Tensors of the adapter.
        n_targets: usize,
        /// One line for each that does not match.
        problems: Vec<String>,
    },
    /// The base's values at the adapter's positions are not those it was made from.
    #[error("{}: tensor \"{}\": made for another base: {}", Printable::path(.adapter), Printable(.tensor), .what)]
    WrongBase {
        /// The adapter.
        adapter: PathBuf,
        /// The first tensor whose values differ.
        tensor: String,
        /// Both bases, and how many tensors agree.
        what: String,
    },
    /// The adapter is in the checkpoint already.
    #[error("{}: adapter {} is already merged into it", Printable::path(.path), .id.short())]
    AlreadyMerged {
        /// The checkpoint.
        path: PathBuf,
        /// The adapter.
        id: AdapterId,
    },
    /// The files say that the adapter was merged, though no ledger remembers it.
    #[error("{}: adapter {} was already merged into it, and its ledger is missing; merging it again would apply it twice", Printable::path(.path), .id.short())]
    MergedBefore {
        /// The file that says it.
        path: PathBuf,
        /// The adapter.
        id: AdapterId,
    },
    /// Weights that a merge wrote were changed since by somebody else.
    #[error("{}: {} from what the merges in its ledger wrote:{}", Printable::path(.path), how_many(*.n_changed, *.n_tensors), indented_list(.examples))]
    Tampered {
        /// The checkpoint.
        path: PathBuf,
        /// Single weights.
        n_changed: u64,
        /// Whole tensors.
        n_tensors: u64,
        /// The first of them.
        examples: Vec<String>,
    },
    /// Other paths lead to the files that would change in place.
    #[error("{}: a change in place would also change other files: {}", Printable::path(.path), .hazards.join("; "))]
    Linked {
        /// The checkpoint.
        path: PathBuf,
        /// What leads there, by file.
        hazards: Vec<String>,
    },
    /// Doing this would be wrong.
    #[error("{}: {what}", Printable::path(.path))]
    Refused {
        /// The checkpoint.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// One adapter replaces a row, another adds to it.
    #[error("\"{}\": row {row} is replaced by one adapter and changed by another; merge only one of them", Printable(.tensor))]
    SharedRow {
        /// The tensor.
        tensor: String,
        /// The row.
        row: u64,
    },
    /// The files leave something open that their owner knows.
    #[error("{}: \"{}\": {what}", Printable::path(.path), Printable(.tensor))]
    Undecided {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is open.
        open: Undecided,
        /// Why the files do not say it.
        what: String,
    },
    /// The merge would make finite weights infinite or NaN.
    #[error(
        "{}: \"{}\" [{row}, {column}]: the merge would make this finite weight infinite or NaN{}",
        Printable::path(.path),
        Printable(.tensor),
        match .n_overflowed { 0 | 1 => String::new(), n => format!(", and {} more", n - 1) }
    )]
    Overflow {
        /// The checkpoint.
        path: PathBuf,
        /// The first tensor with such a weight, by name.
        tensor: String,
        /// The row of the first such weight of that tensor.
        row: u64,
        /// Its column.
        column: u64,
        /// How many there are in all tensors.
        n_overflowed: u64,
    },
    /// Adding tensors, or taking them away, moves the others of their shard.
    #[error("{}: \"{}\": an adapter adds this tensor; adding and removing tensors needs a new checkpoint (-o)", Printable::path(.path), Printable(.tensor))]
    NewTensorsInPlace {
        /// The checkpoint.
        path: PathBuf,
        /// The first of them.
        tensor: String,
    },
    /// Of tensors that were changed as a whole hashes alone were kept.
    #[error(
        "{}: its ledger keeps only hashes of the tensors that merges changed as a whole; undoing needs the base {}",
        Printable::path(.path),
        Printable(.base)
    )]
    NeedsBase {
        /// The checkpoint.
        path: PathBuf,
        /// The name of the base.
        base: String,
    },
    /// In place, tensors would be overwritten as a whole, and their originals would be nowhere.
    #[error(
        "{}: the adapters change whole tensors in place ({n_bytes} bytes), and nothing would keep the originals",
        Printable::path(.path)
    )]
    KeepsNothing {
        /// The checkpoint.
        path: PathBuf,
        /// What keeping them takes.
        n_bytes: u64,
    },
    /// The ledger or the journal is not what was written.
    #[error("{}: {what}", Printable::path(.path))]
    BadLedger {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A change failed midway, and rolling it back failed too.
    #[error("{}: rolling back failed ({rollback}); the change waits for `recover`", Printable::path(.path))]
    RollbackFailed {
        /// The checkpoint.
        path: PathBuf,
        /// Why the change failed.
        source: Box<MergeError>,
        /// Why rolling back failed.
        rollback: Box<MergeError>,
    },
}

fn how_many(n_weights: u64, n_tensors: u64) -> String {
    match (n_weights, n_tensors) {
        (1, 0) => "1 weight differs".to_owned(),
        (n, 0) => format!("{n} weights differ"),
        (0, 1) => "1 tensor differs".to_owned(),
        (0, n) => format!("{n} tensors differ"),
        (n, m) => format!("{n} weights and {m} whole tensors differ"),
    }
}

impl Failure for MergeError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Adapter(e) => e.kind(),
            Self::Mask(e) => e.kind(),
            Self::Peft(e) => e.kind(),
            Self::Gpu(_) => ErrorKind::Io,
            Self::Usage(_) => ErrorKind::Usage,
            Self::Unmatched { .. }
            | Self::WrongBase { .. }
            | Self::AlreadyMerged { .. }
            | Self::MergedBefore { .. }
            | Self::Tampered { .. }
            | Self::Linked { .. }
            | Self::Refused { .. }
            | Self::Undecided { .. }
            | Self::SharedRow { .. }
            | Self::Overflow { .. }
            | Self::NeedsBase { .. }
            | Self::NewTensorsInPlace { .. }
            | Self::KeepsNothing { .. } => ErrorKind::Refused,
            Self::BadLedger { .. } => ErrorKind::BadInput,
            Self::RollbackFailed { .. } => ErrorKind::Interrupted,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(e) => Some(e),
            Self::Adapter(e) => Some(e),
            Self::Mask(e) => Some(e),
            Self::Peft(e) => Some(e),
            Self::RollbackFailed { source, .. } => Some(source.as_ref()),
            _ => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::Unmatched { adapter, .. } | Self::WrongBase { adapter, .. } => Some(adapter),
            Self::AlreadyMerged { path, .. }
            | Self::MergedBefore { path, .. }
            | Self::Tampered { path, .. }
            | Self::Linked { path, .. }
            | Self::Refused { path, .. }
            | Self::Undecided { path, .. }
            | Self::Overflow { path, .. }
            | Self::NeedsBase { path, .. }
            | Self::NewTensorsInPlace { path, .. }
            | Self::KeepsNothing { path, .. }
            | Self::BadLedger { path, .. }
            | Self::RollbackFailed { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::RollbackFailed { path, .. } => Some(format!("neuroada-ckpt recover {}", Printable::path(path))),
            Self::Gpu(_) => Some("--device cpu does the same without the GPU".to_owned()),
            Self::Linked { .. } => {
                let advice = "--output makes a copy of all; --break-links copies the files that change, and leaves the others' as they are";
                Some(advice.to_owned())
            }
            _ => self.inner()?.hint(),
        }
    }
}
