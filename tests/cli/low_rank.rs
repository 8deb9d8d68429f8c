use std::{collections::BTreeMap, fs};

use neuroada_ckpt::{Context, Dtype, Existing, internals::checkpoint::TensorFileWriter};

use super::{
    Workspace,
    adapters::{Bytes, content, weights, write_adapter},
    harness::fixtures,
};

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// Writes a PEFT folder; tensors are given by name, shape and the bytes of one element that is repeated.
fn write_peft(workspace: &Workspace, name: &str, config: &str, tensors: &[(&str, &[u64], f32)]) {
    workspace.write(&format!("{name}/adapter_config.json"), config);
    let path = workspace.path(&format!("{name}/adapter_model.safetensors"));
    let mut file = TensorFileWriter::create(&path, Existing::Replace).unwrap();
    for (name, shape, value) in tensors {
        let id = file.add_tensor((*name).to_owned(), Dtype::F32);
        file.append(id, &value.to_le_bytes().repeat(shape.iter().product::<u64>() as usize)).unwrap();
        file.finish_tensor(id, shape.to_vec());
    }
    file.finish(&Context::default(), &BTreeMap::new()).unwrap();
}

pub(crate) fn write_lora(workspace: &Workspace, name: &str, value: f32) {
    let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
    let config = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"base_model_name_or_path":"/home/somebody/tiny-llama"}"#;
    write_peft(workspace, name, config, &[(&a, &[2, 64], value), (&b, &[64, 2], 0.5)]);
}

fn base() -> Vec<(String, Bytes)> {
    content(&fixtures().join("tiny-llama"))
}

const MERGE: &str = "merge [FIXTURES]/tiny-llama --adapter lora";

#[test]
fn a_lora_is_merged_proven_and_taken_out_again() {
    let workspace = Workspace::new();
    write_lora(&workspace, "lora", 0.01);
    let told = workspace.run(&format!("{MERGE} -o out"));
    assert!(told.starts_with("exit: 0"), "{told}");
    for words in [
        "q_proj        1    4,096",
        "tiny-llama\n",
        "note: unmerge will need the base; --keep-originals stores the originals (8.19 kB) beside the result instead",
    ] {
        assert!(told.contains(words), "{words}: {told}");
    }
    let inspected = workspace.run("inspect out");
    assert!(
        inspected.contains("4,096 weights of 1 tensors changed, no originals kept: unmerge needs the base"),
        "{inspected}"
    );
    let verified = workspace.run("verify out --base [FIXTURES]/tiny-llama");
    assert!(verified.starts_with("exit: 0") && verified.contains("4,096 weights, 0 wrong"), "{verified}");
    assert!(workspace.run("verify out").starts_with("exit: 0"));
    let alone = workspace.run("unmerge out -o undone");
    assert!(alone.starts_with("exit: 4") && alone.contains("hint: --base PATH names it"), "{alone}");
    let other = workspace.run("unmerge out -o undone --adapter b3:0000000000000000 --base [FIXTURES]/tiny-llama");
    assert!(!other.starts_with("exit: 0") && !other.contains("--base PATH names it"), "{other}");
    workspace.stdout("unmerge out --base [FIXTURES]/tiny-llama -o undone");
    assert_eq!(content(&workspace.path("undone")), base());
    let id = workspace.json("inspect out")["merges"]["active"][0]["id"].as_str().unwrap().to_owned();
    workspace.stdout(&format!("unmerge out --base [FIXTURES]/tiny-llama -o by-id --adapter {}", &id[..8]));
    assert_eq!(content(&workspace.path("by-id")), base());
    workspace.stdout("unmerge out --base [FIXTURES]/tiny-llama");
    assert_eq!(content(&workspace.path("out")), base());
}

#[test]
fn kept_originals_undo_without_the_base() {
    let workspace = Workspace::new();
    write_lora(&workspace, "lora", 0.01);
    let dry = workspace.json(&format!("{MERGE} -o out --keep-originals --dry-run"));
    assert_eq!((dry["dry_run"].as_bool(), dry["ledger_bytes"].as_u64()), (Some(true), Some(8192)));
    assert!(!workspace.path("out").exists());
    workspace.stdout(&format!("{MERGE} -o out --keep-originals"));
    // No base would help.
    let other = workspace.run(&format!("unmerge out -o undone --adapter {}", "0".repeat(64)));
    assert!(other.starts_with("exit: 4") && other.contains("is not merged into it"), "{other}");
    assert!(!other.contains("--base PATH names it"), "{other}");
    assert!(workspace.json("verify out")["ok"].as_bool().unwrap());
    workspace.stdout("unmerge out -o undone");
    assert_eq!(content(&workspace.path("undone")), base());
    workspace.stdout(&format!("{MERGE} -o plain --no-ledger"));
    assert!(!workspace.path("plain/.neuroada").exists());
}

