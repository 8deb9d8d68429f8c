//! Where every block lies, and the odds that all begin with.
//!
//! ```text
//! which kinds of values occur              u8, bit i for the i-th of BF16, F16, F32, INT8, INT4
//! for each of them: its odds               u16 each, little-endian
//! for each target, ascending by name:
//!     kind of values                       u8
//!     where rows differ in count: blocks   varint, and for each block its rows and positions, varints
//!     for each block: bytes of its code    varint
//! ```
//!
//! Where every row has `k` columns a block has `max(1, 16384 / k)` rows, the last of a target what is left. A varint is
//! LEB128: seven bits a byte, the lowest first, the highest bit set where more follow.

use std::{collections::BTreeMap, ops::Range};

use super::{
    block::{BLOCK, BlockShape, MAX_PER_BYTE, MIN_BYTES},
    values::ValueKind,
};
use crate::{mask::TargetInfo, tensor::Dtype};

/// The blocks of one target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct TargetIndex {
    pub(super) kind: ValueKind,
    /// Per block, and of what comes behind the last: row, position in the target, place in the codes.
    starts: Vec<Start>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Start {
    row: u64,
    position: u64,
    byte: u64,
}

/// All of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Index {
    pub(super) odds: BTreeMap<ValueKind, Vec<u16>>,
    /// In the order of the targets.
    pub(super) targets: Vec<TargetIndex>,
}

/// Rows of a block where each has `k` columns.
pub(super) fn rows_per_block(k: u64) -> u64 {
    (BLOCK / k).max(1)
}

impl TargetIndex {
    pub(super) fn new(kind: ValueKind, first_byte: u64) -> Self {
        Self { kind, starts: vec![Start { byte: first_byte, ..Start::default() }] }
    }

    /// Says where the first block's code lies, before there is a block.
    pub(super) fn begin_at(&mut self, first_byte: u64) {
        assert_eq!(self.n_blocks(), 0, "no block was added");
        self.starts[0].byte = first_byte;
    }

    /// Adds a block.
    pub(super) fn push(&mut self, n_rows: u64, n_positions: u64, n_bytes: u64) {
        let Start { row, position, byte } = self.starts[self.starts.len() - 1];
        self.starts.push(Start { row: row + n_rows, position: position + n_positions, byte: byte + n_bytes });
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.starts.len() - 1
    }
    /// The rows of a block.
    pub(super) fn rows(&self, block: usize) -> Range<u64> {
        self.starts[block].row..self.starts[block + 1].row
    }
    /// How many positions stand before a block.
    pub(super) fn first_position(&self, block: usize) -> u64 {
        self.starts[block].position
    }
    /// Where a block's code lies among all codes.
    pub(super) fn bytes(&self, block: usize) -> Range<u64> {
        self.starts[block].byte..self.starts[block + 1].byte
    }
    /// The block that `row` lies in.
    pub(super) fn block_of(&self, row: u64) -> usize {
        self.starts.partition_point(|start| start.row <= row) - 1
    }
    /// What is known of a block.
    pub(super) fn shape(&self, target: &TargetInfo, block: usize) -> BlockShape {
        let (start, end) = (self.starts[block], self.starts[block + 1]);
        BlockShape {
            n_rows: (end.row - start.row) as usize,
            n_positions: end.position - start.position,
            uniform_k: target.uniform_k,
            d_in: target.layout.d_in,
            kind: self.kind,
        }
    }
}

impl Index {
    pub(super) fn write(&self, targets: &[TargetInfo]) -> Vec<u8> {
        let mut bytes = vec![0u8];
        for (i, kind) in ValueKind::ALL.iter().enumerate() {
            if let Some(odds) = self.odds.get(kind) {
                bytes[0] |= 1 << i;
                bytes.extend(odds.iter().flat_map(|odds| odds.to_le_bytes()));
            }
        }
        for (target, index) in targets.iter().zip(&self.targets) {
            bytes.push(ValueKind::ALL.iter().position(|&kind| kind == index.kind).expect("it is one of all") as u8);
            if target.uniform_k.is_none() {
                put_varint(&mut bytes, index.n_blocks() as u64);
            }
            for pair in index.starts.windows(2) {
                if target.uniform_k.is_none() {
                    put_varint(&mut bytes, pair[1].row - pair[0].row);
                    put_varint(&mut bytes, pair[1].position - pair[0].position);
                }
                put_varint(&mut bytes, pair[1].byte - pair[0].byte);
            }
        }
        bytes
    }

