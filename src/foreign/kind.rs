//! What a path given as an adapter is.

use std::path::Path;

use super::{PEFT_CONFIG, PeftConfig, PeftError, PeftType};
use crate::checkpoint::{DOCUMENT_KEY, Shard, probe};

/// What a path given as an adapter is, told from its config or header alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AdapterKind {
    /// A safetensors file with a document of this program, and what kind the document says it is (`adapter`, `packed`, `mask`).
    Document(String),
    /// A folder with `adapter_config.json`.
    Peft(PeftType),
    /// A safetensors file without a document of this program.
    Tensors,
    /// A folder without `adapter_config.json`.
    Folder,
}

impl AdapterKind {
    /// Looks at `path`.
    ///
    /// # Errors
    /// A path that is not there, a config that cannot be read, a file that is no safetensors file.
    pub fn of(path: &Path) -> Result<Self, PeftError> {
        if !probe::is_folder(path)? {
            let shard = Shard::open(path)?;
            let document = shard.header().metadata().get(DOCUMENT_KEY);
            return Ok(document.map_or(Self::Tensors, |document| Self::Document(document_kind(document))));
        }
        if !probe::is_present(&path.join(PEFT_CONFIG))? {
            return Ok(Self::Folder);
        }
        Ok(Self::Peft(PeftConfig::open(&path.join(PEFT_CONFIG))?.peft_type().clone()))
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
