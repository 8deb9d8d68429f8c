//! Writes folders that PEFT loads as SHiRA or Super-Tuning, and its fork as SpIEL.
//!
//! SHiRA and Super-Tuning allow for no number of entries but the one that their config makes of a layer's shape. So the config asks
//! for the smallest that is enough for every layer, and each layer is filled up with entries of -0 on a position that it
//! has already: entries of one position are summed, and adding -0 changes nothing, not even a zero's sign.

use std::{collections::BTreeMap, io::Write, path::Path};

use serde_json::{Value, json};

use super::{
    ConvertError, ConvertReport, ConvertedTensor,
    deltas::{Deltas, Rounder},
};
use crate::{
    checkpoint::{AtomicDir, CheckpointError, Existing, Printable, TensorFileWriter, TensorId, create_new_file, probe},
    foreign::{Format, PEFT_CONFIG, PEFT_TENSORS},
    mask::TargetInfo,
    tensor::{Dtype, dtype_name},
    weights::{Axes, WeightMap, family_axes, is_embedding},
};

/// What fills a layer up.
const PADDING: f32 = -0.0;
/// Positions are 32-bit integers with a sign.
const MAX_POSITIONS: u64 = i32::MAX as u64;

/// Writes a folder in one of the three formats. Deltas are float32, as PEFT stores them; what PEFT rounds when it adds them counts as
/// rounded.
pub(super) fn write(
    deltas: &Deltas<'_>,
    base: Option<&WeightMap<'_>>,
    format: Format,
    output: &Path,
    existing: Existing,
) -> Result<ConvertReport, ConvertError> {
    deltas.need_matrices(format)?;
    deltas.need(format, "holds weights of linear layers only:", |target| {
        let is_weight = target.name.ends_with(".weight");
        (!is_weight).then(|| format!("\"{}\": no module's weight", Printable(&target.name)))
    })?;
    if format != Format::Spiel {
        need_linear(deltas, base, format)?;
    }
    deltas.need(format, "holds 32-bit positions:", |target| {
        let n = target.layout.n_elements();
        let is_long = format != Format::Shira && n > MAX_POSITIONS;
        is_long
            .then(|| format!("\"{}\": {n} elements, at most {MAX_POSITIONS} have a position", Printable(&target.name)))
    })?;
    let (config, lengths) = match format {
        Format::Shira => shira(deltas)?,
        Format::SuperTuning => super_tuning(deltas)?,
        _ => spiel(deltas),
    };
    let folder = AtomicDir::create(output, existing)?;
    let tensors_path = folder.path().join(PEFT_TENSORS);
    let mut file = TensorFileWriter::create(&tensors_path, Existing::Keep)?;
    let mut tensors = Vec::new();
    for (target, &n) in deltas.adapter.targets().iter().zip(&lengths) {
        tensors.push(write_target(deltas, format, target, n, &mut file)?);
        deltas.ctx.observer.advance(target.nnz);
    }
    file.finish(deltas.ctx, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    let config_path = folder.path().join(PEFT_CONFIG);
    write_config(&config_path, &config)?;
    let mut report = ConvertReport::new("neuroada", format.name(), tensors);
    for path in [&tensors_path, &config_path] {
        report.n_bytes += probe::n_bytes(path)?;
    }
    folder.commit()?;
    if format != Format::Spiel {
        let sum: u64 = lengths.iter().sum();
        let n = sum - deltas.adapter.nnz();
        report
            .remarks
            .push(format!("{n} of {sum} entries are padding: {} needs a fixed number for each layer", format.name()));
    }
    if format == Format::SuperTuning && report.n_rounded > 0 {
        report.remarks.push("PEFT rounds Super-Tuning's deltas to the weights' type before it adds them".to_owned());
    }
    Ok(report)
}

/// Fails where PEFT would not load the folder: its sparse methods take `nn.Linear` modules, of types that it can add to.
///
/// Source: PEFT 0.21, `ShiraModel._create_new_module` and `SupertuningModel._create_new_module`.
fn need_linear(deltas: &Deltas<'_>, base: Option<&WeightMap<'_>>, format: Format) -> Result<(), ConvertError> {
    deltas.need(format, "holds weights that PEFT can add to:", |target| {
        let (name, dtype) = (Printable(&target.name), dtype_name(target.dtype));
        let is_known = matches!(target.dtype, Dtype::F64 | Dtype::F32 | Dtype::BF16 | Dtype::F16);
        (!is_known).then(|| format!("\"{name}\": the weight is {dtype}"))
    })?;
    let adapter = deltas.adapter;
    let (mut problems, mut needs_base) = (Vec::new(), false);
    for target in adapter.targets() {
        let stored = base.and_then(|base| Some((base, base.checkpoint().tensor(&target.name)?)));
        let axes = match stored {
            Some((base, tensor)) => base.axes(tensor).ok().map(|(axes, _)| axes),
            None => family_axes(adapter.base().model_type.as_deref(), &target.name),
        };
        let what = match axes {
            _ if is_embedding(&target.name) => "an embedding",
            Some(Axes::OutIn) => continue,
            Some(Axes::InOut) => "stored as [d_in, d_out], a Conv1D",
            None => {
                needs_base |= stored.is_none();
                "nothing tells whether it is an nn.Linear or a Conv1D"
            }
        };
        problems.push(format!("\"{}\": {what}", Printable(&target.name)));
    }
    if problems.is_empty() {
        return Ok(());
    }
    let (path, format) = (adapter.path().to_owned(), format.name());
    Err(ConvertError::NotLinear { path, format, problems, needs_base })
}

fn write_config(path: &Path, config: &Value) -> Result<(), CheckpointError> {
    let io = |e| CheckpointError::io("write", path, e);
    let mut file = create_new_file(path)?;
    let json = serde_json::to_string_pretty(config).expect("strings and numbers serialise");
    file.write_all(json.as_bytes()).map_err(io)?;
    file.sync_all().map_err(|e| CheckpointError::io("sync", path, e))
}

/// Names of the modules, all of them: endings would also name layers that have no deltas.
fn modules<'a>(deltas: &Deltas<'a>) -> Vec<&'a str> {
    deltas.adapter.targets().iter().map(module).collect()
}

