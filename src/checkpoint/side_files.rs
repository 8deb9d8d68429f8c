//! The files next to a checkpoint's shards, and which of them go into a new checkpoint.
//!
//! A new checkpoint has other weights than its source. Config, tokenizer, templates, code, licenses and pictures fit
//! both. Files that would contradict it are left out and listed: other copies of the old weights, which some loaders
//! prefer or also load; the state of the run that trained the old weights; the old model card.
//!
//! Names decide as far as possible. A safetensors file in a subfolder is another copy if it has a tensor of the
//! checkpoint; otherwise it is a further part of the model, such as the pooling layers of sentence-transformers or a
//! speech tokenizer. A pickle without a well-known name is a copy only if it is large enough; speaker embeddings and
//! the like are kept. A PEFT adapter next to the weights (`adapter_model.*`) is not a copy and is kept.

use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    Checkpoint, CheckpointError, Context, CopyMode, EntryKind, INDEX_FILE, Layout, Printable, STATE_FOLDER, Shard,
    copy::create_like,
    copy_file, create_folders, folder_of,
    index::{Bounds, MAX_INDEX_BYTES, WrongTotal},
    json::read_whole,
    probe, remove_file,
};
use crate::error::{ErrorKind, Failure};

/// Suffixes of files that contain whole models.
const MODEL_ENDINGS: &[&str] = &[
    ".gguf",
    ".ggml",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".tflite",
    ".litertlm",
    ".mlmodel",
    ".h5",
    ".keras",
    ".msgpack",
    ".ot",
    ".ckpt",
    ".pdparams",
    ".nemo",
    ".llamafile",
    ".pte",
    ".mnn",
    ".distcp",
];
/// Suffixes of Python pickles, of weights or anything else.
const PICKLE_ENDINGS: &[&str] = &[".bin", ".pt", ".pth", ".pkl"];
/// Prefixes of pickles that contain weights.
const PICKLED_MODELS: &[&str] = &["pytorch_model", "consolidated", "model"];
/// Folders on the Hub that hold the same model in another format. All weights in them are copies.
const COPY_FOLDERS: &[&str] =
    &["original", "onnx", "openvino", "coreml", "gguf", "ggml", "tflite", "mlx", "metal", "flax"];
/// Files of the run that trained the old weights. `training_args.bin` is a pickle that runs code when loaded.
const TRAINING_FILES: &[&str] = &[
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
];
/// A pickle with less than this fraction (1/16) of the checkpoint's bytes is not a copy, not even at two bits per
/// weight.
const MIN_COPY_SHARE: u64 = 16;

/// Why a file is left out of a new checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum LeftOutReason {
    /// It is another copy of the old weights, or an index of such copies.
    OtherWeights,
    /// It is part of the state of the run that trained the old weights.
    TrainingState,
    /// It describes the old model.
    ModelCard,
}

impl fmt::Display for LeftOutReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherWeights => "another copy of the old weights",
            Self::TrainingState => "state of the run that trained the old weights",
            Self::ModelCard => "the old model's card",
        })
    }
}

/// A file of the old checkpoint that is left out of a new one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LeftOut {
    /// Its path relative to the checkpoint's folder; invalid UTF-8 is replaced.
    pub path: String,
    /// Why.
    pub reason: LeftOutReason,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", Printable(&self.path), self.reason)
    }
}

/// The files next to a checkpoint's shards, classified.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SideFiles {
    /// Files that go into a new checkpoint: relative paths, sorted.
    pub kept: Vec<PathBuf>,
    /// Files that do not, sorted by path.
    pub left_out: Vec<LeftOut>,
}

