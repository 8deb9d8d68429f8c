//! Every operation of the trainer on the GPU compared with the CPU.
//!
//! Inputs are representable in the dtype, so that both sides read the same values. A result is rounded once to the
//! dtype, where the CPU keeps float32: a relative error of 2^-9 in BF16, 2^-12 in F16; sums in another order differ by
//! about 2^-22 of their largest term. Some results pass through three such roundings: the gradient of the logits, a
//! sum that begins with it, the result.

use neuroada_ckpt::{
    Dtype,
    internals::{
        gpu::CudaDevice,
        tensor::{Accumulator, Float, with_float},
        train::{AdamW, CpuDevice, Deltas, Device, Spans, config::Heads},
    },
};

use crate::{
    driver::queue,
    samples::{DTYPES, bell, bytes_of},
};

/// Values that are representable in the dtype, approximately normal.
fn numbers(dtype: Dtype, n: usize, seed: u64) -> Vec<f32> {
    let bytes = bytes_of(dtype, (0..n as u64).map(|i| bell(seed << 32 | i)));
    with_float!(dtype, T => {
        bytes.chunks_exact(T::BYTES).map(|le| Accumulator::to_f64(T::from_le(le).widen()) as f32).collect()
    }, else unreachable!())
}

fn act<D: Device>(device: &D, values: &[f32]) -> D::Act {
    let mut act = device.act(values.len()).unwrap();
    device.write_act(values, &mut act).unwrap();
    act
}

fn on_device<D: Device>(device: &D, values: &[f32]) -> D::F32 {
    let mut numbers = device.zeros(values.len()).unwrap();
    device.write(values, &mut numbers).unwrap();
    numbers
}

fn matrix<D: Device>(device: &D, dtype: Dtype, d_out: usize, d_in: usize, seed: u64) -> D::Weight {
    let mut weight = device.weight(dtype, d_out, d_in).unwrap();
    let values = numbers(dtype, d_out * d_in, seed);
    let bytes = bytes_of(dtype, values.iter().map(|&value| f64::from(value)));
    // In two parts, as weights are loaded.
    let middle = d_out / 2 * bytes.len() / d_out;
    device.write_rows(&mut weight, 0, &bytes[..middle]).unwrap();
    device.write_rows(&mut weight, d_out / 2, &bytes[middle..]).unwrap();
    weight
}

/// The tolerance of a result, relative to the largest value of its kind.
fn tolerance(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => 3.0 / 512.0,
        Dtype::F16 => 3.0 / 4096.0,
        _ => 2e-6,
    }
}

#[track_caller]
fn assert_close(what: &str, dtype: Dtype, cuda: &[f32], cpu: &[f32]) {
    assert_eq!(cuda.len(), cpu.len(), "{what}, {dtype:?}");
    let largest = cpu.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    for (i, (a, b)) in cuda.iter().zip(cpu).enumerate() {
        let off = (a - b).abs();
        // Large values relative to their own size, small ones to the size of their terms.
        assert!(off <= tolerance(dtype) * b.abs().max(0.5 * largest), "{what}, {dtype:?}, element {i}: {a} not {b}");
    }
}

/// Runs the same code on both devices, for each dtype, and compares the results one by one.
macro_rules! on_both {
    (|$device:ident, $dtype:ident| $body:expr) => {{
        fn run<D: Device>($device: &D, $dtype: Dtype) -> Vec<(&'static str, Vec<f32>)> {
            $body
        }
        let Some(queue) = queue() else { return };
        for dtype in DTYPES {
            let cuda = run(&CudaDevice::new(queue.gpu(), dtype).expect("there is a GPU and its library"), dtype);
            let cpu = run(&CpuDevice::new(), dtype);
            for ((what, cuda), (_, cpu)) in cuda.iter().zip(&cpu) {
                assert_close(what, dtype, cuda, cpu);
            }
        }
    }};
}

#[test]
fn rows_of_a_table() {
    on_both!(|device, dtype| {
        let mut results = Vec::new();
        // Rows that are a multiple of 16 bytes, and others.
        for d in [64, 7] {
            let table = matrix(device, dtype, 9, d, 1);
            let ids = device.ids(&[8, 0, 3, 3]).unwrap();
            let mut x = device.act(4 * d).unwrap();
            device.embed(&ids, 4, &table, &mut x).unwrap();
            results.push(("embed", device.read_act(&x, 4 * d).unwrap()));
            let (from, rows) = (act(device, &numbers(dtype, 5 * d, 2)), device.ids(&[4, 1]).unwrap());
            let mut taken = act(device, &numbers(dtype, 3 * d, 3));
            device.take_rows(&from, &rows, 2, d, &mut taken).unwrap();
            results.push(("take_rows", device.read_act(&taken, 3 * d).unwrap()));
            let mut put = act(device, &numbers(dtype, 6 * d, 4));
            device.put_rows(&taken, &rows, 2, d, 5, &mut put).unwrap();
            results.push(("put_rows", device.read_act(&put, 6 * d).unwrap()));
            device.copy(&put, d, &mut taken, 1, 2 * d - 1).unwrap();
            results.push(("copy", device.read_act(&taken, 3 * d).unwrap()));
        }
        results
    });
}

