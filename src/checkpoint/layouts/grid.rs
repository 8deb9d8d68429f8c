//! Scales: one number for each block of a weight.

use std::ops::Range;

use super::{Source, Stored};
use crate::{
    checkpoint::{CheckpointError, TensorInfo},
    tensor::{Dtype, F8E4M3, RowLayout, dtype_name, e8m0},
};
use half::{bf16, f16};

/// The sides of blocks that are tried where a config names none.
const USUAL_SIDES: [u64; 4] = [128, 64, 32, 16];

/// How a scale is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ScaleType {
    F32,
    F16,
    BF16,
    /// A power of two by its exponent, stored as F8_E8M0 or U8.
    E8M0,
    E4M3,
}

impl ScaleType {
    pub(super) fn of(dtype: Dtype) -> Result<Self, String> {
        match dtype {
            Dtype::F32 => Ok(Self::F32),
            Dtype::F16 => Ok(Self::F16),
            Dtype::BF16 => Ok(Self::BF16),
            Dtype::F8_E8M0 | Dtype::U8 => Ok(Self::E8M0),
            Dtype::F8_E4M3 => Ok(Self::E4M3),
            other => {
                Err(format!("scales are {}; F32, F16, BF16, F8_E8M0, U8 or F8_E4M3 are needed", dtype_name(other)))
            }
        }
    }

    pub(super) fn n_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::E8M0 | Self::E4M3 => 1,
        }
    }

    /// The numbers of stored scales.
    pub(super) fn numbers(self, bytes: &[u8]) -> Vec<f32> {
        let halves = |to_f32: fn(u16) -> f32| {
            bytes.chunks_exact(2).map(|le| to_f32(u16::from_le_bytes([le[0], le[1]]))).collect()
        };
        match self {
            Self::F32 => {
                bytes.chunks_exact(4).map(|le| f32::from_le_bytes(le.try_into().expect("four bytes"))).collect()
            }
            Self::F16 => halves(|bits| f16::from_bits(bits).to_f32()),
            Self::BF16 => halves(|bits| bf16::from_bits(bits).to_f32()),
            Self::E8M0 => bytes.iter().map(|&code| e8m0(code)).collect(),
            Self::E4M3 => bytes.iter().map(|&code| F8E4M3::from_bits(code).to_f32()).collect(),
        }
    }
}

/// Scales of a weight `[.., d_out, d_in]`: one for each block of rows and columns, the last ones of which may be partial.
#[derive(Debug)]
pub(super) struct Grid {
    stored: Stored,
    dtype: ScaleType,
    /// Whether each matrix of a stack has scales of its own.
    is_per_stack: bool,
    /// Blocks of one matrix.
    n_rows: u64,
    pub(super) n_columns: u64,
    /// Rows and columns of a block.
    block_rows: u64,
    pub(super) block_columns: u64,
}

impl Grid {
    /// The scales `info` of a weight read as `layout`. `block` is the config's `[rows, columns]` of a block.
    ///
    /// # Errors
    /// Why shape or type cannot be that of its scales.
    pub(super) fn new(
        stored: Stored,
        info: &TensorInfo,
        layout: &RowLayout,
        block: Option<[u64; 2]>,
    ) -> Result<Self, String> {
        let dtype = ScaleType::of(info.dtype)?;
        let misfit = || {
            let RowLayout { n_stacks, d_out, d_in, .. } = layout;
            let stack = if *n_stacks > 1 { format!("{n_stacks}, ") } else { String::new() };
            format!(
                "scales \"{}\" have shape {:?}, which does not divide a weight [{stack}{d_out}, {d_in}] into blocks",
                crate::checkpoint::Printable(&info.name),
                info.shape
            )
        };
        let (is_per_stack, n_rows, n_columns) = sides(&info.shape, layout).ok_or_else(misfit)?;
        let block_rows = side(layout.d_out, n_rows, block.map(|block| block[0])).ok_or_else(misfit)?;
        let block_columns = side(layout.d_in, n_columns, block.map(|block| block[1])).ok_or_else(misfit)?;
        Ok(Self { stored, dtype, is_per_stack, n_rows, n_columns, block_rows, block_columns })
    }

    /// How the scales are stored.
    pub(super) fn dtype(&self) -> ScaleType {
        self.dtype
    }

    /// Whether there is one scale for all of a matrix.
    pub(super) fn is_single(&self) -> bool {
        (self.n_rows, self.n_columns) == (1, 1)
    }

    /// Whether there is one scale for each row.
    pub(super) fn is_by_rows(&self) -> bool {
        self.block_rows == 1 && self.n_columns == 1
    }

