use insta::assert_snapshot;

use super::Workspace;

#[test]
fn version_is_that_of_the_crate() {
    assert_snapshot!(Workspace::new().run("--version"), @r"
    exit: 0
    --- stdout
    neuroada-ckpt 0.1.0
    --- stderr
    ");
}

#[test]
fn an_unknown_command_is_a_usage_error() {
    assert_snapshot!(Workspace::new().run("inspekt x"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: unrecognized subcommand 'inspekt'

      tip: a similar subcommand exists: 'inspect'

    Usage: neuroada-ckpt [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
}

#[test]
fn a_missing_file_is_named() {
    assert_snapshot!(Workspace::new().run("inspect nowhere"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot open `nowhere`: No such file or directory (os error 2)
    ");
}

#[test]
fn a_device_that_is_none_is_refused_in_words() {
    assert_snapshot!(Workspace::new().run("inspect x --device cuda:x"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: invalid value 'cuda:x' for '--device <DEVICE>': expected auto, cpu, cuda or cuda:N

    For more information, try '--help'.
    ");
}

#[test]
fn too_little_memory_is_refused() {
    assert_snapshot!(Workspace::new().run("inspect x --max-memory 1M"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: invalid value '1M' for '--max-memory <SIZE>': at least 16M are needed

    For more information, try '--help'.
    ");
}

#[test]
fn help_lists_commands_options_and_exit_codes() {
    assert_snapshot!(Workspace::new().run("--help"), @r#"
    exit: 0
    --- stdout
    Transform model checkpoints without loading them

    Chooses the important connections of every neuron (masks), packs trained deltas on them into small
    adapter files, merges them into checkpoints of any size and takes them out again bit for bit, and
    says exactly what changed.

    Usage: neuroada-ckpt [OPTIONS] <COMMAND>

    Commands:
      inspect      Say what a checkpoint, mask or adapter is
      mask         Choose the important connections of every neuron
      mask-join    Put the parts of a mask together
      init         Start an adapter from a mask: zeros, or values trained elsewhere
      extract      Make an adapter of what changed between two checkpoints
      train        Train deltas on the connections that a mask chose
      eval         Measure a model on a file of rows: loss, and how many answers are right
      convert      Read other tools' sparse adapters, and write them
      sync         Make and apply the weight updates that inference servers fetch
      cast         Write a checkpoint in another type, or in shards of another size
      merge        Add adapters to a checkpoint
      unmerge      Take adapters out of a checkpoint again, exactly
      verify       Prove a merge: every touched weight is right, every other byte is the base's
      recover      Finish or roll back an interrupted change
      diff         Say what differs between two adapters, masks or checkpoints
      combine      Combine adapters of one base into one
      pack         Pack an adapter into the fewest bytes, to distribute it
      unpack       Unpack a packed adapter: the very file that was packed
      completions  Print a completion script for a shell
      man          Print the manual page
      help         Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    Global options:
          --threads <N>
              Threads to use [default: all cores]

          --max-memory <SIZE>
              Resident memory to stay within, mapped pages and I/O buffers counted [default: 1G; for
              models, what they need]
              
              A number of bytes, or one with a unit: 256M, 4G, 1GiB. Units are powers of 1024.

          --io <IO>
              How tensors are read

              Possible values:
              - auto:   What is in memory is mapped, the rest read past the page cache
              - mmap:   Files are mapped, in windows
              - direct: Files are read past the page cache
              - read:   Files are read through the page cache
              
              [default: auto]

          --device <DEVICE>
              Where the work is done: auto, cpu, cuda or cuda:N
              
              Where they are asked for a GPU, `mask` chooses and `merge` adds LoRA adapters on it, with
              the same bytes for a result, and `train` and `eval` work there. All else is done on the
              CPU, and so is everything with auto. `inspect --devices` tells what there is.
              
              [default: auto]

          --gpu-memory <SIZE>
              Memory of the GPU to stay within [default: 1G; for models, what is free]

          --json
              Print the report as one JSON document; an error too

      -q, --quiet
              Print nothing but errors, and what --json asks for

      -v, --verbose
              Also say on stderr how the work is done and how fast it went

    Exit codes:
        0  done
        1  the answer is "no": files differ, a check failed
        2  the request makes no sense
        3  an input file is not what it should be
        4  refused: wrong base, merged already, output exists, locked
        5  reading or writing failed, or no space is left; nothing changed, unless the
           message (and `committed` in JSON) says that the work is done
        6  an interrupted change waits for recovery
      130  stopped by Ctrl-C
    --- stderr
    "#);
}

#[test]
fn no_command_is_a_usage_error_that_shows_help() {
    let told = Workspace::new().run("");
    assert!(told.starts_with("exit: 2\n--- stdout\n--- stderr\n") && told.contains("Usage: neuroada-ckpt"), "{told}");
}

#[test]
fn quiet_and_verbose_exclude_each_other() {
    assert_snapshot!(Workspace::new().run("inspect x -q -v"), @r"
    exit: 2
    --- stdout
    --- stderr
    error: the argument '--quiet' cannot be used with '--verbose'

    Usage: neuroada-ckpt inspect --quiet <PATH>

    For more information, try '--help'.
    ");
}

#[test]
fn quiet_prints_no_report_but_json() {
    let workspace = Workspace::new();
    assert_snapshot!(workspace.run("inspect [FIXTURES]/tiny-llama -q"), @r"
    exit: 0
    --- stdout
    --- stderr
    ");
    assert_eq!(workspace.json("inspect [FIXTURES]/tiny-llama -q")["model_type"], "llama");
}

#[test]
fn verbose_tells_on_stderr_how_the_work_is_done() {
    let told =
        Workspace::new().run("inspect [FIXTURES]/accepted/no-tensors.safetensors -v --threads 3 --max-memory 256M");
    assert!(told.contains("--- stderr\n3 threads, 256 MiB of memory, "), "{told}");
    #[cfg(target_os = "linux")]
    assert!(told.trim_end().ends_with(" MiB of memory at the peak"), "{told}");
}

/// The command's exit status and stderr when its reader has gone before it writes.
fn with_closed_stdout(line: &str) -> (Option<i32>, String) {
    let workspace = Workspace::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = workspace.command(line).stdout(writer).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_closed_pipe_ends_quietly() {
    for line in
        ["inspect [FIXTURES]/tiny-llama", "inspect [FIXTURES]/tiny-llama --json", "completions zsh", "man", "--help"]
    {
        assert_eq!(with_closed_stdout(line), (Some(0), String::new()), "{line}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_under_stdout_is_told() {
    let workspace = Workspace::new();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = workspace.command("inspect [FIXTURES]/tiny-llama").stdout(full).output().unwrap();
    assert_snapshot!(workspace.told(&output), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot write to stdout: No space left on device (os error 28)
    ");
}

#[test]
fn completions_are_printed_for_every_shell() {
    let workspace = Workspace::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = String::from_utf8(workspace.stdout(&format!("completions {shell}"))).unwrap();
        assert!(script.contains("inspect") && script.contains("max-memory"), "{shell}");
    }
    assert!(workspace.run("completions tcsh").starts_with("exit: 2\n"));
}

#[test]
fn manual_pages_are_printed_for_all_and_each_command() {
    let workspace = Workspace::new();
    let page = String::from_utf8(workspace.stdout("man")).unwrap();
    assert!(page.contains(".TH neuroada-ckpt 1") && page.contains("Exit codes"), "{page}");
    let page = String::from_utf8(workspace.stdout("man inspect")).unwrap();
    assert!(page.contains(".TH neuroada-ckpt-inspect 1") && page.contains("filter"), "{page}");
    let page = String::from_utf8(workspace.stdout("man sync export")).unwrap();
    assert!(page.contains(".TH neuroada-ckpt-sync-export 1") && page.contains("checksum"), "{page}");
    assert_snapshot!(workspace.run("man nothing"), @r#"
    exit: 2
    --- stdout
    --- stderr
    error: there is no command "nothing"
    "#);
}
