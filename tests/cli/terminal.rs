//! What a user sees on a terminal: `script` runs the program on a pseudo terminal.

use std::process::{Command, Stdio};

use super::{Workspace, harness::skip};

/// Runs a command line in a shell on a terminal of 90 columns, and returns all that it printed; `None` where that is not possible.
fn on_terminal(workspace: &Workspace, line: &str) -> Option<String> {
    let plain = workspace.command(line);
    let words: Vec<String> = std::iter::once(plain.get_program())
        .chain(plain.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let mut script = Command::new("script");
    script
        .args(["-qec", &format!("stty cols 90; {}", words.join(" ")), "/dev/null"])
        .current_dir(workspace.path(""))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("TERM", "xterm")
        .env("HOME", workspace.path(""))
        .stdin(Stdio::null());
    match script.output() {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        _ => skip("no `script` that runs programs on a pseudo terminal"),
    }
}

#[test]
fn a_terminal_gets_color_and_tables_that_fit() {
    let workspace = Workspace::new();
    let Some(text) = on_terminal(&workspace, "inspect [FIXTURES]/tiny-llama --tensors") else { return };
    assert!(text.contains("\u{1b}[1mkind "), "titles are bold: {text}");
    let lines = text.lines().map(|line| line.trim_end().replace("\u{1b}[1m", "").replace("\u{1b}[0m", ""));
    assert!(lines.into_iter().all(|line| line.chars().count() <= 90), "{text}");
    let plain = on_terminal(&workspace, "inspect [FIXTURES]/tiny-llama --color never").unwrap();
    assert!(!plain.contains("\u{1b}[1m"), "{plain}");
}

#[cfg(feature = "train")]
#[test]
fn training_shows_a_bar_with_the_loss() {
    let workspace = Workspace::new();
    let data = "--data [FIXTURES]/data/commonsense.jsonl --batch-size 2 --max-steps 6";
    let line = format!("train [FIXTURES]/tiny-llama -k 1 {data} -o a.safetensors");
    let Some(text) = on_terminal(&workspace, &line) else { return };
    let bar = text.split(['\r', '\n']).find(|line| line.contains("training, loss 5.") && line.contains(" 6/6 steps "));
    let bar = bar.unwrap_or_else(|| panic!("no bar of the last step: {text}"));
    assert!(bar.contains("100 % 6/6 steps") && bar.contains("/s ETA 0s"), "{bar}");
}
