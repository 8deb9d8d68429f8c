//! The trainer compared with PyTorch and transformers, and its invariants.
#![cfg(feature = "train")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use neuroada_ckpt::{
    Adapter, Checkpoint, Context, Dtype, Existing, MaskFile, MaskOptions, MergeInput, MergeOptions, Observer,
    create_mask,
    internals::{
        checkpoint::Shard,
        data::{Batch, Batches, Dataset, IGNORE},
        train::{
            CpuDevice, Device, DeviceBatch, GenerateOptions, Keep, Model, Question, StepRecord, TrainError,
            TrainOptions, Workspace, backward, forward, generate, logits, losses, mean_loss, rank,
        },
    },
    merge,
};

#[path = "train/bias.rs"]
mod bias;
#[path = "support/training.rs"]
mod training;

use training::*;

#[test]
fn logits_loss_and_gradients_match_transformers() {
    // Both sides compute in float32 with sums in a different order: 3 layers with sums of 64 to 176 terms, each
    // rounded to 6e-8. The largest measured gradient errors, relative to the largest gradient of the tensor, are 60
    // times below the bound: llama and mistral 1.7e-6 (queries and keys, where the gradient is a difference of
    // probabilities); llama3 1.0e-6 (the angles of its scaled frequencies round the same way); qwen2 1.3e-6 (biases
    // add no error); qwen3 1.2e-6 (two more norms, over 16 numbers each).
    let device = CpuDevice::new();
    assert_like_transformers(&device, Keep::All, 1e-4);
    assert_like_transformers(&device, Keep::Inputs, 1e-4);
}

/// The loss of one example after its first `n_prompt` tokens, by the plain forward pass.
fn plain_loss(device: &CpuDevice, model: &Model<CpuDevice>, tokens: &[u32], n_prompt: usize) -> f64 {
    let label = |t: usize| if t + 1 < n_prompt { IGNORE } else { tokens.get(t + 1).copied().unwrap_or(IGNORE) };
    let labels: Vec<u32> = (0..tokens.len()).map(label).collect();
    let n_labels = labels.iter().filter(|label| **label != IGNORE).count();
    let batch = Batch { tokens: tokens.to_vec(), labels, starts: vec![0, tokens.len()] };
    let mut work = Workspace::new(device, &model.config, tokens.len(), Keep::Nothing).unwrap();
    let mean = mean_loss(&Context::default(), device, model, [batch].into_iter(), &mut work).unwrap();
    assert_eq!(mean.n_supervised, n_labels as u64);
    mean.loss * n_labels as f64
}

#[test]
fn ranking_from_a_cache_equals_whole_passes() {
    let folder = tempfile::tempdir().unwrap();
    let (ctx, device) = (Context::default(), CpuDevice::new());
    for name in ["llama3", "qwen3"] {
        let model = Model::load(&ctx, &device, &model(folder.path(), name).0).unwrap();
        let question = |prompt: &[u32], candidates: &[&[u32]]| Question {
            prompt: prompt.to_vec(),
            candidates: candidates.iter().map(|candidate| candidate.to_vec()).collect(),
        };
        let questions = [
            question(&[5, 9, 300], &[&[7, 8, 9], &[7, 8, 10, 11]]),
            question(&[1], &[&[2], &[3], &[4]]),
            question(&[17, 3, 3, 250, 40, 41, 42], &[&[100, 101]]),
        ];
        for max_tokens in [1, 20, 1000] {
            let ranked = rank(&ctx, &device, &model, &questions, max_tokens).unwrap();
            for (question, ranked) in questions.iter().zip(&ranked) {
                assert_eq!(ranked.len(), question.candidates.len());
                for (candidate, found) in question.candidates.iter().zip(ranked) {
                    let whole = [&question.prompt[..], candidate].concat();
                    let expected = -plain_loss(&device, &model, &whole, question.prompt.len());
                    // The same sums, in pieces of another shape.
                    assert!((found - expected).abs() < 1e-5 * expected.abs(), "{name}: {found} not {expected}");
                }
            }
        }
    }
}

