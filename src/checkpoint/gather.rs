//! Reads the base's values at chosen positions, with as few bytes read as is efficient.

use super::{Checkpoint, CheckpointError, Context, TensorRef, Window, window_cost};
use crate::tensor::{RowColumns, RowLayout};

/// Positions closer than this, in bytes, are read together: a second read costs more than the bytes in between.
const GAP_BYTES: u64 = 32 << 10;
/// Pieces up to this size are read into a buffer; larger ones are windows.
const SMALL_PIECE: u64 = 64 << 10;

/// A source of base values: the file itself, or the originals beneath the merges in it.
pub trait BaseValues {
    /// The values of `tensor` at the chosen columns of the rows from `first_row`, as stored. `first_row` is a multiple
    /// of 64, and so is the number of rows, unless they end the tensor.
    ///
    /// # Errors
    /// A failure to read.
    /// A failure to read.
    fn gather(
        &self,
        ctx: &Context<'_>,
        tensor: TensorRef<'_>,
        layout: RowLayout,
        first_row: u64,
        columns: &RowColumns,
    ) -> Result<Vec<u8>, CheckpointError>;
}

/// The values of the file itself, unless something was merged into it.
impl BaseValues for Checkpoint {
    fn gather(
        &self,
        ctx: &Context<'_>,
        tensor: TensorRef<'_>,
        layout: RowLayout,
        first_row: u64,
        columns: &RowColumns,
    ) -> Result<Vec<u8>, CheckpointError> {
        gather_rows(ctx, tensor, layout, first_row, columns)
    }
}

/// Reads the elements of `tensor` at the chosen columns of a run of rows.
///
/// Row `i` of `columns` is row `first_row + i` of `layout`. Returns `nnz` elements as stored, little-endian, row by
/// row in the order of the columns. Rows and pages without chosen columns are skipped.
///
/// Memory: the result, [`gather_cost`], and for transposed layouts 16 bytes per position; callers bound it by the
/// number of rows per call. Transposed rows are scattered over the whole matrix, so a few large runs read less than
/// many small ones.
///
/// # Errors
/// A failure to read, or [`CheckpointError::Cancelled`].
///
/// # Panics
/// If a position is outside `layout`, or `layout` does not match the tensor.
pub fn gather_rows(
    ctx: &Context<'_>,
    tensor: TensorRef<'_>,
    layout: RowLayout,
    first_row: u64,
    columns: &RowColumns,
) -> Result<Vec<u8>, CheckpointError> {
    assert_eq!(layout.n_elements(), tensor.info.n_elements(), "the layout matches the tensor");
    assert!(first_row + columns.n_rows() as u64 <= layout.n_rows(), "the rows lie inside the tensor");
    assert!(columns.columns().iter().all(|&column| u64::from(column) < layout.d_in), "the columns lie inside the rows");
    let element_bytes = tensor.info.n_bytes() / layout.n_elements();
    let mut gathered = vec![0; columns.nnz() * element_bytes as usize];
    let positions = (0..columns.n_rows())
        .flat_map(|i| columns.row(i).iter().map(move |&column| layout.flat(first_row + i as u64, u64::from(column))))
        .enumerate()
        .map(|(slot, flat)| (flat, slot));
    let mut piece = Piece { ctx, tensor, element_bytes, positions: Vec::new(), buffer: Vec::new() };
    if layout.transposed {
        let mut sorted: Vec<(u64, usize)> = positions.collect();
        sorted.sort_unstable();
        piece.gather(sorted.into_iter(), &mut gathered)?;
    } else {
        piece.gather(positions, &mut gathered)?;
    }
    Ok(gathered)
}

/// Maximum bytes of memory that [`gather_rows`] uses beyond those per position.
pub fn gather_cost(ctx: &Context<'_>) -> u64 {
    // One window, and the positions in it.
    2 * window_cost(ctx.window_bytes())
}

/// A run of positions close enough to be read together.
struct Piece<'a> {
    ctx: &'a Context<'a>,
    tensor: TensorRef<'a>,
    element_bytes: u64,
    /// Element index in the tensor, ascending, and its slot in the result.
    positions: Vec<(u64, usize)>,
    buffer: Vec<u8>,
}

