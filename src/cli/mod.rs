//! The command line: arguments in, one report out.
//!
//! The program `neuroada-ckpt` is [`run`] and nothing else; other packages that carry the command call it too.
//!
//! Each command is one file with its arguments and a `run` that opens files, calls one library function and hands the
//! report it got to `Env::report`; adding a command is that file, one line in `Command` and one in `run_command`. What all
//! commands share lies in `env` (global options, memory, threads), `progress` (the bar, Ctrl-C), `failure` (messages,
//! hints and exit codes) and `page` (tables, numbers for people). Data goes to stdout, all else to stderr.

mod about;
mod card;
mod cast;
mod combine;
mod completions;
mod convert;
#[cfg(feature = "train")]
mod data;
mod device;
mod diff;
mod env;
#[cfg(feature = "train")]
mod eval;
mod extract;
mod failure;
mod gpu;
mod init;
mod inputs;
mod inspect;
mod man;
mod mask;
mod mask_join;
mod merge;
mod pack;
mod page;
mod progress;
mod recover;
mod sync;
#[cfg(feature = "train")]
mod train;
mod unmerge;
mod unpack;
mod verify;
mod weights;

use std::{ffi::OsString, io, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use env::{Env, GlobalArgs};
use failure::CliResult;

/// Transform model checkpoints without loading them
///
/// Chooses the important connections of every neuron (masks), packs trained deltas on them into small adapter files, merges
/// them into checkpoints of any size and takes them out again bit for bit, and says exactly what changed.
#[derive(Parser)]
#[command(
    name = "neuroada-ckpt",
    version,
    max_term_width = 110,
    arg_required_else_help = true,
    after_long_help = EXIT_CODES
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: GlobalArgs,
}

const EXIT_CODES: &str = "\
Exit codes:
    0  done
    1  the answer is \"no\": files differ, a check failed
    2  the request makes no sense
    3  an input file is not what it should be
    4  refused: wrong base, merged already, output exists, locked
    5  reading or writing failed, or no space is left; nothing changed, unless the
       message (and `committed` in JSON) says that the work is done
    6  an interrupted change waits for recovery
  130  stopped by Ctrl-C";

/// One line per command; each is a file of this folder.
#[derive(Subcommand)]
enum Command {
    Inspect(inspect::InspectArgs),
    Mask(mask::MaskArgs),
    MaskJoin(mask_join::MaskJoinArgs),
    Init(init::InitArgs),
    Extract(extract::ExtractArgs),
    #[cfg(feature = "train")]
    Train(Box<train::TrainArgs>),
    #[cfg(feature = "train")]
    Eval(eval::EvalArgs),
    Convert(convert::ConvertArgs),
    Sync(sync::SyncArgs),
    Cast(cast::CastArgs),
    Merge(merge::MergeArgs),
    Unmerge(unmerge::UnmergeArgs),
    Verify(verify::VerifyArgs),
    Recover(recover::RecoverArgs),
    Diff(diff::DiffArgs),
    Combine(combine::CombineArgs),
    Pack(pack::PackArgs),
    Unpack(unpack::UnpackArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

fn run_command(command: Command, env: &Env) -> CliResult<Answer> {
    match command {
        Command::Inspect(args) => inspect::run(args, env),
        Command::Mask(args) => mask::run(args, env),
        Command::MaskJoin(args) => mask_join::run(args, env),
        Command::Init(args) => init::run(args, env),
        Command::Extract(args) => extract::run(args, env),
        #[cfg(feature = "train")]
        Command::Train(args) => train::run(*args, env),
        #[cfg(feature = "train")]
        Command::Eval(args) => eval::run(args, env),
        Command::Convert(args) => convert::run(args, env),
        Command::Sync(args) => sync::run(args, env),
        Command::Cast(args) => cast::run(args, env),
        Command::Merge(args) => merge::run(args, env),
        Command::Unmerge(args) => unmerge::run(args, env),
        Command::Verify(args) => verify::run(args, env),
        Command::Recover(args) => recover::run(args, env),
        Command::Diff(args) => diff::run(args, env),
        Command::Combine(args) => combine::run(args, env),
        Command::Pack(args) => pack::run(args, env),
        Command::Unpack(args) => unpack::run(args, env),
        Command::Completions(args) => completions::run(args, env),
        Command::Man(args) => man::run(args, env),
    }
}

/// What a command that went well found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    /// Done, or "yes" (exit 0).
    Yes,
    /// Files differ, or a check failed (exit 1).
    No,
}

/// Runs the command that `args` ask for, the program's name first, and returns the exit code for the process.
///
/// Reports go to stdout, messages to stderr. The process listens to Ctrl-C, SIGTERM and SIGHUP from then on, and rayon's
/// global threads are started: run one command in a process.
///
/// ```no_run
/// let exit_code = neuroada_ckpt::cli::run(std::env::args_os());
/// ```
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let definition = definition();
    let parsed = definition.clone().try_get_matches_from(args).and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches)?;
        Ok((cli, inputs::of(&definition, &matches)))
    });
    let (cli, inputs) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Help and versions come this way too; a reader who left early is no failure.
            return match error.print() {
                Err(e) if error.exit_code() == 0 && e.kind() != io::ErrorKind::BrokenPipe => ExitCode::from(5),
                _ => ExitCode::from(error.exit_code() as u8),
            };
        }
    };
    let json = cli.global.json;
    match Env::new(cli.global, inputs).and_then(|env| run_command(cli.command, &env).inspect(|_| env.farewell())) {
        Ok(Answer::Yes) => ExitCode::SUCCESS,
        Ok(Answer::No) => ExitCode::from(1),
        Err(error) => error.print(json),
    }
}

/// The whole command line as clap knows it, for completions and the man page.
fn definition() -> clap::Command {
    Cli::command()
}
