//! Files: checkpoints, shards, and every other safetensors file.
//!
//! A [`Checkpoint`] is a model on disk, in one or more [`Shard`]s. Opening it reads only the headers, into owned
//! memory, and validates them strictly ([`Header`]). Tensor data is accessed through [`Window`]s, mapped or read,
//! which are so small that resident memory does not grow with the model ([`Context::window_bytes`]). [`scan_rows`] is
//! the pass over rows that every command uses: threads process blocks of rows, and results arrive in order.
//!
//! Every output passes the gate ([`check_output`]), which knows the inputs in use ([`InUse`]), and is written
//! atomically ([`AtomicFile`], [`AtomicDir`], [`TensorFileWriter`]). The program's own files for a checkpoint are in
//! its [`StateFolder`], which is accessed without following links ([`OwnFolder`]). Only [`probe`] checks whether a
//! path exists.

mod atomic_file;
pub(crate) mod checksummed;
mod codes;
mod context;
mod copy;
mod direct;
mod error;
mod gate;
mod gather;
#[cfg(feature = "train")]
mod guard;
mod header;
mod in_use;
mod index;
mod inside;
mod json;
mod json_text;
mod layouts;
mod lock;
mod markup;
mod mmap;
mod model;
mod other_format;
mod output;
mod output_dir;
mod own_folder;
mod pipeline;
pub mod probe;
mod raw_header;
mod recognize;
mod resume;
mod rewrite;
mod scan;
mod scatter;
mod shard;
mod side_files;
mod single_file;
mod state_folder;

pub use atomic_file::{AtomicFile, Existing, sync_folder, write_atomic};
pub(crate) use atomic_file::{copy_own, write_own};
pub use codes::{CodedWeight, Codes};
pub use context::{Context, Io, MIN_MEMORY, Observer, Silent};
pub use copy::{Copied, CopyMode, check_free_space, copy_file, share_file, unshare};
pub(crate) use error::indented_list;
pub use error::{CheckpointError, Printable};
pub use gate::{OutputKind, check_output};
pub use gather::{BaseValues, gather_cost, gather_rows};
#[cfg(feature = "train")]
pub(crate) use guard::guarded;
pub use header::{DOCUMENT_KEY, Header, MAX_HEADER_BYTES, MAX_TENSORS, MERGED_KEY, TensorInfo};
pub use in_use::InUse;
pub(crate) use index::{ADAPTER_INDEX_FILE, open_shards};
pub use index::{INDEX_FILE, Index};
pub use inside::{append_to_file, create_folders, create_new_file, open_to_change, remove_file, rename_into_place};
pub use json::read_whole;
pub(crate) use json::{malformed, open_regular};
pub(crate) use json_text::{string_at, with_string, without_string};
pub use layouts::CodedLayout;
pub use lock::{CheckpointLock, in_place_hazards};
pub use markup::{is_repository, markdown_code, markdown_text, shell_path, shell_word, yaml_string};
pub use mmap::Window;
pub(crate) use model::config_beside;
pub use model::{Checkpoint, Layout, TensorRef, hub_snapshot, recognize_folder};
pub use other_format::OtherFormat;
pub use output::{TensorFileWriter, TensorId, folder_of, tensor_file_header};
pub use output_dir::{AtomicDir, WorkFolder};
pub use own_folder::OwnFolder;
pub use pipeline::{for_each_ordered, read_and_map_ordered};
pub use probe::{EntryKind, FileId};
pub use recognize::recognize_file;
pub(crate) use resume::{Piece, Resume};
pub use rewrite::{rewrite_shard, windows};
pub use scan::{Held, RowScan, RowSpan, RowWindow, n_readers, scan_rows, scan_rows_keeping, window_cost};
pub use scatter::{Destination, Patcher};
pub use shard::Shard;
pub use side_files::{LeftOut, LeftOutReason, SideFiles, copy_side_files};
pub use single_file::{SingleFile, recover_single_file};
pub use state_folder::{STATE_FOLDER, StateFolder};
