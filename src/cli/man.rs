use clap::Args;

use super::{Answer, definition, env::Env};

/// Print the manual page
///
/// To read it: neuroada-ckpt man | man -l -
#[derive(Args)]
pub(super) struct ManArgs {
    /// The command to print the page of; without one, that of neuroada-ckpt itself
    command: Option<String>,
}

pub(super) fn run(args: ManArgs, env: &Env) -> anyhow::Result<Answer> {
    let mut root = definition();
    root.build();
    let page = match &args.command {
        None => root,
        Some(name) => {
            let command = root
                .find_subcommand(name)
                .ok_or_else(|| anyhow::anyhow!("there is no command \"{}\"", name.escape_debug()))?;
            // A name without a space is what `man` looks for.
            let page_name: &'static str = Box::leak(format!("neuroada-ckpt-{}", command.get_name()).into_boxed_str());
            command.clone().name(page_name)
        }
    };
    let mut roff = Vec::new();
    clap_mangen::Man::new(page).render(&mut roff)?;
    env.print(&roff)?;
    Ok(Answer::Yes)
}
