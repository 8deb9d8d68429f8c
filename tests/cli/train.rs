use std::{collections::BTreeMap, fs};

use insta::assert_snapshot;
use serde_json::json;

use super::Workspace;

const DATA: &str = "--data [FIXTURES]/data/commonsense.jsonl --batch-size 4 --batch-tokens 1000 --epochs 2 --seed 3";

#[test]
fn training_writes_an_adapter_that_merges() {
    let workspace = Workspace::new();
    let line =
        format!("train [FIXTURES]/tiny-llama -k 2 {DATA} --eval-data [FIXTURES]/data/commonsense.jsonl --license MIT");
    let told = workspace.run(&format!("{line} -o a.safetensors"));
    let (stdout, stderr) = told.split_once("--- stderr\n").unwrap();
    assert!(stdout.starts_with("exit: 0\n--- stdout\nadapter     "), "{told}");
    for words in ["\ntrained     2,432 deltas in 12 steps, 9,700 tokens\n", "\nloss        5.3", "\nevaluation  5.3"] {
        assert!(stdout.contains(words), "{words}\n{told}");
    }
    for words in [
        "commonsense.jsonl: 18 examples (commonsense), 4,850 tokens, 491 of them learned, the longest has 371",
        "model      tiny-llama (llama, 2 layers of 64, 126,272 parameters)",
        "trainable  2,432 deltas, 1.93 % of the parameters",
        "step 0  evaluation loss 5.5",
        ", best so far",
    ] {
        assert!(stderr.contains(words), "{words}\n{stderr}");
    }
    assert_eq!(workspace.files(), ["a.log.jsonl", "a.loss.svg", "a.safetensors"]);
    let report = workspace.json(&format!("{line} -o b.safetensors -q"));
    assert!(report["eval_loss"].as_f64() < report["first_eval_loss"].as_f64(), "{report}");
    assert_eq!(fs::read(workspace.path("a.safetensors")).unwrap(), fs::read(workspace.path("b.safetensors")).unwrap());
    let told = workspace.run("inspect a.safetensors");
    assert!(told.contains("\ntraining     12 steps on commonsense.jsonl, loss 5.3"), "{told}");
    let notes = &workspace.json("inspect a.safetensors")["sparse"]["notes"];
    assert_eq!(notes["license"], "MIT");
    assert_eq!(notes["training"]["data"]["name"], "commonsense.jsonl");
    assert_eq!(notes["training"]["options"]["seed"], 3);
    assert_eq!(notes["training"]["result"]["eval_loss"], report["eval_loss"]);
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter a.safetensors -o merged");
    workspace.stdout("verify merged --base [FIXTURES]/tiny-llama");
}

