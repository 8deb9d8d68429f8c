//! README.md and the guide, held to what they say: README is short, its tour runs as written from top to bottom, and every command and option
//! that stands in a block of either exists.
//!
//! `NEUROADA_TOUR_MODEL=DIR cargo test --test tour` takes the tour on a model of your own: a folder of a Llama, Mistral, Qwen2 or Qwen3 checkpoint with its
//! tokenizer. Outputs are compared on the shipped model alone.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

const MAX_README_LINES: usize = 200;
const PROGRAM: &str = env!("CARGO_BIN_EXE_neuroada-ckpt");
/// What stands for lines that a shown output leaves out.
const LEFT_OUT: &str = "…";

/// A fenced block.
struct Block {
    language: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).expect("the repository's own file can be read")
}

fn blocks(markdown: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut is_open = false;
    for line in markdown.lines() {
        match line.strip_prefix("```") {
            Some(_) if is_open => is_open = false,
            Some(language) => {
                is_open = true;
                found.push(Block { language: language.to_owned(), text: String::new() });
            }
            None if is_open => {
                let block = found.last_mut().expect("a block is open");
                block.text += line;
                block.text += "\n";
            }
            None => {}
        }
    }
    assert!(!is_open, "a fenced block is never closed");
    found
}

/// The text below the heading `## NAME`, up to the next one.
fn section<'a>(markdown: &'a str, name: &str) -> &'a str {
    let (_, rest) = markdown.split_once(&format!("\n## {name}\n")).unwrap_or_else(|| panic!("no section \"{name}\""));
    rest.split("\n## ").next().expect("a split has a first part")
}

/// A folder that looks like a clone of the repository, as far as the tour needs it.
fn clone() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for name in ["tiny-llama", "tiny-llama-adapter.safetensors", "data"] {
        copy(&root().join("fixtures").join(name), &folder.path().join("fixtures").join(name));
    }
    folder
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().expect("it lies in a folder")).expect("folders can be made");
    if from.is_dir() {
        for entry in fs::read_dir(from).expect("fixtures can be listed") {
            let name = entry.expect("fixtures can be listed").file_name();
            copy(&from.join(&name), &to.join(&name));
        }
    } else {
        fs::copy(from, to).expect("fixtures can be copied");
    }
}

/// The program, found by its name, in an environment of its own.
fn bash(script: &str, folder: &Path) -> Output {
    let programs = Path::new(PROGRAM).parent().expect("a program lies in a folder");
    let mut path = vec![programs.to_owned()];
    path.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", script])
        .current_dir(folder)
        .env("PATH", env::join_paths(path).expect("no folder of PATH holds a colon"))
        .env("HOME", folder)
        .env("TMPDIR", folder)
        .stdin(Stdio::null());
    bash.output().expect("bash can be run")
}

/// Whether `printed` is what `shown` says, where a line `…` stands for any lines.
fn is_shown(printed: &str, shown: &str) -> bool {
    let printed: Vec<&str> = printed.trim_end().lines().map(str::trim_end).collect();
    let shown: Vec<&str> = shown.trim_end().lines().map(str::trim_end).collect();
    matches(&printed, &shown)
}

fn matches(printed: &[&str], shown: &[&str]) -> bool {
    match shown {
        [] => printed.is_empty(),
        [LEFT_OUT, rest @ ..] => (0..=printed.len()).any(|n| matches(&printed[n..], rest)),
        [line, rest @ ..] => printed.first() == Some(line) && matches(&printed[1..], rest),
    }
}

#[test]
fn readme_is_short() {
    let n_lines = read("README.md").lines().count();
    assert!(
        n_lines <= MAX_README_LINES,
        "README.md has {n_lines} lines, at most {MAX_README_LINES}: the rest goes to src/guide"
    );
}

#[test]
fn first_commands_of_readme_are_the_main_job_and_the_tests() {
    let readme = read("README.md");
    let commands: Vec<Block> = blocks(&readme).into_iter().filter(|block| block.language == "sh").take(2).collect();
    let job = commands[0].text.replace("cargo run --locked --", "neuroada-ckpt");
    let clone = clone();
    fs::create_dir(clone.path().join("target")).expect("cargo makes it");
    let done = bash(&job, clone.path());
    assert!(done.status.success(), "{job}{}", String::from_utf8_lossy(&done.stderr));
    let tests = commands[1].text.trim();
    assert_eq!(tests, "cargo test --locked");
    assert!(
        read(".ci/run").lines().any(|line| line.trim() == format!("run {tests}")),
        ".ci/run runs another test command"
    );
}

