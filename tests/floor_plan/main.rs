//! The house rules of `src/`, checked on its text: which folder may import which, where words are printed, where
//! `unsafe` lives, who asks the file system. `circles` looks for files that import each other. `source` reads the files, `look` finds in them what the rules are about. The reader of
//! Rust in `support/rust_text.rs` knows comments, strings, nested modules and grouped imports, and no more than that; `reader` tests it.

mod circles;
mod look;
mod reader;
#[path = "../support/rust_text.rs"]
mod rust_text;
mod source;

use std::fs;

use look::{changes, probes, unproven, without_tests, words};
use rust_text::{Token, imports};
use source::{check, files_below, root, sources};

/// Each floor and those it may import. A missing folder is an empty floor.
const FLOORS: &[(&str, &[&str])] = &[
    // Documentation alone.
    ("guide", &[]),
    ("error", &[]),
    // What `with_float!` expands to must be reachable from the tests.
    ("tensor", &["error", "internals"]),
    ("checkpoint", &["error", "tensor"]),
    ("backend", &["error", "tensor"]),
    ("foreign", &["error", "tensor", "checkpoint"]),
    ("weights", &["error", "tensor", "checkpoint"]),
    ("mask", &["error", "tensor", "checkpoint", "backend", "weights"]),
    ("adapter", &["error", "tensor", "checkpoint", "backend", "foreign", "weights", "mask"]),
    ("data", &["error", "tensor", "checkpoint"]),
    ("merge", BELOW_COMMANDS),
    ("diff", BELOW_COMMANDS),
    ("extract", BELOW_COMMANDS),
    ("combine", BELOW_COMMANDS),
    ("convert", BELOW_COMMANDS),
    ("cast", BELOW_COMMANDS),
    ("sync", BELOW_COMMANDS),
    ("train", &["error", "tensor", "checkpoint", "backend", "weights", "mask", "adapter", "data"]),
    // A guest: it does what the floors below let an accelerator do, and none of them knows it.
    ("gpu", &["error", "tensor", "checkpoint", "backend", "train"]),
    (
        "cli",
        &[
            "error",
            "tensor",
            "gpu",
            "checkpoint",
            "backend",
            "foreign",
            "weights",
            "mask",
            "adapter",
            "data",
            "merge",
            "diff",
            "extract",
            "combine",
            "convert",
            "cast",
            "sync",
            "train",
        ],
    ),
];
const BELOW_COMMANDS: &[&str] = &["error", "tensor", "checkpoint", "backend", "foreign", "weights", "mask", "adapter"];

/// Names that only one place may know; the trainer knows those of the models that it runs.
const MODULE_NAMES: &[&str] = &["lm_head", "embed_tokens", "wte", "embed_out", "c_attn", "c_proj", "block_sparse_moe"];
/// Where a probe may stand all the same: the file, the call, and why.
const PROBE_EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("src/gpu/library.rs", "exists", "guesses where a library may lie; the loader, which opens it, says what is wrong"),
    ("src/gpu/library.rs", "is_file", "likewise, of the Python interpreter"),
    ("src/gpu/library.rs", "read_dir", "likewise, of Python's packages"),
    ("src/checkpoint/direct.rs", "metadata().ok()", "without an answer the file is read through the page cache"),
    ("src/checkpoint/lock.rs", "metadata().ok()", "who holds a lock is a courtesy of the message"),
];
const MAX_LINES: usize = 700;
const MAX_FIXTURE_BYTES: u64 = 16_000_000;

#[test]
fn imports_go_down() {
    check("an import goes up or sideways; move the shared type to a lower floor", |source| {
        let Some(floor) = source.floor() else { return Vec::new() };
        let Some((_, below)) = FLOORS.iter().find(|(name, _)| *name == floor) else { return Vec::new() };
        imports(source.depth(), &source.tokens)
            .into_iter()
            .filter(|(_, target)| *target != floor && !below.contains(&target.as_str()))
            .map(|(line, target)| (line, format!("`{floor}` imports `{target}`")))
            .collect()
    });
}

#[test]
fn every_source_file_has_a_floor() {
    check("a file under src/ is on no floor of the plan", |source| {
        let known = source.floor().is_some_and(|floor| FLOORS.iter().any(|(name, _)| *name == floor));
        if known || source.path == "src/lib.rs" { Vec::new() } else { vec![(1, "no such floor".to_owned())] }
    });
}

#[test]
fn only_the_command_line_prints_and_exits() {
    check("words come in and go out in src/cli and src/main.rs alone", |source| {
        if source.floor() == Some("cli") { Vec::new() } else { words(&source.tokens) }
    });
}

#[test]
fn tensors_gpu_and_hot_loops_never_touch_files() {
    check("files are the business of src/checkpoint and the floors above it", |source| {
        if !matches!(source.floor(), Some("tensor" | "gpu" | "backend")) {
            return Vec::new();
        }
        let files = |token: &&Token| matches!(token.text.as_str(), "fs" | "File" | "OpenOptions");
        source.tokens.iter().filter(files).map(|token| (token.line, format!("`{}`", token.text))).collect()
    });
}

