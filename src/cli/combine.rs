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

/// Combine adapters of one base into one
///
/// First says where they overlap and where their signs disagree (with --dry-run nothing else). The adapters must be of one base:
/// where they change the same weights, their hashes of them are compared; where not, --base proves each of them.
#[derive(Args)]
pub(super) struct CombineArgs {
    /// Adapter and its weight, 1 where none is given
    #[arg(required = true, value_name = "ADAPTER[=WEIGHT]")]
    adapters: Vec<String>,
    /// Where to write the combined adapter
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// What becomes of the deltas of one weight
    #[arg(long, value_enum, default_value_t = MethodChoice::Linear)]
    method: MethodChoice,
    /// For ties and dare: the share of deltas that each adapter keeps, the largest (ties) or random ones (dare)
    #[arg(long, value_name = "SHARE")]
    density: Option<f64>,
    /// For dare: the seed of what is random
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The base of all adapters; needed where they change different weights
    #[arg(short, long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// The type that deltas are stored in
    #[arg(long, value_enum, default_value_t = DtypeChoice::F32)]
    dtype: DtypeChoice,
    #[command(flatten)]
    notes: NotesArgs,
    /// Replace an existing adapter
    #[arg(long)]
    force: bool,
    /// Compare and combine, write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum MethodChoice {
    /// The weighted sum
    Linear,
    /// The largest deltas of each adapter; the mean of those whose sign is elected (arXiv 2306.01708)
    Ties,
    /// Random deltas of each adapter, rescaled; the weighted sum (arXiv 2311.03099)
    Dare,
    /// Random deltas of each adapter, rescaled; the mean of those whose sign is elected
    DareTies,
    /// The delta of the first adapter that has the weight
    Priority,
}

pub(super) fn run(args: CombineArgs, env: &Env) -> CliResult<Answer> {
    let method = match (args.method, args.density) {
        (MethodChoice::Linear, None) => Method::Linear,
        (MethodChoice::Priority, None) => Method::Priority,
        (MethodChoice::Ties, Some(density)) => Method::Ties { density },
        (MethodChoice::Dare, Some(density)) => Method::Dare { density, seed: args.seed },
        (MethodChoice::DareTies, Some(density)) => Method::DareTies { density, seed: args.seed },
        (_, None) => return Err(CliError::usage("this method needs --density")),
        (_, Some(_)) => return Err(CliError::usage("this method takes no --density")),
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
    page.table(&inputs);
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
    page.table(&pairs);
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
