use std::{
    cell::Cell,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;

use super::{
    Answer,
    about::NotesArgs,
    data::{DataArgs, check_memory, read},
    env::Env,
    failure::{CliResult, Hint},
    gpu::{Gpu, OnDevice},
    page::{Layout, Page, bytes, count, duration, number, percent},
};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, Context, Existing, Observer, Printable, folder_of, probe},
    data::{DataReport, Tokenizer},
    mask::{MaskFile, MaskOptions, create_mask},
    tensor::Dtype,
    train::{
        self, CpuDevice, Device, EvalRecord, Keep, MemoryEstimate, Model, ModelConfig, RunLength, RunSize, Schedule,
        StepRecord, TrainError, TrainJob, TrainOptions, TrainReport, Warmup, Watcher,
    },
};

/// Train deltas on the connections of a mask
///
/// Trains models of the Llama family (llama, mistral, qwen2, qwen3) on the CPU, or on a GPU with --device cuda. The forward pass runs on
/// merged weights, so the trained model equals the merged checkpoint bit for bit. Beside the adapter the command writes a log
/// (.log.jsonl), a chart of the losses (.loss.svg) and, during the run, the state (.state.safetensors). --resume continues from that state
/// with the same losses as an uninterrupted run. Ctrl-C and SIGTERM save the state first.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
#[command(group = clap::ArgGroup::new("chosen").required(true).args(["mask", "k"]))]
pub(super) struct TrainArgs {
    /// Folder of the base checkpoint, with its config.json and tokenizer.json
    base: PathBuf,
    /// Mask made from that base
    #[arg(long, value_name = "FILE")]
    mask: Option<PathBuf>,
    /// Number of weights to choose in each row of the seven Llama projections, in place of --mask
    #[arg(short, long, value_name = "N")]
    k: Option<u64>,
    /// File of rows to train on: a JSON array or JSON lines
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// File of rows to evaluate on; the adapter gets the deltas of the best evaluation [default: none]
    #[arg(long, value_name = "FILE")]
    eval_data: Option<PathBuf>,
    /// File of the adapter
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    #[command(flatten, next_help_heading = "Data")]
    rows: DataArgs,
    /// Number of rows to train on, from the first [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Data")]
    limit: Option<u64>,
    /// Number of rows to evaluate on, from the first [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "eval_data", help_heading = "Data")]
    eval_limit: Option<u64>,
    /// Maximum number of examples of a batch
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Data")]
    batch_size: usize,
    /// Maximum number of tokens of a batch; it determines the memory needed
    #[arg(long, value_name = "N", default_value_t = 4096, help_heading = "Data")]
    batch_tokens: usize,
    /// Keep the order of the file; do not shuffle
    #[arg(long, help_heading = "Data")]
    no_shuffle: bool,
    /// Seed of the order of the examples
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Data")]
    seed: u64,

    /// Number of passes over the data
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Learning")]
    epochs: u64,
    /// Maximum number of optimizer steps [default: no limit]
    #[arg(long, value_name = "N", help_heading = "Learning")]
    max_steps: Option<u64>,
    /// Number of batches per optimizer step
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Learning")]
    accumulate: u64,
    /// Peak learning rate; the paper uses 8e-3 at k = 1 and 7e-4 at k = 20
    #[arg(long, value_name = "RATE", default_value_t = 8e-3, help_heading = "Learning")]
    lr: f64,
    /// Schedule of the learning rate after the warmup
    #[arg(long, value_enum, default_value_t = ScheduleChoice::Linear, help_heading = "Learning")]
    schedule: ScheduleChoice,
    /// Length of the warmup: a number of steps, or a share of all steps such as 0.06
    #[arg(long, value_name = "N|SHARE", default_value = "0.06", value_parser = parse_warmup, help_heading = "Learning")]
    warmup: Warmup,
    /// Weight decay of the deltas
    #[arg(long, value_name = "RATE", default_value_t = 0.0, help_heading = "Learning")]
    weight_decay: f64,
    /// Betas of AdamW
    #[arg(long, value_name = "B1,B2", default_value = "0.9,0.999", value_parser = parse_betas, help_heading = "Learning")]
    betas: (f64, f64),
    /// Epsilon of AdamW
    #[arg(long, value_name = "EPS", default_value_t = 1e-8, help_heading = "Learning")]
    eps: f64,
    /// Maximum gradient norm; larger gradients are scaled down; 0 turns clipping off
    #[arg(long, value_name = "NORM", default_value_t = 1.0, help_heading = "Learning")]
    clip: f64,
    /// Train the biases of the chosen projections too, in full; the base must have biases (Qwen2 has)
    #[arg(long, help_heading = "Learning")]
    train_bias: bool,
    /// Recompute activations in the backward pass: a fraction of the memory, a third more time, the same result
    #[arg(long, help_heading = "Learning")]
    layer_checkpoints: bool,

