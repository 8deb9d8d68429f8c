//! Integers packed along the columns of a matrix that is stored as `[d_in, d_out]`: GPTQ and AWQ.

use std::ops::Range;

use super::{Sink, Source, Stored, grid::ScaleType};
use crate::{
    checkpoint::CheckpointError,
    tensor::{RowLayout, bits_at},
};

/// Where AWQ's word has the eight columns that it holds, in units of four bits.
const AWQ_PLACES: [u64; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// How integers share words of 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WordPacking {
    /// Weights: `[d_in * n_bits / 32, d_out]`, a stream along the inputs. Zero points: `[n_groups, d_out * n_bits / 32]`.
    Gptq,
    /// Weights: `[d_in, d_out / 8]`, eight outputs in a word, interleaved. Zero points alike.
    Awq,
}

/// Such integers, and what makes numbers of them: `(code - zero) * scale`.
#[derive(Debug)]
pub(super) struct ColumnCodes {
    pub(super) codes: Stored,
    pub(super) zeros: Stored,
    pub(super) scales: Stored,
    pub(super) scale_type: ScaleType,
    pub(super) packing: WordPacking,
    pub(super) n_bits: u32,
    pub(super) layout: RowLayout,
    pub(super) group_size: u64,
    pub(super) n_groups: u64,
    /// What is added to stored zero points.
    pub(super) zero_offset: u32,
    /// `[d_in]`: the group of each column, where columns were reordered.
    pub(super) group_of: Option<Vec<u32>>,
}

/// Words of consecutive rows of a stored matrix, some of its columns.
struct Words {
    bytes: Vec<u8>,
    n_columns: usize,
}

impl Words {
    fn get(&self, row: usize, column: usize) -> u64 {
        let at = (row * self.n_columns + column) * 4;
        self.bytes.get(at..at + 4).map_or(0, |le| u64::from(u32::from_le_bytes(le.try_into().expect("four bytes"))))
    }
}

impl ColumnCodes {
    /// Decodes a run of elements, at least one.
    pub(super) fn decode(
        &self,
        source: Source<'_>,
        elements: Range<u64>,
        sink: &mut Sink,
    ) -> Result<(), CheckpointError> {
        let d_in = self.layout.d_in;
        let rows = elements.start / d_in..(elements.end - 1) / d_in + 1;
        let columns = if rows.end - rows.start == 1 {
            elements.start - rows.start * d_in..elements.end - rows.start * d_in
        } else {
            0..d_in
        };
        let (codes, first_code) = self.codes(source, &rows, &columns)?;
        let scales = self.scales(source, &rows)?;
        let (zeros, first_zero) = self.zeros(source, &rows)?;
        let n_rows = (rows.end - rows.start) as usize;
        let mut line = Vec::with_capacity((columns.end - columns.start) as usize);
        for (i, row) in rows.clone().enumerate() {
            let factors: Vec<(f32, f32)> = (0..self.n_groups as usize)
                .map(|group| {
                    let zero = self.zero(&zeros, group, row, first_zero) + self.zero_offset;
                    (zero as f32, scales[group * n_rows + i])
                })
                .collect();
            line.clear();
            for column in columns.clone() {
                let group = match &self.group_of {
                    Some(group_of) => group_of[column as usize] as usize,
                    None => (column / self.group_size) as usize,
                };
                let (zero, scale) = factors[group];
                let code = self.code(&codes, row - first_code.0, column - first_code.1);
                line.push((code as f32 - zero) * scale);
            }
            // The first and the last row may be wanted in part.
            let wanted = elements.start.max(row * d_in + columns.start)..elements.end.min(row * d_in + columns.end);
            let base = row * d_in + columns.start;
            sink.push(&line[(wanted.start - base) as usize..(wanted.end - base) as usize]);
        }
        Ok(())
    }

    /// The words that hold the codes of these rows and columns, and the row and the column that they begin with.
    fn codes(
        &self,
        source: Source<'_>,
        rows: &Range<u64>,
        columns: &Range<u64>,
    ) -> Result<(Words, (u64, u64)), CheckpointError> {
        let d_out = self.layout.d_out;
        let (row_words, lines, within, first) = match self.packing {
            WordPacking::Gptq => {
                // Thirty-two integers end with a word, whatever their width.
                let start = columns.start / 32 * 32;
                let n_bits = u64::from(self.n_bits);
                let lines = start * n_bits / 32..(columns.end * n_bits).div_ceil(32);
                (d_out, lines, rows.clone(), (rows.start, start))
            }
            WordPacking::Awq => {
                let within = rows.start / 8..rows.end.div_ceil(8);
                (d_out / 8, columns.clone(), within, (rows.start / 8 * 8, columns.start))
            }
        };
        let bytes = self.codes.rectangle(source, row_words * 4, lines, within.start * 4..within.end * 4)?;
        Ok((Words { bytes, n_columns: (within.end - within.start) as usize }, first))
    }

    fn code(&self, words: &Words, row: u64, column: u64) -> u32 {
        match self.packing {
            WordPacking::Gptq => {
                let at = column * u64::from(self.n_bits);
                let (line, shift) = ((at / 32) as usize, at % 32);
                let pair = words.get(line, row as usize) | words.get(line + 1, row as usize) << 32;
                bits_at(&pair.to_le_bytes(), shift, self.n_bits)
            }
            WordPacking::Awq => {
                let word = words.get(column as usize, (row / 8) as usize);
                (word >> (4 * AWQ_PLACES[(row % 8) as usize]) & 15) as u32
            }
        }
    }

    /// The scales of these rows: `[n_groups, n_rows]`.
    fn scales(&self, source: Source<'_>, rows: &Range<u64>) -> Result<Vec<f32>, CheckpointError> {
        let width = self.scale_type.n_bytes();
        let (row_bytes, within) = (self.layout.d_out * width, rows.start * width..rows.end * width);
        let bytes = self.scales.rectangle(source, row_bytes, 0..self.n_groups, within)?;
        Ok(self.scale_type.numbers(&bytes))
    }

    /// The words of zero points of these rows, a line for each group, and the row that they begin with.
    fn zeros(&self, source: Source<'_>, rows: &Range<u64>) -> Result<(Words, u64), CheckpointError> {
        let n_bits = u64::from(self.n_bits);
        let start = rows.start / 32 * 32;
        let within = start * n_bits / 32..(rows.end * n_bits).div_ceil(32);
        let row_words = self.layout.d_out * n_bits / 32;
        let bytes = self.zeros.rectangle(source, row_words * 4, 0..self.n_groups, within.start * 4..within.end * 4)?;
        Ok((Words { bytes, n_columns: (within.end - within.start) as usize }, start))
    }

    fn zero(&self, words: &Words, group: usize, row: u64, first: u64) -> u32 {
        let at = row - first;
        match self.packing {
            WordPacking::Gptq => {
                let bit = at * u64::from(self.n_bits);
                let (word, shift) = ((bit / 32) as usize, bit % 32);
                let high = if word + 1 < words.n_columns { words.get(group, word + 1) << 32 } else { 0 };
                bits_at(&(words.get(group, word) | high).to_le_bytes(), shift, self.n_bits)
            }
            WordPacking::Awq => {
                (words.get(group, (at / 8) as usize) >> (4 * AWQ_PLACES[(at % 8) as usize]) & 15) as u32
            }
        }
    }
}
