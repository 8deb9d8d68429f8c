//! What every foreign adapter is once its own files are understood: lists of positions and deltas.

use std::{path::PathBuf, sync::Arc};

use super::{ConvertError, Format, elements::Elements, input::Input};
use crate::{
    checkpoint::{CheckpointError, Printable, TensorRef},
    tensor::{Dtype, RowLayout, dtype_name},
    weights::{Unplaced, WeightMap},
};

/// A foreign adapter, opened and understood; positions and deltas are still in its files.
#[derive(Debug)]
pub struct ForeignAdapter {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) targets: Vec<ForeignTarget>,
    /// The files that are read from, to notice changes.
    pub(super) inputs: Vec<Arc<Input>>,
}

/// The positions and deltas of one tensor.
#[derive(Debug)]
pub(super) struct ForeignTarget {
    /// Where the base's tensor of this name gets the deltas.
    pub(super) name: String,
    pub(super) positions: Positions,
    pub(super) values: Elements,
    /// The base's shape, where the files tell it.
    pub(super) shape: Option<Vec<u64>>,
    /// What the tool itself rounds the deltas to before it adds them.
    pub(super) rounding: Rounding,
    /// Whether entries of -0 are there only to make up the number that the format asks for.
    pub(super) has_padding: bool,
}

/// How positions are told.
#[derive(Debug)]
pub(super) enum Positions {
    /// Row and column in the tensor as stored.
    Pairs(Elements, Elements),
    /// Row times width plus column.
    Flat(Elements),
}

/// What a tool does with deltas before it adds them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rounding {
    /// Adds them as they are.
    None,
    /// Rounds them to the weight's type.
    ToWeight,
}

impl ForeignTarget {
    /// Entries, duplicates and padding counted.
    pub(super) fn n(&self) -> u64 {
        self.values.n
    }

    /// What the element types and lengths have to be.
    pub(super) fn check(&self) -> Result<(), String> {
        let all = match &self.positions {
            Positions::Pairs(rows, columns) => vec![rows, columns],
            Positions::Flat(flat) => vec![flat],
        };
        for positions in all {
            if !positions.are_positions() {
                return Err(format!("positions are {}, whole numbers are needed", dtype_name(positions.dtype)));
            }
            if positions.n != self.values.n {
                return Err(format!("{} positions have {} deltas", positions.n, self.values.n));
            }
        }
        if !self.values.are_deltas() {
            return Err(format!("deltas are {}; F32, BF16, F16 or F64 are needed", dtype_name(self.values.dtype)));
        }
        Ok(())
    }
}

/// A target and the base's tensor that it is for.
pub(super) struct Matched<'a> {
    pub(super) target: &'a ForeignTarget,
    pub(super) tensor: TensorRef<'a>,
    pub(super) layout: RowLayout,
    /// The type that the deltas are stored in.
    pub(super) values: Dtype,
}

impl ForeignAdapter {
    /// The file or folder it was opened from.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
    /// What it is.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Checks element types and counts of all targets.
    pub(super) fn checked(self) -> Result<Self, CheckpointError> {
        if self.targets.is_empty() {
            return Err(CheckpointError::bad_file(&self.path, "holds no deltas"));
        }
        let problems: Vec<String> = self
            .targets
            .iter()
            .filter_map(|target| Some(format!("\"{}\": {}", Printable(&target.name), target.check().err()?)))
            .collect();
        if problems.is_empty() {
            return Ok(self);
        }
        let what = "tensors are not what they should be".to_owned();
        Err(CheckpointError::Many { path: self.path, what, problems })
    }

    /// Finds the base's tensor of every target.
    ///
    /// # Errors
    /// [`ConvertError::Unmatched`] lists all that the base does not have, or not as matrices of the right shape.
    pub(super) fn matched<'a>(&'a self, map: &WeightMap<'a>) -> Result<Vec<Matched<'a>>, ConvertError> {
        let mut problems = Vec::new();
        let mut matched: Vec<Matched<'_>> = Vec::new();
        for target in &self.targets {
            match match_one(target, map) {
                Ok(found) => matched.push(found),
                Err(what) => problems.push(format!("\"{}\": {what}", Printable(&target.name))),
            }
        }
        matched.sort_by(|a, b| a.tensor.info.name.cmp(&b.tensor.info.name));
        for pair in matched.windows(2).filter(|pair| pair[0].tensor.info.name == pair[1].tensor.info.name) {
            let [a, b] = [pair[0].target, pair[1].target].map(|target| Printable(&target.name).to_string());
            problems.push(format!("\"{b}\": the base has one tensor for it and for \"{a}\""));
        }
        if problems.is_empty() {
            return Ok(matched);
        }
        let n_targets = self.targets.len();
        Err(ConvertError::Unmatched { path: self.path.clone(), base: map.checkpoint().name(), n_targets, problems })
    }

    /// Fails where a file changed since it was opened.
    pub(super) fn unchanged(&self) -> Result<(), CheckpointError> {
        self.inputs.iter().try_for_each(|input| input.unchanged())
    }
}

fn match_one<'a>(target: &'a ForeignTarget, map: &WeightMap<'a>) -> Result<Matched<'a>, String> {
    let fits = |tensor: TensorRef<'_>| target.shape.as_ref().is_none_or(|shape| *shape == tensor.info.shape);
    let tensor = match map.find(&target.name, fits) {
        Ok(found) => found.tensor,
        Err(Unplaced::Shape { found, .. }) => {
            let made_for = target.shape.as_deref().unwrap_or_default();
            return Err(format!("the deltas were made for {made_for:?}, the base has {found:?}"));
        }
        Err(unplaced) => return Err(map.explain(&target.name, &unplaced)),
    };
    let layout = tensor.rows(false).map_err(|e| match e {
        CheckpointError::BadTensor { what, .. } => what,
        other => other.to_string(),
    })?;
    let stored = match target.values.dtype {
        Dtype::F64 => Dtype::F32,
        other => other,
    };
    let values = match (target.rounding, tensor.info.dtype) {
        (Rounding::ToWeight, weight @ (Dtype::BF16 | Dtype::F16)) => weight,
        _ => stored,
    };
    Ok(Matched { target, tensor, layout, values })
}