    /// Number of steps between evaluations [default: one epoch]
    #[arg(long, value_name = "N", help_heading = "Under way")]
    eval_every: Option<u64>,
    /// Number of evaluations without a better loss before the run stops [default: no early stop]
    #[arg(long, value_name = "N", requires = "eval_data", help_heading = "Under way")]
    patience: Option<u64>,
    /// Number of steps between saved states [default: one epoch]
    #[arg(long, value_name = "N", help_heading = "Under way")]
    save_every: Option<u64>,
    /// Number of steps between lines on stderr
    #[arg(long, value_name = "N", default_value_t = 10, help_heading = "Under way")]
    log_every: u64,
    /// Continue from the state beside the output, if there is one
    #[arg(long, help_heading = "Under way")]
    resume: bool,

    #[command(flatten)]
    notes: NotesArgs,
    /// Replace an existing adapter and the state of an unfinished run
    #[arg(long)]
    force: bool,
    /// Print the memory and steps of the run, train nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ScheduleChoice {
    /// Linear decay to zero
    Linear,
    /// Cosine decay to zero
    Cosine,
    /// No decay
    Constant,
}

/// Reads `100` as steps, `0.06` as a share.
fn parse_warmup(text: &str) -> Result<Warmup, String> {
    if let Ok(steps) = text.parse() {
        return Ok(Warmup::Steps(steps));
    }
    text.parse().map(Warmup::Share).map_err(|_| "expected a number of steps, or a share such as 0.06".to_owned())
}

fn parse_betas(text: &str) -> Result<(f64, f64), String> {
    let both = text.split_once(',').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    both.ok_or_else(|| "expected two numbers such as 0.9,0.999".to_owned())
}

