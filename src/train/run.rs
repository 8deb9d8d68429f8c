//! The loop: batch, forward, backward, update, log.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::Instant,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    TrainError,
    attach::{bias_columns, bias_layout, biases},
    device::{AdamW, Device},
    evaluate::mean_loss,
    model::Model,
    options::{RunLength, TrainOptions},
    pass::{DeviceBatch, Workspace, backward, first_non_finite, forward, losses},
    state::{self, Best, BestDeltas, Progress},
};
use crate::{
    adapter::{Adapter, AdapterNotes, AdapterWriter},
    checkpoint::{
        Checkpoint, CheckpointError, Context, Existing, OutputKind, Silent, append_to_file, check_output, gather_rows,
        probe, remove_file, write_atomic,
    },
    data::{Batch, Batches, Dataset, loss_curve},
    mask::{BaseInfo, MaskFile},
    tensor::Dtype,
};

/// Positions and rows of an adapter that are written at a time.
const RUN: u64 = 1 << 18;

/// The inputs and outputs of a run.
pub struct TrainJob<'a> {
    /// The model before training.
    pub base: &'a Checkpoint,
    /// The trained entries.
    pub mask: &'a MaskFile,
    /// The training examples.
    pub data: &'a Dataset,
    /// The evaluation examples; without them the last deltas are kept.
    pub eval: Option<&'a Dataset>,
    /// The training options.
    pub options: &'a TrainOptions,
    /// What the adapter records about its data, besides the digest: no paths, no times.
    pub about_data: Value,
    /// Path of the adapter. `OUTPUT.log.jsonl`, `OUTPUT.loss.svg` and, until the end, `OUTPUT.state.safetensors` are
    /// written next to it.
    pub output: &'a Path,
    /// What to do if it exists.
    pub existing: Existing,
    /// Optimizer steps between saved states; by default at the end of every epoch.
    pub save_every: Option<u64>,
    /// Whether to resume from a saved state, if there is one.
    pub resume: bool,
    /// License, description and author of the adapter.
    pub notes: AdapterNotes,
}

impl TrainJob<'_> {
    /// Path of a file next to the adapter.
    pub fn beside(&self, suffix: &str) -> PathBuf {
        self.output.with_extension(suffix)
    }

    /// Fails early if any of the run's files must not be written: adapter, state, log and loss curve. Returns whether
    /// the run resumes from a saved state; log and loss curve are then its own.
    fn check_outputs(&self, state: &Path) -> Result<bool, TrainError> {
        check_output(self.output, OutputKind::File, self.existing)?;
        let has_state = probe::is_present(state)?;
        if has_state && !self.resume && self.existing == Existing::Keep {
            let what = "this is the state of an unfinished run: resume it, or replace it".to_owned();
            return Err(CheckpointError::Refused { path: state.to_owned(), what }.into());
        }
        let resumes = has_state && self.resume;
        let existing = if resumes { Existing::Replace } else { self.existing };
        for path in [state, &self.beside("log.jsonl"), &self.beside("loss.svg")] {
            check_output(path, OutputKind::File, existing)?;
        }
        Ok(resumes)
    }

    /// Everything that determines the result: equal recipes give equal bytes.
    fn recipe(&self, n_trained: usize) -> Value {
        let anchors: Vec<_> = self.mask.targets().iter().map(|target| target.anchor.to_hex().to_string()).collect();
        let mut recipe = json!({
            "base": self.base.name(),
            "targets": blake3::hash(anchors.concat().as_bytes()).to_hex().to_string(),
            "n_trained": n_trained,
            "data": self.about_data,
            "data_digest": self.data.digest().to_hex().to_string(),
            "options": self.options,
        });
        if let Some(eval) = self.eval {
            recipe["eval_digest"] = json!(eval.digest().to_hex().to_string());
        }
        recipe
    }
}

/// One line of the log: an optimizer step.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Its epoch, from 0.
    pub epoch: u64,
    /// The mean loss over its supervised tokens, in nats.
    pub loss: f64,
    /// Its learning rate.
    pub learning_rate: f64,
    /// The norm of its gradient, before clipping.
    pub grad_norm: f64,
    /// Its number of tokens.
    pub n_tokens: u64,
    /// The number of supervised tokens among them.
    pub n_supervised: u64,
    /// Its duration.
    pub seconds: f64,
}

/// One line of the log: an evaluation.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// The mean loss over all supervised tokens, in nats.
    pub eval_loss: f64,
    /// Its duration.
    pub seconds: f64,
}