#[test]
fn products() {
    on_both!(|device, dtype| {
        let (n, d_out, d_in) = (5, 24, 40);
        let w = matrix(device, dtype, d_out, d_in, 1);
        let (x, dy) = (act(device, &numbers(dtype, n * d_in, 2)), act(device, &numbers(dtype, n * d_out, 3)));
        let bias = on_device(device, &numbers(dtype, d_out, 4));
        let mut results = Vec::new();
        for (what, bias, adds) in
            [("linear", None, false), ("linear that adds", None, true), ("bias", Some(&bias), false)]
        {
            let mut y = act(device, &numbers(dtype, n * d_out, 5));
            device.linear(&x, n, &w, bias, adds, &mut y).unwrap();
            results.push((what, device.read_act(&y, n * d_out).unwrap()));
        }
        let mut dx = act(device, &numbers(dtype, n * d_in, 6));
        device.linear_backward(&dy, n, &w, &mut dx).unwrap();
        results.push(("linear_backward", device.read_act(&dx, n * d_in).unwrap()));
        results
    });
}

#[test]
fn norms() {
    on_both!(|device, dtype| {
        let mut results = Vec::new();
        for d in [7, 64, 2056] {
            let n = 3;
            let (x, dy) = (act(device, &numbers(dtype, n * d, 1)), act(device, &numbers(dtype, n * d, 2)));
            let gain = on_device(device, &numbers(dtype, d, 3));
            let mut y = device.act(n * d).unwrap();
            device.rms_norm(&x, n, &gain, d, 1e-5, &mut y).unwrap();
            results.push(("rms_norm", device.read_act(&y, n * d).unwrap()));
            let mut dx = act(device, &numbers(dtype, n * d, 4));
            device.rms_norm_backward(&dy, &x, n, &gain, d, 1e-5, &mut dx).unwrap();
            results.push(("rms_norm_backward", device.read_act(&dx, n * d).unwrap()));
        }
        for heads in [Heads { n_q: 4, n_kv: 2, d_head: 6 }, Heads { n_q: 3, n_kv: 1, d_head: 80 }] {
            let (n, width) = (5, heads.d_qkv());
            let raw = act(device, &numbers(dtype, n * width, 5));
            let gains = [6, 7].map(|seed| on_device(device, &numbers(dtype, heads.d_head, seed)));
            let mut qkv = act(device, &numbers(dtype, n * width, 5));
            device.head_norm(&mut qkv, n, heads, &gains[0], &gains[1], 1e-6).unwrap();
            results.push(("head_norm", device.read_act(&qkv, n * width).unwrap()));
            let mut dqkv = act(device, &numbers(dtype, n * width, 8));
            device.head_norm_backward(&mut dqkv, &raw, n, heads, &gains[0], &gains[1], 1e-6).unwrap();
            results.push(("head_norm_backward", device.read_act(&dqkv, n * width).unwrap()));
            let frequencies: Vec<f32> = (0..heads.d_head / 2).map(|i| 0.3f32.powi(i as i32)).collect();
            let (frequencies, positions) = (on_device(device, &frequencies), device.ids(&[0, 1, 2, 900, 4]).unwrap());
            for inverse in [false, true] {
                device.write_act(&numbers(dtype, n * width, 9), &mut dqkv).unwrap();
                device.rope(&mut dqkv, &positions, n, heads, &frequencies, inverse).unwrap();
                results.push(("rope", device.read_act(&dqkv, n * width).unwrap()));
            }
        }
        results
    });
}

#[test]
fn swiglu() {
    on_both!(|device, dtype| {
        let mut results = Vec::new();
        for d_ff in [48, 5] {
            let n = 3;
            let gate_up = act(device, &numbers(dtype, n * 2 * d_ff, 1));
            let dh = act(device, &numbers(dtype, n * d_ff, 2));
            let (mut h, mut d_gate_up) = (device.act(n * d_ff).unwrap(), device.act(n * 2 * d_ff).unwrap());
            device.swiglu(&gate_up, n, d_ff, &mut h).unwrap();
            device.swiglu_backward(&dh, &gate_up, n, d_ff, &mut d_gate_up).unwrap();
            results.push(("swiglu", device.read_act(&h, n * d_ff).unwrap()));
            results.push(("swiglu_backward", device.read_act(&d_gate_up, n * 2 * d_ff).unwrap()));
        }
        results
    });
}