impl TrainArgs {
    fn options(&self) -> TrainOptions {
        TrainOptions {
            epochs: self.epochs,
            max_steps: self.max_steps,
            batch_examples: self.batch_size,
            batch_tokens: self.batch_tokens,
            accumulate: self.accumulate,
            shuffle: !self.no_shuffle,
            seed: self.seed,
            learning_rate: self.lr,
            schedule: match self.schedule {
                ScheduleChoice::Linear => Schedule::Linear,
                ScheduleChoice::Cosine => Schedule::Cosine,
                ScheduleChoice::Constant => Schedule::Constant,
            },
            warmup: self.warmup,
            betas: self.betas,
            eps: self.eps,
            weight_decay: self.weight_decay,
            clip: (self.clip != 0.0).then_some(self.clip),
            eval_every: self.eval_every,
            patience: self.patience,
            train_bias: self.train_bias,
            layer_checkpoints: self.layer_checkpoints,
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt train llama --mask mask.safetensors --data train.json -o adapter.safetensors
  neuroada-ckpt train llama -k 1 --data train.json --eval-data held-out.json -o adapter.safetensors
  neuroada-ckpt train llama -k 1 --data train.json -o adapter.safetensors --dry-run";

pub(super) fn run(args: TrainArgs, env: &Env) -> CliResult<Answer> {
    let ctx = env.context();
    let options = args.options();
    options.check()?;
    // Before minutes of reading and training.
    if probe::metadata(folder_of(&args.output))?.is_none() {
        return Err(CheckpointError::NoFolder { path: folder_of(&args.output).to_owned() }.into());
    }
    let base = Checkpoint::open(&args.base)?;
    base.refuse_codes()?;
    let config = train::check_model(&base)?;
    let tokenizer = Tokenizer::open(&args.base)?;
    let (data, about) = read(env, &args.data, &tokenizer, &args.rows.options(args.limit)?)?;
    print_data(env, &about);
    let eval = match &args.eval_data {
        None => None,
        Some(path) => {
            let (eval, about) = read(env, path, &tokenizer, &args.rows.options(args.eval_limit)?)?;
            print_data(env, &about);
            Some(eval)
        }
    };
    // A mask made here lives as long as the run.
    let folder = tempfile::tempdir()?;
    let mask = match (&args.mask, args.k) {
        (Some(path), _) => MaskFile::open(path)?,
        (None, k) => {
            let path = folder.path().join("mask.safetensors");
            let output = Some((path.as_path(), Existing::Keep));
            create_mask(&ctx, &base, &MaskOptions::new(k.unwrap_or(1)), output)?;
            MaskFile::open(&path)?
        }
    };
    let biases = if options.train_bias { train::biases(&base, &mask)? } else { Vec::new() };
    let n_biases = biases.iter().map(|bias| bias.info.n_elements()).sum();
    let plan = RunLength::new(&options, &data);
    let eval_tokens = eval.as_ref().map_or(0, |eval| RunLength::new(&in_order(&options), eval).max_tokens);
    let max_tokens = plan.max_tokens.max(eval_tokens);
    let (n_entries, max_supervised) = (mask.nnz(), plan.max_supervised);
    let size = RunSize { n_entries, n_biases, max_tokens, max_supervised, keep: options.keep() };
    let place = RunDevice::new(env, &base, &config, size)?;
    let start = Start {
        base: base.name(),
        model_type: config.model_type.clone(),
        n_layers: config.n_layers,
        d_model: config.d_model,
        n_parameters: base.n_parameters(),
        n_trained: n_entries + n_biases,
        n_biases,
        device: place.name(),
        free: place.free,
        memory: place.memory,
        n_steps: plan.n_steps,
        tokens_per_step: plan.tokens_per_step,
        max_tokens,
    };
    if args.dry_run {
        env.report(&start, print_start)?;
        return Ok(Answer::Yes);
    }
    let mut table = Page::default();
    print_start(&start, &mut table);
    env.note(table.render(Layout::default()).trim_end());
    let about_data = json!({
        "name": about.name, "blake3": about.blake3, "form": about.form, "rows": about.n_rows,
        "examples": about.n_examples, "tokens": about.n_tokens, "supervised": about.n_supervised,
    });
    let job = TrainJob {
        base: &base,
        mask: &mask,
        data: &data,
        eval: eval.as_ref(),
        options: &options,
        about_data,
        output: &args.output,
        existing: if args.force { Existing::Replace } else { Existing::Keep },
        save_every: args.save_every,
        resume: args.resume,
        notes: args.notes.notes(),
    };
    let reporter = Reporter { env, log_every: args.log_every.max(1), pace: Cell::new((0, 0, 0.0)) };
    let report = place.train(Run { ctx: &ctx, job: &job, watcher: &reporter })?;
    env.report_work(&report, print)?;
    Ok(Answer::Yes)
}

/// The device of a run.
struct RunDevice {
    gpu: Option<(Gpu, Dtype)>,
    /// Available bytes of the GPU's memory.
    free: Option<u64>,
    memory: MemoryEstimate,
}

impl RunDevice {
    fn new(env: &Env, base: &Checkpoint, config: &ModelConfig, size: RunSize) -> CliResult<Self> {
        if let Some(gpu) = env.gpu()? {
            let dtype = gpu.dtype_of(base).hint("--device cpu supports them")?;
            let memory = gpu.memory_of_run(config, base, dtype, size);
            let most = env.memory_of(&gpu)?;
            let keeps = size.keep == Keep::All;
            let less =
                if keeps { "--layer-checkpoints or a smaller --batch-tokens" } else { "a smaller --batch-tokens" };
            gpu.check_room("the run", memory.total, most).hint(&format!("{less} needs less"))?;
            return Ok(Self { gpu: Some((gpu, dtype)), free: Some(most), memory });
        }
        let memory = MemoryEstimate::on_cpu(config, base, size);
        check_memory(env, base.root(), "training", memory.total)?;
        Ok(Self { gpu: None, free: None, memory })
    }

    /// The name, as in `--device`.
    fn name(&self) -> String {
        self.gpu.as_ref().map_or_else(|| "cpu".to_owned(), |(gpu, _)| gpu.name())
    }

    fn train(&self, run: Run<'_>) -> CliResult<TrainReport> {
        match &self.gpu {
            Some((gpu, dtype)) => gpu.run(*dtype, run),
            None => run.run(&CpuDevice::new()),
        }
    }
}

/// The work of a run, on any device.
struct Run<'a> {
    ctx: &'a Context<'a>,
    job: &'a TrainJob<'a>,
    watcher: &'a dyn Watcher,
}

impl OnDevice for Run<'_> {
    type Output = TrainReport;

    fn run<D: Device>(self, device: &D) -> CliResult<TrainReport> {
        let Self { ctx, job, watcher } = self;
        let mut model = Model::load(ctx, device, job.base)?;
        model.attach(ctx, device, job.base, job.mask)?;
        match train::train(ctx, device, &mut model, job, watcher) {
            Err(error @ TrainError::OtherRun { .. }) => Err(error).hint("--force without --resume starts a new run"),
            other => Ok(other?),
        }
    }
}

/// The options for reading evaluation data: one pass, in file order.
fn in_order(options: &TrainOptions) -> TrainOptions {
    TrainOptions { shuffle: false, epochs: 1, ..options.clone() }
}

fn print_data(env: &Env, about: &DataReport) {
    env.note(&format!(
        "{}: {} examples ({}), {} tokens, {} of them learned, the longest has {}",
        Printable(&about.name),
        count(about.n_examples),
        about.form,
        count(about.n_tokens),
        count(about.n_supervised),
        count(about.longest)
    ));
}

/// The plan of a run, printed before it begins.
#[derive(Serialize)]
struct Start {
    base: String,
    model_type: String,
    n_layers: usize,
    d_model: usize,
    n_parameters: u64,
    n_trained: u64,
    n_biases: u64,
    /// `cpu`, or the GPU's name as in `--device`.
    device: String,
    /// Bytes of GPU memory that the run may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    free: Option<u64>,
    memory: MemoryEstimate,
    n_steps: u64,
    tokens_per_step: f64,
    #[serde(rename = "most_tokens")]
    max_tokens: usize,
}

fn print_start(start: &Start, page: &mut Page) {
    let Start { base, model_type, n_layers, d_model, memory, .. } = start;
    let (n_trained, all) = (start.n_trained, start.n_parameters);
    let parts = [("weights", memory.weights), ("activations", memory.activations), ("state", memory.state)];
    let parts: Vec<String> = parts.iter().map(|(what, n_bytes)| format!("{what} {}", bytes(*n_bytes))).collect();
    let tokens = count(start.tokens_per_step as u64);
    let of_gpu = start.free.map_or(String::new(), |free| format!(" of {} on {}", bytes(free), start.device));
    let what = match start.n_biases {
        0 => format!("{} deltas", count(n_trained)),
        n_biases => format!("{} deltas and {} biases", count(n_trained - n_biases), count(n_biases)),
    };
    page.facts(&[
        ("model", format!("{base} ({model_type}, {n_layers} layers of {d_model}, {} parameters)", count(all))),
        ("trainable", format!("{what}, {} of the parameters", percent(n_trained, all))),
        ("memory", format!("{}: {}", bytes(memory.total) + &of_gpu, parts.join(", "))),
        (
            "steps",
            format!(
                "{} of {tokens} tokens each, a batch has {} at most",
                count(start.n_steps),
                count(start.max_tokens as u64)
            ),
        ),
    ]);
}

/// Reports steps and evaluations on stderr, and draws the bar.
struct Reporter<'a> {
    env: &'a Env,
    log_every: u64,
    /// Steps, tokens and seconds since the run began or resumed.
    pace: Cell<(u64, u64, f64)>,
}

