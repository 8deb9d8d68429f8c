//! Outputs that would destroy what is the user's: inputs, strangers' files, links, devices, derived files. Every command that writes, all
//! refused with exit code 4, and not one file changed.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use super::{
    Workspace,
    adapters::{PROJECTIONS, content, write_adapter, write_adapter_for},
    harness::{fixtures, skip},
    low_rank::write_lora,
};

/// What a command writes.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Writes {
    File,
    Folder,
}
use Writes::{File, Folder};

/// Every command that writes, what it writes, and the inputs it names.
const COMMANDS: &[(&str, Writes, &[&str])] = &[
    ("mask in/base --k 1", File, &["base"]),
    ("mask in/base --k 1 --score gradient --gradients in/merged", File, &["base", "merged"]),
    ("mask-join in/p1 in/p2", File, &["p1", "p2"]),
    ("init in/base --mask in/mask2 --values in/values", File, &["base", "mask2", "values"]),
    ("extract in/base in/merged", File, &["base", "merged"]),
    ("pack in/a --base in/base", File, &["a", "base"]),
    ("unpack in/packed", File, &["packed"]),
    ("combine in/a=0.5 in/b=0.5 --base in/base", File, &["a", "b", "base"]),
    ("convert in/shira --base in/base --to neuroada", File, &["shira", "base"]),
    ("convert in/a --to npz", File, &["a"]),
    ("convert in/a --to published", Folder, &["a"]),
    ("convert in/a --to shira", Folder, &["a"]),
    ("convert in/a --to supertuning", Folder, &["a"]),
    ("convert in/a --to spiel", Folder, &["a"]),
    ("sync apply in/weight_v000001 --base in/base", Folder, &["weight_v000001", "base"]),
    ("merge in/base --adapter in/a=2", Folder, &["base", "a"]),
    ("merge in/base --adapter in/shira", Folder, &["base", "shira"]),
    ("merge in/base --adapter in/lora", Folder, &["base", "lora"]),
    ("merge in/one --adapter in/of-one", File, &["one", "of-one"]),
    ("unmerge in/merged", Folder, &["merged"]),
    ("unmerge in/merged-lora --base in/base", Folder, &["merged-lora", "base"]),
    ("unmerge in/merged-one", File, &["merged-one"]),
];

/// A folder with an input of every kind under `in`.
fn inputs() -> Workspace {
    let workspace = Workspace::new();
    fs::create_dir(workspace.path("in")).unwrap();
    let base = workspace.copy_fixture("tiny-llama");
    fs::rename(&base, workspace.path("in/base")).unwrap();
    write_adapter(&workspace, "in/a", PROJECTIONS, 0, 0.01);
    write_adapter(&workspace, "in/b", PROJECTIONS, 1, 0.02);
    write_lora(&workspace, "in/lora", 0.01);
    fs::copy(fixtures().join("accepted/adapter-base.safetensors"), workspace.path("in/one")).unwrap();
    write_adapter_for(&workspace.path("in/one"), &workspace.path("in/of-one"), "proj.weight", 3, 1.0);
    for line in [
        "mask in/base --k 1 -o in/mask",
        "mask in/base --k 2 -o in/mask2",
        "mask in/base --k 1 --partition 1/2 -o in/p1",
        "mask in/base --k 1 --partition 2/2 -o in/p2",
        "pack in/a -o in/packed",
        "convert in/a --to shira -o in/shira",
        "sync export in/a --base in/base -o in/weight_v000001",
        "merge in/base --adapter in/b -o in/merged",
        "merge in/base --adapter in/lora -o in/merged-lora",
        "merge in/one --adapter in/of-one -o in/merged-one",
    ] {
        workspace.stdout(line);
    }
    fs::copy(fixtures().join("tiny-llama-values.safetensors"), workspace.path("in/values")).unwrap();
    symlink("in", workspace.path("alias")).unwrap();
    symlink("in/base", workspace.path("base-alias")).unwrap();
    fs::create_dir(workspace.path("links")).unwrap();
    workspace
}

/// Runs a line that must be refused, and must change nothing.
fn refused(workspace: &Workspace, line: &str) -> String {
    let before = workspace.tree();
    let told = workspace.run(line);
    assert!(told.starts_with("exit: 4"), "{line}\n{told}");
    assert_eq!(workspace.tree(), before, "{line}");
    told
}

