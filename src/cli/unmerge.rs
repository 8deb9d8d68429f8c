use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::Args;

use super::{
    Answer,
    env::Env,
    failure::{CliError, CliResult, Hint},
    merge::{OutputArgs, print_report},
};
use crate::{
    adapter::AdapterId,
    checkpoint::{Checkpoint, probe},
    merge::{self, MergeError, MergeOptions, Which},
};

/// Take adapters out of a merged checkpoint, exactly
///
/// Works on checkpoints with a ledger, which merge writes; in place unless --output is given; in any order of adapters. Nothing is
/// subtracted: the ledger holds the original bits. Without --adapter all adapters are taken out, which restores every byte of the base.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct UnmergeArgs {
    /// Folder or .safetensors file of the merged checkpoint
    path: PathBuf,
    /// Adapter to take out: its id, the beginning of its id, or its file; repeatable [default: all]
    #[arg(short, long = "adapter", value_name = "ID|FILE")]
    adapters: Vec<String>,
    /// Base checkpoint; required after a LoRA merge without --keep-originals
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt unmerge merged
  neuroada-ckpt unmerge merged --adapter 8029d815eeb9
  neuroada-ckpt unmerge merged --base llama -o restored";

pub(super) fn run(args: UnmergeArgs, env: &Env) -> CliResult<Answer> {
    let which = if args.adapters.is_empty() {
        Which::All
    } else {
        Which::Some(args.adapters.iter().map(|text| resolve(text, &args.path, env)).collect::<CliResult<_>>()?)
    };
    let is_in_place = args.output.is_changed_itself();
    let options = MergeOptions { base: args.base, ..args.output.options(true) };
    let report = match merge::unmerge(&env.context(), &args.path, &which, &options) {
        Err(e @ MergeError::NeedsBase { .. }) => Err(e).hint("--base PATH names it")?,
        undone => undone?,
    };
    print_report(&report, is_in_place, env)?;
    Ok(Answer::Yes)
}

/// The adapter with this id, with an id that begins so, or in this file.
fn resolve(text: &str, path: &Path, env: &Env) -> CliResult<AdapterId> {
    if let Ok(id) = AdapterId::from_str(text) {
        return Ok(id);
    }
    let is_hex = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hex || probe::is_present(Path::new(text))? {
        return Ok(merge::adapter_id(&env.context(), Path::new(text))?);
    }
    let summary = merge::ledger_summary(&Checkpoint::open_interrupted(path)?)?;
    let active = summary.map(|summary| summary.active).unwrap_or_default();
    let found: Vec<&str> =
        active.iter().map(|entry| entry.id.as_str()).filter(|id| id.starts_with(&text.to_lowercase())).collect();
    match found[..] {
        [id] => Ok(AdapterId::from_str(id)?),
        [] => Err(CliError::usage(format!("no adapter in {} has an id that begins with {text}", path.display()))),
        _ => Err(CliError::usage(format!(
            "{} adapters in {} have ids that begin with {text}",
            found.len(),
            path.display()
        ))),
    }
}
