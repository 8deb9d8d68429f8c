//! `combine`: several adapters of one base made one.

use std::fs;

use insta::assert_snapshot;

use super::{
    adapters::{PROJECTIONS, content, write_adapter},
    harness::{Workspace, fixtures},
};

const BASE: &str = "[FIXTURES]/tiny-llama";

#[test]
fn the_overlap_comes_first_and_the_sum_merges_as_one() {
    let workspace = Workspace::new();
    // Columns 3 and 4, then 4 and 5 with the other sign.
    write_adapter(&workspace, "a", PROJECTIONS, 3, 0.5);
    write_adapter(&workspace, "b", PROJECTIONS, 4, -0.25);
    assert_snapshot!(workspace.run(&format!("combine a=0.5 b=2 -o c --base {BASE}")), @r"
    exit: 0
    --- stdout
       adapter  id            weight  scale  deltas   kept   norm
    1  a        08790a4428a8  0.5000  1.000   2,432  2,432  17.97
    2  b        b4f3900f31e2   2.000  1.000   2,432  2,432  8.986

    pair     shared  Jaccard  sign conflicts   cosine
    1 and 2   1,216   0.3333           1,216  -0.2353
    (Jaccard: shared positions over all positions of the pair; sign conflicts: shared positions with both signs)

    made from  tiny-llama
    method     linear
    contested  1,216 weights, 1,216 with both signs
    deltas     3,648 in 14 tensors, 3,648 not zero
    norm       18.10
    adapter    acb0bb55a7c6
    size       33.7 kB
    --- stderr
    ");
    workspace.stdout(&format!("merge {BASE} --adapter c -o m"));
    let diff = workspace.json("diff c a");
    assert_eq!((&diff["total"]["n_only_a"], &diff["total"]["n_only_b"]), (&1216.into(), &0.into()));
}

#[test]
fn one_adapter_with_its_weight_is_its_scaled_self() {
    let workspace = Workspace::new();
    write_adapter(&workspace, "a", PROJECTIONS, 3, 0.5);
    workspace.stdout("combine a=0.25 -o c");
    workspace.stdout(&format!("merge {BASE} --adapter c -o m1 --no-ledger"));
    workspace.stdout(&format!("merge {BASE} --adapter a=0.25 -o m2 --no-ledger"));
    assert!(content(&workspace.path("m1")) == content(&workspace.path("m2")));
}

#[test]
fn ties_and_priority_settle_conflicts() {
    let workspace = Workspace::new();
    write_adapter(&workspace, "a", "0.mlp.up_proj.weight", 3, 1.0);
    write_adapter(&workspace, "b", "0.mlp.up_proj.weight", 3, -0.5);
    write_adapter(&workspace, "c", "0.mlp.up_proj.weight", 3, -0.125);
    let n_rows = 176.0;
    let norm = |line: &str| workspace.json(line)["norm"].as_f64().unwrap();
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-5 * expected, "{found} {expected}");
    // The sum of 1, -0.5 and -0.125 is positive: a alone has that sign; on the second column a quarter of it.
    let of = |delta: f64| (n_rows * (delta * delta + delta * delta / 16.0)).sqrt();
    near(norm("combine a b c --method ties --density 1 --dry-run"), of(1.0));
    near(norm("combine a b c=3 --method linear --dry-run"), of(1.0 - 0.5 - 0.375));
    near(norm("combine b c a --method priority --dry-run"), of(0.5));
    // Half of each: the first column alone.
    near(norm("combine a b c --method ties --density 0.5 --dry-run"), n_rows.sqrt());
}

#[test]
fn dare_is_the_same_for_any_number_of_threads_and_order() {
    let workspace = Workspace::new();
    write_adapter(&workspace, "a", PROJECTIONS, 3, 0.5);
    write_adapter(&workspace, "b", PROJECTIONS, 3, 0.25);
    let run = |line: &str| {
        workspace.stdout(&format!("combine {line} --method dare --density 0.4 --force -o c"));
        fs::read(workspace.path("c")).unwrap()
    };
    let one = run("a b --seed 7 --threads 1");
    assert!(one == run("a b --seed 7 --threads 3"));
    assert!(one == run("b a --seed 7"));
    assert!(one != run("a b --seed 8"));
    let report = workspace.json("combine a b --method dare --density 0.4 --seed 7 --dry-run");
    let kept = report["inputs"][0]["n_kept"].as_u64().unwrap();
    // 2,432 throws of 0.4: within four standard deviations of 973.
    assert!((876..1070).contains(&kept), "{kept}");
}

#[test]
fn adapters_of_different_bases_are_refused() {
    let workspace = Workspace::new();
    let base = workspace.copy_fixture("tiny-llama");
    write_adapter(&workspace, "a", PROJECTIONS, 3, 0.5);
    write_adapter(&workspace, "b", PROJECTIONS, 4, 0.5);
    assert_snapshot!(workspace.run("combine a b -o c"), @r#"
    exit: 2
    --- stdout
    --- stderr
    error: a: tensor "model.layers.0.mlp.down_proj.weight": the adapters change different weights: whether they are of one base cannot be told without it
    hint: --base BASE proves every adapter against it
    "#);
    // Every weight of a shard with its sign changed.
    let shard = base.join("model-00002-of-00003.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[data..].chunks_exact_mut(2).for_each(|le| le[1] ^= 0x80);
    fs::write(&shard, bytes).unwrap();
    super::adapters::write_adapter_for(&base, &workspace.path("other"), PROJECTIONS, 3, 0.5);
    assert_snapshot!(workspace.run("combine a other -o c"), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: other: tensor "model.layers.0.mlp.down_proj.weight": it was made from other values at the same positions than a: they are of different bases
    "#);
    assert_snapshot!(workspace.run("combine a b -o c --base tiny-llama"), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: a: tensor "model.layers.0.mlp.down_proj.weight": it was made from tiny-llama, tiny-llama has other values at its positions
    "#);
    assert!(!workspace.path("c").exists());
}

#[test]
fn packed_adapters_are_combined_as_they_are() {
    let workspace = Workspace::new();
    fs::copy(fixtures().join("tiny-llama-adapter.safetensors"), workspace.path("a")).unwrap();
    workspace.stdout(&format!("pack a -o p --base {BASE}"));
    workspace.stdout("combine a a=2 -o c1");
    workspace.stdout(&format!("combine p p=2 -o c2 --base {BASE}"));
    assert!(fs::read(workspace.path("c1")).unwrap() == fs::read(workspace.path("c2")).unwrap());
    assert_snapshot!(workspace.run("combine p a -o c3"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: p: its columns are derived from its base, which is not given
    hint: --base BASE derives them
    ");
}

#[test]
fn contradicting_options_are_refused() {
    let workspace = Workspace::new();
    write_adapter(&workspace, "a", "0.mlp.up_proj.weight", 3, 1.0);
    let said = |line: &str| {
        let output = workspace.output(line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(said("combine a -o c --method ties"), "error: --method ties, dare and dare-ties need --density\n");
    assert_eq!(said("combine a -o c --density 0.5"), "error: --method linear and priority take no --density\n");
    assert!(said("combine a -o c --method dare --density 1.5").contains("above 0 and at most 1"));
}
