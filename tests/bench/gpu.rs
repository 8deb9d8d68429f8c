//! GPU throughput relative to the limits of its memory and its bus. Run it with `cargo bench --bench gpu`, or copy the
//! built program to a machine with a GPU, as `tests/gpu/on_device.sh` does. `--small` is for the fake driver.
//!
//! Every figure is printed with its limit, measured in the same run. Times are measured on the host, around many
//! launches and one wait.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use neuroada_ckpt::{
    Checkpoint, Context, Dtype, Existing, GpuError, MaskOptions, create_mask,
    internals::{
        backend::Chooser,
        checkpoint::TensorFileWriter,
        gpu::{DeviceMatrix, DevicePatch, Gpu, GpuChooser, LowRank, LowRankFactors, Queue, RowRanker},
        tensor::RowBlock,
    },
};

/// Shapes of the seven projections of one layer of Llama-3-8B, `[d_out, d_in]`.
const PROJECTIONS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.k_proj", 1024, 4096),
    ("self_attn.v_proj", 1024, 4096),
    ("self_attn.o_proj", 4096, 4096),
    ("mlp.gate_proj", 14336, 4096),
    ("mlp.up_proj", 14336, 4096),
    ("mlp.down_proj", 4096, 14336),
];
const LAYERS: usize = 32;

