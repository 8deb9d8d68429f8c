use std::fs;

use insta::assert_snapshot;

use super::Workspace;

#[test]
fn parts_make_the_same_mask_as_one_run() {
    let workspace = Workspace::new();
    for (options, n) in [
        ("--k 2", 3),
        ("--k 1 --hash --neuron-fraction 0.5 --seed 7", 14),
        ("--budget 1% --scope tensor", 4),
        ("--budget 5%", 1),
    ] {
        workspace.stdout(&format!("mask [FIXTURES]/tiny-llama {options} --force -o whole.safetensors"));
        let mut parts = String::new();
        for i in (1..=n).rev() {
            let part = format!("part{i}.safetensors");
            workspace.stdout(&format!("mask [FIXTURES]/tiny-llama {options} --partition {i}/{n} --force -o {part}"));
            parts += &format!(" {part}");
        }
        workspace.stdout(&format!("mask-join{parts} --force -o joined.safetensors"));
        let read = |name: &str| fs::read(workspace.path(name)).unwrap();
        assert!(read("joined.safetensors") == read("whole.safetensors"), "{options}");
    }
}

#[test]
fn a_part_says_what_it_is() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run("mask [FIXTURES]/tiny-llama --k 1 --partition 2/3 -o part.safetensors"), @r"
    exit: 0
    --- stdout
    kind       tensors  rows  chosen      of   share
    gate_proj        2   352     352  22,528  1.56 %
    k_proj           2    64      64   4,096  1.56 %
    q_proj           1    64      64   4,096  1.56 %
    total            5   480     480  30,720  1.56 %

    trainable  0.380 % of the model's 126,272 parameters
    partition  2/3 of the targets
    --- stderr
    ");
    assert_snapshot!(workspace.run("mask-join part.safetensors -o joined.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: part.safetensors: 2 parts are missing: 1/3, 3/3
    ");
    workspace.stdout("mask [FIXTURES]/tiny-llama --k 1 --partition 1/1 -o all.safetensors");
    assert_snapshot!(workspace.run("mask-join all.safetensors -o joined.safetensors"), @r"
    exit: 0
    --- stdout
    made from    tiny-llama
    parts        1
    targets      14, 1,216 rows
    connections  1,216
    --- stderr
    ");
}

#[test]
fn refusals_of_partitions_and_joins() {
    let workspace = Workspace::new();
    let mask = |options: &str| workspace.stdout(&format!("mask [FIXTURES]/tiny-llama {options}"));
    mask("--k 1 --partition 1/2 -o a.safetensors");
    mask("--k 1 --partition 2/2 -o b.safetensors");
    mask("--k 2 --partition 2/2 -o other-k.safetensors");
    mask("--k 1 --partition 2/3 -o of-three.safetensors");
    mask("--k 1 -o whole.safetensors");
    let files = workspace.files();
    assert_snapshot!(workspace.run("mask [FIXTURES]/tiny-llama --k 1 --partition 3/2 -o x.safetensors"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: invalid value '3/2' for '--partition <I/N>': partition 3/2: parts are numbered from 1 to 2

    For more information, try '--help'.
    ");
    assert_snapshot!(workspace.run("mask [FIXTURES]/tiny-llama --k 1 --partition 1/15 -o x.safetensors"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: partition 1/15: there are 14 targets, use at most as many parts
    ");
    assert_snapshot!(workspace.run("mask [FIXTURES]/tiny-llama --k 1 --scope global --partition 1/2 -o x.safetensors"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: partition 1/2: in global scope all weights compete, so parts cannot be made separately
    ");
    assert_snapshot!(workspace.run("mask-join a.safetensors a.safetensors -o x.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: a.safetensors: it is part 1/2, and so is a.safetensors
    ");
    assert_snapshot!(workspace.run("mask-join a.safetensors other-k.safetensors -o x.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: other-k.safetensors: its recipe differs from that of a.safetensors
    ");
    assert_snapshot!(workspace.run("mask-join a.safetensors of-three.safetensors -o x.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: of-three.safetensors: it is part 2/3, but a.safetensors has another number of parts
    ");
    assert_snapshot!(workspace.run("mask-join a.safetensors whole.safetensors -o x.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: whole.safetensors: it is a complete mask, not a part of one
    ");
    assert_snapshot!(workspace.run("mask-join a.safetensors b.safetensors -o whole.safetensors"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: whole.safetensors exists already
    hint: --force replaces it
    ");
    assert_eq!(workspace.files(), files);
}
