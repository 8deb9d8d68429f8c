use std::fs;

use insta::assert_snapshot;

use super::Workspace;

const MASK: &str = "mask [FIXTURES]/tiny-llama";

#[test]
fn mask_tells_what_it_chose_per_kind() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 -o m.safetensors")), @r"
    exit: 0
    --- stdout
    kind       tensors   rows  chosen      of    share
    down_proj        2    128     128  22,528  0.568 %
    gate_proj        2    352     352  22,528   1.56 %
    k_proj           2     64      64   4,096   1.56 %
    o_proj           2    128     128   8,192   1.56 %
    q_proj           2    128     128   8,192   1.56 %
    up_proj          2    352     352  22,528   1.56 %
    v_proj           2     64      64   4,096   1.56 %
    total           14  1,216   1,216  92,160   1.32 %

    trainable  0.963 % of the model's 126,272 parameters
    --- stderr
    ");
    assert_eq!(workspace.files(), ["m.safetensors"]);
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 -o m.safetensors")), @r"
    exit: 4
    --- stdout
    --- stderr
    error: m.safetensors exists already
    hint: --force replaces it
    ");
    let first = fs::read(workspace.path("m.safetensors")).unwrap();
    workspace.stdout(&format!("{MASK} --k 1 -o m.safetensors --force --threads 3 --max-memory 16M --io read"));
    assert_eq!(fs::read(workspace.path("m.safetensors")).unwrap(), first);
}

#[test]
fn budgets_scopes_and_targets() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run(&format!("{MASK} --budget 0.1% --scope global --targets all-linear --dry-run")), @r"
    exit: 0
    --- stdout
    kind       tensors   rows  chosen      of     share
    down_proj        2    128      33  22,528   0.146 %
    gate_proj        2    352      34  22,528   0.151 %
    k_proj           2     64       4   4,096  0.0977 %
    o_proj           2    128      10   8,192   0.122 %
    q_proj           2    128       8   8,192  0.0977 %
    up_proj          2    352      30  22,528   0.133 %
    v_proj           2     64       7   4,096   0.171 %
    total           14  1,216     126  92,160   0.137 %

    would be trainable  0.0998 % of the model's 126,272 parameters
    --- stderr
    ");
    assert_snapshot!(workspace.run(&format!("{MASK} --budget 0.1% --scope row --dry-run")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: a budget of 126 entries is less than one per row for 1216 rows; use a wider scope
    ");
    assert_snapshot!(workspace.run(&format!("{MASK} --k 70 --targets down_proj,model.layers.0.* --dry-run")), @r#"
    exit: 0
    --- stdout
    kind       tensors  rows  chosen      of   share
    down_proj        2   128   8,960  22,528  39.8 %
    gate_proj        1   176  11,264  11,264   100 %
    k_proj           1    32   2,048   2,048   100 %
    o_proj           1    64   4,096   4,096   100 %
    q_proj           1    64   4,096   4,096   100 %
    up_proj          1   176  11,264  11,264   100 %
    v_proj           1    32   2,048   2,048   100 %
    total            8   672  43,776  57,344  76.3 %

    would be trainable  34.7 % of the model's 126,272 parameters
    --- stderr
    warning: k 70 is larger than d_in of 6 targets, such as model.layers.0.mlp.gate_proj.weight with 64: all weights of their rows are chosen
    note: skipped "model.layers.0.input_layernorm.weight": shape [64] is neither a matrix nor a stack of matrices
    note: skipped "model.layers.0.post_attention_layernorm.weight": shape [64] is neither a matrix nor a stack of matrices
    "#);
    assert_eq!(workspace.files(), [""; 0]);
}

#[test]
fn refusals_of_mask() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run(&format!("{MASK} -o m")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the following required arguments were not provided:
      <--k <N>|--budget <BUDGET>>

    Usage: neuroada-ckpt mask --output <FILE> <--k <N>|--budget <BUDGET>> <BASE>

    For more information, try '--help'.
    ");
    assert_snapshot!(workspace.run(&format!("{MASK} --k 0 -o m")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: k is 0: nothing would be chosen
    ");
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 --budget 1% -o m")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the argument '--k <N>' cannot be used with '--budget <BUDGET>'

    Usage: neuroada-ckpt mask --output <FILE> <--k <N>|--budget <BUDGET>> <BASE>

    For more information, try '--help'.
    ");
    assert_snapshot!(workspace.run(&format!("{MASK} --budget 0 -o m")), @r#"
    exit: 2
    --- stdout
    --- stderr
    error: invalid value '0' for '--budget <BUDGET>': budget "0": expected a percentage, a fraction below 1, or a count

    For more information, try '--help'.
    "#);
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 --targets q_proj,query -o m")), @r#"
    exit: 2
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama: no tensor that can be masked matches "query"; the model has:
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
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 --targets model.norm.weight -o m")), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama/model-00001-of-00003.safetensors: tensor "model.norm.weight": shape [64] is neither a matrix nor a stack of matrices
    "#);
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 --score snip -o m")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: score snip needs gradients
    ");
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 --score snip --gradients [FIXTURES]/tiny-llama-values.safetensors -o m")), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama-values.safetensors: it does not match the base:
      "model.layers.0.mlp.down_proj.weight": it has no such tensor
      "model.layers.0.mlp.gate_proj.weight": it has no such tensor
      "model.layers.0.mlp.up_proj.weight": it has no such tensor
      "model.layers.0.self_attn.k_proj.weight": it has no such tensor
      "model.layers.0.self_attn.o_proj.weight": it has no such tensor
      … and 9 more; -v lists them
    "#);
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 --neuron-fraction 0 -o m")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the neuron fraction must be above 0 and at most 1
    ");
    assert_snapshot!(workspace.run(&format!("{MASK} --k 1 -o nowhere/m")), @r"
    exit: 5
    --- stdout
    --- stderr
    error: the folder nowhere does not exist
    hint: mkdir -p nowhere
    ");
    assert_eq!(workspace.files(), [""; 0]);
}

#[test]
fn json_has_the_same_numbers() {
    let workspace = Workspace::new();
    let report = workspace.json(&format!("{MASK} --k 2 -o m.safetensors"));
    assert_eq!(report["total"]["n_chosen"], 2432);
    assert_eq!(report["n_model_parameters"], 126_272);
    assert_eq!(report["kinds"].as_array().unwrap().len(), 7);
}