/// Receives the progress of a run.
pub trait Watcher {
    /// A step of `n_steps` is done.
    fn step(&self, _record: &StepRecord, _n_steps: u64) {}
    /// The model was evaluated; `is_best` if the loss is the lowest so far.
    fn eval(&self, _record: &EvalRecord, _is_best: bool) {}
    /// A state was saved.
    fn saved(&self, _step: u64, _path: &Path) {}
}

impl Watcher for () {}

/// The result of a run.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct TrainReport {
    /// The adapter's id, 64 hexadecimal digits.
    pub id: String,
    /// Bytes of the adapter.
    pub n_bytes: u64,
    /// Number of trained deltas.
    pub n_trained: u64,
    /// Optimizer steps done.
    pub n_steps: u64,
    /// Tokens processed.
    pub n_tokens: u64,
    /// The mean loss over the last 5 % of the steps.
    pub loss: f64,
    /// The evaluation loss before training.
    pub first_eval_loss: Option<f64>,
    /// The evaluation loss of the adapter.
    pub eval_loss: Option<f64>,
    /// The step that the adapter's deltas come from.
    pub best_step: u64,
    /// Whether the run stopped early because the evaluation loss no longer improved.
    pub stopped_early: bool,
}

/// Trains, and writes the adapter.
///
/// The job's mask must be attached to the model, and nothing may be trained yet; biases are attached here if the
/// options include them. With evaluation data, the adapter has the deltas of the best evaluation. Its loss equals, bit
/// for bit, the loss of the merged checkpoint on the same device.
///
/// # Errors
/// [`TrainError::Stopped`] if the user stopped the run; its state was saved. [`TrainError::NotFinite`] if the loss or
/// a gradient is no longer finite; files that were saved before remain.
pub fn train<D: Device>(
    ctx: &Context<'_>,
    device: &D,
    model: &mut Model<D>,
    job: &TrainJob<'_>,
    watcher: &dyn Watcher,
) -> Result<TrainReport, TrainError> {
    job.options.check()?;
    job.base.refuse_codes()?;
    let state_path = job.beside("state.safetensors");
    let resumes = job.check_outputs(&state_path)?;
    let plan = RunLength::new(job.options, job.data);
    let eval_batches = job.eval.map(|eval| Batches::in_order(eval, job.options.limits()));
    let max_tokens = eval_batches.as_ref().map_or(0, Batches::max_tokens).max(plan.max_tokens);
    let fits = model.config.max_positions;
    let longest = job.data.longest().max(job.eval.map_or(0, Dataset::longest));
    if longest > fits {
        let what = format!("the longest example has {longest} tokens, the model allows {fits}");
        return Err(TrainError::Usage(what));
    }
    if job.options.train_bias {
        model.attach_biases(&uncancellable(ctx), device, job.base, job.mask)?;
    }
    let recipe = job.recipe(model.n_trained());
    let (progress, best) = if resumes {
        state::load(&uncancellable(ctx), device, model, &recipe, &state_path)?
    } else {
        let start = Progress { step: 0, epoch: 0, batch: 0, n_tokens: 0, first_eval: None, best: None, n_worse: 0 };
        (start, None)
    };
    for linear in model.linears_mut() {
        linear.patch(device)?;
    }
    let work = Workspace::new(device, &model.config, max_tokens, job.options.keep())?;
    let log = Log::open(&job.beside("log.jsonl"), progress.step, resumes)?;
    Run { ctx, device, model, job, watcher, plan, eval_batches, work, recipe, progress, best, log }.run_all()
}

/// The same context without cancellation, for work that takes seconds and must finish once it has begun.
fn uncancellable<'a>(ctx: &Context<'a>) -> Context<'a> {
    Context { observer: &Silent, ..*ctx }
}

struct Run<'a, D: Device> {
    ctx: &'a Context<'a>,
    device: &'a D,
    model: &'a mut Model<D>,
    job: &'a TrainJob<'a>,
    watcher: &'a dyn Watcher,
    plan: RunLength,
    eval_batches: Option<Batches<'a>>,
    work: Workspace<D>,
    recipe: Value,
    progress: Progress,
    best: Option<BestDeltas>,
    log: Log,
}

