//! The trainer on a GPU, with checkpoints of random weights. Run it with `cargo bench --bench gpu_train -- FOLDER`, or
//! copy the built program to a machine with a GPU, as `tests/gpu/on_device.sh` does. `--small` is for the fake driver.
//!
//! FOLDER needs up to 18 GB. Speeds cover whole steps, from tokens to patched weights, after a few warm-up steps.
//! Memory is the maximum decrease of free device memory, sampled after each step.

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    AdapterNotes, Checkpoint, Context, Dtype, Existing, MaskFile, MaskOptions, create_mask,
    internals::{
        checkpoint::TensorFileWriter,
        data::Dataset,
        gpu::{CudaDevice, Gpu},
        train::{
            Keep, Model, ModelConfig, RunLength, RunSize, StepRecord, TrainJob, TrainOptions, Warmup, Watcher, train,
        },
    },
};

type Failure = Box<dyn std::error::Error>;

/// A model's shape.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    d_model: usize,
    d_ff: usize,
    n_layers: usize,
    n_q: usize,
    n_kv: usize,
    n_vocab: usize,
}

/// The shapes of Llama-3-8B and TinyLlama.
const SHAPE_8B: Shape =
    Shape { name: "8b", d_model: 4096, d_ff: 14336, n_layers: 32, n_q: 32, n_kv: 8, n_vocab: 128_256 };
const SHAPE_1B: Shape =
    Shape { name: "1b", d_model: 2048, d_ff: 5632, n_layers: 22, n_q: 32, n_kv: 4, n_vocab: 32_000 };
const SMALL: Shape = Shape { name: "small", d_model: 128, d_ff: 96, n_layers: 2, n_q: 2, n_kv: 1, n_vocab: 300 };

/// The trained part of a model.
#[derive(Clone, Copy)]
enum Trained {
    /// This many entries per row of the seven projections.
    Rows(u64),
    /// One matrix of the first layer: the backward pass is as long, but there are almost no delta gradients and
    /// patches.
    NearlyNothing,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let is_small = args.iter().any(|arg| arg == "--small");
    let Some(folder) = args.iter().find(|arg| !arg.starts_with("--")).map(PathBuf::from) else {
        return println!("skipped: gpu_train FOLDER [--small]");
    };
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(why) => return println!("skipped: {why}"),
    };
    println!("machine {gpu:?}");
    if let Err(error) = run(&gpu, &folder, is_small) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(gpu: &Gpu, folder: &Path, is_small: bool) -> Result<(), Failure> {
    use Trained::{NearlyNothing, Rows};
    let shapes = if is_small { [SMALL; 2] } else { [SHAPE_1B, SHAPE_8B] };
    for (i, shape) in shapes.into_iter().enumerate() {
        let base = checkpoint(folder, shape)?;
        let row = if is_small { 40 } else { 2048 };
        let keep = [(Rows(1), Keep::All), (NearlyNothing, Keep::All), (Rows(1), Keep::Inputs), (Rows(20), Keep::All)];
        let mut baseline = 0.0;
        for (trained, keep) in keep {
            let measured = measure(gpu, folder, &base, shape, trained, keep, row, if is_small { 2 } else { 12 })?;
            let words = match trained {
                Rows(k) => format!("k {k}"),
                NearlyNothing => "without".to_owned(),
            };
            let kept = if keep == Keep::All { "all" } else { "inputs" };
            let Measured { pace, peak, estimate, loss } = measured;
            let gb = |n_bytes: u64| n_bytes as f64 / 1e9;
            println!(
                "train {} {words} kept {kept}: {pace:.0} tokens/s, peak {:.2} GB, estimated {:.2} GB, loss {loss:.3}",
                shape.name,
                gb(peak),
                gb(estimate)
            );
            if let (Rows(1), Keep::All) = (trained, keep) {
                baseline = pace;
            }
            if let NearlyNothing = trained {
                println!(
                    "train {} gradients of deltas and patches: {:.1} % of a step",
                    shape.name,
                    100.0 * (1.0 - baseline / pace)
                );
            }
        }
        if i + 1 < shapes.len() && !is_small {
            println!("train {} is left in {} for the rivals", shape.name, folder.display());
        }
    }
    Ok(())
}

struct Measured {
    /// Tokens per second.
    pace: f64,
    /// Bytes of device memory.
    peak: u64,
    estimate: u64,
    loss: f64,
}

/// Records steps and memory.
struct Recorder<'a> {
    gpu: &'a Gpu,
    seen: RefCell<Vec<(StepRecord, u64)>>,
}

impl Watcher for Recorder<'_> {
    fn step(&self, record: &StepRecord, _n_steps: u64) {
        let free = self.gpu.memory().map_or(0, |(free, _)| free);
        self.seen.borrow_mut().push((*record, free));
    }
}

