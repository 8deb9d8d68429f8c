use clap::Args;

use super::{
    Answer, definition,
    env::Env,
    failure::{CliError, CliResult},
};

/// Print the manual page
///
/// To read it: neuroada-ckpt man | man -l -
#[derive(Args)]
pub(super) struct ManArgs {
    /// The command to print the page of, such as merge or sync export; without one, that of neuroada-ckpt itself
    command: Vec<String>,
}

pub(super) fn run(args: ManArgs, env: &Env) -> CliResult<Answer> {
    let mut page = definition();
    page.build();
    let mut page_name = "neuroada-ckpt".to_owned();
    for name in &args.command {
        let command = page.find_subcommand(name).cloned();
        page = command.ok_or_else(|| CliError::usage(format!("there is no command \"{}\"", name.escape_debug())))?;
        page_name = format!("{page_name}-{}", page.get_name());
    }
    // A name without a space is what `man` looks for.
    let page_name: &'static str = Box::leak(page_name.into_boxed_str());
    let page = page.name(page_name);
    let mut roff = Vec::new();
    clap_mangen::Man::new(page).render(&mut roff)?;
    env.print(&roff)?;
    Ok(Answer::Yes)
}