/// Copies the files next to a checkpoint's shards, such as config and tokenizer, into the new folder `root`, replacing
/// those of an earlier run. Corrects an index whose `total_size` is wrong. Files that would contradict a new
/// checkpoint are left out and returned, sorted by path, unless `keep_other_files`.
///
/// # Errors
/// As [`Checkpoint::sorted_side_files`] and [`copy_file`].
pub fn copy_side_files(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    root: &Path,
    keep_other_files: bool,
) -> Result<Vec<LeftOut>, CheckpointError> {
    let SideFiles { kept, left_out } = checkpoint.sorted_side_files(keep_other_files)?;
    for side_file in kept {
        let to = root.join(&side_file);
        create_folders(folder_of(&to))?;
        remove_file(&to)?;
        if let Some(wrong) = checkpoint
            .wrong_total()
            .filter(|_| checkpoint.index_name().is_some_and(|name| side_file == Path::new(name)))
        {
            write_index(&checkpoint.root().join(&side_file), &to, wrong)?;
            continue;
        }
        copy_file(ctx, &checkpoint.root().join(&side_file), &to, CopyMode::Auto)?;
    }
    Ok(left_out)
}

/// Writes an index with the correct `total_size`, synced.
fn write_index(source: &Path, target: &Path, wrong: WrongTotal) -> Result<(), CheckpointError> {
    let json = read_whole(source, MAX_INDEX_BYTES)?;
    let json = wrong.corrected(&json).map_err(|e| CheckpointError::bad_file(source, e.to_string()))?;
    let meta = File::open(source).and_then(|file| file.metadata());
    let to = create_like(&meta.map_err(|e| CheckpointError::io("read", source, e))?, target)?;
    let written = to.write_all_at(&json, 0).and_then(|()| to.sync_all());
    written.map_err(|e| CheckpointError::io("write", target, e))
}

impl Checkpoint {
    /// Everything in the folder except shards: config, tokenizer, index; relative paths, sorted. Empty for a single
    /// file. Hidden entries (`.git`, `.cache`, ledgers) are left out.
    ///
    /// # Errors
    /// [`CheckpointError::Many`] lists links that lead out of the folder, to nothing, or to another folder: a copy
    /// would contain files that were never part of the checkpoint.
    pub fn side_files(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        if self.layout() != Layout::File {
            self.collect_side_files(&Bounds::of(self.root())?, Path::new(""), &mut found, &mut problems)?;
        }
        if !problems.is_empty() {
            problems.sort_unstable();
            let what = "links that cannot be followed".to_owned();
            return Err(CheckpointError::Many { path: self.root().to_owned(), what, problems });
        }
        found.sort_unstable();
        Ok(found)
    }

    fn collect_side_files(
        &self,
        bounds: &Bounds,
        below: &Path,
        found: &mut Vec<PathBuf>,
        problems: &mut Vec<String>,
    ) -> Result<(), CheckpointError> {
        let shards: BTreeSet<String> = self.shards().iter().map(Shard::file_name).collect();
        for (name, kind) in probe::entries(&self.root().join(below))? {
            if name.to_string_lossy().starts_with('.') {
                continue;
            }
            let path = below.join(&name);
            let full = self.root().join(&path);
            let file = match kind {
                EntryKind::Folder => {
                    // A single file of the folder may have been merged into by itself; its ledger does not apply to
                    // the copy.
                    if !name.to_string_lossy().ends_with(STATE_FOLDER) {
                        self.collect_side_files(bounds, &path, found, problems)?;
                    }
                    continue;
                }
                EntryKind::Link => match bounds.resolve(&path) {
                    Err(problem) => {
                        problems.push(problem);
                        continue;
                    }
                    Ok(_) if probe::is_folder(&full)? => {
                        problems.push(format!("{} is a link to a folder", Printable::path(&path)));
                        continue;
                    }
                    Ok(_) => probe::is_file(&full)?.then_some(path),
                },
                EntryKind::File => Some(path),
                EntryKind::Special => None,
            };
            let is_shard = below.as_os_str().is_empty() && shards.contains(&*name.to_string_lossy());
            found.extend(file.filter(|_| !is_shard));
        }
        Ok(())
    }