    /// Reads an index of `targets`, whose values are of the types `dtypes`, for codes of `n_bytes` bytes.
    ///
    /// Memory: 24 bytes for each block; every block has a byte here and four bytes of code.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(bytes: &[u8], targets: &[TargetInfo], dtypes: &[Dtype], n_bytes: u64) -> Result<Self, String> {
        let mut reader = Reader(bytes);
        let mut index = Self::default();
        let occurring = reader.byte()?;
        for (i, kind) in ValueKind::ALL.into_iter().enumerate() {
            if occurring >> i & 1 == 1 {
                let odds: Result<Vec<u16>, String> =
                    (0..kind.n_odds()).map(|_| Ok(u16::from_le_bytes([reader.byte()?, reader.byte()?]))).collect();
                index.odds.insert(kind, odds?);
            }
        }
        let mut at = 0;
        for (target, &dtype) in targets.iter().zip(dtypes) {
            let of_target = reader
                .target(target, dtype, at, &index.odds)
                .map_err(|what| format!("of target \"{}\": {what}", crate::checkpoint::Printable(&target.name)))?;
            at = of_target.starts[of_target.n_blocks()].byte;
            index.targets.push(of_target);
        }
        if !reader.0.is_empty() {
            return Err(format!("{} bytes follow the last target", reader.0.len()));
        }
        if at != n_bytes {
            return Err(format!("its codes have {at} bytes, there are {n_bytes}"));
        }
        Ok(index)
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8, String> {
        let (&first, rest) = self.0.split_first().ok_or("it ends early")?;
        self.0 = rest;
        Ok(first)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if shift == 63 && byte > 1 {
                break;
            }
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("a number goes on past 64 bits".to_owned())
    }

    fn target(
        &mut self,
        target: &TargetInfo,
        dtype: Dtype,
        first_byte: u64,
        odds: &BTreeMap<ValueKind, Vec<u16>>,
    ) -> Result<TargetIndex, String> {
        let kind = usize::from(self.byte()?);
        let kind = *ValueKind::ALL.get(kind).ok_or_else(|| format!("values of the unknown kind {kind}"))?;
        let stored = if kind.quantised().is_some() { Dtype::F32 } else { dtype };
        if dtype != stored || (kind.quantised().is_none() && kind != ValueKind::of(dtype)) {
            return Err("its values are of another type".to_owned());
        }
        if !odds.contains_key(&kind) {
            return Err("the odds of its values are missing".to_owned());
        }
        let n_rows = target.layout.n_rows();
        let mut index = TargetIndex::new(kind, first_byte);
        let n_blocks = match target.uniform_k {
            Some(k) => n_rows.div_ceil(rows_per_block(k)),
            None => self.varint()?,
        };
        for block in 0..n_blocks {
            let (rows, positions) = match target.uniform_k {
                Some(k) => {
                    let rows = rows_per_block(k).min(n_rows - block * rows_per_block(k));
                    (rows, rows * k)
                }
                None => (self.varint()?, self.varint()?),
            };
            let n_bytes = self.varint()?;
            if n_bytes < MIN_BYTES {
                return Err(format!("block {block} has {n_bytes} bytes, at least {MIN_BYTES} are needed"));
            }
            if positions > n_bytes.saturating_mul(MAX_PER_BYTE) {
                return Err(format!("{n_bytes} bytes of code cannot tell {positions} deltas"));
            }
            // Decisions cost at most 11 bits each, 32 of them make a value, and a column takes no more than one.
            if n_bytes > (64 + 16 * rows.min(BLOCK)).saturating_add(positions.saturating_mul(64)) {
                return Err(format!("block {block} has {n_bytes} bytes, {positions} deltas do not need so many"));
            }
            if rows > BLOCK || (target.uniform_k.is_none() && rows == 0) {
                return Err(format!("block {block} has {rows} rows, 1 to {BLOCK} are possible"));
            }
            let end = index.starts[index.n_blocks()];
            let fits = rows <= n_rows - end.row
                && positions <= target.nnz - end.position
                && end.byte.checked_add(n_bytes).is_some();
            if !fits {
                return Err("its blocks have more than the target".to_owned());
            }
            index.push(rows, positions, n_bytes);
        }
        let end = index.starts[index.n_blocks()];
        if (end.row, end.position) != (n_rows, target.nnz) {
            let (rows, positions, nnz) = (end.row, end.position, target.nnz);
            return Err(format!("blocks of {rows} rows and {positions} deltas, there are {n_rows} and {nnz}"));
        }
        Ok(index)
    }
}

fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_all_lengths_come_back() {
        for number in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, number);
            let mut reader = Reader(&bytes);
            assert_eq!(reader.varint(), Ok(number));
            assert!(reader.0.is_empty());
        }
        assert!(Reader(&[0xff; 10]).varint().is_err());
        assert!(Reader(&[0x80; 9]).varint().is_err());
    }
}
