//! The house rules of `src/`, checked on its text: which folder may import which, where words are printed, where
//! `unsafe` lives, who asks the file system. The reader in `support/rust_text.rs` knows comments, strings, nested modules and grouped
//! imports, and no more of Rust than that; its tests are at the end.

#[path = "support/rust_text.rs"]
mod rust_text;

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use rust_text::{Text, Token, imports, text_at, tokens};

/// Each floor and those it may import. A missing folder is an empty floor.
const FLOORS: &[(&str, &[&str])] = &[
    ("tensor", &[]),
    ("gpu", &["tensor"]),
    ("checkpoint", &["tensor"]),
    ("backend", &["tensor", "gpu"]),
    ("foreign", &["tensor", "checkpoint"]),
    ("weights", &["tensor", "checkpoint"]),
    ("mask", &["tensor", "gpu", "checkpoint", "backend", "weights"]),
    ("adapter", &["tensor", "gpu", "checkpoint", "backend", "foreign", "weights", "mask"]),
    ("data", &["tensor", "checkpoint"]),
    ("merge", BELOW_COMMANDS),
    ("diff", BELOW_COMMANDS),
    ("extract", BELOW_COMMANDS),
    ("combine", BELOW_COMMANDS),
    ("convert", BELOW_COMMANDS),
    ("train", &["tensor", "gpu", "checkpoint", "backend", "weights", "mask", "adapter", "data"]),
    (
        "cli",
        &[
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
            "train",
        ],
    ),
];
const BELOW_COMMANDS: &[&str] = &["tensor", "gpu", "checkpoint", "backend", "foreign", "weights", "mask", "adapter"];

/// Names that only one place may know; the trainer knows those of the models that it runs.
const MODULE_NAMES: &[&str] = &["lm_head", "embed_tokens", "wte", "embed_out", "c_attn", "c_proj", "block_sparse_moe"];
const PRINTING_MACROS: &[&str] = &["print", "println", "eprint", "eprintln", "dbg"];
const COMMAND_LINE_CRATES: &[&str] = &["anyhow", "clap", "clap_complete", "clap_mangen", "indicatif", "signal_hook"];
/// Questions whether something is there. `src/checkpoint/probe.rs` asks them, for everybody.
const PROBES: &[&str] = &["exists", "try_exists", "is_file", "is_dir", "is_symlink", "symlink_metadata", "read_dir"];
/// Calls that change a folder. `src/checkpoint` makes them, for everybody.
const CHANGES: &[&str] = &[
    "write",
    "rename",
    "copy",
    "hard_link",
    "set_permissions",
    "remove_file",
    "remove_dir",
    "remove_dir_all",
    "create_dir",
    "create_dir_all",
];
const CREATORS: &[&str] = &["OpenOptions", "DirBuilder", "tempdir_in", "tempfile_in"];
/// Where a probe may stand all the same: the file, the call, and why.
const PROBE_EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("src/gpu/library.rs", "exists", "guesses where a library may lie; the loader, which opens it, says what is wrong"),
    ("src/gpu/library.rs", "is_file", "likewise, of the Python interpreter"),
    ("src/gpu/library.rs", "read_dir", "likewise, of Python's packages"),
    ("src/checkpoint/direct.rs", "metadata().ok()", "without an answer the file is read through the page cache"),
    ("src/checkpoint/lock.rs", "metadata().ok()", "who holds a lock is a courtesy of the message"),
];
const MOST_LINES: usize = 700;
const MOST_FIXTURE_BYTES: u64 = 16_000_000;

// --- the rules

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
        if matches!(source.floor(), Some("weights" | "train")) {
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
        if n_lines > MOST_LINES { vec![(MOST_LINES + 1, format!("{n_lines} lines"))] } else { Vec::new() }
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
    assert!(n_bytes <= MOST_FIXTURE_BYTES, "fixtures/ has {n_bytes} bytes, at most {MOST_FIXTURE_BYTES} are accepted");
}

/// Fails with `file:line: what` for all that `rule` finds in any file.
fn check(rule: &str, find: impl Fn(&Source) -> Vec<(usize, String)>) {
    let mut broken = String::new();
    for source in sources() {
        for (line, what) in find(&source) {
            write!(broken, "\n{}:{line}: {what}", source.path).expect("a string takes every word");
        }
    }
    assert!(broken.is_empty(), "{rule}{broken}");
}

fn may_be_unsafe(path: &str) -> bool {
    path == "src/checkpoint/mmap.rs" || path.starts_with("src/gpu/launch/") || path.starts_with("src/backend/simd")
}

