//! Writes coordinates as a file of NumPy's `savez`; [`crate::foreign`] reads them, and describes the arrays.

use std::path::Path;

use super::{
    ConvertError, ConvertReport,
    deltas::{Deltas, Rounder},
};
use crate::{
    checkpoint::{AtomicFile, CheckpointError, Existing, Printable},
    foreign::{Format, npy::Header, npz::PARTS, zip::ZipWriter},
    mask::TargetInfo,
    tensor::Dtype,
};

/// Writes a file of coordinates: 64-bit positions, float32 deltas (float64 for such weights).
pub(super) fn write(deltas: &Deltas<'_>, output: &Path, existing: Existing) -> Result<ConvertReport, ConvertError> {
    deltas.need(Format::Npz, "has rows and columns:", |target| {
        let name = Printable(&target.name);
        (target.shape.len() == 1).then(|| format!("\"{name}\": shape {:?} is a vector", target.shape))
    })?;
    let file = AtomicFile::create(output, existing)?;
    let io = |e| CheckpointError::io("write", output, e);
    let mut zip = ZipWriter::new(file.file());
    let mut tensors = Vec::new();
    for target in deltas.adapter.targets() {
        let mut rounder = Rounder::new(if target.dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 });
        for part in PARTS {
            zip.begin(&format!("{}.{part}.npy", target.name)).map_err(io)?;
            if part == "shape" {
                let bytes: Vec<u8> = target.shape.iter().flat_map(|size| size.to_le_bytes()).collect();
                zip.write(&Header::write("<i8", &[target.shape.len() as u64])).map_err(io)?;
                zip.write(&bytes).map_err(io)?;
            } else {
                write_array(deltas, target, part, &mut rounder, &mut zip, output)?;
            }
            zip.end().map_err(io)?;
        }
        tensors.push(deltas.converted(target, &rounder));
        deltas.ctx.observer.advance(target.nnz);
    }
    zip.finish().map_err(io)?;
    let mut report = ConvertReport::new("neuroada", Format::Npz.name(), tensors);
    report.n_bytes = file.file().metadata().map_err(io)?.len();
    file.commit()?;
    Ok(report)
}

fn write_array(
    deltas: &Deltas<'_>,
    target: &TargetInfo,
    part: &str,
    rounder: &mut Rounder,
    zip: &mut ZipWriter<'_>,
    output: &Path,
) -> Result<(), ConvertError> {
    let io = |e| CheckpointError::io("write", output, e);
    let descr = match (part, target.dtype) {
        ("values", Dtype::F64) => "<f8",
        ("values", _) => "<f4",
        _ => "<i8",
    };
    zip.write(&Header::write(descr, &[target.nnz])).map_err(io)?;
    let width = target.shape.last().copied().unwrap_or(1);
    deltas.for_each_run(target, |first_row, columns, values| {
        let mut bytes = Vec::with_capacity(8 * values.len());
        if part == "values" {
            deltas.push(target, values, rounder, &mut bytes)?;
        } else {
            for i in 0..columns.n_rows() {
                for &column in columns.row(i) {
                    let flat = target.layout.flat(first_row + i as u64, u64::from(column));
                    bytes.extend((if part == "rows" { flat / width } else { flat % width }).to_le_bytes());
                }
            }
        }
        Ok(zip.write(&bytes).map_err(io)?)
    })
}
