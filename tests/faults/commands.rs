//! Every command, and every file-system call it makes, the looks at paths included: one of them fails, and what stands afterwards is
//! the old or the new, whole.
//!
//! A rehearsal under strace counts the calls of each kind that come after the command first touches the test's folder. Then calls
//! among those are chosen, with a seed, and fail. `NEUROADA_FAULT_CYCLES=N` tries N of each kind instead of one; with a number beyond the
//! longest run of calls that is every one of them.

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use neuroada_ckpt::{Context, Dtype, Existing, internals::checkpoint::TensorFileWriter};

use super::{copy_tree, cycles, program, skipped, works};
use crate::world::{Random, tree};

/// Kinds of calls: those that look, those that read, those that change.
const CALLS: [&str; 15] = [
    "openat",
    "statx,newfstatat,fstat",
    "readlink,readlinkat",
    "getdents64",
    "flock",
    "read,pread64",
    "pwrite64,write",
    "fsync",
    "fdatasync",
    "rename,renameat,renameat2",
    "unlink,unlinkat",
    "mkdir,mkdirat",
    "linkat",
    "ftruncate",
    "copy_file_range",
];
const ERRORS: [&str; 3] = ["EIO", "EACCES", "ENOSPC"];

/// A command and where its result appears.
struct Case {
    name: &'static str,
    /// Words of the command line; the folder with the inputs is the working folder's `in`, outputs go to `out`.
    line: &'static str,
    /// The file or folder that is changed in place, instead of an output.
    in_place: Option<&'static str>,
    /// What `recover` is told beside the path of that checkpoint.
    recover: &'static str,
}

const fn case(name: &'static str, line: &'static str) -> Case {
    Case { name, line, in_place: None, recover: "" }
}

const fn in_place(name: &'static str, workspace: &'static str, line: &'static str) -> Case {
    Case { name, line, in_place: Some(workspace), recover: "" }
}

const CASES: [Case; 27] = [
    case("inspect", "inspect in/merged"),
    case("mask", "mask in/base --k 2 -o out/m.safetensors"),
    case("mask, global", "mask in/base --k 2 --scope global -o out/m.safetensors"),
    case("mask-join", "mask-join in/part0.safetensors in/part1.safetensors -o out/m.safetensors"),
    case("init", "init in/base --mask in/m.safetensors -o out/a.safetensors"),
    case("extract", "extract in/base in/merged -o out/a.safetensors"),
    case("convert to npz", "convert in/a.safetensors --to npz -o out/a.npz"),
    case("convert to shira", "convert in/a.safetensors --to shira -o out/shira"),
    case("convert to published", "convert in/a.safetensors --to published -o out/published"),
    case("convert from shira", "convert in/shira --base in/base --to neuroada -o out/a.safetensors"),
    case("weight sync", "sync export in/a.safetensors --base in/base -o out/weight_v000001"),
    case("weight sync applied", "sync apply in/weight_v000001 --base in/base -o out/updated"),
    case("merge", "merge in/base --adapter in/a.safetensors -o out/merged"),
    case("merge over", "merge in/base --adapter in/a.safetensors -o out/over --force"),
    case("merge of LoRA", "merge in/base --adapter in/lora -o out/merged"),
    case("merge of a file", "merge in/single.safetensors --adapter in/s.safetensors -o out/s.safetensors"),
    case("merge over a file", "merge in/single.safetensors --adapter in/s.safetensors -o out/over.safetensors --force"),
    case("unmerge", "unmerge in/merged -o out/undone"),
    case("verify", "verify in/merged --base in/base"),
    case("diff", "diff in/base in/merged"),
    case("combine", "combine in/a.safetensors=0.5 in/b.safetensors --base in/base -o out/c.safetensors"),
    case("pack", "pack in/a.safetensors --base in/base -o out/p.safetensors --card"),
    case("unpack", "unpack in/p.safetensors --base in/base -o out/a.safetensors"),
    case("recover", "recover in/base"),
    in_place("merge in place", "in/work", "merge in/work --adapter in/a.safetensors --in-place"),
    in_place("unmerge in place", "in/mwork", "unmerge in/mwork --in-place"),
    in_place(
        "merge of a file in place",
        "in/sw.safetensors",
        "merge in/sw.safetensors --adapter in/s.safetensors --in-place",
    ),
];

/// The changes of LoRA in place: with originals, and with the base.
const LORA_CASES: [Case; 4] = [
    in_place("merge of LoRA in place", "in/work", "merge in/work --adapter in/lora --in-place --keep-originals"),
    in_place("unmerge of LoRA in place", "in/kept", "unmerge in/kept --in-place"),
    Case {
        recover: " --base in/base",
        ..in_place(
            "merge of LoRA with the base",
            "in/work",
            "merge in/work --adapter in/lora --in-place --base in/base",
        )
    },
    Case {
        recover: " --base in/base",
        ..in_place("unmerge of LoRA with the base", "in/hashes", "unmerge in/hashes --in-place --base in/base")
    },
];

