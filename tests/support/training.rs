//! Reference models with their results from PyTorch and transformers, and trainer runs on them.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use neuroada_ckpt::{
    AdapterNotes, Checkpoint, Context, Dtype, Existing, MaskFile, MaskOptions, TensorRef, create_mask,
    internals::{
        checkpoint::{Shard, TensorFileWriter},
        data::{Batch, Dataset, IGNORE},
        train::{
            CpuDevice, Device, DeviceBatch, EvalRecord, Keep, Model, StepRecord, TrainError, TrainJob, TrainOptions,
            TrainReport, Warmup, Watcher, Workspace, backward, forward, logits, losses, train,
        },
    },
};

pub(crate) fn reference(name: &str) -> PathBuf {
    // Tests and fixtures may have been copied to another machine.
    let fixtures = std::env::var_os("NEUROADA_TEST_FIXTURES").map(PathBuf::from);
    let fixtures = fixtures.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures"));
    fixtures.join("reference").join(name)
}

/// A tensor's values, of any dtype.
pub(crate) fn numbers(file: &Shard, name: &str) -> Vec<f64> {
    let info = file.header().tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
    let bytes = file.window(&Context::default(), info, 0..info.n_bytes()).unwrap();
    let four = |le: &[u8]| [le[0], le[1], le[2], le[3]];
    match info.dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|le| f64::from(f32::from_le_bytes(four(le)))).collect(),
        Dtype::I32 => bytes.chunks_exact(4).map(|le| f64::from(i32::from_le_bytes(four(le)))).collect(),
        Dtype::F64 => bytes.chunks_exact(8).map(|le| f64::from_le_bytes(le.try_into().unwrap())).collect(),
        other => panic!("{name} is {other:?}"),
    }
}

/// Packs rows of tokens of the given width with Hugging Face's labels (-100 = none), without positions that are not
/// attended to.
pub(crate) fn packed(ids: &[f64], labels: &[f64], attended: Option<&[f64]>, width: usize) -> Batch {
    let mut batch = Batch { tokens: Vec::new(), labels: Vec::new(), starts: vec![0] };
    for row in 0..ids.len() / width {
        let is_attended = |at: usize| attended.is_none_or(|attended| attended[at] != 0.0);
        let row: Vec<usize> = (row * width..(row + 1) * width).filter(|&at| is_attended(at)).collect();
        for (i, &at) in row.iter().enumerate() {
            batch.tokens.push(ids[at] as u32);
            let next = row.get(i + 1).map_or(-100.0, |&next| labels[next]);
            batch.labels.push(if next < 0.0 { IGNORE } else { next as u32 });
        }
        batch.starts.push(batch.tokens.len());
    }
    batch
}

pub(crate) fn mask(base: &Checkpoint, k: u64, path: &Path) -> MaskFile {
    create_mask(&Context::default(), base, &MaskOptions::new(k), Some((path, Existing::Replace))).unwrap();
    MaskFile::open(path).unwrap()
}

/// A reference model, and its results from transformers.
///
/// Mistral has no weights of its own: with Llama's weights, both transformers classes give the same bits.
pub(crate) fn model(folder: &Path, name: &str) -> (Checkpoint, Shard) {
    let of = |name: &str| reference("model").join(name);
    let weights = if name == "mistral" { "llama" } else { name };
    let copy = folder.join(name);
    fs::create_dir_all(&copy).unwrap();
    fs::copy(of(name).join("config.json"), copy.join("config.json")).unwrap();
    fs::copy(of(weights).join("model.safetensors"), copy.join("model.safetensors")).unwrap();
    (Checkpoint::open(&copy).unwrap(), Shard::open(&of(weights).join("expected.safetensors")).unwrap())
}

/// The largest difference, relative to the largest value.
pub(crate) fn difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    found.iter().zip(expected).fold(0.0, |most: f64, (a, b)| most.max((f64::from(*a) - b).abs())) / largest
}