/// Steps of two rows of `row` tokens.
#[expect(clippy::too_many_arguments, reason = "one call")]
fn measure(
    gpu: &Gpu,
    folder: &Path,
    base: &Checkpoint,
    shape: Shape,
    trained: Trained,
    keep: Keep,
    row: usize,
    n_steps: usize,
) -> Result<Measured, Failure> {
    let ctx = Context { max_memory: 4 << 30, ..Context::default() };
    let mut of_mask = MaskOptions::new(1);
    match trained {
        Trained::Rows(k) => of_mask = MaskOptions::new(k),
        Trained::NearlyNothing => {
            of_mask.targets = vec!["model.layers.0.self_attn.q_proj".to_owned()];
        }
    }
    let path = folder.join("mask.safetensors");
    create_mask(&ctx, base, &of_mask, Some((&path, Existing::Replace)))?;
    let mask = MaskFile::open(&path)?;
    let mut data = Dataset::new();
    let mut token = 1u64;
    for _ in 0..2 * n_steps {
        let next = |_| {
            token = token.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (token >> 33) as u32 % shape.n_vocab as u32
        };
        let tokens: Vec<u32> = (0..row).map(next).collect();
        data.push(&tokens, 1);
    }
    let options = TrainOptions {
        batch_examples: 2,
        batch_tokens: 2 * row,
        epochs: 1,
        learning_rate: 1e-4,
        warmup: Warmup::Steps(0),
        layer_checkpoints: keep == Keep::Inputs,
        ..TrainOptions::default()
    };
    let plan = RunLength::new(&options, &data);
    let size = RunSize {
        n_entries: mask.nnz(),
        n_biases: 0,
        max_tokens: plan.max_tokens,
        max_supervised: plan.max_supervised,
        keep,
    };
    let estimate = CudaDevice::memory_of_run(&ModelConfig::of(base)?, base, Dtype::BF16, size).total;
    let (before, _) = gpu.memory()?;
    let device = CudaDevice::new(gpu, Dtype::BF16)?;
    let mut model = Model::load(&ctx, &device, base)?;
    model.attach(&ctx, &device, base, &mask)?;
    let output = folder.join("adapter.safetensors");
    let job = TrainJob {
        base,
        mask: &mask,
        data: &data,
        eval: None,
        options: &options,
        about_data: serde_json::Value::Null,
        output: &output,
        existing: Existing::Replace,
        save_every: Some(u64::MAX),
        resume: false,
        notes: AdapterNotes::default(),
    };
    let teller = Recorder { gpu, seen: RefCell::default() };
    let report = train(&ctx, &device, &mut model, &job, &teller)?;
    let seen = teller.seen.borrow();
    let timed = &seen[seen.len() / 4..];
    let tokens: u64 = timed.iter().map(|(record, _)| record.n_tokens).sum();
    let seconds: f64 = timed.iter().map(|(record, _)| record.seconds).sum();
    let least = seen.iter().map(|(_, free)| *free).min().unwrap_or(before);
    Ok(Measured { pace: tokens as f64 / seconds, peak: before.saturating_sub(least), estimate, loss: report.loss })
}

/// A checkpoint of random weights, created if it does not exist.
fn checkpoint(folder: &Path, shape: Shape) -> Result<Checkpoint, Failure> {
    let root = folder.join(shape.name);
    let path = root.join("model.safetensors");
    if !path.exists() {
        fs::create_dir_all(&root)?;
        let Shape { d_model, d_ff, n_layers, n_q, n_kv, n_vocab, .. } = shape;
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": d_model,
            "intermediate_size": d_ff, "num_hidden_layers": n_layers, "num_attention_heads": n_q,
            "num_key_value_heads": n_kv, "vocab_size": n_vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        });
        fs::write(root.join("config.json"), config.to_string())?;
        let d_kv = d_model / n_q * n_kv;
        let mut writer = TensorFileWriter::create(&path, Existing::Keep)?;
        let noise = noise();
        let mut add = |name: String, shape: &[usize]| -> Result<(), Failure> {
            let id = writer.add_tensor(name, Dtype::BF16);
            let n: usize = shape.iter().product();
            if let [n] = *shape {
                writer.append(id, &half::bf16::ONE.to_le_bytes().repeat(n))?;
            } else {
                for first in (0..2 * n).step_by(noise.len()) {
                    writer.append(id, &noise[..noise.len().min(2 * n - first)])?;
                }
            }
            writer.finish_tensor(id, shape.iter().map(|&size| size as u64).collect());
            Ok(())
        };
        add("model.embed_tokens.weight".to_owned(), &[n_vocab, d_model])?;
        for i in 0..n_layers {
            let mut of_layer = |name: &str, shape: &[usize]| add(format!("model.layers.{i}.{name}.weight"), shape);
            of_layer("input_layernorm", &[d_model])?;
            of_layer("self_attn.q_proj", &[d_model, d_model])?;
            of_layer("self_attn.k_proj", &[d_kv, d_model])?;
            of_layer("self_attn.v_proj", &[d_kv, d_model])?;
            of_layer("self_attn.o_proj", &[d_model, d_model])?;
            of_layer("post_attention_layernorm", &[d_model])?;
            of_layer("mlp.gate_proj", &[d_ff, d_model])?;
            of_layer("mlp.up_proj", &[d_ff, d_model])?;
            of_layer("mlp.down_proj", &[d_model, d_ff])?;
        }
        add("model.norm.weight".to_owned(), &[d_model])?;
        add("lm_head.weight".to_owned(), &[n_vocab, d_model])?;
        writer.finish(&Context::default(), &Default::default())?;
    }
    Ok(Checkpoint::open(&root)?)
}

/// Four million bell-shaped weights of standard deviation 0.02, with a period that differs from every row length.
fn noise() -> Vec<u8> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let bell = |_| half::bf16::from_f32((uniform() + uniform() + uniform() + uniform()) * 0.035);
    (0..4_000_037).map(bell).flat_map(half::bf16::to_le_bytes).collect()
}