fn module(target: &TargetInfo) -> &str {
    target.name.strip_suffix(".weight").unwrap_or(&target.name)
}

/// One `r` for all layers, each of which then has `r * (in + out)` entries.
fn shira(deltas: &Deltas<'_>) -> Result<(Value, Vec<u64>), ConvertError> {
    let targets = deltas.adapter.targets();
    let sides = |target: &TargetInfo| target.layout.d_in + target.layout.n_rows();
    let r = targets.iter().map(|target| target.nnz.div_ceil(sides(target))).max().unwrap_or(0).max(1);
    deltas.need(Format::Shira, &format!("needs r = {r} for all layers:"), |target| {
        let (n, most) = (r * sides(target), target.layout.n_elements());
        (n > most).then(|| format!("\"{}\": has {most} elements, r = {r} asks for {n}", Printable(&target.name)))
    })?;
    let config = json!({
        "auto_mapping": null, "base_model_name_or_path": null, "fan_in_fan_out": false, "inference_mode": true,
        "init_weights": true, "mask_type": "custom", "modules_to_save": null, "peft_type": "SHIRA", "r": r,
        "random_seed": null, "revision": null, "target_modules": modules(deltas), "task_type": null,
    });
    Ok((config, targets.iter().map(|target| r * sides(target)).collect()))
}

/// One sparsity for all layers, each of which then has `int(elements * (1 - sparsity))` entries, in float64.
fn super_tuning(deltas: &Deltas<'_>) -> Result<(Value, Vec<u64>), ConvertError> {
    let targets = deltas.adapter.targets();
    let length = |target: &TargetInfo, sparsity: f64| (target.layout.n_elements() as f64 * (1.0 - sparsity)) as u64;
    let wanted = |target: &TargetInfo| target.nnz.max(1);
    let is_enough = |sparsity: f64| targets.iter().all(|target| length(target, sparsity) >= wanted(target));
    let density = |target: &TargetInfo| wanted(target) as f64 / target.layout.n_elements() as f64;
    let mut sparsity = 1.0 - targets.iter().map(density).fold(0.0, f64::max);
    // The product may fall short of a whole number by a few units in the last place.
    for _ in 0..1000 {
        if is_enough(sparsity) || sparsity <= 0.0 {
            break;
        }
        sparsity = (sparsity - f64::EPSILON).max(0.0);
    }
    assert!(is_enough(sparsity), "with no sparsity every element has an entry");
    let config = json!({
        "auto_mapping": null, "base_model_name_or_path": null, "inference_mode": true, "init_weights": true,
        "lora_alpha": null, "lora_dropout": 0.0, "modules_to_save": null, "peft_type": "SUPERTUNING", "r": null,
        "revision": null, "save_precomputed_indices": true, "select_top": true, "sparsity": sparsity,
        "target_modules": modules(deltas), "task_type": null,
    });
    Ok((config, targets.iter().map(|target| length(target, sparsity)).collect()))
}

