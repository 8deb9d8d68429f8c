//! What a path given as an adapter is.

use std::path::Path;

use super::{PEFT_CONFIG, PEFT_TENSORS, PeftConfig, PeftError, PeftType, folder::peft_folder};
use crate::checkpoint::{DOCUMENT_KEY, Shard, probe};

/// What a path given as an adapter is, told from its config or header alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AdapterKind {
    /// A safetensors file with a document of this program, or a folder that holds it and no other, and what kind the document says it is
    /// (`adapter`, `packed`, `mask`).
    Document(String),
    /// A folder with `adapter_config.json`, or the file of the tensors in it.
    Peft(PeftType),
    /// A safetensors file without a document of this program.
    Tensors,
    /// A folder with neither.
    Folder,
}

impl AdapterKind {
    /// Looks at `path`.
    ///
    /// # Errors
    /// A path that is not there, a config that cannot be read, a file that is no safetensors file.
    pub fn of(path: &Path) -> Result<Self, PeftError> {
        let peft = peft_folder(path)?;
        let file = match probe::is_folder(path)? {
            false => Some(path.to_owned()),
            true if peft.is_none() => probe::only_tensor_file(path)?,
            true => None,
        };
        // Only a safetensors file can hold a document of this program.
        if let Some(file) = file.filter(|file| peft.is_none() || file.ends_with(PEFT_TENSORS)) {
            let shard = Shard::open(&file)?;
            match shard.header().metadata().get(DOCUMENT_KEY) {
                Some(document) => return Ok(Self::Document(document_kind(document))),
                None if peft.is_none() && file == path => return Ok(Self::Tensors),
                None => {}
            }
        }
        match peft {
            None => Ok(Self::Folder),
            Some(folder) => Ok(Self::Peft(PeftConfig::open(&folder.join(PEFT_CONFIG))?.peft_type().clone())),
        }
    }
}

/// The `kind` of a document; empty where it has none.
fn document_kind(document: &str) -> String {
    #[derive(serde::Deserialize)]
    struct Kind {
        #[serde(default)]
        kind: String,
    }
    serde_json::from_str::<Kind>(document).map_or_else(|_| String::new(), |kind| kind.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_folders_are_told_apart() {
        let fixtures = Path::new("fixtures");
        let of = |name: &str| AdapterKind::of(&fixtures.join(name)).unwrap();
        assert_eq!(of("tiny-llama-adapter.safetensors"), AdapterKind::Document("adapter".to_owned()));
        assert_eq!(of("tiny-llama-values.safetensors"), AdapterKind::Tensors);
        assert_eq!(of("tiny-llama"), AdapterKind::Folder);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(PEFT_CONFIG), r#"{"peft_type":"SHIRA"}"#).unwrap();
        assert_eq!(
            AdapterKind::of(dir.path()).unwrap(),
            AdapterKind::Peft(PeftType::Sparse(crate::foreign::Format::Shira))
        );
        assert!(AdapterKind::of(&fixtures.join("missing")).is_err());
    }
}