#[test]
fn generation_takes_the_likeliest_token_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let (ctx, device) = (Context::default(), CpuDevice::new());
    let model = Model::load(&ctx, &device, &model(folder.path(), "llama").0).unwrap();
    let prompts: Vec<Vec<u32>> = vec![vec![5, 9, 300], vec![1], vec![17, 3, 3, 250, 40]];
    let plainly = |prompt: &[u32], stop: &[u32]| -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        while tokens.len() < prompt.len() + 6 {
            let n = tokens.len();
            let batch = Batch { tokens: tokens.clone(), labels: vec![IGNORE; n], starts: vec![0, n] };
            let batch = DeviceBatch::new(&device, &model.config, &batch).unwrap();
            let mut work = Workspace::new(&device, &model.config, n, Keep::Nothing).unwrap();
            forward(&device, &model, &batch, &mut work).unwrap();
            let logits = logits(&device, &model, &[n as u32 - 1], &mut work).unwrap();
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
            if stop.contains(&best) {
                break;
            }
            tokens.push(best);
        }
        tokens[prompt.len()..].to_vec()
    };
    let free: Vec<Vec<u32>> = prompts.iter().map(|prompt| plainly(prompt, &[])).collect();
    // A token that ends the first sequence early, but not necessarily the others.
    for stop in [vec![], vec![free[0][2]]] {
        for max_tokens in [1, 100] {
            let options = GenerateOptions { max_new_tokens: 6, stop: stop.clone(), max_tokens };
            let written = generate(&ctx, &device, &model, &prompts, &options).unwrap();
            for (written, prompt) in written.iter().zip(&prompts) {
                assert_eq!(*written, plainly(prompt, &stop));
            }
        }
    }
}

// --- whole runs

impl Recorder {
    /// Everything except the timings.
    fn timeless(&self) -> (Vec<StepRecord>, Vec<(u64, f64)>) {
        let steps = self.steps.borrow().iter().map(|&record| StepRecord { seconds: 0.0, ..record }).collect();
        (steps, self.evals.borrow().iter().map(|record| (record.step, record.eval_loss)).collect())
    }
}

#[test]
fn a_run_matches_the_losses_and_deltas_of_the_published_bypass() {
    let world = World::new(|folder| model(folder, "llama").0, 2);
    let (report, recorded) = world.run(&Context::default(), "a.safetensors", &reference_options(), |_| {});
    assert_eq!(report.unwrap().n_steps, 60);
    let expected = Shard::open(&reference("train").join("expected.safetensors")).unwrap();
    let steps = recorded.steps.borrow();
    let (losses, rates) = (numbers(&expected, "losses"), numbers(&expected, "learning_rates"));
    for (record, (loss, rate)) in steps.iter().zip(losses.iter().zip(&rates)) {
        // Rounding errors grow over 60 steps; 3e-6 was measured.
        assert!((record.loss / loss - 1.0).abs() < 1e-4, "step {}: {} not {loss}", record.step, record.loss);
        assert!((record.learning_rate - rate).abs() < 1e-15, "step {}: rate {}", record.step, record.learning_rate);
    }
    let (adapter, ctx) = (Adapter::open(&world.path("a.safetensors")).unwrap(), Context::default());
    for target in adapter.targets() {
        let rows = adapter.read_rows(&ctx, target, 0..target.layout.n_rows()).unwrap();
        let off = difference(&rows.values, &numbers(&expected, &format!("{}.values", target.name)));
        // AdamW divides by the square root of the second moment: small gradients lose digits.
        assert!(off < 1e-3, "{}: values differ by {off}", target.name);
    }
}

#[test]
fn trained_weights_equal_merged_weights() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let mut world = World::new(llama_as(dtype), 2);
        let mut eval = Dataset::new();
        for example in world.data.iter().skip(200) {
            eval.push(example.tokens, example.n_prompt());
        }
        world.eval = Some(eval);
        let options = TrainOptions { max_steps: Some(12), eval_every: Some(5), ..reference_options() };
        let (report, recorded) = world.run(&Context::default(), "a.safetensors", &options, |_| {});
        let report = report.unwrap();
        assert!(report.eval_loss < report.first_eval_loss, "{report:?}");
        assert_eq!(recorded.evals.borrow().iter().map(|eval| eval.step).collect::<Vec<_>>(), [0, 5, 10, 12]);

        let merged = world.path("merged");
        let input = MergeInput { adapter: world.path("a.safetensors"), scale: None };
        let (ctx, merge_options) = (Context::default(), MergeOptions::new_checkpoint(&merged));
        merge(&ctx, world.base.root(), &[input], &merge_options).unwrap();
        let device = CpuDevice::new();
        let model = Model::load(&ctx, &device, &Checkpoint::open(&merged).unwrap()).unwrap();
        let batches = Batches::in_order(world.eval.as_ref().unwrap(), options.limits());
        let mut work = Workspace::new(&device, &model.config, batches.max_tokens(), Keep::Nothing).unwrap();
        let mean = mean_loss(&ctx, &device, &model, batches.iter_from(0), &mut work).unwrap();
        assert_eq!(Some(mean.loss), report.eval_loss, "{dtype:?}: bit for bit");
    }
}

