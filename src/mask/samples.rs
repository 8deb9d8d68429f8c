//! Generated targets for the property tests of masks and adapters.

use proptest::{collection::vec, prelude::*, sample::subsequence};

use crate::tensor::{Dtype, RowColumns, RowLayout};

/// A target with chosen columns and the base's values there.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub transposed: bool,
    pub layout: RowLayout,
    pub uniform_k: Option<u64>,
    pub columns: RowColumns,
    pub base_values: Vec<u8>,
}

/// Small targets: vectors, matrices and stacks, transposed or not, with short rows (16-bit columns) or long ones
/// (32-bit).
pub(crate) fn sample() -> impl Strategy<Value = Sample> {
    let sizes =
        (prop_oneof![Just(None), (1u64..4).prop_map(Some)], 1u64..9, prop_oneof![1u64..12, Just(1), Just(70_000)]);
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::BF16), Just(Dtype::F8_E4M3), Just(Dtype::F64)];
    (sizes, any::<bool>(), dtype, prop_oneof![Just(None), (1usize..4).prop_map(Some)]).prop_flat_map(
        |((n_stacks, d_out, d_in), transposed, dtype, k)| {
            let matrix = if transposed { [d_in, d_out] } else { [d_out, d_in] };
            let is_vector = n_stacks.is_none() && !transposed && d_in == 1 && d_out % 2 == 0;
            let shape: Vec<u64> = if is_vector { vec![d_out] } else { n_stacks.into_iter().chain(matrix).collect() };
            let layout = RowLayout::new(&shape, transposed).unwrap();
            let k = k.map(|k| k.min(d_in as usize));
            let pool: Vec<u32> = (0..d_in as u32).rev().take(12).rev().collect();
            let count = match k {
                Some(k) => k..=k,
                None => 0..=pool.len(),
            };
            let rows = vec(subsequence(pool, count), layout.n_rows() as usize);
            (rows, any::<u8>()).prop_map(move |(rows, first)| {
                let mut columns = RowColumns::default();
                rows.iter().for_each(|row| columns.push_row(row));
                let n_bytes = columns.nnz() * dtype.bitsize() / 8;
                let base_values = (0..n_bytes).map(|i| first.wrapping_add(i as u8)).collect();
                Sample {
                    dtype,
                    shape: shape.clone(),
                    transposed,
                    layout,
                    uniform_k: k.map(|k| k as u64),
                    columns,
                    base_values,
                }
            })
        },
    )
}

impl Sample {
    /// The rows in runs of `step`: their columns, and the range of their positions.
    pub fn runs(&self, step: usize) -> Vec<(RowColumns, std::ops::Range<usize>)> {
        (0..self.columns.n_rows())
            .step_by(step)
            .map(|first| {
                let mut columns = RowColumns::default();
                let rows = first..self.columns.n_rows().min(first + step);
                rows.clone().for_each(|row| columns.push_row(self.columns.row(row)));
                (columns, self.columns.offsets()[rows.start]..self.columns.offsets()[rows.end])
            })
            .collect()
    }

    /// Size of one base value in bytes.
    pub fn width(&self) -> usize {
        self.dtype.bitsize() / 8
    }
}
