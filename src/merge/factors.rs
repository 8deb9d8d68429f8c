//! Factors on disk, read as the matrices that a product needs.

use std::ops::Range;

use crate::{
    checkpoint::{CheckpointError, Shard, TensorInfo},
    tensor::{Float, widened},
};

/// A pass over a file reads at most this many bytes at once.
const MAX_BYTES: u64 = 4 << 20;

/// A matrix that lies in a tensor with any strides, in elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'a> {
    pub(super) shard: &'a Shard,
    pub(super) info: &'a TensorInfo,
    /// The element of row 0, column 0.
    pub(super) start: u64,
    pub(super) row_stride: u64,
    pub(super) column_stride: u64,
}

impl<'a> Matrix<'a> {
    /// A tensor's elements as `[.., row_len]`, row-major.
    pub(super) fn rows(shard: &'a Shard, info: &'a TensorInfo, row_len: u64) -> Self {
        Self { shard, info, start: 0, row_stride: row_len, column_stride: 1 }
    }
    /// The same matrix with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }
    /// The same matrix from another element on.
    pub(super) fn from(self, row: u64, column: u64) -> Self {
        Self { start: self.start + row * self.row_stride + column * self.column_stride, ..self }
    }

    /// Reads `rows` and `columns`, widened exactly, row-major. Memory: the result and a buffer of 4 MiB.
    pub(super) fn read(&self, rows: Range<u64>, columns: Range<u64>) -> Result<Vec<f32>, CheckpointError> {
        let (n_rows, n_columns) = ((rows.end - rows.start) as usize, (columns.end - columns.start) as usize);
        let mut read = vec![0.0; n_rows * n_columns];
        if read.is_empty() {
            return Ok(read);
        }
        let base = self.start + rows.start * self.row_stride + columns.start * self.column_stride;
        let mut buffer = Buffer { shard: self.shard, info: self.info, bytes: Vec::new() };
        let span = (n_rows as u64 - 1) * self.row_stride + (n_columns as u64 - 1) * self.column_stride + 1;
        let width = self.info.dtype.bitsize() as u64 / 8;
        if span <= 2 * read.len() as u64 && span * width <= MAX_BYTES {
            buffer.load(base, span)?;
            for (row, read) in read.chunks_exact_mut(n_columns).enumerate() {
                buffer.pick(row * self.row_stride as usize, self.column_stride as usize, read.iter_mut());
            }
        } else if self.row_stride >= self.column_stride {
            for (row, read) in (0..).zip(read.chunks_exact_mut(n_columns)) {
                let at = base + row * self.row_stride;
                buffer.gather(at, self.column_stride, n_columns, read.iter_mut())?;
            }
        } else {
            for column in 0..n_columns {
                let at = base + column as u64 * self.column_stride;
                buffer.gather(at, self.row_stride, n_rows, read[column..].iter_mut().step_by(n_columns))?;
            }
        }
        Ok(read)
    }
}

struct Buffer<'a> {
    shard: &'a Shard,
    info: &'a TensorInfo,
    bytes: Vec<u8>,
}

impl Buffer<'_> {
    /// Loads `n` elements from element `at` on.
    fn load(&mut self, at: u64, n: u64) -> Result<(), CheckpointError> {
        let width = self.info.dtype.bitsize() as u64 / 8;
        self.bytes.resize((n * width) as usize, 0);
        self.shard.read_at(&mut self.bytes, self.shard.file_range(self.info).start + at * width)
    }

    /// Takes every `stride`th of the loaded elements, from the one `first` on.
    fn pick<'b>(&self, first: usize, stride: usize, to: impl Iterator<Item = &'b mut f32>) {
        fn pick<'b, T: Float<Acc = f32>>(
            bytes: &[u8],
            first: usize,
            stride: usize,
            to: impl Iterator<Item = &'b mut f32>,
        ) {
            let from = bytes[first * T::BYTES..].chunks(stride * T::BYTES);
            to.zip(from).for_each(|(to, element)| *to = T::from_le(element).widen());
        }
        match self.info.dtype {
            crate::tensor::Dtype::F32 => pick::<f32>(&self.bytes, first, stride, to),
            crate::tensor::Dtype::BF16 => pick::<half::bf16>(&self.bytes, first, stride, to),
            crate::tensor::Dtype::F16 => pick::<half::f16>(&self.bytes, first, stride, to),
            other => unreachable!("factors are F32, BF16 or F16, not {other:?}"),
        }
    }

    /// Reads `n` elements `stride` apart, piece by piece.
    fn gather<'b>(
        &mut self,
        at: u64,
        stride: u64,
        n: usize,
        mut to: impl Iterator<Item = &'b mut f32>,
    ) -> Result<(), CheckpointError> {
        let width = self.info.dtype.bitsize() as u64 / 8;
        let most = ((MAX_BYTES / width - 1) / stride + 1).max(1) as usize;
        for first in (0..n).step_by(most) {
            let n_piece = most.min(n - first);
            self.load(at + first as u64 * stride, (n_piece as u64 - 1) * stride + 1)?;
            self.pick(0, stride as usize, to.by_ref().take(n_piece));
        }
        Ok(())
    }
}

/// Reads the elements `range` of a tensor, widened exactly as far as float32 goes.
pub(super) fn read_f32(shard: &Shard, info: &TensorInfo, range: Range<u64>) -> Result<Vec<f32>, CheckpointError> {
    let width = info.dtype.bitsize() as u64 / 8;
    let mut bytes = vec![0; ((range.end - range.start) * width) as usize];
    shard.read_at(&mut bytes, shard.file_range(info).start + range.start * width)?;
    Ok(widened(info.dtype, &bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        checkpoint::{Context, Existing, TensorFileWriter},
        tensor::Dtype,
    };

    #[test]
    fn matrices_are_read_with_any_strides() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let mut file = TensorFileWriter::create(&path, Existing::Keep).unwrap();
        let id = file.add_tensor("t".to_owned(), Dtype::F32);
        file.append(id, &(0..6000u16).flat_map(|i| f32::from(i).to_le_bytes()).collect::<Vec<u8>>()).unwrap();
        file.finish_tensor(id, vec![60, 100]);
        file.finish(&Context::default(), &BTreeMap::new()).unwrap();
        let shard = Shard::open(&path).unwrap();
        let info = shard.header().tensor("t").unwrap();
        let matrix = Matrix::rows(&shard, info, 100);
        assert_eq!(matrix.read(2..4, 5..7).unwrap(), [205.0, 206.0, 305.0, 306.0]);
        assert_eq!(matrix.transposed().read(5..7, 2..4).unwrap(), [205.0, 305.0, 206.0, 306.0]);
        assert_eq!(matrix.from(1, 1).read(0..1, 0..2).unwrap(), [101.0, 102.0]);
        let strided = Matrix { start: 3, row_stride: 100, column_stride: 20, ..matrix };
        assert_eq!(strided.read(0..2, 0..3).unwrap(), [3.0, 23.0, 43.0, 103.0, 123.0, 143.0]);
        assert_eq!(strided.transposed().read(0..3, 0..2).unwrap(), [3.0, 103.0, 23.0, 123.0, 43.0, 143.0]);
        assert_eq!(matrix.read(0..60, 0..100).unwrap().len(), 6000);
    }
}
