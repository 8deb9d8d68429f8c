//! Sparse adapters of PEFT and of its SpIEL fork: a folder with a config, and for each module `M` two tensors,
//!
//! - SHiRA: `M.shira_weight` `[n]` and `M.shira_indices` `[2, n]`, rows and columns
//! - Super-Tuning: `M.supertuning_values` `[n]` and `M.supertuning_indices` `[n]`, row times width plus column
//! - SpIEL: `M.sft_delta.values` `[n]` and `M.sft_delta.indices` `[n]`, the same
//!
//! Sources: PEFT 0.21, `peft/tuners/shira` and `peft/tuners/supertuning`; <https://github.com/AlanAnsell/peft>, `tuners/sft`.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{
    Format, PeftConfig, PeftError, PeftFolder, PeftName, PeftType,
    elements::Elements,
    input::Input,
    sparse::{ForeignAdapter, ForeignTarget, Positions, Rounding},
};
use crate::checkpoint::{CheckpointError, Context, Printable, Shard, TensorInfo};

/// What tells the three formats apart.
struct Parts {
    prefix: &'static str,
    values: &'static str,
    positions: &'static str,
}

fn parts(format: Format) -> Parts {
    match format {
        Format::Shira => Parts { prefix: "shira_", values: "shira_weight", positions: "shira_indices" },
        Format::SuperTuning => {
            Parts { prefix: "supertuning_", values: "supertuning_values", positions: "supertuning_indices" }
        }
        _ => Parts { prefix: "sft_delta", values: "sft_delta.values", positions: "sft_delta.indices" },
    }
}

/// Opens a PEFT folder.
///
/// # Errors
/// A method that is not sparse, or a form of one that is not implemented, by name; tensors that are no part of it or are missing,
/// all listed.
pub(super) fn open(ctx: &Context<'_>, path: &Path) -> Result<ForeignAdapter, PeftError> {
    let folder = PeftFolder::open(ctx, path)?;
    let config = folder.config();
    let PeftType::Sparse(format) = *config.peft_type() else {
        let method = Printable(config.peft_type().name());
        let what = format!("is a PEFT adapter of the method {method}, which is no list of positions and deltas");
        return Err(PeftError::unsupported(path, what));
    };
    refuse_hybrids(config, format)?;
    // The same files once more, read by addresses.
    let mut inputs: BTreeMap<&Path, Arc<Input>> = BTreeMap::new();
    for (shard, _) in folder.tensors() {
        if !inputs.contains_key(shard.path()) {
            inputs.insert(shard.path(), Arc::new(Input::open(shard.path())?));
        }
    }
    let stored = |tensor: (_, _)| Stored::new(&inputs, tensor);
    let parts = parts(format);
    let mut problems = Vec::new();
    let mut modules: BTreeMap<String, [Option<Stored<'_>>; 2]> = BTreeMap::new();
    for tensor in folder.tensors() {
        let info = tensor.1;
        let name = PeftName::parse(&info.name, parts.prefix);
        let part =
            name.as_ref().and_then(|name| [parts.values, parts.positions].iter().position(|part| *part == name.part));
        let (Some(name), Some(part)) = (name, part) else {
            let what = "no part of the method: a tensor trained as a whole is no delta on chosen entries";
            problems.push(format!("\"{}\": {what}", Printable(&info.name)));
            continue;
        };
        let module = modules.entry(name.module).or_default();
        if module[part].replace(stored(tensor)).is_some() {
            problems.push(format!("\"{}\": its module has two of them", Printable(&info.name)));
        }
    }
    let mut targets = Vec::new();
    for (module, found) in modules {
        match found {
            [Some(values), Some(positions)] => match target(format, &module, &values, &positions) {
                Ok(target) => targets.push(target),
                Err(what) => problems.push(format!("module \"{}\": {what}", Printable(&module))),
            },
            _ => {
                let (a, b) = (parts.values, parts.positions);
                problems.push(format!("module \"{}\": needs both {a} and {b}", Printable(&module)));
            }
        }
    }
    if !problems.is_empty() {
        let what = format!("not a whole {} adapter", format.name());
        return Err(CheckpointError::Many { path: folder.tensors_path().to_owned(), what, problems }.into());
    }
    let inputs = inputs.into_values().collect();
    Ok(ForeignAdapter { path: path.to_owned(), format, targets, inputs, folder: Some(folder) }.checked()?)
}

/// Fails where the method is combined with another one.
fn refuse_hybrids(config: &PeftConfig, format: Format) -> Result<(), PeftError> {
    if format == Format::SuperTuning
        && let Some(r) = config.positive("r")?
    {
        let what =
            format!("is a Supra adapter: Super-Tuning with low-rank factors of rank {r} beside it; not implemented");
        return Err(PeftError::unsupported(config.path(), what));
    }
    Ok(())
}

/// A tensor of the adapter and the file it is read from.
struct Stored<'a> {
    input: Arc<Input>,
    /// Where it lies in the file.
    start: u64,
    info: &'a TensorInfo,
}

impl<'a> Stored<'a> {
    fn new(inputs: &BTreeMap<&Path, Arc<Input>>, (shard, info): (&'a Shard, &'a TensorInfo)) -> Self {
        Self { input: Arc::clone(&inputs[shard.path()]), start: shard.file_range(info).start, info }
    }

    /// The `nth` run of `n` elements.
    fn elements(&self, nth: u64, n: u64) -> Elements {
        let start = self.start + nth * n * (self.info.dtype.bitsize() as u64 / 8);
        Elements { input: Arc::clone(&self.input), dtype: self.info.dtype, start, stride: 1, n }
    }
}

fn target(format: Format, module: &str, values: &Stored<'_>, positions: &Stored<'_>) -> Result<ForeignTarget, String> {
    let [n] = values.info.shape[..] else {
        return Err(format!("deltas have shape {:?}, one dimension is needed", values.info.shape));
    };
    let positions = match (format, &positions.info.shape[..]) {
        (Format::Shira, &[2, of]) if of == n => Positions::Pairs(positions.elements(0, n), positions.elements(1, n)),
        (Format::SuperTuning | Format::Spiel, &[of]) if of == n => Positions::Flat(positions.elements(0, n)),
        (_, found) => return Err(format!("positions have shape {found:?}, deltas [{n}]")),
    };
    Ok(ForeignTarget {
        name: format!("{module}.weight"),
        positions,
        values: values.elements(0, n),
        shape: None,
        // Super-Tuning rounds to the weight's type whenever it applies its values.
        rounding: if format == Format::SuperTuning { Rounding::ToWeight } else { Rounding::None },
        has_padding: format != Format::Spiel,
    })
}
