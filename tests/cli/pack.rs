//! `pack` and `unpack`, and packed adapters in place of plain ones.

use std::fs;

use insta::assert_snapshot;

use super::{
    adapters::{PROJECTIONS, content, write_adapter},
    harness::{Workspace, fixtures},
};

const PLAIN: &str = "[FIXTURES]/tiny-llama-adapter.safetensors";
const BASE: &str = "[FIXTURES]/tiny-llama";

#[test]
fn a_packed_adapter_tells_its_size_beside_the_limit() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run(&format!("pack {PLAIN} -o p --base {BASE}")), @r"
    exit: 0
    --- stdout
                                       size  bytes per delta  limit
    columns, derived from the base      0 B            0.000  0.705
    values                          3.35 kB            1.376  1.346
    names and hashes                1.94 kB            0.798
    packed                          5.29 kB            2.174  2.052
    plain                           15.3 kB            6.306
    (limit: the information in the data, which no lossless packing can go below)

    adapter  8029d815eeb9
    deltas   2,432 in 14 tensors
    --- stderr
    ");
    assert_snapshot!(workspace.run("inspect p --filter *.0.*.q_proj.*"), @r"
    exit: 0
    --- stdout
    packed adapter  p, one file
    base            tiny-llama (llama)
    chosen by       magnitude, k 2, scope row, targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
    targets         1, 64 rows
    connections     128, 3.12 % of the targets
    scale           1
    packed          from 15.3 kB, columns derived from the base, which is needed to read them
    id              8029d815eeb956f93adfbf68f2a01cbdb4c8dc450d2901b853b015c66f954458
    license         MIT
    description     Random deltas, for trying things
    size            5.29 kB

    kind    base type  values  targets  rows  per row  connections   share
    q_proj  BF16       BF16          1    64        2          128  3.12 %
    --- stderr
    ");
    assert_snapshot!(workspace.run(&format!("pack {PLAIN} -o p")), @r"
    exit: 4
    --- stdout
    --- stderr
    error: p exists already
    hint: --force replaces it
    ");
}

#[test]
fn unpacking_gives_the_same_file_back() {
    let workspace = Workspace::new();
    let plain = fs::read(fixtures().join("tiny-llama-adapter.safetensors")).unwrap();
    for (columns, base) in [("packed", ""), ("derived", " --base [FIXTURES]/tiny-llama")] {
        workspace.stdout(&format!("pack {PLAIN} -o p --columns {columns}{base} --force"));
        assert!(fs::metadata(workspace.path("p")).unwrap().len() * 2 < plain.len() as u64);
        workspace.stdout(&format!("unpack p -o a{base} --force"));
        assert!(fs::read(workspace.path("a")).unwrap() == plain, "{columns}");
    }
    assert_snapshot!(workspace.run("unpack p -o b"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: p: its columns are derived from its base, which is not given
    hint: --base BASE derives them
    ");
    assert_snapshot!(workspace.run("unpack a -o b -q"), @r"
    exit: 0
    --- stdout
    --- stderr
    ");
    assert!(fs::read(workspace.path("b")).unwrap() == plain, "of a plain adapter a copy");
}

#[test]
fn merges_take_packed_adapters_and_give_the_same_bytes() {
    let workspace = Workspace::new();
    workspace.stdout(&format!("pack {PLAIN} -o p --base {BASE} --columns derived"));
    workspace.stdout(&format!("merge {BASE} --adapter {PLAIN} -o expected"));
    workspace.stdout(&format!("merge {BASE} --adapter p -o merged"));
    assert!(content(&workspace.path("merged")) == content(&workspace.path("expected")));
    let kept = |folder: &str| content(&workspace.path(folder).join(".neuroada/adapters"));
    assert!(kept("merged") == kept("expected"), "what remembers does not need the packed file");
    fs::remove_file(workspace.path("p")).unwrap();
    workspace.stdout("unmerge merged");
    assert!(content(&workspace.path("merged")) == content(&fixtures().join("tiny-llama")));
}

#[test]
fn in_place_and_without_a_ledger_too() {
    let workspace = Workspace::new();
    workspace.copy_fixture("tiny-llama");
    workspace.stdout(&format!("pack {PLAIN} -o p --base {BASE}"));
    workspace.stdout("merge tiny-llama --adapter p --in-place");
    workspace.stdout(&format!("verify tiny-llama --base {BASE}"));
    workspace.stdout("unmerge tiny-llama --adapter p");
    assert!(content(&workspace.path("tiny-llama")) == content(&fixtures().join("tiny-llama")));
    workspace.stdout(&format!("merge {BASE} --adapter p=0.5 -o bare --no-ledger"));
    workspace.stdout(&format!("verify bare --base {BASE} --adapter p=0.5"));
}

#[test]
fn a_checkpoint_that_was_merged_into_derives_no_columns() {
    let workspace = Workspace::new();
    write_adapter(&workspace, "other", PROJECTIONS, 3, 0.5);
    workspace.stdout(&format!("pack {PLAIN} -o p --base {BASE}"));
    workspace.stdout(&format!("merge {BASE} --adapter other -o m"));
    let said = workspace.run("merge m --adapter p --in-place");
    assert!(said.starts_with("exit: 4") && said.contains("p: its columns are derived from its base"), "{said}");
    workspace.stdout(&format!("unpack p -o a --base {BASE}"));
    workspace.stdout("merge m --adapter a --in-place");
    workspace.stdout(&format!("verify m --base {BASE}"));
}

#[test]
fn diff_needs_the_base_of_derived_columns_alone() {
    let workspace = Workspace::new();
    workspace.stdout(&format!("pack {PLAIN} -o derived --base {BASE}"));
    workspace.stdout(&format!("pack {PLAIN} -o packed"));
    assert_snapshot!(workspace.run(&format!("diff derived {PLAIN}")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: derived: its columns are derived from its base, which is not given
    hint: --base BASE derives them
    ");
    assert_eq!(workspace.json(&format!("diff derived {PLAIN} --base {BASE}"))["equal"], true);
    assert_eq!(workspace.json(&format!("diff packed {PLAIN}"))["equal"], true);
}

#[test]
fn another_base_is_refused() {
    let workspace = Workspace::new();
    let base = workspace.copy_fixture("tiny-llama");
    workspace.stdout(&format!("pack {PLAIN} -o p --base {BASE}"));
    // Every weight of a shard with its sign changed: the same columns are the largest, of other values.
    let shard = base.join("model-00002-of-00003.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[data..].chunks_exact_mut(2).for_each(|le| le[1] ^= 0x80);
    fs::write(&shard, bytes).unwrap();
    let said = workspace.run("merge tiny-llama --adapter p -o merged");
    assert!(said.starts_with("exit: 4") && said.contains("it was made from other values"), "{said}");
    let said = workspace.run("unpack p -o a --base tiny-llama");
    assert!(said.starts_with("exit: 4"), "{said}");
    assert!(!workspace.path("merged").exists() && !workspace.path("a").exists());
}

#[test]
fn columns_of_no_recipe_are_packed_and_the_reason_is_told() {
    let workspace = Workspace::new();
    write_adapter(&workspace, "custom", PROJECTIONS, 3, 0.5);
    let report = workspace.json(&format!("pack custom -o p --base {BASE}"));
    assert_eq!(report["columns"], "packed");
    assert_eq!(report["columns_note"], "its columns come from no recipe that can be followed with the base alone");
    assert_snapshot!(workspace.run(&format!("pack custom -o q --base {BASE} --columns derived")), @r"
    exit: 4
    --- stdout
    --- stderr
    error: custom: its columns cannot be derived from a base: its columns come from no recipe that can be followed with the base alone
    ");
    assert_snapshot!(workspace.run("pack custom -o q --columns derived"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: custom: its columns cannot be derived from a base: that takes the base
    ");
    assert!(!workspace.path("q").exists());
}

#[test]
fn rows_of_any_number_of_columns_can_be_derived() {
    let workspace = Workspace::new();
    workspace.stdout(&format!("mask {BASE} --k 3 --score random --seed 5 --neuron-fraction 0.4 -o m"));
    workspace.stdout(&format!("init {BASE} --mask m -o a --dtype f16"));
    let report = workspace.json(&format!("pack a -o p --base {BASE}"));
    assert_eq!((&report["columns"], &report["columns_bytes"]), (&"derived".into(), &0.into()));
    workspace.stdout(&format!("unpack p -o b --base {BASE}"));
    assert!(fs::read(workspace.path("a")).unwrap() == fs::read(workspace.path("b")).unwrap());
}

#[test]
fn rounded_values_report_their_error() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run(&format!("pack {PLAIN} -o p --base {BASE} --values int8")), @r"
    exit: 0
    --- stdout
                                       size  bytes per delta  limit
    columns, derived from the base      0 B            0.000  0.705
    values                          2.33 kB            0.959  0.933
    names and hashes                2.28 kB            0.938
    packed                          4.61 kB            1.897  1.639
    plain                           15.3 kB            6.306
    (limit: the information in the data, which no lossless packing can go below)

    adapter                 61180b7ee66b
    deltas                  2,432 in 14 tensors
    rounded from            8029d815eeb9
    deltas changed          2,403 of 2,432; largest difference 0.0001249, in norm 0.006077 of all
    merged weights changed  500 of 2,432; largest difference 0.0004883, in norm 0.01227 of the changes of the merge
    --- stderr
    ");
    // It is another adapter: the same positions, near values.
    let diff = workspace.json(&format!("diff p {PLAIN} --base {BASE}"));
    assert_eq!((&diff["total"]["n_shared"], &diff["total"]["n_only_a"]), (&2432.into(), &0.into()));
    assert!(diff["total"]["cosine"].as_f64().unwrap() > 0.9999);
}

#[test]
fn a_card_says_what_the_adapter_is() {
    let workspace = Workspace::new();
    workspace.stdout(&format!("pack {PLAIN} -o p.safetensors --base {BASE} --card --base-model org/tiny"));
    assert_snapshot!(fs::read_to_string(workspace.path("README.md")).unwrap(), @r#"
    ---
    base_model: "org/tiny"
    base_model_relation: adapter
    library_name: neuroada-ckpt
    license: "mit"
    tags:
    - neuroada
    - sparse-adapter
    - safetensors
    ---

    # A sparse adapter for org/tiny

    Random deltas, for trying things

    ## What it changes

    It adds a delta to 2,432 weights of 14 tensors:

    | projection | tensors | weights changed | of | share |
    | --- | ---: | ---: | ---: | ---: |
    | down\_proj | 2 | 256 | 22,528 | 1.14 % |
    | gate\_proj | 2 | 704 | 22,528 | 3.12 % |
    | k\_proj | 2 | 128 | 4,096 | 3.12 % |
    | o\_proj | 2 | 256 | 8,192 | 3.12 % |
    | q\_proj | 2 | 256 | 8,192 | 3.12 % |
    | up\_proj | 2 | 704 | 22,528 | 3.12 % |
    | v\_proj | 2 | 128 | 4,096 | 3.12 % |

    ## Files

    `p.safetensors`: 5.29 kB, 2.17 bytes per delta (15.3 kB unpacked).
    The positions of the changed weights are derived from the base model; a digest proves them.
    The adapter's id is `8029d815eeb956f93adfbf68f2a01cbdb4c8dc450d2901b853b015c66f954458`, the BLAKE3 of its content.

    ## How to install the program

    ```sh
    cargo install --locked neuroada-ckpt
    ```

    ## How to merge it

    ```sh
    hf download 'org/tiny' --local-dir 'tiny'
    neuroada-ckpt merge 'tiny' --adapter 'p.safetensors' -o merged
    ```

    The result is an ordinary checkpoint. The adapter fits the base it was made from and no other: it has a hash of the base's weights at the changed positions, and a merge into another base is refused.

    ## How to verify it

    ```sh
    neuroada-ckpt inspect 'p.safetensors'
    neuroada-ckpt verify merged --base 'tiny'
    ```

    `inspect` prints the id, and `verify` computes every changed weight again.

    ## How to undo it

    ```sh
    neuroada-ckpt unmerge merged
    ```

    This restores the base's weights, bit for bit.
    "#);
    let again = workspace.run(&format!("pack {PLAIN} -o q.safetensors --card"));
    assert!(again.starts_with("exit: 4") && again.contains("README.md exists already"), "{again}");
    assert!(!workspace.path("q.safetensors").exists());
}

#[test]
fn a_card_takes_a_license_and_the_bases_repository() {
    let workspace = Workspace::new();
    let told =
        workspace.run(&format!("pack {PLAIN} -o p.safetensors --card --base-name org/tiny --license Apache-2.0"));
    assert!(told.starts_with("exit: 0") && told.ends_with("--- stderr\n"), "{told}");
    let card = fs::read_to_string(workspace.path("README.md")).unwrap();
    assert!(card.contains("base_model: \"org/tiny\"\n") && card.contains("license: \"apache-2.0\"\n"), "{card}");
    for heading in ["install the program", "merge it", "verify it", "undo it"] {
        assert!(card.contains(&format!("## How to {heading}\n\n```sh\n")), "{heading}: {card}");
    }
    assert!(workspace.run(&format!("pack {PLAIN} -o q.safetensors --license MIT")).starts_with("exit: 2"));
}

#[test]
fn a_card_for_a_local_base_is_warned_about() {
    let workspace = Workspace::new();
    let told = workspace.run(&format!("pack {PLAIN} -o p.safetensors --card"));
    let warning = "warning: the card names the base \"tiny-llama\", a local folder; --base-name ORG/NAME names its repository on the Hub\n";
    assert!(told.starts_with("exit: 0") && told.ends_with(warning), "{told}");
    let card = fs::read_to_string(workspace.path("README.md")).unwrap();
    assert!(!card.contains("base_model:") && !card.contains("hf download"), "{card}");
}