/// The data of the reference run: 240 rows of 20 tokens, of which about the last ten are supervised.
pub(crate) fn reference_data() -> Dataset {
    let file = Shard::open(&reference("train").join("expected.safetensors")).unwrap();
    let (ids, labels) = (numbers(&file, "input_ids"), numbers(&file, "labels"));
    let mut data = Dataset::new();
    for (ids, labels) in ids.chunks(20).zip(labels.chunks(20)) {
        let tokens: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        let n_prompt = labels.iter().take_while(|&&label| label < 0.0).count();
        assert!(ids[n_prompt..] == labels[n_prompt..], "labels are the tokens themselves");
        data.push(&tokens, n_prompt);
    }
    data
}

/// The options of the reference run.
pub(crate) fn reference_options() -> TrainOptions {
    let recipe = fs::read(reference("train").join("recipe.json")).unwrap();
    let recipe: serde_json::Value = serde_json::from_slice(&recipe).unwrap();
    let number = |name: &str| recipe[name].as_f64().unwrap();
    TrainOptions {
        epochs: 1,
        max_steps: recipe["steps"].as_u64(),
        batch_examples: recipe["batch_size"].as_u64().unwrap() as usize,
        shuffle: false,
        learning_rate: number("lr"),
        warmup: Warmup::Steps(recipe["warmup_steps"].as_u64().unwrap()),
        weight_decay: number("weight_decay"),
        eps: number("eps"),
        clip: recipe["grad_clip"].as_f64(),
        ..TrainOptions::default()
    }
}

/// Records all steps and evaluations.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) steps: RefCell<Vec<StepRecord>>,
    pub(crate) evals: RefCell<Vec<EvalRecord>>,
}

impl Watcher for Recorder {
    fn step(&self, record: &StepRecord, _: u64) {
        self.steps.borrow_mut().push(*record);
    }
    fn eval(&self, record: &EvalRecord, _: bool) {
        self.evals.borrow_mut().push(*record);
    }
}

/// A folder with a base and a mask, and runs in it.
pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) base: Checkpoint,
    pub(crate) mask: MaskFile,
    pub(crate) data: Dataset,
    pub(crate) eval: Option<Dataset>,
}

