//! What every sparse foreign adapter is once its own files are understood: lists of positions and deltas.

use std::{path::PathBuf, sync::Arc};

use super::{Format, PeftFolder, elements::Elements, input::Input};
use crate::{
    checkpoint::{CheckpointError, Printable},
    tensor::dtype_name,
};

/// A foreign adapter, opened and understood; positions and deltas are still in its files.
#[derive(Debug)]
pub struct ForeignAdapter {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) targets: Vec<ForeignTarget>,
    /// The files that are read from, to notice changes.
    pub(super) inputs: Vec<Arc<Input>>,
    /// Of a PEFT adapter its folder, and what was unpacked for it.
    pub(super) folder: Option<PeftFolder>,
}

/// The positions and deltas of one tensor.
#[derive(Debug)]
pub(crate) struct ForeignTarget {
    /// Where the base's tensor of this name gets the deltas.
    pub(crate) name: String,
    pub(crate) positions: Positions,
    pub(crate) values: Elements,
    /// The base's shape, where the files tell it.
    pub(crate) shape: Option<Vec<u64>>,
    /// What the tool itself rounds the deltas to before it adds them.
    pub(crate) rounding: Rounding,
    /// Whether entries of -0 are there only to make up the number that the format asks for.
    pub(crate) has_padding: bool,
}

/// How positions are told.
#[derive(Debug)]
pub(crate) enum Positions {
    /// Row and column in the tensor as stored.
    Pairs(Elements, Elements),
    /// Row times width plus column.
    Flat(Elements),
}

/// What a tool does with deltas before it adds them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rounding {
    /// Adds them as they are.
    None,
    /// Rounds them to the weight's type.
    ToWeight,
}

impl ForeignTarget {
    /// Entries, duplicates and padding counted.
    pub(crate) fn n(&self) -> u64 {
        self.values.n
    }

    /// What the element types and lengths have to be.
    pub(crate) fn check(&self) -> Result<(), String> {
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

impl ForeignAdapter {
    /// The file or folder it was opened from.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
    /// What it is.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The tensors that get deltas, in the order of its files.
    pub(crate) fn targets(&self) -> &[ForeignTarget] {
        &self.targets
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

    /// Fails where a file changed since it was opened.
    pub(crate) fn unchanged(&self) -> Result<(), CheckpointError> {
        self.folder.as_ref().map_or(Ok(()), PeftFolder::unchanged)?;
        self.inputs.iter().try_for_each(|input| input.unchanged())
    }
}
