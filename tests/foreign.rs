//! Other tools' adapters in every form that people have them: what is merged from them, and what is said of those that are not.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    Adapter, AdapterReading, Checkpoint, Context, Dtype, Format, MergeInput, MergeOptions, Which,
    internals::{
        foreign::{AdapterKind, ForeignAdapter, PeftType},
        merge,
    },
};

#[path = "support/lora.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod lora;

use lora::{Tensors, Workspace, read, write_tensors};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn input(adapter: &Path) -> MergeInput {
    MergeInput { adapter: adapter.to_owned(), scale: None }
}

fn numbers(n: usize, first: f32) -> Vec<f32> {
    (0..n).map(|i| first + i as f32 / 8.0).collect()
}

/// A base for the adapter of `fixtures/reference/peft/pickled`, and a projector.
fn pickled_base(workspace: &Workspace) -> PathBuf {
    let tensors: Tensors<'_> = &[
        ("lm_head.weight", &[6, 4], numbers(24, 3.0)),
        ("model.embed_tokens.weight", &[6, 4], numbers(24, 2.0)),
        ("model.layers.0.self_attn.q_proj.weight", &[4, 4], numbers(16, 1.0)),
        ("model.mm_projector.0.bias", &[4], numbers(4, -1.0)),
        ("model.mm_projector.0.weight", &[4, 4], numbers(16, 0.0)),
        ("model.norm.weight", &[4], numbers(4, 5.0)),
    ];
    workspace.base(Dtype::F32, r#"{"model_type":"llava_llama","tie_word_embeddings":false}"#, tensors)
}

/// Copies files of the fixture into the folder `name`, under other names.
fn adapter(workspace: &Workspace, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let folder = workspace.path(name);
    fs::create_dir(&folder).unwrap();
    for (from, to) in [("adapter_config.json", "adapter_config.json")].iter().chain(files) {
        fs::copy(fixture("reference/peft/pickled").join(from), folder.join(to)).unwrap();
    }
    folder
}

#[test]
fn a_pickled_adapter_merges_to_the_bytes_of_the_same_tensors_in_safetensors() {
    let workspace = Workspace::new();
    pickled_base(&workspace);
    let plain = adapter(&workspace, "plain", &[("adapter_model.safetensors", "adapter_model.safetensors")]);
    let merged = |path: &Path| {
        workspace.merge(&[input(path)], AdapterReading::default()).unwrap();
        fs::read(workspace.path("out/model.safetensors")).unwrap()
    };
    let expected = merged(&plain);
    assert_ne!(expected, fs::read(workspace.path("base/model.safetensors")).unwrap());
    assert_eq!(merged(&plain.join("adapter_model.safetensors")), expected, "the file instead of its folder");
    for name in ["zip.bin", "stream.bin"] {
        let pickled = adapter(&workspace, name, &[(name, "adapter_model.bin")]);
        assert_eq!(merged(&pickled), expected, "{name}");
    }
}

#[test]
fn what_was_trained_beside_an_adapter_is_merged_kept_and_taken_out_again() {
    let workspace = Workspace::new();
    let base = pickled_base(&workspace);
    let non_lora = "non_lora_trainables.bin";
    let llava = adapter(&workspace, "llava", &[("zip.bin", "adapter_model.bin"), (non_lora, non_lora)]);
    let report = workspace.merge(&[input(&llava)], AdapterReading::default()).unwrap();
    let (merged, expected) =
        (read(&workspace.path("out")), read(&fixture("reference/peft/pickled/non_lora_trainables.safetensors")));
    assert_eq!(expected.len(), 2);
    for (name, values) in expected {
        assert_eq!(merged[name.strip_prefix("base_model.model.").unwrap()], values, "{name}");
    }
    let ctx = Context::default();
    let kept = workspace.path("out/.neuroada/adapters").join(&report.active[0].id);
    assert_eq!(merge::adapter_id(&ctx, &kept).unwrap().to_string(), report.active[0].id);
    let undone = MergeOptions { base: Some(base), ..MergeOptions::new_checkpoint(workspace.path("undone")) };
    merge::unmerge(&ctx, &workspace.path("out"), &Which::All, &undone).unwrap();
    let bytes = |name: &str| fs::read(workspace.path(name)).unwrap();
    assert_eq!(bytes("undone/model.safetensors"), bytes("base/model.safetensors"));
}

