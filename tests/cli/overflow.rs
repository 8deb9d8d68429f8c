//! What a merge says of weights that would become infinite, and of deltas of no plausible size.

use insta::assert_snapshot;

use super::{
    Workspace,
    adapters::{content, write_adapter},
};

const MERGE: &str = "merge [FIXTURES]/tiny-llama --adapter a.safetensors";

#[test]
fn an_overflow_is_refused_with_the_option_that_allows_it() {
    let workspace = Workspace::new();
    // Column 0 gets 3e38 twice, column 1 a quarter of it.
    write_adapter(&workspace, "a.safetensors", "layers.0.self_attn.q_proj.weight", 0, 3e38);
    let before = workspace.files();
    let expected = r#"exit: 4
--- stdout
--- stderr
error: [FIXTURES]/tiny-llama: "model.layers.0.self_attn.q_proj.weight" [0, 0]: the merge would make this finite weight infinite or NaN, and 63 more
hint: check the scale and the adapter; --allow-overflow merges anyway
"#;
    for how in ["=2 -o out", "=2 -o out --dry-run"] {
        assert_eq!(workspace.run(&format!("{MERGE}{how}")), expected);
    }
    assert_eq!(workspace.files(), before);
    let told = workspace.run(&format!("{MERGE}=2 -o out --allow-overflow"));
    assert!(told.starts_with("exit: 0"), "{told}");
    for words in ["warning: 64 finite weights overflowed to infinity or NaN", "deltas of up to 6.0e38 on weights"] {
        assert!(told.contains(words), "{words}: {told}");
    }
    workspace.stdout("unmerge out");
    assert_eq!(content(&workspace.path("out")), content(&super::harness::fixtures().join("tiny-llama")));
}

#[test]
fn a_delta_with_a_flipped_exponent_bit_is_warned_about() {
    let workspace = Workspace::new();
    let flipped = f32::from_bits(0.01f32.to_bits() ^ 1 << 30);
    write_adapter(&workspace, "a.safetensors", "q_proj.weight", 0, flipped);
    let told = workspace.run(&format!("{MERGE} -o out"));
    let (_, stderr) = told.split_once("--- stderr\n").unwrap();
    assert_snapshot!(stderr, @r#"warning: adapter fc7aa022288a: tensor "model.layers.0.self_attn.q_proj.weight": deltas of up to 3.4e36 on weights of at most 4.8e-2 (1 more of its tensors are like it): is the file damaged, or the scale wrong?"#);
    let report = workspace.json(&format!("{MERGE} -o out --force"));
    let notes = report["notes"].as_array().unwrap();
    assert!(notes.len() == 1 && notes[0].as_str().unwrap().starts_with("warning: adapter "), "{notes:?}");
}

#[test]
fn adapters_as_people_have_them_raise_no_warning() {
    let workspace = Workspace::new();
    for (base, adapter) in [
        ("tiny-llama", "tiny-llama-adapter.safetensors"),
        ("reference/model/llama", "reference/peft/lora"),
        ("reference/model/llama", "reference/peft/lora_dora"),
        ("reference/model/qwen2", "reference/peft/lora_rslora"),
    ] {
        let told = workspace.run(&format!("merge [FIXTURES]/{base} --adapter [FIXTURES]/{adapter} -o out --dry-run"));
        assert!(told.starts_with("exit: 0") && !told.contains("warning:"), "{adapter}: {told}");
    }
}
