//! The trainer against PyTorch and transformers, and its laws.
#![cfg(feature = "train")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    checkpoint::{Checkpoint, Context, Existing, Shard},
    data::{Batch, IGNORE},
    mask::{MaskFile, MaskOptions, create_mask},
    tensor::Dtype,
    train::{
        CpuDevice, Device, DeviceBatch, GenerateOptions, Keep, Model, Question, Workspace, backward, forward, generate,
        logits, losses, mean_loss, rank,
    },
};

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/reference").join(name)
}

/// A tensor's numbers, whatever their type.
fn numbers(file: &Shard, name: &str) -> Vec<f64> {
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

/// Rows of tokens with Hugging Face's labels (-100 = none), `width` wide, without what is not attended to.
fn packed(ids: &[f64], labels: &[f64], attended: Option<&[f64]>, width: usize) -> Batch {
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

fn mask(base: &Checkpoint, k: u64, path: &Path) -> MaskFile {
    create_mask(&Context::default(), base, &MaskOptions::new(k), Some((path, Existing::Replace))).unwrap();
    MaskFile::open(path).unwrap()
}

/// A reference model, and what transformers makes of it.
///
/// Mistral has no weights of its own: on Llama's, transformers' two classes give the same bits.
fn model(folder: &Path, name: &str) -> (Checkpoint, Shard) {
    let of = |name: &str| reference("model").join(name);
    let weights = if name == "mistral" { "llama" } else { name };
    let copy = folder.join(name);
    fs::create_dir_all(&copy).unwrap();
    fs::copy(of(name).join("config.json"), copy.join("config.json")).unwrap();
    fs::copy(of(weights).join("model.safetensors"), copy.join("model.safetensors")).unwrap();
    (Checkpoint::open(&copy).unwrap(), Shard::open(&of(weights).join("expected.safetensors")).unwrap())
}

/// The largest difference, relative to the largest number.
fn difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    found.iter().zip(expected).fold(0.0, |most: f64, (a, b)| most.max((f64::from(*a) - b).abs())) / largest
}

#[test]
fn logits_loss_and_gradients_are_those_of_transformers() {
    // Both sides compute in float32 and add up in another order: 3 layers of sums of 64 to 176 terms, each rounded to 6e-8. The
    // worst gradients that were measured, of the largest of their tensor, lie a factor of 60 below the bound: llama and mistral 1.7e-6
    // (queries and keys, where the gradient is the difference of shares); llama3 1.0e-6 (angles of its scaled frequencies are
    // rounded alike); qwen2 1.3e-6 (biases add nothing to it); qwen3 1.2e-6 (two norms more, over 16 numbers each).
    const MOST: f64 = 1e-4;
    let folder = tempfile::tempdir().unwrap();
    let ctx = Context::default();
    for name in ["llama", "llama3", "mistral", "qwen2", "qwen3"] {
        let (base, expected) = model(folder.path(), name);
        let of = |tensor: &str| numbers(&expected, tensor);
        let batch = packed(&of("input_ids"), &of("labels"), Some(&of("attention_mask")), 24);
        let mask = mask(&base, 3, &folder.path().join("mask.safetensors"));
        for keep in [Keep::All, Keep::Inputs] {
            let device = CpuDevice::new();
            let mut model = Model::load(&ctx, &device, &base).unwrap();
            model.attach(&ctx, &device, &base, &mask).unwrap();
            let on_device = DeviceBatch::new(&device, &model.config, &batch).unwrap();
            let mut work = Workspace::new(&device, &model.config, batch.n_tokens(), keep).unwrap();
            forward(&device, &model, &on_device, &mut work).unwrap();
            let rows: Vec<u32> = (0..batch.n_tokens() as u32).collect();
            let logits = logits(&device, &model, &rows, &mut work).unwrap();
            let off = difference(&logits, &of("logits"));
            assert!(off < MOST, "{name}: logits differ by {off}");
            let n = on_device.n_supervised;
            let losses = losses(&device, &model, &on_device, &mut work, Some(1.0 / n as f32)).unwrap();
            let loss = losses.iter().sum::<f32>() / n as f32;
            let off = difference(&[loss], &of("loss"));
            assert!(off < MOST, "{name}: the loss is {loss}, not {}", of("loss")[0]);
            backward(&device, &mut model, &on_device, &mut work).unwrap();
            for linear in model.linears() {
                let deltas = linear.deltas.as_ref().unwrap();
                let grad = device.read(&deltas.grad, deltas.nnz).unwrap();
                for part in &linear.parts {
                    let off = difference(&grad[part.entries.clone()], &of(&format!("{}.grad", part.name)));
                    assert!(off < MOST, "{name}: gradients of {} differ by {off}", part.name);
                }
            }
        }
    }
}

/// The loss of one example, after its first tokens, by the plain forward pass.
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
        for most_tokens in [1, 20, 1000] {
            let ranked = rank(&ctx, &device, &model, &questions, most_tokens).unwrap();
            for (question, ranked) in questions.iter().zip(&ranked) {
                assert_eq!(ranked.len(), question.candidates.len());
                for (candidate, found) in question.candidates.iter().zip(ranked) {
                    let whole = [&question.prompt[..], candidate].concat();
                    let expected = -plain_loss(&device, &model, &whole, question.prompt.len());
                    // The same sums in pieces of another shape.
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
    // A token that ends the first sequence early, and the others perhaps not.
    for stop in [vec![], vec![free[0][2]]] {
        for most_tokens in [1, 100] {
            let options = GenerateOptions { most_new: 6, stop: stop.clone(), most_tokens };
            let written = generate(&ctx, &device, &model, &prompts, &options).unwrap();
            for (written, prompt) in written.iter().zip(&prompts) {
                assert_eq!(*written, plainly(prompt, &stop));
            }
        }
    }
}
