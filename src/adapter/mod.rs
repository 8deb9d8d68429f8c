//! Compact sparse files: deltas on the columns a mask chose.
//!
//! An [`Adapter`] is a plain safetensors file with `T.columns` and `T.values` for each target `T`, and one JSON document that
//! says what it was made from. It knows its base by content: for each target the type, the shape and the BLAKE3 of the base's
//! values at its positions. Its own name is its content too ([`AdapterId`]). Everything is read and written a run of
//! rows at a time.
//!
//! [`import`] makes an adapter of another tool's sparse adapter.
//! [`pack_adapter`] makes an adapter as small as it gets; a packed adapter is opened and read like any other.

mod builder;
mod error;
mod file;
mod id;
mod import;
mod init;
mod packed;
mod writer;

pub use builder::AdapterBuilder;
pub use error::AdapterError;
pub use file::{Adapter, AdapterNotes, DeltaRows};
pub use id::AdapterId;
pub use import::{ConvertReport, ConvertedTensor, import};
pub use init::{InitOptions, InitReport, init_adapter};
pub use packed::{
    ColumnsChoice, ColumnsKind, LossyError, MergedError, PackOptions, PackReport, ValuesChoice, pack_adapter,
};
pub use writer::AdapterWriter;
