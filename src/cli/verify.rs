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

/// Prove a merge: every touched weight is right, every other byte is the base's
///
/// Compares each touched weight with what the ledger's originals and the adapters make of it, and each adapter's anchors
/// with the originals. With --base every other byte is compared too. Exit 1 where something is wrong.
#[derive(Args)]
pub(super) struct VerifyArgs {
    /// Directory or .safetensors file of the merged checkpoint
    path: PathBuf,
    /// The checkpoint it was made from; every other byte is compared with it
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// For a checkpoint without a ledger: an adapter that was merged, as given to merge
    #[arg(short, long = "adapter", value_name = "FILE[=SCALE]", requires = "base")]
    adapters: Vec<String>,
}

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
    page.table(&adapters);
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
