//! Transform model checkpoints without loading them.
//!
//! `neuroada-ckpt` works on safetensors checkpoints of any size where they lie: it chooses the important connections of
//! every neuron (masks), packs trained deltas on them into small adapter files, merges them into checkpoints and takes
//! them out again bit for bit, and says exactly what changed. It implements NeuroAda (EMNLP 2025,
//! <https://arxiv.org/abs/2510.18940>).
//!
//! The [`guide`] explains the command line and the files, page by page.
//!
//! Every operation is one function:
//!
//! | function | does |
//! | --- | --- |
//! | [`Checkpoint::open`] | reads the headers of a checkpoint; tensor data stays on disk |
//! | [`create_mask`], [`join_masks`] | chooses connections |
//! | [`init_adapter`], [`AdapterBuilder`] | starts an adapter, or writes one that was trained elsewhere |
//! | [`extract()`], [`combine()`], [`convert()`] | makes adapters of checkpoints, of adapters, of other tools' adapters |
//! | [`cast()`] | writes a checkpoint in another type or in other shards; decodes quantized ones |
//! | [`merge()`], [`unmerge`], [`verify`], [`recover`] | adds adapters to a checkpoint, takes them out, proves it |
//! | [`diff_checkpoints`], [`diff_adapters`], [`diff_masks`] | compares by value |
//! | [`pack_adapter`] | makes an adapter as small as it gets |
//! | [`sync::export`], [`sync::apply`] | makes and applies the weight updates that inference servers fetch |
//!
//! Each takes a [`Context`]: the memory to stay within, and who is told of progress. Each has an error enum that can be
//! matched; all of them say their kind, their file and what may help through [`Failure`].
//!
//! # Example
//!
//! A mask of the largest weight in each row, an adapter of zeros on it, merged into a new checkpoint and taken out again:
//!
//! ```
//! use neuroada_ckpt::{
//!     Checkpoint, Context, Existing, InitOptions, MaskFile, MaskOptions, MergeInput, MergeOptions, Which, create_mask,
//!     init_adapter, merge, unmerge,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let (mask, adapter) = (folder.path().join("mask.safetensors"), folder.path().join("adapter.safetensors"));
//! # let merged = folder.path().join("merged");
//! let ctx = Context::default();
//! let base = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
//! let report = create_mask(&ctx, &base, &MaskOptions::new(1), Some((&mask, Existing::Keep)))?;
//! println!("{} of {} weights", report.total.n_chosen, report.n_model_parameters);
//!
//! let mask = MaskFile::open(&mask)?;
//! init_adapter(&ctx, &base, &mask, &InitOptions::default(), &adapter, Existing::Keep)?;
//!
//! let input = MergeInput { adapter, scale: None };
//! let report = merge(&ctx, base.root(), &[input], &MergeOptions::new_checkpoint(&merged))?;
//! assert_eq!(report.active.len(), 1);
//! unmerge(&ctx, &merged, &Which::All, &MergeOptions::in_place())?;
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! | feature | default | what |
//! | --- | --- | --- |
//! | `cli` | yes | the command line (`cli::run`), with clap and progress bars |
//! | `cuda` | yes | the GPU paths; the driver is looked for at run time, nothing of CUDA is needed to build |
//! | `train` | yes | the trainer behind the commands `train` and `eval`, with tokenizers and chat templates |
//!
//! `default-features = false` leaves the library alone. The trainer and the GPU paths are reached through the command
//! line; their functions may change with every version and are not part of the documented library.

// The floors of the crate. Imports go down this list, never up:
//
// - cli: the command line
// - merge, diff, extract, combine, convert, cast, sync and train: what users ask for; they do not import one another
// - data: training data, from rows to packed batches
// - adapter: compact sparse files
// - mask: policy, which weights
// - weights: the map of weights, what each one is and which stored tensors hold it
// - foreign: adapters as other tools leave them on disk
// - checkpoint (files) and backend (hot loops); neither knows the other
// - tensor: plain values
// - error: what every error says about itself
//
// gpu is a guest beside them: it implements traits of backend and train, and nothing but cli imports it. guide is documentation alone.
mod adapter;
mod backend;
mod cast;
mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
mod combine;
mod convert;
#[cfg(feature = "train")]
mod data;
mod diff;
mod error;
mod extract;
mod foreign;
#[cfg(feature = "cuda")]
mod gpu;
pub mod guide;
mod mask;
mod merge;
pub mod sync;
mod tensor;
#[cfg(feature = "train")]
mod train;
mod weights;

// The public face. Whatever a user of the library calls, names or matches is here, and nothing else is promised.
pub use adapter::{
    Adapter, AdapterBuilder, AdapterError, AdapterId, AdapterNotes, ColumnsChoice, ConvertReport, InitOptions,
    InitReport, PackOptions, PackReport, ValuesChoice, init_adapter, pack_adapter,
};
pub use cast::{CastError, CastOptions, CastReport, cast};
pub use checkpoint::{
    Checkpoint, CheckpointError, Context, Existing, Io, Observer, OtherFormat, TensorInfo, TensorRef,
};
pub use combine::{CombineError, CombineInput, CombineOptions, CombineReport, Method, combine};
pub use convert::{ConvertError, convert};
pub use diff::{AdapterDiff, CheckpointDiff, DiffError, diff_adapters, diff_checkpoints, diff_masks};
pub use error::{ErrorKind, Failure};
pub use extract::{ExtractError, ExtractOptions, ExtractReport, extract};
pub use foreign::{Format, PeftError};
#[cfg(feature = "cuda")]
pub use gpu::GpuError;
pub use mask::{
    Amount, MaskError, MaskFile, MaskOptions, MaskReport, Partition, Scope, ScoreKind, create_mask, join_masks,
};
pub use merge::{
    AdapterReading, ExpertOrder, KeptOriginals, MergeError, MergeInput, MergeOptions, MergeOutput, MergeReport,
    NamedAdapter, Recovered, Undecided, VerifyOptions, VerifyReport, Which, merge, named_adapters, recover, unmerge,
    verify,
};
pub use tensor::{Dtype, RowColumns};
pub use weights::{Answers, Axes, KindAxes, Rename, WeightMap};

/// What the tests, benchmarks and fuzz targets of this project need beyond the public face. It may change with every
/// version; nothing here is documented or promised.
// Always compiled, rather than a feature: the tests, which Cargo builds against the library as it is, need it, and a
// feature of their own would compile the whole library twice for `cargo build` and `cargo test`.
#[doc(hidden)]
pub mod internals {
    pub mod adapter {
        pub use crate::adapter::*;
    }
    pub mod backend {
        pub use crate::backend::*;
    }
    pub mod checkpoint {
        pub use crate::checkpoint::*;
    }
    pub mod combine {
        pub use crate::combine::*;
    }
    pub mod convert {
        pub use crate::convert::*;
    }
    #[cfg(feature = "train")]
    pub mod data {
        pub use crate::data::*;
    }
    pub mod diff {
        pub use crate::diff::*;
    }
    pub mod extract {
        pub use crate::extract::*;
    }
    pub mod foreign {
        pub use crate::foreign::*;
    }
    #[cfg(feature = "cuda")]
    pub mod gpu {
        pub use crate::gpu::*;
    }
    pub mod mask {
        pub use crate::mask::*;
    }
    pub mod merge {
        pub use crate::merge::*;
    }
    pub mod tensor {
        pub use crate::tensor::*;
    }
    #[cfg(feature = "train")]
    pub mod train {
        pub use crate::train::*;
    }
    pub mod weights {
        pub use crate::weights::*;
    }
}