impl<D: Device> Run<'_, D> {
    fn run_all(mut self) -> Result<TrainReport, TrainError> {
        let options = self.job.options;
        if self.progress.step == 0 {
            self.evaluate()?;
        }
        let mut stopped_early = self.patience_exhausted();
        let mut batches = options.epoch(self.job.data, self.progress.epoch);
        while self.progress.step < self.plan.n_steps && !stopped_early {
            let first = self.progress.batch as usize;
            let last = (first + options.accumulate as usize).min(batches.len());
            let of_step: Vec<Batch> = (first..last).map(|i| batches.get(i)).collect();
            match self.step(&of_step) {
                Err(TrainError::Checkpoint(CheckpointError::Cancelled)) => {
                    // The unfinished step is dropped; resuming repeats it.
                    self.save()?;
                    return Err(TrainError::Stopped { step: self.progress.step });
                }
                done => done?,
            }
            self.progress.batch = last as u64;
            let ends_epoch = last == batches.len();
            if ends_epoch {
                (self.progress.epoch, self.progress.batch) = (self.progress.epoch + 1, 0);
                if self.progress.epoch < options.epochs {
                    batches = options.epoch(self.job.data, self.progress.epoch);
                }
            }
            let step = self.progress.step;
            let due = |every: Option<u64>| every.map_or(ends_epoch, |every| step.is_multiple_of(every));
            let is_last = step == self.plan.n_steps;
            if due(options.eval_every) || is_last {
                self.evaluate()?;
                stopped_early = !is_last && self.patience_exhausted();
            }
            if due(self.job.save_every) && !is_last {
                self.save()?;
            }
        }
        self.finish(stopped_early)
    }

    fn patience_exhausted(&self) -> bool {
        self.job.options.patience.is_some_and(|patience| self.progress.n_worse >= patience)
    }

    /// One optimizer step over all batches; the loss is the mean over all their supervised tokens.
    fn step(&mut self, batches: &[Batch]) -> Result<(), TrainError> {
        let began = Instant::now();
        let (device, options) = (self.device, self.job.options);
        let n_supervised: usize = batches.iter().map(Batch::n_supervised).sum();
        let n_tokens: usize = batches.iter().map(Batch::n_tokens).sum();
        let loss_scale = f64::from(device.loss_scale());
        let grad_scale = device.loss_scale() / n_supervised.max(1) as f32;
        for (_, deltas) in self.model.trained_mut() {
            device.clear(&mut deltas.grad)?;
        }
        let mut sum = 0.0;
        for (i, batch) in batches.iter().enumerate() {
            self.ctx.check()?;
            let batch = DeviceBatch::new(device, &self.model.config, batch)?;
            forward(device, self.model, &batch, &mut self.work)?;
            let losses = losses(device, self.model, &batch, &mut self.work, Some(grad_scale))?;
            let loss: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
            if !loss.is_finite() {
                let tensor = first_non_finite(device, self.model, batch.spans.n_tokens(), &self.work)?;
                return Err(self.not_finite(i, loss / losses.len() as f64, tensor));
            }
            sum += loss;
            backward(device, self.model, &batch, &mut self.work)?;
        }
        let loss = sum / n_supervised.max(1) as f64;
        let of: Vec<_> = self.model.trained().map(|(_, deltas)| (&deltas.grad, deltas.nnz)).collect();
        let squares = device.sums_of_squares(&of)?;
        if let Some(i) = squares.iter().position(|sum| !sum.is_finite()) {
            let (parts, deltas) = self.model.trained().nth(i).expect("one sum for each");
            let grad = device.read(&deltas.grad, deltas.nnz)?;
            let part = parts.iter().find(|part| !grad[part.entries.clone()].iter().all(|g| g.is_finite()));
            let name = part.map_or("", |part| part.name.as_str());
            return Err(self.not_finite(batches.len() - 1, loss, format!("the gradient of {name}")));
        }
        let grad_norm = squares.iter().sum::<f64>().sqrt() / loss_scale;
        let clipped = options.clip.filter(|most| grad_norm > *most).map_or(1.0, |most| most / grad_norm);
        let learning_rate = options.learning_rate
            * options.schedule.fraction(self.progress.step, self.plan.n_steps, self.plan.n_warmup);
        self.progress.step += 1;
        self.progress.n_tokens += n_tokens as u64;
        let update = AdamW {
            learning_rate,
            betas: options.betas,
            eps: options.eps,
            weight_decay: options.weight_decay,
            grad_scale: clipped / loss_scale,
            step: self.progress.step,
        };
        for linear in self.model.linears_mut() {
            for (_, deltas) in linear.trained_mut() {
                device.adamw(deltas, update)?;
            }
            linear.patch(device)?;
        }
        let record = StepRecord {
            step: self.progress.step,
            epoch: self.progress.epoch,
            loss,
            learning_rate,
            grad_norm,
            n_tokens: n_tokens as u64,
            n_supervised: n_supervised as u64,
            seconds: began.elapsed().as_secs_f64(),
        };
        self.log.step(record)?;
        self.watcher.step(&record, self.plan.n_steps);
        Ok(())
    }

    fn not_finite(&self, i: usize, loss: f64, tensor: String) -> TrainError {
        TrainError::NotFinite { step: self.progress.step + 1, batch: self.progress.batch + i as u64, loss, tensor }
    }

    /// Evaluates the model, if there is evaluation data, and keeps the best deltas.
    fn evaluate(&mut self) -> Result<(), TrainError> {
        let Some(batches) = &self.eval_batches else { return Ok(()) };
        let began = Instant::now();
        // Not cancellable: otherwise the preceding step would be lost.
        let mean = mean_loss(&uncancellable(self.ctx), self.device, self.model, batches.iter_from(0), &mut self.work)?;
        let step = self.progress.step;
        let is_best = self.progress.best.is_none_or(|best| mean.loss < best.loss);
        if is_best {
            let mut best = BestDeltas::new();
            for (_, deltas) in self.model.trained() {
                best.push(self.device.read(&deltas.theta, deltas.nnz)?);
            }
            (self.best, self.progress.best) = (Some(best), Some(Best { step, loss: mean.loss }));
            self.progress.n_worse = 0;
        } else {
            self.progress.n_worse += 1;
        }
        if step == 0 {
            self.progress.first_eval = Some(mean.loss);
        }
        let record = EvalRecord { step, eval_loss: mean.loss, seconds: began.elapsed().as_secs_f64() };
        self.log.eval(record)?;
        self.watcher.eval(&record, is_best);
        Ok(())
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let path = self.job.beside("state.safetensors");
        let (progress, best) = (&self.progress, self.best.as_ref());
        state::save(&uncancellable(self.ctx), self.device, self.model, progress, &self.recipe, best, &path)?;
        self.write_loss_curve()?;
        self.watcher.saved(self.progress.step, &path);
        Ok(())
    }

    fn write_loss_curve(&mut self) -> Result<(), TrainError> {
        self.log.flush()?;
        let svg = loss_curve(&self.log.losses, &self.log.eval_losses);
        Ok(write_atomic(&self.job.beside("loss.svg"), Existing::Replace, svg.as_bytes())?)
    }

    /// Restores the best deltas, writes the adapter, and removes the state.
    fn finish(mut self, stopped_early: bool) -> Result<TrainReport, TrainError> {
        if let Some(best) = &self.best {
            let mut best = best.iter();
            for linear in self.model.linears_mut() {
                for (_, deltas) in linear.trained_mut() {
                    let theta = best.next().expect("there are best deltas for every trained tensor");
                    self.device.write(theta, &mut deltas.theta)?;
                }
                linear.patch(self.device)?;
            }
        }
        self.write_loss_curve()?;
        let Self { device, model, job, progress, .. } = &self;
        let ctx = &uncancellable(self.ctx);
        let tail = self.log.losses.len().div_ceil(20);
        let last = &self.log.losses[self.log.losses.len() - tail..];
        let loss = last.iter().map(|(_, loss)| loss).sum::<f64>() / last.len().max(1) as f64;
        let best_step = progress.best.map_or(progress.step, |best| best.step);
        let mut training = self.recipe.clone();
        training["method"] = json!("neuroada");
        training["result"] = json!({
            "n_steps": progress.step,
            "n_tokens": progress.n_tokens,
            "loss": loss,
            "first_eval_loss": progress.first_eval,
            "eval_loss": progress.best.map(|best| best.loss),
            "best_step": best_step,
        });
        let notes = AdapterNotes { training: Some(training), ..job.notes.clone() };
        write_adapter(ctx, *device, model, job, &notes)?;
        let state = job.beside("state.safetensors");
        // The adapter is complete at this point.
        remove_file(&state).map_err(|e| e.after_commit(job.output, "remove the training state of"))?;
        let (adapter, id) = Adapter::read_back(ctx, job.output)?;
        Ok(TrainReport {
            id: id.to_string(),
            n_bytes: adapter.n_bytes(),
            n_trained: adapter.nnz(),
            n_steps: progress.step,
            n_tokens: progress.n_tokens,
            loss,
            first_eval_loss: progress.first_eval,
            eval_loss: progress.best.map(|best| best.loss),
            best_step,
            stopped_early,
        })
    }
}

