//! Completions, asked of real shells. A shell that is not installed skips its test and says so.

use std::process::{Command, Output, Stdio};

use super::{Workspace, harness::skip};

/// What is typed up to the cursor, and words that must be among the offers.
const OFFERED: &[(&str, &[&str])] = &[
    ("neuroada-ckpt ", &["inspect", "merge", "mask-join", "sync"]),
    ("neuroada-ckpt mer", &["merge"]),
    ("neuroada-ckpt merge --a", &["--adapter", "--allow-overflow"]),
    ("neuroada-ckpt merge tiny-llama --in", &["--in-place"]),
    ("neuroada-ckpt merge --max", &["--max-memory"]),
    ("neuroada-ckpt mask-join --fo", &["--force"]),
    ("neuroada-ckpt combine --method ", &["linear", "ties", "dare-ties"]),
    ("neuroada-ckpt sync ", &["export", "apply"]),
    ("neuroada-ckpt sync export --enc", &["--encoding"]),
    ("neuroada-ckpt sync export --encoding ", &["overwrite", "xor"]),
    ("neuroada-ckpt completions ", &["bash", "zsh", "fish"]),
    ("neuroada-ckpt help mer", &["merge"]),
    ("neuroada-ckpt merge --io ", &["auto", "mmap", "direct", "read"]),
];

/// The completion script of a shell, in a file of the folder.
fn write_script(workspace: &Workspace, shell: &str) {
    let script = workspace.stdout(&format!("completions {shell}"));
    workspace.write("script", script);
}

/// Runs a shell in the folder; `None` where it is not installed.
fn shell(workspace: &Workspace, shell: &str, arguments: &[&str]) -> Option<Output> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut command = Command::new(shell);
    command.args(arguments).current_dir(workspace.path("")).env_clear().env("PATH", path);
    command.env("HOME", workspace.path("")).env("TERM", "dumb").stdin(Stdio::null());
    // For a shell that is unpacked somewhere, not installed.
    for name in ["FPATH", "LD_LIBRARY_PATH", "MODULE_PATH"] {
        command.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    match command.output() {
        Ok(output) => Some(output),
        Err(e) => skip(&format!("{shell} cannot be run: {e}")),
    }
}

/// The words that a shell printed, one a line, without their descriptions.
fn offers(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    let word = |line: &str| line.split(['\t', '\r']).next().unwrap_or_default().trim().to_owned();
    text.lines().map(word).filter(|word| !word.is_empty()).collect()
}

fn assert_offers(shell: &str, typed: &str, output: &Output, expected: &[&str]) {
    let offers = offers(output);
    for word in expected {
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(offers.iter().any(|offer| offer == word), "{shell}: {typed}: no {word} in {offers:?}\n{errors}");
    }
}

/// Fills the words of the command line in as bash does, and calls the function that the script registered.
const IN_BASH: &str = r#"
    source ./script
    IFS=' ' read -r -a COMP_WORDS <<< "$1"
    [[ $1 == *' ' ]] && COMP_WORDS+=("")
    if [[ ${COMP_WORDS[-1]} == --*=* ]]; then
        last="${COMP_WORDS[-1]}"
        COMP_WORDS[-1]="${last%%=*}"
        COMP_WORDS+=("=")
        [[ -n ${last#*=} ]] && COMP_WORDS+=("${last#*=}")
    fi
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    function=$(complete -p neuroada-ckpt | sed 's/.*-F \([^ ]*\).*/\1/')
    compopt() { echo "compopt $*"; }
    "$function" neuroada-ckpt "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    printf '%s\n' "${COMPREPLY[@]}"
"#;

#[test]
fn bash_completes_behind_every_command() {
    let workspace = Workspace::new();
    write_script(&workspace, "bash");
    let complete = |typed: &str| shell(&workspace, "bash", &["--norc", "--noprofile", "-c", IN_BASH, "bash", typed]);
    for (typed, expected) in OFFERED {
        let Some(output) = complete(typed) else { return };
        assert_offers("bash", typed, &output, expected);
    }
    let offered = |typed: &str| offers(&complete(typed).unwrap());
    assert_eq!(offered("neuroada-ckpt combine --method=ti"), ["ties"]);
    assert_eq!(offered("neuroada-ckpt combine --method="), ["linear", "ties", "dare", "dare-ties", "priority"]);
    assert_eq!(offered("neuroada-ckpt --io d"), ["direct"]);
    // Paths are left to bash, numbers are not completed.
    assert_eq!(offered("neuroada-ckpt merge "), [""; 0]);
    assert_eq!(offered("neuroada-ckpt merge tiny-llama --adapter "), [""; 0]);
    assert_eq!(offered("neuroada-ckpt mask tiny-llama --k "), ["compopt +o default +o bashdefault"]);
    assert_eq!(offered("neuroada-ckpt mask tiny-llama --k=").len(), 1);
    // Hidden options stay hidden.
    assert!(!offered("neuroada-ckpt convert --").contains(&"--encoding".to_owned()));
}

#[test]
fn fish_completes_behind_every_command() {
    let workspace = Workspace::new();
    write_script(&workspace, "fish");
    for (typed, expected) in OFFERED {
        let line = format!("source ./script; complete -C '{typed}'");
        let Some(output) = shell(&workspace, "fish", &["--no-config", "-c", &line]) else { return };
        assert_offers("fish", typed, &output, expected);
    }
}

/// Runs an interactive zsh on a pseudo terminal and prints what its completion system adds for the line in `$1`.
const IN_ZSH: &str = include_str!("complete.zsh");

#[test]
fn zsh_completes_behind_every_command() {
    let workspace = Workspace::new();
    write_script(&workspace, "zsh");
    workspace.write("complete.zsh", IN_ZSH);
    for (typed, expected) in OFFERED {
        let Some(output) = shell(&workspace, "zsh", &["-f", "complete.zsh", typed]) else { return };
        if output.status.code() == Some(77) {
            return skip("this zsh has no module zsh/zpty").unwrap_or_default();
        }
        assert_offers("zsh", typed, &output, expected);
    }
}
