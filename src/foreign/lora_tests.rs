//! What a LoRA adapter is made of, and the forms its files may have.

use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::{
    checkpoint::Existing,
    foreign::{AdapterKind, PeftType},
};

type Tensors<'a> = &'a [(&'a str, &'a [u64], f32)];

fn write(folder: &Path, config: &str, tensors: Tensors<'_>) {
    std::fs::write(folder.join(PEFT_CONFIG), format!("{{\"peft_type\":\"LORA\",\"r\":2{config}}}")).unwrap();
    let mut file = TensorFileWriter::create(&folder.join(PEFT_TENSORS), Existing::Replace).unwrap();
    for (name, shape, value) in tensors {
        let id = file.add_tensor(format!("base_model.model.{name}"), Dtype::F32);
        file.append(id, &value.to_le_bytes().repeat(shape.iter().product::<u64>() as usize)).unwrap();
        file.finish_tensor(id, shape.to_vec());
    }
    file.finish(&Context::default(), &BTreeMap::new()).unwrap();
}

fn open(config: &str, tensors: Tensors<'_>) -> Result<LoraAdapter, String> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, tensors);
    LoraAdapter::open(&Context::default(), dir.path()).map_err(|e| e.to_string())
}

#[test]
fn every_tensor_has_a_role() {
    let config =
        r#","use_dora":true,"lora_bias":true,"target_parameters":["experts.gate_up_proj","experts.down_proj"]"#;
    let adapter = open(
        config,
        &[
            ("a.q.lora_A.weight", &[2, 5], 1.0),
            ("a.q.lora_B.weight", &[3, 2], 1.0),
            ("a.q.lora_B.bias", &[3], 1.0),
            ("a.q.lora_magnitude_vector", &[3], 1.0),
            ("e.lora_embedding_A", &[2, 9], 1.0),
            ("e.lora_embedding_B", &[4, 2], 1.0),
            ("e.lora_magnitude_vector.weight", &[4], 1.0),
            ("m.experts.lora_A.weight", &[6, 5], 1.0),
            ("m.experts.lora_B.weight", &[7, 6], 1.0),
            ("m.experts.base_layer.lora_A.weight", &[6, 7], 1.0),
            ("m.experts.base_layer.lora_B.weight", &[8, 6], 1.0),
            ("lm_head.weight", &[9, 4], 1.0),
        ],
    )
    .unwrap();
    let told: Vec<_> = adapter.modules().iter().map(|m| (m.target(), m.shape)).collect();
    let expected = [
        ("a.q.weight", LoraShape::Linear { d_out: 3, d_in: 5 }),
        ("e.weight", LoraShape::Embedding { vocabulary: 9, d_out: 4 }),
        ("m.experts.down_proj", LoraShape::Experts { n_experts: 3, d_out: 7, d_in: 5 }),
        ("m.experts.gate_up_proj", LoraShape::Experts { n_experts: 3, d_out: 8, d_in: 7 }),
    ];
    assert_eq!(told, expected.map(|(name, shape)| (name.to_owned(), shape)));
    assert_eq!(adapter.full()[0].name, "lm_head.weight");
}

#[test]
fn a_parameter_without_an_owner_claims_stacks_alone() {
    let config = r#","target_parameters":["gate_up_proj"]"#;
    let adapter = open(
        config,
        &[
            ("m.experts.lora_A.weight", &[6, 5], 1.0),
            ("m.experts.lora_B.weight", &[8, 6], 1.0),
            ("m.q_proj.lora_A.weight", &[2, 5], 1.0),
            ("m.q_proj.lora_B.weight", &[3, 2], 1.0),
        ],
    )
    .unwrap();
    let told: Vec<_> = adapter.modules().iter().map(LoraModule::target).collect();
    assert_eq!(told, ["m.experts.gate_up_proj", "m.q_proj.weight"]);
}