#[test]
fn losses_and_choices() {
    on_both!(|device, dtype| {
        let mut results = Vec::new();
        for n_vocab in [1003, 1004, 3] {
            let (n, d) = (4, 16);
            let head = matrix(device, dtype, n_vocab, d, 1);
            let labels = device.ids(&[n_vocab as u32 - 1, 0, 1, 2]).unwrap();
            let mut losses = device.zeros(n + 1).unwrap();
            let mut x = act(device, &numbers(dtype, n * d, 2));
            device.cross_entropy(&mut x, n, &head, &labels, None, &mut losses).unwrap();
            results.push(("losses alone", device.read(&losses, n + 1).unwrap()));
            device.cross_entropy(&mut x, n, &head, &labels, Some(0.25), &mut losses).unwrap();
            results.push(("losses", device.read(&losses, n + 1).unwrap()));
            results.push(("gradient of losses", device.read_act(&x, n * d).unwrap()));
            let x = act(device, &numbers(dtype, n * d, 3));
            let tokens = device.argmax(&x, n, &head).unwrap();
            results.push(("argmax", tokens.iter().map(|&token| token as f32).collect()));
        }
        // All logits are equal: the first token wins.
        let head = matrix(device, dtype, 300, 16, 1);
        let x = device.act(2 * 16).unwrap();
        assert_eq!(device.argmax(&x, 2, &head).unwrap(), [0, 0]);
        results
    });
}

/// `per_row[i % per_row.len()]` entries in row `i`.
fn entries<D: Device>(device: &D, dtype: Dtype, (d_out, d_in): (usize, usize), per_row: &[usize]) -> Deltas<D> {
    let (mut offsets, mut columns) = (vec![0], Vec::new());
    for row in 0..d_out {
        let k = per_row[row % per_row.len()];
        columns.extend((0..k).map(|j| ((j * d_in + row * 31 % d_in) / k.max(1)) as u32));
        offsets.push(columns.len() as u32);
    }
    let nnz = columns.len();
    let numbers_of = |seed| numbers(Dtype::F32, nnz, seed);
    let squares: Vec<f32> = numbers_of(14).iter().map(|x| x * x).collect();
    Deltas {
        nnz,
        offsets: device.ids(&offsets).unwrap(),
        columns: device.ids(&columns).unwrap(),
        originals: matrix(device, dtype, 1, nnz, 11),
        theta: on_device(device, &numbers_of(12)),
        grad: on_device(device, &numbers_of(13)),
        mean: on_device(device, &numbers_of(15)),
        variance: on_device(device, &squares),
    }
}

#[test]
fn gathered_dots() {
    on_both!(|device, dtype| {
        let mut results = Vec::new();
        // Rows with one entry; rows with none, some and many, wider than the staged tile; and so many entries that a
        // dense product is cheaper.
        for (what, shape, n, per_row) in [
            ("one a row", (300, 40), 150, &[1][..]),
            ("ragged", (70, 2501), 75, &[0, 3, 1, 0, 40]),
            ("wide", (9, 4104), 3, &[5, 6]),
            ("many a row", (6, 200), 20, &[80]),
        ] {
            let (dy, x) = (numbers(dtype, n * shape.0, 1), numbers(dtype, n * shape.1, 2));
            let mut deltas = entries(device, dtype, shape, per_row);
            device.gather_dot(&act(device, &dy), &act(device, &x), n, shape, &mut deltas).unwrap();
            results.push((what, device.read(&deltas.grad, deltas.nnz).unwrap()));
        }
        // Sums over the tokens: biases are matrices of one column.
        for (n, d_out) in [(150, 300), (70, 33)] {
            let dy = act(device, &numbers(dtype, n * d_out, 1));
            let mut deltas = entries(device, dtype, (d_out, 1), &[1, 1, 0]);
            device.bias_grad(&dy, n, d_out, &mut deltas).unwrap();
            results.push(("biases", device.read(&deltas.grad, deltas.nnz).unwrap()));
        }
        results
    });
}

