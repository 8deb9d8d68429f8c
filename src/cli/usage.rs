//! Command lines that clap refuses: clap's message with this program's tips.

use std::{ffi::OsString, process::ExitCode};

use clap::{
    Command, Error,
    builder::StyledStr,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::failure::CliError;

/// Prints clap's error, as a document too where the arguments ask for JSON, and returns the exit code.
pub(super) fn refuse(error: Error, definition: &Command, args: &[OsString]) -> ExitCode {
    let args: Vec<String> = args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let error = with_our_tips(error, definition, &args);
    // A closed stderr is not an error.
    let _nobody = error.print();
    if args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--json") {
        let text = error.to_string();
        let message = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: "));
        CliError::usage(message).advise(tip).print_document();
    }
    ExitCode::from(error.exit_code() as u8)
}

/// The same error with our tips in place of clap's, which suggest passing unknown options as values.
fn with_our_tips(mut error: Error, definition: &Command, args: &[String]) -> Error {
    if error.kind() == ErrorKind::InvalidSubcommand {
        return with_command_tip(error);
    }
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let Some(ContextValue::String(found)) = error.get(ContextKind::InvalidArg).cloned() else { return error };
    error.remove(ContextKind::Suggested);
    let tip = tip_for(&found, command_of(definition, args));
    if let Some(tip) = tip {
        error.remove(ContextKind::SuggestedArg);
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
    }
    error
}

/// Commands by other names for the same work.
const OTHER_NAMES: [(&[&str], &str); 6] = [
    (&["undo", "remove", "revert"], "unmerge"),
    (&["apply", "add", "fuse"], "merge"),
    (&["info", "show", "ls"], "inspect"),
    (&["compare"], "diff"),
    (&["evaluate", "test"], "eval"),
    (&["import", "export"], "convert"),
];

/// An error about an unknown command, with the command that has this name elsewhere.
fn with_command_tip(mut error: Error) -> Error {
    let Some(ContextValue::String(found)) = error.get(ContextKind::InvalidSubcommand) else { return error };
    let known = OTHER_NAMES.iter().find(|(names, _)| names.contains(&found.as_str()));
    if let Some((_, command)) = known {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(vec![(*command).to_owned()]));
    }
    error
}

/// The command named by the arguments; the program itself if there is none.
fn command_of<'a>(definition: &'a Command, args: &[String]) -> &'a Command {
    let mut command = definition;
    for arg in args.iter().skip(1) {
        if let Some(below) = command.find_subcommand(arg) {
            command = below;
        }
    }
    command
}

/// The probable intention behind an argument that `command` does not take.
fn tip_for(found: &str, command: &Command) -> Option<String> {
    let name = command.get_name();
    let takes = |option: &str| command.get_arguments().any(|arg| arg.get_long() == Some(option));
    let first = command.get_positionals().next().map(|arg| arg.get_id().as_str());
    let option = found.trim_start_matches('-').split('=').next().unwrap_or_default();
    if !found.starts_with('-') {
        // An extra positional argument.
        return match name {
            "merge" | "eval" => {
                Some("an adapter follows --adapter, as in --adapter FILE or --adapter FILE=0.5".to_owned())
            }
            "unmerge" | "verify" => Some("an adapter follows --adapter; a base follows --base".to_owned()),
            "mask" | "train" => Some(format!("`{name}` takes one checkpoint; --help lists its options")),
            _ => None,
        };
    }
    match option {
        "lora" | "peft" | "adapters" | "adapter-path" | "lora-path" if takes("adapter") => {
            Some("adapters of every kind follow --adapter: the folder of a PEFT adapter, or a file".to_owned())
        }
        "base" | "model" | "base-model" | "model-path" | "checkpoint" if first == Some("base") => {
            Some(format!("the base is the first argument: neuroada-ckpt {name} BASE ..."))
        }
        "base" | "model" if matches!(first, Some("path")) => {
            Some(format!("`{name}` takes the path of the checkpoint as its first argument, and no base"))
        }
        "base" => Some(format!("`{name}` needs no base")),
        "out" | "out-dir" | "output-dir" | "save" | "save-path" if takes("output") => {
            Some("the output follows --output, or -o".to_owned())
        }
        "scale" | "weight" | "alpha" if takes("adapter") => {
            Some("a scale follows the adapter and an equals sign: --adapter FILE=0.5".to_owned())
        }
        "gpu" | "cuda" => Some("--device cuda uses a GPU".to_owned()),
        "overwrite" | "yes" if takes("force") => Some("--force replaces an existing output".to_owned()),
        "rank" | "r" | "top-k" | "topk" if takes("k") => Some("-k N chooses N weights in each row".to_owned()),
        "dataset" | "train-data" if takes("data") => Some("the rows follow --data".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tips_say_what_this_program_takes() {
        let definition = crate::cli::definition();
        let tip = |command: &str, found: &str| {
            let args = ["neuroada-ckpt".to_owned(), command.to_owned()];
            tip_for(found, command_of(&definition, &args)).unwrap_or_default()
        };
        assert!(tip("merge", "--lora").contains("--adapter"));
        assert!(tip("mask", "--base").contains("first argument"));
        assert!(tip("inspect", "--base").contains("no base"));
        assert!(tip("merge", "a.safetensors").contains("--adapter"));
        assert!(tip("merge", "--scale").contains("FILE=0.5"));
        assert_eq!(tip("merge", "--frobnicate"), "");
    }
}
