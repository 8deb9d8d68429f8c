//! Back to the adapter that was packed, byte for byte.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use super::PackedFile;
use crate::{
    adapter::AdapterError,
    checkpoint::{AtomicFile, CheckpointError, Context},
    mask::{Part, TargetInfo},
    tensor::{Dtype, RowColumns},
};

impl PackedFile {
    /// Writes the adapter to `file` and lets it appear. Memory: a block.
    pub(in crate::adapter) fn unpack(&self, ctx: &Context<'_>, file: AtomicFile) -> Result<(), AdapterError> {
        let out = Out { file: file.file(), path: file.target(), data_start: self.header.data_start() };
        out.write(0, &(self.header_json.len() as u64).to_le_bytes())?;
        out.write(8, &self.header_json)?;
        ctx.observer.begin("unpacking", self.targets.iter().map(|target| target.nnz).sum());
        for (place, target) in self.targets.iter().enumerate() {
            self.unpack_target(ctx, &out, place, target)?;
        }
        self.shard.unchanged()?;
        Ok(file.commit()?)
    }

    fn unpack_target(
        &self,
        ctx: &Context<'_>,
        out: &Out<'_>,
        place: usize,
        target: &TargetInfo,
    ) -> Result<(), AdapterError> {
        let tensor = |part: Part| self.header.tensor(&part.name(&target.name));
        let columns_info = tensor(Part::Columns).expect("targets have columns");
        let values_info = tensor(Part::Values).expect("targets have values");
        let offsets_info = tensor(Part::RowOffsets);
        let index = &self.index.targets[place];
        if let Some(info) = offsets_info {
            out.write(out.data_start + info.data.start, &integers(info.dtype, [0].into_iter()))?;
        }
        for at in 0..index.n_blocks() {
            ctx.check()?;
            let rows = index.rows(at);
            let (columns, stored) = self.read_stored(ctx, target, rows.clone())?;
            let first = index.first_position(at);
            let place = |info: &crate::checkpoint::TensorInfo, element: u64| {
                out.data_start + info.data.start + element * info.dtype.bitsize() as u64 / 8
            };
            let wider = |columns: &RowColumns| {
                integers(columns_info.dtype, columns.columns().iter().map(|&column| column.into()))
            };
            out.write(place(columns_info, first), &wider(&columns))?;
            out.write(place(values_info, first), &stored)?;
            if let Some(info) = offsets_info {
                let offsets = columns.offsets()[1..].iter().map(|&offset| first + offset as u64);
                out.write(place(info, rows.start + 1), &integers(info.dtype, offsets))?;
            }
            ctx.observer.advance(columns.nnz() as u64);
        }
        Ok(())
    }
}

struct Out<'a> {
    file: &'a File,
    path: &'a Path,
    data_start: u64,
}

impl Out<'_> {
    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file.write_all_at(bytes, at).map_err(|e| CheckpointError::io("write", self.path, e))
    }
}

/// Whole numbers as elements of a type, little-endian.
fn integers(dtype: Dtype, numbers: impl Iterator<Item = u64>) -> Vec<u8> {
    let width = dtype.bitsize() / 8;
    numbers.flat_map(|number| number.to_le_bytes().into_iter().take(width)).collect()
}
