//! The completion script for bash, made from the same definition as `--help`.
//!
//! clap_complete's own script compares the names of subcommands with and without replaced hyphens, so it completes nothing behind the
//! subcommands of a program with a hyphen in its name. It also offers options in place of paths. This script offers options for words that
//! begin with `-`, and leaves paths to bash.

use std::{any::TypeId, fmt::Write, path::PathBuf};

use clap::{Arg, Command};

/// The script for `definition`, which has been built.
pub(super) fn completion_script(definition: &Command) -> String {
    let mut parts = Parts::default();
    parts.add(definition, "");
    let name = definition.get_name();
    let function = format!("_{}", name.replace('-', "_"));
    let Parts { paths, values, commands } = parts;
    format!(
        r#"# Completions of {name} for bash.
{function}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD - 1]}}"
    local command="" options="" names="" i
    COMPREPLY=()
    # Bash splits --option=value into three words.
    if [[ $current == "=" ]]; then
        current=""
    elif [[ $previous == "=" ]]; then
        previous="${{COMP_WORDS[COMP_CWORD - 2]}}"
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$command ${{COMP_WORDS[i]}}" in
            {paths}) command+=" ${{COMP_WORDS[i]}}" ;;
        esac
    done
    # The value of an option.
    case "$command $previous" in
{values}    esac
    case "$command" in
{commands}    esac
    if [[ $current == -* ]]; then
        names="$options"
    fi
    COMPREPLY=($(compgen -W "$names" -- "$current"))
}}
complete -F {function} -o bashdefault -o default {name}
"#,
        paths = paths.join(" | ")
    )
}

/// Parts of the script, collected over all commands.
#[derive(Default)]
struct Parts {
    /// Commands, as patterns: `" sync export"`.
    paths: Vec<String>,
    /// Cases of options that take a value.
    values: String,
    /// Cases of commands: their options and names.
    commands: String,
}

impl Parts {
    /// Adds `command` and those below it; `path` is `""` for the program, `" sync export"` for a command.
    fn add(&mut self, command: &Command, path: &str) {
        let visible = || command.get_arguments().filter(|arg| !arg.is_hide_set());
        for option in visible().filter(|arg| !arg.is_positional() && arg.get_action().takes_values()) {
            // A global option is the same behind every command.
            if path.is_empty() || !option.is_global_set() {
                let prefix = if option.is_global_set() { "*\"" } else { &format!("\"{path}") };
                let patterns: Vec<String> = flags(option).map(|flag| format!("{prefix} {flag}\"")).collect();
                self.values += &format!("        {}) {} ;;\n", patterns.join(" | "), completion_of(option));
            }
        }
        let options: Vec<String> = visible().flat_map(flags).collect();
        let mut names: Vec<String> = visible().filter(|arg| arg.is_positional()).flat_map(possible_values).collect();
        for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
            names.push(below.get_name().to_owned());
            let path = format!("{path} {}", below.get_name());
            self.paths.push(format!("\"{path}\""));
            self.add(below, &path);
        }
        // Writing to a string does not fail.
        let _infallible = writeln!(
            self.commands,
            "        \"{path}\") options=\"{}\" names=\"{}\" ;;",
            options.join(" "),
            names.join(" ")
        );
    }
}

/// `--adapter` and `-a`; none of a positional argument.
fn flags(arg: &Arg) -> impl Iterator<Item = String> {
    let long = arg.get_long().map(|long| format!("--{long}"));
    long.into_iter().chain(arg.get_short().map(|short| format!("-{short}")))
}

/// The possible values of an argument, hidden ones left out.
pub(super) fn possible_values(arg: &Arg) -> Vec<String> {
    let shown = arg.get_possible_values().into_iter().filter(|value| !value.is_hide_set());
    shown.map(|value| value.get_name().to_owned()).collect()
}

/// The completion of an option's value: the possible values, files (left to bash), or nothing.
fn completion_of(option: &Arg) -> String {
    let values = possible_values(option);
    if !values.is_empty() {
        return format!("COMPREPLY=($(compgen -W \"{}\" -- \"$current\")); return", values.join(" "));
    }
    let is_folder = option.get_value_names().unwrap_or_default().iter().any(|name| name == "DIR");
    if is_folder || may_be_a_path(option) {
        "return".to_owned()
    } else {
        "compopt +o default +o bashdefault; return".to_owned()
    }
}

/// Whether the value may be a path, by its type or its value name.
pub(super) fn may_be_a_path(arg: &Arg) -> bool {
    let names = arg.get_value_names().unwrap_or_default();
    arg.get_value_parser().type_id() == TypeId::of::<PathBuf>()
        || names.iter().any(|name| name.contains("FILE") || name.contains("ADAPTER"))
}
