//! The base's values beneath the merges of a checkpoint.

use super::{
    KeptOriginals, MergeError,
    change::{Beneath, Change, file_error},
    compute::Computer,
    stack::{Remembered, Stack},
    state::state_of,
};
use crate::{
    backend::Merger,
    checkpoint::{BaseValues, Checkpoint, CheckpointError, Context, TensorRef, gather_rows},
    tensor::{RowColumns, RowLayout},
};

/// What a checkpoint remembers of its originals.
#[derive(Debug)]
pub struct Originals<'a> {
    checkpoint: &'a Checkpoint,
    remembered: Remembered,
}

/// Reads values as they were before anything was merged: from the checkpoint where nothing was, else from its ledger.
#[derive(Debug)]
pub struct OriginalValues<'a> {
    checkpoint: &'a Checkpoint,
    stack: Stack<'a>,
}

impl<'a> Originals<'a> {
    /// Opens the ledger of `checkpoint`, where it has one. Reads and checks it.
    ///
    /// # Errors
    /// A ledger that is not what was written, or that has hashes alone of some tensor.
    pub fn open(ctx: &Context<'_>, checkpoint: &'a Checkpoint) -> Result<Self, MergeError> {
        let remembered = Remembered::open(ctx, &state_of(checkpoint)?)?;
        if remembered.ledger.as_ref().is_some_and(|ledger| ledger.document().needs_base()) {
            let what = "of tensors that changed as a whole its ledger keeps hashes alone; give its base".to_owned();
            return Err(MergeError::Refused { path: checkpoint.root().to_owned(), what });
        }
        Ok(Self { checkpoint, remembered })
    }

    /// The values.
    ///
    /// # Errors
    /// A ledger that does not fit the checkpoint.
    pub fn values(&self) -> Result<OriginalValues<'_>, MergeError> {
        let stack = Stack::of(&self.remembered, self.checkpoint, None)?;
        Ok(OriginalValues { checkpoint: self.checkpoint, stack })
    }
}

impl BaseValues for OriginalValues<'_> {
    fn gather(
        &self,
        ctx: &Context<'_>,
        tensor: TensorRef<'_>,
        layout: RowLayout,
        first_row: u64,
        columns: &RowColumns,
    ) -> Result<Vec<u8>, CheckpointError> {
        let computer = Computer::new(Merger::cpu());
        let change = Change {
            checkpoint: self.checkpoint,
            before: &self.stack,
            after: &self.stack,
            base: None,
            keep: KeptOriginals::default(),
            computer: &computer,
        };
        match change.touched_named(&tensor.info.name).map_err(file_error)? {
            None => gather_rows(ctx, tensor, layout, first_row, columns),
            Some(touched) => {
                Beneath { change: &change, touched: &touched }.gather(ctx, tensor, layout, first_row, columns)
            }
        }
    }
}
