use std::{collections::BTreeMap, path::PathBuf};

use clap::{Args, ValueEnum};

use super::{
    Answer,
    about::NotesArgs,
    env::Env,
    failure::{CliResult, Hint},
    inputs::open_base,
    page::{Page, Table, bytes, count, number, percent},
    weights::{AxesArgs, with_axes_hint},
};
use crate::{
    checkpoint::{Existing, Printable},
    extract::{self, ExtractError, ExtractKind, ExtractOptions, ExtractReport, LeftOut, UnfitReason},
    tensor::{Dtype, projection_kind},
};

/// Extract the difference of two checkpoints as an adapter
///
/// Exact by default: merging the adapter into BASE gives TUNED byte for byte; every merged value is computed and compared before the
/// adapter is written. Biases and norms are included in full. Changes that no delta can represent are refused, with a list: tensors that
/// are not floats, matrices with too many changes, NaN and infinities, and changes so much larger than their result that the sum rounds
/// to another value. With -k the adapter keeps only the largest changes of each row, and the report says how much of the change is lost.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ExtractArgs {
    /// Folder or .safetensors file of the base checkpoint
    base: PathBuf,
    /// Checkpoint of the same model after training: same tensor names, dtypes and shapes
    tuned: PathBuf,
    /// File of the adapter
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Number of changes kept per row, the largest ones [default: all]
    #[arg(short, long, value_name = "N")]
    k: Option<u64>,
    /// Dtype of the stored deltas; auto: for each tensor the first of bf16, f16 and f32 that is exact
    #[arg(long, value_enum, default_value_t = DtypeChoice::Auto)]
    dtype: DtypeChoice,
    /// Maximum share of a matrix that may get deltas
    #[arg(long, value_name = "SHARE", default_value = "25%", value_parser = parse_share)]
    max_density: f64,
    /// Tensors to include: names, ends of module paths, globs, or all-linear [default: all]
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    targets: Vec<String>,
    /// Targets stored as [d_in, d_out], in addition to families known to store them so (GPT-2, gpt-oss) [default: none]
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    transposed: Vec<String>,
    #[command(flatten)]
    axes: AxesArgs,
    #[command(flatten)]
    notes: NotesArgs,
    /// Print one line per tensor instead of one per kind
    #[arg(long)]
    tensors: bool,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    /// Count the deltas, write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum DtypeChoice {
    Auto,
    F32,
    Bf16,
    F16,
}

/// Reads `25%` or `0.25`; the library checks the range.
fn parse_share(text: &str) -> Result<f64, String> {
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| "expected a share such as 25% or 0.25".to_owned());
    match text.strip_suffix('%') {
        Some(percent) => Ok(number(percent)? / 100.0),
        None => number(text),
    }
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt extract llama llama-tuned -o exact.safetensors
  neuroada-ckpt extract llama llama-tuned -k 4 -o largest.safetensors
  neuroada-ckpt extract llama llama-tuned --max-density 60% --dry-run";

pub(super) fn run(args: ExtractArgs, env: &Env) -> CliResult<Answer> {
    let (base, tuned) = (open_base(&args.base)?, open_base(&args.tuned)?);
    let dtype = match args.dtype {
        DtypeChoice::Auto => None,
        DtypeChoice::F32 => Some(Dtype::F32),
        DtypeChoice::Bf16 => Some(Dtype::BF16),
        DtypeChoice::F16 => Some(Dtype::F16),
    };
    let options = ExtractOptions {
        k: args.k,
        dtype,
        max_density: args.max_density,
        targets: args.targets,
        transposed: args.transposed,
        axes: args.axes.axes,
        notes: args.notes.notes(),
    };
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let output = args.output.as_deref().filter(|_| !args.dry_run).map(|path| (path, existing));
    let report = match extract::extract(&env.context(), &base, &tuned, &options, output) {
        Err(ExtractError::Unfit { tuned, base, problems, reasons }) => {
            let hint = hint(&reasons, args.k.is_some(), dtype.is_some());
            Err(ExtractError::Unfit { tuned, base, problems, reasons }).hint(&hint)?
        }
        Err(ExtractError::Mask(e)) => with_axes_hint(Err(e))?,
        report => report?,
    };
    env.report_work(&report, |report, page| print(report, args.tensors, page))?;
    Ok(Answer::Yes)
}