    /// The [side files](Self::side_files), separated from those that would contradict a new checkpoint; with
    /// `keep_other_files` all are kept. Reads the headers of safetensors files in subfolders, one at a time.
    ///
    /// # Errors
    /// As [`Self::side_files`]; a file that cannot be examined.
    pub fn sorted_side_files(&self, keep_other_files: bool) -> Result<SideFiles, CheckpointError> {
        let found = self.side_files()?;
        if keep_other_files {
            return Ok(SideFiles { kept: found, left_out: Vec::new() });
        }
        let names: Vec<Name> = found.iter().map(|path| Name::of(path)).collect();
        let copy_folders: BTreeSet<&str> = names.iter().filter_map(Name::copy_folder_with_weights).collect();
        let mut reasons = Vec::with_capacity(found.len());
        for (path, name) in found.iter().zip(&names) {
            let is_own_index = self.index_name().is_some_and(|own| path == Path::new(own));
            reasons.push(if is_own_index { None } else { self.contradiction(path, name, &copy_folders)? });
        }
        // An index in a subfolder follows the files of its folder.
        let folders_left_out: BTreeSet<PathBuf> = (found.iter().zip(&reasons))
            .filter(|(_, reason)| **reason == Some(LeftOutReason::OtherWeights))
            .map(|(path, _)| folder_of(path).to_owned())
            .collect();
        let mut side_files = SideFiles::default();
        for ((path, name), reason) in found.into_iter().zip(&names).zip(reasons) {
            let is_left_out = name.is_index() && !name.is_at_root() && folders_left_out.contains(folder_of(&path));
            match reason.or(is_left_out.then_some(LeftOutReason::OtherWeights)) {
                None => side_files.kept.push(path),
                Some(reason) => side_files.left_out.push(LeftOut { path: path.to_string_lossy().into_owned(), reason }),
            }
        }
        Ok(side_files)
    }

    /// The files in the folder that contradict its weights once those change, sorted by path. For in-place changes,
    /// where they stay, and for dry runs.
    ///
    /// # Errors
    /// As [`Self::sorted_side_files`].
    pub fn side_files_left_out(&self) -> Result<Vec<LeftOut>, CheckpointError> {
        Ok(self.sorted_side_files(false)?.left_out)
    }

    /// Why a side file must not accompany other weights; `None` if it may.
    fn contradiction(
        &self,
        path: &Path,
        name: &Name,
        copy_folders: &BTreeSet<&str>,
    ) -> Result<Option<LeftOutReason>, CheckpointError> {
        if name.folders.first().is_some_and(|folder| copy_folders.contains(folder.as_str())) {
            return Ok(Some(LeftOutReason::OtherWeights));
        }
        Ok(match name.verdict() {
            Verdict::Keep => None,
            Verdict::LeaveOut(reason) => Some(reason),
            Verdict::AskSize => {
                let n_bytes = probe::n_bytes(&self.root().join(path))?;
                (n_bytes >= self.n_bytes() / MIN_COPY_SHARE).then_some(LeftOutReason::OtherWeights)
            }
            Verdict::AskTensors => self.shares_tensors(path)?.then_some(LeftOutReason::OtherWeights),
        })
    }

    /// Whether a safetensors file has a tensor of the checkpoint. An unreadable file counts as if it had.
    fn shares_tensors(&self, path: &Path) -> Result<bool, CheckpointError> {
        match Shard::open(&self.root().join(path)) {
            Ok(file) => Ok(file.header().tensors().iter().any(|tensor| self.tensor(&tensor.name).is_some())),
            Err(e) if e.kind() == ErrorKind::BadInput => Ok(true),
            Err(e) => Err(e),
        }
    }
}

/// The classification of a file by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Keep,
    LeaveOut(LeftOutReason),
    /// A pickle: another copy of the weights if it is large.
    AskSize,
    /// A safetensors file in a subfolder: another copy if it has tensors of the checkpoint.
    AskTensors,
}