#[test]
fn no_output_is_holds_or_lies_in_an_input() {
    let workspace = inputs();
    for input in fs::read_dir(workspace.path("in")).unwrap() {
        let path = input.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_file() {
            fs::hard_link(&path, workspace.path(&format!("links/{name}"))).unwrap();
        } else {
            let mut files = fs::read_dir(&path).unwrap().map(|file| file.unwrap().path());
            let shard = files.find(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
            if let Some(shard) = shard {
                fs::hard_link(shard, workspace.path(&format!("links/{name}"))).unwrap();
            }
        }
    }
    for (command, writes, inputs) in COMMANDS {
        for input in *inputs {
            let is_folder = workspace.path(&format!("in/{input}")).is_dir();
            let mut outputs = vec![format!("in/{input}"), format!("alias/{input}"), format!("alias/../in/./{input}")];
            if is_folder {
                outputs.push(format!("in/{input}/new"));
                outputs.push(format!("alias/{input}/new"));
                outputs.push(format!("in/{input}/config.json"));
            }
            match writes {
                File => outputs.push(format!("links/{input}")),
                Folder => outputs.push("in".to_owned()),
            }
            for output in outputs {
                let told = refused(&workspace, &format!("{command} -o {output} --force"));
                assert!(told.contains(" an input: "), "{told}");
            }
        }
    }
}

#[test]
fn weight_sync_folders_replace_no_input() {
    let workspace = inputs();
    fs::rename(workspace.path("in/base"), workspace.path("in/weight_v000007")).unwrap();
    fs::create_dir(workspace.path("weight_v000007")).unwrap();
    fs::rename(workspace.path("in/a"), workspace.path("weight_v000007/a")).unwrap();
    let convert = |input: &str, base: &str| format!("sync export {input} --base {base} --force -o");
    let line = convert("weight_v000007/a", "in/weight_v000007");
    for output in ["in/weight_v000007", "alias/weight_v000007", "in/weight_v000007/weight_v000007", "weight_v000007"] {
        refused(&workspace, &format!("{line} {output}"));
    }
}

#[test]
fn a_model_card_replaces_no_input() {
    let workspace = inputs();
    fs::create_dir(workspace.path("cards")).unwrap();
    fs::rename(workspace.path("in/a"), workspace.path("cards/README.md")).unwrap();
    let told = refused(&workspace, "pack cards/README.md --card --force -o cards/packed");
    assert!(told.contains("error: cards/README.md: the output is an input"), "{told}");
    fs::rename(workspace.path("cards/README.md"), workspace.path("in/a")).unwrap();
    workspace.write("cards/README.md", "mine");
    let told = refused(&workspace, "pack in/a --card -o cards/packed");
    assert!(told.contains("error: cards/README.md exists already"), "{told}");
    refused(&workspace, "pack in/a --base in/base --card --force -o in/base/packed");
}

#[test]
fn no_output_lies_in_the_state_of_another_checkpoint() {
    let workspace = inputs();
    symlink("in/merged/.neuroada", workspace.path("state-alias")).unwrap();
    for output in [
        "in/merged/.neuroada/ledger",
        "in/merged/.neuroada/txn",
        "in/merged/.neuroada/new",
        "in/merged/.neuroada/adapters/new",
        "in/merged-one.neuroada/ledger",
        "state-alias/ledger",
        ".neuroada",
    ] {
        for command in ["mask in/base --k 1", "convert in/a --to shira", "merge in/one --adapter in/of-one"] {
            for force in ["", " --force"] {
                let told = refused(&workspace, &format!("{command} -o {output}{force}"));
                assert!(told.contains("would lie in the state folder that unmerge needs"), "{told}");
            }
        }
    }
    // The suffix alone is nobody's.
    fs::create_dir(workspace.path("mine.neuroada")).unwrap();
    workspace.stdout("mask in/base --k 1 -o mine.neuroada/mask");
    workspace.stdout("mask in/base --k 1 -o mask.neuroada");
}

#[test]
fn a_snapshot_of_a_hub_cache_keeps_its_blobs() {
    let workspace = Workspace::new();
    let snapshot = "hub/models--x--tiny/snapshots/abc";
    fs::create_dir_all(workspace.path(snapshot)).unwrap();
    fs::create_dir_all(workspace.path("hub/models--x--tiny/blobs")).unwrap();
    let mut blobs = Vec::new();
    for (i, (name, bytes)) in content(&fixtures().join("tiny-llama")).into_iter().enumerate() {
        let blob = format!("hub/models--x--tiny/blobs/{i:040x}");
        workspace.write(&blob, bytes.0);
        symlink(format!("../../blobs/{i:040x}"), workspace.path(&format!("{snapshot}/{name}"))).unwrap();
        blobs.push(blob);
    }
    write_adapter(&workspace, "a", PROJECTIONS, 0, 0.01);
    symlink(snapshot, workspace.path("snapshot")).unwrap();
    for base in [snapshot, "snapshot"] {
        for blob in &blobs {
            refused(&workspace, &format!("mask {base} --k 1 -o {blob} --force"));
            refused(&workspace, &format!("pack a --base {base} -o {blob} --force"));
        }
        for folder in ["hub", "hub/models--x--tiny", "hub/models--x--tiny/blobs", "hub/models--x--tiny/snapshots"] {
            refused(&workspace, &format!("merge {base} --adapter a -o {folder} --force"));
        }
        refused(&workspace, &format!("mask {base} --k 1 -o {base}/model-00001-of-00003.safetensors --force"));
        refused(&workspace, &format!("merge {base} --adapter a --in-place"));
    }
}

#[test]
fn force_replaces_what_this_program_wrote_and_nothing_else() {
    let workspace = inputs();
    // A checkpoint of the user's, made with other tools.
    fs::create_dir_all(workspace.path("out/.git")).unwrap();
    for file in [".git/HEAD", "notes.txt", "checkpoint-500/optimizer.pt", "config.json", "model.safetensors"] {
        workspace.write(&format!("out/{file}"), "mine");
    }
    for (command, _, _) in COMMANDS.iter().filter(|(_, writes, _)| *writes == Folder) {
        let told = refused(&workspace, &format!("{command} -o out --force"));
        for kept in [".git/", "checkpoint-500/", "notes.txt"] {
            assert!(told.contains(&format!("\n  {kept}\n")), "{command}: {kept}\n{told}");
        }
    }
    // Its own, with everything that it wrote; and names that the new one has too.
    workspace.stdout("merge in/base --adapter in/a -o own");
    workspace.stdout("merge in/base --adapter in/b -o own --force");
    assert_eq!(content(&workspace.path("own")), content(&workspace.path("in/merged")));
    workspace.stdout("convert in/a --to shira -o own --force");
    let names: Vec<String> = content(&workspace.path("own")).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors"], "all of the merge went");
    workspace.stdout("convert in/b --to shira -o own --force");
    // One file of the user's among them is enough.
    workspace.stdout("merge in/base --adapter in/a -o own2");
    workspace.write("own2/notes.txt", "mine");
    let told = refused(&workspace, "merge in/base --adapter in/b -o own2 --force");
    assert!(told.ends_with(":\n  notes.txt\nhint: move them away, or choose another output path\n"), "{told}");
    workspace.write("own2/.neuroada/notes.txt", "mine");
    fs::remove_file(workspace.path("own2/notes.txt")).unwrap();
    let told = refused(&workspace, "merge in/base --adapter in/b -o own2 --force");
    assert!(told.contains("\n  .neuroada/notes.txt\n"), "{told}");
}

#[test]
fn links_fifos_and_devices_are_never_replaced() {
    let workspace = inputs();
    workspace.write("precious", "mine");
    fs::create_dir(workspace.path("precious-folder")).unwrap();
    for (to, name) in [("precious", "link"), ("precious-folder", "folder-link"), ("nowhere", "dangling")] {
        symlink(to, workspace.path(name)).unwrap();
    }
    let mut special = vec!["link", "folder-link", "dangling"];
    let make = |arguments: &[&str]| {
        let made = Command::new(arguments[0])
            .args(&arguments[1..])
            .current_dir(workspace.path(""))
            .stderr(Stdio::null())
            .status();
        made.is_ok_and(|status| status.success())
    };
    match make(&["mkfifo", "fifo"]) {
        true => special.push("fifo"),
        false => _ = skip::<()>("no mkfifo"),
    }
    match make(&["mknod", "device", "c", "1", "3"]) {
        true => special.push("device"),
        false => _ = skip::<()>("no device can be made"),
    }
    for (command, _, _) in COMMANDS {
        for output in &special {
            for force in ["", " --force"] {
                let told = refused(&workspace, &format!("{command} -o {output}{force}"));
                assert!(told.contains("; an output never replaces one"), "{told}");
            }
        }
    }
    for output in ["folder-link/", "folder-link/.", "dangling/", "./link/"] {
        for command in ["merge in/base --adapter in/a", "mask in/base --k 1"] {
            refused(&workspace, &format!("{command} -o {output} --force"));
        }
    }
    let told = refused(&workspace, "mask in/base --k 1 -o /dev/null --force");
    assert!(told.contains("is a device, a fifo or a socket"), "{told}");
}

#[test]
fn links_in_the_place_of_state_and_temporary_names_are_refused() {
    let workspace = inputs();
    workspace.write("victim/thesis.tex", "mine");
    let merged = format!("victim/{}.safetensors", "0".repeat(64));
    workspace.write(&merged, "mine, whatever its name");
    let link = |to: &str, at: &str| symlink(workspace.path(to), workspace.path(at)).unwrap();
    let unlink = |at: &str| fs::remove_file(workspace.path(at)).unwrap();

    // In place: the state folder, and the folder inside it.
    link("victim", "in/base/.neuroada");
    for line in ["merge in/base --adapter in/a --in-place", "unmerge in/base", "verify in/base", "recover in/base"] {
        let told = refused(&workspace, line);
        assert!(told.contains("this program never follows one to its state"), "{told}");
    }
    unlink("in/base/.neuroada");
    fs::create_dir(workspace.path("in/base/.neuroada")).unwrap();
    link("victim", "in/base/.neuroada/adapters");
    let told = refused(&workspace, "merge in/base --adapter in/a --in-place");
    assert!(told.contains("error: in/base/.neuroada/adapters: is a link"), "{told}");
    fs::remove_dir_all(workspace.path("in/base/.neuroada")).unwrap();
    fs::rename(workspace.path("in/merged/.neuroada/adapters"), workspace.path("adapters")).unwrap();
    link("adapters", "in/merged/.neuroada/adapters");
    for line in ["unmerge in/merged", "merge in/merged --adapter in/a --in-place"] {
        refused(&workspace, line);
    }
    link("victim", "in/one.neuroada");
    refused(&workspace, "merge in/one --adapter in/of-one --in-place");
    unlink("in/one.neuroada");

    // Out of place: what grows, under its temporary name.
    for (command, writes, _) in COMMANDS.iter().filter(|(command, _, _)| !command.contains("in/merged")) {
        let is_checkpoint = command.starts_with("merge") || command.starts_with("unmerge");
        let suffix = if *writes == File && !is_checkpoint { "tmp" } else { "partial" };
        let name = format!(".out.neuroada-{suffix}");
        link(if suffix == "tmp" { "victim/thesis.tex" } else { "victim" }, &name);
        for force in ["", " --force"] {
            let told = refused(&workspace, &format!("{command} -o out{force}"));
            assert!(told.contains("link"), "{told}");
        }
        unlink(&name);
    }
    link("victim", ".o.neuroada-partial");
    refused(&workspace, "merge in/base --adapter in/a -o o --resume");
    unlink(".o.neuroada-partial");
    assert_eq!(fs::read(workspace.path("victim/thesis.tex")).unwrap(), b"mine");
    assert!(workspace.path(&merged).exists());
}

#[test]
fn a_replaced_single_file_has_its_own_ledger() {
    let workspace = inputs();
    let base = fs::read(workspace.path("in/one")).unwrap();
    write_adapter_for(&workspace.path("in/one"), &workspace.path("in/of-one-2"), "proj.weight", 5, 2.0);
    let merge = |adapter: &str, output: &str| format!("merge in/one --adapter in/{adapter} -o {output}");
    workspace.stdout(&merge("of-one", "m"));
    workspace.stdout(&format!("{} --force", merge("of-one-2", "m")));
    workspace.stdout("verify m --base in/one");
    let active = &workspace.json("inspect m")["merges"]["active"];
    assert_eq!(active.as_array().unwrap().len(), 1, "{active}");
    workspace.stdout("unmerge m -o undone");
    assert_eq!(fs::read(workspace.path("undone")).unwrap(), base);
    // Without a ledger: the old one goes with the old file.
    workspace.stdout(&format!("{} --force --no-ledger", merge("of-one", "m")));
    assert!(!workspace.path("m.neuroada").exists());

    // Somebody's own files in its state folder are no ledger's.
    workspace.stdout(&format!("{} --force", merge("of-one", "m")));
    workspace.write("m.neuroada/thesis.tex", "mine");
    let told = refused(&workspace, &format!("{} --force", merge("of-one-2", "m")));
    assert!(told.contains("m.neuroada: contains files that this program did not write"), "{told}");
    assert!(told.contains("\n  thesis.tex\n"), "{told}");
    // A plain file never takes the place of a merged checkpoint: its ledger would speak for another file.
    let told = refused(&workspace, "mask in/base --k 1 -o m --force");
    assert!(told.contains("a merged checkpoint with a ledger"), "{told}");
}

#[test]
fn a_replacement_cut_short_waits_for_recovery() {
    let workspace = inputs();
    write_adapter_for(&workspace.path("in/one"), &workspace.path("in/of-one-2"), "proj.weight", 5, 2.0);
    for (adapter, output) in [("of-one", "old"), ("of-one-2", "new")] {
        workspace.stdout(&format!("merge in/one --adapter in/{adapter} -o {output}"));
    }
    let files = |name: &str| {
        let ledger = fs::read(workspace.path(&format!("{name}.neuroada/ledger"))).unwrap();
        (fs::read(workspace.path(name)).unwrap(), ledger)
    };
    let (old, new) = (files("old"), files("new"));
    for is_named in [false, true] {
        // What a crash leaves: the new ledger has its place, the new file has it or not.
        let partial = workspace.path(".m.neuroada-partial");
        fs::create_dir(&partial).unwrap();
        let copy = |from: &str, to: &Path| super::harness::copy(&workspace.path(from), to);
        copy("new.neuroada", &workspace.path("m.neuroada"));
        workspace.write("m.neuroada/replacing", "");
        copy("old.neuroada", &partial.join("model.safetensors.neuroada"));
        copy(if is_named { "new" } else { "old" }, &workspace.path("m"));
        if !is_named {
            copy("new", &partial.join("model.safetensors"));
        }
        for line in [
            "mask m --k 1 -o x",
            "verify m",
            "unmerge m -o x",
            "diff m in/one",
            "merge m --adapter in/of-one -o x",
            "merge in/one --adapter in/of-one -o m --force",
        ] {
            let before = workspace.tree();
            let told = workspace.run(line);
            assert!(told.starts_with("exit: 6"), "{line}\n{told}");
            assert!(told.ends_with("hint: neuroada-ckpt recover m\n"), "{line}\n{told}");
            assert_eq!(workspace.tree(), before, "{line}");
        }
        workspace.stdout("recover m");
        assert!(files("m") == if is_named { new.clone() } else { old.clone() });
        assert!(!partial.exists());
        workspace.stdout("verify m --base in/one");
        workspace.stdout("unmerge m");
        assert_eq!(fs::read(workspace.path("m")).unwrap(), fs::read(workspace.path("in/one")).unwrap());
        fs::remove_file(workspace.path("m")).unwrap();
        assert!(!workspace.path("m.neuroada").exists());
    }
}

#[cfg(feature = "train")]
#[test]
fn log_and_picture_of_training_are_outputs_too() {
    let workspace = inputs();
    workspace.write("rows.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n");
    let train = |data: &str, more: &str| {
        format!("train in/base -k 1 --data {data} --max-steps 1 --batch-tokens 64 --max-length 64 -q {more}")
    };
    for file in ["ad.log.jsonl", "ad.loss.svg"] {
        workspace.write(file, "mine");
        let told = refused(&workspace, &train("rows.jsonl", "-o ad.safetensors"));
        assert!(told.contains(&format!("error: {file} exists already")), "{told}");
        fs::remove_file(workspace.path(file)).unwrap();
        symlink("precious", workspace.path(file)).unwrap();
        refused(&workspace, &train("rows.jsonl", "-o ad.safetensors --force"));
        fs::remove_file(workspace.path(file)).unwrap();
    }
    fs::rename(workspace.path("rows.jsonl"), workspace.path("d.log.jsonl")).unwrap();
    for force in ["", " --force"] {
        let told = refused(&workspace, &train("d.log.jsonl", &format!("-o d.safetensors{force}")));
        assert!(told.contains("d.log.jsonl: the output is an input"), "{told}");
    }
    fs::copy(workspace.path("d.log.jsonl"), workspace.path("e.log.jsonl")).unwrap();
    let eval = train("d.log.jsonl", "--eval-data e.log.jsonl -o e.safetensors --force");
    refused(&workspace, &eval);
    fs::rename(workspace.path("in/mask"), workspace.path("f.state.safetensors")).unwrap();
    let masked = train("d.log.jsonl", "-o f.safetensors --force").replace("-k 1", "--mask f.state.safetensors");
    refused(&workspace, &masked);
    for output in ["in", "in/base", "in/base/ad.safetensors"] {
        refused(&workspace, &train("d.log.jsonl", &format!("-o {output} --force")));
    }
    workspace.stdout(&train("d.log.jsonl", "-o ad.safetensors"));
    workspace.stdout(&train("d.log.jsonl", "-o ad.safetensors --force"));
}
