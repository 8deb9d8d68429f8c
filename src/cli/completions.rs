use clap::Args;

use super::{Answer, definition, env::Env, failure::CliResult};

/// Print a completion script for a shell
///
/// For bash: neuroada-ckpt completions bash > ~/.local/share/bash-completion/completions/neuroada-ckpt
#[derive(Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: clap_complete::Shell,
}

pub(super) fn run(args: CompletionsArgs, env: &Env) -> CliResult<Answer> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut definition(), "neuroada-ckpt", &mut script);
    env.print(&script)?;
    Ok(Answer::Yes)
}