/// A side file's path relative to the checkpoint's folder, in lower case.
struct Name {
    folders: Vec<String>,
    file: String,
}

impl Name {
    fn of(path: &Path) -> Self {
        let mut parts: Vec<String> =
            path.components().map(|part| part.as_os_str().to_string_lossy().to_ascii_lowercase()).collect();
        let file = parts.pop().unwrap_or_default();
        Self { folders: parts, file }
    }

    fn is_at_root(&self) -> bool {
        self.folders.is_empty()
    }

    fn ends_with_any(&self, endings: &[&str]) -> bool {
        endings.iter().any(|ending| self.file.ends_with(ending))
    }

    fn begins_with_any(&self, beginnings: &[&str]) -> bool {
        beginnings.iter().any(|beginning| self.file.starts_with(beginning))
    }

    /// Whether it is an index of a model's shards.
    fn is_index(&self) -> bool {
        self.file.strip_suffix(".index.json").is_some_and(|stem| {
            [".safetensors", ".h5", ".msgpack"].iter().chain(PICKLE_ENDINGS).any(|ending| stem.ends_with(ending))
        })
    }

    /// The folder of another format of the model that contains this file, if the file is weights.
    fn copy_folder_with_weights(&self) -> Option<&str> {
        let folder = self.folders.first().filter(|folder| COPY_FOLDERS.contains(&folder.as_str()))?;
        let is_weights = self.file.ends_with(".safetensors")
            || self.ends_with_any(MODEL_ENDINGS)
            || self.ends_with_any(PICKLE_ENDINGS)
            || self.folders.iter().any(|folder| is_bundle(folder));
        is_weights.then_some(folder)
    }

    fn verdict(&self) -> Verdict {
        use LeftOutReason::{ModelCard, OtherWeights, TrainingState};
        let file = self.file.as_str();
        let is_at_root = self.is_at_root();
        if self.folders.first().is_some_and(|folder| is_training_folder(folder))
            || TRAINING_FILES.contains(&file)
            || (file.starts_with("rng_state") && file.ends_with(".pth"))
            || (file.starts_with("random_states") && file.ends_with(".pkl"))
        {
            return Verdict::LeaveOut(TrainingState);
        }
        if is_at_root && file.ends_with(".md") && self.begins_with_any(&["readme", "model_card", "modelcard"]) {
            return Verdict::LeaveOut(ModelCard);
        }
        if file.starts_with("adapter_model") {
            return Verdict::Keep;
        }
        let is_pickle = self.ends_with_any(PICKLE_ENDINGS);
        let is_pickled_model = is_at_root && is_pickle && self.begins_with_any(PICKLED_MODELS);
        let is_safetensors = file.ends_with(".safetensors");
        if self.ends_with_any(MODEL_ENDINGS)
            || file.contains(".ckpt.")
            || file.starts_with("openvino_")
            || (is_at_root && file == "weights.npz")
            || self.folders.iter().any(|folder| is_bundle(folder))
            || is_pickled_model
            || (is_pickle && is_numbered(file))
            || (is_safetensors && (is_at_root || file.starts_with("consolidated")))
            || (is_at_root && self.is_index() && file != INDEX_FILE)
        {
            return Verdict::LeaveOut(OtherWeights);
        }
        match (is_safetensors, is_pickle) {
            (true, _) => Verdict::AskTensors,
            (_, true) => Verdict::AskSize,
            _ => Verdict::Keep,
        }
    }
}

/// A folder that is one Core ML model.
fn is_bundle(folder: &str) -> bool {
    folder.ends_with(".mlpackage") || folder.ends_with(".mlmodelc")
}

