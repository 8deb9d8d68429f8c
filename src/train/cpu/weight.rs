//! Weights in their stored dtype, and their products.

use half::{bf16, f16};
use rayon::prelude::*;

use super::super::DeviceError;
use crate::{
    backend::{Mat, MatMut, Threads, matmul},
    tensor::{Dtype, Float, dtype_name},
};

/// The maximum number of elements widened at once: 32 MiB.
pub(super) const MAX_WIDENED: usize = 8 << 20;
/// Elements that one task widens.
const PIECE: usize = 1 << 14;

/// A matrix `[d_out, d_in]` in BF16, F16 or F32.
#[derive(Clone, Debug)]
pub struct CpuWeight {
    elements: Elements,
    d_out: usize,
    d_in: usize,
}

#[derive(Clone, Debug)]
enum Elements {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

/// Evaluates an expression on the elements, whatever their type.
macro_rules! with_elements {
    ($elements:expr, $values:ident => $body:expr) => {
        match $elements {
            Elements::F32($values) => $body,
            Elements::Bf16($values) => $body,
            Elements::F16($values) => $body,
        }
    };
}

impl CpuWeight {
    /// A matrix of zeros.
    pub(super) fn zeros(dtype: Dtype, d_out: usize, d_in: usize) -> Result<Self, DeviceError> {
        let n = d_out * d_in;
        let elements = match dtype {
            Dtype::F32 => Elements::F32(vec![0.0; n]),
            Dtype::BF16 => Elements::Bf16(vec![bf16::ZERO; n]),
            Dtype::F16 => Elements::F16(vec![f16::ZERO; n]),
            other => {
                return Err(DeviceError::Failed(format!("weights are BF16, F16 or F32, not {}", dtype_name(other))));
            }
        };
        Ok(Self { elements, d_out, d_in })
    }

    /// Number of rows.
    pub fn d_out(&self) -> usize {
        self.d_out
    }
    /// Length of a row.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    pub(super) fn write_rows(&mut self, first_row: usize, bytes: &[u8]) {
        let first = first_row * self.d_in;
        with_elements!(&mut self.elements, values => fill(&mut values[first..], bytes));
    }

    /// `x[i] = row ids[i]`, widened.
    pub(super) fn take_rows(&self, ids: &[u32], x: &mut [f32]) {
        let d = self.d_in;
        with_elements!(&self.elements, values => {
            x.par_chunks_mut(d).zip(ids).for_each(|(x, &id)| widen(&values[id as usize * d..][..d], x));
        });
    }

    /// Blocks of rows small enough to be widened at once.
    pub(super) fn blocks(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let (d_out, n_rows) = (self.d_out, (MAX_WIDENED / self.d_in).max(1));
        (0..d_out).step_by(n_rows).map(move |first| first..(first + n_rows).min(d_out))
    }

    /// These rows in float32: borrowed if stored so, else widened into `scratch`.
    pub(super) fn widened<'a>(&'a self, rows: std::ops::Range<usize>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let range = rows.start * self.d_in..rows.end * self.d_in;
        match &self.elements {
            Elements::F32(values) => &values[range],
            Elements::Bf16(values) => widen_all(&values[range], scratch),
            Elements::F16(values) => widen_all(&values[range], scratch),
        }
    }

    /// `y = x * w^T + beta * y`; `x` is `[n, d_in]`, `y` `[n, d_out]`.
    pub(super) fn times(&self, x: &[f32], n: usize, beta: f32, y: &mut [f32], scratch: &mut Vec<f32>) {
        for rows in self.blocks() {
            let w = Mat::new(self.widened(rows.clone(), scratch), rows.len(), self.d_in);
            let y = MatMut::strided(&mut y[rows.start..], n, rows.len(), self.d_out);
            matmul(Threads::Pool, 1.0, Mat::new(x, n, self.d_in), w.t(), beta, y);
        }
    }

    /// `dx = dy * w`; `dy` is `[n, d_out]`, `dx` `[n, d_in]`.
    pub(super) fn transposed_times(&self, dy: &[f32], n: usize, dx: &mut [f32], scratch: &mut Vec<f32>) {
        for rows in self.blocks() {
            let w = Mat::new(self.widened(rows.clone(), scratch), rows.len(), self.d_in);
            let dy = Mat::strided(&dy[rows.start..], n, rows.len(), self.d_out);
            let beta = if rows.start == 0 { 0.0 } else { 1.0 };
            matmul(Threads::Pool, 1.0, dy, w, beta, MatMut::new(dx, n, self.d_in));
        }
    }

    /// `to[i] = round(self[e] + theta[e])`, widened, for each row `i` that has an entry `e`.
    pub(super) fn patched(&self, offsets: &[u32], theta: &[f32], to: &mut [f32]) {
        with_elements!(&self.elements, from => {
            for (to, span) in to.iter_mut().zip(offsets.windows(2)) {
                for e in span[0] as usize..span[1] as usize {
                    *to = merged(from[e], theta[e]).widen();
                }
            }
        });
    }

    /// `w[i, columns[e]] = round(originals[e] + theta[e])`.
    pub(super) fn patch(&mut self, offsets: &[u32], columns: &[u32], originals: &Self, theta: &[f32]) {
        match (&mut self.elements, &originals.elements) {
            (Elements::F32(w), Elements::F32(from)) => patch(w, self.d_in, offsets, columns, from, theta),
            (Elements::Bf16(w), Elements::Bf16(from)) => patch(w, self.d_in, offsets, columns, from, theta),
            (Elements::F16(w), Elements::F16(from)) => patch(w, self.d_in, offsets, columns, from, theta),
            _ => unreachable!("originals have the weight's type"),
        }
    }
}

