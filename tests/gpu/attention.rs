//! Attention compared with a loop in f64, which is itself checked against finite differences.
//!
//! Tolerances are bounds. With each value the loop also computes the sum of the absolute values of its terms. Every
//! rounding of a term to the activations' dtype changes the value by at most this sum times half the spacing of
//! neighboring values. Sums in f32 add 1e-5.

use std::process::Command;

use neuroada_ckpt::{
    Dtype,
    internals::{
        gpu::{Attention, DeviceVec, HeadShape, Queue},
        tensor::{Accumulator, Float, with_float},
    },
};

use crate::{
    driver::{self, Build, queue},
    samples::{DTYPES, bell, bytes_of, random},
};

/// A value, and the sum of the absolute values of its terms.
#[derive(Clone, Copy, Default, Debug)]
struct Sum {
    value: f64,
    size: f64,
}

impl Sum {
    fn add(&mut self, factor: f64, of: f64) {
        self.add_sized(factor, of, of.abs());
    }
    fn add_sized(&mut self, factor: f64, value: f64, size: f64) {
        self.value += factor * value;
        self.size += factor.abs() * size;
    }
}

/// Heads, examples, and values as representable in the dtype.
#[derive(Clone)]
struct Sample {
    dtype: Dtype,
    heads: HeadShape,
    starts: Vec<usize>,
    qkv: Vec<f64>,
    dout: Vec<f64>,
}

/// The output of attention, and its gradient.
struct Expected {
    out: Vec<Sum>,
    lse: Vec<f64>,
    dqkv: Vec<Sum>,
}

impl Sample {
    fn new(dtype: Dtype, (n_q, n_kv, d_head): (usize, usize, usize), lengths: &[usize]) -> Self {
        let heads = HeadShape { n_q, n_kv, d_head };
        let starts: Vec<usize> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |end, length| {
                *end += length;
                Some(*end)
            }))
            .collect();
        let n = starts[lengths.len()];
        let seed = random((n * d_head + n_q) as u64) >> 8;
        let rounded =
            |n: usize, seed: u64| values_of(dtype, &bytes_of(dtype, (0..n as u64).map(|i| 2.0 * bell(seed + i))));
        let (qkv, dout) = (rounded(n * heads.d_qkv(), seed), rounded(n * n_q * d_head, seed + 1_000_000));
        Self { dtype, heads, starts, qkv, dout }
    }

    fn n(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// The offsets of the query, the key and the value of a token and a query head.
    fn places(&self, token: usize, head: usize) -> [usize; 3] {
        let HeadShape { n_q, n_kv, d_head } = self.heads;
        let (row, kv_head) = (token * self.heads.d_qkv(), head / (n_q / n_kv));
        [head, n_q + kv_head, n_q + n_kv + kv_head].map(|head| row + head * d_head)
    }

    fn dot(&self, a: usize, b: usize) -> f64 {
        (0..self.heads.d_head).map(|i| self.qkv[a + i] * self.qkv[b + i]).sum()
    }

    fn expected(&self) -> Expected {
        let HeadShape { n_q, d_head, .. } = self.heads;
        let scale = 1.0 / (d_head as f64).sqrt();
        let mut out = vec![Sum::default(); self.n() * n_q * d_head];
        let mut dqkv = vec![Sum::default(); self.qkv.len()];
        let mut lse = Vec::new();
        for span in self.starts.windows(2) {
            for (token, head) in (span[0]..span[1]).flat_map(|token| (0..n_q).map(move |head| (token, head))) {
                let ([q, ..], at) = (self.places(token, head), (token * n_q + head) * d_head);
                let keys: Vec<[usize; 3]> = (span[0]..=token).map(|key| self.places(key, head)).collect();
                let scores: Vec<f64> = keys.iter().map(|[_, k, _]| self.dot(q, *k) * scale).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let log_sum = most + scores.iter().map(|score| (score - most).exp()).sum::<f64>().ln();
                lse.push(log_sum);
                let shares: Vec<f64> = scores.iter().map(|score| (score - log_sum).exp()).collect();
                let (mut along, mut products) = (Sum::default(), vec![Sum::default(); keys.len()]);
                for i in 0..d_head {
                    for (share, [_, _, v]) in shares.iter().zip(&keys) {
                        out[at + i].add(*share, self.qkv[v + i]);
                    }
                    along.add_sized(self.dout[at + i], out[at + i].value, out[at + i].size);
                    for (product, [_, _, v]) in products.iter_mut().zip(&keys) {
                        product.add(self.dout[at + i], self.qkv[v + i]);
                    }
                }
                for ((share, product), [_, k, v]) in shares.iter().zip(products).zip(&keys) {
                    let (ds, size) = (share * (product.value - along.value), share * (product.size + along.size));
                    for i in 0..d_head {
                        dqkv[q + i].add_sized(scale * self.qkv[k + i], ds, size);
                        dqkv[k + i].add_sized(scale * self.qkv[q + i], ds, size);
                        dqkv[v + i].add(*share, self.dout[at + i]);
                    }
                }
            }
        }
        Expected { out, lse, dqkv }
    }
}

