//! Runs of rows: borrowed weights, and chosen columns.

use super::Dtype;

/// Borrowed rows of one tensor, `[n_rows, d_in]`, row-major, little-endian, unaligned.
#[derive(Clone, Copy)]
pub struct RowBlock<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    n_rows: usize,
    d_in: usize,
}

impl<'a> RowBlock<'a> {
    /// Rows over `bytes`.
    ///
    /// # Panics
    /// If `bytes` is not exactly `n_rows * d_in` elements long.
    pub fn new(bytes: &'a [u8], dtype: Dtype, n_rows: usize, d_in: usize) -> Self {
        assert_eq!(bytes.len() * 8, n_rows * d_in * dtype.bitsize(), "a row block covers whole rows");
        Self { bytes, dtype, n_rows, d_in }
    }

    /// All rows, one after another.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
    /// The dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }
    /// Length of a row, in elements.
    pub fn d_in(&self) -> usize {
        self.d_in
    }
    /// The run `rows` of these rows.
    ///
    /// # Panics
    /// If the range is outside the rows.
    pub fn slice(&self, rows: std::ops::Range<usize>) -> RowBlock<'a> {
        let row_bytes = self.bytes.len() / self.n_rows.max(1);
        let bytes = &self.bytes[rows.start * row_bytes..rows.end * row_bytes];
        Self { bytes, n_rows: rows.len(), ..*self }
    }
    /// The bytes of one row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let row_bytes = self.bytes.len() / self.n_rows.max(1);
        &self.bytes[row * row_bytes..(row + 1) * row_bytes]
    }
}

/// Chosen columns of a run of rows, ascending within each row (CSR).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RowColumns {
    /// `[n_rows + 1]`: the columns of row `i` are `columns[offsets[i]..offsets[i + 1]]`.
    offsets: Vec<usize>,
    columns: Vec<u32>,
}

impl Default for RowColumns {
    fn default() -> Self {
        Self { offsets: vec![0], columns: Vec::new() }
    }
}

impl RowColumns {
    /// No rows yet, with the given capacity.
    pub fn with_capacity(n_rows: usize, n_columns: usize) -> Self {
        let mut offsets = Vec::with_capacity(n_rows + 1);
        offsets.push(0);
        Self { offsets, columns: Vec::with_capacity(n_columns) }
    }

    /// Rows of `k` columns each, from `[n_rows, k]`.
    ///
    /// # Panics
    /// If the length is not a multiple of `k`.
    pub fn uniform(columns: Vec<u32>, k: usize) -> Self {
        assert!(k > 0 && columns.len().is_multiple_of(k), "whole rows of k columns");
        let offsets = (0..=columns.len() / k).map(|row| row * k).collect();
        Self { offsets, columns }
    }

    /// Appends a row; the columns must ascend.
    pub fn push_row(&mut self, columns: &[u32]) {
        debug_assert!(columns.is_sorted_by(|a, b| a < b), "columns ascend within a row");
        self.columns.extend_from_slice(columns);
        self.offsets.push(self.columns.len());
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.offsets.len() - 1
    }
    /// Total number of chosen columns.
    pub fn nnz(&self) -> usize {
        self.columns.len()
    }
    /// The columns of one row, ascending.
    pub fn row(&self, row: usize) -> &[u32] {
        &self.columns[self.offsets[row]..self.offsets[row + 1]]
    }
    /// The range of one row's columns in [`Self::columns`].
    pub fn row_range(&self, row: usize) -> std::ops::Range<usize> {
        self.offsets[row]..self.offsets[row + 1]
    }
    /// The row to which element `at` of [`Self::columns`] belongs.
    pub fn row_of(&self, at: usize) -> usize {
        self.offsets.partition_point(|&offset| offset <= at) - 1
    }
    /// All columns, row by row.
    pub fn columns(&self) -> &[u32] {
        &self.columns
    }
    /// `[n_rows + 1]` offsets into [`Self::columns`].
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }
    /// The number of columns per row; `None` if rows differ.
    pub fn uniform_k(&self) -> Option<usize> {
        let k = *self.offsets.get(1)?;
        self.offsets.windows(2).all(|pair| pair[1] - pair[0] == k).then_some(k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_their_columns() {
        let mut rows = RowColumns::default();
        rows.push_row(&[1, 4]);
        rows.push_row(&[]);
        rows.push_row(&[0]);
        assert_eq!((rows.n_rows(), rows.nnz()), (3, 3));
        assert_eq!(rows.row(0), [1, 4]);
        assert_eq!(rows.row(1), [0u32; 0]);
        assert_eq!(rows.row(2), [0]);
        assert_eq!(rows.uniform_k(), None);
        assert_eq!(RowColumns::uniform(vec![0, 1, 5, 9], 2).uniform_k(), Some(2));
    }
}