impl World {
    pub(crate) fn new(base: impl FnOnce(&Path) -> Checkpoint, k: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = base(folder.path());
        let mask = mask(&base, k, &folder.path().join("mask.safetensors"));
        Self { folder, base, mask, data: reference_data(), eval: None }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Trains on the CPU; `change` may modify the job.
    pub(crate) fn run(
        &self,
        ctx: &Context<'_>,
        name: &str,
        options: &TrainOptions,
        change: impl FnOnce(&mut TrainJob<'_>),
    ) -> (Result<TrainReport, TrainError>, Recorder) {
        self.run_on(&CpuDevice::new(), ctx, name, options, change)
    }

    /// Trains.
    pub(crate) fn run_on<D: Device>(
        &self,
        device: &D,
        ctx: &Context<'_>,
        name: &str,
        options: &TrainOptions,
        change: impl FnOnce(&mut TrainJob<'_>),
    ) -> (Result<TrainReport, TrainError>, Recorder) {
        let (recorded, output) = (Recorder::default(), self.path(name));
        // Only the run is cancelled, not the loading.
        let patient = Context::default();
        let mut model = Model::load(&patient, device, &self.base).unwrap();
        model.attach(&patient, device, &self.base, &self.mask).unwrap();
        let mut job = TrainJob {
            base: &self.base,
            mask: &self.mask,
            data: &self.data,
            eval: self.eval.as_ref(),
            options,
            about_data: serde_json::Value::Null,
            output: &output,
            existing: Existing::Keep,
            save_every: None,
            resume: false,
            notes: AdapterNotes::default(),
        };
        change(&mut job);
        (train(ctx, device, &mut model, &job, &recorded), recorded)
    }
}

/// A checkpoint of random weights in another dtype, with the shape of the reference Llama.
pub(crate) fn llama_as(dtype: Dtype) -> impl FnOnce(&Path) -> Checkpoint {
    llama_with(dtype, Vec::new())
}

/// The same with additional tensors.
pub(crate) fn llama_with(dtype: Dtype, more: Vec<(String, Vec<f64>)>) -> impl FnOnce(&Path) -> Checkpoint {
    move |folder| {
        let (from, _) = model(folder, "llama");
        let copy = folder.join("narrow");
        fs::create_dir(&copy).unwrap();
        fs::copy(from.root().join("config.json"), copy.join("config.json")).unwrap();
        let mut file = TensorFileWriter::create(&copy.join("model.safetensors"), Existing::Keep).unwrap();
        let shaped = |(name, values): (String, Vec<f64>)| (name, vec![values.len() as u64], values);
        let kept = from
            .tensors()
            .map(|TensorRef { shard, info, .. }| (info.name.clone(), info.shape.clone(), numbers(shard, &info.name)));
        for (name, shape, values) in kept.chain(more.into_iter().map(shaped)) {
            let id = file.add_tensor(name, dtype);
            let bytes: Vec<u8> = match dtype {
                Dtype::BF16 => values.iter().flat_map(|&x| bf16::from_f64(x).to_le_bytes()).collect(),
                Dtype::F16 => values.iter().flat_map(|&x| f16::from_f64(x).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
            };
            file.append(id, &bytes).unwrap();
            file.finish_tensor(id, shape);
        }
        file.finish(&Context::default(), &BTreeMap::new()).unwrap();
        Checkpoint::open(&copy).unwrap()
    }
}

/// Asserts that logits, losses and the deltas' gradients of every reference model equal those of transformers, within
/// `most` relative to the largest value of their tensor.
pub(crate) fn assert_like_transformers<D: Device>(device: &D, keep: Keep, most: f64) {
    let folder = tempfile::tempdir().unwrap();
    let ctx = Context::default();
    for name in ["llama", "llama3", "mistral", "qwen2", "qwen3"] {
        let (base, expected) = model(folder.path(), name);
        let of = |tensor: &str| numbers(&expected, tensor);
        let batch = packed(&of("input_ids"), &of("labels"), Some(&of("attention_mask")), 24);
        let mask = mask(&base, 3, &folder.path().join("mask.safetensors"));
        let mut model = Model::load(&ctx, device, &base).unwrap();
        model.attach(&ctx, device, &base, &mask).unwrap();
        let on_device = DeviceBatch::new(device, &model.config, &batch).unwrap();
        let mut work = Workspace::new(device, &model.config, batch.n_tokens(), keep).unwrap();
        forward(device, &model, &on_device, &mut work).unwrap();
        let rows: Vec<u32> = (0..batch.n_tokens() as u32).collect();
        let off = difference(&logits(device, &model, &rows, &mut work).unwrap(), &of("logits"));
        assert!(off < most, "{name}: logits differ by {off}");
        let n = on_device.n_supervised;
        let losses = losses(device, &model, &on_device, &mut work, Some(1.0 / n as f32)).unwrap();
        let loss = losses.iter().sum::<f32>() / n as f32;
        let off = difference(&[loss], &of("loss"));
        assert!(off < most, "{name}: the loss is {loss}, not {}", of("loss")[0]);
        backward(device, &mut model, &on_device, &mut work).unwrap();
        for linear in model.linears() {
            let deltas = linear.deltas.as_ref().unwrap();
            let grad = device.read(&deltas.grad, deltas.nnz).unwrap();
            for part in &linear.parts {
                let off = difference(&grad[part.entries.clone()], &of(&format!("{}.grad", part.name)));
                assert!(off < most, "{name}: gradients of {} differ by {off}", part.name);
            }
        }
    }
}