fn values_of(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    with_float!(dtype, T => {
        bytes.chunks_exact(T::BYTES).map(|le| T::from_le(le).widen().to_f64()).collect()
    }, else unreachable!())
}

/// Half the relative spacing of neighboring values.
fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::BF16 => 1.0 / 256.0,
        Dtype::F16 => 1.0 / 2048.0,
        _ => 1.0 / 16_777_216.0,
    }
}

/// Asserts that each value is within `n_roundings` roundings.
fn assert_near(got: &[f64], expected: &[Sum], dtype: Dtype, n_roundings: f64, what: &str) {
    assert_eq!(got.len(), expected.len());
    // A small margin, for roundings of rounded values.
    let share = 1.01 * n_roundings * rounding(dtype) + 1e-5;
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let most = share * expected.size + 1e-7;
        assert!((got - expected.value).abs() <= most, "{what}: {i}: {got} for {expected:?}");
    }
}

/// The results of a device for a sample.
#[derive(PartialEq, Debug)]
struct Made {
    out: Vec<u8>,
    lse: Vec<f32>,
    dqkv: Vec<u8>,
}

struct OnDevice {
    starts: DeviceVec<u32>,
    qkv: DeviceVec<u8>,
}

impl OnDevice {
    fn new(queue: &Queue, sample: &Sample) -> Self {
        let starts: Vec<u32> = sample.starts.iter().map(|&start| start as u32).collect();
        Self {
            starts: queue.upload_all(&starts, "starts").unwrap(),
            qkv: queue.upload_all(&bytes_of(sample.dtype, sample.qkv.iter().copied()), "qkv").unwrap(),
        }
    }

    fn attention(&self, sample: &Sample, is_plain: bool) -> Attention<'_> {
        let (heads, dtype, n_examples, n) = (sample.heads, sample.dtype, sample.starts.len() - 1, sample.n());
        Attention { heads, dtype, starts: &self.starts, n_examples, n, is_plain }
    }
}

/// Memory in which every element is NaN until it is written.
fn unwritten(queue: &Queue, n_bytes: usize) -> DeviceVec<u8> {
    queue.upload_all(&vec![0xff; n_bytes], "room").unwrap()
}