#[test]
fn patches_and_steps_have_the_same_bits() {
    let Some(queue) = queue() else { return };
    fn run<D: Device>(device: &D, dtype: Dtype) -> [Vec<f32>; 6] {
        let shape = (37, 50);
        let mut deltas = entries(device, dtype, shape, &[2, 0, 7]);
        let adamw =
            AdamW { learning_rate: 3e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01, grad_scale: 0.7, step: 3 };
        device.adamw(&mut deltas, adamw).unwrap();
        let mut w = matrix(device, dtype, shape.0, shape.1, 20);
        device.patch(&mut w, &deltas).unwrap();
        // Read back row by row.
        let ids: Vec<u32> = (0..shape.0 as u32).collect();
        let mut rows = device.act(shape.0 * shape.1).unwrap();
        device.embed(&device.ids(&ids).unwrap(), shape.0, &w, &mut rows).unwrap();
        let biases = entries(device, dtype, (shape.0, 1), &[1, 0]);
        let mut bias = on_device(device, &numbers(Dtype::F32, shape.0, 21));
        device.patch_bias(&mut bias, &biases).unwrap();
        let bias = device.read(&bias, shape.0).unwrap();
        let read = |values: &D::F32| device.read(values, deltas.nnz).unwrap();
        let (theta, mean, variance) = (read(&deltas.theta), read(&deltas.mean), read(&deltas.variance));
        device.clear(&mut deltas.grad).unwrap();
        [theta, mean, variance, device.read_act(&rows, shape.0 * shape.1).unwrap(), read(&deltas.grad), bias]
    }
    for dtype in DTYPES {
        let cuda = run(&CudaDevice::new(queue.gpu(), dtype).unwrap(), dtype);
        let cpu = run(&CpuDevice::new(), dtype);
        let names = ["theta", "mean", "variance", "weights", "cleared", "biases"];
        for (what, (cuda, cpu)) in names.iter().zip(cuda.iter().zip(&cpu)) {
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(cuda) == bits(cpu), "{what}, {dtype:?}");
        }
    }
}

#[test]
fn sums_of_squares() {
    let Some(queue) = queue() else { return };
    fn run<D: Device>(device: &D) -> Vec<f64> {
        let [a, b] = [(300_000, 1), (3, 2)].map(|(n, seed)| on_device(device, &numbers(Dtype::F32, n, seed)));
        device.sums_of_squares(&[(&a, 299_999), (&b, 3)]).unwrap()
    }
    let (cuda, cpu) = (run(&CudaDevice::new(queue.gpu(), Dtype::BF16).unwrap()), run(&CpuDevice::new()));
    assert!(cuda.iter().zip(&cpu).all(|(a, b)| (a / b - 1.0).abs() < 1e-12), "{cuda:?} not {cpu:?}");
}

#[test]
fn attention() {
    on_both!(|device, dtype| {
        let mut results = Vec::new();
        for heads in [Heads { n_q: 4, n_kv: 2, d_head: 6 }, Heads { n_q: 3, n_kv: 1, d_head: 64 }] {
            let starts = [0, 1, 18, 41];
            let (n, width) = (41, heads.d_qkv());
            let spans = Spans::new(device, &starts, &[]).unwrap();
            let qkv = act(device, &numbers(dtype, n * width, 1));
            let (mut out, mut lse) = (device.act(n * heads.d_q()).unwrap(), device.zeros(n * heads.n_q).unwrap());
            device.attention(&qkv, &spans, heads, &mut out, &mut lse).unwrap();
            results.push(("attention", device.read_act(&out, n * heads.d_q()).unwrap()));
            results.push(("denominators", device.read(&lse, n * heads.n_q).unwrap()));
            let dout = act(device, &numbers(dtype, n * heads.d_q(), 2));
            let mut dqkv = device.act(n * width).unwrap();
            device.attention_backward(&dout, &qkv, &out, &lse, &spans, heads, &mut dqkv).unwrap();
            results.push(("attention_backward", device.read_act(&dqkv, n * width).unwrap()));

            // Two sequences continue, the second one from an empty cache.
            let (capacity, past) = (9, [4, 0]);
            let new = Spans::new(device, &[0, 2, 5], &past).unwrap();
            let mut cache = act(device, &numbers(dtype, 2 * capacity * 2 * heads.d_kv(), 3));
            let mut out = device.act(5 * heads.d_q()).unwrap();
            device.attention_cached(&qkv, &new, &past, heads, &mut cache, capacity, &mut out).unwrap();
            results.push(("attention_cached", device.read_act(&out, 5 * heads.d_q()).unwrap()));
            results.push(("cache", device.read_act(&cache, 2 * capacity * 2 * heads.d_kv()).unwrap()));
        }
        results
    });
}
