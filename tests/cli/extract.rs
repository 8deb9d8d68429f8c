use std::fs;

use insta::assert_snapshot;

use super::{Workspace, adapters::content};

/// The tiny model with the shipped adapter in it.
fn workspace() -> Workspace {
    let workspace = Workspace::new();
    workspace
        .stdout("merge [FIXTURES]/tiny-llama --adapter [FIXTURES]/tiny-llama-adapter.safetensors -o tuned --no-ledger");
    workspace
}

#[test]
fn an_exact_delta_merges_to_the_tuned_bytes() {
    let workspace = workspace();
    assert_snapshot!(workspace.run("extract [FIXTURES]/tiny-llama tuned -o delta.safetensors"), @r"
    exit: 0
    --- stdout
    kind       tensors  changed      of   share  deltas    norm  lost
    down_proj        2      235  22,528  1.04 %     235  0.1740     0
    gate_proj        2      651  22,528  2.89 %     651  0.2541     0
    k_proj           2      120   4,096  2.93 %     120  0.1034     0
    o_proj           2      239   8,192  2.92 %     239  0.1590     0
    q_proj           2      238   8,192  2.91 %     238  0.1532     0
    up_proj          2      654  22,528  2.90 %     654  0.2487     0
    v_proj           2      118   4,096  2.88 %     118  0.1085     0
    total           14    2,255  92,160  2.45 %   2,255  0.4774     0
    (norm: L2 of the change; lost: L2 of the part without a delta)

    adapter    2f5c942afbab
    made from  tiny-llama
    deltas     2,255: 14 tensors as BF16
    unchanged  7 tensors
    size       20.9 kB
    verdict    exact: merging it gives tuned byte for byte
    --- stderr
    ");
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter delta.safetensors -o again --no-ledger");
    assert!(content(&workspace.path("again")) == content(&workspace.path("tuned")));
    assert_snapshot!(workspace.run("inspect delta.safetensors"), @r"
    exit: 0
    --- stdout
    adapter      delta, one file
    base         tiny-llama (llama)
    chosen by    extracted
    targets      14, 1,216 rows
    connections  2,255, 2.45 % of the targets
    scale        1
    size         20.9 kB

    kind       base type  values  targets  rows  per row  connections   share
    down_proj  BF16       BF16          2   128   varies          235  1.04 %
    gate_proj  BF16       BF16          2   352   varies          651  2.89 %
    k_proj     BF16       BF16          2    64   varies          120  2.93 %
    o_proj     BF16       BF16          2   128   varies          239  2.92 %
    q_proj     BF16       BF16          2   128   varies          238  2.91 %
    up_proj    BF16       BF16          2   352   varies          654  2.90 %
    v_proj     BF16       BF16          2    64   varies          118  2.88 %
    --- stderr
    ");
}

#[test]
fn the_largest_change_of_each_row() {
    let workspace = workspace();
    assert_snapshot!(workspace.run("extract [FIXTURES]/tiny-llama tuned -k 1 --targets q_proj,up_proj -o delta.safetensors"), @r"
    exit: 0
    --- stdout
    kind     tensors  changed      of   share  deltas    norm     lost
    q_proj         2      238   8,192  2.91 %     128  0.1532  0.06602
    up_proj        2      654  22,528  2.90 %     351  0.2487   0.1075
    total          4      892  30,720  2.90 %     479  0.2921   0.1262
    (norm: L2 of the change; lost: L2 of the part without a delta)

    left out: 2 down_proj, 2 gate_proj, 2 k_proj, 2 o_proj, 2 v_proj: not among the targets

    adapter    baa153422cc1
    made from  tiny-llama
    deltas     479: 4 tensors as BF16
    unchanged  7 tensors
    norm       0.1262 of 0.2921 lost
    size       4.50 kB
    verdict    partial: merging it does not give tuned
    --- stderr
    ");
    assert_snapshot!(workspace.run("extract [FIXTURES]/tiny-llama tuned -k 1 --targets q_proj --tensors --dry-run"), @r"
    exit: 0
    --- stdout
    tensor                                  tensors  changed     of   share  deltas    norm     lost
    model.layers.0.self_attn.q_proj.weight        1      119  4,096  2.91 %      64  0.1105  0.04905
    model.layers.1.self_attn.q_proj.weight        1      119  4,096  2.91 %      64  0.1062  0.04420
    total                                         2      238  8,192  2.91 %     128  0.1532  0.06602
    (norm: L2 of the change; lost: L2 of the part without a delta)

    left out: model.layers.0.mlp.down_proj.weight: not among the targets
    left out: model.layers.0.mlp.gate_proj.weight: not among the targets
    left out: model.layers.0.mlp.up_proj.weight: not among the targets
    left out: model.layers.0.self_attn.k_proj.weight: not among the targets
    left out: model.layers.0.self_attn.o_proj.weight: not among the targets
    left out: model.layers.0.self_attn.v_proj.weight: not among the targets
    left out: model.layers.1.mlp.down_proj.weight: not among the targets
    left out: model.layers.1.mlp.gate_proj.weight: not among the targets
    left out: model.layers.1.mlp.up_proj.weight: not among the targets
    left out: model.layers.1.self_attn.k_proj.weight: not among the targets
    left out: model.layers.1.self_attn.o_proj.weight: not among the targets
    left out: model.layers.1.self_attn.v_proj.weight: not among the targets

    made from  tiny-llama
    deltas     128: 2 tensors as BF16
    unchanged  7 tensors
    norm       0.06602 of 0.1532 lost
    verdict    partial: merging it does not give tuned
    --- stderr
    ");
}

#[test]
fn refusals_of_extract() {
    let workspace = workspace();
    let files = workspace.files();
    let extract = "extract [FIXTURES]/tiny-llama tuned -o delta.safetensors";
    assert_snapshot!(workspace.run(&format!("{extract} --max-density 2.9%")), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: tuned: what changed from tiny-llama does not fit the adapter:
      "model.layers.0.mlp.gate_proj.weight": 2.912 % of 11264 elements would get a delta, at most 2.900 % may
      "model.layers.0.self_attn.k_proj.weight": 2.930 % of 2048 elements would get a delta, at most 2.900 % may
      "model.layers.0.self_attn.o_proj.weight": 2.930 % of 4096 elements would get a delta, at most 2.900 % may
      "model.layers.0.self_attn.q_proj.weight": 2.905 % of 4096 elements would get a delta, at most 2.900 % may
      "model.layers.0.self_attn.v_proj.weight": 2.930 % of 2048 elements would get a delta, at most 2.900 % may
      … and 4 more; -v lists them
    hint: --max-density 3% allows this many deltas, -k keeps the largest changes of each row, --targets chooses the tensors to include
    "#);
    // The hint helps.
    workspace.stdout(&format!("{extract} --max-density 3% --dry-run"));
    let said = workspace.run(&format!("{extract} -k 2 --targets k_proj --max-density 2%"));
    let (_, hint) = said.split_once("hint: --max-density ").expect("the hint that helps");
    let (density, hint) = hint.split_once(' ').expect("a number");
    assert!(hint.starts_with("allows this many deltas, a smaller -k keeps fewer deltas, --targets chooses"), "{said}");
    workspace.stdout(&format!("{extract} -k 2 --targets k_proj --max-density {density} --dry-run"));
    assert_snapshot!(workspace.run(&format!("{extract} --max-density 0")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the highest density is 0, it must be above 0 and at most 1
    ");
    assert_snapshot!(workspace.run(&format!("{extract} -k 0")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: k is 0: nothing would be extracted
    ");
    assert_snapshot!(workspace.run(&format!("{extract} --targets nothing")), @r#"
    exit: 2
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama: no tensor that can be masked matches "nothing"; the model has:
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
    assert_snapshot!(workspace.run(&format!("{extract} --dtype f64")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: invalid value 'f64' for '--dtype <DTYPE>'
      [possible values: auto, f32, bf16, f16]

    For more information, try '--help'.
    ");
    assert_snapshot!(workspace.run("extract [FIXTURES]/tiny-llama [FIXTURES]/tiny-llama -o delta.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama: every tensor is the same in tiny-llama: there is no delta
    ");
    assert_snapshot!(workspace.run("extract [FIXTURES]/tiny-llama tuned --targets norm -o delta.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: tuned: all that takes part is the same in tiny-llama: there is no delta
    ");
    assert_snapshot!(workspace.run("extract [FIXTURES]/tiny-llama tuned -k 1 --targets norm -o delta.safetensors"), @r#"
    exit: 2
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama: no tensor that can be masked matches "norm"; the model has:
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
    assert_snapshot!(workspace.run("extract [FIXTURES]/accepted/odd-header.safetensors [FIXTURES]/accepted/adapter-base.safetensors -o d"), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: [FIXTURES]/accepted/adapter-base.safetensors: no adapter can make it from odd-header:
      "first.weight" was removed
      "second.weight" was removed
      "third.bytes" was removed
      "proj.weight" was added
    "#);
    assert_snapshot!(workspace.run("extract [FIXTURES]/tiny-llama nowhere -o delta.safetensors"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot open `nowhere`: No such file or directory (os error 2)
    ");
    assert_eq!(workspace.files(), files);

    // An element of a norm of the tuned model is no number.
    let shard = workspace.path("tuned/model-00001-of-00003.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    fs::write(&shard, bytes).unwrap();
    assert_snapshot!(workspace.run(extract), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: tuned: what changed from tiny-llama does not fit the adapter:
      "model.norm.weight": 1 changed elements are NaN or infinite, the first in row 63
    hint: --targets chooses the tensors to include
    "#);

    workspace.write("delta.safetensors", "kept");
    fs::remove_dir_all(workspace.path("tuned")).unwrap();
    workspace.copy_fixture("tiny-llama");
    assert_snapshot!(workspace.run("extract [FIXTURES]/tiny-llama tiny-llama -o delta.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: delta.safetensors exists already
    hint: --force replaces it
    ");
    assert_eq!(fs::read(workspace.path("delta.safetensors")).unwrap(), b"kept");
}
