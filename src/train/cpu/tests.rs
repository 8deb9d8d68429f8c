//! Every backward pass against finite differences of the forward pass.

use super::*;

/// Numbers between -1 and 1.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| (crate::backend::mix(seed << 32 ^ i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Compares `gradient` with central differences of `sum(dy * forward(x))`.
///
/// A step of 0.01 gives an error of about 1e-4 from curvature and about 1e-5 from float32 rounding.
fn check(what: &str, x: &[f32], dy: &[f32], mut forward: impl FnMut(&[f32]) -> Vec<f32>, gradient: &[f32]) {
    const STEP: f32 = 1e-2;
    let mut loss = |x: &[f32]| -> f64 {
        let y = forward(x);
        assert_eq!(y.len(), dy.len(), "{what}");
        y.iter().zip(dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
    };
    let largest = gradient.iter().fold(0.0f32, |largest, g| largest.max(g.abs()));
    let mut moved = x.to_vec();
    for i in 0..x.len() {
        moved[i] = x[i] + STEP;
        let above = loss(&moved);
        moved[i] = x[i] - STEP;
        let below = loss(&moved);
        moved[i] = x[i];
        let expected = (above - below) / (2.0 * f64::from(STEP));
        let off = (f64::from(gradient[i]) - expected).abs();
        assert!(off < 2e-3 * f64::from(largest).max(0.1), "{what}: element {i}: {} not {expected}", gradient[i]);
    }
}

const HEADS: Heads = Heads { n_q: 4, n_kv: 2, d_head: 6 };

#[test]
fn linear_backward_is_the_gradient() {
    let (device, n, d_out, d_in) = (CpuDevice::new(), 3, 5, 4);
    let mut w = device.weight(Dtype::F32, d_out, d_in).unwrap();
    let bytes: Vec<u8> = numbers(d_out * d_in, 1).iter().flat_map(|w| w.to_le_bytes()).collect();
    device.write_rows(&mut w, 0, &bytes).unwrap();
    let (x, dy, bias) = (numbers(n * d_in, 2), numbers(n * d_out, 3), numbers(d_out, 4));
    let mut dx = vec![f32::NAN; n * d_in];
    device.linear_backward(&dy, n, &w, &mut dx).unwrap();
    let forward = |x: &[f32]| {
        let mut y = vec![f32::NAN; n * d_out];
        device.linear(&x.to_vec(), n, &w, Some(&bias), false, &mut y).unwrap();
        y
    };
    check("linear", &x, &dy, forward, &dx);

    let (plain, mut added) = (forward(&x), numbers(n * d_out, 5));
    let before = added.clone();
    device.linear(&x, n, &w, Some(&bias), true, &mut added).unwrap();
    for ((added, before), plain) in added.iter().zip(before).zip(plain) {
        assert!((added - before - plain).abs() < 1e-6, "with `accumulate` the product is added");
    }
}

/// Biases `[n, 1]`, all but one of them trained.
fn bias_deltas(device: &CpuDevice, dtype: Dtype, originals: &[u8], n: usize, left_out: usize) -> Deltas<CpuDevice> {
    let mut stored = device.weight(dtype, 1, n - 1).unwrap();
    device.write_rows(&mut stored, 0, originals).unwrap();
    Deltas {
        nnz: n - 1,
        offsets: (0..=n).map(|i| if i > left_out { i - 1 } else { i } as u32).collect(),
        columns: vec![0; n - 1],
        originals: stored,
        theta: vec![0.0; n - 1],
        grad: vec![0.0; n - 1],
        mean: vec![0.0; n - 1],
        variance: vec![0.0; n - 1],
    }
}

#[test]
fn bias_grad_adds_the_gradient() {
    // More tokens than one tile, more rows than one run.
    let (device, n, d_out, d_in, left_out) = (CpuDevice::new(), 300, 70, 3, 66);
    let mut w = device.weight(Dtype::F32, d_out, d_in).unwrap();
    let bytes: Vec<u8> = numbers(d_out * d_in, 1).iter().flat_map(|w| w.to_le_bytes()).collect();
    device.write_rows(&mut w, 0, &bytes).unwrap();
    let (x, dy, bias) = (numbers(n * d_in, 2), numbers(n * d_out, 3), numbers(d_out, 4));
    let mut deltas = bias_deltas(&device, Dtype::F32, &vec![0; 4 * (d_out - 1)], d_out, left_out);
    let before = numbers(d_out - 1, 5);
    deltas.grad.clone_from(&before);
    device.bias_grad(&dy, n, d_out, &mut deltas).unwrap();
    let forward = |trained: &[f32]| {
        let mut bias = bias.clone();
        bias[..left_out].copy_from_slice(&trained[..left_out]);
        bias[left_out + 1..].copy_from_slice(&trained[left_out..]);
        let mut y = vec![f32::NAN; n * d_out];
        device.linear(&x, n, &w, Some(&bias), false, &mut y).unwrap();
        y
    };
    let trained = [&bias[..left_out], &bias[left_out + 1..]].concat();
    let gradient: Vec<f32> = deltas.grad.iter().zip(before).map(|(after, before)| after - before).collect();
    check("bias", &trained, &dy, forward, &gradient);
}

#[test]
fn a_patched_bias_is_rounded_to_its_type_and_widened() {
    let device = CpuDevice::new();
    let bytes: Vec<u8> = [1.0f32, -2.0].iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let mut deltas = bias_deltas(&device, Dtype::BF16, &bytes, 3, 1);
    // 1 + 0.002 is nearer to 1 than to 1.0078125; -2 + 0.5 is a bf16.
    deltas.theta = vec![0.002, 0.5];
    let mut bias = vec![9.0, 7.0, 9.0];
    device.patch_bias(&mut bias, &deltas).unwrap();
    assert_eq!(bias, [1.0, 7.0, -1.5]);
}

#[test]
fn rms_norm_backward_adds_the_gradient() {
    let (device, n, d, eps) = (CpuDevice::new(), 3, 7, 1e-5);
    let (x, gain, dy) = (numbers(n * d, 1), numbers(d, 2), numbers(n * d, 3));
    let before = numbers(n * d, 4);
    let mut dx = before.clone();
    device.rms_norm_backward(&dy, &x, n, &gain, d, eps, &mut dx).unwrap();
    let dx: Vec<f32> = dx.iter().zip(before).map(|(after, before)| after - before).collect();
    let forward = |x: &[f32]| {
        let mut y = vec![f32::NAN; n * d];
        device.rms_norm(&x.to_vec(), n, &gain, d, eps, &mut y).unwrap();
        y
    };
    check("rms_norm", &x, &dy, forward, &dx);
}

#[test]
fn head_norm_backward_is_the_gradient() {
    let (device, n, eps, width) = (CpuDevice::new(), 2, 1e-5, HEADS.d_qkv());
    let (x, dy) = (numbers(n * width, 1), numbers(n * width, 2));
    let (q_gain, k_gain) = (numbers(HEADS.d_head, 3), numbers(HEADS.d_head, 4));
    let mut dx = dy.clone();
    device.head_norm_backward(&mut dx, &x, n, HEADS, &q_gain, &k_gain, eps).unwrap();
    let forward = |x: &[f32]| {
        let mut y = x.to_vec();
        device.head_norm(&mut y, n, HEADS, &q_gain, &k_gain, eps).unwrap();
        y
    };
    check("head_norm", &x, &dy, forward, &dx);
}

#[test]
fn the_inverse_rotation_is_the_gradient_of_rope() {
    let (device, n, width) = (CpuDevice::new(), 3, HEADS.d_qkv());
    let (x, dy) = (numbers(n * width, 1), numbers(n * width, 2));
    let (positions, frequencies) = (vec![0, 5, 40], vec![1.0, 0.3, 0.01]);
    let rotate = |x: &[f32], inverse: bool| {
        let mut y = x.to_vec();
        device.rope(&mut y, &positions, n, HEADS, &frequencies, inverse).unwrap();
        y
    };
    check("rope", &x, &dy, |x| rotate(x, false), &rotate(&dy, true));
    let round_trip = rotate(&rotate(&x, false), true);
    assert!(x.iter().zip(&round_trip).all(|(a, b)| (a - b).abs() < 1e-6));
    let (d_q, d_kv) = (HEADS.d_q(), HEADS.d_kv());
    assert_eq!(rotate(&x, false)[d_q + d_kv..width], x[d_q + d_kv..width], "values are not rotated");
}

fn spans(device: &CpuDevice, starts: &[usize]) -> Spans<CpuDevice> {
    Spans::new(device, starts, &[]).unwrap()
}

fn attend(device: &CpuDevice, qkv: &[f32], starts: &[usize]) -> (Vec<f32>, Vec<f32>) {
    let n = *starts.last().unwrap();
    let (mut out, mut lse) = (vec![f32::NAN; n * HEADS.d_q()], vec![f32::NAN; n * HEADS.n_q]);
    device.attention(&qkv.to_vec(), &spans(device, starts), HEADS, &mut out, &mut lse).unwrap();
    (out, lse)
}

#[test]
fn attention_backward_is_the_gradient() {
    let (device, starts) = (CpuDevice::new(), [0, 1, 4, 9]);
    let (n, width) = (9, HEADS.d_qkv());
    let (qkv, dout) = (numbers(n * width, 1), numbers(n * HEADS.d_q(), 2));
    let (out, lse) = attend(&device, &qkv, &starts);
    let mut dqkv = vec![f32::NAN; n * width];
    device.attention_backward(&dout, &qkv, &out, &lse, &spans(&device, &starts), HEADS, &mut dqkv).unwrap();
    check("attention", &qkv, &dout, |qkv| attend(&device, qkv, &starts).0, &dqkv);
}

/// One head of one token, as in a textbook.
fn attend_plainly(qkv: &[f32], start: usize, t: usize, head: usize) -> Vec<f64> {
    let at = |t: usize, column: usize| -> Vec<f64> {
        qkv[t * HEADS.d_qkv() + column..][..HEADS.d_head].iter().map(|&x| f64::from(x)).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let kv = head / HEADS.group() * HEADS.d_head;
    let q = at(t, head * HEADS.d_head);
    let scores: Vec<f64> =
        (start..=t).map(|s| (dot(&q, &at(s, HEADS.d_q() + kv)) / (HEADS.d_head as f64).sqrt()).exp()).collect();
    let mut out = vec![0.0; HEADS.d_head];
    for (s, score) in (start..=t).zip(&scores) {
        for (out, v) in out.iter_mut().zip(at(s, HEADS.d_q() + HEADS.d_kv() + kv)) {
            *out += score / scores.iter().sum::<f64>() * v;
        }
    }
    out
}

#[test]
fn attention_equals_the_plain_loop_across_blocks() {
    // 300 tokens are three blocks of queries; the previous example must not be attended to.
    let (device, starts) = (CpuDevice::new(), [0, 5, 305]);
    let qkv = numbers(305 * HEADS.d_qkv(), 1);
    let (out, _) = attend(&device, &qkv, &starts);
    for (start, t) in [(0, 0), (0, 4), (5, 5), (5, 132), (5, 133), (5, 304)] {
        for head in 0..HEADS.n_q {
            let found = &out[t * HEADS.d_q() + head * HEADS.d_head..][..HEADS.d_head];
            for (found, expected) in found.iter().zip(attend_plainly(&qkv, start, t, head)) {
                assert!((f64::from(*found) - expected).abs() < 1e-6, "token {t}, head {head}: {found} not {expected}");
            }
        }
    }
}

#[test]
fn attention_backward_sums_over_blocks() {
    // Keys of the first block receive gradients from queries of all three; one element of each part is compared with a
    // finite difference.
    let (device, starts, n, width) = (CpuDevice::new(), [0, 300], 300, HEADS.d_qkv());
    let (mut qkv, dout) = (numbers(n * width, 1), numbers(n * HEADS.d_q(), 2));
    let (out, lse) = attend(&device, &qkv, &starts);
    let mut dqkv = vec![f32::NAN; n * width];
    device.attention_backward(&dout, &qkv, &out, &lse, &spans(&device, &starts), HEADS, &mut dqkv).unwrap();
    for at in [3, 130 * width + HEADS.d_q(), 7 * width + HEADS.d_q() + 8, 40 * width + width - 1, 299 * width + 9] {
        let x = qkv[at];
        let mut loss = |x: f32| -> f64 {
            qkv[at] = x;
            let (out, _) = attend(&device, &qkv, &starts);
            out.iter().zip(&dout).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
        };
        let expected = (loss(x + 0.05) - loss(x - 0.05)) / 0.1;
        loss(x);
        assert!((f64::from(dqkv[at]) - expected).abs() < 1e-3, "element {at}: {} not {expected}", dqkv[at]);
    }
}

#[test]
fn attention_continues_from_a_cache() {
    let (device, width, capacity) = (CpuDevice::new(), HEADS.d_qkv(), 150);
    let (a, b) = (numbers(140 * width, 1), numbers(6 * width, 2));
    let (expected, _) = attend(&device, &[a.clone(), b.clone()].concat(), &[0, 140, 146]);
    let mut cache = vec![f32::NAN; 2 * capacity * 2 * HEADS.d_kv()];
    let mut read = |a: &[f32], b: &[f32], past: [usize; 2]| {
        let (n_a, n_b) = (a.len() / width, b.len() / width);
        let mut out = vec![f32::NAN; (n_a + n_b) * HEADS.d_q()];
        let (qkv, spans) = ([a, b].concat(), spans(&device, &[0, n_a, n_a + n_b]));
        device.attention_cached(&qkv, &spans, &past, HEADS, &mut cache, capacity, &mut out).unwrap();
        out
    };
    // Sequence a in 3 + 137 tokens, b in 4 + 2; a sequence may add no tokens.
    read(&a[..3 * width], &b[..4 * width], [0, 0]);
    let last_a = read(&a[3 * width..], &[], [3, 4]);
    let last_b = read(&[], &b[4 * width..], [140, 4]);
    let (expected_a, expected_b) = (&expected[3 * HEADS.d_q()..140 * HEADS.d_q()], &expected[144 * HEADS.d_q()..]);
    for (found, expected) in [(last_a, expected_a), (last_b, expected_b)] {
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}

#[test]
fn swiglu_backward_is_the_gradient() {
    let (device, n, d_ff) = (CpuDevice::new(), 3, 5);
    let x: Vec<f32> = numbers(n * 2 * d_ff, 1).iter().map(|x| 4.0 * x).collect();
    let dy = numbers(n * d_ff, 2);
    let mut dx = vec![f32::NAN; n * 2 * d_ff];
    device.swiglu_backward(&dy, &x, n, d_ff, &mut dx).unwrap();
    let forward = |x: &[f32]| {
        let mut y = vec![f32::NAN; n * d_ff];
        device.swiglu(&x.to_vec(), n, d_ff, &mut y).unwrap();
        y
    };
    check("swiglu", &x, &dy, forward, &dx);
}

#[test]
fn cross_entropy_gives_its_gradient() {
    let (device, n, d, n_vocab) = (CpuDevice::new(), 4, 6, 11);
    let mut head = device.weight(Dtype::F32, n_vocab, d).unwrap();
    let bytes: Vec<u8> = numbers(n_vocab * d, 1).iter().flat_map(|w| w.to_le_bytes()).collect();
    device.write_rows(&mut head, 0, &bytes).unwrap();
    let (x, labels) = (numbers(n * d, 2), vec![0, 10, 3, 3]);
    let run = |x: &[f32], scale: Option<f32>| {
        let (mut x, mut losses) = (x.to_vec(), vec![f32::NAN; n]);
        device.cross_entropy(&mut x, n, &head, &labels, scale, &mut losses).unwrap();
        (losses, x)
    };
    let (losses, dx) = run(&x, Some(0.5));
    check("cross_entropy", &x, &[0.5; 4], |x| run(x, None).0, &dx);
    assert_eq!(run(&x, None), (losses.clone(), x.clone()), "without a scale x is unchanged");

    // By hand: log(sum(exp(logits))) - logits[label], in float64.
    let mut logits = vec![0.0; n * n_vocab];
    device.linear(&x, n, &head, None, false, &mut logits).unwrap();
    for ((loss, logits), label) in losses.iter().zip(logits.chunks(n_vocab)).zip(&labels) {
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        assert!((f64::from(*loss) - (sum.ln() - f64::from(logits[*label as usize]))).abs() < 1e-6);
    }
    let best = device.argmax(&x, n, &head).unwrap();
    for (best, logits) in best.iter().zip(logits.chunks(n_vocab)) {
        assert!(logits.iter().all(|logit| *logit <= logits[*best as usize]));
    }
}

#[test]
fn rows_are_gathered_and_scattered() {
    let device = CpuDevice::new();
    let x = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let (mut y, mut back) = (vec![0.0; 4], vec![9.0; 6]);
    device.take_rows(&x, &vec![2, 0], 2, 2, &mut y).unwrap();
    assert_eq!(y, [5.0, 6.0, 1.0, 2.0]);
    device.put_rows(&y, &vec![2, 0], 2, 2, 3, &mut back).unwrap();
    assert_eq!(back, [1.0, 2.0, 0.0, 0.0, 5.0, 6.0]);
}

#[test]
fn embeddings_are_rows_of_the_table() {
    let device = CpuDevice::new();
    let mut table = device.weight(Dtype::BF16, 3, 2).unwrap();
    let bytes: Vec<u8> =
        [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    device.write_rows(&mut table, 0, &bytes).unwrap();
    let mut x = vec![0.0; 6];
    device.embed(&vec![2, 0, 2], 3, &table, &mut x).unwrap();
    assert_eq!(x, [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
}
