//! Codes that lie row by row, with scales for blocks of rows and columns: FP8, INT8, MXFP4, MXFP6, MXFP8, NVFP4, packed integers.

use std::ops::Range;

use super::{Sink, Source, Stored, grid::Grid, row_pieces};
use crate::{
    checkpoint::CheckpointError,
    tensor::{CodeType, RowLayout, bits_at},
};

/// Elements that are decoded at a time, so that they stay in the first-level cache.
const CHUNK: usize = 512;
/// `1 / 127` as bitsandbytes has it.
const BNB_INT8: f32 = 7.874_016e-3;

/// Codes row by row, and what makes numbers of them.
#[derive(Debug)]
pub(super) struct RowCodes {
    pub(super) codes: Stored,
    pub(super) code_type: CodeType,
    /// Bytes from one row to the next.
    pub(super) row_bytes: u64,
    pub(super) packing: Packing,
    pub(super) layout: RowLayout,
    pub(super) scales: Grid,
    pub(super) zeros: Option<Zeros>,
    pub(super) global: Global,
    /// `[d_in]`: the group of each column, where columns were reordered.
    pub(super) group_of: Option<Vec<u32>>,
    /// `[d_in]`: factors of the columns.
    pub(super) factors: Option<Vec<f32>>,
}

/// Where the codes of a row are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Packing {
    /// In bytes of their own, one element after the other.
    Within,
    /// Of two rows that share their bytes, the even one in the low halves (ModelOpt's INT4); two's complement.
    RowPairs,
}

/// A second scale for all blocks of a weight.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Global {
    None,
    /// A block's scale is multiplied by this (ModelOpt).
    Times(f32),
    /// A block's scale is divided by this (compressed-tensors).
    Over(f32),
    /// The product of code and scale is divided by 127 (bitsandbytes).
    Over127,
}

/// Zero points, packed along the rows of a matrix: `[ceil(d_out * n_bits / 32), n_columns]` words.
#[derive(Debug)]
pub(super) struct Zeros {
    pub(super) stored: Stored,
    pub(super) n_bits: u32,
}

impl Zeros {
    /// Words of one matrix.
    pub(super) fn n_words(n_bits: u32, d_out: u64) -> u64 {
        (d_out * u64::from(n_bits)).div_ceil(32)
    }

    /// The zero points of `rows` of a matrix, `[n, n_columns]`.
    fn read(
        &self,
        source: Source<'_>,
        layout: &RowLayout,
        stack: u64,
        rows: Range<u64>,
        n_columns: u64,
    ) -> Result<Vec<f32>, CheckpointError> {
        let n_bits = u64::from(self.n_bits);
        let first_word = rows.start * n_bits / 32;
        let end_word = (rows.end * n_bits).div_ceil(32);
        let first = stack * Self::n_words(self.n_bits, layout.d_out);
        let row_bytes = n_columns * 4;
        let words = self.stored.read(source, (first + first_word) * row_bytes..(first + end_word) * row_bytes)?;
        let half = (1i32 << (self.n_bits - 1)) as f32;
        let mut zeros = Vec::with_capacity(((rows.end - rows.start) * n_columns) as usize);
        let n_words = (end_word - first_word) as usize;
        // One column's stream after the other would be read row by row; two words hold any element.
        for row in rows {
            let at = row * n_bits - first_word * 32;
            let (word, shift) = ((at / 32) as usize, at % 32);
            for column in 0..n_columns as usize {
                let mut pair = [0; 8];
                for (half, le) in pair.chunks_exact_mut(4).enumerate().filter(|(half, _)| word + half < n_words) {
                    let from = ((word + half) * n_columns as usize + column) * 4;
                    le.copy_from_slice(&words[from..from + 4]);
                }
                zeros.push(bits_at(&pair, shift, self.n_bits) as f32 - half);
            }
        }
        Ok(zeros)
    }
}

impl RowCodes {
    /// Decodes a run of elements, at least one.
    pub(super) fn decode(
        &self,
        source: Source<'_>,
        elements: Range<u64>,
        sink: &mut Sink,
    ) -> Result<(), CheckpointError> {
        let RowLayout { d_out, d_in, .. } = self.layout;
        let mut pieces = row_pieces(elements, d_in).peekable();
        while let Some(&(first, _)) = pieces.peek() {
            // One matrix of a stack after the other: scales belong to matrices.
            let (stack, mut of_stack) = (first / d_out, Vec::new());
            while let Some(piece) = pieces.next_if(|(row, _)| row / d_out == stack) {
                of_stack.push(piece);
            }
            self.decode_matrix(source, stack, &of_stack, sink)?;
        }
        Ok(())
    }

