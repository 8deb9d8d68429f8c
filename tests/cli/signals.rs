//! Ctrl-C and its kin, sent to a command that would take long.

use std::{
    fs::OpenOptions,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Workspace, adapters::write_adapter_for};

/// Proving this checkpoint takes many seconds: 400 GB of holes, and one small tensor that an adapter touches.
fn workspace() -> Option<Workspace> {
    let workspace = Workspace::new();
    let (small, hole) = (8 * 16 * 2, 400_000_000_000u64);
    let end = small + hole;
    let mut header = format!(
        r#"{{"proj.weight":{{"dtype":"BF16","shape":[8,16],"data_offsets":[0,{small}]}},
            "hole":{{"dtype":"U8","shape":[{hole}],"data_offsets":[{small},{end}]}}}}"#
    );
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let path = workspace.write("big.safetensors", [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat());
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    if let Err(e) = file.set_len(8 + header.len() as u64 + end) {
        eprintln!("skipped: no file of 400 GB can be made here: {e}");
        return None;
    }
    write_adapter_for(&path, &workspace.path("a.safetensors"), "proj.weight", 0, 1.0);
    Some(workspace)
}

const LONG: &str = "verify big.safetensors --base big.safetensors --adapter a.safetensors -v";

fn spawn(mut command: Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // By then it works on the hole, and listens.
    thread::sleep(Duration::from_millis(400));
    assert!(child.try_wait().unwrap().is_none(), "proving 400 GB takes longer");
    child
}

fn send(signal: Signal, child: &Child) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn ended(child: Child) -> Output {
    let began = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "it ends soon after a signal");
    output
}

#[test]
fn signals_stop_a_command_with_130() {
    let Some(workspace) = workspace() else { return };
    let before = workspace.files();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let child = spawn(workspace.command(LONG));
        send(signal, &child);
        let output = ended(child);
        assert_eq!(output.status.code(), Some(130), "{signal:?}");
        assert!(output.stdout.is_empty());
        assert!(String::from_utf8(output.stderr).unwrap().ends_with("error: stopped\n"));
    }
    assert_eq!(workspace.files(), before);
}

#[test]
fn a_command_under_nohup_outlives_its_terminal() {
    let Some(workspace) = workspace() else { return };
    let plain = workspace.command(LONG);
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(plain.get_program()).args(plain.get_args());
    command.current_dir(workspace.path("."));
    let mut child = spawn(command);
    send(Signal::HUP, &child);
    thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "the hangup was ignored");
    send(Signal::INT, &child);
    assert_eq!(ended(child).status.code(), Some(130));
}
