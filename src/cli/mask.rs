use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{
    Answer,
    env::Env,
    failure::CliResult,
    inputs::open_base,
    page::{Page, Table, count, percent},
    weights::{AxesArgs, with_axes_hint},
};
use crate::{
    backend::{Chooser, ChosenRows},
    checkpoint::{Checkpoint, Existing},
    mask::{self, Amount, MaskKind, MaskOptions, MaskReport, Partition, Scope, ScoreKind},
};

/// Choose the important connections of every neuron
///
/// Ranks the weights of each row by a score and writes the chosen columns to a mask file. Reads the checkpoint once. Ties go to the
/// smaller column; the mask is the same for any number of threads.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
#[command(group = clap::ArgGroup::new("amount").required(true).args(["k", "budget"]))]
pub(super) struct MaskArgs {
    /// Folder or .safetensors file of the base checkpoint
    base: PathBuf,
    /// File of the mask
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Number of entries to choose in each row
    #[arg(short, long, value_name = "N")]
    k: Option<u64>,
    /// Number of entries to choose in total: a share of the model's parameters (0.02%, 0.0002) or a count (1000000)
    #[arg(long, value_name = "BUDGET", value_parser = |text: &str| text.parse::<Amount>().map_err(|e| e.to_string()))]
    budget: Option<Amount>,
    /// Score that weights are ranked by
    #[arg(long, value_enum, default_value_t = ScoreChoice::Magnitude)]
    score: ScoreChoice,
    /// Scope of the ranking: row, tensor or whole model
    #[arg(long, value_enum, default_value_t = ScopeChoice::Row)]
    scope: ScopeChoice,
    /// Tensors to choose from: names, ends of module paths, globs, or all-linear [default: the seven Llama projections]
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    targets: Vec<String>,
    /// Targets stored as [d_in, d_out], in addition to families known to store them so (GPT-2, gpt-oss) [default: none]
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    transposed: Vec<String>,
    #[command(flatten)]
    axes: AxesArgs,
    /// Seed of --score random and --neuron-fraction
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Share of each tensor's rows to choose from, picked at random
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    neuron_fraction: f64,
    /// Checkpoint of gradients under the weights' names, for --score gradient, snip and fisher
    #[arg(long, value_name = "PATH")]
    gradients: Option<PathBuf>,
    /// File of activation norms per column, under the names of weights or modules, for --score wanda
    #[arg(long, value_name = "FILE")]
    activations: Option<PathBuf>,
    /// Part of the targets to handle, as in 2/8; mask-join joins the parts [default: all]
    #[arg(long, value_name = "I/N", value_parser = |text: &str| text.parse::<Partition>().map_err(|e| e.to_string()))]
    partition: Option<Partition>,
    /// Share of the rows that the CPU chooses again to check the GPU, with --device cuda [default: 0; without a value: 0.01]
    #[arg(long, value_name = "SHARE", num_args = 0..=1, require_equals = true, default_missing_value = "0.01", value_parser = parse_share)]
    check: Option<f64>,
    /// Record the BLAKE3 of each whole target
    #[arg(long)]
    hash: bool,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    /// Count the entries, write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ScoreChoice {
    /// |w|
    Magnitude,
    /// |w|, smallest first
    Smallest,
    /// Random, by --seed
    Random,
    /// |g|
    Gradient,
    /// |w * g|
    Snip,
    /// |w| * activation norm of the column
    Wanda,
    /// g^2
    Fisher,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ScopeChoice {
    /// Within each row
    Row,
    /// Within each tensor
    Tensor,
    /// Over all targets together
    Global,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt mask llama --k 1 -o mask.safetensors
  neuroada-ckpt mask llama --budget 0.02% --scope global -o mask.safetensors
  neuroada-ckpt mask llama --k 4 --targets q_proj,v_proj --dry-run";

pub(super) fn run(args: MaskArgs, env: &Env) -> CliResult<Answer> {
    let checkpoint = open_base(&args.base)?;
    let open = |path: &Option<PathBuf>| path.as_ref().map(|path| Checkpoint::open(path)).transpose();
    let (gradients, activations) = (open(&args.gradients)?, open(&args.activations)?);
    let gpu = env.gpu_chooser(args.check.unwrap_or(0.0))?;
    let chooser = gpu.as_deref().map_or_else(Chooser::cpu, Chooser::on);
    let options = MaskOptions {
        amount: args.budget.unwrap_or(Amount::K(args.k.unwrap_or(1))),
        score: match args.score {
            ScoreChoice::Magnitude => ScoreKind::Magnitude,
            ScoreChoice::Smallest => ScoreKind::Smallest,
            ScoreChoice::Random => ScoreKind::Random,
            ScoreChoice::Gradient => ScoreKind::Gradient,
            ScoreChoice::Snip => ScoreKind::Snip,
            ScoreChoice::Wanda => ScoreKind::Wanda,
            ScoreChoice::Fisher => ScoreKind::Fisher,
        },
        scope: match args.scope {
            ScopeChoice::Row => Scope::Row,
            ScopeChoice::Tensor => Scope::Tensor,
            ScopeChoice::Global => Scope::Global,
        },
        seed: args.seed,
        neuron_fraction: args.neuron_fraction,
        targets: args.targets,
        transposed: args.transposed,
        axes: args.axes.axes,
        gradients: gradients.as_ref(),
        activations: activations.as_ref(),
        partition: args.partition,
        hash: args.hash,
        chooser,
        ..MaskOptions::new(1)
    };
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let output = args.output.as_deref().filter(|_| !args.dry_run).map(|path| (path, existing));
    let report = with_axes_hint(mask::create_mask(&env.context(), &checkpoint, &options, output))?;
    env.report_work(&report, print)?;
    if let Some(gpu) = gpu.filter(|_| !report.dry_run) {
        print_gpu_counts(&gpu.counts(), env);
    }
    for skipped in &report.skipped {
        env.note(&format!("note: skipped \"{}\": {}", skipped.tensor, skipped.why));
    }
    Ok(Answer::Yes)
}

/// Reports how many rows each device chose; the mask does not depend on it.
fn print_gpu_counts(rows: &ChosenRows, env: &Env) {
    let ChosenRows { on_gpu, on_cpu, checked } = *rows;
    let checked_too = if checked > 0 { format!(", {} of them checked", count(checked)) } else { String::new() };
    env.detail(&format!("{} rows chosen on the GPU{checked_too}", count(on_gpu)));
    if on_cpu > 0 || on_gpu == 0 {
        let which = if on_gpu == 0 { "all".to_owned() } else { count(on_cpu) };
        let limits =
            "the GPU path supports bf16, f16 and f32 of up to 131,072 columns, scope row, and no random scores";
        env.note(&format!("note: rows chosen on the CPU: {which}; {limits}"));
    }
}

/// Reads a share from 0 to 1.
fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a share from 0 to 1".to_owned())
}

fn print(report: &MaskReport, page: &mut Page) {
    let mut table = Table::new(["kind", "tensors>", "rows>", "chosen>", "of>", "share>"]);
    for kind in report.kinds.iter().chain([&report.total]) {
        table.row(kind_cells(kind));
    }
    page.table(table);
    page.blank();
    let verb = if report.dry_run { "would be trainable" } else { "trainable" };
    let (chosen, all) = (report.total.n_chosen, report.n_model_parameters);
    let mut facts = vec![(verb, format!("{} of the model's {} parameters", percent(chosen, all), count(all)))];
    facts.extend(report.partition.map(|partition| ("partition", format!("{partition} of the targets"))));
    page.facts(&facts);
}

fn kind_cells(kind: &MaskKind) -> [String; 6] {
    [
        kind.kind.clone(),
        count(kind.n_tensors),
        count(kind.n_rows),
        count(kind.n_chosen),
        count(kind.n_parameters),
        percent(kind.n_chosen, kind.n_parameters),
    ]
}