#[test]
fn loras_and_sparse_adapters_are_merged_at_once_with_scales() {
    let workspace = Workspace::new();
    write_lora(&workspace, "lora", 0.01);
    write_lora(&workspace, "other", 0.02);
    write_adapter(&workspace, "sparse.safetensors", "q_proj.weight", 0, 0.5);
    let all = "--adapter lora=0.5 --adapter sparse.safetensors --adapter other";
    let report = workspace.json(&format!("merge [FIXTURES]/tiny-llama {all} -o out"));
    assert_eq!(report["active"].as_array().unwrap().len(), 3);
    workspace.stdout("unmerge out --base [FIXTURES]/tiny-llama --adapter sparse.safetensors --adapter other -o less");
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter lora=0.5 -o half");
    assert_eq!(content(&workspace.path("less")), content(&workspace.path("half")));
    let more = workspace.run("merge out --adapter lora -o more");
    assert!(more.starts_with("exit: 4") && more.contains("is already merged into it"), "{more}");
    // Onto the half of it the rest, in another order and from the base's originals: the same weights.
    let lacking = workspace.run("merge half --adapter sparse.safetensors --adapter other -o more");
    assert!(lacking.starts_with("exit: 4") && lacking.contains("hint: --base PATH names it"), "{lacking}");
    workspace.stdout("merge half --adapter other --adapter sparse.safetensors --base [FIXTURES]/tiny-llama -o more");
    assert_eq!(content(&workspace.path("more")), content(&workspace.path("out")));
}

#[test]
fn in_place_a_lora_keeps_originals_or_has_a_base() {
    let workspace = Workspace::new();
    write_lora(&workspace, "lora", 0.01);
    write_adapter(&workspace, "sparse.safetensors", "q_proj.weight", 0, 0.5);
    workspace.copy_fixture("tiny-llama");
    let before = content(&workspace.path("tiny-llama"));
    let told = workspace.run("merge tiny-llama --adapter lora --in-place");
    assert!(
        told.starts_with("exit: 4") && told.contains("(8192 bytes), and nothing would keep the originals"),
        "{told}"
    );
    assert!(told.contains("hint: --keep-originals stores them in the ledger, --base PATH"), "{told}");
    assert_eq!(content(&workspace.path("tiny-llama")), before);
    workspace.stdout(&format!("{MERGE} -o merged"));
    for keep in ["--keep-originals", "--base [FIXTURES]/tiny-llama"] {
        workspace.stdout(&format!("merge tiny-llama --adapter lora --in-place {keep}"));
        assert_eq!(weights(&workspace.path("tiny-llama")), weights(&workspace.path("merged")));
        let from = if keep.starts_with("--base") { keep } else { "" };
        workspace.stdout(&format!("merge tiny-llama --adapter sparse.safetensors --in-place {from}"));
        assert_ne!(weights(&workspace.path("tiny-llama")), weights(&workspace.path("merged")));
        workspace.stdout(&format!("unmerge tiny-llama --adapter sparse.safetensors {from}"));
        assert_eq!(weights(&workspace.path("tiny-llama")), weights(&workspace.path("merged")));
        workspace.stdout(&format!("unmerge tiny-llama {from}"));
        assert_eq!(content(&workspace.path("tiny-llama")), before);
        assert!(!workspace.path("tiny-llama/.neuroada").exists());
    }
}

