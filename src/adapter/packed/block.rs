//! One block: a run of rows of one target, coded by itself.
//!
//! ```text
//! where rows differ in count and columns are told:   the count of every row: its bit length (6 decisions), its other bits
//! where columns are told:                            the set of every row
//! the values, row after row: as floats, or for every 128 a scale and whole numbers
//! ```

use super::{
    range_coder::{Bit, Coder, Decoder, Encoder},
    subset::SubsetCoder,
    values::{GROUP, Group, Planes, ValueKind},
};
use crate::tensor::RowColumns;

/// Positions and rows of a block, but for single rows that have more.
pub(super) const BLOCK: u64 = 1 << 14;
/// Positions that a byte of code can tell at most: every decision costs something.
pub(super) const MAX_PER_BYTE: u64 = 4096;
/// The shortest code.
pub(super) const MIN_BYTES: u64 = 4;

/// Bytes of memory that the odds of a block take while it is coded, at most, beside its positions.
pub(super) const CODE_BYTES: u64 = 64 << 10;

/// What is known of a block before its code is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockShape {
    pub(super) n_rows: usize,
    pub(super) n_positions: u64,
    pub(super) uniform_k: Option<u64>,
    pub(super) d_in: u64,
    pub(super) kind: ValueKind,
}

/// Columns and values of a block.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Block {
    pub(super) columns: RowColumns,
    /// As the adapter stores them.
    pub(super) stored: Vec<u8>,
}

