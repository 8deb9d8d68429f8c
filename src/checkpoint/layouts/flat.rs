//! Codes in blocks that run on across the ends of rows: bitsandbytes' NF4 and FP4.

use std::ops::Range;

use super::{Sink, Source, Stored};
use crate::checkpoint::CheckpointError;

/// Elements that are decoded at a time.
const CHUNK: u64 = 512;

/// Two codes in a byte, the first in the high half; a table of 16 numbers, and a scale for each block.
#[derive(Debug)]
pub(super) struct FlatCodes {
    pub(super) codes: Stored,
    pub(super) table: [f32; 16],
    /// Elements of a block.
    pub(super) block: u64,
    pub(super) scales: FlatScales,
}

/// The scales of blocks.
#[derive(Debug)]
pub(super) enum FlatScales {
    /// A float32 each.
    Plain(Stored),
    /// A code each, with scales of their own: `table[code] * scales[block / block_size] + offset`.
    Nested {
        /// The codes.
        codes: Stored,
        /// Their numbers.
        table: Vec<f32>,
        /// Their scales.
        scales: Vec<f32>,
        /// Codes that share one.
        block: u64,
        /// What is added.
        offset: f32,
    },
}

impl FlatScales {
    fn read(&self, source: Source<'_>, blocks: Range<u64>) -> Result<Vec<f32>, CheckpointError> {
        match self {
            Self::Plain(stored) => {
                let bytes = stored.read(source, 4 * blocks.start..4 * blocks.end)?;
                Ok(super::grid::ScaleType::F32.numbers(&bytes))
            }
            Self::Nested { codes, table, scales, block, offset } => {
                let bytes = codes.read(source, blocks.clone())?;
                let number =
                    |(at, &code): (u64, &u8)| table[usize::from(code)] * scales[(at / block) as usize] + offset;
                Ok(blocks.zip(&bytes).map(number).collect())
            }
        }
    }
}

impl FlatCodes {
    /// Decodes a run of elements, at least one.
    pub(super) fn decode(
        &self,
        source: Source<'_>,
        elements: Range<u64>,
        sink: &mut Sink,
    ) -> Result<(), CheckpointError> {
        let first_byte = elements.start / 2;
        let codes = self.codes.window(source, first_byte..elements.end.div_ceil(2))?;
        let first_block = elements.start / self.block;
        let scales = self.scales.read(source, first_block..(elements.end - 1) / self.block + 1)?;
        let mut numbers = [0.0; CHUNK as usize];
        for start in elements.clone().step_by(CHUNK as usize) {
            let run = start..elements.end.min(start + CHUNK);
            let numbers = &mut numbers[..(run.end - run.start) as usize];
            for (at, number) in run.zip(numbers.iter_mut()) {
                let pair = codes[(at / 2 - first_byte) as usize];
                let code = if at.is_multiple_of(2) { pair >> 4 } else { pair & 15 };
                *number = self.table[usize::from(code)] * scales[(at / self.block - first_block) as usize];
            }
            sink.push(numbers);
        }
        self.codes.confirm(source, &codes)
    }
}
