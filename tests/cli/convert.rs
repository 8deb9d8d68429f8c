use std::fs;

use insta::assert_snapshot;

use super::Workspace;

/// The shipped adapter, in the published code's format.
fn published() -> Workspace {
    let workspace = Workspace::new();
    workspace.stdout("convert [FIXTURES]/tiny-llama-adapter.safetensors --to published -o published");
    workspace
}

#[test]
fn an_adapter_goes_to_the_published_format_and_back() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run("convert [FIXTURES]/tiny-llama-adapter.safetensors --to published -o published"), @r"
    exit: 0
    --- stdout
    kind       tensors  read  written  padding  summed  rounded  result
    down_proj        2   256      256        0       0        0  exact
    gate_proj        2   704      704        0       0        0  exact
    k_proj           2   128      128        0       0        0  exact
    o_proj           2   256      256        0       0        0  exact
    q_proj           2   256      256        0       0        0  exact
    up_proj          2   704      704        0       0        0  exact
    v_proj           2   128      128        0       0        0  exact
    (padding: neutral entries that a format adds for a fixed number; summed: deltas of one position added up)

    from      neuroada
    to        published
    made for  tiny-llama
    adapter   8029d815eeb9
    size      57.0 kB
    verdict   exact: every delta is the same
    --- stderr
    ");
    assert_eq!(
        workspace.files(),
        ["published/positions.npy", "published/tunable_para/args.json", "published/tunable_para/state_dict_tunable.pt"]
    );
    assert_snapshot!(
        workspace.run("convert published --base [FIXTURES]/tiny-llama --to neuroada -o again.safetensors --tensors"),
        @r"
        exit: 0
        --- stdout
        tensor                                  tensors  read  written  padding  summed  rounded  result
        model.layers.0.mlp.down_proj.weight           1   128      128        0       0        0  exact
        model.layers.0.mlp.gate_proj.weight           1   352      352        0       0        0  exact
        model.layers.0.mlp.up_proj.weight             1   352      352        0       0        0  exact
        model.layers.0.self_attn.k_proj.weight        1    64       64        0       0        0  exact
        model.layers.0.self_attn.o_proj.weight        1   128      128        0       0        0  exact
        model.layers.0.self_attn.q_proj.weight        1   128      128        0       0        0  exact
        model.layers.0.self_attn.v_proj.weight        1    64       64        0       0        0  exact
        model.layers.1.mlp.down_proj.weight           1   128      128        0       0        0  exact
        model.layers.1.mlp.gate_proj.weight           1   352      352        0       0        0  exact
        model.layers.1.mlp.up_proj.weight             1   352      352        0       0        0  exact
        model.layers.1.self_attn.k_proj.weight        1    64       64        0       0        0  exact
        model.layers.1.self_attn.o_proj.weight        1   128      128        0       0        0  exact
        model.layers.1.self_attn.q_proj.weight        1   128      128        0       0        0  exact
        model.layers.1.self_attn.v_proj.weight        1    64       64        0       0        0  exact
        (padding: neutral entries that a format adds for a fixed number; summed: deltas of one position added up)

        from      published
        to        neuroada
        made for  tiny-llama
        adapter   8029d815eeb9
        size      15.2 kB
        verdict   exact: every delta is the same
        --- stderr
        "
    );
    assert_snapshot!(workspace.run("convert published --base [FIXTURES]/tiny-llama --to npz -o a.npz -q"), @r"
    exit: 0
    --- stdout
    --- stderr
    ");
    let report = workspace.json("convert a.npz --base [FIXTURES]/tiny-llama --to neuroada -o from-npz.safetensors");
    assert_eq!((&report["from"], &report["exact"]), (&"npz".into(), &true.into()));
}