/// The values of a block on their way into a code.
pub(super) enum BlockValues<'a> {
    Stored(&'a [u8]),
    Quantised(&'a [Group]),
}

/// Codes a block; returns the code and how much of it, about, tells the columns.
pub(super) fn encode(
    shape: BlockShape,
    columns: &RowColumns,
    tell_columns: bool,
    values: &BlockValues<'_>,
    odds: &[u16],
) -> (Vec<u8>, usize) {
    let mut encoder = Encoder::new();
    if tell_columns {
        if shape.uniform_k.is_none() {
            let mut counts = CountCoder::new();
            (0..columns.n_rows()).for_each(|row| {
                counts.code(&mut encoder, columns.row(row).len() as u32);
            });
        }
        let mut subsets = SubsetCoder::default();
        let mut row_columns = Vec::new();
        for row in 0..columns.n_rows() {
            row_columns.clear();
            row_columns.extend_from_slice(columns.row(row));
            subsets.code(&mut encoder, &mut row_columns, 0, shape.d_in);
        }
    }
    let n_column_bytes = encoder.n_bytes();
    let mut planes = Planes::begin(shape.kind, odds);
    match values {
        BlockValues::Stored(stored) => planes.code_stored(&mut encoder, &mut stored.to_vec()),
        BlockValues::Quantised(groups) => {
            groups.iter().for_each(|group| planes.code_quantised(&mut encoder, &mut group.clone()));
        }
    }
    (encoder.finish(), n_column_bytes)
}

/// Reads a block; `known` holds the columns where its code does not tell them.
///
/// Memory: the block, which is no larger than its code justifies ([`MAX_PER_BYTE`]).
///
/// # Errors
/// What is wrong with it.
pub(super) fn decode(shape: BlockShape, code: &[u8], known: Option<RowColumns>, odds: &[u16]) -> Result<Block, String> {
    if shape.n_positions > MAX_PER_BYTE * code.len() as u64 {
        return Err(format!("{} bytes of code cannot tell {} deltas", code.len(), shape.n_positions));
    }
    let mut decoder = Decoder::new(code);
    let columns = match known {
        Some(columns) => columns,
        None => decode_columns(shape, &mut decoder)?,
    };
    if columns.nnz() as u64 != shape.n_positions {
        return Err(format!("its rows have {} columns, {} are listed", columns.nnz(), shape.n_positions));
    }
    let mut planes = Planes::begin(shape.kind, odds);
    let mut stored = Vec::new();
    if shape.kind.quantised().is_some() {
        for first in (0..columns.nnz()).step_by(GROUP) {
            let mut group = Group::empty(GROUP.min(columns.nnz() - first));
            planes.code_quantised(&mut decoder, &mut group);
            stored.extend(group.values().flat_map(f32::to_le_bytes));
        }
    } else {
        stored.resize(columns.nnz() * shape.kind.width(), 0);
        planes.code_stored(&mut decoder, &mut stored);
    }
    match decoder.is_finished() {
        true => Ok(Block { columns, stored }),
        false if decoder.is_exhausted() => Err("its code ends early".to_owned()),
        false => Err("its code goes on behind its last value".to_owned()),
    }
}

fn decode_columns(shape: BlockShape, decoder: &mut Decoder<'_>) -> Result<RowColumns, String> {
    let mut counts = Vec::with_capacity(shape.n_rows);
    match shape.uniform_k {
        Some(k) => counts.resize(shape.n_rows, k),
        None => {
            let mut coder = CountCoder::new();
            counts.extend((0..shape.n_rows).map(|_| u64::from(coder.code(decoder, 0))));
        }
    }
    if let Some(row) = counts.iter().position(|&count| count > shape.d_in) {
        return Err(format!("row {row} of it has {} columns, at most {} fit", counts[row], shape.d_in));
    }
    let n = counts.iter().sum::<u64>();
    if n != shape.n_positions {
        return Err(format!("its rows have {n} columns, {} are listed", shape.n_positions));
    }
    let mut subsets = SubsetCoder::default();
    let mut columns = RowColumns::with_capacity(shape.n_rows, n as usize);
    let mut row_columns = Vec::new();
    for (row, count) in counts.into_iter().enumerate() {
        row_columns.clear();
        row_columns.resize(count as usize, 0);
        subsets.code(decoder, &mut row_columns, 0, shape.d_in);
        let is_ascending = row_columns.is_sorted_by(|a, b| a < b);
        if !is_ascending || row_columns.last().is_some_and(|&column| u64::from(column) >= shape.d_in) {
            return Err(format!("row {row} of it has no set of columns below {}", shape.d_in));
        }
        if decoder.is_exhausted() {
            return Err("its code ends early".to_owned());
        }
        columns.push_row(&row_columns);
    }
    Ok(columns)
}

/// Codes how many columns rows have: the bit length by odds that learn, the bits below the highest as they are.
struct CountCoder([Bit; 64]);

impl CountCoder {
    fn new() -> Self {
        Self([Bit::new(0x8000, 0); 64])
    }

    fn code(&mut self, coder: &mut impl Coder, count: u32) -> u32 {
        let told = 32 - count.leading_zeros();
        let mut node = 1;
        for i in (0..6).rev() {
            node = node << 1 | usize::from(coder.bit(&mut self.0[node], told >> i & 1 == 1));
        }
        // A damaged code may claim 33 bits and more.
        let length = (node as u32 - 64).min(32);
        let Some(mut left) = length.checked_sub(1) else { return 0 };
        let mut found = 1u32;
        while left > 0 {
            let width = left.min(16);
            left -= width;
            found = found << width | coder.even(1 << width, count >> left & ((1 << width) - 1));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::values::Counts, *};
    use crate::mask::samples::sample;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_block_comes_back_and_damage_is_no_panic(
            sample in sample(), seed: u64, tell in any::<bool>(), kind in 0usize..5, at: prop::sample::Index, byte: u8,
        ) {
            let kind = ValueKind::ALL[kind];
            let columns = sample.columns.clone();
            let n = columns.nnz();
            let stored: Vec<u8> = (0..n as u64).flat_map(|i| {
                let value = (seed.wrapping_mul(2 * i + 1) >> 40) as f32 * 1e-5 - 80.0;
                if kind.width() == 4 { value.to_le_bytes().to_vec() } else { half::bf16::from_f32(value).to_le_bytes().to_vec() }
            }).collect();
            let shape = BlockShape {
                n_rows: columns.n_rows(), n_positions: n as u64, uniform_k: sample.uniform_k, d_in: sample.layout.d_in, kind,
            };
            let odds = Counts::new(kind).odds();
            let values: Vec<f32> = stored.chunks_exact(4).map(|le| f32::from_le_bytes(le.try_into().unwrap())).collect();
            let (expected, code) = if kind.quantised().is_some() {
                let groups: Vec<Group> = values.chunks(GROUP).map(|values| Group::quantise(kind, values)).collect();
                let expected = groups.iter().flat_map(Group::values).flat_map(f32::to_le_bytes).collect();
                (expected, encode(shape, &columns, tell, &BlockValues::Quantised(&groups), &odds).0)
            } else {
                let code = encode(shape, &columns, tell, &BlockValues::Stored(&stored), &odds).0;
                (stored, code)
            };
            let known = || (!tell).then(|| columns.clone());
            let block = decode(shape, &code, known(), &odds).unwrap();
            prop_assert_eq!(block, Block { columns: columns.clone(), stored: expected });
            // Whatever a byte becomes: an error, or another block.
            let mut damaged = code.clone();
            let at = at.index(damaged.len());
            damaged[at] = byte;
            let _either = decode(shape, &damaged, known(), &odds);
            prop_assert!(decode(shape, &[&code[..], &[0]].concat(), known(), &odds).is_err());
            prop_assert!(decode(shape, &code[..code.len() - 1], known(), &odds).is_err());
        }
    }

    #[test]
    fn counts_of_all_sizes_come_back() {
        let counts = [0u32, 1, 2, 3, 70_000, 65_535, 65_536, 1 << 31, u32::MAX, 0];
        let mut encoder = Encoder::new();
        let mut coder = CountCoder::new();
        counts.iter().for_each(|&count| assert_eq!(coder.code(&mut encoder, count), count));
        let code = encoder.finish();
        let (mut decoder, mut coder) = (Decoder::new(&code), CountCoder::new());
        counts.iter().for_each(|&count| assert_eq!(coder.code(&mut decoder, 0), count));
    }
}
