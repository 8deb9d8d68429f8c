//! Formats of other tools: how they are recognized by their first bytes, what they are called, and what helps.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use super::markup::{shell_path, shell_word};

/// Bytes at the start of a file that decide what it is.
pub(super) const START_BYTES: usize = 64;

/// What a file or folder is that is no safetensors checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum OtherFormat {
    /// The pointer that Git LFS leaves in the place of a large file.
    LfsPointer,
    /// An HTML page, which a failed download leaves.
    Html,
    /// A zip archive: PyTorch's `.pt` and `.bin`, NumPy's `.npz`.
    Zip,
    /// A Python pickle outside of a zip archive, as PyTorch before 1.6 wrote it.
    Pickle,
    /// llama.cpp's format.
    Gguf,
    /// JSON text.
    Json,
    /// A SentencePiece tokenizer.
    SentencePiece,
    /// An Apache Parquet file.
    Parquet,
    /// Text with commas.
    Csv,
    /// A folder with a PEFT adapter.
    PeftFolder,
    /// A folder of shards that PyTorch's distributed checkpoint wrote (FSDP): itself, or a folder in it.
    Fsdp(PathBuf),
    /// A folder of DeepSpeed's ZeRO shards.
    DeepSpeed,
    /// A folder of GGUF files.
    GgufFolder,
    /// A folder of `pytorch_model*.bin`.
    PickledModel,
    /// The folder of a training run, with the checkpoints `checkpoint-500`, ...: the last of them.
    TrainingRun(PathBuf),
    /// A repository's folder in the Hugging Face cache: the snapshot of its main branch.
    HubCache(PathBuf),
    /// A checkpoint of this program's kind where something else is wanted.
    Checkpoint,
}

impl fmt::Display for OtherFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LfsPointer => "is a Git LFS pointer in the place of the file",
            Self::Html => "is an HTML page, as a failed download leaves it",
            Self::Zip => "is a zip archive (PyTorch .pt or .bin, NumPy .npz)",
            Self::Pickle => "is a Python pickle",
            Self::Gguf => "is a GGUF file",
            Self::Json => "is a JSON file",
            Self::SentencePiece => "is a SentencePiece tokenizer",
            Self::Parquet => "is a Parquet file",
            Self::Csv => "is a CSV file",
            Self::PeftFolder => "is a PEFT adapter",
            Self::Fsdp(_) => "holds FSDP shards (.distcp)",
            Self::DeepSpeed => "holds DeepSpeed ZeRO shards",
            Self::GgufFolder => "holds GGUF files",
            Self::PickledModel => "holds PyTorch pickles (pytorch_model*.bin)",
            Self::TrainingRun(_) => "is the folder of a training run",
            Self::HubCache(_) => "is a repository's folder in the Hugging Face cache",
            Self::Checkpoint => "is a checkpoint",
        })
    }
}

impl OtherFormat {
    /// The command or the path that helps; `path` is the file or folder.
    pub(super) fn hint(&self, path: &Path) -> Option<String> {
        let this = shell_word(&path.to_string_lossy());
        Some(match self {
            Self::LfsPointer => "git lfs pull".to_owned(),
            Self::Html => "hf download ORG/NAME --local-dir NAME downloads a repository of the Hugging Face Hub".to_owned(),
            Self::Zip | Self::Pickle => format!(
                "python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in \
                 torch.load({this}, map_location='cpu', weights_only=True).items()}}, 'model.safetensors')\""
            ),
            Self::Gguf | Self::GgufFolder => {
                "use the safetensors checkpoint that the GGUF file was converted from: hf download ORG/NAME --local-dir NAME"
                    .to_owned()
            }
            Self::Json | Self::SentencePiece => {
                format!("name the folder of the checkpoint or adapter: {}", shell_path(folder_of(path)))
            }
            Self::Parquet => format!("python -c \"import pandas; {}\"", to_json_lines("read_parquet", &this)),
            Self::Csv => format!("python -c \"import pandas; {}\"", to_json_lines("read_csv", &this)),
            Self::PeftFolder => "merge takes it with --adapter; inspect reads it if adapter_model.safetensors is in it".to_owned(),
            Self::Fsdp(shards) => format!("accelerate merge-weights {} merged-weights", shell_path(shards)),
            Self::DeepSpeed => format!(
                "python {} {} merged-weights --safe_serialization",
                shell_path(&path.join("zero_to_fp32.py")),
                shell_path(path)
            ),
            Self::PickledModel => format!(
                "python -c \"from transformers import AutoModelForCausalLM as M; \
                 M.from_pretrained({this}, torch_dtype='auto').save_pretrained('safetensors')\""
            ),
            Self::TrainingRun(checkpoint) => format!("name one of its checkpoints: {}", shell_path(checkpoint)),
            Self::HubCache(snapshot) => format!("name the snapshot: {}", shell_path(snapshot)),
            Self::Checkpoint => "the base is the first argument, an adapter follows --adapter".to_owned(),
        })
    }
}