#[test]
fn what_a_run_takes_is_told_without_training() {
    let workspace = Workspace::new();
    let line = format!("train [FIXTURES]/tiny-llama -k 2 {DATA} -o a.safetensors --dry-run");
    assert_snapshot!(workspace.run(&format!("{line} --layer-checkpoints")), @r"
    exit: 0
    --- stdout
    model      tiny-llama (llama, 2 layers of 64, 126,272 parameters)
    trainable  2,432 deltas, 1.93 % of the parameters
    memory     8.14 MB: weights 253 kB, activations 7.83 MB, state 58.4 kB
    steps      12 of 808 tokens each, a batch has 998 at most
    --- stderr
    commonsense.jsonl: 18 examples (commonsense), 4,850 tokens, 491 of them learned, the longest has 371
    ");
    let start = workspace.json(&line);
    assert_eq!((&start["n_trained"], &start["n_steps"]), (&2432.into(), &12.into()));
    assert_eq!(workspace.files(), [""; 0]);
}

#[test]
fn a_run_that_cannot_be_is_refused_first() {
    let workspace = Workspace::new();
    workspace.write("a.safetensors", "here already");
    let run = |line: &str| workspace.run(&format!("train {line} -q"));
    assert_snapshot!(run(&format!("[FIXTURES]/tiny-llama -k 1 {DATA} -o a.safetensors")), @r"
    exit: 4
    --- stdout
    --- stderr
    error: a.safetensors exists already
    hint: --force replaces it
    ");
    assert_snapshot!(run(&format!("[FIXTURES]/tiny-llama -k 1 {DATA} -o b.safetensors --lr 0")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: learning rate must be positive
    ");
    assert_snapshot!(run("[FIXTURES]/tiny-llama -k 1 --data none.json -o b.safetensors"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot read `none.json`: No such file or directory (os error 2)
    ");
    let config = workspace.copy_fixture("tiny-llama").join("config.json");
    let other = fs::read_to_string(&config).unwrap().replace("\"llama\"", "\"mamba\"");
    fs::write(&config, other).unwrap();
    assert_snapshot!(run(&format!("tiny-llama -k 1 {DATA} -o b.safetensors")), @r"
    exit: 4
    --- stdout
    --- stderr
    error: tiny-llama: model type `mamba` cannot be trained; llama, mistral, qwen2, qwen3 can
    ");
    assert_eq!(fs::read(workspace.path("a.safetensors")).unwrap(), b"here already");
}

/// A copy of the tiny Llama with biases at queries and keys, in a shard of their own.
fn copy_with_biases(workspace: &Workspace) {
    let index = workspace.copy_fixture("tiny-llama").join("model.safetensors.index.json");
    let shard = "biases.safetensors";
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    let (mut header, mut bytes) = (serde_json::Map::new(), Vec::new());
    for layer in 0..2 {
        for (module, d_out) in [("q_proj", 64), ("k_proj", 32)] {
            let name = format!("model.layers.{layer}.self_attn.{module}.bias");
            let start = bytes.len();
            bytes.extend((0..d_out).flat_map(|i| half::bf16::from_f32((i % 7) as f32 / 64.0).to_le_bytes()));
            header
                .insert(name.clone(), json!({"dtype": "BF16", "shape": [d_out], "data_offsets": [start, bytes.len()]}));
            json["weight_map"][name] = json!(shard);
        }
    }
    json["metadata"] = json!({});
    let header = serde_json::to_vec(&header).unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes].concat();
    fs::write(index.with_file_name(shard), file).unwrap();
    fs::write(index, serde_json::to_vec(&json).unwrap()).unwrap();
}

#[test]
fn trained_biases_pass_through_every_command() {
    let workspace = Workspace::new();
    copy_with_biases(&workspace);
    let line = format!("train tiny-llama -k 2 {DATA} --train-bias");
    assert_snapshot!(workspace.run(&format!("{line} -o a.safetensors --dry-run")), @r"
    exit: 0
    --- stdout
    model      tiny-llama (llama, 2 layers of 64, 126,464 parameters)
    trainable  2,432 deltas and 192 biases, 2.07 % of the parameters
    memory     10.6 MB: weights 253 kB, activations 10.3 MB, state 63.4 kB
    steps      12 of 808 tokens each, a batch has 998 at most
    --- stderr
    commonsense.jsonl: 18 examples (commonsense), 4,850 tokens, 491 of them learned, the longest has 371
    ");
    assert_eq!(workspace.json(&format!("{line} -o a.safetensors --dry-run"))["n_biases"], 192);
    workspace.stdout(&format!("{line} --max-steps 4 -o a.safetensors"));
    workspace.stdout(&format!("{line} --max-steps 3 -o b.safetensors"));
    let told = workspace.run("inspect a.safetensors --filter *.self_attn.[qk]_proj.*");
    assert_snapshot!(told[told.find("kind ").unwrap()..], @r"
    kind         base type  values  targets  rows  per row  connections   share
    k_proj       BF16       F32           2    64        2          128  3.12 %
    k_proj.bias  BF16       F32           2    64        1           64   100 %
    q_proj       BF16       F32           2   128        2          256  3.12 %
    q_proj.bias  BF16       F32           2   128        1          128   100 %
    --- stderr
    ");

    let before = bytes_of(&workspace, "tiny-llama");
    workspace.stdout("merge tiny-llama --adapter a.safetensors -o merged");
    assert_ne!(bytes_of(&workspace, "merged")["biases.safetensors"], before["biases.safetensors"]);
    workspace.stdout("verify merged --base tiny-llama");
    workspace.stdout("merge merged --adapter b.safetensors --in-place");
    workspace.stdout("verify merged --base tiny-llama");
    workspace.stdout("unmerge merged");
    let mut after = bytes_of(&workspace, "merged");
    after.retain(|name, _| before.contains_key(name));
    assert!(after == before, "every byte of the base returns");

    workspace.stdout("diff a.safetensors a.safetensors");
    let diff = workspace.json("diff a.safetensors b.safetensors");
    assert!(diff.to_string().contains("self_attn.k_proj.bias"), "{diff}");
    workspace.stdout("pack a.safetensors -o a.packed --base tiny-llama --columns derived");
    workspace.stdout("unpack a.packed -o a.unpacked --base tiny-llama");
    assert_eq!(fs::read(workspace.path("a.unpacked")).unwrap(), fs::read(workspace.path("a.safetensors")).unwrap());
    workspace.stdout("combine a.safetensors=0.5 b.safetensors=0.5 -o c.safetensors");
    workspace.stdout("merge tiny-llama --adapter c.safetensors -o combined");
    let told = workspace.run("convert a.safetensors --to npz -o a.npz");
    assert!(told.contains("\"model.layers.0.self_attn.k_proj.bias\": shape [32] is a vector"), "{told}");
}

#[test]
fn biases_that_the_base_has_not_are_not_trained() {
    let workspace = Workspace::new();
    let line = format!("train [FIXTURES]/tiny-llama -k 1 {DATA} --train-bias -o a.safetensors");
    for more in ["", " --dry-run"] {
        let told = workspace.run(&format!("{line}{more} -q"));
        let what = "the chosen projections have no biases, and an adapter can only add to existing tensors";
        assert_eq!(told, format!("exit: 2\n--- stdout\n--- stderr\nerror: [FIXTURES]/tiny-llama: {what}\n"));
    }
    assert_eq!(workspace.files(), [""; 0]);
}

/// The files of a folder below this place, by name.
fn bytes_of(workspace: &Workspace, folder: &str) -> BTreeMap<String, Vec<u8>> {
    let prefix = format!("{folder}/");
    let names = workspace.files().into_iter();
    names
        .filter_map(|name| Some((name.strip_prefix(&prefix)?.to_owned(), fs::read(workspace.path(&name)).unwrap())))
        .collect()
}
