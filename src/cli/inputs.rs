//! Inputs: existing paths on the command line. No output may be one, contain one or lie in one.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use clap::{ArgMatches, Command};

use super::{
    bash::may_be_a_path,
    failure::{CliResult, Hint},
};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, InUse, Layout, Printable},
    mask::FileKind,
};

/// The id of the output argument, the same in every command.
const OUTPUT: &str = "output";

/// Opens a checkpoint that a command works on.
///
/// # Errors
/// A file of this program that is no checkpoint, besides those of [`Checkpoint::open`].
pub(super) fn open_base(path: &Path) -> CliResult<Checkpoint> {
    let checkpoint = Checkpoint::open(path)?;
    if let (Layout::File, [shard]) = (checkpoint.layout(), checkpoint.shards())
        && let FileKind::Document(kind) = FileKind::of(shard)?
    {
        let what = format!("is a file of this program (kind: {}), not a checkpoint", Printable(&kind));
        return Err(CheckpointError::bad_file(path, what))
            .hint("the base is the first argument; adapters and masks follow their options");
    }
    Ok(checkpoint)
}

/// Registers every existing path on the command line, except the output's. A new option for an input needs no entry here: its type is a
/// path, or its value name shows that the value may be a file.
pub(super) fn of(definition: &Command, matches: &ArgMatches) -> Vec<InUse> {
    let mut found = Vec::new();
    for arg in definition.get_arguments().filter(|arg| arg.get_id() != OUTPUT && may_be_a_path(arg)) {
        for value in matches.try_get_raw(arg.get_id().as_str()).ok().flatten().into_iter().flatten() {
            found.extend(register(value));
            // `FILE=SCALE`
            if let Some(at) = value.as_bytes().iter().rposition(|byte| *byte == b'=') {
                found.extend(register(OsStr::from_bytes(&value.as_bytes()[..at])));
            }
        }
    }
    if let Some((name, of_command)) = matches.subcommand()
        && let Some(command) = definition.find_subcommand(name)
    {
        found.extend(of(command, of_command));
    }
    found
}

/// Registers a value. A path that cannot be examined becomes an error when the command opens it; other values are not paths.
fn register(value: &OsStr) -> Vec<InUse> {
    if value.is_empty() { Vec::new() } else { InUse::register(Path::new(value)).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_that_reads_a_file_is_known() {
        let definition = crate::cli::definition();
        let mut seen = Vec::new();
        let commands = definition.get_subcommands();
        for command in commands.flat_map(|command| std::iter::once(command).chain(command.get_subcommands())) {
            let inputs = command.get_arguments().filter(|arg| arg.get_id() != OUTPUT && may_be_a_path(arg));
            seen.extend(inputs.map(|arg| format!("{} {}", command.get_name(), arg.get_id())));
        }
        for known in [
            "mask base",
            "mask gradients",
            "merge base",
            "merge adapters",
            "unmerge adapters",
            "unmerge base",
            "combine adapters",
            "convert input",
            "convert base",
            "export input",
            "export base",
            "apply input",
            "apply base",
            "pack adapter",
            "pack base",
            "init values",
            "init mask",
            "extract tuned",
            "mask-join parts",
            "verify adapters",
        ] {
            assert!(seen.iter().any(|seen| seen == known), "{known} is not among {seen:?}");
        }
        assert!(!seen.iter().any(|seen| seen.ends_with("device") || seen.ends_with("targets")), "{seen:?}");
    }
}