#[test]
#[cfg_attr(not(feature = "train"), ignore = "the tour trains an adapter")]
fn tour_runs_as_written_from_top_to_bottom() {
    let model = env::var_os("NEUROADA_TOUR_MODEL").map(|path| {
        let path = fs::canonicalize(path).expect("NEUROADA_TOUR_MODEL names a folder");
        path.into_os_string().into_string().expect("its path is UTF-8")
    });
    let readme = read("README.md");
    let tour = blocks(section(&readme, "A tour"));
    let clone = clone();
    let outputs = clone.path().join("outputs");
    fs::create_dir(&outputs).expect("folders can be made");
    let printed_by = |n: usize| -> PathBuf { outputs.join(n.to_string()) };

    let mut script = String::new();
    let mut n_blocks = 0;
    for block in tour.iter().filter(|block| block.language == "sh") {
        let text: Vec<String> = block.text.lines().map(|line| in_model(line, model.as_deref())).collect();
        // Braces, not a subshell: variables and the folder stay for the next block.
        script += &format!("{{\n{}\n}} >'{}'\n", text.join("\n"), printed_by(n_blocks).display());
        n_blocks += 1;
    }
    assert!(n_blocks > 0, "the tour has no commands");
    let done = bash(&script, clone.path());
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "the tour ended with {}:\n{script}\n{told}", done.status);

    let mut n_before = 0;
    for block in &tour {
        if block.language == "sh" {
            n_before += 1;
        } else if model.is_none() {
            assert_eq!(block.language, "text", "the tour has commands and their outputs");
            let printed = fs::read_to_string(printed_by(n_before - 1)).expect("outputs can be read");
            assert!(
                is_shown(&printed, &block.text),
                "README.md shows\n{}\nand the program prints\n{printed}",
                block.text
            );
        }
    }
}

/// A line of the tour, on another model where one is given.
fn in_model(line: &str, model: Option<&str>) -> String {
    match model {
        Some(model) if line.starts_with("model=") => format!("model='{model}'"),
        _ => line.to_owned(),
    }
}

#[test]
fn every_command_and_option_in_a_block_exists() {
    let mut pages = vec!["README.md".to_owned()];
    for entry in fs::read_dir(root().join("src/guide")).expect("the guide can be listed") {
        let name = entry.expect("the guide can be listed").file_name().into_string().expect("names are UTF-8");
        if name.ends_with(".md") {
            pages.push(format!("src/guide/{name}"));
        }
    }
    pages.sort();
    let mut unknown = Vec::new();
    for page in pages {
        let text = read(&page);
        let lines = blocks(&text).into_iter().filter(|block| block.language == "sh");
        for line in
            lines.flat_map(|block| block.text.replace("\\\n", " ").lines().map(str::to_owned).collect::<Vec<_>>())
        {
            let command = line.split(" #").next().expect("a split has a first part");
            let Some((_, arguments)) = command.split_once("neuroada-ckpt ") else { continue };
            let words: Vec<&str> = arguments.split([' ', '|', '>']).filter(|word| !word.is_empty()).collect();
            let help = help_of(&words);
            let options =
                words.iter().filter(|word| word.starts_with("--")).map(|word| word.split('=').next().unwrap_or(word));
            for option in options {
                if !help.as_ref().is_some_and(|help| is_option(help, option)) {
                    unknown.push(format!("{page}: {line}: {option}"));
                }
            }
            if help.is_none() {
                unknown.push(format!("{page}: {line}"));
            }
        }
    }
    assert!(unknown.is_empty(), "no such command or option:\n{}", unknown.join("\n"));
}

/// The help of the command that `words` begin with; of `sync export` it takes two.
fn help_of(words: &[&str]) -> Option<String> {
    let help = |names: &[&str]| {
        let told = Command::new(PROGRAM).arg("help").args(names).output().expect("the program runs");
        told.status.success().then(|| String::from_utf8(told.stdout).expect("help is UTF-8"))
    };
    match words {
        [option, ..] if option.starts_with('-') => help(&[]),
        ["help", command, ..] => help(&[command]),
        [group, command, ..] if !command.starts_with('-') => help(&[group, command]).or_else(|| help(&[group])),
        [command, ..] => help(&[command]),
        [] => None,
    }
}

fn is_option(help: &str, option: &str) -> bool {
    help.split(|c: char| c.is_whitespace() || ",[=".contains(c)).any(|word| word == option)
}