type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// The folder that commands run in, made anew before each.
struct Stage {
    _dir: tempfile::TempDir,
    root: PathBuf,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let stage = Self { _dir: dir, root };
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let input = stage.root.join("in");
        fs::create_dir(&input).unwrap();
        copy_tree(&fixtures.join("tiny-llama"), &input.join("base"));
        write_lora(&input.join("lora"));
        fs::copy(fixtures.join("tiny-llama-adapter.safetensors"), input.join("a.safetensors")).unwrap();
        fs::copy(fixtures.join("accepted/adapter-base.safetensors"), input.join("single.safetensors")).unwrap();
        fs::copy(fixtures.join("accepted/adapter-base.safetensors"), input.join("sw.safetensors")).unwrap();
        for line in [
            "mask in/base --k 2 -o in/m.safetensors",
            "mask in/base --k 2 --partition 1/2 -o in/part0.safetensors",
            "mask in/base --k 2 --partition 2/2 -o in/part1.safetensors",
            "merge in/base --adapter in/a.safetensors -o in/merged",
            "merge in/base --adapter in/a.safetensors=2 -o in/over",
            "convert in/a.safetensors --to shira -o in/shira",
            "sync export in/a.safetensors --base in/base -o in/weight_v000001",
            "pack in/a.safetensors --base in/base -o in/p.safetensors",
            "init in/base --mask in/m.safetensors -o in/b.safetensors",
            "mask in/single.safetensors --k 1 --targets * -o in/sm.safetensors",
            "init in/single.safetensors --mask in/sm.safetensors -o in/s.safetensors",
        ] {
            stage.must(line);
        }
        copy_tree(&input.join("base"), &input.join("work"));
        copy_tree(&input.join("merged"), &input.join("mwork"));
        stage.fresh_out();
        stage
    }

    /// `out` as it is before each command: results of earlier merges, to be replaced.
    fn fresh_out(&self) {
        let out = self.root.join("out");
        let _may_be_absent = fs::remove_dir_all(&out);
        fs::create_dir(&out).unwrap();
        copy_tree(&self.root.join("in/over"), &out.join("over"));
        self.must("merge in/single.safetensors --adapter in/s.safetensors=2 -o out/over.safetensors");
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(program());
        command.args(["--threads", "1"]).args(line.split(' ')).current_dir(&self.root).stdin(Stdio::null());
        command
    }

    fn must(&self, line: &str) {
        let output = self.command(line).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The command under strace; `inject` says which call fails.
    fn traced(&self, line: &str, calls: &str, inject: Option<String>) -> std::process::Output {
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", &self.log().display().to_string(), "-e", &format!("trace={calls}")]);
        if let Some(inject) = inject {
            command.args(["-e", &format!("inject={calls}:{inject}")]);
        }
        command.arg(program()).args(["--threads", "1", "--json"]).args(line.split(' '));
        command.current_dir(&self.root).stdin(Stdio::null()).output().unwrap()
    }

    fn log(&self) -> PathBuf {
        self.root.join("strace.log")
    }

    /// Of each kind of calls: the number of the first after the command opened its first input, and of the last.
    fn windows(&self, line: &str) -> [(u64, u64); CALLS.len()] {
        // All kinds together tell where the loader's calls end, each kind's own count where that is.
        self.traced(line, &CALLS.join(","), None);
        let log = fs::read_to_string(self.log()).unwrap();
        let kinds = CALLS.map(|calls| calls.split(',').map(|call| format!(" {call}(")).collect::<Vec<_>>());
        let (mut windows, mut has_begun) = ([(1, 0); CALLS.len()], false);
        for line in log.lines() {
            has_begun |= line.contains("\"in/") || line.contains("\"in\"");
            for (window, kind) in windows.iter_mut().zip(&kinds) {
                if kind.iter().any(|call| line.contains(call.as_str())) {
                    window.0 += u64::from(!has_begun);
                    window.1 += 1;
                }
            }
        }
        windows
    }
}

/// A PEFT LoRA adapter of one projection of the base.
fn write_lora(folder: &Path) {
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("adapter_config.json"), r#"{"peft_type":"LORA","r":2,"lora_alpha":4}"#).unwrap();
    let mut file = TensorFileWriter::create(&folder.join("adapter_model.safetensors"), Existing::Keep).unwrap();
    for (part, shape, value) in [("lora_A", [2, 64], 0.25f32), ("lora_B", [64, 2], 0.5)] {
        let name = format!("base_model.model.model.layers.0.self_attn.q_proj.{part}.weight");
        let id = file.add_tensor(name, Dtype::F32);
        file.append(id, &value.to_le_bytes().repeat(128)).unwrap();
        file.finish_tensor(id, shape.to_vec());
    }
    file.finish(&Context::default(), &BTreeMap::new()).unwrap();
}

