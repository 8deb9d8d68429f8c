use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{
    Answer,
    env::Env,
    failure::CliResult,
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
/// Ranks the weights of each row by a score and writes the chosen columns to a mask file, reading the checkpoint once, whatever
/// its size. Equal scores go to the smaller column; the same mask comes out for any number of threads.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("amount").required(true).args(["k", "budget"]))]
pub(super) struct MaskArgs {
    /// Directory or .safetensors file of the base checkpoint
    base: PathBuf,
    /// Where to write the mask
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Entries to choose in each row
    #[arg(short, long, value_name = "N")]
    k: Option<u64>,
    /// Share of all parameters of the model (0.02%, 0.0002) or number of entries (1000000) to choose
    #[arg(long, value_name = "BUDGET", value_parser = |text: &str| text.parse::<Amount>().map_err(|e| e.to_string()))]
    budget: Option<Amount>,
    /// What weights are ranked by
    #[arg(long, value_enum, default_value_t = ScoreChoice::Magnitude)]
    score: ScoreChoice,
    /// Within what they compete
    #[arg(long, value_enum, default_value_t = ScopeChoice::Row)]
    scope: ScopeChoice,
    /// Tensors that take part: names, ends of module paths, globs, or all-linear [default: the seven Llama projections]
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    targets: Vec<String>,
    /// Targets stored as [d_in, d_out], beside those of families known to store them so (GPT-2, gpt-oss)
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    transposed: Vec<String>,
    #[command(flatten)]
    axes: AxesArgs,
    /// For --score random and --neuron-fraction
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Share of each tensor's rows that take part, chosen at random
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    neuron_fraction: f64,
    /// Checkpoint of gradients, by the weights' names, for gradient, snip and fisher
    #[arg(long, value_name = "PATH")]
    gradients: Option<PathBuf>,
    /// File of activation norms per column, by the names of weights or modules, for wanda
    #[arg(long, value_name = "FILE")]
    activations: Option<PathBuf>,
    /// Handle one part of the targets, as in 2/8; mask-join puts the parts together
    #[arg(long, value_name = "I/N", value_parser = |text: &str| text.parse::<Partition>().map_err(|e| e.to_string()))]
    partition: Option<Partition>,
    /// With --device cuda: choose a random share of the rows again on the CPU, and compare
    #[arg(long, value_name = "SHARE", num_args = 0..=1, require_equals = true, default_missing_value = "0.01", value_parser = parse_share)]
    check: Option<f64>,
    /// Also name each whole target by its BLAKE3
    #[arg(long)]
    hash: bool,
    /// Replace an existing mask
    #[arg(long)]
    force: bool,
    /// Say what the mask would hold, write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ScoreChoice {
    /// |w|
    Magnitude,
    /// |w|, least first
    Smallest,
    /// Seeded
    Random,
    /// |g|
    Gradient,
    /// |w * g|
    Snip,
    /// |w| * norm of the column's activations
    Wanda,
    /// g^2
    Fisher,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ScopeChoice {
    /// Each row gets its share
    Row,
    /// Each tensor
    Tensor,
    /// All targets together
    Global,
}

pub(super) fn run(args: MaskArgs, env: &Env) -> CliResult<Answer> {
    let checkpoint = Checkpoint::open(&args.base)?;
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
        tell_of_gpu(&gpu.counts(), env);
    }
    if !report.clamped.is_empty() {
        let k = report.k.unwrap_or_default();
        env.note(&format!(
            "note: {} targets have rows shorter than {k}: all of each row was chosen",
            report.clamped.len()
        ));
    }
    for skipped in &report.skipped {
        env.note(&format!("note: skipped \"{}\": {}", skipped.tensor, skipped.why));
    }
    Ok(Answer::Yes)
}

/// Says what was chosen where; the report is the same wherever that was.
fn tell_of_gpu(rows: &ChosenRows, env: &Env) {
    let ChosenRows { on_gpu, on_cpu, checked } = *rows;
    let checked_too = if checked > 0 { format!(", {} of them checked", count(checked)) } else { String::new() };
    env.detail(&format!("{} rows chosen on the GPU{checked_too}", count(on_gpu)));
    if on_cpu > 0 || on_gpu == 0 {
        let which = if on_gpu == 0 { "all".to_owned() } else { count(on_cpu) };
        let takes = "a GPU takes bf16, f16 and f32 of up to 131,072 columns, scope row, and no random scores";
        env.note(&format!("note: rows chosen on the CPU: {which}; {takes}"));
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
    page.table(&table);
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
