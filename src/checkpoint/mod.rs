//! Files: checkpoints, shards, and every other safetensors file.
//!
//! A [`Checkpoint`] is a model on disk, in one [`Shard`] or many. Opening reads headers only, into owned memory, and checks
//! them strictly ([`Header`]); tensor data is reached through [`Window`]s, mapped or read, small enough that resident
//! memory does not grow with the model ([`Context::window_bytes`]). [`scan_rows`] is the one pass over rows that every
//! command shares: threads take blocks of rows, results come back in order. What is written appears whole or not at all
//! ([`AtomicFile`], [`TensorFileWriter`]).

mod context;
mod copy;
mod direct;
mod error;
mod gather;
mod header;
mod index;
mod json;
mod lock;
mod mmap;
mod model;
mod output;
mod output_dir;
mod pipeline;
mod raw_header;
mod rewrite;
mod scan;
mod scatter;
mod shard;

pub use context::{Context, Io, MIN_MEMORY, Observer, Silent};
pub use copy::{Copied, CopyMode, check_free_space, copy_file, share_file};
pub(crate) use error::indented_list;
pub use error::{CheckpointError, ErrorKind, Printable};
pub use gather::{BaseValues, gather_cost, gather_rows};
pub use header::{DOCUMENT_KEY, Header, MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo};
pub use index::{INDEX_FILE, Index};
pub(crate) use json::{malformed, open_regular, read_whole};
pub use lock::{CheckpointLock, in_place_hazards};
pub use mmap::Window;
pub use model::{Checkpoint, Layout, TensorRef};
pub use output::{
    AtomicFile, Existing, TensorFileWriter, TensorId, folder_of, sync_folder, tensor_file_header, write_atomic,
};
pub use output_dir::AtomicDir;
pub use pipeline::{for_each_ordered, read_and_map_ordered};
pub use rewrite::{rewrite_shard, windows};
pub use scan::{Held, RowScan, RowSpan, RowWindow, n_readers, scan_rows, scan_rows_keeping, window_cost};
pub use scatter::{Patcher, Place};
pub use shard::Shard;
