use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Command};

use super::{
    Answer, definition,
    env::Env,
    failure::{CliError, CliResult},
    help,
};
use crate::checkpoint::{Existing, write_atomic};

/// Print a manual page, or write the pages of all commands
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ManArgs {
    /// Command of the page, such as merge or sync export [default: neuroada-ckpt itself]
    command: Vec<String>,
    /// Folder for the pages of all commands, one file each
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    all: Option<OsString>,
    /// Replace existing pages
    #[arg(long, requires = "all")]
    force: bool,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt man merge | man -l -
  neuroada-ckpt man --all ~/.local/share/man/man1";

pub(super) fn run(args: ManArgs, env: &Env) -> CliResult<Answer> {
    let mut program = definition();
    program.build();
    let mut commands = help::with_short_global(definition());
    commands.build();
    if let Some(folder) = args.all {
        let existing = if args.force { Existing::Replace } else { Existing::Keep };
        let mut pages = vec![Page::of(program, NAME)?];
        collect(&commands, NAME, &mut pages)?;
        for page in &pages {
            let path = PathBuf::from(&folder).join(format!("{}.1", page.name));
            write_atomic(&path, existing, &page.roff)?;
        }
        env.note(&format!("{} pages written", pages.len()));
        return Ok(Answer::Yes);
    }
    let mut command = if args.command.is_empty() { &program } else { &commands };
    let mut page_name = NAME.to_owned();
    for name in &args.command {
        let below = command.find_subcommand(name);
        command = below.ok_or_else(|| CliError::usage(format!("there is no command \"{}\"", name.escape_debug())))?;
        page_name = format!("{page_name}-{}", command.get_name());
    }
    env.print(&Page::of(command.clone(), &page_name)?.roff)?;
    Ok(Answer::Yes)
}

const NAME: &str = "neuroada-ckpt";

/// A manual page.
struct Page {
    /// Without spaces, as `man` looks for it: `neuroada-ckpt-sync-export`.
    name: String,
    roff: Vec<u8>,
}

impl Page {
    fn of(command: Command, name: &str) -> CliResult<Self> {
        // clap keeps names for as long as the process lives.
        let leaked: &'static str = Box::leak(name.to_owned().into_boxed_str());
        let mut roff = Vec::new();
        clap_mangen::Man::new(command.name(leaked)).render(&mut roff)?;
        Ok(Self { name: name.to_owned(), roff })
    }
}

/// Adds the pages of all commands below `command`, but those of `help` and of hidden ones.
fn collect(command: &Command, name: &str, pages: &mut Vec<Page>) -> CliResult<()> {
    let shown = |below: &&Command| !below.is_hide_set() && below.get_name() != "help";
    for below in command.get_subcommands().filter(shown) {
        let name = format!("{name}-{}", below.get_name());
        pages.push(Page::of(below.clone(), &name)?);
        collect(below, &name, pages)?;
    }
    Ok(())
}