/// The options that help against changes that no adapter can hold, the closest one first.
fn hint(reasons: &[UnfitReason], has_k: bool, has_dtype: bool) -> String {
    let has = |reason: UnfitReason| reasons.contains(&reason);
    let densities = reasons.iter().filter_map(|reason| match reason {
        UnfitReason::TooDense(density) => Some(*density),
        _ => None,
    });
    let highest = densities.fold(0.0, f64::max);
    let mut ways = Vec::new();
    if highest > 0.0 {
        ways.push(format!("--max-density {:.0}% allows this many deltas", (highest * 100.0).ceil()));
    }
    if has(UnfitReason::Inexact) && has_dtype {
        ways.push("--dtype auto picks an exact dtype".to_owned());
    }
    match has_k {
        true if highest > 0.0 => ways.push("a smaller -k keeps fewer deltas".to_owned()),
        // NaN cannot be kept in part either.
        false if !has(UnfitReason::NotFinite) => ways.push("-k keeps the largest changes of each row".to_owned()),
        _ => {}
    }
    ways.push("--targets chooses the tensors to include".to_owned());
    ways.join(", ")
}

fn print(report: &ExtractReport, tensors: bool, page: &mut Page) {
    let title = if tensors { "tensor" } else { "kind" };
    let mut table = Table::new([title, "tensors>", "changed>", "of>", "share>", "deltas>", "norm>", "lost>"]);
    let mut row = |kind: &ExtractKind| {
        let ExtractKind { n_changed, n_elements, .. } = *kind;
        table.row([
            kind.kind.clone(),
            count(kind.n_tensors),
            count(n_changed),
            count(n_elements),
            percent(n_changed, n_elements),
            count(kind.n_deltas),
            number(kind.norm),
            number(kind.norm_lost),
        ]);
    };
    if tensors {
        for tensor in &report.tensors {
            row(&ExtractKind {
                kind: tensor.tensor.clone(),
                n_tensors: 1,
                n_elements: tensor.n_elements,
                n_changed: tensor.n_changed,
                n_deltas: tensor.n_deltas,
                norm: tensor.norm,
                norm_lost: tensor.norm_lost,
            });
        }
    } else {
        report.kinds.iter().for_each(&mut row);
    }
    row(&report.total);
    page.table(table);
    page.legend("norm: L2 of the change; lost: L2 of the part without a delta");
    page.blank();
    for line in left_out(report, tensors) {
        page.line(line);
    }
    page.blank();
    let mut facts = Vec::new();
    if let Some(id) = &report.id {
        facts.push(("adapter", id[..12].to_owned()));
    }
    facts.push(("made from", report.base.clone()));
    facts.push(("deltas", deltas(report)));
    facts.push(("unchanged", format!("{} tensors", count(report.n_same))));
    if report.total.norm_lost > 0.0 {
        facts.push(("norm", format!("{} of {} lost", number(report.total.norm_lost), number(report.total.norm))));
    }
    if let Some(n_bytes) = report.n_bytes {
        facts.push(("size", bytes(n_bytes)));
    }
    let verdict = if report.exact {
        format!("exact: merging it gives {} byte for byte", report.tuned)
    } else {
        format!("partial: merging it does not give {}", report.tuned)
    };
    facts.push(("verdict", verdict));
    page.facts(&facts);
}

/// Changed tensors that are not included: each of them, or their kinds by reason.
fn left_out(report: &ExtractReport, tensors: bool) -> Vec<String> {
    if tensors {
        let line = |tensor: &LeftOut| format!("left out: {}: {}", Printable(&tensor.tensor), tensor.why);
        return report.left_out.iter().map(line).collect();
    }
    let mut by_reason: BTreeMap<&str, BTreeMap<&str, u64>> = BTreeMap::new();
    for LeftOut { tensor, why } in &report.left_out {
        *by_reason.entry(why).or_default().entry(projection_kind(tensor)).or_default() += 1;
    }
    let kinds = |kinds: BTreeMap<&str, u64>| {
        kinds.into_iter().map(|(kind, n)| format!("{n} {}", Printable(kind))).collect::<Vec<_>>().join(", ")
    };
    by_reason.into_iter().map(|(why, found)| format!("left out: {}: {why}", kinds(found))).collect()
}

/// Number of deltas by dtype: `2,255: 14 tensors as BF16`.
fn deltas(report: &ExtractReport) -> String {
    let mut by_type: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in &report.tensors {
        *by_type.entry(&tensor.values_dtype).or_default() += 1;
    }
    let types: Vec<String> = by_type.iter().map(|(dtype, n)| format!("{n} tensors as {dtype}")).collect();
    format!("{}: {}", count(report.total.n_deltas), types.join(", "))
}
