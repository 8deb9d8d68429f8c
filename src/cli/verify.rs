use std::path::PathBuf;

use clap::Args;

use super::{
    Answer,
    env::Env,
    failure::CliResult,
    merge::parse_input,
    page::{Page, Table, bytes, count, number},
};
use crate::merge::{self, VerifyOptions, VerifyReport};

/// Verify a merge: recompute every changed weight, compare every other byte
///
/// Recomputes each changed weight from the ledger's originals and the adapters, and compares each adapter's anchors with the originals.
/// With --base every other byte is compared too. The exit code is 1 if something is wrong.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct VerifyArgs {
    /// Folder or .safetensors file of the merged checkpoint
    path: PathBuf,
    /// Base checkpoint, compared with all other bytes [default: no comparison]
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Merged adapter, as given to merge, for a checkpoint without a ledger; repeatable
    #[arg(short, long = "adapter", value_name = "FILE[=SCALE]", requires = "base")]
    adapters: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt verify merged
  neuroada-ckpt verify merged --base llama
  neuroada-ckpt verify merged --base llama --adapter adapter.safetensors=0.5";

pub(super) fn run(args: VerifyArgs, env: &Env) -> CliResult<Answer> {
    let adapters: Vec<_> = args.adapters.iter().map(|text| parse_input(text)).collect::<CliResult<_>>()?;
    let options = VerifyOptions { base: args.base, adapters, ..VerifyOptions::default() };
    let report = merge::verify(&env.context(), &args.path, &options)?;
    env.report(&report, print)?;
    Ok(if report.ok { Answer::Yes } else { Answer::No })
}

fn print(report: &VerifyReport, page: &mut Page) {
    let mut adapters = Table::new(["adapter", "scale>", "deltas>", "tensors>", "anchors match>"]);
    for (entry, anchors) in report.active.iter().zip(&report.anchors) {
        let id = entry.id[..12].to_owned();
        let (n, matching) = (count(entry.n_tensors as u64), count(anchors.n_matching as u64));
        adapters.row([id, number(entry.scale), count(entry.n_deltas), n, matching]);
    }
    if !report.active.is_empty() {
        page.table(adapters);
        page.legend("anchors match: tensors whose original values are those that the adapter was made from");
    }
    page.blank();
    page.facts(&[
        ("touched", format!("{} weights, {} wrong", count(report.n_touched), count(report.n_wrong))),
        (
            "all else",
            if report.base_compared {
                format!("{} compared with the base", bytes(report.bytes_compared))
            } else {
                "not compared (no --base)".to_owned()
            },
        ),
        ("verdict", if report.ok { "verified".to_owned() } else { format!("{} problems", report.problems.len()) }),
    ]);
    for problem in &report.problems {
        page.line(format_args!("  {problem}"));
    }
}