/// The folder that a file lies in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn to_json_lines(read: &str, file: &str) -> String {
    format!("pandas.{read}({file}).to_json('rows.jsonl', orient='records', lines=True)")
}

/// What a file that is not safetensors is instead, by its first bytes; `None` for safetensors and for what is not known.
pub(super) fn recognize_start(start: &[u8]) -> Option<OtherFormat> {
    let text = start.trim_ascii_start();
    let has = |needle: &[u8]| start.windows(needle.len()).any(|window| window == needle);
    // Behind a safetensors header's length, which may be any bytes, its JSON begins.
    let may_be_header = matches!(start.get(8), Some(b'{'));
    Some(if start.starts_with(b"version https://git-lfs") {
        OtherFormat::LfsPointer
    } else if start.starts_with(b"PK\x03\x04") && start.get(4..8) != Some(&[0; 4]) {
        OtherFormat::Zip
    } else if start.starts_with(b"GGUF") {
        OtherFormat::Gguf
    } else if start.starts_with(b"PAR1") {
        OtherFormat::Parquet
    } else if start.starts_with(b"\x80\x02") && start.get(2) != Some(&0) {
        OtherFormat::Pickle
    } else if text.starts_with(b"<!DOCTYPE") || text.starts_with(b"<!doctype") || text.starts_with(b"<html") {
        OtherFormat::Html
    } else if start.first() == Some(&b'\n') && has(b"<unk>") && !may_be_header {
        OtherFormat::SentencePiece
    } else if is_json(text) {
        OtherFormat::Json
    } else if is_csv(start) {
        OtherFormat::Csv
    } else {
        return None;
    })
}

/// Whether text begins like a JSON object or array. A header's length is no text: its high bytes are zero.
fn is_json(text: &[u8]) -> bool {
    let mut after = text.get(1..).unwrap_or_default().trim_ascii_start().iter();
    let second = after.next();
    is_text(text)
        && match text.first() {
            Some(b'{') => matches!(second, Some(b'"' | b'}')),
            Some(b'[') => second.is_some(),
            _ => false,
        }
}

/// Whether the first line, as far as it was read, is text with commas.
fn is_csv(start: &[u8]) -> bool {
    let line = start.split(|byte| *byte == b'\n').next().unwrap_or_default();
    is_text(start) && line.iter().filter(|byte| **byte == b',').count() > 0 && !line.contains(&b'{')
}

