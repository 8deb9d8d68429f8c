//! Adapters with tensors that the base does not have, or has in another size: heads of classifiers, embeddings of a larger vocabulary.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::bf16;
use neuroada_ckpt::{
    AdapterReading, Checkpoint, Context, Dtype, KeptOriginals, MergeError, MergeInput, MergeOptions, MergeReport,
    VerifyOptions, Which, internals::merge,
};

#[path = "support/lora.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod lora;
#[path = "support/unnamed.rs"]
mod unnamed;
#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use lora::{Workspace, read, replacing, write_tensors};
use unnamed::unnamed;
use world::whole_tree;

const Q: &str = "model.layers.0.self_attn.q_proj";

fn ctx() -> Context<'static> {
    Context::default()
}

/// Values that bf16 holds, others for every seed.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut random = world::Random(seed);
    (0..n).map(|_| bf16::from_f32(random.delta()).to_f32()).collect()
}

fn allowing(options: MergeOptions<'static>) -> MergeOptions<'static> {
    MergeOptions { reading: AdapterReading { new_tensors: true, ..AdapterReading::default() }, ..options }
}

/// A base of one shard, and one of two with an index.
fn bases(workspace: &Workspace) -> [PathBuf; 2] {
    let config =
        "{\n  \"model_type\": \"llama\",\n  \"architectures\": [\"LlamaForCausalLM\"],\n  \"vocab_size\": 10\n}";
    let tensors = [
        ("lm_head.weight", &[10u64, 4][..], values(40, 1)),
        ("model.embed_tokens.weight", &[10, 4], values(40, 2)),
        (&*format!("{Q}.weight"), &[4, 4], values(16, 3)),
        ("model.norm.weight", &[4], values(4, 4)),
    ];
    let single = workspace.base(Dtype::BF16, config, &tensors);
    let sharded = workspace.path("sharded");
    fs::create_dir(&sharded).unwrap();
    fs::write(sharded.join("config.json"), config).unwrap();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut weight_map = BTreeMap::new();
    for (name, part) in names.iter().zip([&tensors[..2], &tensors[2..]]) {
        write_tensors(&sharded.join(name), Dtype::BF16, part);
        weight_map.extend(part.iter().map(|(tensor, ..)| ((*tensor).to_owned(), *name)));
    }
    let index = serde_json::json!({ "metadata": { "total_size": 200 }, "weight_map": weight_map });
    fs::write(sharded.join("model.safetensors.index.json"), serde_json::to_string_pretty(&index).unwrap()).unwrap();
    [single, sharded]
}

/// LoRA on one projection, and what else there is.
fn adapter(workspace: &Workspace, name: &str, config: &str, seed: u64, more: lora::Tensors<'_>) -> MergeInput {
    let (a, b) = (format!("base_model.model.{Q}.lora_A.weight"), format!("base_model.model.{Q}.lora_B.weight"));
    let mut tensors = vec![(&*a, &[2u64, 4][..], values(8, seed)), (&*b, &[4, 2], values(8, seed + 1))];
    tensors.extend(more.iter().cloned());
    workspace.lora(name, &format!("\"r\":2,\"lora_alpha\":4,\"target_modules\":[\"q_proj\"],{config}"), &tensors)
}

fn head(workspace: &Workspace) -> MergeInput {
    let more = [("base_model.model.score.weight", &[5u64, 4][..], values(20, 30))];
    adapter(workspace, "head", "\"task_type\":\"SEQ_CLS\",\"modules_to_save\":[\"classifier\",\"score\"]", 10, &more)
}

fn vocabulary(workspace: &Workspace) -> MergeInput {
    let more = [
        ("base_model.model.model.embed_tokens.weight", &[12u64, 4][..], values(48, 40)),
        ("base_model.model.lm_head.weight", &[12, 4], values(48, 41)),
    ];
    adapter(workspace, "vocabulary", "\"task_type\":\"CAUSAL_LM\"", 20, &more)
}

fn merged(from: &Path, input: &MergeInput, options: MergeOptions<'static>) -> Result<MergeReport, MergeError> {
    merge::merge(&ctx(), from, std::slice::from_ref(input), &allowing(options))
}

fn config(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap()
}

fn problems(path: &Path, base: Option<&Path>) -> Vec<String> {
    let options = VerifyOptions { base: base.map(Path::to_owned), ..VerifyOptions::default() };
    merge::verify(&ctx(), path, &options).unwrap().problems
}

#[test]
fn a_new_head_is_added_where_that_is_allowed_and_config_names_the_class() {
    let workspace = Workspace::new();
    let input = head(&workspace);
    for base in bases(&workspace) {
        let out = workspace.path("out");
        let refused =
            merge::merge(&ctx(), &base, std::slice::from_ref(&input), &replacing(&out)).unwrap_err().to_string();
        assert!(refused.contains("\"score.weight\"") && refused.contains("--allow-new-tensors"), "{refused}");
        let report = merged(&base, &input, replacing(&out)).unwrap();
        assert_eq!(report.new_tensors, ["score.weight [5, 4] BF16"]);
        let found = read(&out);
        assert_eq!(found["score.weight"], values(20, 30));
        let plain = workspace.path("plain");
        let projection = adapter(&workspace, "projection", "\"task_type\":\"SEQ_CLS\"", 10, &[]);
        merged(&base, &projection, replacing(&plain)).unwrap();
        let mut expected = read(&plain);
        expected.insert("score.weight".to_owned(), values(20, 30));
        assert_eq!(found, expected);
        let config = config(&out);
        assert_eq!(config["architectures"], serde_json::json!(["LlamaForSequenceClassification"]));
        assert_eq!(config["id2label"].as_object().unwrap().len(), 5);
        assert_eq!(config["label2id"]["LABEL_4"], 4);
        assert_eq!(problems(&out, Some(&base)), Vec::<String>::new());
        assert_eq!(Checkpoint::open(&out).unwrap().notes(), Vec::<String>::new());
    }
}

#[test]
fn a_larger_vocabulary_takes_the_place_of_the_old_one_and_config_tells_its_size() {
    let workspace = Workspace::new();
    let input = vocabulary(&workspace);
    for base in bases(&workspace) {
        let out = workspace.path("out");
        let report = merged(&base, &input, replacing(&out)).unwrap();
        assert_eq!(report.new_tensors.len(), 2);
        assert!(report.needs_base, "originals of another size are kept as hashes");
        let found = read(&out);
        assert_eq!((&found["model.embed_tokens.weight"], &found["lm_head.weight"]), (&values(48, 40), &values(48, 41)));
        assert_eq!(config(&out)["vocab_size"], 12);
        assert_eq!(problems(&out, Some(&base)), Vec::<String>::new());
        assert_eq!(Checkpoint::open(&out).unwrap().notes(), Vec::<String>::new());
    }
}

#[test]
fn taking_it_out_gives_every_byte_of_the_base() {
    let workspace = Workspace::new();
    let inputs = [head(&workspace), vocabulary(&workspace)];
    for base in bases(&workspace) {
        let before = whole_tree(&base);
        for input in &inputs {
            for keep in [KeptOriginals::Whole, KeptOriginals::Hashes] {
                let (out, back) = (workspace.path("out"), workspace.path("back"));
                merged(&base, input, MergeOptions { keep, ..replacing(&out) }).unwrap();
                let undo = |base: Option<PathBuf>| {
                    merge::unmerge(&ctx(), &out, &Which::All, &MergeOptions { base, ..replacing(&back) })
                };
                if keep == KeptOriginals::Hashes {
                    assert!(matches!(undo(None), Err(MergeError::NeedsBase { .. })));
                }
                undo((keep == KeptOriginals::Hashes).then(|| base.clone())).unwrap();
                assert!(whole_tree(&back) == before, "{keep:?}");
                fs::remove_dir_all(&back).unwrap();
            }
        }
    }
}

#[test]
fn another_base_is_no_original() {
    let workspace = Workspace::new();
    let input = vocabulary(&workspace);
    let [base, _] = bases(&workspace);
    let out = workspace.path("out");
    merged(&base, &input, replacing(&out)).unwrap();
    let other = base.join("model.safetensors");
    let mut bytes = fs::read(&other).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[start + 5] ^= 1;
    fs::write(other, bytes).unwrap();
    let options = MergeOptions { base: Some(base), ..replacing(&workspace.path("back")) };
    let error = merge::unmerge(&ctx(), &out, &Which::All, &options).unwrap_err().to_string();
    assert!(error.contains("\"lm_head.weight\""), "{error}");
    assert!(!workspace.path("back").exists());
}

#[test]
fn adapters_come_and_go_beside_it() {
    let workspace = Workspace::new();
    let (input, other) = (head(&workspace), adapter(&workspace, "other", "\"task_type\":\"CAUSAL_LM\"", 50, &[]));
    for base in bases(&workspace) {
        let whole = |path: &Path| MergeOptions { keep: KeptOriginals::Whole, ..replacing(path) };
        let [first, both, alone, left] = ["first", "both", "alone", "left"].map(|name| workspace.path(name));
        merged(&base, &input, whole(&first)).unwrap();
        merged(&first, &other, whole(&both)).unwrap();
        assert_eq!(problems(&both, Some(&base)), Vec::<String>::new());
        // One of them is taken out, and the other one is as if it had been alone.
        merged(&base, &other, whole(&alone)).unwrap();
        let ids = |path: &Path| merge::ledger_summary(&Checkpoint::open(path).unwrap()).unwrap().unwrap().active;
        let id = ids(&first)[0].id.parse().unwrap();
        merge::unmerge(&ctx(), &both, &Which::Some(vec![id]), &replacing(&left)).unwrap();
        assert!(whole_tree(&left) == whole_tree(&alone));
        let id = ids(&alone)[0].id.parse().unwrap();
        merge::unmerge(&ctx(), &both, &Which::Some(vec![id]), &replacing(&left)).unwrap();
        assert!(whole_tree(&left) == whole_tree(&first));
        // In place the other one comes and goes as well.
        let before = whole_tree(&first);
        let options = MergeOptions { keep: KeptOriginals::Whole, ..MergeOptions::in_place() };
        merged(&first, &other, options.clone()).unwrap();
        assert_eq!(problems(&first, Some(&base)), Vec::<String>::new());
        merge::unmerge(&ctx(), &first, &Which::Some(vec![id]), &options).unwrap();
        let cards = |tree: &mut BTreeMap<PathBuf, Vec<u8>>| tree.retain(|path, _| !path.ends_with("card"));
        let (mut before, mut after) = (before, whole_tree(&first));
        cards(&mut before);
        cards(&mut after);
        assert!(unnamed(after) == unnamed(before));
        fs::remove_dir_all(&first).unwrap();
    }
}

#[test]
fn in_place_it_is_refused_and_nothing_changes() {
    let workspace = Workspace::new();
    let input = head(&workspace);
    for base in bases(&workspace) {
        let before = whole_tree(&base);
        let options = MergeOptions { keep: KeptOriginals::Whole, ..MergeOptions::in_place() };
        let refused = merged(&base, &input, options.clone());
        assert!(matches!(refused, Err(MergeError::NewTensorsInPlace { .. })), "{refused:?}");
        assert!(whole_tree(&base) == before);
        let out = workspace.path("out");
        merged(&base, &input, MergeOptions { keep: KeptOriginals::Whole, ..replacing(&out) }).unwrap();
        let before = whole_tree(&out);
        let refused = merge::unmerge(&ctx(), &out, &Which::All, &options);
        assert!(matches!(refused, Err(MergeError::NewTensorsInPlace { .. })), "{refused:?}");
        assert!(whole_tree(&out) == before);
    }
}

#[test]
fn a_changed_head_is_found() {
    let workspace = Workspace::new();
    let input = head(&workspace);
    let [base, _] = bases(&workspace);
    let out = workspace.path("out");
    merged(&base, &input, replacing(&out)).unwrap();
    let file = out.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let tensor = checkpoint.tensor("score.weight").unwrap();
    bytes[tensor.shard.file_range(tensor.info).start as usize + 3] ^= 1;
    fs::write(file, bytes).unwrap();
    let found = problems(&out, None);
    assert!(found.len() == 1 && found[0].contains("\"score.weight\""), "{found:?}");
}

#[test]
fn what_would_be_changed_twice_is_refused() {
    let workspace = Workspace::new();
    let [base, _] = bases(&workspace);
    let other = [
        ("base_model.model.lm_head.lora_A.weight", &[2u64, 4][..], values(8, 60)),
        ("base_model.model.lm_head.lora_B.weight", &[10, 2], values(20, 61)),
    ];
    let on_head = workspace.lora("on_head", "\"r\":2,\"lora_alpha\":4,\"target_modules\":[\"lm_head\"]", &other);
    let out = workspace.path("out");
    let inputs = [vocabulary(&workspace), on_head];
    let error = merge::merge(&ctx(), &base, &inputs, &allowing(replacing(&out))).unwrap_err().to_string();
    assert!(error.contains("\"lm_head.weight\""), "{error}");
    assert!(!out.exists());
}

#[test]
fn values_that_the_type_does_not_hold_are_refused() {
    let workspace = Workspace::new();
    let [base, _] = bases(&workspace);
    let more = [("base_model.model.score.weight", &[1u64, 4][..], vec![0.0, 3.4e38, 0.0, 0.0])];
    let input = adapter(&workspace, "large", "\"task_type\":\"SEQ_CLS\"", 10, &more);
    let out = workspace.path("out");
    // The largest bf16 is 3.39e38.
    match merged(&base, &input, replacing(&out)) {
        Err(MergeError::Overflow { tensor, column: 1, .. }) => assert_eq!(tensor, "score.weight"),
        other => panic!("{other:?}"),
    }
    assert!(!out.exists());
}
