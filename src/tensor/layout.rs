//! How a stored tensor is read as rows.

use super::{Dtype, checked_bytes, dtype_name, is_float};

/// A stored tensor seen as rows of neurons.
///
/// `[d_out, d_in]` has `d_out` rows; a stack of experts `[E, d_out, d_in]` has `E * d_out`. With `transposed` the
/// stored shape is `[d_in, d_out]` or `[E, d_in, d_out]` (GPT-2's Conv1D, gpt-oss experts), and a row is a stored
/// column. A vector `[d_out]`, such as a bias, has `d_out` rows of one element: also one per neuron.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowLayout {
    /// Number of matrices in the tensor: `E`, or 1.
    pub n_stacks: u64,
    /// Number of rows (neurons) of one matrix.
    pub d_out: u64,
    /// Length of a row.
    pub d_in: u64,
    /// Whether each matrix is stored as `[d_in, d_out]`.
    pub transposed: bool,
}

impl RowLayout {
    /// The layout of `shape`; `None` if it is not a vector, matrix or stack of matrices, or if a row would be empty. A
    /// vector cannot be stored transposed.
    pub fn new(shape: &[u64], transposed: bool) -> Option<Self> {
        let (n_stacks, first, second) = match *shape {
            [d_out] if !transposed => (1, d_out, 1),
            [first, second] => (1, first, second),
            [n_stacks, first, second] => (n_stacks, first, second),
            _ => return None,
        };
        if n_stacks == 0 || first == 0 || second == 0 {
            return None;
        }
        let (d_out, d_in) = if transposed { (second, first) } else { (first, second) };
        Some(Self { n_stacks, d_out, d_in, transposed })
    }

    /// The row layout of a tensor of floats with columns that fit in 32 bits; the error states why there is none.
    pub fn of(dtype: Dtype, shape: &[u64], transposed: bool) -> Result<Self, String> {
        if !is_float(dtype) {
            let found = dtype_name(dtype);
            return Err(format!("elements are {found}, expected F64, F32, F16, BF16, F8_E4M3 or F8_E5M2"));
        }
        let n_elements = shape.iter().try_fold(1u64, |n, &size| n.checked_mul(size));
        if n_elements.and_then(|n| checked_bytes(dtype, n)).is_none() {
            return Err(format!("shape {shape:?} overflows 64 bits"));
        }
        let layout = Self::new(shape, transposed)
            .ok_or_else(|| format!("shape {shape:?} is neither a vector, a matrix nor a stack of matrices"))?;
        if layout.d_in > u64::from(u32::MAX) {
            return Err(format!("rows have {} elements, at most {} are supported", layout.d_in, u32::MAX));
        }
        Ok(layout)
    }

    /// Total number of rows: `n_stacks * d_out`.
    pub fn n_rows(&self) -> u64 {
        self.n_stacks * self.d_out
    }

    /// Total number of elements.
    pub fn n_elements(&self) -> u64 {
        self.n_rows() * self.d_in
    }

    /// The stored position of the element at `row` and `column`, in elements from the tensor's start.
    pub fn flat(&self, row: u64, column: u64) -> u64 {
        debug_assert!(row < self.n_rows() && column < self.d_in);
        if self.transposed {
            let (stack, neuron) = (row / self.d_out, row % self.d_out);
            (stack * self.d_in + column) * self.d_out + neuron
        } else {
            row * self.d_in + column
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacks_of_experts_are_rows() {
        let layout = RowLayout::new(&[4, 6, 48], false).unwrap();
        assert_eq!((layout.n_rows(), layout.d_in), (24, 48));
        assert_eq!(layout.flat(7, 3), 7 * 48 + 3);
    }

    #[test]
    fn a_transposed_row_is_a_stored_column() {
        let layout = RowLayout::new(&[2, 3, 5], true).unwrap();
        assert_eq!((layout.n_rows(), layout.d_in), (10, 3));
        // Row 6 is neuron 1 of expert 1; column 2 is its third input.
        assert_eq!(layout.flat(6, 2), 15 + 2 * 5 + 1);
    }

    #[test]
    fn a_vector_has_one_row_per_neuron() {
        let layout = RowLayout::new(&[7], false).unwrap();
        assert_eq!((layout.n_rows(), layout.d_in, layout.flat(5, 0)), (7, 1, 5));
        assert_eq!(RowLayout::new(&[7], true), None);
    }

    #[test]
    fn scalars_and_empty_matrices_have_no_rows() {
        assert_eq!(RowLayout::new(&[], false), None);
        assert_eq!(RowLayout::new(&[0], false), None);
        assert_eq!(RowLayout::new(&[3, 0], false), None);
        assert_eq!(RowLayout::new(&[1, 2, 3, 4], false), None);
    }
}