/// Writes the deltas as an adapter, in float32: a merge then rounds as training did.
fn write_adapter<D: Device>(
    ctx: &Context<'_>,
    device: &D,
    model: &Model<D>,
    job: &TrainJob<'_>,
    notes: &AdapterNotes,
) -> Result<(), TrainError> {
    let mut writer = AdapterWriter::create(job.output, job.existing, Dtype::F32)?;
    for target in job.mask.targets() {
        let theta = read_theta(device, model, &target.name)?;
        let mut theta = &theta[..];
        let tensor = job.base.tensor(&target.name).expect("targets are tensors of the base");
        writer.begin_target(&target.name, target.dtype, &target.shape, false, target.uniform_k)?;
        for rows in job.mask.row_ranges(ctx, target, RUN)? {
            let columns = job.mask.read_columns(ctx, target, rows.clone())?;
            let stored = gather_rows(ctx, tensor, target.layout, rows.start, &columns)?;
            let (values, rest) = theta.split_at(columns.nnz());
            theta = rest;
            writer.push_rows(&columns, values, &stored)?;
        }
        writer.end_target(target.blake3);
    }
    let biases = if job.options.train_bias { biases(job.base, job.mask)? } else { Vec::new() };
    for bias in biases {
        let (layout, info) = (bias_layout(bias), bias.info);
        let columns = bias_columns(layout.n_rows() as usize);
        writer.begin_target(&info.name, info.dtype, &info.shape, false, Some(1))?;
        let stored = gather_rows(ctx, bias, layout, 0, &columns)?;
        writer.push_rows(&columns, &read_theta(device, model, &info.name)?, &stored)?;
        writer.end_target(None);
    }
    job.base.unchanged()?;
    Ok(writer.finish(ctx, 1.0, job.mask.recipe(), &BaseInfo::of(job.base), notes)?)
}

