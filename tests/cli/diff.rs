use std::fs;

use insta::assert_snapshot;

use super::Workspace;

/// A mask of one entry per row, one of two, and adapters of both.
fn workspace() -> Workspace {
    let workspace = Workspace::new();
    workspace.stdout("mask [FIXTURES]/tiny-llama --k 1 -o m1.safetensors");
    workspace.stdout("mask [FIXTURES]/tiny-llama --k 2 -o m2.safetensors");
    workspace.stdout("init [FIXTURES]/tiny-llama --mask m1.safetensors -o a1.safetensors");
    workspace
}

#[test]
fn two_adapters() {
    let workspace = workspace();
    assert_snapshot!(workspace.run("diff a1.safetensors [FIXTURES]/tiny-llama-adapter.safetensors"), @r"
    exit: 1
    --- stdout
    tensor  only A  only B  shared  Jaccard  sign conflicts  cosine
    total        0   1,216   1,216   0.5000               0       -
    (Jaccard: shared positions over all positions of A and B)

    norm of A           0
    norm of B           0.4774
    largest difference  0.03296
    verdict             different
    --- stderr
    ");
    assert_snapshot!(workspace.run("diff a1.safetensors a1.safetensors"), @r"
    exit: 0
    --- stdout
    tensor  only A  only B  shared  Jaccard  sign conflicts  cosine
    total        0       0   1,216    1.000               0       -
    (Jaccard: shared positions over all positions of A and B)

    norm of A           0
    norm of B           0
    largest difference  0
    verdict             equal
    --- stderr
    ");
    let report = workspace.json("diff a1.safetensors [FIXTURES]/tiny-llama-adapter.safetensors");
    assert_eq!((report["equal"].as_bool(), report["total"]["n_shared"].as_u64()), (Some(false), Some(1216)));
}

#[test]
fn two_masks() {
    let workspace = workspace();
    assert_snapshot!(workspace.run("diff m1.safetensors m2.safetensors"), @r"
    exit: 1
    --- stdout
    tensor  only A  only B  shared  Jaccard  sign conflicts  cosine
    total        0   1,216   1,216   0.5000
    (Jaccard: shared positions over all positions of A and B)

    verdict  different
    --- stderr
    ");
}

#[test]
fn two_checkpoints() {
    let workspace = workspace();
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter [FIXTURES]/tiny-llama-adapter.safetensors -o out");
    assert_snapshot!(workspace.run("diff [FIXTURES]/tiny-llama out"), @r"
    exit: 1
    --- stdout
    kind       changed      of   share  largest    norm
    down_proj      235  22,528  1.04 %  0.02991  0.1740
    gate_proj      651  22,528  2.89 %  0.03296  0.2541
    k_proj         120   4,096  2.93 %  0.02441  0.1034
    o_proj         239   8,192  2.92 %  0.02979  0.1590
    q_proj         238   8,192  2.91 %  0.02832  0.1532
    up_proj        654  22,528  2.90 %  0.02966  0.2487
    v_proj         118   4,096  2.88 %  0.02612  0.1085

    tensors   14 changed, 7 the same
    elements  2,255 of 126,272 changed
    compared  253 kB
    verdict   different
    --- stderr
    ");
    assert_snapshot!(workspace.run("diff [FIXTURES]/tiny-llama [FIXTURES]/tiny-llama"), @r"
    exit: 0
    --- stdout
    tensors   0 changed, 21 the same
    elements  0 of 126,272 changed
    compared  253 kB
    verdict   equal
    --- stderr
    ");
    assert_snapshot!(workspace.run("diff [FIXTURES]/tiny-llama/model-00001-of-00003.safetensors [FIXTURES]/tiny-llama"), @r"
    exit: 1
    --- stdout
    + lm_head.weight
    + model.layers.0.input_layernorm.weight
    + model.layers.0.mlp.down_proj.weight
    + model.layers.0.mlp.gate_proj.weight
    + model.layers.0.mlp.up_proj.weight
    + model.layers.0.post_attention_layernorm.weight
    + model.layers.0.self_attn.k_proj.weight
    + model.layers.0.self_attn.o_proj.weight
    + model.layers.0.self_attn.q_proj.weight
    + model.layers.0.self_attn.v_proj.weight
    + model.layers.1.input_layernorm.weight
    + model.layers.1.mlp.down_proj.weight
    + model.layers.1.mlp.gate_proj.weight
    + model.layers.1.mlp.up_proj.weight
    + model.layers.1.post_attention_layernorm.weight
    + model.layers.1.self_attn.k_proj.weight
    + model.layers.1.self_attn.o_proj.weight
    + model.layers.1.self_attn.q_proj.weight
    + model.layers.1.self_attn.v_proj.weight

    tensors   0 changed, 2 the same
    elements  0 of 16,960 changed
    compared  33.9 kB
    verdict   different
    --- stderr
    ");
}

#[test]
fn refusals_of_diff() {
    let workspace = workspace();
    assert_snapshot!(workspace.run("diff a1.safetensors m1.safetensors"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: a1.safetensors is an adapter and m1.safetensors is a mask: both must be of one kind
    ");
    assert_snapshot!(workspace.run("diff a1.safetensors nowhere"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot open `nowhere`: No such file or directory (os error 2)
    ");
    let mut bytes = fs::read(workspace.path("a1.safetensors")).unwrap();
    bytes.pop();
    workspace.write("cut.safetensors", bytes);
    assert_snapshot!(workspace.run("diff a1.safetensors cut.safetensors"), @r"
    exit: 3
    --- stdout
    --- stderr
    error: cut.safetensors: needs 12816 bytes, has 12815: the download is incomplete
    ");
}
