//! The command line: arguments in, one report out.
//!
//! The program `neuroada-ckpt` only calls [`run`]; other packages that ship the command call it too.
//!
//! Each command is one file with its arguments and a `run` that opens files, calls one library function and passes the report to
//! `Env::report`. A new command is such a file, one line in `Command` and one in `run_command`. All commands share `env` (global options,
//! memory, threads), `limits` (containers and batch systems), `progress` (the bar, signals), `failure` (messages, hints and exit codes),
//! `missing` and `usage` (advice on mistakes), `help` (texts around clap's help) and `page` (tables, readable numbers). Data goes to
//! stdout, everything else to stderr.

mod about;
mod bash;
mod card;
mod cast;
mod color;
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
mod help;
mod init;
mod inputs;
mod inspect;
mod limits;
mod man;
mod mask;
mod mask_join;
mod merge;
mod missing;
mod pack;
mod page;
mod progress;
mod recover;
mod sync;
#[cfg(feature = "train")]
mod train;
mod unmerge;
mod unpack;
mod usage;
mod verify;
mod weights;

use std::{ffi::OsString, io, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use env::{Env, GlobalArgs};
use failure::CliResult;

/// Transform model checkpoints without loading them
///
/// Chooses the important connections of every neuron (masks), packs trained deltas on them into small adapter files, merges adapters into
/// checkpoints of any size, takes them out again bit for bit, and reports exactly what changed.
#[derive(Parser)]
#[command(
    name = "neuroada-ckpt",
    version,
    max_term_width = 110,
    arg_required_else_help = true,
    after_help = help::EXAMPLES,
    after_long_help = help::AFTER_LONG_HELP
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: GlobalArgs,
}

/// The commands; each is a file of this folder.
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
    /// List the global options
    ///
    /// They may stand before or behind the command.
    #[command(hide = true)]
    Global,
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
        Command::Global => help::print_global(env),
    }
}

/// The answer of a command that did not fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    /// Done, or "yes" (exit 0).
    Yes,
    /// Files differ, or a check failed (exit 1).
    No,
}

/// Runs the command in `args`, which begin with the program's name, and returns the exit code for the process.
///
/// Reports go to stdout, messages to stderr. Installs handlers for Ctrl-C, SIGTERM and SIGHUP, and starts rayon's global threads: run one
/// command per process.
///
/// ```no_run
/// let exit_code = neuroada_ckpt::cli::run(std::env::args_os());
/// ```
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let definition = help::definition_for(&args);
    let parsed = definition.clone().try_get_matches_from(&args).and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches)?;
        Ok((cli, inputs::of(&definition, &matches)))
    });
    let (cli, inputs) = match parsed {
        Ok(parsed) => parsed,
        Err(error) if error.exit_code() != 0 => return usage::refuse(error, &definition, &args),
        Err(error) => {
            // Help and versions. A closed pipe is not an error.
            return match error.print() {
                Err(e) if e.kind() != io::ErrorKind::BrokenPipe => ExitCode::from(5),
                _ => ExitCode::SUCCESS,
            };
        }
    };
    let (json, verbose, color) = (cli.global.json, cli.global.verbose, cli.global.color);
    match Env::new(cli.global, inputs).and_then(|env| run_command(cli.command, &env).inspect(|_| env.farewell())) {
        Ok(Answer::Yes) => ExitCode::SUCCESS,
        Ok(Answer::No) => ExitCode::from(1),
        Err(error) => error.print(json, verbose, color),
    }
}

/// The whole command line as clap knows it, for completions and the manual page.
fn definition() -> clap::Command {
    Cli::command()
}
