use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{
    Answer,
    about::{DtypeChoice, NotesArgs},
    env::Env,
    failure::{CliError, CliResult},
    merge::parse_input,
    page::{Page, Table, bytes, count, number},
    unpack::open_adapter,
};
use crate::{
    checkpoint::{Checkpoint, Existing},
    combine::{self, CombineInput, CombineOptions, CombineReport, Method},
    merge::MergeInput,
};

/// Combine several adapters of one base into one adapter
///
/// The report shows where the adapters overlap and where their signs conflict; with --dry-run nothing is written. All adapters must be
/// made from the same base: adapters that change the same weights are compared by their hashes of these weights, others need --base.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CombineArgs {
    /// Adapters, each with its weight [default weight: 1]
    #[arg(required = true, value_name = "ADAPTER[=WEIGHT]")]
    adapters: Vec<String>,
    /// File of the combined adapter
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Rule for weights that several adapters change
    #[arg(long, value_enum, default_value_t = MethodChoice::Linear)]
    method: MethodChoice,
    /// Share of deltas that each adapter keeps: the largest (ties) or random ones (dare); required for these methods
    #[arg(long, value_name = "SHARE")]
    density: Option<f64>,
    /// Seed of the random choice, for dare and dare-ties
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Base of all adapters; required if they change different weights
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Dtype of the stored deltas
    #[arg(long, value_enum, default_value_t = DtypeChoice::F32)]
    dtype: DtypeChoice,
    #[command(flatten)]
    notes: NotesArgs,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    /// Compare and combine, write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum MethodChoice {
    /// Weighted sum
    Linear,
    /// Largest deltas of each adapter, then the mean of those with the majority sign (TIES, arXiv 2306.01708)
    Ties,
    /// Random deltas of each adapter, rescaled, then the weighted sum (DARE, arXiv 2311.03099)
    Dare,
    /// Random deltas of each adapter, rescaled, then the mean of those with the majority sign
    DareTies,
    /// By priority: the first adapter with an entry wins
    Priority,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt combine a.safetensors=0.5 b.safetensors=0.5 -o both.safetensors
  neuroada-ckpt combine a.safetensors b.safetensors --method ties --density 0.2 -o c.safetensors
  neuroada-ckpt combine a.safetensors b.safetensors --base llama --dry-run";

pub(super) fn run(args: CombineArgs, env: &Env) -> CliResult<Answer> {
    let method = match (args.method, args.density) {
        (MethodChoice::Linear, None) => Method::Linear,
        (MethodChoice::Priority, None) => Method::Priority,
        (MethodChoice::Ties, Some(density)) => Method::Ties { density },
        (MethodChoice::Dare, Some(density)) => Method::Dare { density, seed: args.seed },
        (MethodChoice::DareTies, Some(density)) => Method::DareTies { density, seed: args.seed },
        (_, None) => return Err(CliError::usage("--method ties, dare and dare-ties need --density")),
        (_, Some(_)) => return Err(CliError::usage("--method linear and priority take no --density")),
    };
    let base = args.base.as_deref().map(Checkpoint::open).transpose()?;
    let input = |text: &String| -> CliResult<CombineInput> {
        let MergeInput { adapter, scale } = parse_input(text)?;
        Ok(CombineInput { adapter: open_adapter(&adapter, args.base.as_deref(), env)?, weight: scale.unwrap_or(1.0) })
    };
    let inputs: Vec<CombineInput> = args.adapters.iter().map(input).collect::<CliResult<_>>()?;
    let dtype = args.dtype.dtype();
    let options = CombineOptions { method, base: base.as_ref(), dtype, notes: args.notes.notes() };
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let output = args.output.as_deref().filter(|_| !args.dry_run).map(|path| (path, existing));
    let report = combine::combine(&env.context(), &inputs, &options, output)?;
    env.report_work(&report, print)?;
    Ok(Answer::Yes)
}

fn print(report: &CombineReport, page: &mut Page) {
    let mut inputs = Table::new(["", "adapter", "id", "weight>", "scale>", "deltas>", "kept>", "norm>"]);
    for (i, input) in report.inputs.iter().enumerate() {
        inputs.row([
            (i + 1).to_string(),
            input.name.clone(),
            input.id[..12].to_owned(),
            number(input.weight),
            number(input.scale),
            count(input.n_deltas),
            count(input.n_kept),
            number(input.norm),
        ]);
    }
    page.table(inputs);
    page.blank();
    let mut pairs = Table::new(["pair", "shared>", "Jaccard>", "sign conflicts>", "cosine>"]);
    for pair in &report.pairs {
        pairs.row([
            format!("{} and {}", pair.a + 1, pair.b + 1),
            count(pair.n_shared),
            number(pair.jaccard),
            count(pair.n_sign_conflicts),
            pair.cosine.map_or("-".to_owned(), number),
        ]);
    }
    if !report.pairs.is_empty() {
        page.table(pairs);
        page.legend("Jaccard: shared positions over all positions of the pair; sign conflicts: shared positions with both signs");
    }
    page.blank();
    let mut method = report.method.to_owned();
    if let Some(density) = report.density {
        method += &format!(", density {density}");
    }
    if let Some(seed) = report.seed {
        method += &format!(", seed {seed}");
    }
    let mut facts = vec![
        ("made from", report.base.clone()),
        ("method", method),
        (
            "contested",
            format!("{} weights, {} with both signs", count(report.n_shared), count(report.n_sign_conflicts)),
        ),
        (
            "deltas",
            format!(
                "{} in {} tensors, {} not zero",
                count(report.n_deltas),
                count(report.n_tensors as u64),
                count(report.n_nonzero)
            ),
        ),
        ("norm", number(report.norm)),
    ];
    if let (Some(id), Some(n_bytes)) = (&report.id, report.n_bytes) {
        facts.push(("adapter", id[..12].to_owned()));
        facts.push(("size", bytes(n_bytes)));
    } else {
        facts.push(("dry run", "nothing was written".to_owned()));
    }
    page.facts(&facts);
}
