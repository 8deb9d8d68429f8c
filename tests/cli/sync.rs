use insta::assert_snapshot;

use crate::harness::Workspace;

#[test]
fn weight_sync_folders_are_written_and_applied() {
    let workspace = Workspace::new();
    let base = workspace.copy_fixture("tiny-llama");
    let base = base.file_name().unwrap().to_str().unwrap().to_owned();
    assert_snapshot!(
        workspace.run(&format!("sync export [FIXTURES]/tiny-llama-adapter.safetensors --base {base} -o weight_v000001")),
        @r"
        exit: 0
        --- stdout
        version   1, from 0 (tiny-llama)
        changed   14 tensors, 7 others are equal
        bytes     2,425 changed, 1.32 % of those tensors
        encoding  overwrite, zstd, xxh3-128
        wrote     12.8 kB
        --- stderr
        "
    );
    assert_snapshot!(workspace.run(&format!("sync apply weight_v000001 --base {base} -o applied")), @r"
    exit: 0
    --- stdout
    version   1, from 0 (tiny-llama)
    changed   14 tensors, 7 others are equal
    bytes     2,425 changed, 1.32 % of those tensors
    encoding  overwrite, zstd, xxh3-128
    wrote     255 kB
    --- stderr
    ");
    workspace.stdout(&format!("merge {base} --adapter [FIXTURES]/tiny-llama-adapter.safetensors -o merged"));
    assert!(workspace.output("diff merged applied").status.success());
    workspace.stdout(&format!("sync export applied --base {base} --encoding xor --checksum blake3 -o weight_v000007"));
    assert_snapshot!(workspace.run("sync apply weight_v000007 --base applied -o twice"), @r#"
    exit: 4
    --- stdout
    --- stderr
    error: weight_v000007: tensor "model.layers.0.mlp.down_proj.weight": the base has the new bytes already: the delta was applied to it before
    "#);
    assert_snapshot!(workspace.run(&format!("sync export applied --base {base} -o delta")), @r#"
    exit: 2
    --- stdout
    --- stderr
    error: "delta": servers read folders named weight_vNNNNNN, such as weight_v000001; the number is the version
    "#);
    assert_snapshot!(workspace.run("sync export applied -o weight_v000002"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the following required arguments were not provided:
      --base <BASE>

    Usage: neuroada-ckpt sync export --base <BASE> --output <PATH> <INPUT>

    For more information, try '--help'.
    ");
}
