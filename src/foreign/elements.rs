//! Numbers of one kind, one after the other or evenly spaced, in somebody's file.

use std::{ops::Range, sync::Arc};

use half::{bf16, f16};

use super::input::Input;
use crate::{
    checkpoint::CheckpointError,
    tensor::{Dtype, dtype_name},
};

/// `n` numbers in a file, `stride` elements from one to the next.
#[derive(Clone, Debug)]
pub(crate) struct Elements {
    pub(crate) input: Arc<Input>,
    pub(crate) dtype: Dtype,
    /// Where the first lies.
    pub(crate) start: u64,
    pub(crate) stride: u64,
    pub(crate) n: u64,
}

/// Numbers of which every so many'th is wanted are read with those between up to this stride, else one by one.
const CLOSE: u64 = 16;

impl Elements {
    /// The bytes of the elements `range`, without those between.
    fn read(&self, range: Range<u64>) -> Result<Vec<u8>, CheckpointError> {
        assert!(range.start <= range.end && range.end <= self.n, "elements that are there");
        let (width, n) = (self.dtype.bitsize() as u64 / 8, range.end - range.start);
        if n == 0 {
            return Ok(Vec::new());
        }
        let start = self.start + range.start * self.stride * width;
        if self.stride == 1 {
            return self.input.read(start..start + n * width);
        }
        let mut bytes = vec![0; (n * width) as usize];
        if self.stride > CLOSE {
            for (i, element) in bytes.chunks_exact_mut(width as usize).enumerate() {
                self.input.read_at(element, start + i as u64 * self.stride * width)?;
            }
            return Ok(bytes);
        }
        let all = self.input.read(start..start + ((n - 1) * self.stride + 1) * width)?;
        let step = (self.stride * width) as usize;
        for (i, element) in bytes.chunks_exact_mut(width as usize).enumerate() {
            element.copy_from_slice(&all[i * step..][..width as usize]);
        }
        Ok(bytes)
    }

    /// Whether the elements can be positions.
    pub(crate) fn are_positions(&self) -> bool {
        matches!(self.dtype, Dtype::I64 | Dtype::I32 | Dtype::U32 | Dtype::U64 | Dtype::U16 | Dtype::F32)
    }

    /// Whether the elements can be deltas.
    pub(crate) fn are_deltas(&self) -> bool {
        matches!(self.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    /// Appends the elements `range` as positions.
    ///
    /// # Errors
    /// One that is negative, or no whole number (PEFT on Windows stores positions as floats), with its index.
    ///
    /// # Panics
    /// Where they are no positions.
    pub(crate) fn positions(&self, range: Range<u64>, into: &mut Vec<u64>) -> Result<(), CheckpointError> {
        let bytes = self.read(range.clone())?;
        let before = into.len();
        let width = self.dtype.bitsize() / 8;
        for (i, le) in bytes.chunks_exact(width).enumerate() {
            let wide = |fill: u8| {
                let mut wide = [fill; 8];
                wide[..width].copy_from_slice(le);
                wide
            };
            let position = match self.dtype {
                Dtype::U16 | Dtype::U32 | Dtype::U64 => Some(u64::from_le_bytes(wide(0))),
                Dtype::F32 => {
                    let x = f32::from_le_bytes([le[0], le[1], le[2], le[3]]);
                    // Beyond 2^24 floats skip whole numbers.
                    (x >= 0.0 && x.fract() == 0.0 && x <= 16_777_216.0).then_some(x as u64)
                }
                _ => {
                    let fill = if le[width - 1] & 0x80 == 0 { 0 } else { 0xff };
                    u64::try_from(i64::from_le_bytes(wide(fill))).ok()
                }
            };
            let Some(position) = position else {
                let at = self.start + (range.start + i as u64) * self.stride * width as u64;
                let dtype = dtype_name(self.dtype);
                return Err(self.input.bad(at, format!("an element of {dtype} that is no position")));
            };
            into.push(position);
        }
        debug_assert_eq!(into.len() - before, (range.end - range.start) as usize);
        Ok(())
    }

    /// Appends the elements `range` as deltas, widened exactly.
    ///
    /// # Panics
    /// Where they are no deltas.
    pub(crate) fn deltas(&self, range: Range<u64>, into: &mut Vec<f64>) -> Result<(), CheckpointError> {
        let bytes = self.read(range)?;
        match self.dtype {
            Dtype::F64 => into.extend(bytes.as_chunks::<8>().0.iter().map(|le| f64::from_le_bytes(*le))),
            Dtype::F32 => into.extend(bytes.as_chunks::<4>().0.iter().map(|le| f64::from(f32::from_le_bytes(*le)))),
            Dtype::F16 => into.extend(bytes.as_chunks::<2>().0.iter().map(|le| f16::from_le_bytes(*le).to_f64())),
            Dtype::BF16 => into.extend(bytes.as_chunks::<2>().0.iter().map(|le| bf16::from_le_bytes(*le).to_f64())),
            other => unreachable!("deltas are floats, not {other:?}"),
        }
        Ok(())
    }
}
