//! Files: checkpoints, shards, and every other safetensors file.
//!
//! A [`Checkpoint`] is a model on disk, in one [`Shard`] or many. Opening reads headers only, into owned memory, and checks
//! them strictly ([`Header`]); tensor data is reached through [`Window`]s, mapped or read, small enough that resident
//! memory does not grow with the model ([`Context::window_bytes`]). [`scan_rows`] is the one pass over rows that every
//! command shares: threads take blocks of rows, results come back in order.
//!
//! What is written passes the gate ([`check_output`]), which knows what is being read ([`InUse`]), and appears whole or not at all
//! ([`AtomicFile`], [`AtomicDir`], [`TensorFileWriter`]). What this program keeps beside a checkpoint lies in its [`StateFolder`], reached
//! without following links ([`OwnFolder`]). Whether something is there is asked in [`probe`] alone.

mod atomic_file;
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
pub use inside::{append_to_file, create_folders, create_new_file, give_name, open_to_change, remove_file};
pub use json::read_whole;
pub(crate) use json::{malformed, open_regular};
pub(crate) use json_text::{string_at, with_string, without_string};
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
pub use rewrite::{rewrite_shard, windows};
pub use scan::{Held, RowScan, RowSpan, RowWindow, n_readers, scan_rows, scan_rows_keeping, window_cost};
pub use scatter::{Destination, Patcher};
pub use shard::Shard;
pub use side_files::{LeftOut, LeftOutReason, SideFiles, copy_side_files};
pub use single_file::{SingleFile, recover_single_file};
pub use state_folder::{STATE_FOLDER, StateFolder};
