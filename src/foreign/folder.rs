//! The folder of a PEFT adapter.

use std::path::{Path, PathBuf};

use super::{PeftConfig, PeftError};
use crate::checkpoint::{CheckpointError, InUse, Shard, probe};

/// The config's file name.
pub const PEFT_CONFIG: &str = "adapter_config.json";
/// The tensors' file name.
pub const PEFT_TENSORS: &str = "adapter_model.safetensors";
const PICKLED_TENSORS: &str = "adapter_model.bin";

/// An open PEFT adapter of any method: config parsed, header read, tensors on disk.
#[derive(Debug)]
pub struct PeftFolder {
    path: PathBuf,
    config: PeftConfig,
    shard: Shard,
    /// No output replaces, holds or lies in the folder meanwhile.
    _in_use: Vec<InUse>,
}

impl PeftFolder {
    /// Opens the folder `path`.
    ///
    /// # Errors
    /// Files that are missing, or are not what they should be.
    pub fn open(path: &Path) -> Result<Self, PeftError> {
        let config = PeftConfig::open(&path.join(PEFT_CONFIG))?;
        let tensors = path.join(PEFT_TENSORS);
        if !probe::is_present(&tensors)? && probe::is_present(&path.join(PICKLED_TENSORS))? {
            let what = format!("has {PICKLED_TENSORS}, a Python pickle; {PEFT_TENSORS} is needed");
            return Err(CheckpointError::bad_file(path, what).into());
        }
        Ok(Self { path: path.to_owned(), config, shard: Shard::open(&tensors)?, _in_use: InUse::register(path)? })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// What the config says.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }
    /// The tensors.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }
}
