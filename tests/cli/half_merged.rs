//! Changes that were cut short, and what is left of them: who may read such a checkpoint, what `recover` makes of it, what the next run
//! clears away. And failures after the work was done.

use std::{
    fs::{self, File},
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    sync::Mutex,
};

use neuroada_ckpt::{
    Context, ErrorKind, Failure, MergeInput, MergeOptions, Observer,
    internals::{
        checkpoint::{Layout, Shard, StateFolder},
        merge::{self, Journal},
    },
};

use super::{
    Workspace,
    adapters::{Bytes, PROJECTIONS, content, write_adapter, write_adapter_for},
    harness::{copy, fixtures, skip},
};

const SHARD: &str = "model-00002-of-00003.safetensors";

fn base() -> Vec<(String, Bytes)> {
    content(&fixtures().join("tiny-llama"))
}

/// A folder with adapters `a` and `b`, the checkpoint `merged` that has `a`, and what a crash in the middle of that merge leaves, in
/// place: `torn`, with one of two shards patched.
fn workspace() -> Workspace {
    let workspace = Workspace::new();
    write_adapter(&workspace, "a", PROJECTIONS, 0, 0.01);
    write_adapter(&workspace, "b", "q_proj.weight", 1, -0.5);
    copy(&fixtures().join("tiny-llama"), &workspace.path("merged"));
    workspace.stdout("merge merged --adapter a --in-place");
    tear(&workspace, "torn");
    workspace
}

fn tear(workspace: &Workspace, name: &str) {
    let torn = workspace.path(name);
    copy(&fixtures().join("tiny-llama"), &torn);
    copy(&workspace.path("merged").join(SHARD), &torn.join(SHARD));
    fs::create_dir(torn.join(".neuroada")).unwrap();
    copy(&workspace.path("merged/.neuroada/adapters"), &torn.join(".neuroada/adapters"));
    copy(&workspace.path("merged/.neuroada/ledger"), &torn.join(".neuroada/ledger.new"));
    let ledger = Shard::open(&torn.join(".neuroada/ledger.new")).unwrap().header_json().unwrap();
    Journal::new(None, blake3::hash(&ledger)).write(&StateFolder::at(&torn, Layout::Folder).unwrap()).unwrap();
}

/// Runs a line that ends with this code and changes nothing.
fn unchanged(workspace: &Workspace, code: i32, line: &str) -> String {
    let before = workspace.tree();
    let told = workspace.run(line);
    assert!(told.starts_with(&format!("exit: {code}\n")), "{line}\n{told}");
    assert_eq!(workspace.tree(), before, "{line}");
    told
}

#[test]
fn nobody_reads_a_half_merged_checkpoint() {
    let workspace = workspace();
    for line in [
        "mask [FIXTURES]/tiny-llama --k 1 -o mask",
        "sync export a --base [FIXTURES]/tiny-llama -o weight_v000001",
        "pack a -o packed",
        "convert a --to npz -o a.npz",
    ] {
        workspace.stdout(line);
    }
    copy(&workspace.path("torn").join(SHARD), &workspace.path("copy-of-shard"));
    symlink("torn", workspace.path("alias")).unwrap();
    fs::create_dir(workspace.path("links")).unwrap();
    for (name, _) in base() {
        symlink(format!("../torn/{name}"), workspace.path(&format!("links/{name}"))).unwrap();
    }
    let data = "--data [FIXTURES]/data/commonsense.jsonl";
    for torn in ["torn", &format!("torn/{SHARD}"), "alias", &format!("alias/{SHARD}"), &format!("links/{SHARD}")] {
        let mut lines = vec![
            format!("mask {torn} --k 1 -o x"),
            format!("mask {torn} --k 1 --dry-run"),
            format!("mask merged --score gradient --gradients {torn} --k 1 -o x"),
            format!("mask {torn} --k 1 --partition 1/2 -o x"),
            format!("init {torn} --mask mask -o x"),
            format!("extract {torn} merged -o x"),
            format!("extract merged {torn} -o x"),
            format!("diff {torn} merged"),
            format!("diff merged {torn}"),
            format!("convert a.npz --base {torn} --to neuroada -o x"),
            format!("convert a --base {torn} --to shira -o x"),
            format!("sync export a --base {torn} -o weight_v000002"),
            format!("sync export {torn} --base merged -o weight_v000002"),
            format!("sync export merged --base {torn} -o weight_v000002"),
            format!("sync apply weight_v000001 --base {torn} -o x"),
            format!("pack a --base {torn} -o x"),
            format!("unpack packed --base {torn} -o x"),
            format!("combine a b --base {torn} -o x"),
            format!("merge {torn} --adapter b -o x"),
            format!("merge {torn} --adapter b --dry-run -o x"),
            format!("merge {torn} --adapter a.npz -o x"),
            format!("unmerge {torn} -o x"),
            format!("verify {torn}"),
            format!("verify merged --base {torn}"),
        ];
        if cfg!(feature = "train") {
            lines.push(format!("eval {torn} {data}"));
            lines.push(format!("train {torn} -k 1 {data} -o x"));
            lines.push(format!("train {torn} -k 1 {data} -o x --dry-run"));
        }
        for line in &lines {
            let told = unchanged(&workspace, 6, line);
            assert!(
                told.contains(": a change was interrupted and waits for `recover`\nhint: neuroada-ckpt recover "),
                "{line}\n{told}"
            );
        }
        let told = unchanged(&workspace, 0, &format!("inspect {torn}"));
        assert!(told.starts_with("exit: 0\n--- stdout\nINTERRUPTED: a change was interrupted and"), "{told}");
        assert!(workspace.json(&format!("inspect {torn}"))["interrupted"].is_string());
    }
}

