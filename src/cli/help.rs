//! Texts around clap's help: examples, exit codes, environment variables, and the list of global options.

use std::ffi::OsString;

use clap::Command;

use super::{Answer, color::ColorChoice, definition, env::Env, failure::CliResult};

pub(super) const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt inspect llama
  neuroada-ckpt merge llama --adapter adapter.safetensors -o merged
  neuroada-ckpt unmerge merged

`neuroada-ckpt help COMMAND` describes a command, `neuroada-ckpt help global` the options that all of them have.";

pub(super) const AFTER_LONG_HELP: &str = "\
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
  The first Ctrl-C, SIGTERM or SIGHUP stops a command cleanly: no partial output stays, a change in place is rolled
  back, `train` saves its state. The second ends the process at once. Under nohup, SIGHUP is ignored.

Exit codes:
    0  done
    1  the answer is \"no\": files differ, a check failed
    2  the command line is wrong
    3  an input file is not what it should be
    4  refused: wrong base, merged already, output exists, locked
    5  reading or writing failed, or no space is left; nothing changed, unless the
       message (and `committed` in JSON) says that the work is done
    6  an interrupted change waits for recovery
  130  stopped by Ctrl-C, SIGTERM or SIGHUP";

/// The command line for these arguments. The help of a command has the global options in one line; that of the program and of `global`
/// lists them.
pub(super) fn definition_for(args: &[OsString]) -> Command {
    let definition = definition().color(color_of(args).for_clap());
    let names_a_command = |arg: &&OsString| definition.find_subcommand(arg).is_some_and(|c| c.get_name() != "global");
    let has_command = args.iter().skip(1).filter(|arg| *arg != "help").any(|arg| names_a_command(&arg));
    if has_command { with_short_global(definition) } else { definition }
}

/// The same definition with the global options of all commands in one line of their help.
pub(super) fn with_short_global(definition: Command) -> Command {
    let globals = definition.get_arguments().filter(|arg| arg.is_global_set());
    let names: Vec<String> = globals.filter_map(|arg| arg.get_long()).map(|long| format!("--{long}")).collect();
    let line = format!("Global options: {} (see `neuroada-ckpt help global`)", names.join(", "));
    let hidden = definition.mut_args(|arg| if arg.is_global_set() { arg.hide(true) } else { arg });
    hidden.mut_subcommands(|command| append(command, &line))
}

/// Appends a line to the help of a command and of those below it.
fn append(command: Command, line: &str) -> Command {
    let text = match command.get_after_help() {
        Some(examples) => format!("{examples}\n\n{line}"),
        None => line.to_owned(),
    };
    command.after_help(text).mut_subcommands(|below| append(below, line))
}

/// `--color` among arguments that are not parsed yet; a wrong value is refused later.
pub(super) fn color_of(args: &[OsString]) -> ColorChoice {
    let words: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
    let after = |at: usize| words.get(at + 1).copied();
    let value = words.iter().enumerate().find_map(|(at, word)| match word.strip_prefix("--color=") {
        Some(value) => Some(value),
        None => after(at).filter(|_| *word == "--color"),
    });
    match value {
        Some("always") => ColorChoice::Always,
        Some("never") => ColorChoice::Never,
        _ => ColorChoice::Auto,
    }
}

/// `neuroada-ckpt global`: prints the help on the global options.
pub(super) fn print_global(env: &Env) -> CliResult<Answer> {
    let mut definition = definition();
    definition.build();
    if let Some(global) = definition.find_subcommand_mut("global") {
        env.print(global.render_long_help().to_string().as_bytes())?;
    }
    Ok(Answer::Yes)
}