fn is_text(bytes: &[u8]) -> bool {
    bytes.len() > 8 && bytes.iter().all(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~' | 0x80..))
}

/// What a folder is, by the names in it; `snapshot` is that of a repository in the Hugging Face cache. `None` for nothing known.
pub(super) fn recognize_names(folder: &Path, names: &[&str], snapshot: Option<PathBuf>) -> Option<OtherFormat> {
    let has = |name: &str| names.contains(&name);
    let first = |is: &dyn Fn(&str) -> bool| names.iter().copied().find(|name| is(name));
    Some(if has("adapter_model.safetensors") || has("adapter_config.json") {
        OtherFormat::PeftFolder
    } else if has("model.safetensors") || first(&|name| name.ends_with(".safetensors.index.json")).is_some() {
        OtherFormat::Checkpoint
    } else if first(&|name| name.ends_with(".distcp")).is_some() {
        OtherFormat::Fsdp(folder.to_owned())
    } else if let Some(shards) = first(&|name| name.starts_with("pytorch_model_fsdp_")) {
        OtherFormat::Fsdp(folder.join(shards))
    } else if has("zero_to_fp32.py") || first(&|name| name.starts_with("global_step")).is_some() {
        OtherFormat::DeepSpeed
    } else if first(&|name| name.starts_with("pytorch_model") && name.contains(".bin")).is_some() {
        OtherFormat::PickledModel
    } else if first(&|name| name.ends_with(".gguf")).is_some() {
        OtherFormat::GgufFolder
    } else if let Some(last) = names.iter().filter_map(|name| step_of(name)).max() {
        OtherFormat::TrainingRun(folder.join(format!("checkpoint-{last}")))
    } else {
        OtherFormat::HubCache(snapshot?)
    })
}

/// The step in the name of a checkpoint that a trainer wrote: `checkpoint-500`.
fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("checkpoint-")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_recognized_by_their_first_bytes() {
        for (start, expected) in [
            (&b"{\"a\": 1, \"b\": 2}"[..], Some(OtherFormat::Json)),
            (b"{\n  \"architectures\": [\n", Some(OtherFormat::Json)),
            (b"[{\"instruction\": \"Q\"}]", Some(OtherFormat::Json)),
            (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", Some(OtherFormat::SentencePiece)),
            (b"PAR1\x15\x04\x15", Some(OtherFormat::Parquet)),
            (b"question,answer\n1,2\n", Some(OtherFormat::Csv)),
            (b"GGUF\x03\x00\x00\x00", Some(OtherFormat::Gguf)),
            (b"PK\x03\x04\x00\x00\x08\x08", Some(OtherFormat::Zip)),
            (b"\x80\x02}q\x00", Some(OtherFormat::Pickle)),
            (b"PK\x03\x04\x00\x00\x00\x00{\"a\":{}}", None),
            (b"\x0a\x00\x00\x00\x00\x00\x00\x00{\"<unk>\":", None),
            (b"\x7b\x22\x00\x00\x00\x00\x00\x00{\"a\":", None),
            (b"plain words without any", None),
            (b"", None),
        ] {
            assert_eq!(recognize_start(start), expected, "{}", String::from_utf8_lossy(start));
        }
    }

    #[test]
    fn folders_are_recognized_by_the_names_in_them() {
        let of = |names: &[&str]| recognize_names(Path::new("a"), names, None);
        assert_eq!(of(&["__0_0.distcp", ".metadata"]), Some(OtherFormat::Fsdp("a".into())));
        assert_eq!(
            of(&["pytorch_model_fsdp_0", "optimizer_0"]),
            Some(OtherFormat::Fsdp("a/pytorch_model_fsdp_0".into()))
        );
        assert_eq!(of(&["zero_to_fp32.py", "latest"]), Some(OtherFormat::DeepSpeed));
        assert_eq!(of(&["global_step500"]), Some(OtherFormat::DeepSpeed));
        assert_eq!(of(&["pytorch_model-00001-of-00002.bin", "config.json"]), Some(OtherFormat::PickledModel));
        assert_eq!(of(&["model-Q4_K_M.gguf", "config.json"]), Some(OtherFormat::GgufFolder));
        let run = Some(OtherFormat::TrainingRun("a/checkpoint-1000".into()));
        assert_eq!(of(&["checkpoint-500", "checkpoint-1000", "runs"]), run);
        assert_eq!(of(&["adapter_config.json"]), Some(OtherFormat::PeftFolder));
        assert_eq!(of(&["config.json"]), None);
        let snapshot = Some("a/snapshots/0123abcd".into());
        let cache = recognize_names(Path::new("a"), &["refs", "snapshots"], snapshot);
        assert_eq!(cache, Some(OtherFormat::HubCache("a/snapshots/0123abcd".into())));
    }
}
