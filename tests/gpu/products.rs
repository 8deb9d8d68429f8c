//! Products by cuBLASLt compared with sums in float64.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
};

use neuroada_ckpt::{
    Dtype,
    internals::{
        gpu::{Blas, BlasWeight, DeviceVec, GpuError, Queue},
        tensor::{Accumulator, Float, with_float},
    },
};

use crate::{
    driver::{self, queue},
    samples::{DTYPES, bell, bytes_of},
};

/// Rows, `d_out`, `d_in`, and the first row.
const SHAPES: [(usize, usize, usize, usize); 7] =
    [(1, 1, 1, 0), (1, 7, 3, 1), (3, 5, 7, 2), (17, 33, 65, 5), (64, 128, 64, 8), (100, 31, 257, 0), (2, 300, 16, 1)];

/// The product library; `None`, after printing the reason, if there is none.
fn blas(queue: &Queue) -> Option<Blas> {
    match Blas::new(queue) {
        Err(GpuError::NoLibrary { .. }) if driver::is_real() => {
            eprintln!("skipped: there is no cuBLASLt; NEUROADA_CUDA_LIB names the folder of one");
            None
        }
        made => Some(made.expect("the library starts")),
    }
}

fn widened(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    with_float!(dtype, T => {
        bytes.chunks_exact(T::BYTES).map(|le| T::from_le(le).widen().to_f64()).collect()
    }, else unreachable!())
}