fn run(queue: &Queue, sample: &Sample, is_plain: bool) -> Made {
    let device = OnDevice::new(queue, sample);
    let of = device.attention(sample, is_plain);
    let dout = bytes_of(sample.dtype, sample.dout.iter().copied());
    let mut out = unwritten(queue, dout.len());
    let mut dqkv = unwritten(queue, device.qkv.len());
    let n_sums = sample.n() * sample.heads.n_q;
    let nans = vec![f32::NAN; n_sums];
    let (mut lse, mut delta) = (queue.upload_all(&nans, "lse").unwrap(), queue.upload_all(&nans, "delta").unwrap());
    let dout = queue.upload_all(&dout, "dout").unwrap();
    queue.attention(&of, &device.qkv, &mut out, &mut lse).unwrap();
    queue.attention_backward(&of, &dout, &device.qkv, &out, &lse, &mut delta, &mut dqkv).unwrap();
    Made {
        out: queue.download_all(&out).unwrap(),
        lse: queue.download_all(&lse).unwrap(),
        dqkv: queue.download_all(&dqkv).unwrap(),
    }
}

/// Compares with the loop, allowing `n_roundings` for the outputs and for the gradients.
fn judge(queue: &Queue, sample: &Sample, is_plain: bool, n_roundings: (f64, f64)) {
    let (made, expected) = (run(queue, sample, is_plain), sample.expected());
    let what = format!("{:?} {:?} {:?}", sample.dtype, sample.heads, sample.starts);
    assert_near(&values_of(sample.dtype, &made.out), &expected.out, sample.dtype, n_roundings.0, &what);
    assert_near(&values_of(sample.dtype, &made.dqkv), &expected.dqkv, sample.dtype, n_roundings.1, &what);
    for (got, expected) in made.lse.iter().zip(&expected.lse) {
        assert!((f64::from(*got) - expected).abs() < 1e-5 * (1.0 + expected.abs()), "{what}: {got} for {expected}");
    }
}

#[test]
fn the_gradient_of_the_loop_in_f64_equals_finite_differences() {
    let mut sample = Sample::new(Dtype::F32, (4, 2, 6), &[1, 5, 3]);
    let dqkv = sample.expected().dqkv;
    let along_dout = |sample: &Sample| -> f64 {
        sample.expected().out.iter().zip(&sample.dout).map(|(out, dout)| out.value * dout).sum()
    };
    for i in (0..dqkv.len()).step_by(5) {
        let here = sample.qkv[i];
        let [below, above] = [-1e-5, 1e-5].map(|step| {
            sample.qkv[i] = here + step;
            along_dout(&sample)
        });
        sample.qkv[i] = here;
        let slope = (above - below) / 2e-5;
        assert!((slope - dqkv[i].value).abs() < 1e-7, "{i}: {slope} {:?}", dqkv[i]);
    }
}

#[test]
fn attention_by_hand() {
    // Two tokens, one head of width 1: the second attends to both keys with scores 0 and ln 3.
    let Some(queue) = queue() else { return };
    let (heads, starts) = (HeadShape { n_q: 1, n_kv: 1, d_head: 1 }, vec![0, 2]);
    let qkv = vec![7.0, 0.0, 1.0, 3_f64.ln(), 1.0, 5.0];
    let made = run(&queue, &Sample { dtype: Dtype::F32, heads, starts, qkv, dout: vec![1.0, 1.0] }, true);
    let near =
        |got: &[f64], expected: &[f64]| got.iter().zip(expected).all(|(got, expected)| (got - expected).abs() < 1e-6);
    assert!(near(&values_of(Dtype::F32, &made.out), &[1.0, 4.0]), "{made:?}");
    assert!(near(&made.lse.iter().map(|&lse| f64::from(lse)).collect::<Vec<_>>(), &[0.0, 4_f64.ln()]), "{made:?}");
    // The second output is 1 + 4 p with p = 3/4: its derivative with respect to the score is 4 p (1 - p).
    let ln3 = 3_f64.ln();
    let dqkv = [0.0, -0.75 * ln3, 1.25, 0.75, 0.75 * ln3, 0.75];
    assert!(near(&values_of(Dtype::F32, &made.dqkv), &dqkv), "{made:?}");
}

