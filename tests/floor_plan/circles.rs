//! Import circles inside a folder: files that need one another cannot be read one after the other.
//!
//! A file and the folder of the same name count as one. What a `mod.rs` re-exports belongs to the file that it comes from. What a
//! `mod.rs` itself has is not looked at, nor are tests.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    look::without_tests,
    rust_text::Token,
    source::{Source, sources},
};

/// Folders with circles, and the files in them. This list gets shorter; `layouts` joined the circle of `checkpoint` because an open checkpoint
/// decodes its quantized weights, and their errors name them.
const KNOWN: &[(&str, &[&str])] = &[
    ("src/adapter", &["file", "packed", "writer"]),
    ("src/adapter/packed", &["lossy", "write"]),
    ("src/backend", &["low_rank", "simd"]),
    // Most of the folder: errors name tensors and codes, whose files have errors.
    (
        "src/checkpoint",
        &[
            "atomic_file",
            "codes",
            "context",
            "error",
            "gate",
            "header",
            "in_use",
            "index",
            "inside",
            "json",
            "layouts",
            "lock",
            "model",
            "output",
            "output_dir",
            "own_folder",
            "probe",
            "raw_header",
            "shard",
            "single_file",
            "state_folder",
        ],
    ),
    ("src/data", &["batch", "dataset"]),
    ("src/data", &["chat", "form", "read"]),
    ("src/extract", &["pairs", "run"]),
    ("src/train", &["attach", "model"]),
    ("src/train", &["config", "error"]),
    ("src/weights", &["axes", "config", "map", "names", "rules", "ties"]),
];

/// A module's path from the crate's root, its name last.
type ModulePath = Vec<String>;

/// For each folder, which of its modules imports which.
type Imports = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

#[test]
fn no_two_files_of_a_folder_import_each_other() {
    let found = circles(&imports_inside_folders(&sources()));
    let is_known = |folder: &str, circle: &BTreeSet<String>| {
        KNOWN.iter().any(|(known, files)| *known == folder && circle.iter().all(|file| files.contains(&&**file)))
    };
    let new: Vec<String> = found
        .iter()
        .filter(|(folder, circle)| !is_known(folder, circle))
        .map(|(folder, circle)| format!("{folder}: {}", circle.iter().cloned().collect::<Vec<_>>().join(", ")))
        .collect();
    assert!(
        new.is_empty(),
        "files import each other in a circle; move what they share to a file below\n{}",
        new.join("\n")
    );
    for (folder, files) in KNOWN {
        let is_there =
            found.iter().any(|(other, circle)| other == folder && circle.iter().all(|file| files.contains(&&**file)));
        assert!(is_there, "{folder} has no circle of {files:?} any more: take it off the list");
    }
}

/// Finds in every file what it imports from other modules of a folder that it lies in.
fn imports_inside_folders(sources: &[Source]) -> Imports {
    let modules: BTreeSet<ModulePath> = sources.iter().map(|source| module_of(&source.path)).collect();
    let used: Vec<(ModulePath, bool, Vec<Used>)> = sources
        .iter()
        .map(|source| {
            let module = module_of(&source.path);
            let is_parent = source.path.ends_with("/mod.rs");
            let used = paths(&module, &modules, &without_tests(source));
            (module, is_parent, used)
        })
        .collect();
    // The names that a `mod.rs` takes from elsewhere, under which its files may import them.
    let mut reexports: BTreeMap<ModulePath, ModulePath> = BTreeMap::new();
    for (module, _, used) in used.iter().filter(|(_, is_parent, _)| *is_parent) {
        for used in used.iter().filter(|used| used.is_use) {
            let name = [&module[..], std::slice::from_ref(&used.name)].concat();
            if name != used.path {
                reexports.insert(name, used.path.clone());
            }
        }
    }
    let mut found = Imports::new();
    for (module, _, used) in &used {
        for used in used {
            let path = resolve(&used.path, &reexports);
            let n_common = module.iter().zip(&path).take_while(|(a, b)| a == b).count();
            let (Some(from), Some(to)) = (module.get(n_common), path.get(n_common)) else { continue };
            let folder = &module[..n_common];
            if n_common > 0 && modules.contains(&path[..=n_common]) {
                let imports = found.entry(format!("src/{}", folder.join("/"))).or_default();
                imports.entry(from.clone()).or_default().insert(to.clone());
            }
        }
    }
    found
}