/// What an undisturbed run prints and leaves.
struct Expected {
    code: Option<i32>,
    stdout: Vec<u8>,
    out: Tree,
    /// The changed checkpoint, before and after.
    changed: Option<[Tree; 2]>,
}

fn tree_of(path: &Path) -> Tree {
    let mut found = Tree::new();
    if path.is_dir() {
        return tree(path);
    }
    found.insert(PathBuf::new(), fs::read(path).unwrap());
    let state = PathBuf::from(format!("{}.neuroada", path.display()));
    if state.exists() {
        found.extend(tree(&state).into_iter().map(|(name, bytes)| (Path::new("state").join(name), bytes)));
    }
    found
}

/// Runs the case once undisturbed.
fn rehearse(stage: &Stage, case: &Case, saved: &Path) -> Expected {
    let workspace = case.in_place.map(|name| stage.root.join(name));
    let before = workspace.as_deref().map(tree_of);
    let output = stage.command(&format!("{} --json", case.line)).output().unwrap();
    let changed = before.map(|before| [before, tree_of(workspace.as_deref().unwrap())]);
    let out = tree(&stage.root.join("out"));
    restore(stage, case, saved);
    Expected { code: output.status.code(), stdout: output.stdout, out, changed }
}

/// Puts inputs and outputs back.
fn restore(stage: &Stage, case: &Case, saved: &Path) {
    if case.in_place.is_some() {
        fs::remove_dir_all(stage.root.join("in")).unwrap();
        copy_tree(saved, &stage.root.join("in"));
    }
    stage.fresh_out();
}

#[test]
fn a_failing_call_of_any_command_leaves_old_or_new_and_says_so() {
    let n_faults = fail_calls(&CASES, &[]);
    assert!(n_faults.is_none_or(|n| n > 60), "{n_faults:?}");
}

#[test]

fn a_failing_call_of_lora_in_place_leaves_old_or_new_and_says_so() {
    let merged = ["--keep-originals -o in/kept", "-o in/hashes"];
    let n_faults = fail_calls(&LORA_CASES, &merged.map(|words| format!("merge in/base --adapter in/lora {words}")));
    assert!(n_faults.is_none_or(|n| n > 10), "{n_faults:?}");
}

/// Runs the cases with failing calls, after these commands made more inputs; how many calls failed, `None` where nothing can be traced.
fn fail_calls(cases: &[Case], prepare: &[String]) -> Option<u64> {
    if !works("strace", &["-qq", "-o", "/dev/null", "true"]) {
        skipped("strace cannot trace here");
        return None;
    }
    let stage = Stage::new();
    for line in prepare {
        stage.must(line);
    }
    let saved = stage.root.join("saved");
    copy_tree(&stage.root.join("in"), &saved);
    let inputs = tree(&saved);
    let (n_tries, mut random, mut n_faults, mut n_committed) = (cycles(1), Random(18), 0u64, 0u64);
    let mut problems = Vec::new();
    let old_out = tree(&stage.root.join("out"));
    for case in cases {
        let expected = rehearse(&stage, case, &saved);
        assert!(matches!(expected.code, Some(0 | 1)), "{}: {:?}", case.name, expected.code);
        let windows = stage.windows(case.line);
        restore(&stage, case, &saved);
        for (calls, (first, last)) in CALLS.into_iter().zip(windows) {
            // A sample tries half of the kinds with each command.
            if last < first || (n_tries == 1 && random.below(2) == 0) {
                continue;
            }
            let all = last - first + 1;
            for i in 0..n_tries.min(all) {
                let n = if n_tries >= all { first + i } else { first + random.below(all) };
                let error = ERRORS[random.below(3) as usize];
                let output = stage.traced(case.line, calls, Some(format!("error={error}:when={n}")));
                if !fs::read_to_string(stage.log()).unwrap().contains("(INJECTED)") {
                    restore(&stage, case, &saved);
                    continue;
                }
                n_faults += 1;
                let what = format!(
                    "{}: {calls} {n} {error}: exit {:?}: {}",
                    case.name,
                    output.status.code(),
                    String::from_utf8_lossy(&output.stderr)
                );
                let judged = AssertUnwindSafe(|| judge(&stage, case, &expected, &output, (&inputs, &old_out), &what));
                match catch_unwind(judged) {
                    Ok(committed) => n_committed += u64::from(committed),
                    Err(_) => problems.push(what),
                }
                restore(&stage, case, &saved);
            }
        }
    }
    eprintln!("{n_faults} failing calls in {} commands, {n_committed} of them after the work was done", cases.len());
    assert!(problems.is_empty(), "{} of {n_faults}:\n{}", problems.len(), problems.join("\n"));
    Some(n_faults)
}