    /// Columns of a block, where each row has blocks of its own.
    pub(super) fn group(&self) -> Option<u64> {
        (self.block_rows == 1 && self.n_columns > 1).then_some(self.block_columns)
    }

    /// The row of blocks that a row of a matrix belongs to.
    pub(super) fn block_row(&self, row: u64) -> u64 {
        row / self.block_rows
    }

    /// The scales of the blocks that `rows` of matrix `stack` touch: `[n, n_columns]`.
    pub(super) fn read(&self, source: Source<'_>, stack: u64, rows: Range<u64>) -> Result<Vec<f32>, CheckpointError> {
        let first = if self.is_per_stack { stack * self.n_rows } else { 0 };
        let (start, end) = (first + self.block_row(rows.start), first + self.block_row(rows.end - 1) + 1);
        let row_bytes = self.n_columns * self.dtype.n_bytes();
        Ok(self.dtype.numbers(&self.stored.read(source, start * row_bytes..end * row_bytes)?))
    }
}

/// Whether scales of this shape are per matrix of a stack, and their rows and columns for one matrix.
fn sides(shape: &[u64], layout: &RowLayout) -> Option<(bool, u64, u64)> {
    let RowLayout { n_stacks, d_out, .. } = *layout;
    if shape.iter().product::<u64>() == 1 {
        return Some((false, 1, 1));
    }
    match *shape {
        // ModelOpt keeps the places of sums.
        [rows, 1, columns, 1] => Some((false, rows, columns)),
        [rows] if n_stacks == 1 && rows == d_out => Some((false, rows, 1)),
        [stacks] if stacks == n_stacks => Some((true, 1, 1)),
        [rows, columns] if n_stacks == 1 => Some((false, rows, columns)),
        [stacks, rows] if stacks == n_stacks && rows == d_out => Some((true, rows, 1)),
        [stacks, 1] if stacks == n_stacks => Some((true, 1, 1)),
        [stacks, rows, columns] if stacks == n_stacks => Some((true, rows, columns)),
        _ => None,
    }
    .filter(|(_, rows, columns)| *rows > 0 && *columns > 0)
}

/// The side of blocks that divide `length` into `n`: the config's, else a usual one, else the one that divides it evenly.
fn side(length: u64, n: u64, configured: Option<u64>) -> Option<u64> {
    if n == 1 {
        return Some(length);
    }
    if n == length {
        return Some(1);
    }
    let fits = |side: &u64| *side > 0 && length.div_ceil(*side) == n;
    match configured {
        Some(side) => Some(side).filter(fits),
        None => USUAL_SIDES.into_iter().find(fits).or_else(|| length.is_multiple_of(n).then(|| length / n)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(shape: &[u64], weight: &[u64], block: Option<[u64; 2]>) -> Option<(u64, u64)> {
        let layout = RowLayout::new(weight, false).unwrap();
        let info = TensorInfo { name: "s".to_owned(), dtype: Dtype::F32, shape: shape.to_vec(), data: 0..0 };
        let grid = Grid::new(Stored { shard: 0, tensor: 0 }, &info, &layout, block).ok()?;
        Some((grid.block_rows, grid.block_columns))
    }

    #[test]
    fn blocks_follow_from_the_shapes() {
        let block = Some([128, 128]);
        assert_eq!(grid(&[2, 2], &[130, 200], block), Some((128, 128)), "partial blocks");
        assert_eq!(grid(&[2, 2], &[130, 200], None), Some((128, 128)), "never blocks of 65 rows");
        assert_eq!(grid(&[66, 5], &[66, 100], None), Some((1, 20)));
        assert_eq!(grid(&[3, 2], &[130, 200], block), None);
        assert_eq!(grid(&[3, 1, 1], &[3, 40, 72], block), Some((40, 72)));
        assert_eq!(grid(&[3, 1], &[3, 40, 72], None), Some((40, 72)));
        assert_eq!(grid(&[3, 40], &[3, 40, 72], None), Some((1, 72)));
        assert_eq!(grid(&[2, 1, 2, 1], &[256, 200], block), Some((128, 128)));
        assert_eq!(grid(&[], &[66, 100], None), Some((66, 100)));
        assert_eq!(grid(&[66, 1], &[66, 100], None), Some((1, 100)));
        assert_eq!(grid(&[66], &[66, 100], block), Some((1, 100)));
        assert_eq!(grid(&[66, 4], &[66, 128], None), Some((1, 32)));
        assert_eq!(grid(&[65, 4], &[66, 128], None), None);
        assert_eq!(grid(&[0, 4], &[66, 128], None), None);
    }
}
