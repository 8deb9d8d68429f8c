//! Adapters as other tools leave them on disk, read and nothing more.
//!
//! Hugging Face PEFT: a [`PeftFolder`] holds `adapter_config.json`, parsed strictly into a [`PeftConfig`], and
//! `adapter_model.safetensors`, opened as any other shard. [`LoraAdapter`] reads such a folder as low-rank factors: every tensor of the
//! file has a role (factors, tensors in full, replaced rows), every shape is checked against the config, and what this program does not implement is refused by name.
//! [`AdapterKind`] says what a path given as an adapter is.
//!
//! Sparse adapters: every format comes down to lists of positions and deltas, one for each tensor ([`ForeignAdapter`]); only its files
//! are read differently. They are taken apart by small strict readers: pickles by a machine that knows the opcodes of saved tensors and
//! executes nothing, zip files only as torch and NumPy write them.
//!
//! Sources: <https://huggingface.co/docs/peft/developer_guides/checkpoint>, and files that PEFT 0.21 wrote.

mod config;
mod elements;
mod error;
mod folder;
mod format;
mod input;
mod kind;
mod lora;
mod lora_config;
mod names;
pub(crate) mod npy;
pub(crate) mod npz;
mod opcode;
mod pattern;
mod peft_read;
mod pickle;
mod pickle_value;
pub(crate) mod published;
mod recognise;
mod sparse;
mod token_rows;
mod torch;
mod unpacked;
pub(crate) mod zip;

pub use config::{PeftConfig, PeftType};
pub use error::PeftError;
pub use folder::{PEFT_CONFIG, PEFT_TENSORS, PeftFolder};
pub use format::Format;
pub(crate) use input::Input;
pub use kind::AdapterKind;
pub use lora::{FullTensor, LoraAdapter, LoraModule, LoraShape};
pub use lora_config::{LoraConfig, SavedBias};
pub use names::{PeftName, base_name};
pub use pattern::Patterns;
pub use sparse::ForeignAdapter;
pub(crate) use sparse::{ForeignTarget, Positions, Rounding};
pub use token_rows::ReplacedRows;