/// Holds what a disturbed run left against the undisturbed one; says whether it told that the work was done.
fn judge(
    stage: &Stage,
    case: &Case,
    expected: &Expected,
    output: &std::process::Output,
    (inputs, old_out): (&Tree, &Tree),
    what: &str,
) -> bool {
    let code = output.status.code();
    let document = || serde_json::from_slice::<serde_json::Value>(&output.stdout).ok();
    let committed = document().is_some_and(|document| document["committed"] == true);
    if case.in_place.is_none() {
        assert!(tree(&stage.root.join("in")) == *inputs, "{what}: an input changed");
    }
    if code == expected.code {
        // Undisturbed, or the call was one that can do without: the whole result, and no other.
        assert!(output.stdout == expected.stdout, "{what}: it printed something else");
        assert!(visible(&stage.root.join("out")) == expected.out, "{what}: a piece is missing");
    } else {
        assert!(matches!(code, Some(3..=6)), "{what}");
        let output_name = case.line.split(" -o ").nth(1).and_then(|rest| rest.split(' ').next());
        if let (Some(6), Some(name)) = (code, output_name) {
            let recovered = stage.command(&format!("recover {name}")).output().unwrap();
            // Rolled back, a first output is not there.
            let said = String::from_utf8_lossy(&recovered.stderr).into_owned();
            assert!(recovered.status.success() || said.contains("cannot open"), "{what}: recover: {said}");
        }
        let out = visible(&stage.root.join("out"));
        // A model card that could not be written beside the output is told of.
        let without_card = |of: &Tree| {
            of.iter()
                .filter(|(path, _)| !path.ends_with("README.md"))
                .map(|(p, b)| (p.clone(), b.clone()))
                .collect::<Tree>()
        };
        let is_new = (out == expected.out || (committed && out == without_card(&expected.out))) && out != *old_out;
        assert!(is_new || out == *old_out, "{what}: neither old nor new: {:?}", out.keys().collect::<Vec<_>>());
        if is_new {
            // The report itself may be what could not be written.
            let is_told = committed || String::from_utf8_lossy(&output.stderr).contains("the work is done");
            assert!(code == Some(6) || is_told, "{what}: it did not say that the work is done");
        } else if case.in_place.is_none() && case.name != "recover" {
            assert!(!committed, "{what}: it said that the work is done");
        }
    }
    if let (Some(name), Some([before, after])) = (case.in_place, &expected.changed) {
        let path = stage.root.join(name);
        let recovered = stage.command(&format!("recover {name}{}", case.recover)).output().unwrap();
        assert!(recovered.status.success(), "{what}: recover: {}", String::from_utf8_lossy(&recovered.stderr));
        let found = weights(&path);
        let is_old = found == only_weights(before);
        assert!(is_old || found == only_weights(after), "{what}: the weights are neither old nor new");
        let done =
            code == expected.code || committed || String::from_utf8_lossy(&output.stderr).contains("work is done");
        assert!(!done || !is_old || only_weights(before) == only_weights(after), "{what}: it said that it was done");
        assert!(code != Some(5) || committed || is_old || done, "{what}: it said that nothing changed");
    } else if code != expected.code {
        // Whatever was left, the next run on the same output does its work.
        stage.fresh_out();
        let again = stage.command(&format!("{} --json", case.line)).output().unwrap();
        assert_eq!(again.status.code(), expected.code, "{what}: again: {}", String::from_utf8_lossy(&again.stderr));
        assert!(visible(&stage.root.join("out")) == expected.out, "{what}: again, a piece is missing");
    }
    committed
}

/// A folder without what has a temporary name: a failing `unlink` leaves what it should have removed.
fn visible(folder: &Path) -> Tree {
    let is_temporary = |path: &Path| {
        path.iter().next().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with('.') && name.contains(".neuroada-")
        })
    };
    tree(folder).into_iter().filter(|(path, _)| !is_temporary(path)).collect()
}

fn only_weights(found: &Tree) -> Tree {
    let is_state = |path: &Path| path.starts_with(".neuroada") || path.starts_with("state");
    found.iter().filter(|(path, _)| !is_state(path)).map(|(path, bytes)| (path.clone(), bytes.clone())).collect()
}

fn weights(path: &Path) -> Tree {
    only_weights(&tree_of(path))
}