#[test]
fn trainable_tokens_replace_their_rows_and_are_taken_out_again() {
    let workspace = Workspace::new();
    let base = workspace.base(
        Dtype::F32,
        "{}",
        &[("q.weight", &[3, 5], numbers(15, 0.0)), ("e.weight", &[9, 4], numbers(36, 0.0))],
    );
    let rows: Tensors<'_> = &[("base_model.model.e.token_adapter.trainable_tokens_delta", &[2, 4], numbers(8, 100.0))];
    let mut with_lora = rows.to_vec();
    with_lora.push(("base_model.model.q.lora_A.weight", &[1, 5], numbers(5, 1.0)));
    with_lora.push(("base_model.model.q.lora_B.weight", &[3, 1], numbers(3, 1.0)));
    for (lora, n_touched) in [
        (workspace.lora("lora", r#""r":1,"trainable_token_indices":{"e":[7,3]}"#, &with_lora), 8 + 15),
        (workspace.lora("lora-type", r#""r":1,"trainable_token_indices":[7,3]"#, &with_lora), 8 + 15),
    ] {
        let report = workspace.merge(std::slice::from_ref(&lora), AdapterReading::default()).unwrap();
        assert_eq!(report.total.n_touched, n_touched);
        let merged = read(&workspace.path("out"));
        let mut expected = numbers(36, 0.0);
        expected[7 * 4..8 * 4].copy_from_slice(&numbers(8, 100.0)[..4]);
        expected[3 * 4..4 * 4].copy_from_slice(&numbers(8, 100.0)[4..]);
        assert_eq!(merged["e.weight"], expected);
        let scaled = MergeInput { scale: Some(0.5), ..lora };
        let said = workspace.merge(&[scaled], AdapterReading::default()).unwrap_err().to_string();
        assert!(said.contains("replaces rows of it, and a scale of 0.5 has no meaning"), "{said}");
        let ctx = Context::default();
        let undone = MergeOptions { base: Some(base.clone()), ..lora::replacing(&workspace.path("undone")) };
        merge::unmerge(&ctx, &workspace.path("out"), &Which::All, &undone).unwrap();
        let bytes = |name: &str| fs::read(workspace.path(name)).unwrap();
        assert_eq!(bytes("undone/model.safetensors"), bytes("base/model.safetensors"));
    }
    let beyond: Tensors<'_> =
        &[("base_model.model.e.token_adapter.trainable_tokens_delta", &[1, 4], numbers(4, 100.0))];
    let beyond = workspace.lora("beyond", r#""r":1,"trainable_token_indices":[9]"#, beyond);
    let said = workspace.merge(&[beyond], AdapterReading::default()).unwrap_err().to_string();
    assert!(said.contains("the adapter replaces row 9, base has 9"), "{said}");
}

#[test]
fn sparse_adapters_of_peft_are_opened_by_their_file_too() {
    for (name, format) in [("shira", Format::Shira), ("supertuning", Format::SuperTuning)] {
        let folder = fixture("reference/convert").join(name);
        for path in [folder.clone(), folder.join("adapter_model.safetensors")] {
            let foreign = ForeignAdapter::open(&Context::default(), &path).unwrap().unwrap();
            assert_eq!((foreign.format(), foreign.path()), (format, path.as_path()));
            assert_eq!(AdapterKind::of(&path).unwrap(), AdapterKind::Peft(PeftType::Sparse(format)));
        }
    }
}

#[test]
fn the_folder_of_one_adapter_is_that_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let file = fixture("tiny-llama-adapter.safetensors");
    let copy = |name: &str| fs::copy(&file, dir.path().join(name)).unwrap();
    let document = AdapterKind::Document("adapter".to_owned());
    copy("ours.safetensors");
    fs::write(dir.path().join("README.md"), "an adapter").unwrap();
    assert_eq!(AdapterKind::of(dir.path()).unwrap(), document);
    let (ctx, found) = (Context::default(), Adapter::open(dir.path()).unwrap());
    assert_eq!(found.id(&ctx).unwrap(), Adapter::open(&file).unwrap().id(&ctx).unwrap());
    assert_eq!(found.path(), dir.path().join("ours.safetensors"));
    copy("another.safetensors");
    assert_eq!(AdapterKind::of(dir.path()).unwrap(), AdapterKind::Folder);
    assert!(Adapter::open(dir.path()).is_err());
    assert_eq!(AdapterKind::of(&fixture("tiny-llama")).unwrap(), AdapterKind::Folder);
}

#[test]
fn lora_files_of_other_tools_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lora.safetensors");
    for (a, b, said) in [
        (
            "lora_unet_down_0_to_q.lora_down.weight",
            "lora_unet_down_0_to_q.lora_up.weight",
            "a LoRA file of kohya's sd-scripts",
        ),
        ("lora_te_text_0_q.lora_down.weight", "lora_te_text_0_q.lora_up.weight", "a LoRA file of kohya's sd-scripts"),
        ("unet.down.0.to_q.lora.down.weight", "unet.down.0.to_q.lora.up.weight", "a LoRA file of diffusers"),
        ("unet.down.0.to_q.lora_A.weight", "unet.down.0.to_q.lora_B.weight", "a LoRA file of diffusers"),
        ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", "a PEFT LoRA adapter"),
        ("model.q.weight", "model.k.weight", "a plain checkpoint file"),
    ] {
        write_tensors(&file, Dtype::F32, &[(a, &[2, 4], numbers(8, 0.0)), (b, &[4, 2], numbers(8, 0.0))]);
        let error = Adapter::open(&file).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("expected an adapter"), "{a}: {error}");
    }
}

#[test]
fn an_index_may_have_another_stem() {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("tiny-llama")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let to = name.replace("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json");
        fs::copy(entry.path(), dir.path().join(to)).unwrap();
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.index_name(), Some("diffusion_pytorch_model.safetensors.index.json"));
    let expected = Checkpoint::open(&fixture("tiny-llama")).unwrap();
    assert_eq!(checkpoint.n_parameters(), expected.n_parameters());
    assert_eq!(expected.index_name(), Some("model.safetensors.index.json"));
    let index = dir.path().join("diffusion_pytorch_model.safetensors.index.json");
    fs::copy(&index, dir.path().join("b.safetensors.index.json")).unwrap();
    let said = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(said.contains("has several indexes, expected one: b.safetensors.index.json, diffusion"), "{said}");
    fs::remove_file(dir.path().join("b.safetensors.index.json")).unwrap();
    // A sharded adapter is no checkpoint.
    fs::rename(&index, dir.path().join("adapter_model.safetensors.index.json")).unwrap();
    assert!(Checkpoint::open(dir.path()).is_err());
}