/// Cancels after this many checks of the flag.
struct StopAfter(AtomicU64);

impl Observer for StopAfter {
    fn is_cancelled(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(1))) == Ok(0)
    }
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    let mut world = World::new(llama_as(Dtype::BF16), 1);
    let mut eval = Dataset::new();
    for example in world.data.iter().skip(230) {
        eval.push(example.tokens, example.n_prompt());
    }
    world.eval = Some(eval);
    let options = TrainOptions {
        epochs: 2,
        max_steps: None,
        batch_examples: 16,
        accumulate: 4,
        shuffle: true,
        eval_every: Some(3),
        ..reference_options()
    };
    let ctx = Context::default();
    let (whole, told_whole) = world.run(&ctx, "whole.safetensors", &options, |_| {});
    let whole = whole.unwrap();
    // 15 batches per epoch are 4 steps, the last of 3 batches.
    assert_eq!(whole.n_steps, 8);

    let recorded = Recorder::default();
    let mut n_stops = 0;
    let report = loop {
        let stop = StopAfter(AtomicU64::new(7 + n_stops));
        let stopping = Context { observer: &stop, ..ctx };
        let part = if n_stops > 4 { &ctx } else { &stopping };
        let (result, told_part) = world.run(part, "parts.safetensors", &options, |job| job.resume = n_stops > 0);
        recorded.steps.borrow_mut().extend(told_part.steps.borrow().iter());
        recorded.evals.borrow_mut().extend(told_part.evals.borrow().iter());
        match result {
            Ok(report) => break report,
            Err(TrainError::Stopped { step }) => {
                assert_eq!(step, recorded.steps.borrow().last().map_or(0, |record| record.step));
                assert!(world.path("parts.state.safetensors").exists());
                n_stops += 1;
            }
            Err(other) => panic!("{other}"),
        }
    };
    assert!(n_stops >= 4, "it was stopped {n_stops} times");
    assert_eq!(recorded.timeless(), told_whole.timeless());
    assert_eq!(report, whole);
    let bytes = |name: &str| fs::read(world.path(name)).unwrap();
    assert_eq!(bytes("parts.safetensors"), bytes("whole.safetensors"));
    assert_eq!(bytes("parts.loss.svg"), bytes("whole.loss.svg"));
    assert_eq!(bytes("parts.log.jsonl").iter().filter(|&&byte| byte == b'\n').count(), 8 + 4);
    assert!(!world.path("parts.state.safetensors").exists(), "a finished run needs no state");
}

#[test]
fn the_state_of_another_run_is_refused() {
    let world = World::new(llama_as(Dtype::BF16), 1);
    let options = TrainOptions { max_steps: Some(4), ..reference_options() };
    let stop = StopAfter(AtomicU64::new(2));
    let ctx = Context { observer: &stop, ..Context::default() };
    let stopped = world.run(&ctx, "a.safetensors", &options, |_| {}).0.unwrap_err();
    assert!(matches!(stopped, TrainError::Stopped { step: 2 }), "{stopped}");
    let again = |options: &TrainOptions, resume: bool| {
        world.run(&Context::default(), "a.safetensors", options, |job| job.resume = resume).0
    };
    let other = TrainOptions { seed: 9, ..options.clone() };
    let error = again(&other, true).unwrap_err();
    assert!(matches!(error, TrainError::OtherRun { .. }), "{error}");
    assert!(error.to_string().ends_with("cannot be resumed: options.seed was 0, is 9"), "{error}");
    let error = again(&options, false).unwrap_err();
    assert!(error.to_string().contains("this is the state of an unfinished run"), "{error}");
    again(&options, true).unwrap();
}