/// Where a path leads through re-exports.
fn resolve(path: &[String], reexports: &BTreeMap<ModulePath, ModulePath>) -> ModulePath {
    let mut path = path.to_vec();
    // A chain of re-exports is not longer than folders are deep; a circle of them would not compile.
    for _ in 0..8 {
        let longest = (1..=path.len()).rev().find_map(|n| Some((n, reexports.get(&path[..n])?)));
        let Some((n, target)) = longest else { break };
        path = [&target[..], &path[n..]].concat();
    }
    path
}

/// `src/mask/rank.rs` and `src/mask/rank/mod.rs` are `mask::rank`.
fn module_of(path: &str) -> ModulePath {
    let path = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    if matches!(path, "lib" | "main") { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// A path in a file, from the crate's root.
struct Used {
    path: ModulePath,
    /// What it is called in the file.
    name: String,
    /// Whether it stands in a `use`.
    is_use: bool,
}

/// All paths of the crate in the tokens of `module`.
fn paths(module: &[String], modules: &BTreeSet<ModulePath>, tokens: &[&Token]) -> Vec<Used> {
    let word = |i: usize| tokens.get(i).map_or("", |token| token.text.as_str());
    let (mut found, mut i, mut is_use) = (Vec::new(), 0, false);
    while i < tokens.len() {
        let before = if i == 0 { "" } else { word(i - 1) };
        match word(i) {
            "use" => is_use = true,
            ";" => is_use = false,
            root @ ("crate" | "super" | "self") if before != "::" && word(i + 1) == "::" => {
                let mut path = if root == "crate" { Vec::new() } else { module.to_vec() };
                if root == "super" {
                    path.pop();
                }
                i = follow(tokens, i + 1, path, is_use, &mut found);
                continue;
            }
            // `use error::A;` in a `mod.rs` means the file beside it.
            child if is_use && matches!(before, "use" | "{" | ",") && word(i + 1) == "::" => {
                let path = [module, &[child.to_owned()]].concat();
                if modules.contains(&path) {
                    i = follow(tokens, i + 1, path, is_use, &mut found);
                    continue;
                }
            }
            _ => {}
        }
        i += 1;
    }
    found
}

/// Reads on behind a segment of a path, through groups; returns what comes behind the path.
fn follow(tokens: &[&Token], mut i: usize, mut path: ModulePath, is_use: bool, found: &mut Vec<Used>) -> usize {
    let word = |i: usize| tokens.get(i).map_or("", |token| token.text.as_str());
    while word(i) == "::" {
        match word(i + 1) {
            "{" => {
                i += 2;
                while !matches!(word(i), "}" | "") {
                    let mut inner = path.clone();
                    match word(i) {
                        "self" => {}
                        "super" => drop(inner.pop()),
                        segment => inner.push(segment.to_owned()),
                    }
                    i = follow(tokens, i + 1, inner, is_use, found);
                    if word(i) == "," {
                        i += 1;
                    }
                }
                return i + 1;
            }
            "super" => drop(path.pop()),
            // A generic argument ends the path; what stands in it is found by itself.
            "<" => break,
            segment => path.push(segment.to_owned()),
        }
        i += 2;
    }
    let mut name = path.last().cloned().unwrap_or_default();
    if word(i) == "as" {
        name = word(i + 1).to_owned();
        i += 2;
    }
    found.push(Used { path, name, is_use });
    i
}

/// The circles in each folder: modules from each of which every other can be reached.
fn circles(imports: &Imports) -> Vec<(String, BTreeSet<String>)> {
    let mut found = Vec::new();
    for (folder, edges) in imports {
        let reachable: BTreeMap<&str, BTreeSet<&str>> =
            edges.keys().map(|from| (&**from, reach(edges, from))).collect();
        let mut seen = BTreeSet::new();
        for (from, all) in &reachable {
            let is_back = |to: &&&str| reachable.get(**to).is_some_and(|back| back.contains(from));
            let circle: BTreeSet<String> = all.iter().filter(is_back).map(|to| (*to).to_owned()).collect();
            if circle.len() > 1 && seen.insert(circle.clone()) {
                found.push((folder.clone(), circle));
            }
        }
    }
    found
}

/// What is imported from `from` on, `from` itself only where it is in a circle.
fn reach<'a>(edges: &'a BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<&'a str> {
    let mut found: BTreeSet<&str> = BTreeSet::new();
    let mut next: Vec<&str> = edges.get(from).into_iter().flatten().map(String::as_str).collect();
    while let Some(module) = next.pop() {
        if found.insert(module) {
            next.extend(edges.get(module).into_iter().flatten().map(String::as_str));
        }
    }
    found
}

/// The circles of files given as path and text.
fn circles_of(files: &[(&str, &str)]) -> Vec<(String, Vec<String>)> {
    let sources: Vec<Source> = files.iter().map(|(path, code)| Source::new(path, (*code).to_owned())).collect();
    let found = circles(&imports_inside_folders(&sources));
    found.into_iter().map(|(folder, circle)| (folder, circle.into_iter().collect())).collect()
}

#[test]
fn circles_are_found_in_every_spelling() {
    let parent = ("src/m/mod.rs", "mod a; mod b; pub use b::{B as C, other::D}; pub(super) use a::A;");
    for (a, b) in [
        ("use super::b::B;", "use super::a::A;"),
        ("use super::{x::Y, b};", "fn f() -> u8 { super::a::f() }"),
        ("use super::{C, x};", "use crate::m::A;"),
        ("use crate::{m::{b::B}, x};", "use super::A as Z;"),
        ("use super::D;", "impl super::a::A {}"),
    ] {
        let found = circles_of(&[parent, ("src/m/a.rs", a), ("src/m/b.rs", b)]);
        assert_eq!(found, [("src/m".to_owned(), vec!["a".to_owned(), "b".to_owned()])], "{a} {b}");
    }
}

#[test]
fn circles_go_through_folders_and_third_files() {
    let files = [
        ("src/m/mod.rs", "mod a; mod b; mod c; pub use c::C;"),
        ("src/m/a.rs", "use super::b::deep::D;"),
        ("src/m/b/mod.rs", "pub mod deep; pub use deep::D;"),
        ("src/m/b/deep.rs", "use super::super::C; use crate::m::b::D;"),
        ("src/m/c.rs", "use super::a;"),
    ];
    let names = ["a", "b", "c"].map(str::to_owned).to_vec();
    assert_eq!(circles_of(&files), [("src/m".to_owned(), names)]);
}

#[test]
fn what_is_no_circle_is_left_alone() {
    for (a, b) in [
        ("use super::b::B;", "use super::Own;"),
        ("use super::b::B;", "#[cfg(test)] mod tests { use super::super::a::A; }"),
        ("use super::b::B;", "// use super::a::A;\nconst S: &str = \"super::a::A\";"),
        ("use super::b::B;", "use other::a::A; pub(in crate::m) fn f() {}"),
        ("use super::b::B;", "use self::inner::a; use super::super::a::A;"),
    ] {
        let parent = ("src/m/mod.rs", "mod a; mod b; pub use b::B; pub struct Own;");
        assert!(circles_of(&[parent, ("src/m/a.rs", a), ("src/m/b.rs", b), ("src/a.rs", "")]).is_empty(), "{a} {b}");
    }
}
