//! An adapter's name is its content.
//!
//! The id is the BLAKE3 of these bytes, all integers little-endian:
//!
//! ```text
//! "neuroada-ckpt adapter id v1\n"         or v2, where some target has a layout
//! scale                                   f64
//! for each target, ascending by the bytes of its name:
//!     length of the name, name            u64, bytes
//!     length of the base's dtype, dtype   u64, bytes as headers spell it, such as BF16
//!     v2: length of the layout, layout    u64, bytes, such as fp8-block; empty where the weight is plain
//!     rank, shape                         u64, u64 each
//!     transposed                          u8, 0 or 1
//!     anchor                              32 bytes
//!     length of the values' dtype, dtype  u64, bytes
//!     digest of the positions             32 bytes: BLAKE3 of, row after row, the count (u32) and the columns (u32 each)
//!     digest of the values                32 bytes: BLAKE3 of the values as stored
//! ```
//!
//! It depends on what a merge does, and on nothing else: not on the layout (`[rows, k]` or CSR), the recipe, the base's
//! name, the license or the description.

use std::{fmt, str::FromStr};

use super::AdapterError;
use crate::{
    mask::TargetInfo,
    tensor::{Dtype, RowColumns, dtype_name},
};

const DOMAINS: [&[u8]; 2] = [b"neuroada-ckpt adapter id v1\n", b"neuroada-ckpt adapter id v2\n"];

/// The content id of an adapter; ids are ordered by their bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId([u8; 32]);

impl AdapterId {
    /// The first 12 digits, for tables.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for AdapterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl fmt::Debug for AdapterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AdapterId({self})")
    }
}

impl FromStr for AdapterId {
    type Err = AdapterError;
    fn from_str(text: &str) -> Result<Self, AdapterError> {
        let hash = blake3::Hash::from_hex(text).map_err(|_| AdapterError::MalformedId(text.to_owned()))?;
        Ok(Self(*hash.as_bytes()))
    }
}

/// Computes an id, target after target in ascending order of name.
pub(super) struct IdHasher {
    hasher: blake3::Hasher,
    has_layouts: bool,
}

impl IdHasher {
    /// The id of an adapter of this scale and with these targets.
    pub(super) fn new(scale: f64, targets: &[TargetInfo]) -> Self {
        let has_layouts = targets.iter().any(|target| target.quantized.is_some());
        let mut hasher = blake3::Hasher::new();
        hasher.update(DOMAINS[usize::from(has_layouts)]).update(&scale.to_le_bytes());
        Self { hasher, has_layouts }
    }

    /// Adds a target whose rows were all hashed.
    pub(super) fn target(&mut self, info: &TargetInfo, values: Dtype, rows: &RowHasher) {
        let mut sized = |bytes: &[u8]| {
            self.hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        sized(info.name.as_bytes());
        sized(dtype_name(info.dtype).as_bytes());
        if self.has_layouts {
            sized(info.quantized.as_deref().unwrap_or_default().as_bytes());
        }
        self.hasher.update(&(info.shape.len() as u64).to_le_bytes());
        for size in &info.shape {
            self.hasher.update(&size.to_le_bytes());
        }
        self.hasher.update(&[u8::from(info.transposed)]).update(info.anchor.as_bytes());
        let values = dtype_name(values);
        self.hasher.update(&(values.len() as u64).to_le_bytes()).update(values.as_bytes());
        self.hasher.update(rows.positions.finalize().as_bytes()).update(rows.values.finalize().as_bytes());
    }

    pub(super) fn finish(self) -> AdapterId {
        AdapterId(*self.hasher.finalize().as_bytes())
    }
}

/// Hashes the rows of one target.
#[derive(Default)]
pub(super) struct RowHasher {
    positions: blake3::Hasher,
    values: blake3::Hasher,
}

impl RowHasher {
    /// Adds the next rows; `values` as stored.
    pub(super) fn rows(&mut self, columns: &RowColumns, values: &[u8]) {
        hash_positions(&mut self.positions, columns);
        self.values.update(values);
    }
}

/// Adds the next rows to a digest of positions.
pub(super) fn hash_positions(hasher: &mut blake3::Hasher, columns: &RowColumns) {
    let mut bytes = Vec::with_capacity(4 * (columns.n_rows() + columns.nnz()));
    for row in 0..columns.n_rows() {
        let row = columns.row(row);
        bytes.extend((row.len() as u32).to_le_bytes());
        bytes.extend(row.iter().flat_map(|column| column.to_le_bytes()));
    }
    hasher.update(&bytes);
}