/// The sizes of the measurements.
struct Scale {
    resident_bytes: usize,
    rows_divisor: usize,
    repeats: usize,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let is_small = args.iter().any(|arg| arg == "--small");
    let folder = args.iter().find(|arg| !arg.starts_with("--")).map(PathBuf::from);
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(why) => return println!("skipped: {why}"),
    };
    let scale = match is_small {
        true => Scale { resident_bytes: 1 << 17, rows_divisor: 512, repeats: 1 },
        false => Scale { resident_bytes: 1 << 30, rows_divisor: 1, repeats: 20 },
    };
    println!("machine {gpu:?}, {} threads", rayon::current_num_threads());
    let done = run(&gpu, &scale, folder.as_deref());
    if let Err(error) = done {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(gpu: &Gpu, scale: &Scale, folder: Option<&Path>) -> Result<(), Box<dyn std::error::Error>> {
    let queue = Queue::new(gpu)?;
    let copied = copy_rate(&queue, scale)?;
    println!("copy {copied:.1} GB/s read and written, on the device");
    let (up, down) = bus_rates(&queue, scale)?;
    println!("bus {up:.1} GB/s to the device, {down:.1} GB/s from it, pinned");
    for (dtype, d_in) in [(Dtype::BF16, 4096), (Dtype::BF16, 14336), (Dtype::BF16, 28672), (Dtype::F32, 4096)] {
        for k in [1, 5, 20, 32, 100, 256] {
            let rate = topk_rate(&queue, scale, dtype, d_in, k)?;
            let n_rows = scale.resident_bytes / (d_in * dtype.bitsize() / 8);
            println!("topk {dtype:?} {n_rows} {d_in} {k} {rate:.1} GB/s, {:.0} % of copy", 100.0 * rate / copied);
        }
    }
    println!("patch {:.3} ms for all projections of an 8B model, k = 20", patch_time(&queue, scale)?);
    let merged = low_rank_rate(gpu, scale)?;
    let bound = 1.0 / (1.0 / up + 1.0 / down);
    println!("low-rank {merged:.1} GB/s of weights, r = 16, {:.0} % of there and back", 100.0 * merged / bound);
    if let Some(folder) = folder {
        let streamed = stream_rate(gpu, scale, folder)?;
        for rank in [16, 256] {
            write_lora(scale, &folder.join(format!("8b-lora-r{rank}")), rank)?;
        }
        println!("stream {streamed:.1} GB/s of checkpoint, {:.0} % of the bus", 100.0 * streamed / up);
    }
    Ok(())
}

/// GB/s of `n_bytes` processed by `work`, over `repeats` runs after a warm-up.
fn rate(
    queue: &Queue,
    n_bytes: usize,
    repeats: usize,
    mut work: impl FnMut() -> Result<(), GpuError>,
) -> Result<f64, GpuError> {
    work()?;
    queue.wait()?;
    let began = Instant::now();
    for _ in 0..repeats {
        work()?;
    }
    queue.wait()?;
    Ok((n_bytes * repeats) as f64 / began.elapsed().as_secs_f64() / 1e9)
}

fn copy_rate(queue: &Queue, scale: &Scale) -> Result<f64, GpuError> {
    let n = scale.resident_bytes;
    let (from, mut to) = (queue.alloc::<u8>(n, "copies")?, queue.alloc::<u8>(n, "copies")?);
    rate(queue, 2 * n, scale.repeats, || queue.copy(&from, &mut to))
}

fn bus_rates(queue: &Queue, scale: &Scale) -> Result<(f64, f64), GpuError> {
    let n = scale.resident_bytes / 4;
    let (mut pinned, mut memory) = (queue.pinned(n)?, queue.alloc::<u8>(n, "copies")?);
    let up = rate(queue, n, scale.repeats, || queue.upload(&mut pinned, 0..n, &mut memory))?;
    let down = rate(queue, n, scale.repeats, || queue.download(&memory, &mut pinned, 0..n))?;
    Ok((up, down))
}

/// Bell-shaped weights: one million of them, repeated.
fn weights(dtype: Dtype, n: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let noise: Vec<f32> = (0..1_000_003).map(|_| (uniform() + uniform() + uniform() + uniform()) * 0.04).collect();
    let all = noise.iter().cycle().take(n);
    match dtype {
        Dtype::BF16 => all.flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => all.flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn topk_rate(queue: &Queue, scale: &Scale, dtype: Dtype, d_in: usize, k: usize) -> Result<f64, GpuError> {
    let n_rows = scale.resident_bytes / (d_in * dtype.bitsize() / 8);
    let bytes = weights(dtype, n_rows * d_in);
    let matrix = DeviceMatrix::new(queue, RowBlock::new(&bytes, dtype, n_rows, d_in))?;
    let (mut columns, mut first_nan) = (queue.alloc(n_rows * k, "columns")?, queue.alloc(1, "a number")?);
    queue.fill(&mut first_nan, 0xff)?;
    let written = n_rows * k * 4;
    rate(queue, bytes.len() + written, scale.repeats, || matrix.topk(queue, k, &mut columns, &mut first_nan))
}

/// Milliseconds to patch every projection of an 8B model: those of one layer 32 times (they fit in no cache).
fn patch_time(queue: &Queue, scale: &Scale) -> Result<f64, GpuError> {
    const K: usize = 20;
    let mut layer = Vec::new();
    for (_, d_out, d_in) in PROJECTIONS {
        let n_rows = d_out / scale.rows_divisor;
        let bytes = weights(Dtype::BF16, n_rows * d_in);
        let matrix = DeviceMatrix::new(queue, RowBlock::new(&bytes, Dtype::BF16, n_rows, d_in))?;
        // One column somewhere in each twentieth of the row.
        let stride = d_in / K;
        let columns: Vec<u32> = (0..n_rows * K).map(|i| (i % K * stride + i * 7919 / 3 % stride) as u32).collect();
        let patch = DevicePatch::new(queue, &columns, &vec![1e-3; n_rows * K], K, d_in)?;
        layer.push((matrix, patch));
    }
    let originals: Vec<_> =
        layer.iter_mut().map(|(matrix, patch)| matrix.patch(queue, patch, 1.0)).collect::<Result<_, _>>()?;
    let once = || -> Result<(), GpuError> {
        for _ in 0..LAYERS {
            for ((matrix, patch), originals) in layer.iter_mut().zip(&originals) {
                matrix.patch_from(queue, patch, 1.0, originals)?;
            }
        }
        Ok(())
    };
    // A rate of one million "bytes" per run, to be converted to seconds.
    Ok(1.0 / rate(queue, 1_000_000, scale.repeats, once)?)
}

/// GB/s of weights merged through the device, by all threads.
fn low_rank_rate(gpu: &Gpu, scale: &Scale) -> Result<f64, GpuError> {
    const RANK: usize = 16;
    let (n_rows, d_in) = (14336 / scale.rows_divisor, 4096);
    let bytes = weights(Dtype::BF16, n_rows * d_in);
    let rows = RowBlock::new(&bytes, Dtype::BF16, n_rows, d_in);
    let (b, a) = (vec![0.01; n_rows * RANK], vec![0.01; RANK * d_in]);
    let n_jobs = 4 * scale.repeats;
    let next = AtomicUsize::new(0);
    let n_threads = rayon::current_num_threads();
    let work = || -> Result<(), GpuError> {
        let mut merger = LowRank::new(gpu, 64 << 20)?;
        while next.fetch_add(1, Ordering::Relaxed) < n_jobs {
            merger.merge(rows, &LowRankFactors { b: &b, a: &a, rank: RANK, scale: 2.0 })?;
        }
        Ok(())
    };
    let began = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics"))
    })?;
    Ok((n_jobs * bytes.len()) as f64 / began.elapsed().as_secs_f64() / 1e9)
}

/// A LoRA adapter of every projection of the 8B checkpoint in PEFT format, merged by `on_device.sh`.
fn write_lora(scale: &Scale, folder: &Path, rank: usize) -> Result<(), Box<dyn std::error::Error>> {
    std::fs::create_dir_all(folder)?;
    let config = format!("{{\"peft_type\":\"LORA\",\"r\":{rank},\"lora_alpha\":{}}}", 2 * rank);
    std::fs::write(folder.join("adapter_config.json"), config)?;
    let mut writer = TensorFileWriter::create(&folder.join("adapter_model.safetensors"), Existing::Replace)?;
    for layer in 0..LAYERS.div_ceil(scale.rows_divisor) {
        for (name, d_out, d_in) in PROJECTIONS {
            let module = format!("base_model.model.model.layers.{layer}.{name}");
            for (factor, n_rows, n_columns) in [("A", rank, d_in), ("B", d_out / scale.rows_divisor, rank)] {
                let id = writer.add_tensor(format!("{module}.lora_{factor}.weight"), Dtype::BF16);
                writer.append(id, &weights(Dtype::BF16, n_rows * n_columns))?;
                writer.finish_tensor(id, vec![n_rows as u64, n_columns as u64]);
            }
        }
    }
    Ok(writer.finish(&Context::default(), &Default::default())?)
}

/// GB/s of checkpoint while choosing a mask of k = 1, from the page cache; creates an 8B checkpoint in `folder`.
fn stream_rate(gpu: &Gpu, scale: &Scale, folder: &Path) -> Result<f64, Box<dyn std::error::Error>> {
    let path = folder.join("8b.safetensors");
    let n_layers = LAYERS.div_ceil(scale.rows_divisor);
    if !path.exists() {
        let mut writer = TensorFileWriter::create(&path, Existing::Keep)?;
        for layer in 0..n_layers {
            for (name, d_out, d_in) in PROJECTIONS {
                let d_out = d_out / scale.rows_divisor;
                let id = writer.add_tensor(format!("model.layers.{layer}.{name}.weight"), Dtype::BF16);
                writer.append(id, &weights(Dtype::BF16, d_out * d_in))?;
                writer.finish_tensor(id, vec![d_out as u64, d_in as u64]);
            }
        }
        writer.finish(&Context::default(), &Default::default())?;
    }
    let checkpoint = Checkpoint::open(&path)?;
    let context = Context { max_memory: 4 << 30, ..Context::default() };
    let mut best = 0.0f64;
    for round in 0..4 {
        let ranker = RowRanker::new(gpu, rayon::current_num_threads(), 4 << 30, 1 << 30);
        let chooser = GpuChooser::new(ranker, 0.0);
        let options = MaskOptions { chooser: Chooser::on(&chooser), ..MaskOptions::new(1) };
        let began = Instant::now();
        create_mask(&context, &checkpoint, &options, Some((&folder.join("mask"), Existing::Replace)))?;
        // The first round fills the page cache.
        if round > 0 {
            best = best.max(checkpoint.n_bytes() as f64 / began.elapsed().as_secs_f64() / 1e9);
        }
    }
    Ok(best)
}
