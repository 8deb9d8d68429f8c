use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{
    Answer,
    env::Env,
    failure::{CliResult, Hint},
};
use crate::merge::{self, MergeError, Recovered};

/// Recover a checkpoint after an interrupted change in place
///
/// A crash or power loss during a merge or unmerge in place leaves a journal. This command restores the checkpoint's previous state, or, if
/// the change was already committed, removes leftover files. It may itself be interrupted and run again. If a folder and one of its
/// files were merged into separately, each under its own path, it takes out the adapters of the file's ledger, so that one ledger remains.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct RecoverArgs {
    /// Folder or .safetensors file of the checkpoint
    path: PathBuf,
    /// Base checkpoint; required if the interrupted command had --base
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
}

#[derive(Serialize)]
struct RecoverReport {
    outcome: Recovered,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt recover merged
  neuroada-ckpt recover merged --base llama";

pub(super) fn run(args: RecoverArgs, env: &Env) -> CliResult<Answer> {
    let outcome = match merge::recover(&env.context(), &args.path, args.base.as_deref()) {
        Err(e @ MergeError::NeedsBase { .. }) => Err(e).hint("--base PATH names it")?,
        outcome => outcome?,
    };
    env.report_work(&RecoverReport { outcome }, |report, page| {
        page.line(match report.outcome {
            Recovered::Nothing => "nothing to recover",
            Recovered::RolledBack => "rolled back: the checkpoint is in its state before the interrupted change",
            Recovered::Finished => "finished: the interrupted change was already committed",
            Recovered::OneLedger => {
                "one ledger: the folder and some of its files had a ledger each. The adapters of the files' ledgers were taken out; \
                 the folder's ledger remains. Merge those adapters into the folder if you need them"
            }
        });
    })?;
    Ok(Answer::Yes)
}