fn begins_with_a_paragraph(raw: &str) -> bool {
    const SHORTEST: usize = 80;
    let doc = raw.lines().map_while(|line| line.strip_prefix("//!"));
    raw.starts_with("//! ") && doc.map(|line| line.trim().len()).sum::<usize>() >= SHORTEST
}

// --- reading files

struct Source {
    /// From the repository's root, with slashes.
    path: String,
    raw: String,
    text: Text,
    tokens: Vec<Token>,
}

impl Source {
    fn new(path: &str, raw: String) -> Self {
        let text = Text::new(&raw);
        let tokens = tokens(&text);
        Self { path: path.to_owned(), raw, text, tokens }
    }

    /// The folder under `src/`; `main.rs` belongs to the command line, `lib.rs` to none.
    fn floor(&self) -> Option<&str> {
        match self.path.strip_prefix("src/")? {
            "lib.rs" => None,
            "main.rs" => Some("cli"),
            path => Some(path.split_once('/').map_or_else(|| path.trim_end_matches(".rs"), |(folder, _)| folder)),
        }
    }

    /// How far the file's module lies below the crate's root: `src/mask/rank.rs`, which is `mask::rank`, two.
    fn depth(&self) -> usize {
        let path = self.path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
        if matches!(path, "lib" | "main") { 0 } else { path.split('/').count() }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for path in files_below(&root().join("src")) {
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root()).expect("src lies below the root").to_string_lossy().replace('\\', "/");
            sources.push(Source::new(&name, fs::read_to_string(&path).expect("sources can be read")));
        }
    }
    assert!(sources.iter().any(|source| source.path == "src/lib.rs"), "the sources were found");
    sources
}

/// All files below `folder`, sorted; none where it does not exist.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("folders can be read").path()).collect();
    paths.sort();
    paths.into_iter().flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

// --- what the rules look for

/// Every place that prints, exits, or names a crate of the command line.
fn words(tokens: &[Token]) -> Vec<(usize, String)> {
    let word = |i: usize| text_at(tokens, Some(i));
    let mut found = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let text = token.text.as_str();
        let before = text_at(tokens, i.checked_sub(1));
        if PRINTING_MACROS.contains(&text) && word(i + 1) == "!" && word(i + 2) != "=" {
            found.push((token.line, format!("`{text}!`")));
        } else if COMMAND_LINE_CRATES.contains(&text) && (word(i + 1) == "::" || matches!(before, "use" | "crate")) {
            found.push((token.line, format!("`{text}`")));
        } else if text == "process" && word(i + 1) == "::" {
            let group = tokens[i + 2..].iter().take_while(|token| token.text != ";" && token.text != "}");
            let n_looked_at = if word(i + 2) == "{" { usize::MAX } else { 1 };
            found.extend(
                group
                    .take(n_looked_at)
                    .filter(|token| token.text == "exit")
                    .map(|token| (token.line, "`process::exit`".to_owned())),
            );
        }
    }
    found
}

/// A file's tokens without its tests: none of `tests.rs`, and no item behind `#[cfg(test)]`.
fn without_tests(source: &Source) -> Vec<&Token> {
    if source.path.ends_with("/tests.rs") {
        return Vec::new();
    }
    let tokens = &source.tokens;
    let word = |i: usize| text_at(tokens, Some(i));
    let (mut kept, mut i) = (Vec::new(), 0);
    while i < tokens.len() {
        if !(0..7).all(|n| word(i + n) == ["#", "[", "cfg", "(", "test", ")", "]"][n]) {
            kept.push(&tokens[i]);
            i += 1;
            continue;
        }
        // An item ends with its first brace, or with a semicolon before that.
        i += 7;
        while i < tokens.len() && !matches!(word(i), "{" | ";") {
            i += 1;
        }
        i = end_of_group(tokens, i);
    }
    kept
}

