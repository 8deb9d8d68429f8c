use std::fs;

use insta::assert_snapshot;

use super::{Workspace, harness::fixtures};

const INIT: &str = "init [FIXTURES]/tiny-llama --mask m.safetensors";

fn workspace() -> Workspace {
    let workspace = Workspace::new();
    workspace.stdout("mask [FIXTURES]/tiny-llama --k 2 -o m.safetensors");
    workspace
}

#[test]
fn the_shipped_adapter_is_made_by_the_commands_beside_it() {
    let workspace = workspace();
    let mut init = workspace
        .command(&format!("{INIT} --values [FIXTURES]/tiny-llama-values.safetensors --dtype bf16 --license MIT"));
    let output =
        init.args(["--description", "Random deltas, for trying things", "-o", "a.safetensors"]).output().unwrap();
    assert_snapshot!(workspace.told(&output), @r"
    exit: 0
    --- stdout
    adapter    8029d815eeb9
    made from  tiny-llama
    tensors    14
    deltas     2,432 of BF16, 2,432 not zero
    size       15.3 kB
    --- stderr
    ");
    let shipped = fs::read(fixtures().join("tiny-llama-adapter.safetensors")).unwrap();
    assert!(fs::read(workspace.path("a.safetensors")).unwrap() == shipped);
}

#[test]
fn without_values_all_deltas_are_zero_and_merging_changes_nothing() {
    let workspace = workspace();
    assert_snapshot!(workspace.run(&format!("{INIT} -o a.safetensors")), @r"
    exit: 0
    --- stdout
    adapter    d8bdb21a1070
    made from  tiny-llama
    tensors    14
    deltas     2,432 of F32, 0 not zero
    size       20.1 kB
    --- stderr
    note: all deltas are zero: merging this adapter changes nothing; --values takes trained values
    ");
    let report = workspace.json("merge [FIXTURES]/tiny-llama --adapter a.safetensors -o out");
    assert_eq!((report["total"]["n_touched"].as_u64(), report["total"]["n_changed"].as_u64()), (Some(2432), Some(0)));
    workspace.stdout("diff [FIXTURES]/tiny-llama out");
}

#[test]
fn refusals_of_init() {
    let workspace = workspace();
    let files = workspace.files();
    // A base of the same shapes with other values: the mask's anchors tell.
    workspace.copy_fixture("tiny-llama");
    let shard = workspace.path("tiny-llama/model-00002-of-00003.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let end = bytes.len();
    bytes[end - 20_000..].iter_mut().for_each(|byte| *byte ^= 1);
    fs::write(&shard, bytes).unwrap();
    assert_snapshot!(workspace.run("init tiny-llama --mask m.safetensors -o a"), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: m.safetensors: tensor "model.layers.1.self_attn.o_proj.weight": the mask was made from tiny-llama, tiny-llama has other values at its positions
    "#);
    fs::remove_dir_all(workspace.path("tiny-llama")).unwrap();
    assert_snapshot!(workspace.run("init [FIXTURES]/tiny-llama --mask [FIXTURES]/tiny-llama-adapter.safetensors -o a"), @r"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama-adapter.safetensors: this is an adapter; expected a mask
    ");
    assert_snapshot!(workspace.run(&format!("{INIT} --values [FIXTURES]/tiny-llama/model-00001-of-00003.safetensors -o a")), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama/model-00001-of-00003.safetensors: the values do not fit the mask:
      "model.layers.0.mlp.down_proj.weight.values" is missing
      "model.layers.0.mlp.gate_proj.weight.values" is missing
      "model.layers.0.mlp.up_proj.weight.values" is missing
      "model.layers.0.self_attn.k_proj.weight.values" is missing
      "model.layers.0.self_attn.o_proj.weight.values" is missing
      … and 11 more; -v lists them
    "#);
    assert_snapshot!(workspace.run(&format!("{INIT} --scale nan -o a")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: --scale NaN is not a finite number
    ");
    assert_snapshot!(workspace.run(&format!("{INIT} -o m.safetensors")), @r"
    exit: 4
    --- stdout
    --- stderr
    error: m.safetensors: the output is an input: m.safetensors
    hint: choose another output path; with --in-place, merge and unmerge change the checkpoint itself
    ");
    assert_snapshot!(workspace.run("init [FIXTURES]/accepted/odd-header.safetensors --mask m.safetensors -o a"), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: m.safetensors: does not fit the base odd-header:
      "model.layers.0.mlp.down_proj.weight": the base has no such tensor
      "model.layers.0.mlp.gate_proj.weight": the base has no such tensor
      "model.layers.0.mlp.up_proj.weight": the base has no such tensor
      "model.layers.0.self_attn.k_proj.weight": the base has no such tensor
      "model.layers.0.self_attn.o_proj.weight": the base has no such tensor
      … and 9 more; -v lists them
    "#);
    assert_eq!(workspace.files(), files);
}