#[test]
fn a_change_in_place_recovers_first_and_reports_that() {
    let workspace = workspace();
    tear(&workspace, "torn2");
    let told = workspace.run("merge torn --adapter b --in-place");
    assert!(told.starts_with("exit: 0") && told.contains("an interrupted change was recovered first"), "{told}");
    workspace.stdout("verify torn --base [FIXTURES]/tiny-llama");
    workspace.stdout("unmerge torn");
    assert_eq!(content(&workspace.path("torn")), base());
    let document = workspace.json("merge torn2 --adapter b --in-place");
    assert!(document["notes"].to_string().contains("an interrupted change was recovered first"), "{document}");
    workspace.stdout("unmerge torn2");
    assert_eq!(content(&workspace.path("torn2")), base());
}

#[test]
fn weights_that_cannot_be_put_back_are_said_so_and_nothing_is_deleted() {
    let workspace = workspace();
    fs::remove_file(workspace.path("torn/.neuroada/ledger.new")).unwrap();
    for line in ["recover torn", "merge torn --adapter b --in-place", "unmerge torn"] {
        let told = unchanged(&workspace, 3, line);
        assert!(told.contains("error: torn/.neuroada/ledger.new: is missing: a change was interrupted"), "{told}");
    }
    unchanged(&workspace, 6, "verify torn");

    // Without its journal, `ledger.new` says enough.
    tear(&workspace, "torn2");
    fs::remove_file(workspace.path("torn2/.neuroada/txn")).unwrap();
    unchanged(&workspace, 6, "mask torn2 --k 1 -o x");
    workspace.stdout("recover torn2");
    assert_eq!(content(&workspace.path("torn2")), base());
    assert!(!workspace.path("torn2/.neuroada").exists());
}