/// Behind the brace that closes the one at `open`; behind `open` itself where it is none.
fn end_of_group(tokens: &[Token], open: usize) -> usize {
    let (mut i, mut depth) = (open, 0);
    loop {
        match text_at(tokens, Some(i)) {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        i += 1;
        if depth == 0 || i >= tokens.len() {
            return i;
        }
    }
}

/// Every question whether something is there.
fn probes(tokens: &[&Token]) -> Vec<(usize, String)> {
    let word = |i: Option<usize>| i.and_then(|i| tokens.get(i)).map_or("", |token| token.text.as_str());
    let ok = ["metadata", "(", ")", ".", "ok", "(", ")"];
    let mut found = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let (before, owner) = (word(i.checked_sub(1)), word(i.checked_sub(2)));
        let is_called = before == "." || (before == "::" && matches!(owner, "Path" | "PathBuf" | "fs"));
        if is_called && PROBES.contains(&token.text.as_str()) {
            found.push((token.line, token.text.clone()));
        } else if token.text == "metadata" && before == "::" && owner == "fs" {
            found.push((token.line, "fs::metadata".to_owned()));
        } else if ok.iter().enumerate().all(|(n, text)| word(Some(i + n)) == *text) {
            found.push((token.line, "metadata().ok()".to_owned()));
        }
    }
    found.extend(of_fs(tokens).into_iter().filter(|(_, name)| name == "metadata" || PROBES.contains(&name.as_str())));
    found.dedup();
    found
}

/// Every call that creates, renames or removes files and folders.
fn changes(tokens: &[&Token]) -> Vec<(usize, String)> {
    let word = |i: usize| tokens.get(i).map_or("", |token| token.text.as_str());
    let mut found = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        if CREATORS.contains(&token.text.as_str()) {
            found.push((token.line, token.text.clone()));
        } else if token.text == "File"
            && word(i + 1) == "::"
            && matches!(word(i + 2), "create" | "create_new" | "options")
        {
            found.push((token.line, format!("File::{}", word(i + 2))));
        } else if token.text == "fs" && word(i + 1) == "::" && CHANGES.contains(&word(i + 2)) {
            found.push((token.line, format!("fs::{}", word(i + 2))));
        }
    }
    found.extend(of_fs(tokens).into_iter().filter(|(_, name)| CHANGES.contains(&name.as_str())));
    found
}

/// The names that a `use` takes from a module called `fs`, as a group.
fn of_fs(tokens: &[&Token]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for i in 0..tokens.len().saturating_sub(2) {
        if tokens[i].text == "fs" && tokens[i + 1].text == "::" && tokens[i + 2].text == "{" {
            let group = tokens[i + 3..].iter().take_while(|token| token.text != "}");
            found.extend(group.map(|token| (token.line, token.text.clone())));
        }
    }
    found
}

/// The lines of unsafe blocks and impls above which no comment says why they are sound.
fn unproven(text: &Text, tokens: &[Token]) -> Vec<usize> {
    let opens = |&i: &usize| tokens[i].text == "unsafe" && matches!(text_at(tokens, Some(i + 1)), "{" | "impl");
    (0..tokens.len()).filter(opens).map(|i| tokens[i].line).filter(|&line| !is_proven(text, line)).collect()
}

/// Whether the comment above the statement that `line` belongs to holds a proof.
fn is_proven(text: &Text, line: usize) -> bool {
    let mut above = line - 1;
    while above > 0 {
        above -= 1;
        let (code, comment) = (text.code[above].trim(), text.comments[above].trim());
        if code.is_empty() {
            if comment.starts_with("// SAFETY:") {
                return true;
            }
            if comment.is_empty() {
                return false;
            }
        } else if !code.starts_with('#') && code.ends_with([';', '{', '}', ',']) {
            return false; // another statement
        }
    }
    false
}

// --- the reader's own tests

fn imported(path: &str, code: &str) -> Vec<(usize, String)> {
    let source = Source::new(path, code.to_owned());
    imports(source.depth(), &source.tokens)
}

fn names(path: &str, code: &str) -> Vec<String> {
    imported(path, code).into_iter().map(|(_, name)| name).collect()
}