impl Watcher for Reporter<'_> {
    fn step(&self, record: &StepRecord, n_steps: u64) {
        let (n, n_tokens, seconds) = self.pace.get();
        let bar = self.env.progress();
        if n == 0 {
            // A resumed run begins behind the steps that are done.
            bar.begin_count("training", "steps", n_steps.saturating_sub(record.step - 1));
        }
        bar.set_message(format!("training, loss {:.4}", record.loss));
        bar.advance(1);
        let (n, n_tokens, seconds) = (n + 1, n_tokens + record.n_tokens, seconds + record.seconds);
        self.pace.set((n, n_tokens, seconds));
        if !record.step.is_multiple_of(self.log_every) && record.step != n_steps && record.step != 1 {
            return;
        }
        let left = Duration::from_secs_f64(seconds / n as f64 * (n_steps - record.step) as f64);
        self.env.note(&format!(
            "step {}/{n_steps}  loss {:.4}  rate {}  gradient {}  {} tokens/s  ETA {}",
            record.step,
            record.loss,
            number(record.learning_rate),
            number(record.grad_norm),
            count((n_tokens as f64 / seconds) as u64),
            duration(left)
        ));
    }

    fn eval(&self, record: &EvalRecord, is_best: bool) {
        let best = if is_best { ", best so far" } else { "" };
        self.env.note(&format!("step {}  evaluation loss {:.4}{best}", record.step, record.eval_loss));
    }

    fn saved(&self, step: u64, path: &Path) {
        self.env.detail(&format!("step {step}  state saved in {}", Printable::path(path)));
    }
}

fn print(report: &TrainReport, page: &mut Page) {
    let mut facts = vec![
        ("adapter", format!("{} ({})", &report.id[..12], bytes(report.n_bytes))),
        (
            "trained",
            format!(
                "{} deltas in {} steps, {} tokens",
                count(report.n_trained),
                count(report.n_steps),
                count(report.n_tokens)
            ),
        ),
        ("loss", format!("{:.4} over the last steps", report.loss)),
    ];
    if let (Some(first), Some(last)) = (report.first_eval_loss, report.eval_loss) {
        let early =
            if report.stopped_early { "; the run stopped early, as later evaluations were not better" } else { "" };
        let losses = format!("{last:.4} after step {}, {first:.4} before training{early}", count(report.best_step));
        facts.push(("evaluation", losses));
    }
    page.facts(&facts);
}