#[test]
fn what_was_asked_for_must_make_sense() {
    let workspace = published();
    assert_snapshot!(workspace.run("convert published --to neuroada -o a"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: published: an adapter in the format published does not know its base
    hint: --base BASE names the checkpoint that the deltas were trained on
    ");
    assert_snapshot!(workspace.run("convert [FIXTURES]/tiny-llama-adapter.safetensors --to neuroada -o a"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama-adapter.safetensors: is an adapter of this program already
    ");
    assert_snapshot!(workspace.run("convert [FIXTURES]/tiny-llama --to published -o a"), @r"
    exit: 3
    --- stdout
    --- stderr
    error: [FIXTURES]/tiny-llama: not a regular file
    ");
    assert_snapshot!(workspace.run("convert missing --to published -o a"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot open `missing`: No such file or directory (os error 2)
    ");
    assert_snapshot!(workspace.run("convert [FIXTURES]/tiny-llama-adapter.safetensors --to published -o published"), @r"
    exit: 4
    --- stdout
    --- stderr
    error: published exists already
    hint: --force replaces it
    ");
    assert_snapshot!(
        workspace.run("convert published --base [FIXTURES]/accepted/adapter-base.safetensors --to neuroada -o a"),
        @r#"
        exit: 4
        --- stdout
        --- stderr
        error: published: 14 of 14 tensors do not match the base adapter-base:
          "model.layers.0.mlp.down_proj.weight": the base has no such tensor
          "model.layers.0.mlp.gate_proj.weight": the base has no such tensor
          "model.layers.0.mlp.up_proj.weight": the base has no such tensor
          "model.layers.0.self_attn.k_proj.weight": the base has no such tensor
          "model.layers.0.self_attn.o_proj.weight": the base has no such tensor
          … and 9 more; -v lists them
        "#
    );
    assert!(!workspace.path("a").exists());
}

#[test]
fn a_hostile_pickle_is_named_and_not_run() {
    let workspace = published();
    let mut npy = std::fs::read(workspace.path("published/positions.npy")).unwrap();
    npy.truncate(128);
    // What `pickle.dumps` makes of an object whose `__reduce__` is os.system("touch owned").
    npy.extend(b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x0btouch owned\x94\x85\x94R\x94.");
    workspace.write("published/positions.npy", npy);
    assert_snapshot!(workspace.run("convert published --base [FIXTURES]/tiny-llama --to neuroada -o a"), @r"
    exit: 3
    --- stdout
    --- stderr
    error: published/positions.npy: at byte 147: the pickle asks for `posix.system`: only tensors are read, nothing else is imported or run
    ");
    assert!(!workspace.path("owned").exists() && !workspace.path("a").exists());
}

#[test]
fn peft_folders_are_written_and_read() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run("convert [FIXTURES]/tiny-llama-adapter.safetensors --to shira -o shira"), @r"
    exit: 0
    --- stdout
    kind       tensors  read  written  padding  summed  rounded  result
    down_proj        2   256      960      704       0        0  exact
    gate_proj        2   704      960      256       0        0  exact
    k_proj           2   128      384      256       0        0  exact
    o_proj           2   256      512      256       0        0  exact
    q_proj           2   256      512      256       0        0  exact
    up_proj          2   704      960      256       0        0  exact
    v_proj           2   128      384      256       0        0  exact
    (padding: neutral entries that a format adds for a fixed number; summed: deltas of one position added up)

    2240 of 4672 entries are padding: shira needs a fixed number for each layer

    from      neuroada
    to        shira
    made for  tiny-llama
    adapter   8029d815eeb9
    size      60.4 kB
    verdict   exact: every delta is the same
    --- stderr
    ");
    assert_eq!(workspace.files(), ["shira/adapter_config.json", "shira/adapter_model.safetensors"]);
    assert_snapshot!(workspace.run("convert shira --base [FIXTURES]/tiny-llama --to supertuning -o super"), @r"
    exit: 0
    --- stdout
    kind       tensors  read  written  padding  summed  rounded  result
    down_proj        2   960      704    1,152       0        0  exact
    gate_proj        2   960      704      256       0        0  exact
    k_proj           2   384      128      256       0        0  exact
    o_proj           2   512      256      256       0        0  exact
    q_proj           2   512      256      256       0        0  exact
    up_proj          2   960      704      256       0        0  exact
    v_proj           2   384      128      256       0        0  exact
    (padding: neutral entries that a format adds for a fixed number; summed: deltas of one position added up)

    448 of 2880 entries are padding: supertuning needs a fixed number for each layer

    from      shira
    to        supertuning
    made for  tiny-llama
    adapter   4f9ffed86273
    size      27.5 kB
    verdict   exact: every delta is the same
    --- stderr
    ");
    assert_snapshot!(workspace.run("convert super --base [FIXTURES]/tiny-llama --to spiel -o spiel -q"), @r"
    exit: 0
    --- stdout
    --- stderr
    ");
    let report = workspace.json("convert spiel --base [FIXTURES]/tiny-llama --to neuroada -o again.safetensors");
    assert_eq!((&report["from"], &report["exact"]), (&"spiel".into(), &true.into()));
}

#[test]
fn foreign_sparse_adapters_merge_and_unmerge_like_any_other() {
    let workspace = Workspace::new();
    workspace.stdout("convert [FIXTURES]/tiny-llama-adapter.safetensors --to shira -o shira");
    workspace.stdout("convert [FIXTURES]/tiny-llama-adapter.safetensors --to published -o published");
    assert_snapshot!(workspace.run("merge [FIXTURES]/tiny-llama --adapter shira=0.5 -o merged"), @r"
    exit: 0
    --- stdout
    kind       tensors  touched  changed  absorbed   share
    down_proj        2      256      232        24  9.38 %
    gate_proj        2      704      646        58  8.24 %
    k_proj           2      128      116        12  9.38 %
    o_proj           2      256      235        21  8.20 %
    q_proj           2      256      237        19  7.42 %
    up_proj          2      704      651        53  7.53 %
    v_proj           2      128      117        11  8.59 %
    total           14    2,432    2,234       198  8.14 %
    (absorbed: rounding swallowed the delta, and the weight kept its bits)

    adapter          scale  tensors  deltas  made from
    + 4f9ffed86273  0.5000       14   2,432  tiny-llama

    matched  14 tensors, none unmatched
    shards   2 of 3 patched
    wrote    263 kB
    ledger   13.8 kB
    --- stderr
    ");
    let verified = workspace.json("verify merged --base [FIXTURES]/tiny-llama");
    assert_eq!(verified["ok"], true);
    // On top of it another one, whose originals lie in the ledger by now.
    workspace.stdout("merge merged --in-place --adapter published=-1");
    assert_eq!(workspace.json("verify merged --base [FIXTURES]/tiny-llama")["active"].as_array().unwrap().len(), 2);
    workspace.stdout("unmerge merged");
    assert!(workspace.output("diff [FIXTURES]/tiny-llama merged").status.success());
}

#[test]
fn the_old_names_of_sync_do_the_same_and_warn() {
    let workspace = Workspace::new();
    let base = workspace.copy_fixture("tiny-llama");
    let base = base.file_name().unwrap().to_str().unwrap().to_owned();
    let export = format!("[FIXTURES]/tiny-llama-adapter.safetensors --base {base} --encoding xor --checksum blake3 -o");
    let old = workspace.output(&format!("convert --to weight-sync {export} weight_v000001"));
    fs::create_dir(workspace.path("new")).unwrap();
    let new = workspace.output(&format!("sync export {export} new/weight_v000001"));
    assert!(old.status.success() && old.stdout == new.stdout, "{old:?} {new:?}");
    for name in ["model-00000-of-00001.safetensors", "model.safetensors.index.json"] {
        let [old, new] = ["", "new/"].map(|folder| workspace.path(&format!("{folder}weight_v000001/{name}")));
        assert!(fs::read(old).unwrap() == fs::read(new).unwrap(), "{name}");
    }
    let applied = workspace.output(&format!("convert weight_v000001 --base {base} --to checkpoint -o applied"));
    assert_snapshot!(String::from_utf8_lossy(&[old.stderr, applied.stderr].concat()), @r"
    warning: `convert --to weight-sync` is deprecated, and the next release removes it: use `sync export`
    warning: `convert --to checkpoint` is deprecated, and the next release removes it: use `sync apply`
    ");
    workspace.stdout(&format!("sync apply weight_v000001 --base {base} -o new/applied"));
    assert!(workspace.output("diff applied new/applied").status.success());
    assert_snapshot!(workspace.run("convert applied --to weight-sync -o weight_v000002"), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: `convert --to weight-sync` is deprecated, and the next release removes it: use `sync export`
    error: --to weight-sync needs --base, the checkpoint that the servers have
    ");
    assert_snapshot!(workspace.run("convert weight_v000001 --base applied --to checkpoint --encoding xor -o twice"), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: `convert --to checkpoint` is deprecated, and the next release removes it: use `sync apply`
    error: --to checkpoint reads the encoding, the checksum and the versions from the update itself
    ");
    assert_snapshot!(workspace.run("convert [FIXTURES]/tiny-llama-adapter.safetensors --to npz --encoding xor -o a.npz"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: --encoding, --checksum and --base-version belong to `sync export`
    ");
}
