use clap::Args;
use clap_complete::Shell;

use super::{Answer, bash, definition, env::Env, failure::CliResult};

/// Print a completion script for a shell
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CompletionsArgs {
    /// Shell to print the script for
    shell: Shell,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt completions bash > ~/.local/share/bash-completion/completions/neuroada-ckpt
  neuroada-ckpt completions zsh > ~/.zfunc/_neuroada-ckpt    # fpath+=~/.zfunc before compinit
  neuroada-ckpt completions fish > ~/.config/fish/completions/neuroada-ckpt.fish";

pub(super) fn run(args: CompletionsArgs, env: &Env) -> CliResult<Answer> {
    let mut definition = definition();
    let script = match args.shell {
        Shell::Bash => {
            definition.build();
            bash::completion_script(&definition).into_bytes()
        }
        shell => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut definition, "neuroada-ckpt", &mut script);
            if shell == Shell::Fish {
                script.extend(arguments_in_fish(&definition).bytes());
            }
            script
        }
    };
    env.print(&script)?;
    Ok(Answer::Yes)
}

/// Completions that clap_complete's script for fish lacks: arguments with possible values, and the commands behind `help`.
fn arguments_in_fish(definition: &clap::Command) -> String {
    let mut lines = String::new();
    for command in definition.get_subcommands() {
        let name = command.get_name();
        let mut words: Vec<String> = command.get_positionals().flat_map(bash::possible_values).collect();
        if name == "help" {
            words.extend(definition.get_subcommands().map(|command| command.get_name().to_owned()));
        }
        if !words.is_empty() {
            let condition = format!("__fish_neuroada_ckpt_using_subcommand {name}");
            lines += &format!("complete -c neuroada-ckpt -n \"{condition}\" -f -a \"{}\"\n", words.join(" "));
        }
    }
    lines
}
