//! The files next to a checkpoint's shards, and which of them go into a new checkpoint.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{fs, path::Path};

use neuroada_ckpt::{
    Checkpoint, Context, Dtype, Existing, MergeOptions, Which,
    internals::{
        checkpoint::{LeftOutReason, TensorFileWriter, copy_side_files},
        merge,
    },
    sync::{self, Checksum, Encoding, ExportOptions},
};

#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use world::{World, whole_tree};

const KEPT: &[&str] = &[
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "LICENSE",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "modeling_x.py",
    "original.txt",
    "spk_dict.pt",
    "tokenizer.model",
    "voice/model-00001-of-00001.safetensors",
    "voice/model.safetensors.index.json",
];
const LEFT_OUT: &[(&str, LeftOutReason)] = &[
    ("README.md", LeftOutReason::ModelCard),
    ("checkpoint-500/config.json", LeftOutReason::TrainingState),
    ("consolidated.safetensors", LeftOutReason::OtherWeights),
    ("fp16/model.safetensors", LeftOutReason::OtherWeights),
    ("fp16/model.safetensors.index.json", LeftOutReason::OtherWeights),
    ("large.pth", LeftOutReason::OtherWeights),
    ("model-00001-of-00003.safetensors", LeftOutReason::OtherWeights),
    ("model.fp16.safetensors.index.json", LeftOutReason::OtherWeights),
    ("onnx/config.json", LeftOutReason::OtherWeights),
    ("onnx/model.onnx", LeftOutReason::OtherWeights),
    ("optimizer.pt", LeftOutReason::TrainingState),
    ("original/consolidated.00.pth", LeftOutReason::OtherWeights),
    ("original/params.json", LeftOutReason::OtherWeights),
    ("pytorch_model.bin", LeftOutReason::OtherWeights),
    ("q4.gguf", LeftOutReason::OtherWeights),
    ("torn/x.safetensors", LeftOutReason::OtherWeights),
    ("training_args.bin", LeftOutReason::TrainingState),
];

/// A safetensors file with one tensor of this name.
fn write_tensor(path: &Path, name: &str) {
    let mut file = TensorFileWriter::create(path, Existing::Replace).unwrap();
    let id = file.add_tensor(name.to_owned(), Dtype::F32);
    file.append(id, &[0; 4]).unwrap();
    file.finish_tensor(id, vec![1]);
    file.finish(&Context::default(), &Default::default()).unwrap();
}

/// Adds all the files above to a checkpoint's folder.
fn add_files(folder: &Path) {
    for path in KEPT.iter().copied().chain(LEFT_OUT.iter().map(|(path, _)| *path)) {
        let to = folder.join(path);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        match path {
            "large.pth" => fs::write(&to, vec![0; 200_000]).unwrap(),
            "2_Dense/model.safetensors" => write_tensor(&to, "linear.weight"),
            "voice/model-00001-of-00001.safetensors" => write_tensor(&to, "decoder.weight"),
            "fp16/model.safetensors" => write_tensor(&to, "w.F32"),
            _ => fs::write(&to, path).unwrap(),
        }
    }
}

/// The files of a new checkpoint, without its shards and its ledger.
fn side_files(folder: &Path) -> Vec<String> {
    let names = whole_tree(folder).into_keys().map(|path| path.to_string_lossy().into_owned());
    let is_own = |name: &String| name.starts_with(".neuroada") || name.ends_with("-of-00002.safetensors");
    let names = names.filter(|name| !is_own(name) && name != "config.json" && name != "model.safetensors.index.json");
    names.collect()
}

#[test]
fn files_that_contradict_new_weights_are_left_out_and_listed() {
    let world = World::new();
    let base = world.copy_base("full");
    add_files(&base);
    let checkpoint = Checkpoint::open(&base).unwrap();
    let found: Vec<(String, LeftOutReason)> =
        checkpoint.side_files_left_out().unwrap().into_iter().map(|file| (file.path, file.reason)).collect();
    let expected: Vec<(String, LeftOutReason)> =
        LEFT_OUT.iter().map(|(path, reason)| ((*path).to_owned(), *reason)).collect();
    assert_eq!(found, expected);

    let (ctx, out) = (Context::default(), world.at("copied"));
    fs::create_dir(&out).unwrap();
    let left_out = copy_side_files(&ctx, &checkpoint, &out, false).unwrap();
    assert_eq!(left_out, checkpoint.side_files_left_out().unwrap());
    assert_eq!(side_files(&out), KEPT);

    let all = world.at("all");
    fs::create_dir(&all).unwrap();
    assert!(copy_side_files(&ctx, &checkpoint, &all, true).unwrap().is_empty());
    assert_eq!(side_files(&all).len(), KEPT.len() + LEFT_OUT.len());
}

#[test]
fn no_new_checkpoint_contains_them() {
    let world = World::new();
    let base = world.copy_base("full");
    add_files(&base);
    let (ctx, merged, again) = (Context::default(), world.at("merged"), world.at("again"));
    merge::merge(&ctx, &base, &[world.input(0)], &MergeOptions::new_checkpoint(&merged)).unwrap();
    // A new card after a merge, and the base's card after everything is unmerged.
    let with_card = || [&["README.md"], KEPT].concat();
    let sorted = |mut names: Vec<&'static str>| {
        names.sort_unstable();
        names
    };
    assert_eq!(side_files(&merged), sorted(with_card()));
    merge::unmerge(&ctx, &merged, &Which::All, &MergeOptions::new_checkpoint(&again)).unwrap();
    assert_eq!(side_files(&again), sorted(with_card()));
    assert_eq!(fs::read(again.join("README.md")).unwrap(), fs::read(base.join("README.md")).unwrap());

    let (delta, synced) = (world.at("weight_v000001"), world.at("synced"));
    let options = ExportOptions { encoding: Encoding::Xor, checksum: Checksum::Blake3, version: 1, base_version: 0 };
    let (old, new) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&merged).unwrap());
    sync::export(&ctx, &old, &new, &options, &delta, Existing::Keep).unwrap();
    let report = sync::apply(&ctx, &old, &delta, &synced, Existing::Keep).unwrap();
    assert_eq!(side_files(&synced), KEPT);
    assert_eq!(report.left_out, old.side_files_left_out().unwrap());
}

#[test]
fn a_single_file_has_no_side_files() {
    let world = World::new();
    add_files(&world.base());
    let file = Checkpoint::open(&world.base().join("model-00001-of-00002.safetensors")).unwrap();
    assert!(file.side_files().unwrap().is_empty() && file.side_files_left_out().unwrap().is_empty());
}
