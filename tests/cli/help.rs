//! Help, manual pages, color and the environment.

use std::process::Command;

use super::Workspace;

const COMMANDS: &[&str] = &[
    "inspect",
    "mask",
    "mask-join",
    "init",
    "extract",
    "convert",
    "cast",
    "sync",
    "sync export",
    "sync apply",
    "merge",
    "unmerge",
    "verify",
    "recover",
    "diff",
    "combine",
    "pack",
    "unpack",
    "completions",
    "man",
    #[cfg(feature = "train")]
    "train",
    #[cfg(feature = "train")]
    "eval",
];

fn stdout(workspace: &Workspace, line: &str) -> String {
    String::from_utf8(workspace.stdout(line)).unwrap()
}

#[test]
fn every_help_has_examples_and_the_global_options_in_one_line() {
    let workspace = Workspace::new();
    for command in COMMANDS {
        for flag in ["--help", "-h"] {
            let help = stdout(&workspace, &format!("{command} {flag}"));
            let examples = help.split_once("Examples:\n").map(|(_, examples)| examples).unwrap_or_default();
            let calls = examples.matches(&format!("  neuroada-ckpt {command} ")).count();
            assert!((1..=3).contains(&calls), "{command} {flag} has {calls} examples\n{help}");
            let lines = examples.split("\n\n").next().unwrap().lines();
            let is_whole = |line: &str| line.starts_with("  neuroada-ckpt ") && line.chars().count() <= 100;
            assert!(lines.into_iter().all(is_whole), "an example fits one line of 100 columns\n{help}");
            assert!(!help.contains("\n      --threads"), "{command} {flag}\n{help}");
            assert!(help.contains("(see `neuroada-ckpt help global`)"), "{command} {flag}\n{help}");
            assert!(help.lines().all(|line| line.chars().count() <= 112), "{command} {flag}\n{help}");
        }
    }
}

#[test]
fn the_global_options_are_listed_by_the_program_and_by_help_global() {
    let workspace = Workspace::new();
    for line in ["--help", "help", "help global", "global"] {
        let help = stdout(&workspace, line);
        for option in ["--threads <N>", "--max-memory <SIZE>", "--color <WHEN>", "[env: NEUROADA_THREADS]"] {
            assert!(help.contains(option), "{line}: {option}\n{help}");
        }
    }
    assert!(!stdout(&workspace, "--help").contains("\n  global "));
}

/// What commands do begins with a verb, what options mean with a capital letter; no text ends with a full stop.
#[test]
fn help_texts_have_one_form() {
    let workspace = Workspace::new();
    for command in COMMANDS {
        let help = stdout(&workspace, &format!("{command} -h"));
        let about = help.lines().next().unwrap();
        assert!(about.starts_with(char::is_uppercase) && !about.ends_with('.'), "{about}");
        let verb = about.split(' ').next().unwrap();
        assert!(!verb.ends_with('s') && !verb.ends_with("ing"), "{about}");
    }
}

#[test]
fn manual_pages_of_all_commands_are_written_at_once() {
    let workspace = Workspace::new();
    std::fs::create_dir(workspace.path("man1")).unwrap();
    let told = workspace.run("man --all man1");
    assert!(told.starts_with("exit: 0\n") && told.ends_with(" pages written\n"), "{told}");
    let files = workspace.files();
    assert_eq!(files.len(), COMMANDS.len() + 1, "one each, and the program itself: {files:?}");
    for command in COMMANDS {
        let page =
            std::fs::read_to_string(workspace.path(&format!("man1/neuroada-ckpt-{}.1", command.replace(' ', "-"))));
        let page = page.unwrap_or_else(|e| panic!("{command}: {e}"));
        assert!(page.contains("Examples:"), "{command}");
    }
    assert!(workspace.run("man --all man1").starts_with("exit: 4\n"), "pages are kept without --force");
    workspace.stdout("man --all man1 --force");
    let mut man = Command::new("man");
    let man = man.args(["--warnings", "-l", "man1/neuroada-ckpt-merge.1"]).current_dir(workspace.path(""));
    match man.env("MANPAGER", "cat").output() {
        Ok(output) if output.status.success() => {
            assert!(String::from_utf8_lossy(&output.stdout).contains("neuroada-ckpt"), "{output:?}");
        }
        _ => eprintln!("skipped: man cannot format pages here"),
    }
}

#[test]
fn color_is_only_where_it_is_asked_for() {
    let workspace = Workspace::new();
    let colored = |line: &str, variables: &[(&str, &str)]| {
        let output = workspace.command(line).envs(variables.iter().copied()).output().unwrap();
        [output.stdout, output.stderr].map(|bytes| bytes.contains(&0x1b))
    };
    let inspect = "inspect [FIXTURES]/tiny-llama";
    assert_eq!(colored(inspect, &[]), [false, false]);
    assert_eq!(colored(&format!("{inspect} --color always"), &[]), [true, false]);
    assert_eq!(colored(&format!("{inspect} --color always"), &[("NO_COLOR", "1")]), [true, false]);
    assert_eq!(colored("inspect nowhere --color always", &[]), [false, true]);
    assert_eq!(colored("inspect --nowhere --color=always", &[]), [false, true]);
    assert_eq!(colored("inspect nowhere --color never", &[]), [false, false]);
    assert_eq!(colored("inspect nowhere", &[]), [false, false]);
}

#[test]
fn tables_fit_the_terminal() {
    let workspace = Workspace::new();
    for columns in [80, 100, 200] {
        let mut command = workspace.command("inspect [FIXTURES]/tiny-llama --tensors");
        let output = command.env("COLUMNS", columns.to_string()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.lines().all(|line| line.chars().count() <= columns), "{columns}\n{text}");
        assert!(columns != 80 || text.contains('…'), "{text}");
        assert!(columns != 200 || !text.contains('…'), "{text}");
    }
}

#[test]
fn the_environment_sets_threads_and_memory() {
    let workspace = Workspace::new();
    let first_line = |variables: &[(&str, &str)], line: &str| {
        let mut command = workspace.command(&format!("inspect [FIXTURES]/tiny-llama -v {line}"));
        let output = command.envs(variables.iter().copied()).output().unwrap();
        String::from_utf8(output.stderr).unwrap().lines().next().unwrap_or_default().to_owned()
    };
    let ours = [("NEUROADA_THREADS", "3"), ("NEUROADA_MAX_MEMORY", "256M")];
    assert!(first_line(&ours, "").starts_with("3 threads, 256 MiB of memory, "));
    assert!(first_line(&ours, "--threads 2 --max-memory 128M").starts_with("2 threads, 128 MiB of memory, "));
    let slurm = [("SLURM_CPUS_PER_TASK", "1"), ("SLURM_MEM_PER_NODE", "512")];
    let told = first_line(&slurm, "");
    assert!(told.starts_with("1 threads, 256 MiB of memory, "), "{told}");
    assert!(first_line(&[slurm[0], slurm[1], ours[1]], "").contains(", 256 MiB"));
    let wrong = first_line(&[("NEUROADA_THREADS", "many")], "");
    assert!(wrong.starts_with("error: invalid value 'many' for '--threads <N>'"), "{wrong}");
}
