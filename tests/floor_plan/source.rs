//! The files of `src/`, read once for each rule.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use super::rust_text::{Text, Token, tokens};

/// Fails with `file:line: what` for all that `rule` finds in any file.
pub(crate) fn check(rule: &str, find: impl Fn(&Source) -> Vec<(usize, String)>) {
    let mut broken = String::new();
    for source in sources() {
        for (line, what) in find(&source) {
            write!(broken, "\n{}:{line}: {what}", source.path).expect("a string takes every word");
        }
    }
    assert!(broken.is_empty(), "{rule}{broken}");
}

pub(crate) struct Source {
    /// From the repository's root, with slashes.
    pub(crate) path: String,
    pub(crate) raw: String,
    pub(crate) text: Text,
    pub(crate) tokens: Vec<Token>,
}

impl Source {
    pub(crate) fn new(path: &str, raw: String) -> Self {
        let text = Text::new(&raw);
        let tokens = tokens(&text);
        Self { path: path.to_owned(), raw, text, tokens }
    }

    /// The folder under `src/`; `main.rs` belongs to the command line, `lib.rs` to none.
    pub(crate) fn floor(&self) -> Option<&str> {
        match self.path.strip_prefix("src/")? {
            "lib.rs" => None,
            "main.rs" => Some("cli"),
            path => Some(path.split_once('/').map_or_else(|| path.trim_end_matches(".rs"), |(folder, _)| folder)),
        }
    }

    /// How far the file's module lies below the crate's root: `src/mask/rank.rs`, which is `mask::rank`, two.
    pub(crate) fn depth(&self) -> usize {
        let path = self.path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
        if matches!(path, "lib" | "main") { 0 } else { path.split('/').count() }
    }
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn sources() -> Vec<Source> {
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
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("folders can be read").path()).collect();
    paths.sort();
    paths.into_iter().flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}
