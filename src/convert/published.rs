//! Writes a folder as the published NeuroAda code leaves it; [`crate::foreign`] reads it, and describes the files.

use std::{
    collections::BTreeSet,
    io::{BufWriter, Write},
    path::Path,
};

use super::{
    ConvertError, ConvertReport, ConvertedTensor,
    deltas::{Deltas, Rounder},
    pickle_writer::{PickleWriter, nested_storage_head},
};
use crate::{
    checkpoint::{AtomicDir, CheckpointError, Existing, Printable, create_folders, create_new_file, probe},
    foreign::{
        Format,
        npy::Header,
        published::{POSITIONS, VALUES},
        zip::ZipWriter,
    },
    mask::TargetInfo,
    tensor::{Dtype, dtype_name, projection_kind},
};

const ARGUMENTS: &str = "tunable_para/args.json";

/// Writes a folder of the published code. Its values have the type of the weights: what does not fit is rounded and counted.
pub(super) fn write(deltas: &Deltas<'_>, output: &Path, existing: Existing) -> Result<ConvertReport, ConvertError> {
    deltas.need_matrices(Format::Published)?;
    deltas.need(
        Format::Published,
        "holds deltas in the weight's type, which torch saves no such storage of:",
        |target| {
            let is_known = matches!(target.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
            (!is_known).then(|| format!("\"{}\": {}", Printable(&target.name), dtype_name(target.dtype)))
        },
    )?;
    let folder = AtomicDir::create(output, existing)?;
    let parameters = folder.path().join("tunable_para");
    create_folders(&parameters)?;
    write_positions(deltas, &folder.path().join(POSITIONS))?;
    let tensors = write_values(deltas, &folder.path().join(VALUES))?;
    let arguments = folder.path().join(ARGUMENTS);
    let io = |e| CheckpointError::io("write", &arguments, e);
    let file = create_new_file(&arguments)?;
    (&file).write_all(arguments_json(deltas).as_bytes()).map_err(io)?;
    file.sync_all().map_err(|e| CheckpointError::io("sync", &arguments, e))?;
    let mut report = ConvertReport::new("neuroada", Format::Published.name(), tensors);
    for name in [POSITIONS, VALUES, ARGUMENTS] {
        report.n_bytes += probe::n_bytes(&folder.path().join(name))?;
    }
    folder.commit()?;
    Ok(report)
}

/// What the published code remembers of its command line: entries per row, where all rows have as many, and the kinds of modules.
fn arguments_json(deltas: &Deltas<'_>) -> String {
    let targets = deltas.adapter.targets();
    let kinds: BTreeSet<&str> = targets.iter().map(|target| projection_kind(&target.name)).collect();
    let k = targets[0].uniform_k.filter(|&k| targets.iter().all(|target| target.uniform_k == Some(k)));
    let json = serde_json::json!({ "peft_type": "perCell_mag_add", "target_modules": kinds, "times_num": k });
    json.to_string()
}

/// Writes the positions of all targets as one pickled dictionary of `[nnz, 2]` tensors, in NumPy's frame.
fn write_positions(deltas: &Deltas<'_>, path: &Path) -> Result<(), ConvertError> {
    let io = |e| CheckpointError::io("write", path, e);
    let file = create_new_file(path)?;
    let mut out = BufWriter::with_capacity(1 << 20, &file);
    out.write_all(&Header::write("|O", &[])).map_err(io)?;
    let mut pickle = PickleWriter::new(4);
    // The old name of the module: NumPy 2 knows both, NumPy 1 this one.
    pickle.name("numpy.core.multiarray", "_reconstruct").name("numpy", "ndarray").ops(b"K\0\x85C\x01b\x87R(K\x01)");
    pickle.name("numpy", "dtype").text("O8").ops(b"\x89\x88\x87R(K\x03").text("|").ops(b"NNN");
    pickle.ops(b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89]}(");
    for target in deltas.adapter.targets() {
        pickle.text(&target.name).name("torch._utils", "_rebuild_tensor_v2").ops(b"(");
        pickle.name("torch.storage", "_load_from_bytes");
        let head = nested_storage_head(Dtype::I64, 2 * target.nnz);
        let n_bytes = head.len() as u64 + 16 * target.nnz;
        match u32::try_from(n_bytes) {
            Ok(n) => pickle.ops(b"B").ops(&n.to_le_bytes()),
            Err(_) => pickle.ops(b"\x8e").ops(&n_bytes.to_le_bytes()),
        };
        pickle.ops(&head);
        out.write_all(&std::mem::take(&mut pickle.bytes)).map_err(io)?;
        deltas.for_each_run(target, |first_row, columns, _| {
            let mut bytes = Vec::with_capacity(16 * columns.nnz());
            for i in 0..columns.n_rows() {
                for &column in columns.row(i) {
                    bytes.extend((first_row + i as u64).to_le_bytes());
                    bytes.extend(u64::from(column).to_le_bytes());
                }
            }
            Ok(out.write_all(&bytes).map_err(io)?)
        })?;
        pickle.ops(b"\x85R").rest_of_tensor(&[target.nnz, 2]);
    }
    pickle.ops(b"uatb.");
    out.write_all(&pickle.bytes).map_err(io)?;
    out.flush().map_err(io)?;
    drop(out);
    Ok(file.sync_all().map_err(|e| CheckpointError::io("sync", path, e))?)
}

/// Writes the values of all targets as `torch.save` does.
fn write_values(deltas: &Deltas<'_>, path: &Path) -> Result<Vec<ConvertedTensor>, ConvertError> {
    let io = |e| CheckpointError::io("write", path, e);
    let file = create_new_file(path)?;
    let mut zip = ZipWriter::new(&file);
    let put = |zip: &mut ZipWriter<'_>, name: &str, bytes: &[u8]| {
        zip.begin(&format!("state_dict_tunable/{name}"))?;
        zip.write(bytes)?;
        zip.end()
    };
    let targets = deltas.adapter.targets();
    put(&mut zip, "data.pkl", &values_pickle(targets)).map_err(io)?;
    put(&mut zip, "byteorder", b"little").map_err(io)?;
    let mut tensors = Vec::new();
    for (key, target) in targets.iter().enumerate() {
        let mut rounder = Rounder::new(target.dtype);
        zip.begin(&format!("state_dict_tunable/data/{key}")).map_err(io)?;
        deltas.for_each_run(target, |_, _, values| {
            let mut bytes = Vec::with_capacity(8 * values.len());
            deltas.push(target, values, &mut rounder, &mut bytes)?;
            Ok(zip.write(&bytes).map_err(io)?)
        })?;
        zip.end().map_err(io)?;
        tensors.push(deltas.converted(target, &rounder));
        deltas.ctx.observer.advance(target.nnz);
    }
    put(&mut zip, "version", b"3\n").map_err(io)?;
    zip.finish().map_err(io)?;
    file.sync_all().map_err(|e| CheckpointError::io("sync", path, e))?;
    Ok(tensors)
}

/// The pickle of a state dictionary whose tensors lie in `data/0`, `data/1`, …
fn values_pickle(targets: &[TargetInfo]) -> Vec<u8> {
    let mut pickle = PickleWriter::new(2);
    pickle.ops(b"}(");
    for (key, target) in targets.iter().enumerate() {
        pickle.text(&format!("{}_new", target.name)).name("torch._utils", "_rebuild_parameter");
        pickle.name("torch._utils", "_rebuild_tensor_v2").ops(b"(");
        pickle.storage(target.dtype, &key.to_string(), target.nnz, b"").rest_of_tensor(&[target.nnz]);
        pickle.ops(b"\x88").name("collections", "OrderedDict").ops(b")R\x87R");
    }
    pickle.ops(b"u.");
    pickle.bytes
}