/// The deltas of a tensor; empty if it is not trained.
fn read_theta<D: Device>(device: &D, model: &Model<D>, tensor: &str) -> Result<Vec<f32>, TrainError> {
    for (parts, deltas) in model.trained() {
        if let Some(part) = parts.iter().find(|part| part.name == tensor) {
            return Ok(device.read(&deltas.theta, deltas.nnz)?[part.entries.clone()].to_vec());
        }
    }
    Ok(Vec::new())
}

/// The log: JSON lines on disk, losses in memory for the curve.
struct Log {
    path: PathBuf,
    file: std::io::BufWriter<fs::File>,
    losses: Vec<(u64, f64)>,
    eval_losses: Vec<(u64, f64)>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Step(StepRecord),
    Eval(EvalRecord),
}

impl Log {
    /// Opens the log; a resumed run keeps its lines up to `step`.
    fn open(path: &Path, step: u64, resumes: bool) -> Result<Self, TrainError> {
        let io = |what, e| CheckpointError::io(what, path, e);
        let (mut kept, mut losses, mut eval_losses) = (String::new(), Vec::new(), Vec::new());
        if resumes && probe::is_present(path)? {
            for line in fs::read_to_string(path).map_err(|e| io("read", e))?.lines() {
                match serde_json::from_str(line) {
                    Ok(Line::Step(record)) if record.step <= step => losses.push((record.step, record.loss)),
                    Ok(Line::Eval(record)) if record.step <= step => eval_losses.push((record.step, record.eval_loss)),
                    // Steps after the saved state are repeated.
                    _ => continue,
                }
                kept += line;
                kept.push('\n');
            }
        }
        write_atomic(path, Existing::Replace, kept.as_bytes())?;
        let file = append_to_file(path)?;
        Ok(Self { path: path.to_owned(), file: std::io::BufWriter::new(file), losses, eval_losses })
    }

    fn step(&mut self, record: StepRecord) -> Result<(), TrainError> {
        self.losses.push((record.step, record.loss));
        self.line(&record)
    }

    fn eval(&mut self, record: EvalRecord) -> Result<(), TrainError> {
        self.eval_losses.push((record.step, record.eval_loss));
        self.line(&record)
    }

    /// A step takes seconds, so each line is flushed for readers that follow the file.
    fn line(&mut self, record: &impl Serialize) -> Result<(), TrainError> {
        let json = serde_json::to_string(record).expect("numbers are JSON");
        writeln!(self.file, "{json}").map_err(|e| CheckpointError::io("write", &self.path, e))?;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), TrainError> {
        Ok(self.file.flush().map_err(|e| CheckpointError::io("write", &self.path, e))?)
    }
}