    /// Decodes pieces of consecutive rows of one matrix.
    fn decode_matrix(
        &self,
        source: Source<'_>,
        stack: u64,
        pieces: &[(u64, Range<u64>)],
        sink: &mut Sink,
    ) -> Result<(), CheckpointError> {
        let (Some((first, _)), Some((last, _))) = (pieces.first(), pieces.last()) else { return Ok(()) };
        let within = |row: u64| row - stack * self.layout.d_out;
        let start = self.offset(*first);
        let codes = self.codes.window(source, start..self.offset(*last) + self.row_bytes)?;
        let rows = within(*first)..within(*last) + 1;
        let mut scales = self.scales.read(source, stack, rows.clone())?;
        self.apply_global(&mut scales);
        let n_columns = self.scales.n_columns as usize;
        let zeros = match &self.zeros {
            Some(zeros) => zeros.read(source, &self.layout, stack, rows.clone(), self.scales.n_columns)?,
            None => Vec::new(),
        };
        for (row, columns) in pieces {
            let at = (self.offset(*row) - start) as usize;
            let block_row = (self.scales.block_row(within(*row)) - self.scales.block_row(rows.start)) as usize;
            let scales = &scales[block_row * n_columns..][..n_columns];
            let zeros =
                zeros.get((row - first) as usize * n_columns..).map(|zeros| &zeros[..n_columns.min(zeros.len())]);
            let codes = &codes[at..at + self.row_bytes as usize];
            self.decode_row(codes, within(*row), columns.clone(), scales, zeros.unwrap_or_default(), sink);
        }
        self.codes.confirm(source, &codes)
    }

    /// Where the bytes of a row begin.
    fn offset(&self, row: u64) -> u64 {
        match self.packing {
            Packing::Within => row * self.row_bytes,
            Packing::RowPairs => row / 2 * self.row_bytes,
        }
    }

    fn apply_global(&self, scales: &mut [f32]) {
        match self.global {
            Global::None | Global::Over127 => {}
            Global::Times(factor) => scales.iter_mut().for_each(|scale| *scale *= factor),
            Global::Over(divisor) => scales.iter_mut().for_each(|scale| *scale /= divisor),
        }
    }

    fn decode_row(&self, codes: &[u8], row: u64, columns: Range<u64>, scales: &[f32], zeros: &[f32], sink: &mut Sink) {
        let mut numbers = [0.0; CHUNK];
        let mut first = columns.start as usize;
        while first < columns.end as usize {
            let n = CHUNK.min(columns.end as usize - first);
            let numbers = &mut numbers[..n];
            match self.packing {
                Packing::Within => self.code_type.numbers(codes, first, numbers),
                Packing::RowPairs => {
                    for (number, &code) in numbers.iter_mut().zip(&codes[first..]) {
                        let nibble = if row.is_multiple_of(2) { code << 4 } else { code & 0xf0 };
                        *number = f32::from(nibble.cast_signed() >> 4);
                    }
                }
            }
            self.scale(first, numbers, scales, zeros);
            if let Some(factors) = &self.factors {
                numbers.iter_mut().zip(&factors[first..]).for_each(|(number, factor)| *number *= factor);
            }
            sink.push(numbers);
            first += n;
        }
    }

    /// Makes numbers of the codes of the columns from `first` on.
    fn scale(&self, first: usize, numbers: &mut [f32], scales: &[f32], zeros: &[f32]) {
        if let Some(group_of) = &self.group_of {
            for (number, &group) in numbers.iter_mut().zip(&group_of[first..]) {
                let zero = zeros.get(group as usize).copied().unwrap_or(0.0);
                *number = (*number - zero) * scales[group as usize];
            }
            return;
        }
        let block = self.scales.block_columns as usize;
        let (mut column, mut rest) = (first, numbers);
        while !rest.is_empty() {
            let group = column / block;
            let n = rest.len().min((group + 1) * block - column);
            let (run, later) = rest.split_at_mut(n);
            if let Some(&zero) = zeros.get(group) {
                run.iter_mut().for_each(|number| *number -= zero);
            }
            let scale = scales[group];
            run.iter_mut().for_each(|number| *number *= scale);
            if self.global == Global::Over127 {
                run.iter_mut().for_each(|number| *number *= BNB_INT8);
            }
            (column, rest) = (column + n, later);
        }
    }
}
