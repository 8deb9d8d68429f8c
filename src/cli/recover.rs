use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{
    Answer,
    env::Env,
    failure::{CliResult, Hint},
};
use crate::merge::{self, MergeError, Recovered};

/// Finish or roll back an interrupted change
///
/// A merge or unmerge in place that was cut short, by a crash or a power loss, leaves a journal. This brings the checkpoint back to
/// what it was before, or, where the change had been committed, removes what it left. It may itself be interrupted. Where a folder
/// and one of its files were both merged into, each under its own path, it takes out again what the file's ledger had merged, so that one
/// ledger speaks for the checkpoint.
#[derive(Args)]
pub(super) struct RecoverArgs {
    /// Directory or .safetensors file of the checkpoint
    path: PathBuf,
    /// Where the change was made with --base: that checkpoint
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
}

#[derive(Serialize)]
struct RecoverReport {
    outcome: Recovered,
}

pub(super) fn run(args: RecoverArgs, env: &Env) -> CliResult<Answer> {
    let outcome = match merge::recover(&env.context(), &args.path, args.base.as_deref()) {
        Err(e @ MergeError::NeedsBase { .. }) => Err(e).hint("--base names it")?,
        outcome => outcome?,
    };
    env.report_work(&RecoverReport { outcome }, |report, page| {
        page.line(match report.outcome {
            Recovered::Nothing => "nothing to recover",
            Recovered::RolledBack => "rolled back: the checkpoint is as it was before the interrupted change",
            Recovered::Finished => "finished: the interrupted change had been committed",
            Recovered::OneLedger => {
                "one ledger: the folder and files of it were merged into, each under its own path, and had a ledger each. What the \
                 files' ledgers had merged was taken out; the checkpoint is what the folder's ledger says. Merge what you miss again"
            }
        });
    })?;
    Ok(Answer::Yes)
}
