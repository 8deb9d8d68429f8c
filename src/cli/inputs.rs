//! What the command line names and is there: inputs, which no output may be, hold or lie in.

use std::{
    any::TypeId,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgMatches, Command};

use crate::checkpoint::InUse;

/// The one argument of every command that says where to write.
const OUTPUT: &str = "output";

/// Registers every value of the command line that leads to a file or folder, but the output's. Whoever adds an option that names an
/// input has nothing to do: it is a path, or a word whose value name says that it may be a file.
pub(super) fn of(definition: &Command, matches: &ArgMatches) -> Vec<InUse> {
    let mut found = Vec::new();
    for arg in definition.get_arguments().filter(|arg| arg.get_id() != OUTPUT && may_name_a_file(arg)) {
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

fn may_name_a_file(arg: &Arg) -> bool {
    let names = arg.get_value_names().unwrap_or_default();
    arg.get_value_parser().type_id() == TypeId::of::<PathBuf>()
        || names.iter().any(|name| name.contains("FILE") || name.contains("ADAPTER"))
}

/// What cannot be examined is met again, as an error, by the command that opens it; other values are no paths at all.
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
            let inputs = command.get_arguments().filter(|arg| arg.get_id() != OUTPUT && may_name_a_file(arg));
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