#[test]
fn what_does_not_fit_together_is_listed() {
    let a: (&str, &[u64], f32) = ("q.lora_A.weight", &[2, 5], 1.0);
    for (config, tensors, said) in [
        ("", &[a][..], "lora_B is missing"),
        ("", &[a, ("q.lora_B.weight", &[3, 4], 1.0)], "the config needs [2, d_in] and [d_out, 2]"),
        ("", &[a, ("q.lora_B.weight", &[0, 2], 1.0)], "is empty"),
        ("", &[("q.lora_E", &[2], 1.0)], "is no part of a LoRA adapter"),
        (r#","use_dora":true"#, &[a, ("q.lora_B.weight", &[3, 2], 1.0)], "lora_magnitude_vector is missing"),
        ("", &[a, ("q.lora_B.weight", &[3, 2], 1.0), ("q.lora_B.bias", &[3], 1.0)], "does not speak of"),
        ("", &[a, ("q.base_layer.lora_A.default.weight", &[2, 5], 1.0)], "at several depths"),
        ("", &[], "nothing to merge"),
        ("", &[("w.weight", &[2], 1.0), ("w.base_layer.weight", &[2], 1.0)], "is there twice"),
    ] {
        let error = open(config, tensors).unwrap_err();
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn an_id_is_of_what_a_merge_depends_on() {
    let id = |config: &str, value: f32| {
        let dir = tempfile::tempdir().unwrap();
        let tensors: Tensors<'_> = &[("q.lora_A.weight", &[2, 5], value), ("q.lora_B.weight", &[3, 2], 1.0)];
        write(dir.path(), config, tensors);
        LoraAdapter::open(&Context::default(), dir.path()).unwrap().id(&Context::default()).map_err(|e| e.to_string())
    };
    let plain = id("", 1.0).unwrap();
    assert_eq!(id(r#","lora_dropout":0.5,"base_model_name_or_path":"x""#, 1.0).unwrap(), plain);
    assert_ne!(id(r#","lora_alpha":3"#, 1.0).unwrap(), plain);
    assert_ne!(id("", 2.0).unwrap(), plain);
    assert!(id("", f32::NAN).unwrap_err().contains("element 0 is not a finite number"));
}

// --- forms

/// What torch pickled; `adapter_model.safetensors` has the same tensors.
fn pickled(name: &str) -> PathBuf {
    Path::new("fixtures/reference/peft/pickled").join(name)
}

/// A folder with the config and these files, under other names.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (from, to) in [("adapter_config.json", PEFT_CONFIG)].iter().chain(files) {
        std::fs::copy(pickled(from), dir.path().join(to)).unwrap();
    }
    dir
}

/// Splits the tensors of the folder's only file in two shards with an index.
fn shard(folder: &Path) {
    let whole = Shard::open(&folder.join(PEFT_TENSORS)).unwrap();
    let names = ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"];
    let mut files = names.map(|name| TensorFileWriter::create(&folder.join(name), Existing::Keep).unwrap());
    let mut weight_map = BTreeMap::new();
    for (i, info) in whole.header().by_name().enumerate() {
        let mut bytes = vec![0; info.n_bytes() as usize];
        whole.read_at(&mut bytes, whole.file_range(info).start).unwrap();
        let id = files[i % 2].add_tensor(info.name.clone(), info.dtype);
        files[i % 2].append(id, &bytes).unwrap();
        files[i % 2].finish_tensor(id, info.shape.clone());
        weight_map.insert(info.name.clone(), names[i % 2]);
    }
    for file in files {
        file.finish(&Context::default(), &BTreeMap::new()).unwrap();
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": weight_map}).to_string();
    std::fs::write(folder.join("adapter_model.safetensors.index.json"), index).unwrap();
    std::fs::remove_file(folder.join(PEFT_TENSORS)).unwrap();
}

fn opened(path: &Path) -> (LoraAdapter, blake3::Hash) {
    let adapter = LoraAdapter::open(&Context::default(), path).unwrap();
    let id = adapter.id(&Context::default()).unwrap();
    (adapter, id)
}

/// The id of what `write_copy` makes, which is one plain folder.
fn id_of_copy(adapter: &LoraAdapter) -> blake3::Hash {
    let dir = tempfile::tempdir().unwrap();
    let own = OwnFolder::at(dir.path()).unwrap();
    adapter.write_copy(&Context::default(), &own).unwrap();
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.len() == 2 && names.iter().all(|name| name == PEFT_CONFIG || name == PEFT_TENSORS), "{names:?}");
    opened(dir.path()).1
}

#[test]
fn an_adapter_has_one_id_whatever_its_files() {
    let plain = folder(&[("adapter_model.safetensors", PEFT_TENSORS)]);
    let zip = folder(&[("zip.bin", "adapter_model.bin")]);
    let stream = folder(&[("stream.bin", "adapter_model.bin")]);
    let sharded = folder(&[("adapter_model.safetensors", PEFT_TENSORS)]);
    shard(sharded.path());
    let (adapter, id) = opened(plain.path());
    assert_eq!(adapter.modules().len(), 1);
    assert_eq!(adapter.full().len(), 3);
    for path in [
        plain.path().join(PEFT_TENSORS),
        zip.path().to_owned(),
        zip.path().join("adapter_model.bin"),
        stream.path().to_owned(),
        sharded.path().to_owned(),
        sharded.path().join("adapter_model.safetensors.index.json"),
    ] {
        let (adapter, found) = opened(&path);
        assert_eq!(found, id, "{}", path.display());
        assert_eq!(adapter.path(), path);
        assert_eq!(id_of_copy(&adapter), id, "{}", path.display());
        assert_eq!(AdapterKind::of(&path).unwrap(), AdapterKind::Peft(PeftType::Lora));
    }
    // A plain folder is copied byte for byte.
    let copy = tempfile::tempdir().unwrap();
    adapter.write_copy(&Context::default(), &OwnFolder::at(copy.path()).unwrap()).unwrap();
    for name in [PEFT_CONFIG, PEFT_TENSORS] {
        assert_eq!(std::fs::read(copy.path().join(name)).unwrap(), std::fs::read(plain.path().join(name)).unwrap());
    }
}

#[test]
fn unpacked_tensors_go_with_the_adapter() {
    let zip = folder(&[("zip.bin", "adapter_model.bin")]);
    let (adapter, _) = opened(zip.path());
    let unpacked = adapter.tensor(&adapter.modules()[0].a).0.path().to_owned();
    assert!(unpacked.is_file() && !unpacked.starts_with(zip.path()));
    drop(adapter);
    assert!(!unpacked.exists());
}

#[test]
fn files_that_contradict_one_another_are_refused() {
    let open = |dir: &TempDir| LoraAdapter::open(&Context::default(), dir.path()).unwrap_err().to_string();
    let both = folder(&[("adapter_model.safetensors", PEFT_TENSORS)]);
    shard(both.path());
    std::fs::copy(pickled("adapter_model.safetensors"), both.path().join(PEFT_TENSORS)).unwrap();
    assert!(open(&both).contains("has both adapter_model.safetensors and adapter_model.safetensors.index.json"));
    let twice = folder(&[("adapter_model.safetensors", PEFT_TENSORS), ("zip.bin", "non_lora_trainables.bin")]);
    let said = open(&twice);
    assert!(said.contains("is in ") && said.contains("non_lora_trainables.bin"), "{said}");
    // A million elements that are one.
    let expanded = folder(&[("expanded.bin", "adapter_model.bin")]);
    let said = open(&expanded);
    assert!(said.contains("adapter_model.bin") && said.contains("twice the file's own size"), "{said}");
    let missing = folder(&[]);
    assert!(open(&missing).contains("adapter_model.safetensors"));
}

#[test]
fn a_damaged_pickle_is_refused_where_it_is_damaged() {
    for name in ["zip.bin", "stream.bin"] {
        let whole = std::fs::read(pickled(name)).unwrap();
        let dir = folder(&[]);
        for n in (0..whole.len()).step_by(7) {
            std::fs::write(dir.path().join("adapter_model.bin"), &whole[..n]).unwrap();
            let said = LoraAdapter::open(&Context::default(), dir.path()).unwrap_err().to_string();
            assert!(said.contains("adapter_model.bin"), "{name} {n}: {said}");
        }
    }
}

#[test]
fn what_was_trained_beside_the_adapter_is_part_of_it() {
    let with =
        folder(&[("adapter_model.safetensors", PEFT_TENSORS), ("non_lora_trainables.bin", "non_lora_trainables.bin")]);
    let without = folder(&[("adapter_model.safetensors", PEFT_TENSORS)]);
    let (adapter, id) = opened(with.path());
    let names: Vec<&str> = adapter.full().iter().map(|full| full.name.as_str()).collect();
    assert_eq!(names[2..4], ["model.mm_projector.0.bias", "model.mm_projector.0.weight"]);
    assert_eq!(names.len(), 5);
    assert_ne!(id, opened(without.path()).1);
    assert_eq!(id_of_copy(&adapter), id);
    let expected = Shard::open(&pickled("non_lora_trainables.safetensors")).unwrap();
    let bytes = |(shard, info): (&Shard, &TensorInfo)| {
        let mut bytes = vec![0; info.n_bytes() as usize];
        shard.read_at(&mut bytes, shard.file_range(info).start).unwrap();
        (info.dtype, info.shape.clone(), bytes)
    };
    for info in expected.header().tensors() {
        assert_eq!(bytes(adapter.tensor(&info.name)), bytes((&expected, info)), "{}", info.name);
    }
}

// --- trainable tokens

const DELTA: &str = "model.embed_tokens.token_adapter.trainable_tokens_delta";

fn tokens(config: &str, tensor: &str, n: u64) -> Result<(LoraAdapter, blake3::Hash), String> {
    let dir = tempfile::tempdir().unwrap();
    let factors: Tensors<'_> =
        &[("q.lora_A.weight", &[2, 5], 1.0), ("q.lora_B.weight", &[3, 2], 1.0), (tensor, &[n, 4], 2.0)];
    write(dir.path(), config, factors);
    let adapter = LoraAdapter::open(&Context::default(), dir.path()).map_err(|e| e.to_string())?;
    let id = adapter.id(&Context::default()).unwrap();
    assert_eq!(id_of_copy(&adapter), id);
    Ok((adapter, id))
}

#[test]
fn replaced_rows_come_in_the_order_of_the_config() {
    let (adapter, id) = tokens(r#","trainable_token_indices":{"embed_tokens":[7,3]}"#, DELTA, 2).unwrap();
    let rows = ReplacedRows {
        name: "model.embed_tokens.weight".to_owned(),
        tensor: format!("base_model.model.{DELTA}"),
        rows: vec![7, 3],
    };
    assert_eq!(adapter.rows(), [rows]);
    assert!(adapter.full().is_empty());
    let (list, same) = tokens(r#","trainable_token_indices":[7,3]"#, DELTA, 2).unwrap();
    assert_eq!((list.rows(), same), (adapter.rows(), id));
    let (_, other) = tokens(r#","trainable_token_indices":[3,7]"#, DELTA, 2).unwrap();
    assert_ne!(other, id, "which row goes where counts");
    // A key for the tied head, which has no tensor of its own.
    tokens(r#","trainable_token_indices":{"embed_tokens":[7,3],"lm_head":[7,3]}"#, DELTA, 2).unwrap();
}

#[test]
fn replaced_rows_that_the_config_does_not_explain_are_refused() {
    for (config, tensor, n, said) in [
        (r#","trainable_token_indices":[7,3]"#, DELTA, 3, "the config needs [2, d]"),
        (r#","trainable_token_indices":{"wte":[7,3]}"#, DELTA, 2, "does not say which rows"),
        (r#","trainable_token_indices":{"embed_tokens":[7,3],"tokens":[3,7]}"#, DELTA, 2, "different rows"),
        ("", DELTA, 2, "does not say which rows"),
        (r#","trainable_token_indices":[7,3]"#, "lm_head.weight", 2, "the file has none"),
        (r#","trainable_token_indices":[7,7]"#, DELTA, 2, "row 7 comes twice"),
    ] {
        let error = tokens(config, tensor, n).unwrap_err();
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn trainable_tokens_alone_are_an_adapter_without_modules() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "", &[("model.embed_tokens.trainable_tokens_delta", &[2, 4], 1.0)]);
    let config = r#"{"peft_type":"TRAINABLE_TOKENS","token_indices":[3,7],"target_modules":["embed_tokens"],"init_weights":true}"#;
    std::fs::write(dir.path().join(PEFT_CONFIG), config).unwrap();
    let (adapter, id) = opened(dir.path());
    assert!(adapter.modules().is_empty() && adapter.full().is_empty());
    assert_eq!(
        (adapter.rows()[0].name.as_str(), &adapter.rows()[0].rows[..]),
        ("model.embed_tokens.weight", &[3, 7][..])
    );
    assert_eq!(id_of_copy(&adapter), id);
    assert_eq!(AdapterKind::of(dir.path()).unwrap(), AdapterKind::Peft(PeftType::TrainableTokens));
}
