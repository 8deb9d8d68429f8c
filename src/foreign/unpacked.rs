//! Tensors that torch pickled, as a safetensors file of this process's own.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use tempfile::TempDir;

use super::{input::Input, torch::open_any};
use crate::checkpoint::{CheckpointError, Context, Existing, Shard, TensorFileWriter, check_free_space};

/// The tensors of a pickle may have this many times its bytes: two names may stand for one storage, as tied weights do.
const MAX_COPIES: u64 = 2;

/// The file of a pickle's tensors and the temporary folder it lies in, which goes with this.
#[derive(Debug)]
pub(super) struct Unpacked {
    pickle: Arc<Input>,
    /// Goes after the shard that lies in it.
    _folder: TempDir,
}

impl Unpacked {
    /// Reads the pickle at `path` once and writes its tensors, in row-major order, as a safetensors file.
    ///
    /// Memory: the pickle's values and a piece of a tensor. Disk: the tensors, at most twice the pickle's size.
    ///
    /// # Errors
    /// What is wrong with the pickle, and tensors that are larger than it accounts for.
    pub(super) fn open(ctx: &Context<'_>, path: &Path) -> Result<(Shard, Self), CheckpointError> {
        let pickle = Arc::new(Input::open(path)?);
        let tensors = open_any(ctx, Arc::clone(&pickle))?;
        let mut sizes = tensors.iter().map(|(_, tensor)| tensor.n_bytes());
        let n_bytes = sizes.try_fold(0u64, |sum, n_bytes| sum.checked_add(n_bytes?));
        let most = pickle.n_bytes().saturating_mul(MAX_COPIES);
        let Some(n_bytes) = n_bytes.filter(|&n_bytes| n_bytes <= most) else {
            let what = format!("its tensors have more than {most} bytes, twice the file's own size");
            return Err(CheckpointError::bad_file(path, what));
        };
        let folder = TempDir::with_prefix("neuroada-")
            .map_err(|e| CheckpointError::io("make a temporary folder for the tensors of", path, e))?;
        // Once as a spool and once in order.
        check_free_space(folder.path(), n_bytes.saturating_mul(2))?;
        let file = folder.path().join("tensors.safetensors");
        let mut writer = TensorFileWriter::create(&file, Existing::Keep)?;
        for (name, tensor) in &tensors {
            let id = writer.add_tensor(name.to_string(), tensor.dtype);
            tensor.for_each_piece(ctx, |bytes| writer.append(id, bytes))?;
            writer.finish_tensor(id, tensor.shape.clone());
        }
        writer.finish(ctx, &BTreeMap::new())?;
        pickle.unchanged()?;
        Ok((Shard::open(&file)?, Self { pickle, _folder: folder }))
    }

    /// Fails where the pickle changed since it was read.
    pub(super) fn unchanged(&self) -> Result<(), CheckpointError> {
        self.pickle.unchanged()
    }
}