#[test]
fn a_state_folder_that_cannot_be_entered_is_an_error() {
    let workspace = workspace();
    workspace.stdout("mask [FIXTURES]/tiny-llama --k 1 -o mask");
    copy(&fixtures().join("tiny-llama"), &workspace.path("base"));
    fs::create_dir(workspace.path("out")).unwrap();
    fs::set_permissions(workspace.path("out"), PermissionsExt::from_mode(0o777)).unwrap();
    for (mode, name) in [(0o700, "merged/.neuroada"), (0o000, "torn/.neuroada")] {
        fs::set_permissions(workspace.path(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    for path in ["merged", "torn"] {
        for line in [
            format!("merge {path} --adapter b -o out/x"),
            format!("merge {path} --adapter b -o out/x --dry-run"),
            format!("merge {path} --adapter b --in-place"),
            format!("unmerge {path} -o out/x"),
            format!("verify {path}"),
            format!("mask {path} --k 1 -o out/x"),
            format!("extract base {path} -o out/x"),
            format!("inspect {path}"),
            format!("recover {path}"),
        ] {
            let Some(output) = workspace.output_of_another_user(&line, false) else { return };
            let told = workspace.told(&output);
            assert!(told.starts_with("exit: 5"), "{line}\n{told}");
            assert!(told.contains("Permission denied"), "{line}\n{told}");
            assert_eq!(fs::read_dir(workspace.path("out")).unwrap().count(), 0, "{line}");
        }
    }
}

#[test]
fn a_side_file_that_leads_nowhere_is_an_error() {
    let workspace = workspace();
    copy(&fixtures().join("tiny-llama"), &workspace.path("base"));
    fs::remove_file(workspace.path("base/tokenizer.json")).unwrap();
    symlink("gone", workspace.path("base/tokenizer.json")).unwrap();
    for line in ["merge base --adapter a -o out", "merge base --adapter a -o out --no-ledger --force"] {
        let told = unchanged(&workspace, 3, line);
        assert!(told.contains("tokenizer.json"), "{told}");
    }
    fs::rename(workspace.path("base/config.json"), workspace.path("config.json")).unwrap();
    symlink("gone", workspace.path("base/config.json")).unwrap();
    let told = unchanged(&workspace, 5, "mask base --k 1 -o out");
    assert!(told.contains("cannot read `base/config.json`"), "{told}");
}

#[test]
fn links_are_broken_on_this_side_only() {
    let workspace = workspace();
    workspace.stdout("merge [FIXTURES]/tiny-llama --adapter b -o linked-from");
    // A checkpoint made with `--link`, and names of the same files elsewhere.
    workspace.stdout("merge linked-from --adapter a -o by-link --link");
    copy(&fixtures().join("tiny-llama"), &workspace.path("mine"));
    fs::create_dir(workspace.path("others")).unwrap();
    fs::hard_link(workspace.path("mine").join(SHARD), workspace.path("others/hard")).unwrap();
    let third = "model-00003-of-00003.safetensors";
    fs::rename(workspace.path("mine").join(third), workspace.path("others/soft")).unwrap();
    symlink("../others/soft", workspace.path("mine").join(third)).unwrap();
    let others = || {
        (
            content(&workspace.path("others")),
            content(&workspace.path("linked-from")),
            content(&workspace.path("by-link")),
        )
    };
    let before = others();
    assert!(
        fs::metadata(workspace.path("by-link/model-00001-of-00003.safetensors")).unwrap().nlink() == 2,
        "by-link is linked"
    );
    // A link out of the checkpoint's folder is no shard of it.
    unchanged(&workspace, 3, "merge mine --adapter a --in-place --break-links");
    fs::remove_file(workspace.path("mine").join(third)).unwrap();
    fs::rename(workspace.path("others/soft"), workspace.path("mine/stored")).unwrap();
    fs::hard_link(workspace.path("mine/stored"), workspace.path("others/soft")).unwrap();
    symlink("stored", workspace.path("mine").join(third)).unwrap();
    unchanged(&workspace, 4, "merge mine --adapter a --in-place");
    workspace.stdout("merge mine --adapter a --in-place --break-links");
    workspace.stdout("unmerge by-link --break-links");
    let after = others();
    assert!(after.0 == before.0 && after.1 == before.1, "what others see is as it was");
    assert!(after.2 == base(), "and ours has changed");
    workspace.stdout("unmerge mine --break-links");
    let mut mine = content(&workspace.path("mine"));
    mine.retain(|(name, _)| name != "stored");
    assert!(mine == base());
}

/// Renames a file over a shard when a pass begins.
struct Replace<'a> {
    pass: &'a str,
    shard: &'a Path,
    new: Mutex<Option<&'a Path>>,
}

impl Observer for Replace<'_> {
    fn begin(&self, what: &str, _bytes: u64) {
        if what == self.pass
            && let Some(new) = self.new.lock().unwrap().take()
        {
            fs::rename(new, self.shard).unwrap();
        }
    }
}

#[test]
fn a_shard_that_is_replaced_meanwhile_is_not_patched() {
    for pass in ["checking", "patching"] {
        let workspace = workspace();
        copy(&fixtures().join("tiny-llama"), &workspace.path("c"));
        copy(&workspace.path("merged").join(SHARD), &workspace.path("new"));
        let (shard, new) = (workspace.path("c").join(SHARD), workspace.path("new"));
        let bytes = fs::read(&new).unwrap();
        let observer = Replace { pass, shard: &shard, new: Mutex::new(Some(&new)) };
        let ctx = Context { observer: &observer, ..Context::default() };
        let input = MergeInput { adapter: workspace.path("a"), scale: None };
        let error = merge::merge(&ctx, &workspace.path("c"), &[input], &MergeOptions::in_place()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{pass}: {error}");
        assert!(error.to_string().contains(SHARD), "{pass}: {error}");
        assert!(observer.new.lock().unwrap().is_none(), "{pass}: there is such a pass");
        assert!(fs::read(&shard).unwrap() == bytes, "{pass}: the new file is as it was");
        let third = "model-00003-of-00003.safetensors";
        let is_base = |name: &str| {
            fs::read(workspace.path("c").join(name)).unwrap()
                == fs::read(fixtures().join("tiny-llama").join(name)).unwrap()
        };
        assert!(is_base(third), "{pass}: the others are rolled back");
        assert!(!workspace.path("c/.neuroada").exists(), "{pass}");
    }
}

#[test]
fn two_ledgers_become_one() {
    let workspace = Workspace::new();
    copy(&fixtures().join("tiny-llama"), &workspace.path("c"));
    write_adapter(&workspace, "a", PROJECTIONS, 0, 0.01);
    write_adapter_for(&fixtures().join("tiny-llama").join(SHARD), &workspace.path("b"), "q_proj.weight", 30, 0.5);
    // The folder and one of its files, each merged into where nothing else was known of.
    copy(&workspace.path("c"), &workspace.path("whole"));
    workspace.stdout("merge whole --adapter a --in-place");
    let expected = content(&workspace.path("whole"));
    workspace.stdout(&format!("merge c/{SHARD} --adapter b --in-place"));
    let file_state = format!("c/{SHARD}.neuroada");
    fs::rename(workspace.path(&file_state), workspace.path("aside")).unwrap();
    let alone = workspace.path("c").join(SHARD);
    // Both deltas are in the shard: disjoint columns, so byte for byte the one where the other has the base's.
    let (of_a, of_b) = (fs::read(workspace.path("whole").join(SHARD)).unwrap(), fs::read(&alone).unwrap());
    let of_base = fs::read(fixtures().join("tiny-llama").join(SHARD)).unwrap();
    let both: Vec<u8> = (0..of_base.len()).map(|i| if of_a[i] == of_base[i] { of_b[i] } else { of_a[i] }).collect();
    assert!(both != of_a && both != of_b);
    copy(&workspace.path("whole"), &workspace.path("c"));
    fs::write(&alone, both).unwrap();
    fs::rename(workspace.path("aside"), workspace.path(&file_state)).unwrap();

    for line in ["merge c --adapter b --in-place", "unmerge c", &format!("unmerge c/{SHARD}"), "verify c"] {
        let told = unchanged(&workspace, 4, line);
        assert!(told.contains("recover"), "{line}\n{told}");
    }
    let told = workspace.run("recover c");
    assert!(
        told.starts_with("exit: 0\n--- stdout\none ledger: the folder and some of its files had a ledger each"),
        "{told}"
    );
    assert!(content(&workspace.path("c")) == expected);
    assert!(!workspace.path(&file_state).exists());
    workspace.stdout("verify c --base [FIXTURES]/tiny-llama");
    workspace.stdout("unmerge c");
    assert!(content(&workspace.path("c")) == base());
}

#[test]
fn one_lock_covers_a_folder_and_its_files() {
    let workspace = workspace();
    copy(&fixtures().join("tiny-llama"), &workspace.path("c"));
    let held = File::open(workspace.path("c").join(SHARD)).unwrap();
    held.try_lock().unwrap();
    for line in ["merge c --adapter a --in-place", &format!("merge c/{SHARD} --adapter b --in-place")] {
        let told = unchanged(&workspace, 4, line);
        assert!(told.contains(&format!("process {}", std::process::id())), "{line}\n{told}");
    }
    drop(held);
    workspace.stdout("merge c --adapter a --in-place");
    // Of an interrupted change too.
    let held = File::open(workspace.path("torn").join(SHARD)).unwrap();
    held.try_lock().unwrap();
    unchanged(&workspace, 4, "recover torn");
}

#[test]
fn a_report_that_cannot_be_written_does_not_undo_the_work() {
    let workspace = workspace();
    copy(&fixtures().join("tiny-llama"), &workspace.path("c"));
    let Ok(full) = File::options().write(true).open("/dev/full") else {
        skip::<()>("no /dev/full");
        return;
    };
    for (line, done) in [
        ("merge c --adapter a --in-place", "c/.neuroada/ledger"),
        ("merge c --adapter b -o both", "both/.neuroada/ledger"),
        ("mask merged --k 1 -o mask", "mask"),
        ("pack a -o packed --json", "packed"),
        ("unpack packed -o unpacked", "unpacked"),
        ("combine a -o combined", "combined"),
        ("convert a --to npz -o a.npz", "a.npz"),
        ("sync export a --base [FIXTURES]/tiny-llama -o weight_v000001", "weight_v000001"),
        ("init [FIXTURES]/tiny-llama --mask of-base -o zeros", "zeros"),
        ("extract [FIXTURES]/tiny-llama merged -o extracted", "extracted"),
        ("unmerge c", "c/config.json"),
    ] {
        if line.contains("of-base") {
            workspace.stdout("mask [FIXTURES]/tiny-llama --k 1 -o of-base");
        }
        let output = workspace.command(line).stdout(full.try_clone().unwrap()).output().unwrap();
        let told = workspace.told(&output);
        assert!(told.starts_with("exit: 5"), "{line}\n{told}");
        assert!(told.contains("error: the work is done, but its report cannot be written: "), "{line}\n{told}");
        assert!(workspace.path(done).exists(), "{line}");
    }
    assert!(content(&workspace.path("c")) == base());
    let told = workspace.told(&workspace.command("inspect c").stdout(full).output().unwrap());
    assert!(told.starts_with("exit: 5") && !told.contains("the work is done"), "{told}");
}

#[test]
fn work_that_was_done_is_told_apart_from_work_that_was_not() {
    let workspace = workspace();
    copy(&fixtures().join("tiny-llama"), &workspace.path("base"));
    workspace.write("base/extra/notes.txt", "a side file");
    workspace.stdout("merge base --adapter a -o out");
    // What is replaced cannot be removed afterwards.
    fs::set_permissions(workspace.path("out/extra"), PermissionsExt::from_mode(0o555)).unwrap();
    let Some(output) = workspace.output_of_another_user("merge base --adapter b -o out --force --json", true) else {
        return;
    };
    let told = workspace.told(&output);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}\n{told}"));
    assert_eq!(document["exit_code"], 5, "{told}");
    assert_eq!(document["committed"], true, "{told}");
    assert!(told.contains("error: out: the work is done, but it was not possible to "), "{told}");
    workspace.stdout("unmerge out -o undone");
    assert!(content(&workspace.path("undone")) == base());
    fs::set_permissions(workspace.path(".out.neuroada-partial/extra"), PermissionsExt::from_mode(0o755)).unwrap();
}

#[test]
fn errors_are_one_json_document() {
    let workspace = workspace();
    for (line, code, error, hint) in [
        (
            "verify torn",
            6,
            "torn: a change was interrupted and waits for `recover`",
            Some("neuroada-ckpt recover torn"),
        ),
        ("merge merged --adapter b -o merged --force", 4, "merged: the output is an input: merged", None),
        ("inspect nowhere", 5, "cannot open `nowhere`: No such file or directory (os error 2)", None),
        ("verify a", 4, "", None),
    ] {
        let output = workspace.output(&format!("{line} --json"));
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let keys: Vec<&String> = document.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["error", "hint", "exit_code", "committed"], "{document}");
        assert_eq!(output.status.code(), document["exit_code"].as_i64().map(|code| code as i32), "{document}");
        if error.is_empty() {
            continue;
        }
        assert_eq!((&document["exit_code"], &document["committed"]), (&code.into(), &false.into()), "{document}");
        assert_eq!(document["error"], error);
        assert!(hint.is_none() || document["hint"].as_str() == hint, "{document}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.starts_with(&format!("error: {error}\n")), "{stderr}");
    }
}

#[test]
fn what_a_killed_run_left_is_cleared_and_nothing_else() {
    let workspace = workspace();
    copy(&fixtures().join("tiny-llama"), &workspace.path("c"));
    // Leftovers under every temporary name, and a user's files with names alike.
    workspace.write(".out.neuroada-partial/model-00001-of-00003.safetensors", "cut short");
    workspace.write(".out.neuroada-partial/.neuroada/adapters/x", "cut short");
    workspace.write(".mask.neuroada-tmp", "cut short");
    workspace.write(".one.neuroada-partial/model.safetensors", "cut short");
    workspace.write("c/.neuroada/.ledger.new.neuroada-tmp", "cut short");
    workspace.write("c/.neuroada/.neuroada-Xq1z.tmp", "cut short, by an earlier version");
    let stale = format!("c/.neuroada/adapters/{}.safetensors", "0".repeat(64));
    workspace.write(&stale, "cut short");
    workspace.write("c/.neuroada/adapters/.x.neuroada-tmp", "cut short");
    let mine = [
        ".other.neuroada-tmp",
        ".out2.neuroada-partial/x",
        "out.neuroada-partial",
        "c/.neuroada/thesis.tex",
        "c/.neuroada/adapters/thesis.tex",
        "c/.model-00002-of-00003.safetensors.neuroada-tmp.bak",
    ];
    for file in mine {
        workspace.write(file, "mine");
    }
    copy(&fixtures().join("accepted/adapter-base.safetensors"), &workspace.path("one-base"));
    write_adapter_for(&workspace.path("one-base"), &workspace.path("of-one"), "proj.weight", 3, 1.0);
    workspace.stdout("mask merged --k 1 -o mask");
    workspace.stdout("merge merged --adapter b -o out");
    workspace.stdout("merge one-base --adapter of-one -o one");
    workspace.stdout("merge c --adapter a --in-place");
    let left: Vec<String> =
        workspace.files().into_iter().filter(|file| file.contains("neuroada-") || file == &stale).collect();
    let mut expected: Vec<String> =
        mine.iter().map(|file| (*file).to_owned()).filter(|file| file.contains("neuroada-")).collect();
    expected.sort();
    assert_eq!(left, expected);
    workspace.stdout("unmerge c");
    for file in mine {
        assert_eq!(fs::read(workspace.path(file)).unwrap(), b"mine", "{file}");
    }
    assert!(content(&workspace.path("c")).iter().filter(|(name, _)| !name.contains("neuroada")).cloned().eq(base()));
}

#[test]
fn a_ledger_that_no_journal_speaks_of_is_rolled_back() {
    let workspace = workspace();
    copy(&fixtures().join("tiny-llama"), &workspace.path("c"));
    copy(&workspace.path("torn/.neuroada"), &workspace.path("c/.neuroada"));
    fs::remove_file(workspace.path("c/.neuroada/txn")).unwrap();
    let told = workspace.run("merge c --adapter b --in-place");
    assert!(told.starts_with("exit: 0"), "{told}");
    workspace.stdout("verify c --base [FIXTURES]/tiny-llama");
    workspace.stdout("unmerge c");
    assert!(content(&workspace.path("c")) == base() && !workspace.path("c/.neuroada").exists());
}

#[test]
fn a_refused_change_leaves_no_state_behind() {
    let workspace = workspace();
    copy(&fixtures().join("tiny-llama"), &workspace.path("c"));
    let (_, Bytes(mut other)) = base().into_iter().find(|(name, _)| name == SHARD).unwrap();
    let end = other.len();
    other[end - 4096..].fill(1);
    fs::write(workspace.path("c").join(SHARD), other).unwrap();
    for line in ["merge c --adapter a --in-place", "merge c --adapter a -o out"] {
        unchanged(&workspace, 4, line);
    }
    // Nor does one that fails between the new ledger and the journal.
    copy(&fixtures().join("tiny-llama"), &workspace.path("d"));
    fs::create_dir_all(workspace.path("d/.neuroada/.txn.neuroada-tmp")).unwrap();
    let told = unchanged(&workspace, 4, "merge d --adapter a --in-place");
    assert!(told.contains("its temporary name .txn.neuroada-tmp is a folder"), "{told}");
}