#[test]
fn imports_are_found_in_every_spelling() {
    for (path, code, expected) in [
        ("src/mask/mod.rs", "use crate::merge::Merge;", &["merge"][..]),
        ("src/mask/mod.rs", "pub(crate) use crate::merge;", &["merge"]),
        ("src/mask/mod.rs", "fn f() -> u8 { crate::merge::run(crate::diff::A) }", &["merge", "diff"]),
        (
            "src/mask/mod.rs",
            "use crate::{\n    tensor::{Dtype, rows},\n    merge,\n    diff as d,\n};",
            &["tensor", "merge", "diff"],
        ),
        ("src/mask/mod.rs", "use {std::fs, crate::merge::A};", &["merge"]),
        ("src/mask/mod.rs", "use neuroada_ckpt::merge::A; use ::neuroada_ckpt::diff;", &["merge", "diff"]),
        ("src/mask/mod.rs", "use super::merge::A;", &["merge"]),
        ("src/mask/mod.rs", "use super::{merge, diff::B};", &["merge", "diff"]),
        ("src/mask/rank.rs", "use super::super::merge::A;", &["merge"]),
        ("src/mask/rank.rs", "use self::super::super::merge::A;", &["merge"]),
        ("src/mask/a/b.rs", "use super::super::super::merge;", &["merge"]),
        ("src/mask/rank.rs", "mod tests { use super::super::super::merge; }", &["merge"]),
        ("src/mask/rank.rs", "mod tests { fn f() {} } use super::super::merge;", &["merge"]),
        ("src/mask/mod.rs", "macro_rules! m { () => { $crate::merge::run() } }", &["merge"]),
        ("src/mask/mod.rs", "use crate::{tensor::{Dtype,}, checkpoint};", &["tensor", "checkpoint"]),
        ("src/mask/mod.rs", "use crate::*;", &["*"]),
        ("src/mask/mod.rs", "use crate as root;", &["*"]),
        ("src/mask/mod.rs", "use crate::{self as root, tensor};", &["*", "tensor"]),
        ("src/mask/mod.rs", "use neuroada_ckpt::{merge, diff};", &["merge", "diff"]),
        ("src/mask/mod.rs", "extern crate self as root;", &["*"]),
        ("src/mask/mod.rs", "use super::*;", &["*"]),
    ] {
        assert_eq!(names(path, code), expected, "{path}: {code}");
    }
}

#[test]
fn what_is_no_import_is_left_alone() {
    for (path, code) in [
        ("src/mask/rank.rs", "use super::Recipe; use super::{a, b}; use self::c::D;"),
        ("src/mask/rank.rs", "#[cfg(test)] mod tests { use super::*; use super::super::merge_masks; }"),
        ("src/mask/mod.rs", "pub(crate) fn f() {} pub(super) fn g(&self) {} pub(in crate::merge) fn h() {}"),
        (
            "src/mask/mod.rs",
            "// use crate::merge;\n/* crate::diff::x /* nested */ crate::merge */ //! [`crate::merge`]",
        ),
        (
            "src/mask/mod.rs",
            r##"const A: &str = "use crate::merge"; const B: &str = r#"say "crate::merge""#; const C: &[u8] = br"\"; "##,
        ),
        (
            "src/mask/mod.rs",
            r#"const A: &str = "a \" crate::merge"; const B: char = '"'; fn f<'a>(x: &'a str) {} const C: char = '\''; "#,
        ),
        ("src/mask/mod.rs", "use std::process; use merge_sort::merge; other::crate_::merge();"),
    ] {
        assert_eq!(names(path, code), [""; 0], "{path}: {code}");
    }
}

#[test]
fn lines_are_counted_through_strings_and_comments() {
    let code = "/* one\n   two */\nconst A: &str = \"three\n  four \\\n five\";\nconst R: &str = r\"\n\";\nuse crate::merge;\n";
    assert_eq!(imported("src/mask/mod.rs", code), [(8, "merge".to_owned())]);
}

#[test]
fn characters_are_told_from_lifetimes() {
    let text = Text::new("fn f<'a, 'b>(x: &'a u8) { let q = '\"'; let b = '\\\\'; let u = '\\u{7f}'; crate::x }");
    assert!(text.code[0].contains("crate::x") && !text.code[0].contains('"'), "{}", text.code[0]);
}

#[test]
fn words_are_found_outside_strings_only() {
    let found = |code: &str| words(&Source::new("src/mask/mod.rs", code.to_owned()).tokens).len();
    for code in [
        "println!(\"x\");",
        "std::eprintln!()",
        "print! {}",
        "dbg!(x)",
        "use clap::Parser;",
        "#[derive(clap::Args)] struct A;",
        "use anyhow;",
        "fn f() -> anyhow::Result<()>",
        "::anyhow::bail!()",
        "use ::clap::Parser;",
        "std::process::exit(1)",
        "use std::process::{Command, exit};",
        "process::exit(0)",
    ] {
        assert_eq!(found(code), 1, "{code}");
    }
    for code in [
        "// println!()",
        "let a = \"println!(clap::x)\";",
        "writeln!(f)",
        "let print = 1; print != 2",
        "fn exit() {} self.process.exit()",
        "use std::process::Command; exit(1)",
        "let clap = 1; crate::clap_like::x",
        "std::process::id(); exit",
    ] {
        assert_eq!(found(code), 0, "{code}");
    }
}