#[test]
fn every_number_of_threads_trains_the_same_bytes() {
    let world = World::new(llama_as(Dtype::BF16), 2);
    let options = TrainOptions { max_steps: Some(5), batch_examples: 40, ..reference_options() };
    let mut seen = Vec::new();
    for n_threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        let name = format!("{n_threads}.safetensors");
        let layer_checkpoints = n_threads == 5;
        let options = TrainOptions { layer_checkpoints, ..options.clone() };
        let (report, recorded) = pool.install(|| world.run(&Context::default(), &name, &options, |_| {}));
        seen.push((report.unwrap().id, recorded.timeless()));
    }
    assert!(seen[0] == seen[1] && seen[0] == seen[2], "threads and layer checkpoints do not change the result");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_the_tensor() {
    let world = World::new(
        |folder| {
            let base = llama_as(Dtype::F32)(folder);
            let tensor = base.tensor("model.layers.1.mlp.up_proj.weight").unwrap();
            let mut bytes = fs::read(tensor.shard.path()).unwrap();
            // The last entry of the first row, which no mask would choose if it were a number.
            let at = tensor.shard.file_range(tensor.info).start as usize + 63 * 4;
            bytes[at..at + 4].copy_from_slice(&f32::MAX.to_le_bytes());
            let path = tensor.shard.path().to_owned();
            fs::write(&path, bytes).unwrap();
            Checkpoint::open(base.root()).unwrap()
        },
        1,
    );
    let (result, _) = world.run(&Context::default(), "a.safetensors", &reference_options(), |_| {});
    let error = result.unwrap_err().to_string();
    assert!(
        error.starts_with("step 1, batch 0: the loss is NaN; the first tensor that is not finite is the output of"),
        "{error}"
    );
    assert!(error.ends_with("model.layers.1"), "{error}");
    assert!(!world.path("a.safetensors").exists());
}

#[test]
fn early_stopping_keeps_the_best_deltas() {
    let mut world = World::new(llama_as(Dtype::F32), 2);
    let mut eval = Dataset::new();
    // The evaluation data is unrelated to the training data: the loss soon gets worse.
    for i in 0..8 {
        eval.push(&[5 + i, 300 - i, 7, 7, 7 + i], 1);
    }
    world.eval = Some(eval);
    let options = TrainOptions { eval_every: Some(2), patience: Some(3), learning_rate: 0.1, ..reference_options() };
    let (report, recorded) = world.run(&Context::default(), "a.safetensors", &options, |_| {});
    let report = report.unwrap();
    let evals = recorded.evals.borrow();
    let best = evals.iter().min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss)).unwrap();
    assert!(report.stopped_early && report.n_steps == best.step + 6, "{report:?}");
    assert_eq!((report.best_step, report.eval_loss), (best.step, Some(best.eval_loss)));
}

#[test]
fn targets_outside_of_layers_and_other_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (base, _) = model(folder.path(), "llama");
    let options = MaskOptions { targets: vec!["lm_head".to_owned(), "q_proj".to_owned()], ..MaskOptions::new(1) };
    let path = folder.path().join("mask.safetensors");
    create_mask(&Context::default(), &base, &options, Some((&path, Existing::Keep))).unwrap();
    let (ctx, device) = (Context::default(), CpuDevice::new());
    let mut on_device = Model::load(&ctx, &device, &base).unwrap();
    let error = on_device.attach(&ctx, &device, &base, &MaskFile::open(&path).unwrap()).unwrap_err();
    assert!(
        error.to_string().ends_with("\"lm_head.weight\": only projections inside layers can be trained"),
        "{error}"
    );

    let config = fs::read_to_string(base.root().join("config.json")).unwrap();
    let message = |config: String| {
        fs::write(base.root().join("config.json"), config).unwrap();
        let base = Checkpoint::open(base.root()).unwrap();
        Model::load(&ctx, &device, &base).map(|_| ()).unwrap_err().to_string()
    };
    let other = message(config.replace("\"llama\"", "\"gemma3\""));
    assert!(other.ends_with("model type `gemma3` cannot be trained; llama, mistral, qwen2, qwen3 can"), "{other}");
    let narrow = message(config.replace("\"intermediate_size\": 176", "\"intermediate_size\": 170"));
    assert!(narrow.contains("mlp.up_proj.weight\": shape [176, 64], the configuration requires [170, 64]"), "{narrow}");
    let deep = message(config.replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 16000000"));
    assert!(deep.ends_with("`num_hidden_layers` is 16000000, the checkpoint has 30 tensors"), "{deep}");
    let short = message(config.replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2"));
    assert!(short.contains("\"model.layers.2.mlp.down_proj.weight\": not a tensor of this architecture"), "{short}");
}
