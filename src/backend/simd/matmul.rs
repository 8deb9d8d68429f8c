//! Matrix products in float32, near the machine's peak, by the `gemm` crate.
//!
//! Matrices are borrowed with their strides, so that heads inside wider rows and transposes need no copy. Every bound
//! is checked here, once per product: no code above this file is unsafe.

use rayon::current_num_threads;

/// A borrowed matrix of float32; element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    n_rows: usize,
    n_cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// `[n_rows, n_cols]`, row-major, contiguous.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a [f32], n_rows: usize, n_cols: usize) -> Self {
        Self::strided(data, n_rows, n_cols, n_cols)
    }

    /// `[n_rows, n_cols]`, with `row_stride` elements from one row to the next.
    ///
    /// # Panics
    /// If `data` is too short, or rows overlap.
    pub fn strided(data: &'a [f32], n_rows: usize, n_cols: usize, row_stride: usize) -> Self {
        check(data.len(), n_rows, n_cols, row_stride);
        Self { data, n_rows, n_cols, row_stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self {
            n_rows: self.n_cols,
            n_cols: self.n_rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A float32 matrix that receives a product, row-major.
pub struct MatMut<'a> {
    data: &'a mut [f32],
    n_rows: usize,
    n_cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// `[n_rows, n_cols]`, contiguous.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a mut [f32], n_rows: usize, n_cols: usize) -> Self {
        Self::strided(data, n_rows, n_cols, n_cols)
    }

    /// `[n_rows, n_cols]`, with `row_stride` elements from one row to the next.
    ///
    /// # Panics
    /// If `data` is too short, or rows overlap.
    pub fn strided(data: &'a mut [f32], n_rows: usize, n_cols: usize, row_stride: usize) -> Self {
        check(data.len(), n_rows, n_cols, row_stride);
        Self { data, n_rows, n_cols, row_stride }
    }
}

fn check(len: usize, n_rows: usize, n_cols: usize, row_stride: usize) {
    assert!(n_cols <= row_stride || n_rows <= 1, "rows do not overlap");
    let last = n_rows.checked_sub(1).and_then(|last| last.checked_mul(row_stride)?.checked_add(n_cols));
    assert!(n_rows == 0 || last.is_some_and(|end| end <= len), "the matrix fits in its data");
    assert!(row_stride <= isize::MAX as usize, "strides are signed");
}

/// The threads on which a product runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Threads {
    /// The caller's thread only, because the caller is itself one of many.
    One,
    /// The threads of the current rayon pool.
    Pool,
}

/// `out = alpha * a * b + beta * out`; with `beta` 0 the old content of `out` is ignored.
///
/// `a` is `[m, k]`, `b` `[k, n]`, `out` `[m, n]`. Sums run in float32, in an order that depends only on the shapes and
/// the instruction set, so the result is the same for every number of threads.
///
/// # Panics
/// If the shapes do not match.
pub fn matmul(threads: Threads, alpha: f32, a: Mat<'_>, b: Mat<'_>, beta: f32, out: MatMut<'_>) {
    assert_eq!((a.n_rows, a.n_cols, b.n_cols), (out.n_rows, b.n_rows, out.n_cols), "[m, k] * [k, n] = [m, n]");
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::Pool => gemm::Parallelism::Rayon(current_num_threads()),
    };
    let stride = |stride: usize| stride as isize;
    // SAFETY: gemm reads m * k elements of `a`, k * n of `b`, and writes m * n of `out`, each at its strides. The
    // constructors of `Mat` and `MatMut` checked that the last of them is inside the borrowed slices, and that rows of
    // `out` do not overlap; `out` is borrowed mutably, so it aliases neither `a` nor `b`.
    unsafe {
        gemm::gemm(
            out.n_rows,
            out.n_cols,
            a.n_cols,
            out.data.as_mut_ptr(),
            1,
            stride(out.row_stride),
            beta != 0.0,
            a.data.as_ptr(),
            stride(a.col_stride),
            stride(a.row_stride),
            b.data.as_ptr(),
            stride(b.col_stride),
            stride(b.row_stride),
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64).map(|i| (crate::backend::mix(seed ^ i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    #[test]
    fn products_equal_the_plain_loop() {
        for (m, k, n) in [(1, 1, 1), (1, 64, 7), (3, 5, 2), (33, 64, 65), (17, 1, 9), (130, 576, 31)] {
            let (a, b, c) = (numbers(m * k, 1), numbers(n * k, 2), numbers(m * n, 3));
            let mut out = c.clone();
            matmul(Threads::One, 0.5, Mat::new(&a, m, k), Mat::new(&b, n, k).t(), 2.0, MatMut::new(&mut out, m, n));
            for i in 0..m {
                for j in 0..n {
                    let dot: f64 = (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(b[j * k + l])).sum();
                    let expected = 0.5 * dot + 2.0 * f64::from(c[i * n + j]);
                    // k products of numbers below 1, each sum rounded to 24 bits.
                    assert!(
                        (f64::from(out[i * n + j]) - expected).abs() < 1e-6 * k as f64,
                        "({m}, {k}, {n}) at {i}, {j}"
                    );
                }
            }
        }
    }

    #[test]
    fn heads_inside_wider_rows_are_matrices() {
        // Two rows of width 4; the matrix is columns 1 and 2 of both.
        let wide = [9.0, 1.0, 2.0, 9.0, 9.0, 3.0, 4.0, 9.0];
        let (a, mut out) = (Mat::strided(&wide[1..], 2, 2, 4), [0.0; 6]);
        matmul(Threads::One, 1.0, a, Mat::new(&[1.0, 0.0, 0.0, 1.0], 2, 2), 0.0, MatMut::strided(&mut out, 2, 2, 3));
        assert_eq!(out, [1.0, 2.0, 0.0, 3.0, 4.0, 0.0]);
    }

    #[test]
    fn every_number_of_threads_gives_the_same_bits() {
        for (m, k, n) in [(256, 300, 257), (8, 576, 960), (1, 576, 960), (600, 1536, 64)] {
            let (a, b) = (numbers(m * k, 1), numbers(n * k, 2));
            let product = |n_threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
                let mut out = vec![f32::NAN; m * n];
                let (a, b, to) = (Mat::new(&a, m, k), Mat::new(&b, n, k).t(), MatMut::new(&mut out, m, n));
                pool.install(|| matmul(Threads::Pool, 1.0, a, b, 0.0, to));
                out
            };
            let one = product(1);
            for n_threads in [2, 3, 8] {
                assert!(product(n_threads) == one, "({m}, {k}, {n}) on {n_threads} threads");
            }
        }
    }

    #[test]
    #[should_panic(expected = "the matrix fits in its data")]
    fn a_matrix_beyond_its_data_panics() {
        Mat::strided(&[0.0; 7], 2, 2, 6);
    }
}