#[test]
fn plain_attention_matches_the_loop_in_f64() {
    let Some(queue) = queue() else { return };
    for dtype in DTYPES {
        for (heads, lengths) in [
            ((2, 2, 16), &[1][..]),
            ((2, 2, 16), &[5, 17, 64, 3]),
            ((1, 1, 2), &[33, 1, 1, 65]),
            ((3, 1, 6), &[31, 0, 32]),
            ((4, 1, 80), &[9, 2]),
            ((6, 2, 64), &[12]),
            ((1, 1, 256), &[7, 35]),
        ] {
            // The output is rounded; so are the gradients, and the outputs that enter them.
            judge(&queue, &Sample::new(dtype, heads, lengths), true, (1.0, 2.0));
        }
    }
}

#[test]
fn attention_on_tensor_cores_matches_the_loop_in_f64() {
    let Some(queue) = queue() else { return };
    for dtype in [Dtype::BF16, Dtype::F16] {
        for (heads, lengths) in [
            ((1, 1, 64), &[1][..]),
            ((2, 2, 64), &[5, 17, 64, 3]),
            ((3, 1, 64), &[63]),
            ((1, 1, 64), &[129, 1]),
            ((4, 1, 80), &[33, 0, 31]),
            ((2, 1, 80), &[65]),
            ((1, 1, 80), &[129]),
            ((3, 3, 96), &[32, 2, 40]),
            ((1, 1, 96), &[128, 1]),
            ((6, 2, 128), &[9, 20]),
            ((2, 1, 128), &[64, 65]),
            ((1, 1, 128), &[1, 130]),
        ] {
            // In addition to the roundings of the plain kernels, those of the probabilities and dS.
            judge(&queue, &Sample::new(dtype, heads, lengths), false, (2.0, 3.0));
        }
    }
}

/// Attention in pieces, with the keys and values of earlier ones in a cache.
fn continued(queue: &Queue, sample: &Sample, is_plain: bool, cuts: &[usize]) -> Vec<u8> {
    let (heads, n_examples) = (sample.heads, sample.starts.len() - 1);
    let (d_qkv, d_q, capacity) = (heads.d_qkv(), heads.n_q * heads.d_head, sample.n() + 1);
    let n_bytes = sample.dtype.bitsize() / 8;
    let mut cache = unwritten(queue, n_examples * capacity * 2 * heads.n_kv * heads.d_head * n_bytes);
    let mut all = vec![0; sample.n() * d_q * n_bytes];
    let mut past = vec![0; n_examples];
    for &cut in cuts {
        // The next `cut` tokens of each example, or as many as remain.
        let mut piece = Sample { starts: vec![0], qkv: Vec::new(), ..sample.clone() };
        let mut places = Vec::new();
        for (span, past) in sample.starts.windows(2).zip(&past) {
            let from = span[0] + *past as usize;
            let to = (from + cut).min(span[1]);
            piece.qkv.extend_from_slice(&sample.qkv[from * d_qkv..to * d_qkv]);
            piece.starts.push(piece.n() + to - from);
            places.push(from..to);
        }
        let device = OnDevice::new(queue, &piece);
        let past_dev = queue.upload_all(&past, "past").unwrap();
        let mut out = unwritten(queue, piece.n() * d_q * n_bytes);
        let of = device.attention(&piece, is_plain);
        queue.attention_cached(&of, &device.qkv, &past_dev, &mut cache, capacity, &mut out).unwrap();
        let out = queue.download_all(&out).unwrap();
        let mut rest = out.as_slice();
        for (workspace, past) in places.into_iter().zip(&mut past) {
            let (own, others) = rest.split_at(workspace.len() * d_q * n_bytes);
            all[workspace.start * d_q * n_bytes..][..own.len()].copy_from_slice(own);
            rest = others;
            *past += workspace.len() as u32;
        }
    }
    all
}