#[test]
fn probes_and_changes_are_found_outside_tests_only() {
    let found = |code: &str| {
        let source = Source::new("src/mask/mod.rs", code.to_owned());
        let tokens = without_tests(&source);
        probes(&tokens).len() + changes(&tokens).len()
    };
    for code in [
        "if path.exists() {}",
        "let a = paths.iter().any(|p| p.is_dir());",
        "Path::exists(path)",
        "paths.filter(Path::is_file)",
        "fs::metadata(path)?",
        "std::fs::exists(path)",
        "file.metadata().ok()",
        "for entry in path.read_dir()? {}",
        "use std::fs::{self, rename};",
        "fs::remove_dir_all(path)",
        "std::fs::write(path, b\"\")",
        "File::create(path)",
        "fs::File::options().append(true)",
        "use std::fs::OpenOptions;",
        "tempfile::tempdir_in(folder)",
        "#[cfg(test)] mod tests { fn f() { a.exists() } } fn g() { b.exists() }",
        "#[cfg(test)] use a::b; fn g() { b.exists() }",
        "#[cfg(feature = \"train\")] fn g() { b.exists() }",
    ] {
        assert_eq!(found(code), 1, "{code}");
    }
    for code in [
        "probe::is_file(path)?",
        "AtomicFile::create(path)",
        "let exists = 1; exists()",
        "fn is_dir() {}",
        "file.metadata()?",
        "probe::metadata(path)?",
        "// path.exists()",
        "\"path.exists()\"",
        "fs::read(path)",
        "output.write(b)",
        "#[cfg(test)] mod tests { fn f() { if a.exists() {} } }",
        "#[cfg(test)] mod tests;",
        "tempfile::tempdir()",
    ] {
        assert_eq!(found(code), 0, "{code}");
    }
}

#[test]
fn unsafe_blocks_without_a_proof_are_found() {
    let lines = |code: &str| {
        let source = Source::new("src/checkpoint/mmap.rs", code.to_owned());
        unproven(&source.text, &source.tokens)
    };
    for proven in [
        "// SAFETY: x\nunsafe { a() }",
        "// SAFETY: x,\n// which goes on.\nlet a = unsafe { a() };",
        "// SAFETY: x\nlet a = b\n    .map(|c| unsafe { c() });",
        "// SAFETY: x\n#[allow(unsafe_code)]\nunsafe impl Send for A {}",
        "let a =\n    // SAFETY: x\n    unsafe { a() };",
        "unsafe fn f() {}",
        "#![allow(unsafe_code)]",
        "// unsafe { }\nlet a = \"unsafe { }\";",
    ] {
        assert_eq!(lines(proven), [0; 0], "{proven}");
    }
    for bare in [
        "\nunsafe { a() }",
        "// fast\nlet a = unsafe { a() };",
        "// SAFETY: x\n\nunsafe { a() }",
        "// SAFETY: x\nlet a = 1;\nlet b = unsafe { b() };",
        "// SAFETY: x\nfn f() {\n    unsafe { a() }\n}",
        "let s = \"// SAFETY: x\";\nunsafe { a() }",
        "unsafe impl Send for A {}",
    ] {
        assert_eq!(lines(bare).len(), 1, "{bare}");
    }
}

#[test]
fn files_know_their_floor_and_depth() {
    for (path, floor, depth) in [
        ("src/lib.rs", None, 0),
        ("src/main.rs", Some("cli"), 0),
        ("src/mask/mod.rs", Some("mask"), 1),
        ("src/mask/rank.rs", Some("mask"), 2),
        ("src/backend/simd/avx2.rs", Some("backend"), 3),
        ("src/stray.rs", Some("stray"), 1),
    ] {
        let source = Source::new(path, String::new());
        assert_eq!((source.floor(), source.depth()), (floor, depth), "{path}");
    }
    assert!(may_be_unsafe("src/backend/simd_avx2.rs") && !may_be_unsafe("src/backend/portable.rs"));
}

#[test]
fn a_placeholder_is_no_paragraph() {
    assert!(!begins_with_a_paragraph("//! placeholder\n"));
    assert!(!begins_with_a_paragraph(
        "mod a;\n//! Too late, and that although it is so long that a reader would learn something from it.\n"
    ));
    assert!(begins_with_a_paragraph(
        "//! Files: checkpoints and shards.\n//!\n//! A checkpoint is a model on disk, in one shard or in many.\n"
    ));
}
