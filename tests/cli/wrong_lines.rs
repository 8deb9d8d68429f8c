//! Likely mistakes of a new user on the command line, and what the program says.

use std::fs;

use insta::assert_snapshot;

use super::{
    Workspace,
    adapters::{PROJECTIONS, write_adapter},
};

fn workspace() -> Workspace {
    let workspace = Workspace::new();
    workspace.copy_fixture("tiny-llama");
    write_adapter(&workspace, "adapter.safetensors", PROJECTIONS, 0, 0.01);
    workspace
}

/// What the program says on stderr, the exit code before it.
fn told(workspace: &Workspace, line: &str) -> String {
    let told = workspace.run(line);
    let (exit, stderr) = (told.lines().next().unwrap(), told.split_once("--- stderr\n").unwrap().1);
    format!("{exit}\n{stderr}")
}

#[test]
fn a_lora_option_is_the_adapter_option() {
    assert_snapshot!(told(&workspace(), "merge tiny-llama --lora my-lora -o out"), @r"
    exit: 2
    error: unexpected argument '--lora' found

      tip: adapters of every kind follow --adapter: the folder of a PEFT adapter, or a file

    Usage: neuroada-ckpt merge --adapter <FILE[=SCALE]> <--output <PATH>|--in-place> <BASE>

    For more information, try '--help'.
    ");
}

#[test]
fn a_base_option_where_the_base_is_the_first_argument() {
    assert_snapshot!(told(&workspace(), "mask --base tiny-llama --k 1 -o m.safetensors"), @r"
    exit: 2
    error: unexpected argument '--base' found

      tip: the base is the first argument: neuroada-ckpt mask BASE ...

    Usage: neuroada-ckpt mask --axes <KIND=out-in|in-out> <--k <N>|--budget <BUDGET>> <BASE>

    For more information, try '--help'.
    ");
    assert_snapshot!(told(&workspace(), "inspect adapter.safetensors --base tiny-llama"), @r"
    exit: 2
    error: unexpected argument '--base' found

      tip: `inspect` takes the path of the checkpoint as its first argument, and no base

    Usage: neuroada-ckpt inspect <PATH>

    For more information, try '--help'.
    ");
}

#[test]
fn an_adapter_without_its_option() {
    assert_snapshot!(told(&workspace(), "merge tiny-llama adapter.safetensors -o out"), @r"
    exit: 2
    error: unexpected argument 'adapter.safetensors' found

      tip: an adapter follows --adapter, as in --adapter FILE or --adapter FILE=0.5

    Usage: neuroada-ckpt merge [OPTIONS] --adapter <FILE[=SCALE]> <--output <PATH>|--in-place> <BASE>

    For more information, try '--help'.
    ");
}

#[test]
fn a_scale_behind_another_sign() {
    let workspace = workspace();
    assert_snapshot!(told(&workspace, "merge tiny-llama --adapter adapter.safetensors:0.5 -o out"), @r"
    exit: 2
    error: adapter.safetensors:0.5: the scale follows an equals sign
    hint: adapter.safetensors=0.5
    ");
    assert_snapshot!(told(&workspace, "merge tiny-llama --adapter adapter.safetensors@2 -o out"), @r"
    exit: 2
    error: adapter.safetensors@2: the scale follows an equals sign
    hint: adapter.safetensors=2
    ");
    assert_snapshot!(told(&workspace, "merge tiny-llama --adapter adapter.safetensors --scale 0.5 -o out"), @r"
    exit: 2
    error: unexpected argument '--scale' found

      tip: a scale follows the adapter and an equals sign: --adapter FILE=0.5

    Usage: neuroada-ckpt merge --adapter <FILE[=SCALE]> <--output <PATH>|--in-place> <BASE>

    For more information, try '--help'.
    ");
    assert_snapshot!(told(&workspace, "merge tiny-llama --adapter adapter.safetensors=half -o out"), @r#"
    exit: 2
    error: adapter.safetensors=half: expected FILE or FILE=SCALE, and "half" is not a number
    "#);
    // A file may have such a name.
    fs::copy(workspace.path("adapter.safetensors"), workspace.path("a:0.5")).unwrap();
    workspace.stdout("merge tiny-llama --adapter a:0.5 -o out");
}

#[test]
fn an_output_under_another_name() {
    assert_snapshot!(told(&workspace(), "mask tiny-llama --k 1 --output-dir m"), @r"
    exit: 2
    error: unexpected argument '--output-dir' found

      tip: the output follows --output, or -o

    Usage: neuroada-ckpt mask --output <FILE> <--k <N>|--budget <BUDGET>> <BASE>

    For more information, try '--help'.
    ");
}

#[test]
fn no_output_and_no_place() {
    assert_snapshot!(told(&workspace(), "merge tiny-llama --adapter adapter.safetensors"), @r"
    exit: 2
    error: the following required arguments were not provided:
      <--output <PATH>|--in-place>

    Usage: neuroada-ckpt merge --adapter <FILE[=SCALE]> <--output <PATH>|--in-place> <BASE>

    For more information, try '--help'.
    ");
    assert_snapshot!(told(&workspace(), "mask tiny-llama --k 1"), @r"
    exit: 2
    error: the following required arguments were not provided:
      --output <FILE>

    Usage: neuroada-ckpt mask --output <FILE> <--k <N>|--budget <BUDGET>> <BASE>

    For more information, try '--help'.
    ");
}

#[test]
fn k_larger_than_a_row_is_warned_about_before_the_work() {
    let workspace = workspace();
    let told = told(&workspace, "mask tiny-llama --k 1000 -o m.safetensors -v");
    let warning = told.find("warning: k 1000 is larger than d_in of 14 targets, such as ").unwrap();
    assert!(warning < told.find("MiB of memory at the peak").unwrap(), "{told}");
    assert!(told.find(" cores\n").unwrap() < warning, "{told}");
    assert_snapshot!(self::told(&workspace, "mask tiny-llama --k 0 -o m.safetensors --force"), @r"
    exit: 2
    error: k is 0: nothing would be chosen
    ");
}

#[test]
fn an_adapter_of_zeros_changes_nothing() {
    let workspace = workspace();
    workspace.stdout("mask tiny-llama --k 1 -o m.safetensors");
    assert_snapshot!(told(&workspace, "init tiny-llama --mask m.safetensors -o zeros.safetensors"), @r"
    exit: 0
    note: all deltas are zero: merging this adapter changes nothing; --values takes trained values
    ");
}

#[test]
fn a_second_merge_of_the_same_adapter() {
    let workspace = workspace();
    workspace.stdout("merge tiny-llama --adapter adapter.safetensors -o merged");
    assert_snapshot!(told(&workspace, "merge merged --adapter adapter.safetensors --in-place"), @r"
    exit: 4
    error: merged: adapter 00677c4f4526 is already merged into it
    hint: to merge it with another scale, unmerge it first
    ");
    assert_snapshot!(told(&workspace, "merge tiny-llama --adapter adapter.safetensors -o merged"), @r"
    exit: 4
    error: merged exists already
    hint: --force replaces it
    ");
}

#[test]
fn unmerge_of_a_checkpoint_without_a_merge() {
    assert_snapshot!(told(&workspace(), "unmerge tiny-llama"), @r"
    exit: 4
    error: tiny-llama: nothing to take out: it has no ledger
    ");
}

#[test]
fn a_wrong_command_name() {
    assert_snapshot!(told(&workspace(), "merg tiny-llama"), @r"
    exit: 2
    error: unrecognized subcommand 'merg'

      tip: some similar subcommands exist: 'unmerge', 'merge'

    Usage: neuroada-ckpt [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
    assert_snapshot!(told(&workspace(), "undo tiny-llama"), @r"
    exit: 2
    error: unrecognized subcommand 'undo'

      tip: a similar subcommand exists: 'unmerge'

    Usage: neuroada-ckpt [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
}

#[test]
fn a_wrong_value_of_an_option() {
    assert_snapshot!(told(&workspace(), "mask tiny-llama --k 1 --score magnitud -o m"), @r"
    exit: 2
    error: invalid value 'magnitud' for '--score <SCORE>'
      [possible values: magnitude, smallest, random, gradient, snip, wanda, fisher]

      tip: a similar value exists: 'magnitude'

    For more information, try '--help'.
    ");
    assert_snapshot!(told(&workspace(), "mask tiny-llama --k one -o m"), @r"
    exit: 2
    error: invalid value 'one' for '--k <N>': invalid digit found in string

    For more information, try '--help'.
    ");
    assert_snapshot!(told(&workspace(), "inspect tiny-llama --max-memory lots"), @r"
    exit: 2
    error: invalid value 'lots' for '--max-memory <SIZE>': expected a size such as 256M, 4G or 1073741824

    For more information, try '--help'.
    ");
}

#[test]
fn patterns_that_match_nothing() {
    assert_snapshot!(told(&workspace(), "mask tiny-llama --k 1 --targets query_key_value -o m"), @r#"
    exit: 2
    error: tiny-llama: no tensor that can be masked matches "query_key_value"; the model has:
      down_proj: 2 tensors of BF16 [64, 176]
      embed_tokens: 1 tensor of BF16 [264, 64]
      gate_proj: 2 tensors of BF16 [176, 64]
      input_layernorm: 2 tensors of BF16 [64]
      k_proj: 2 tensors of BF16 [32, 64]
      lm_head: 1 tensor of BF16 [264, 64]
      norm: 1 tensor of BF16 [64]
      o_proj: 2 tensors of BF16 [64, 64]
      post_attention_layernorm: 2 tensors of BF16 [64]
      q_proj: 2 tensors of BF16 [64, 64]
      up_proj: 2 tensors of BF16 [176, 64]
      v_proj: 2 tensors of BF16 [32, 64]
    "#);
}

#[test]
fn usage_errors_are_documents_with_json() {
    let document = workspace().json("merge tiny-llama --lora my-lora -o out");
    assert_eq!(document["exit_code"], 2);
    assert_eq!(document["error"], "unexpected argument '--lora' found");
    assert!(document["hint"].as_str().unwrap().contains("--adapter"), "{document}");
}