/// The number of entries of each layer.
fn spiel(deltas: &Deltas<'_>) -> (Value, Vec<u64>) {
    let targets = deltas.adapter.targets();
    let counts: BTreeMap<&str, u64> = targets.iter().map(|target| (module(target), target.nnz)).collect();
    let config = json!({
        "base_model_name_or_path": null, "dtype": "float32", "inference_mode": true, "modules_to_save": null,
        "num_deltas": counts, "peft_type": "SFT", "revision": null, "target_modules": modules(deltas), "task_type": null,
    });
    (config, targets.iter().map(|target| target.nnz).collect())
}

/// Writes one module's `n` entries.
fn write_target(
    deltas: &Deltas<'_>,
    format: Format,
    target: &TargetInfo,
    n: u64,
    file: &mut TensorFileWriter,
) -> Result<ConvertedTensor, ConvertError> {
    let prefix = format!("base_model.model.{}", module(target));
    let (values_name, positions_name) = match format {
        Format::Shira => ("shira_weight", "shira_indices"),
        Format::SuperTuning => ("supertuning_values", "supertuning_indices"),
        _ => ("sft_delta.values", "sft_delta.indices"),
    };
    let values = file.add_tensor(format!("{prefix}.{values_name}"), Dtype::F32);
    let positions = file.add_tensor(format!("{prefix}.{positions_name}"), Dtype::I32);
    let mut rounder = Rounder::new(Dtype::F32);
    if format == Format::SuperTuning {
        // PEFT rounds them to the weight's type whenever it adds them; SHiRA adds a matrix of float32 and rounds the sum.
        rounder = rounder.applied_as(target.dtype);
    }
    deltas.for_each_run(target, |_, _, scaled| {
        let mut bytes = Vec::with_capacity(4 * scaled.len());
        deltas.push(target, scaled, &mut rounder, &mut bytes)?;
        Ok(file.append(values, &bytes)?)
    })?;
    let padding = n - target.nnz;
    pad(file, values, padding, PADDING.to_le_bytes())?;
    let d_in = target.layout.d_in;
    if format == Format::Shira {
        let first = write_positions(deltas, target, file, positions, |row, _| row)?;
        pad(file, positions, padding, ((first / d_in) as u32).to_le_bytes())?;
        write_positions(deltas, target, file, positions, |_, column| column)?;
        pad(file, positions, padding, ((first % d_in) as u32).to_le_bytes())?;
        file.finish_tensor(positions, vec![2, n]);
    } else {
        let first = write_positions(deltas, target, file, positions, |row, column| row * d_in + column)?;
        pad(file, positions, padding, (first as u32).to_le_bytes())?;
        file.finish_tensor(positions, vec![n]);
    }
    file.finish_tensor(values, vec![n]);
    let converted = deltas.converted(target, &rounder);
    Ok(ConvertedTensor { n_written: n, n_padding: padding, ..converted })
}

/// Writes what `of` makes of every row and column; returns the first position, flat, or 0 where there is none.
fn write_positions(
    deltas: &Deltas<'_>,
    target: &TargetInfo,
    file: &mut TensorFileWriter,
    id: TensorId,
    of: impl Fn(u64, u64) -> u64,
) -> Result<u64, ConvertError> {
    let mut first = None;
    deltas.for_each_run(target, |first_row, columns, _| {
        let mut bytes = Vec::with_capacity(4 * columns.nnz());
        for i in 0..columns.n_rows() {
            let row = first_row + i as u64;
            for &column in columns.row(i) {
                first.get_or_insert(row * target.layout.d_in + u64::from(column));
                bytes.extend((of(row, u64::from(column)) as u32).to_le_bytes());
            }
        }
        Ok(file.append(id, &bytes)?)
    })?;
    Ok(first.unwrap_or(0))
}

/// Appends the same element `n` times.
fn pad(file: &mut TensorFileWriter, id: TensorId, n: u64, element: [u8; 4]) -> Result<(), CheckpointError> {
    const PIECE: u64 = 1 << 16;
    let piece = element.repeat(PIECE.min(n) as usize);
    for start in (0..n).step_by(PIECE as usize) {
        file.append(id, &piece[..4 * PIECE.min(n - start) as usize])?;
    }
    Ok(())
}
