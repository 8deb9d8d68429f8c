//! The tests of what reads the sources.

use super::{
    begins_with_a_paragraph,
    look::{changes, probes, unproven, without_tests, words},
    may_be_unsafe,
    rust_text::{Text, imports},
    source::Source,
};

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
