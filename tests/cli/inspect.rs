use insta::assert_snapshot;

use super::Workspace;

#[test]
fn inspect_describes_a_sharded_checkpoint() {
    assert_snapshot!(Workspace::new().run("inspect [FIXTURES]/tiny-llama"), @r"
    exit: 0
    --- stdout
    checkpoint  tiny-llama (llama), 3 shards
    tensors     21
    parameters  126,272
    size        255 kB
    metadata    format=pt

    kind                      type  shape      tensors  parameters     size     share
    down_proj                 BF16  [64, 176]        2      22,528  45.1 kB    17.8 %
    gate_proj                 BF16  [176, 64]        2      22,528  45.1 kB    17.8 %
    up_proj                   BF16  [176, 64]        2      22,528  45.1 kB    17.8 %
    embed_tokens              BF16  [264, 64]        1      16,896  33.8 kB    13.4 %
    lm_head                   BF16  [264, 64]        1      16,896  33.8 kB    13.4 %
    o_proj                    BF16  [64, 64]         2       8,192  16.4 kB    6.49 %
    q_proj                    BF16  [64, 64]         2       8,192  16.4 kB    6.49 %
    k_proj                    BF16  [32, 64]         2       4,096  8.19 kB    3.24 %
    v_proj                    BF16  [32, 64]         2       4,096  8.19 kB    3.24 %
    input_layernorm           BF16  [64]             2         128    256 B   0.101 %
    post_attention_layernorm  BF16  [64]             2         128    256 B   0.101 %
    norm                      BF16  [64]             1          64    128 B  0.0507 %

    shard                             tensors     size
    model-00001-of-00003.safetensors        2  34.1 kB
    model-00002-of-00003.safetensors       13   118 kB
    model-00003-of-00003.safetensors        6   102 kB
    --- stderr
    ");
}

#[test]
fn inspect_lists_the_tensors_a_filter_lets_through() {
    assert_snapshot!(Workspace::new().run("inspect [FIXTURES]/tiny-llama --tensors --filter *.1.mlp.*"), @r"
    exit: 0
    --- stdout
    checkpoint  tiny-llama (llama), 3 shards
    tensors     3
    parameters  33,792
    size        255 kB
    metadata    format=pt

    kind       type  shape      tensors  parameters     size   share
    down_proj  BF16  [64, 176]        1      11,264  22.5 kB  33.3 %
    gate_proj  BF16  [176, 64]        1      11,264  22.5 kB  33.3 %
    up_proj    BF16  [176, 64]        1      11,264  22.5 kB  33.3 %

    shard                             tensors     size
    model-00001-of-00003.safetensors        2  34.1 kB
    model-00002-of-00003.safetensors       13   118 kB
    model-00003-of-00003.safetensors        6   102 kB

    tensor                               type  shape      parameters     size  shard
    model.layers.1.mlp.down_proj.weight  BF16  [64, 176]      11,264  22.5 kB  model-00003-of-00003.safetensors
    model.layers.1.mlp.gate_proj.weight  BF16  [176, 64]      11,264  22.5 kB  model-00003-of-00003.safetensors
    model.layers.1.mlp.up_proj.weight    BF16  [176, 64]      11,264  22.5 kB  model-00003-of-00003.safetensors
    --- stderr
    ");
}

#[test]
fn inspect_prints_names_escaped() {
    assert_snapshot!(Workspace::new().run("inspect [FIXTURES]/accepted/control-bytes-in-names.safetensors"), @r"
    exit: 0
    --- stdout
    checkpoint  control-bytes-in-names, one file
    tensors     4
    parameters  8
    size        336 B

    kind                  type  shape   tensors  parameters  size   share
    esc\u{1b}[31mred      BF16  [1, 2]        1           2   4 B  25.0 %
    line\nbreak           BF16  [1, 2]        1           2   4 B  25.0 %
    nul\u{0}byte          BF16  [1, 2]        1           2   4 B  25.0 %
    right\u{202e}to-left  BF16  [1, 2]        1           2   4 B  25.0 %
    --- stderr
    ");
}

#[test]
fn inspect_says_what_a_peft_adapter_is() {
    let workspace = Workspace::new();
    std::fs::create_dir(workspace.path("lora")).unwrap();
    workspace.write("lora/adapter_config.json", r#"{"peft_type":"LORA","r":8,"lora_alpha":16,"bias":"none"}"#);
    workspace.write("lora/adapter_model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ");
    assert_snapshot!(workspace.run("inspect lora"), @r"
    exit: 0
    --- stdout
    PEFT adapter  lora, one file
    tensors       0
    parameters    0
    size          16 B
    config        peft_type=LORA
    config        r=8
    config        lora_alpha=16
    --- stderr
    ");
}

#[test]
fn inspect_says_what_an_adapter_was_made_from() {
    assert_snapshot!(Workspace::new().run("inspect [FIXTURES]/accepted/adapter.safetensors --tensors"), @r"
    exit: 0
    --- stdout
    adapter      adapter, one file
    base         adapter-base
    chosen by    magnitude, k 2, scope row, targets proj.weight
    targets      1, 8 rows
    connections  16, 12.5 % of the targets
    scale        1
    size         616 B

    kind  base type  values  targets  rows  per row  connections   share
    proj  BF16       F32           1     8        2           16  12.5 %

    target       base type  shape    per row  connections  anchor        whole
    proj.weight  BF16       [8, 16]        2           16  000000000000  -
    --- stderr
    ");
}

#[test]
fn inspect_names_adapters_whose_rows_differ() {
    assert_snapshot!(Workspace::new().run("inspect [FIXTURES]/accepted/adapter-csr.safetensors"), @r"
    exit: 0
    --- stdout
    adapter      adapter-csr, one file
    base         adapter-base
    chosen by    magnitude, budget 11.72 %, scope tensor, targets proj.weight
    targets      1, 8 rows
    connections  15, 11.7 % of the targets
    scale        1
    size         734 B

    kind  base type  values  targets  rows  per row  connections   share
    proj  BF16       F32           1     8   varies           15  11.7 %
    --- stderr
    ");
}

#[test]
fn inspect_as_json_is_one_document() {
    assert_snapshot!(Workspace::new().run("inspect [FIXTURES]/accepted/index-with-extra-metadata --tensors --json"), @r#"
    exit: 0
    --- stdout
    {
      "kind": "checkpoint",
      "name": "index-with-extra-metadata",
      "layout": "sharded",
      "model_type": null,
      "n_tensors": 1,
      "n_parameters": 4,
      "n_bytes": 112,
      "dtypes": [
        {
          "dtype": "BF16",
          "n_tensors": 1,
          "n_parameters": 4,
          "n_bytes": 8
        }
      ],
      "kinds": [
        {
          "kind": "a",
          "dtype": "BF16",
          "shape": [
            2,
            2
          ],
          "n_tensors": 1,
          "n_parameters": 4,
          "n_bytes": 8
        }
      ],
      "shards": [
        {
          "name": "model-00001-of-00001.safetensors",
          "n_tensors": 1,
          "n_bytes": 112,
          "header_bytes": 96,
          "metadata": {
            "format": "pt"
          }
        }
      ],
      "peft": null,
      "sparse": null,
      "merges": null,
      "tensors": [
        {
          "name": "a.weight",
          "dtype": "BF16",
          "shape": [
            2,
            2
          ],
          "n_parameters": 4,
          "n_bytes": 8,
          "shard": "model-00001-of-00001.safetensors",
          "offset": 104
        }
      ]
    }
    --- stderr
    "#);
}

#[test]
fn inspect_refuses_a_broken_file_by_name() {
    assert_snapshot!(Workspace::new().run("inspect [FIXTURES]/rejected/duplicate-name-plain.safetensors"), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/rejected/duplicate-name-plain.safetensors: tensor "twin.weight": named twice, at data offsets 0 and 0
    "#);
}

#[test]
fn inspect_refuses_a_broken_pattern() {
    assert_snapshot!(Workspace::new().run("inspect [FIXTURES]/tiny-llama --filter [a"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: --filter: error parsing glob '[a': unclosed character class; missing ']'
    ");
}

#[test]
fn inspect_reads_every_accepted_file_and_refuses_every_rejected_one() {
    let workspace = Workspace::new();
    for (folder, code) in [("accepted", 0), ("rejected", 3), ("rejected/index", 3)] {
        for entry in std::fs::read_dir(super::harness::fixtures().join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if matches!(name.as_str(), "EXPECTED.json" | "index" | "adapter") {
                continue;
            }
            let output = workspace.output(&format!("inspect [FIXTURES]/{folder}/{name}"));
            assert_eq!(output.status.code(), Some(code), "{name}\n{}", workspace.told(&output));
            for bytes in [output.stdout, output.stderr] {
                assert!(!bytes.iter().any(|&byte| byte < b' ' && byte != b'\n'), "{name} prints a raw control byte");
            }
        }
    }
}

/// A header of many tensors over a file that is all hole: what a checkpoint of hundreds of gigabytes looks like.
#[test]
fn inspect_of_200_gigabytes_reads_headers_only() {
    let workspace = Workspace::new();
    let mut header = String::from("{");
    let (mut at, bytes) = (0u64, 4096 * 4096 * 2);
    for i in 0..6000 {
        let comma = if i > 0 { "," } else { "" };
        let end = at + bytes;
        header += &format!(
            r#"{comma}"model.layers.{i}.q_proj.weight":{{"dtype":"BF16","shape":[4096,4096],"data_offsets":[{at},{end}]}}"#
        );
        at = end;
    }
    header += "}";
    let path = workspace.write("big.safetensors", [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat());
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    if let Err(e) = file.set_len(8 + header.len() as u64 + at) {
        eprintln!("skipped: no file of 200 GB can be made here: {e}");
        return;
    }

    let output = workspace.output("inspect big.safetensors --json -v");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // Headers alone: neither the data, nor memory that grows with it.
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let peak = said.lines().find_map(|line| line.strip_suffix(" MiB of memory at the peak")).unwrap();
    assert!(peak.parse::<u64>().unwrap() < 50, "{said}");
    assert_eq!(report["n_parameters"], 6000u64 * 4096 * 4096);
    assert_eq!(report["kinds"][0]["n_tensors"], 6000);
}
