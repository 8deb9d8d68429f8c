//! The base's values beneath the merges of a checkpoint.

use super::{MergeError, change::put, low_rank, stack::Stack, state::state_of};
use crate::{
    backend::{pick, union_columns},
    checkpoint::{BaseValues, Checkpoint, CheckpointError, Context, TensorRef, gather_rows},
    tensor::{RowColumns, RowLayout},
};

/// Reads values as they were before anything was merged: from the checkpoint where nothing was, else from its ledger.
#[derive(Debug)]
pub struct Originals {
    stack: Stack,
}

impl Originals {
    /// Opens the ledger of `checkpoint`, where it has one. Reads and checks all of it.
    ///
    /// # Errors
    /// A ledger that is not what was written.
    pub fn open(ctx: &Context<'_>, checkpoint: &Checkpoint) -> Result<Self, MergeError> {
        let state = state_of(checkpoint)?;
        if low_rank::record_of(checkpoint)?.is_some() {
            let what = "holds a low-rank merge, which kept no originals at single weights; give its base".to_owned();
            return Err(MergeError::Refused { path: checkpoint.root().to_owned(), what });
        }
        Ok(Self { stack: Stack::open(ctx, &state)? })
    }
}

impl BaseValues for Originals {
    fn gather(
        &self,
        ctx: &Context<'_>,
        tensor: TensorRef<'_>,
        layout: RowLayout,
        first_row: u64,
        columns: &RowColumns,
    ) -> Result<Vec<u8>, CheckpointError> {
        let name = tensor.info.name.as_str();
        let rows = first_row..first_row + columns.n_rows() as u64;
        let Some(merged) = self.stack.rows(ctx, name, &rows).map_err(file_error)? else {
            return gather_rows(ctx, tensor, layout, first_row, columns);
        };
        let recorded = self.stack.originals(name, &rows, &merged.touched).map_err(file_error)?;
        let all = union_columns(&[&merged.touched, columns]);
        let width = tensor.info.dtype.bitsize() / 8;
        let mut values = gather_rows(ctx, tensor, layout, first_row, &all)?;
        put(&all, &mut values, width, &merged.touched, &recorded);
        Ok(pick(&all, &values, width, columns))
    }
}

/// An error about the ledger's file as one about a file.
fn file_error(error: MergeError) -> CheckpointError {
    match error {
        MergeError::Checkpoint(error) => error,
        MergeError::BadLedger { path, what } => CheckpointError::BadFile { path, what },
        other => CheckpointError::io("read", "the ledger".as_ref(), std::io::Error::other(other.to_string())),
    }
}