/// `checkpoint-500` of transformers, `global_step500` of DeepSpeed, `optimizer_0` and `pytorch_model_fsdp_0` of FSDP.
fn is_training_folder(folder: &str) -> bool {
    ["checkpoint-", "global_step", "optimizer_", "pytorch_model_fsdp_"].iter().any(|beginning| {
        let number = folder.strip_prefix(beginning);
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// Whether the file name is numbered, as in `model-00001-of-00002.bin`.
fn is_numbered(file: &str) -> bool {
    file.match_indices("-of-").any(|(at, of)| {
        let is_digit = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_digit);
        is_digit(file.as_bytes()[..at].last()) && is_digit(file.as_bytes().get(at + of.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(path: &str) -> Verdict {
        Name::of(Path::new(path)).verdict()
    }

    #[test]
    fn names_of_weights_training_state_and_cards_are_known() {
        use LeftOutReason::{ModelCard, OtherWeights, TrainingState};
        for (reason, paths) in [
            (
                OtherWeights,
                "consolidated.safetensors consolidated.00.pth consolidated-00001-of-00002.safetensors model-00001-of-00002.safetensors \
                 model.fp16.safetensors adapter.safetensors pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json \
                 model.fp16.safetensors.index.json consolidated.safetensors.index.json tf_model.h5 flax_model.msgpack \
                 flax_model.msgpack.index.json rust_model.ot Model-Q4_K_M.GGUF ggml-model.ggml model.onnx model.onnx_data sub/model.onnx \
                 model.tflite model.mlmodel model.ckpt model.ckpt.data-00000-of-00001 openvino_model.xml openvino_model.bin weights.npz \
                 float/model.mlpackage/Data/weights/weight.bin fp16/pytorch_model-00001-of-00002.bin sub/consolidated.safetensors",
            ),
            (
                TrainingState,
                "optimizer.pt scheduler.pt rng_state.pth rng_state_0.pth trainer_state.json training_args.bin random_states_0.pkl \
                 global_step500/mp_rank_00_model_states.pt checkpoint-500/config.json checkpoint-500/model.safetensors \
                 pytorch_model_fsdp_0/.metadata",
            ),
            (ModelCard, "README.md Readme_zh.md README-CN.md MODEL_CARD.md"),
        ] {
            for path in paths.split_whitespace() {
                assert_eq!(verdict(path), Verdict::LeaveOut(reason), "{path}");
            }
        }
    }

    #[test]
    fn files_that_fit_any_weights_are_kept() {
        let paths = "config.json generation_config.json model.safetensors.index.json tokenizer.json tokenizer.model tokenizer.model.v3 vocab.txt \
             vocab.json spiece.model merges.txt sentencepiece.bpe.model chat_template.jinja modeling_x.py LICENSE LICENSE.md NOTICE.txt \
             USE_POLICY.md logo.png params.json tekken.json modules.json 1_Pooling/config.json 1_Pooling/README.md figures/README.md \
             text_encoder/model.safetensors.index.json adapter_model.safetensors adapter_model.bin adapter_config.json all_results.json \
             original/LICENSE checkpoint-best/notes.txt state-of-the-art.txt global_steps.json";
        for path in paths.split_whitespace() {
            assert_eq!(verdict(path), Verdict::Keep, "{path}");
        }
        for path in ["spk_dict.pt", "value_head.bin", "2_Dense/pytorch_model.bin", "voices/model.pt"] {
            assert_eq!(verdict(path), Verdict::AskSize, "{path}");
        }
        for path in ["2_Dense/model.safetensors", "speech_tokenizer/model-00001-of-00002.safetensors"] {
            assert_eq!(verdict(path), Verdict::AskTensors, "{path}");
        }
    }

    #[test]
    fn a_reason_is_shown_with_its_file_escaped() {
        let left_out = LeftOut { path: "a\u{1b}.gguf".to_owned(), reason: LeftOutReason::OtherWeights };
        assert_eq!(left_out.to_string(), "a\\u{1b}.gguf: another copy of the old weights");
    }
}