impl Piece<'_> {
    fn gather(
        &mut self,
        ascending: impl Iterator<Item = (u64, usize)>,
        gathered: &mut [u8],
    ) -> Result<(), CheckpointError> {
        // A piece never has more positions than fit a window, so that the list stays small in comparison.
        let most = self.ctx.window_bytes();
        for (flat, slot) in ascending {
            if let (Some(&(first, _)), Some(&(last, _))) = (self.positions.first(), self.positions.last()) {
                let gap = (flat - last) * self.element_bytes;
                let whole = (flat - first + 1) * self.element_bytes;
                if gap > GAP_BYTES || whole > most || self.positions.len() as u64 * 16 >= most {
                    self.read(gathered)?;
                }
            }
            self.positions.push((flat, slot));
        }
        self.read(gathered)
    }

    fn read(&mut self, gathered: &mut [u8]) -> Result<(), CheckpointError> {
        let (Some(&(first, _)), Some(&(last, _))) = (self.positions.first(), self.positions.last()) else {
            return Ok(());
        };
        self.ctx.check()?;
        let (start, end) = (first * self.element_bytes, (last + 1) * self.element_bytes);
        let TensorRef { shard, info, .. } = self.tensor;
        let window;
        let bytes: &[u8] = if end - start <= SMALL_PIECE && self.tensor.layout().is_none() {
            window = Window::owned(Vec::new());
            self.buffer.resize((end - start) as usize, 0);
            shard.read_at(&mut self.buffer, shard.file_range(info).start + start)?;
            &self.buffer
        } else {
            window = self.tensor.window(self.ctx, start..end)?;
            &window
        };
        let n = self.element_bytes as usize;
        for (flat, slot) in self.positions.drain(..) {
            let at = (flat - first) as usize * n;
            gathered[slot * n..(slot + 1) * n].copy_from_slice(&bytes[at..at + n]);
        }
        shard.confirm(&window)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        checkpoint::{Checkpoint, Existing, Io, TensorFileWriter},
        tensor::Dtype,
    };

    /// A file with one tensor "w" of 32-bit elements that count up from 0.
    fn counting(shape: &[u64]) -> (tempfile::TempDir, Checkpoint) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let mut file = TensorFileWriter::create(&path, Existing::Keep).unwrap();
        let w = file.add_tensor("w".to_owned(), Dtype::F32);
        let n = shape.iter().product::<u64>() as u32;
        file.append(w, &(0..n).flat_map(u32::to_le_bytes).collect::<Vec<_>>()).unwrap();
        file.finish_tensor(w, shape.to_vec());
        file.finish(&Context::default(), &BTreeMap::new()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        (folder, checkpoint)
    }

    fn check(shape: &[u64], transposed: bool, first_row: u64, rows: &[&[u32]], max_memory: u64) {
        let (_folder, checkpoint) = counting(shape);
        let layout = RowLayout::new(shape, transposed).unwrap();
        let mut columns = RowColumns::default();
        rows.iter().for_each(|row| columns.push_row(row));
        let expected: Vec<u8> = rows
            .iter()
            .enumerate()
            .flat_map(|(i, row)| row.iter().map(move |&c| layout.flat(first_row + i as u64, c.into()) as u32))
            .flat_map(u32::to_le_bytes)
            .collect();
        for io in [Io::Auto, Io::Direct, Io::Read] {
            let ctx = Context { max_memory, io, ..Context::default() };
            let gathered = gather_rows(&ctx, checkpoint.tensor("w").unwrap(), layout, first_row, &columns).unwrap();
            assert_eq!(gathered, expected);
        }
    }

    #[test]
    fn elements_come_in_row_and_column_order() {
        check(&[4, 3], false, 1, &[&[0, 2], &[], &[1]], 1 << 20);
        check(&[4, 3], true, 0, &[&[3], &[0, 1], &[2]], 1 << 20);
        check(&[2, 3, 5], true, 4, &[&[0, 2], &[1], &[]], 1 << 20);
        check(&[2, 2], false, 0, &[&[], &[]], 1 << 20);
    }

    #[test]
    fn far_positions_and_small_windows_change_nothing() {
        // A row is 400 KB, so positions span many windows of 64 KiB and gaps larger than a window.
        let far: Vec<u32> = (0..100).map(|i| i * 1000).collect();
        let close: Vec<u32> = (0..50_000).step_by(7).collect();
        for transposed in [false, true] {
            let shape = if transposed { [100_000, 3] } else { [3, 100_000] };
            check(&shape, transposed, 0, &[&far, &close, &[99_999]], 1);
            check(&shape, transposed, 1, &[&close, &[0, 99_999]], 1 << 30);
        }
    }
}