fn size_of(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// A matrix of samples: on the device, as stored, and as values.
struct Sample {
    dev: DeviceVec<u8>,
    bytes: Vec<u8>,
    values: Vec<f64>,
}

fn sample(queue: &Queue, dtype: Dtype, n: usize, seed: u64) -> Sample {
    let bytes = bytes_of(dtype, (0..n as u64).map(|i| bell(seed << 32 | i)));
    let dev = queue.upload_all(&bytes, "a sample").unwrap();
    Sample { dev, values: widened(dtype, &bytes), bytes }
}

/// Whether the error is within the bound for a sum of `n` products: rounding in `f32`, in any order; then rounding to
/// the output's dtype.
fn is_near(got: f64, exact: f64, magnitude: f64, n: usize, out: Dtype) -> bool {
    let (unit, least) = match out {
        Dtype::BF16 => (2f64.powi(-8), 0.0),
        Dtype::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        _ => (2f64.powi(-24), 0.0),
    };
    (got - exact).abs() <= exact.abs() * unit + magnitude * (n + 2) as f64 * 2f64.powi(-24) + least
}

/// Sums of `n` products, and of their magnitudes: element `(i, j)` of a product.
fn dot(n: usize, a: impl Fn(usize) -> f64, b: impl Fn(usize) -> f64) -> (f64, f64) {
    (0..n).map(|i| a(i) * b(i)).fold((0.0, 0.0), |(sum, all), product| (sum + product, all + product.abs()))
}

fn check_all(queue: &Queue, blas: &Blas) {
    for (dtype, (n, d_out, d_in, first)) in DTYPES.into_iter().flat_map(|dtype| SHAPES.map(|shape| (dtype, shape))) {
        let what = format!("{dtype:?} {n} {d_out} {d_in} {first}");
        // One more row than needed on each side.
        let x = sample(queue, dtype, (first + n + 1) * d_in, 1);
        let w = sample(queue, dtype, d_out * d_in, 2);
        let dy = sample(queue, dtype, (n + 1) * d_out, 3);
        let weight = BlasWeight { values: &w.dev, dtype, d_out, d_in };
        let forward = |i: usize, j: usize| dot(d_in, |c| x.values[(first + i) * d_in + c], |c| w.values[j * d_in + c]);
        let backward = |i: usize, j: usize| dot(d_out, |c| dy.values[i * d_out + c], |c| w.values[c * d_in + j]);

        for adds in [false, true] {
            let mut y = sample(queue, dtype, (n + 1) * d_out, 4);
            blas.times_transposed(&x.dev, first, weight, n, adds, &mut y.dev).unwrap();
            let after = queue.download_all(&y.dev).unwrap();
            let got = widened(dtype, &after);
            for (at, &got) in got.iter().enumerate().take(n * d_out) {
                let (sum, all) = forward(at / d_out, at % d_out);
                let before = if adds { y.values[at] } else { 0.0 };
                assert!(is_near(got, sum + before, all + before.abs(), d_in, dtype), "{what} {adds} {at}: {got} {sum}");
            }
            let end = n * d_out * size_of(dtype);
            assert!(after[end..] == y.bytes[end..], "{what}: the rest of the buffer is unchanged");
        }

        let mut logits = queue.alloc::<f32>(n * d_out, "logits").unwrap();
        blas.times_transposed_f32(&x.dev, first, weight, n, &mut logits).unwrap();
        for (at, got) in queue.download_all(&logits).unwrap().into_iter().enumerate() {
            let (sum, all) = forward(at / d_out, at % d_out);
            assert!(is_near(got.into(), sum, all, d_in, Dtype::F32), "{what} logits {at}: {got} {sum}");
        }

        let mut dx = sample(queue, dtype, (first + n + 1) * d_in, 5);
        blas.times(&dy.dev, weight, n, &mut dx.dev, first).unwrap();
        let after = queue.download_all(&dx.dev).unwrap();
        let got = widened(dtype, &after);
        for at in 0..n * d_in {
            let (sum, all) = backward(at / d_in, at % d_in);
            assert!(is_near(got[first * d_in + at], sum, all, d_out, dtype), "{what} back {at}: {sum}");
        }
        let (start, end) = (first * d_in * size_of(dtype), (first + n) * d_in * size_of(dtype));
        assert!(after[..start] == dx.bytes[..start] && after[end..] == dx.bytes[end..], "{what}: rows around");
    }
}

#[test]
fn products_match_float64_to_the_last_bits() {
    let Some(queue) = queue() else { return };
    let Some(blas) = blas(&queue) else { return };
    check_all(&queue, &blas);
}

#[test]
fn a_product_gives_the_same_bits_each_time() {
    let Some(queue) = queue() else { return };
    let product = || {
        let blas = blas(&queue)?;
        let (x, w) = (sample(&queue, Dtype::BF16, 96 * 512, 1), sample(&queue, Dtype::BF16, 64 * 512, 2));
        let mut y = queue.alloc(96 * 64 * 2, "a product").unwrap();
        let weight = BlasWeight { values: &w.dev, dtype: Dtype::BF16, d_out: 64, d_in: 512 };
        blas.times_transposed(&x.dev, 0, weight, 96, false, &mut y).unwrap();
        Some(queue.download_all(&y).unwrap())
    };
    let first = product();
    assert!((0..3).all(|_| product() == first));
}

#[test]
fn more_shapes_than_the_cache_holds_are_multiplied() {
    let Some(queue) = queue() else { return };
    let Some(blas) = blas(&queue) else { return };
    let (x, w) = (sample(&queue, Dtype::F32, 1100 * 2, 1), sample(&queue, Dtype::F32, 2, 2));
    let weight = BlasWeight { values: &w.dev, dtype: Dtype::F32, d_out: 1, d_in: 2 };
    let mut y = queue.alloc::<u8>(1100 * 4, "a product").unwrap();
    for n in (1..=1100).chain([1, 1100, 2]) {
        queue.fill(&mut y, 0).unwrap();
        blas.times_transposed(&x.dev, 0, weight, n, false, &mut y).unwrap();
        let last = widened(Dtype::F32, &queue.download_all(&y).unwrap())[n - 1];
        let (sum, all) = dot(2, |c| x.values[(n - 1) * 2 + c], |c| w.values[c]);
        assert!(is_near(last, sum, all, 2, Dtype::F32), "{n}: {last} {sum}");
    }
}

#[test]
fn products_beyond_the_memory_panic() {
    let Some(queue) = queue() else { return };
    let Some(blas) = blas(&queue) else { return };
    let (x, w) = (sample(&queue, Dtype::BF16, 4 * 8, 1), sample(&queue, Dtype::BF16, 3 * 8, 2));
    let mut y = queue.alloc::<u8>(4 * 3 * 2, "a product").unwrap();
    let weight = BlasWeight { values: &w.dev, dtype: Dtype::BF16, d_out: 3, d_in: 8 };
    let mut product = |first_row, weight, n| {
        catch_unwind(AssertUnwindSafe(|| blas.times_transposed(&x.dev, first_row, weight, n, false, &mut y).unwrap()))
    };
    assert!(product(0, weight, 4).is_ok() && product(4, weight, 0).is_ok());
    assert!(product(1, weight, 4).is_err() && product(0, weight, 5).is_err());
    assert!(product(0, BlasWeight { d_out: 4, ..weight }, 2).is_err());
    assert!(product(0, BlasWeight { dtype: Dtype::F32, ..weight }, 1).is_err());
}

/// The errors of a process with other environment variables, which prints them.
#[test]
fn failures_are_words() {
    if driver::is_real() {
        return;
    }
    let Some(queue) = queue() else { return };
    if std::env::var_os("SAY_WHAT_FAILS").is_some() {
        let (x, w) = (sample(&queue, Dtype::F16, 4 * 8, 1), sample(&queue, Dtype::F16, 3 * 8, 2));
        let mut y = queue.alloc::<u8>(4 * 3 * 2, "a product").unwrap();
        let weight = BlasWeight { values: &w.dev, dtype: Dtype::F16, d_out: 3, d_in: 8 };
        let done = Blas::new(&queue).and_then(|blas| {
            blas.times_transposed(&x.dev, 0, weight, 4, false, &mut y)?;
            queue.wait()
        });
        println!("said: {}", done.map_or_else(|error| error.to_string(), |()| "done".to_owned()));
        return;
    }
    for (variable, value, expected) in [
        (
            "FAKE_CUBLAS_REFUSE",
            "15",
            "GPU 0: cuBLASLt 12.8.4: x w^T, x [4, 8], w [3, 8], F16: CUBLAS_STATUS_NOT_SUPPORTED",
        ),
        ("FAKE_CUBLAS_REFUSE", "99", "x w^T, x [4, 8], w [3, 8], F16: cuBLAS status 99"),
        ("FAKE_CUBLAS_START", "1", "GPU 0: cuBLASLt 12.8.4: starting: CUBLAS_STATUS_NOT_INITIALIZED"),
        ("FAKE_CUDA_FAIL", "1", "GPU 0: kernel `cublasLtMatmul`, or one started before it, failed: CUDA_ERROR_ILLEGAL"),
        // A smaller workspace, and none.
        ("FAKE_CUDA_MEMORY", "6000000", "said: done"),
        ("FAKE_CUDA_MEMORY", "6000", "said: done"),
    ] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["products::failures_are_words", "--nocapture"]).env("SAY_WHAT_FAILS", "1").env(variable, value);
        let output = command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && message.contains(expected), "{variable}={value}: {message}");
    }
}
