//! What the rules look for in a file's tokens.

use super::{
    rust_text::{Text, Token, text_at},
    source::Source,
};

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

/// Every place that prints, exits, or names a crate of the command line.
pub(crate) fn words(tokens: &[Token]) -> Vec<(usize, String)> {
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

/// A file's tokens without its tests: none of `tests.rs` and `*_tests.rs`, and no item behind `#[cfg(test)]`.
pub(crate) fn without_tests(source: &Source) -> Vec<&Token> {
    if source.path.ends_with("/tests.rs") || source.path.ends_with("_tests.rs") {
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
pub(crate) fn probes(tokens: &[&Token]) -> Vec<(usize, String)> {
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
pub(crate) fn changes(tokens: &[&Token]) -> Vec<(usize, String)> {
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
pub(crate) fn unproven(text: &Text, tokens: &[Token]) -> Vec<usize> {
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