#[test]
fn cached_attention_gives_the_same_bits_as_one_pass() {
    let Some(queue) = queue() else { return };
    for dtype in DTYPES {
        let sample = Sample::new(dtype, (4, 2, 16), &[40, 3, 35]);
        let made = run(&queue, &sample, true);
        for cuts in [&[40][..], &[33, 1, 1, 5], &[1, 1, 38]] {
            assert!(continued(&queue, &sample, true, cuts) == made.out, "{dtype:?} {cuts:?}");
        }
        let sample = Sample::new(dtype, (2, 1, 64), &[66, 2, 35]);
        let made = run(&queue, &sample, false);
        for cuts in [&[66][..], &[1, 1, 63, 1]] {
            assert!(continued(&queue, &sample, false, cuts) == made.out, "{dtype:?} {cuts:?} on tensor cores");
        }
    }
}

#[test]
fn a_full_cache_is_not_overrun() {
    let Some(queue) = queue() else { return };
    let sample = Sample::new(Dtype::BF16, (2, 1, 16), &[2, 3]);
    let device = OnDevice::new(&queue, &sample);
    let past = queue.upload_all(&[3, u32::MAX], "past").unwrap();
    let (mut cache, mut out) = (unwritten(&queue, 2 * 4 * 32 * 2), unwritten(&queue, 5 * 32 * 2));
    let of = device.attention(&sample, true);
    queue.attention_cached(&of, &device.qkv, &past, &mut cache, 4, &mut out).unwrap();
    let cache = queue.download_all(&cache).unwrap();
    let written: Vec<bool> = cache.chunks(32 * 2).map(|row| row.iter().any(|&byte| byte != 0xff)).collect();
    assert_eq!(written, [false, false, false, true, false, false, false, false]);
    let out = queue.download_all(&out).unwrap();
    assert!(out[32 * 2..].iter().all(|&byte| byte == 0xff));
}

#[test]
fn invalid_starts_access_nothing_outside() {
    let Some(queue) = queue() else { return };
    for starts in [[0, 90, 5], [7, 3, 9], [0, u32::MAX, u32::MAX], [5, 5, 5]] {
        let sample = Sample::new(Dtype::F16, (2, 1, 64), &[6, 3]);
        let mut device = OnDevice::new(&queue, &sample);
        device.starts = queue.upload_all(&starts, "starts").unwrap();
        for is_plain in [true, false] {
            let of = device.attention(&sample, is_plain);
            let (mut out, mut dqkv) = (unwritten(&queue, 9 * 128 * 2), unwritten(&queue, 9 * 256 * 2));
            let [mut lse, mut delta] = [(); 2].map(|()| queue.upload_all(&[0.0_f32; 18], "sums").unwrap());
            queue.attention(&of, &device.qkv, &mut out, &mut lse).unwrap();
            let dout = unwritten(&queue, 9 * 128 * 2);
            queue.attention_backward(&of, &dout, &device.qkv, &out, &lse, &mut delta, &mut dqkv).unwrap();
            queue.wait().unwrap();
        }
    }
}

#[test]
fn prints_bits() {
    let Some(queue) = queue() else { return };
    for dtype in DTYPES {
        for is_plain in [true, false] {
            let made = run(&queue, &Sample::new(dtype, (2, 1, 64), &[5, 70]), is_plain);
            let lse = made.lse.iter().flat_map(|lse| lse.to_le_bytes());
            let all = made.out.iter().chain(&made.dqkv).copied().chain(lse);
            println!("bits {dtype:?} {is_plain} {:x}", all.fold(0, |hash, byte| random(hash ^ u64::from(byte))));
        }
    }
}

#[test]
fn attention_gives_the_same_bits_in_any_order_of_threads() {
    let Some(folder) = driver::folder(Build::Fast).filter(|_| !driver::is_real()) else { return };
    let bits = |reverse: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["attention::prints_bits", "--exact", "--nocapture"]).env("NEUROADA_TEST_DRIVER", &folder);
        let output = command.env("FAKE_CUDA_REVERSE", reverse).output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        out.lines().filter(|line| line.starts_with("bits ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let forwards = bits("0");
    assert_eq!(forwards.len(), 6);
    assert_eq!(forwards, bits("1"));
}