#[test]
fn only_probe_asks_whether_something_is_there() {
    check("absent means ENOENT, every other failure is an error: ask src/checkpoint/probe.rs", |source| {
        if source.path == "src/checkpoint/probe.rs" {
            return Vec::new();
        }
        let is_excepted =
            |what: &str| PROBE_EXCEPTIONS.iter().any(|(path, call, _)| *path == source.path && *call == what);
        probes(&without_tests(source)).into_iter().filter(|(_, what)| !is_excepted(what)).collect()
    });
}

#[test]
fn exceptions_to_the_probe_rule_are_still_needed() {
    let sources = sources();
    for (path, call, _) in PROBE_EXCEPTIONS {
        let source = sources.iter().find(|source| source.path == *path).expect("an exception names a file");
        assert!(probes(&without_tests(source)).iter().any(|(_, what)| what == call), "{path} has no {call} any more");
    }
}

#[test]
fn only_the_checkpoint_floor_changes_folders() {
    check("files are created, renamed and removed in src/checkpoint alone, behind the gate for outputs", |source| {
        if source.floor() == Some("checkpoint") { Vec::new() } else { changes(&without_tests(source)) }
    });
}

#[test]
fn only_the_map_of_weights_knows_what_modules_are_called() {
    check("names of embeddings, heads and transposed modules are known in src/weights alone", |source| {
        if matches!(source.floor(), Some("weights" | "train")) || source.path.ends_with("_tests.rs") {
            return Vec::new();
        }
        let code = source.raw.split("#[cfg(test)]").next().unwrap_or_default();
        let names = |line: &str| MODULE_NAMES.iter().find(|name| line.contains(&format!("\"{name}"))).copied();
        let is_comment = |line: &str| line.trim_start().starts_with("//");
        (1..)
            .zip(code.lines())
            .filter(|(_, line)| !is_comment(line))
            .filter_map(|(at, line)| Some((at, names(line)?.to_owned())))
            .collect()
    });
}

#[test]
fn unsafe_stays_at_its_addresses() {
    check(
        "unsafe opens in checkpoint/mmap.rs, the launching files of gpu/ and the SIMD files of backend/ alone",
        |source| {
            if may_be_unsafe(&source.path) {
                return Vec::new();
            }
            let opens = |token: &&Token| token.text == "unsafe";
            source.tokens.iter().filter(opens).map(|token| (token.line, "`unsafe`".to_owned())).collect()
        },
    );
}

#[test]
fn every_unsafe_block_is_proven() {
    check("a `// SAFETY:` comment stands directly above every unsafe block", |source| {
        unproven(&source.text, &source.tokens).into_iter().map(|line| (line, "no proof".to_owned())).collect()
    });
}

#[test]
fn no_source_file_is_too_long_to_read() {
    check("a file has more than 700 lines; find the two things it does", |source| {
        let n_lines = source.raw.lines().count();
        if n_lines > MAX_LINES { vec![(MAX_LINES + 1, format!("{n_lines} lines"))] } else { Vec::new() }
    });
}

#[test]
fn every_folder_begins_with_a_paragraph_for_newcomers() {
    let sources = sources();
    let mut folders: Vec<&str> = sources.iter().filter_map(|source| Some(source.path.rsplit_once('/')?.0)).collect();
    folders.dedup();
    let mut broken = Vec::new();
    for folder in folders.into_iter().filter(|folder| *folder != "src") {
        let path = format!("{folder}/mod.rs");
        match sources.iter().find(|source| source.path == path) {
            None => broken.push(format!("{path}: missing")),
            Some(source) if !begins_with_a_paragraph(&source.raw) => {
                broken.push(format!("{path}:1: begins with no `//!` paragraph"));
            }
            Some(_) => {}
        }
    }
    assert!(broken.is_empty(), "a folder's mod.rs can be read instead of the files below it\n{}", broken.join("\n"));
}

#[test]
fn fixtures_are_small() {
    let mut n_bytes = 0;
    for path in files_below(&root().join("fixtures")) {
        n_bytes += fs::metadata(&path).expect("fixtures can be read").len();
    }
    assert!(n_bytes <= MAX_FIXTURE_BYTES, "fixtures/ has {n_bytes} bytes, at most {MAX_FIXTURE_BYTES} are accepted");
}

fn may_be_unsafe(path: &str) -> bool {
    path == "src/checkpoint/mmap.rs" || path.starts_with("src/gpu/launch/") || path.starts_with("src/backend/simd")
}

fn begins_with_a_paragraph(raw: &str) -> bool {
    const SHORTEST: usize = 80;
    let doc = raw.lines().map_while(|line| line.strip_prefix("//!"));
    raw.starts_with("//! ") && doc.map(|line| line.trim().len()).sum::<usize>() >= SHORTEST
}
