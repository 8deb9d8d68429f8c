//! Adapters as Hugging Face PEFT leaves them on disk.
//!
//! A [`PeftFolder`] holds `adapter_config.json`, parsed strictly into a [`PeftConfig`], and `adapter_model.safetensors`, opened as
//! any other shard. [`LoraAdapter`] reads such a folder as low-rank factors: every tensor of the file has a role, every shape
//! is checked against the config, and what this program does not implement is refused by name.
//! [`AdapterKind`] says what a path given as an adapter is.
//!
//! Sources: <https://huggingface.co/docs/peft/developer_guides/checkpoint>, and files that PEFT 0.21 wrote.

mod config;
mod error;
mod folder;
mod kind;
mod lora;
mod lora_config;
mod names;
mod pattern;

pub use config::{PeftConfig, PeftType};
pub use error::PeftError;
pub use folder::{PEFT_CONFIG, PEFT_TENSORS, PeftFolder};
pub use kind::AdapterKind;
pub use lora::{FullTensor, LoraAdapter, LoraModule, LoraShape};
pub use lora_config::{LoraConfig, SavedBias};
pub use names::{PeftName, base_name};
pub use pattern::Patterns;
