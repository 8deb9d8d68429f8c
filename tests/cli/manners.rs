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
    error: invalid value '1M' for '--max-memory <SIZE>': the minimum is 16M

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
    adapter files, merges adapters into checkpoints of any size, takes them out again bit for bit, and
    reports exactly what changed.

    Usage: neuroada-ckpt [OPTIONS] <COMMAND>

    Commands:
      inspect      Describe a checkpoint, mask or adapter
      mask         Choose the important connections of every neuron
      mask-join    Join the parts of a mask
      init         Create an adapter from a mask, with zeros or with values trained elsewhere
      extract      Extract the difference of two checkpoints as an adapter
      train        Train deltas on the connections of a mask
      eval         Evaluate a model on a file of rows: loss, and the share of right answers
      convert      Convert a sparse adapter from one format to another
      sync         Write and apply weight updates for inference servers
      cast         Cast or decode a checkpoint, or change the size of its shards
      merge        Merge adapters into a checkpoint
      unmerge      Take adapters out of a merged checkpoint, exactly
      verify       Verify a merge: recompute every changed weight, compare every other byte
      recover      Recover a checkpoint after an interrupted change in place
      diff         Compare two adapters, two masks or two checkpoints
      combine      Combine several adapters of one base into one adapter
      pack         Pack an adapter into a small file for distribution
      unpack       Unpack a packed adapter into the original file
      completions  Print a completion script for a shell
      man          Print a manual page, or write the pages of all commands
      help         Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    Global options:
          --threads <N>
              Number of threads [default: all cores, or the CPU limit of the container or Slurm task]
              
              [env: NEUROADA_THREADS]

          --max-memory <SIZE>
              Limit of resident memory, mapped pages and I/O buffers included [default: 1G; train and
              eval: as much as they need]
              
              A number of bytes, or a number with a unit: 256M, 4G, 1GiB. Units are powers of 1024. In a
              container or a Slurm job the default is at most half of the memory limit.
              
              [env: NEUROADA_MAX_MEMORY]

          --io <IO>
              Method of reading tensors

              Possible values:
              - auto:   Cached files are mapped, others are read with direct I/O
              - mmap:   Memory-mapped windows
              - direct: Direct I/O, past the page cache
              - read:   Ordinary reads, through the page cache
              
              [default: auto]

          --device <DEVICE>
              Device: auto, cpu, cuda or cuda:N
              
              On a GPU, `mask` chooses connections and `merge` adds LoRA adapters, with the same bytes
              as on the CPU, and `train` and `eval` run the model. All other work runs on the CPU, and
              with auto everything does. `inspect --devices` lists the devices.
              
              [default: auto]

          --gpu-memory <SIZE>
              Limit of GPU memory [default: 1G; train and eval: all free memory]

          --color <WHEN>
              Color of messages and titles

              Possible values:
              - auto:   On terminals, unless NO_COLOR is set
              - always: Always
              - never:  Never
              
              [default: auto]

          --json
              Print the report as one JSON document, errors too

      -q, --quiet
              Print only errors, and the document of --json

      -v, --verbose
              Print more on stderr: how the work is done, its speed and memory, and long lists in full

    Examples:
      neuroada-ckpt inspect llama
      neuroada-ckpt merge llama --adapter adapter.safetensors -o merged
      neuroada-ckpt unmerge merged

    Environment variables:
      NEUROADA_THREADS     default of --threads
      NEUROADA_MAX_MEMORY  default of --max-memory
      NO_COLOR             no color, as --color never
      COLUMNS              width of tables, from 80 to 200; by default that of the terminal
      SLURM_CPUS_PER_TASK, SLURM_MEM_PER_NODE, SLURM_MEM_PER_CPU
                           limits of a Slurm task, kept like those of a container's control group

    Signals:
      The first Ctrl-C, SIGTERM or SIGHUP stops a command cleanly: no partial output stays, a change in
      place is rolled
      back, `train` saves its state. The second ends the process at once. Under nohup, SIGHUP is
      ignored.

    Exit codes:
        0  done
        1  the answer is "no": files differ, a check failed
        2  the command line is wrong
        3  an input file is not what it should be
        4  refused: wrong base, merged already, output exists, locked
        5  reading or writing failed, or no space is left; nothing changed, unless the
           message (and `committed` in JSON) says that the work is done
        6  an interrupted change waits for recovery
      130  stopped by Ctrl-C, SIGTERM or SIGHUP
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

    Usage: neuroada-ckpt inspect <PATH>

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