#[test]
fn a_lora_goes_onto_a_sparse_merge_and_out_again_with_any_number_of_threads() {
    let workspace = Workspace::new();
    let factors: Vec<(String, [u64; 2], f32)> = (0..2)
        .flat_map(|layer| {
            [("gate_proj", 176, 64), ("up_proj", 176, 64), ("down_proj", 64, 176)].map(move |(name, d_out, d_in)| {
                let module = format!("base_model.model.model.layers.{layer}.mlp.{name}");
                [
                    (format!("{module}.lora_A.weight"), [2, d_in], 0.01),
                    (format!("{module}.lora_B.weight"), [d_out, 2], 0.5),
                ]
            })
        })
        .flatten()
        .collect();
    let factors: Vec<(&str, &[u64], f32)> =
        factors.iter().map(|(name, shape, value)| (name.as_str(), shape.as_slice(), *value)).collect();
    write_peft(&workspace, "lora", r#"{"peft_type":"LORA","r":2,"lora_alpha":4}"#, &factors);
    write_adapter(&workspace, "sparse.safetensors", "proj.weight", 0, 0.5);
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter sparse.safetensors -o sparse");
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter sparse.safetensors --adapter lora -o both");
    let id = workspace.json("inspect both")["merges"]["active"]
        .as_array()
        .unwrap()
        .iter()
        .find(|a| a["kind"] == "lora")
        .unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    for threads in [1, 2, 3, 8] {
        workspace.stdout(&format!("merge sparse --adapter lora -o onto --threads {threads}"));
        assert_eq!(content(&workspace.path("onto")), content(&workspace.path("both")));
        workspace
            .stdout(&format!("unmerge onto --adapter {id} --base [FIXTURES]/tiny-llama -o out --threads {threads}"));
        assert_eq!(content(&workspace.path("out")), content(&workspace.path("sparse")));
        for folder in ["onto", "out"] {
            std::fs::remove_dir_all(workspace.path(folder)).unwrap();
        }
    }
}

#[test]
fn hostile_and_foreign_adapters_are_named_and_nothing_is_written() {
    let workspace = Workspace::new();
    let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
    let good: (&[u64], &[u64]) = (&[2, 64], &[64, 2]);
    let plain = r#"{"peft_type":"LORA","r":2}"#;
    for (config, shapes, value, code, words) in [
        (plain, (&[2u64, 63][..], &[64u64, 2][..]), 0.1, 4, "adapter was made for [64, 63], base has [64, 64]"),
        (plain, good, f32::NAN, 3, "is not a finite number"),
        (plain, (&[3, 64], &[64, 3]), 0.1, 3, "the config needs [2, d_in] and [d_out, 2]"),
        (r#"{"peft_type":"LORA","r":99999999999999}"#, good, 0.1, 3, "the config needs [99999999999999, d_in]"),
        (r#"{"peft_type":"LORA","r":2,"rank_pattern":{"(a{9999}){9999}":2}}"#, good, 0.1, 3, "cannot be used"),
        (r#"{"peft_type":"LORA","r":2,"use_qalora":true}"#, good, 0.1, 4, "QALoRA is not supported"),
        (r#"{"peft_type":"LORA","r":2,"surprise":7}"#, good, 0.1, 3, "`surprise`: this key is not known here"),
        (r#"{"peft_type":"LOHA","r":2}"#, good, 0.1, 4, "a PEFT adapter of method LOHA cannot be merged as it is"),
        (r#"{"r":2}"#, good, 0.1, 3, "has no `peft_type`"),
        ("[[[[", good, 0.1, 3, "the config is malformed"),
    ] {
        write_peft(&workspace, "lora", config, &[(&a, shapes.0, value), (&b, shapes.1, 0.5)]);
        let before = workspace.files();
        let told = workspace.run(&format!("{MERGE} -o out"));
        assert!(told.starts_with(&format!("exit: {code}\n")) && told.contains(words), "{words}: {told}");
        assert_eq!(workspace.files(), before, "{words}");
    }
    write_peft(&workspace, "lora", plain, &[(&a, &[2, 64], 0.1)]);
    assert!(workspace.run(&format!("{MERGE} -o out")).contains("lora_B is missing: the other half is there"));
    fs::write(workspace.path("lora/adapter_model.safetensors"), b"PK\x03\x04aaaaaaaaaaaa").unwrap();
    assert!(workspace.run(&format!("{MERGE} -o out")).contains("a zip archive"));
    workspace.write("empty/README.md", "");
    let told = workspace.run("merge [FIXTURES]/tiny-llama --adapter empty -o out");
    assert!(told.starts_with("exit: 3") && told.contains("without adapter_config.json is no adapter"), "{told}");
}
