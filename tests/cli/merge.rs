use std::fs;

use insta::assert_snapshot;
use neuroada_ckpt::Checkpoint;

use super::{
    Workspace,
    adapters::{Bytes, PROJECTIONS, content, weights, write_adapter, write_adapter_for},
    harness::fixtures,
};

/// A folder with adapter `a` on all projections and `b` on the query projections, overlapping in one column.
fn workspace() -> Workspace {
    let workspace = Workspace::new();
    write_adapter(&workspace, "a.safetensors", PROJECTIONS, 0, 0.01);
    write_adapter(&workspace, "b.safetensors", "q_proj.weight", 1, -0.5);
    workspace
}

fn base() -> Vec<(String, Bytes)> {
    content(&fixtures().join("tiny-llama"))
}

const MERGE_A: &str = "merge [FIXTURES]/tiny-llama --adapter a.safetensors";

#[test]
fn merge_reports_what_it_touched_and_what_rounding_swallowed() {
    let workspace = workspace();
    assert_snapshot!(workspace.run(&format!("{MERGE_A} -o out")), @r"
    exit: 0
    --- stdout
    kind       tensors  touched  changed  absorbed  share
    down_proj        2      256      256         0    0 %
    gate_proj        2      704      704         0    0 %
    k_proj           2      128      128         0    0 %
    o_proj           2      256      256         0    0 %
    q_proj           2      256      256         0    0 %
    up_proj          2      704      704         0    0 %
    v_proj           2      128      128         0    0 %
    total           14    2,432    2,432         0    0 %
    (absorbed: rounding swallowed the delta, and the weight kept its bits)

    adapter         scale  tensors  deltas  made from
    + 00677c4f4526  1.000       14   2,432  tiny-llama

    matched  14 tensors, none unmatched
    shards   2 of 3 patched
    wrote    263 kB
    ledger   13.8 kB
    --- stderr
    ");
    assert_snapshot!(workspace.run("inspect out --filter *.0.*q_proj*"), @r"
    exit: 0
    --- stdout
    checkpoint  out (llama), 3 shards
    tensors     1
    parameters  4,096
    size        263 kB
    metadata    format=pt
    merged      00677c4f4526734daad3d26b8a3ad6e946e8ceeef58f710cd6891f6dbede8da0 scale 1
    ledger      2,432 originals of 14 tensors, 13.8 kB

    kind    type  shape     tensors  parameters     size  share
    q_proj  BF16  [64, 64]        1       4,096  8.19 kB  100 %

    shard                             tensors     size
    model-00001-of-00003.safetensors        2  34.1 kB
    model-00002-of-00003.safetensors       13   122 kB
    model-00003-of-00003.safetensors        6   106 kB
    --- stderr
    ");
}

#[test]
fn merge_as_json_is_one_document() {
    assert_snapshot!(workspace().run("merge [FIXTURES]/tiny-llama --adapter b.safetensors -o out --json"), @r#"
    exit: 0
    --- stdout
    {
      "base": "tiny-llama",
      "dry_run": false,
      "added": [
        "79072f499595f0425d013a3a7e4645b3f2ff626e3796c74de5990b2d7255d868"
      ],
      "removed": [],
      "active": [
        {
          "id": "79072f499595f0425d013a3a7e4645b3f2ff626e3796c74de5990b2d7255d868",
          "scale": 1.0,
          "base": "tiny-llama",
          "n_tensors": 2,
          "n_deltas": 256
        }
      ],
      "kinds": [
        {
          "kind": "q_proj",
          "n_tensors": 2,
          "n_touched": 256,
          "n_nonzero": 256,
          "n_absorbed": 0,
          "absorbed_share": 0.0,
          "n_changed": 256,
          "n_overflowed": 0
        }
      ],
      "total": {
        "kind": "total",
        "n_tensors": 2,
        "n_touched": 256,
        "n_nonzero": 256,
        "n_absorbed": 0,
        "absorbed_share": 0.0,
        "n_changed": 256,
        "n_overflowed": 0
      },
      "n_matched": 2,
      "n_shards": 3,
      "n_shards_patched": 1,
      "bytes_checked": 16384,
      "bytes_written": 258856,
      "ledger_bytes": 2120
    }
    --- stderr
    "#);
}

#[test]
fn merge_takes_several_adapters_with_scales() {
    assert_snapshot!(workspace().run(&format!("{MERGE_A} --adapter b.safetensors=0.5 -o out")), @r"
    exit: 0
    --- stdout
    kind       tensors  touched  changed  absorbed  share
    down_proj        2      256      256         0    0 %
    gate_proj        2      704      704         0    0 %
    k_proj           2      128      128         0    0 %
    o_proj           2      256      256         0    0 %
    q_proj           2      384      384         0    0 %
    up_proj          2      704      704         0    0 %
    v_proj           2      128      128         0    0 %
    total           14    2,560    2,560         0    0 %
    (absorbed: rounding swallowed the delta, and the weight kept its bits)

    adapter          scale  tensors  deltas  made from
    + 00677c4f4526   1.000       14   2,432  tiny-llama
    + 79072f499595  0.5000        2     256  tiny-llama

    matched  14 tensors, none unmatched
    shards   2 of 3 patched
    wrote    263 kB
    ledger   14.4 kB
    --- stderr
    ");
}

#[test]
fn merge_without_a_ledger_keeps_none() {
    let workspace = workspace();
    workspace.stdout(&format!("{MERGE_A} -o out --no-ledger"));
    assert!(!workspace.path("out/.neuroada").exists());
    assert_snapshot!(workspace.run("unmerge out --in-place"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: out: nothing to take out: it has no ledger
    ");
    assert_snapshot!(workspace.run("verify out"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: out: has no ledger: give its base and the adapters that were merged
    ");
    assert_snapshot!(workspace.run("verify out --base [FIXTURES]/tiny-llama --adapter a.safetensors"), @r"
    exit: 0
    --- stdout
    adapter       scale  deltas  tensors  anchors match
    00677c4f4526  1.000   2,432       14             14
    (anchors match: tensors whose original values are those that the adapter was made from)

    touched   2,432 weights, 0 wrong
    all else  253 kB compared with the base
    verdict   verified
    --- stderr
    ");
}

#[test]
fn a_dry_run_writes_nothing() {
    let workspace = workspace();
    let before = workspace.files();
    assert_snapshot!(workspace.run(&format!("{MERGE_A} -o out --dry-run")), @r"
    exit: 0
    --- stdout
    kind       tensors  touched  changed  absorbed  share
    down_proj        2      256      256         0    0 %
    gate_proj        2      704      704         0    0 %
    k_proj           2      128      128         0    0 %
    o_proj           2      256      256         0    0 %
    q_proj           2      256      256         0    0 %
    up_proj          2      704      704         0    0 %
    v_proj           2      128      128         0    0 %
    total           14    2,432    2,432         0    0 %
    (absorbed: rounding swallowed the delta, and the weight kept its bits)

    adapter         scale  tensors  deltas  made from
    + 00677c4f4526  1.000       14   2,432  tiny-llama

    matched      14 tensors, none unmatched
    shards       2 of 3 patched
    would write  263 kB
    ledger       5.17 kB
    --- stderr
    ");
    assert_eq!(workspace.files(), before);
}

#[test]
fn existing_output_is_kept_without_force() {
    let workspace = workspace();
    workspace.stdout(&format!("{MERGE_A} -o out"));
    let first = content(&workspace.path("out"));
    assert_snapshot!(workspace.run("merge [FIXTURES]/tiny-llama --adapter b.safetensors -o out"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: out exists already
    hint: --force replaces it
    ");
    assert_eq!(content(&workspace.path("out")), first);
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter b.safetensors -o out --force");
    assert_ne!(content(&workspace.path("out")), first);
}

#[test]
fn merge_in_place_and_back_restores_every_byte() {
    let workspace = workspace();
    workspace.copy_fixture("tiny-llama");
    assert_snapshot!(workspace.run("merge tiny-llama --adapter a.safetensors --in-place"), @r"
    exit: 0
    --- stdout
    kind       tensors  touched  changed  absorbed  share
    down_proj        2      256      256         0    0 %
    gate_proj        2      704      704         0    0 %
    k_proj           2      128      128         0    0 %
    o_proj           2      256      256         0    0 %
    q_proj           2      256      256         0    0 %
    up_proj          2      704      704         0    0 %
    v_proj           2      128      128         0    0 %
    total           14    2,432    2,432         0    0 %
    (absorbed: rounding swallowed the delta, and the weight kept its bits)

    adapter         scale  tensors  deltas  made from
    + 00677c4f4526  1.000       14   2,432  tiny-llama

    matched  14 tensors, none unmatched
    shards   2 of 3 patched
    wrote    4.86 kB
    ledger   13.8 kB
    --- stderr
    ");
    assert_ne!(content(&workspace.path("tiny-llama")), base());
    assert_snapshot!(workspace.run("unmerge tiny-llama --in-place"), @r"
    exit: 0
    --- stdout
    no adapter is left; all bytes are the base's

    removed  00677c4f4526
    matched  14 tensors, none unmatched
    shards   2 of 3 patched
    wrote    4.86 kB
    --- stderr
    ");
    assert!(!workspace.path("tiny-llama/.neuroada").exists(), "nothing is left to remember");
    assert_eq!(content(&workspace.path("tiny-llama")), base());
}

#[test]
fn adapters_come_out_in_any_order() {
    let workspace = workspace();
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter b.safetensors -o only-b");
    workspace.stdout(&format!("{MERGE_A} -o both"));
    workspace.stdout("merge both --adapter b.safetensors --in-place");
    assert_snapshot!(workspace.run("unmerge both --adapter a.safetensors --in-place"), @r"
    exit: 0
    --- stdout
    kind    tensors  touched  changed  absorbed  share
    q_proj        2      256      256         0    0 %
    total         2      256      256         0    0 %
    (absorbed: rounding swallowed the delta, and the weight kept its bits)

    adapter         scale  tensors  deltas  made from
      79072f499595  1.000        2     256  tiny-llama

    removed  00677c4f4526
    matched  14 tensors, none unmatched
    shards   2 of 3 patched
    wrote    5.12 kB
    ledger   2.19 kB
    --- stderr
    ");
    assert_eq!(weights(&workspace.path("both")), weights(&workspace.path("only-b")));
    workspace.stdout("unmerge both --in-place");
    assert_eq!(content(&workspace.path("both")), base());
}

#[test]
fn unmerge_works_in_place_unless_told_where_else() {
    let workspace = workspace();
    workspace.stdout(&format!("{MERGE_A} -o out"));
    let merged = content(&workspace.path("out"));
    workspace.stdout("unmerge out -o base");
    assert_eq!((content(&workspace.path("out")), content(&workspace.path("base"))), (merged, base()));
    workspace.stdout("unmerge out");
    assert_eq!(content(&workspace.path("out")), base());
    assert_snapshot!(workspace.run("unmerge out --force"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the following required arguments were not provided:
      --output <PATH>

    Usage: neuroada-ckpt unmerge --output <PATH> --force <PATH>

    For more information, try '--help'.
    ");
}

#[test]
fn unmerge_takes_the_beginning_of_an_id() {
    let workspace = workspace();
    let report = workspace.json(&format!("{MERGE_A} -o out"));
    let id = report["added"][0].as_str().unwrap();
    workspace.stdout(&format!("unmerge out --adapter {} --in-place", &id[..8]));
    assert_eq!(content(&workspace.path("out")), base());
}

#[test]
fn an_unknown_id_is_named() {
    let workspace = workspace();
    workspace.stdout(&format!("{MERGE_A} -o out"));
    assert_snapshot!(workspace.run("unmerge out --adapter 00000000 --in-place"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: no adapter in out has an id that begins with 00000000
    ");
    assert_snapshot!(workspace.run("unmerge out --adapter b.safetensors --in-place"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: out: adapter 79072f499595 is not merged into it
    ");
}

#[test]
fn an_adapter_is_merged_once() {
    let workspace = workspace();
    workspace.stdout(&format!("{MERGE_A} -o out"));
    assert_snapshot!(workspace.run("merge out --adapter a.safetensors --in-place"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: out: adapter 00677c4f4526 is already merged into it
    hint: to merge it with another scale, unmerge it first
    ");
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let workspace = workspace();
    let base = workspace.copy_fixture("tiny-llama");
    let shard = base.join("model-00003-of-00003.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let at = bytes.len() - 176 * 64 * 2;
    bytes[at..].fill(1);
    fs::write(&shard, &bytes).unwrap();
    assert_snapshot!(workspace.run("merge tiny-llama --adapter a.safetensors -o out"), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: a.safetensors: tensor "model.layers.1.mlp.up_proj.weight": made for another base: it was made from tiny-llama, this is tiny-llama; 13 of 14 tensors have its values at its positions: was it half merged, or trained on since?
    hint: merge into the checkpoint that the adapter was made from
    "#);
    assert_snapshot!(workspace.run("merge [FIXTURES]/accepted/adapter-base.safetensors --adapter a.safetensors -o out"), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: a.safetensors: 14 of 14 tensors do not match the base adapter-base:
      "model.layers.0.mlp.down_proj.weight": the base has no such tensor
      "model.layers.0.mlp.gate_proj.weight": the base has no such tensor
      "model.layers.0.mlp.up_proj.weight": the base has no such tensor
      "model.layers.0.self_attn.k_proj.weight": the base has no such tensor
      "model.layers.0.self_attn.o_proj.weight": the base has no such tensor
      … and 9 more; -v lists them
    hint: the adapter was made for another model; compare names and shapes with `neuroada-ckpt inspect --tensors`
    "#);
    assert!(!workspace.path("out").exists());
}

#[test]
fn output_over_the_input_is_refused() {
    let workspace = workspace();
    workspace.copy_fixture("tiny-llama");
    assert_snapshot!(workspace.run("merge tiny-llama --adapter a.safetensors -o ./tiny-llama --force"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: ./tiny-llama: the output is an input: tiny-llama
    hint: choose another output path; with --in-place, merge and unmerge change the checkpoint itself
    ");
    assert_eq!(content(&workspace.path("tiny-llama")), base());
}

#[test]
fn requests_that_make_no_sense_are_usage_errors() {
    let workspace = workspace();
    assert_snapshot!(workspace.run(MERGE_A), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the following required arguments were not provided:
      <--output <PATH>|--in-place>

    Usage: neuroada-ckpt merge --adapter <FILE[=SCALE]> <--output <PATH>|--in-place> <BASE>

    For more information, try '--help'.
    ");
    assert_snapshot!(workspace.run(&format!("{MERGE_A} -o out --in-place")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the argument '--output <PATH>' cannot be used with '--in-place'

    Usage: neuroada-ckpt merge --adapter <FILE[=SCALE]> <--output <PATH>|--in-place> <BASE>

    For more information, try '--help'.
    ");
    assert_snapshot!(workspace.run(&format!("{MERGE_A}=much -o out")), @r#"
    exit: 2
    --- stdout
    --- stderr
    error: a.safetensors=much: expected FILE or FILE=SCALE, and "much" is not a number
    "#);
    assert_snapshot!(workspace.run(&format!("{MERGE_A} --adapter a.safetensors -o out")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: a.safetensors: adapter 00677c4f4526 is given twice
    ");
    assert_snapshot!(workspace.run("merge [FIXTURES]/tiny-llama -o out"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the following required arguments were not provided:
      --adapter <FILE[=SCALE]>

    Usage: neuroada-ckpt merge --adapter <FILE[=SCALE]> <--output <PATH>|--in-place> <BASE>

    For more information, try '--help'.
    ");
}

#[test]
fn a_broken_adapter_is_named() {
    let workspace = workspace();
    let merge = "merge [FIXTURES]/accepted/adapter-base.safetensors -o out --adapter [FIXTURES]/rejected/adapter";
    assert_snapshot!(workspace.run(&format!("{merge}/columns-unsorted.safetensors")), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/rejected/adapter/columns-unsorted.safetensors: tensor "proj.weight.columns": row 2: columns must ascend, found 2 after 9
    "#);
    assert_snapshot!(workspace.run(&format!("{merge}/value-nan.safetensors")), @r#"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/rejected/adapter/value-nan.safetensors: tensor "proj.weight.values": row 6, column 13: the delta is NaN
    "#);
    assert_snapshot!(workspace.run("merge [FIXTURES]/tiny-llama -o out --adapter [FIXTURES]/tiny-llama"), @r"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama: is a checkpoint, not an adapter
    hint: the base is the first argument, an adapter follows --adapter
    ");
    assert!(!workspace.path("out").exists());
}

#[test]
fn links_are_worked_on_only_when_asked() {
    let workspace = workspace();
    let base = workspace.copy_fixture("tiny-llama");
    fs::hard_link(base.join("model-00002-of-00003.safetensors"), workspace.path("other")).unwrap();
    assert_snapshot!(workspace.run("merge tiny-llama --adapter a.safetensors --in-place"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: tiny-llama: a change in place would also change other files: model-00002-of-00003.safetensors has 2 names (hard links)
    hint: --output makes a copy of all; --break-links copies the files that change, and leaves the others' as they are
    ");
    let before = fs::read(workspace.path("other")).unwrap();
    workspace.stdout("merge tiny-llama --adapter a.safetensors --in-place --break-links");
    assert_eq!(fs::read(workspace.path("other")).unwrap(), before, "the other name's file is as it was");
    assert_ne!(fs::read(base.join("model-00002-of-00003.safetensors")).unwrap(), before);
    workspace.stdout("verify tiny-llama");
}

#[test]
fn a_single_file_keeps_its_ledger_beside_it() {
    let workspace = Workspace::new();
    let base = workspace.copy_fixture("accepted/adapter-base.safetensors");
    let original = fs::read(&base).unwrap();
    write_adapter_for(&base, &workspace.path("a.safetensors"), "proj.weight", 3, 1.0);
    workspace.stdout("merge adapter-base.safetensors --adapter a.safetensors -o merged.safetensors");
    assert_snapshot!(workspace.files().join("\n"), @r"
    a.safetensors
    adapter-base.safetensors
    merged.safetensors
    merged.safetensors.neuroada/adapters/521661dcf2fc3e7f76eaf5d684456d25b40902a6fc2b787a2b6bad0b4184776d.safetensors
    merged.safetensors.neuroada/ledger
    ");
    assert_ne!(fs::read(workspace.path("merged.safetensors")).unwrap(), original);
    workspace.stdout("unmerge merged.safetensors --in-place");
    assert_eq!(fs::read(workspace.path("merged.safetensors")).unwrap(), original);
}

#[test]
fn verify_proves_a_merge() {
    let workspace = workspace();
    workspace.stdout(&format!("{MERGE_A} -o out"));
    assert_snapshot!(workspace.run("verify out"), @r"
    exit: 0
    --- stdout
    adapter       scale  deltas  tensors  anchors match
    00677c4f4526  1.000   2,432       14             14
    (anchors match: tensors whose original values are those that the adapter was made from)

    touched   2,432 weights, 0 wrong
    all else  not compared (no --base)
    verdict   verified
    --- stderr
    ");
    assert_snapshot!(workspace.run("verify out --base [FIXTURES]/tiny-llama"), @r"
    exit: 0
    --- stdout
    adapter       scale  deltas  tensors  anchors match
    00677c4f4526  1.000   2,432       14             14
    (anchors match: tensors whose original values are those that the adapter was made from)

    touched   2,432 weights, 0 wrong
    all else  253 kB compared with the base
    verdict   verified
    --- stderr
    ");
}

#[test]
fn verify_says_no_when_one_byte_was_changed() {
    let workspace = workspace();
    workspace.stdout(&format!("{MERGE_A} -o out"));
    let shard = workspace.path("out/model-00002-of-00003.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let at = bytes.len() - 5;
    bytes[at] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    assert_snapshot!(workspace.run("verify out --base [FIXTURES]/tiny-llama"), @r#"
    exit: 1
    --- stdout
    adapter       scale  deltas  tensors  anchors match
    00677c4f4526  1.000   2,432       14             14
    (anchors match: tensors whose original values are those that the adapter was made from)

    touched   2,432 weights, 0 wrong
    all else  253 kB compared with the base
    verdict   1 problems
      "model.layers.1.self_attn.v_proj.weight": 65 elements differ from the base, the adapters change 64
    --- stderr
    "#);

    bytes[at] ^= 1;
    let open = Checkpoint::open(&workspace.path("out")).unwrap();
    let tensor = open.tensor("model.layers.0.self_attn.q_proj.weight").unwrap();
    bytes[tensor.shard.file_range(tensor.info).start as usize] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    assert_snapshot!(workspace.run("verify out"), @r#"
    exit: 1
    --- stdout
    adapter       scale  deltas  tensors  anchors match
    00677c4f4526  1.000   2,432       14             14
    (anchors match: tensors whose original values are those that the adapter was made from)

    touched   2,432 weights, 1 wrong
    all else  not compared (no --base)
    verdict   1 problems
      "model.layers.0.self_attn.q_proj.weight" [0, 0]: bits bb93, the merges left bb92
    --- stderr
    "#);
    assert_snapshot!(workspace.run("unmerge out --in-place"), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: out: 1 weight differs from what the merges in its ledger wrote:
      "model.layers.0.self_attn.q_proj.weight" [0, 0]: bits bb93, the merges left bb92
    "#);
}

#[test]
fn recover_finds_nothing_to_do() {
    let workspace = workspace();
    assert_snapshot!(workspace.run("recover [FIXTURES]/tiny-llama"), @r"
    exit: 0
    --- stdout
    nothing to recover
    --- stderr
    ");
    assert_snapshot!(workspace.run("recover [FIXTURES]/tiny-llama --json"), @r#"
    exit: 0
    --- stdout
    {
      "outcome": "nothing"
    }
    --- stderr
    "#);
}

#[test]
fn a_new_checkpoint_has_a_card_of_its_own_and_nothing_that_contradicts_it() {
    let workspace = workspace();
    workspace.copy_fixture("tiny-llama");
    let theirs = "---\nlicense: apache-2.0\n---\n# Tiny\n";
    workspace.write("tiny-llama/README.md", theirs);
    workspace.write("tiny-llama/pytorch_model.bin", "old weights");
    let card = |name: &str| fs::read_to_string(workspace.path(name).join("README.md")).ok();
    let merge = "merge tiny-llama --adapter a.safetensors";
    let dry = workspace.run(&format!("{merge} -o out --dry-run"));
    let told = workspace.run(&format!("{merge} -o out"));
    for told in [&dry, &told] {
        assert!(
            told.contains("note: not copied: README.md: the old model's card\nnote: not copied: pytorch_model.bin: "),
            "{told}"
        );
    }
    assert!(!workspace.path("out/pytorch_model.bin").exists());
    let written = card("out").unwrap();
    assert!(written.contains("license: \"apache-2.0\"") && written.contains("00677c4f4526"), "{written}");
    // More adapters, fewer, in place or not: the card follows.
    workspace.stdout("merge out --adapter b.safetensors --in-place");
    let both = card("out").unwrap();
    assert!(both.contains("00677c4f4526") && both.contains("2 adapters"), "{both}");
    workspace.stdout(&format!("{merge} --adapter b.safetensors -o both"));
    assert_eq!(card("both").unwrap(), both);
    workspace.stdout("unmerge out --adapter b.safetensors -o less");
    assert_eq!(card("less").unwrap(), written);
    workspace.stdout("unmerge both -o none");
    assert_eq!(card("none").as_deref(), Some(theirs));
    workspace.stdout("unmerge out");
    assert_eq!(card("out").as_deref(), Some(theirs));
    // What somebody wrote there since is theirs.
    workspace.write("less/README.md", "mine");
    workspace.stdout("unmerge less");
    assert_eq!(card("less").as_deref(), Some("mine"));
    // In place the files stay, and are listed.
    let told = workspace.run("merge tiny-llama --adapter a.safetensors --in-place");
    assert!(told.contains("stays beside the new weights: pytorch_model.bin: "), "{told}");
    assert_eq!(card("tiny-llama").as_deref(), Some(theirs));
    workspace.stdout("unmerge tiny-llama");
    workspace.stdout(&format!("{merge} -o all --keep-other-files"));
    assert_eq!(card("all").as_deref(), Some(theirs));
    assert!(workspace.path("all/pytorch_model.bin").exists());
}