fn fill<T: Float>(to: &mut [T], bytes: &[u8]) {
    assert!(bytes.len().is_multiple_of(T::BYTES) && bytes.len() / T::BYTES <= to.len(), "whole rows that fit");
    for (to, le) in to.iter_mut().zip(bytes.chunks_exact(T::BYTES)) {
        *to = T::from_le(le);
    }
}

fn widen<T: Float<Acc = f32>>(from: &[T], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.widen();
    }
}

fn widen_all<'a, T: Float<Acc = f32>>(from: &[T], scratch: &'a mut Vec<f32>) -> &'a [f32] {
    if scratch.len() < from.len() {
        scratch.resize(from.len(), 0.0);
    }
    let to = &mut scratch[..from.len()];
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| widen(from, to));
    to
}

/// The same sum as in a merge with scale 1, so that both round identically.
fn merged<T: Float<Acc = f32>>(original: T, theta: f32) -> T {
    T::from_acc(original.widen() + theta)
}

fn patch<T: Float<Acc = f32>>(w: &mut [T], d_in: usize, offsets: &[u32], columns: &[u32], from: &[T], theta: &[f32]) {
    w.par_chunks_mut(d_in).zip(offsets.par_windows(2)).with_min_len(256).for_each(|(row, span)| {
        for e in span[0] as usize..span[1] as usize {
            row[columns[e] as usize] = merged(from[e], theta[e]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_rows() {
        let weight = CpuWeight::zeros(Dtype::BF16, 3, MAX_WIDENED).unwrap();
        assert_eq!(weight.blocks().collect::<Vec<_>>(), [0..1, 1..2, 2..3]);
        let small = CpuWeight::zeros(Dtype::F16, 5, 4).unwrap();
        assert!(small.blocks().eq(std::iter::once(0..5)));
    }

    #[test]
    fn a_product_in_blocks_equals_the_whole_product() {
        // Rows long enough to be one block each: [1, 0, …] and [0, 2, …].
        let mut weight = CpuWeight::zeros(Dtype::F32, 2, MAX_WIDENED).unwrap();
        weight.write_rows(0, &1f32.to_le_bytes());
        let mut second = vec![0; 4];
        second.extend(2f32.to_le_bytes());
        weight.write_rows(1, &second);
        let mut x = vec![0.0; MAX_WIDENED];
        (x[0], x[1]) = (3.0, 5.0);
        let (mut y, mut dx, mut scratch) = ([0.0; 2], vec![0.0; MAX_WIDENED], Vec::new());
        weight.times(&x, 1, 0.0, &mut y, &mut scratch);
        assert_eq!(y, [3.0, 10.0]);
        weight.transposed_times(&[1.0, 10.0], 1, &mut dx, &mut scratch);
        assert_eq!(dx[..3], [1.0, 20.0, 0.0]);
    }

    #[test]
    fn a_patch_rounds_once_to_the_type() {
        let mut weight = CpuWeight::zeros(Dtype::BF16, 2, 3).unwrap();
        let mut originals = CpuWeight::zeros(Dtype::BF16, 1, 2).unwrap();
        let bytes = |values: &[f32]| values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect::<Vec<_>>();
        originals.write_rows(0, &bytes(&[1.0, -2.0]));
        // 1 + 0.002 is nearer to 1 than to 1.0078125; -2 + 0.5 is a bf16.
        weight.patch(&[0, 1, 2], &[2, 0], &originals, &[0.002, 0.5]);
        let mut scratch = Vec::new();
        assert_eq!(weight.widened(0..2, &mut scratch), [0.0, 0.0, 1.0, -1.5, 0.0, 0.0]);
    }
}
