//! From one set of active adapters to another: first everything is checked, then the weights are patched.
//!
//! A weight's value is a pure function of its original and the active adapters. A change therefore needs no memory of how
//! a checkpoint came to be: examining it ([`Examination`](super::examine::Examination)) compares what lies on disk with what `before`
//! says, proves the adapters' anchors and records the originals that `after` needs; [`patch`](super::patch::patch) writes what `after`
//! says. Rolling back is patching in the other direction, and both may be repeated.

use std::{collections::BTreeSet, ops::Range};

use super::{
    KeptOriginals, MergeError,
    compute::{Computer, Prepared, prepare, row_blocks},
    ledger::{GROUP_ROWS, Kept},
    plan::MergeTarget,
    stack::{Stack, StackRows},
};
use crate::{
    adapter::AdapterId,
    backend::{pick, union_columns},
    checkpoint::{BaseValues, Checkpoint, CheckpointError, Context, Printable, TensorInfo, TensorRef, gather_rows},
    tensor::{RowColumns, RowLayout, dtype_name},
};

/// Chosen columns in one block of rows, about.
const BLOCK_COLUMNS: u64 = 1 << 16;

/// A step from one stack to another on one checkpoint.
pub(super) struct Change<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) before: &'a Stack<'a>,
    pub(super) after: &'a Stack<'a>,
    /// Where originals are of which the ledgers have hashes alone.
    pub(super) base: Option<&'a Checkpoint>,
    /// What is kept of tensors that come to be changed as a whole.
    pub(super) keep: KeptOriginals,
    pub(super) computer: &'a Computer<'a>,
}

/// A tensor that some adapter before or after the change touches.
#[derive(Clone, Copy)]
pub(super) struct Touched<'a> {
    pub(super) tensor: TensorRef<'a>,
    pub(super) before: Option<&'a MergeTarget<'a>>,
    pub(super) after: Option<&'a MergeTarget<'a>>,
    pub(super) work: Work,
    /// Where its original is.
    pub(super) origin: Origin<'a>,
}

/// How a touched tensor is worked on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    /// At the positions that adapters chose.
    Positions(RowLayout),
    /// Row by row, as a matrix of so many rows and columns.
    Rows { n_rows: u64, n_columns: u64 },
    /// Not at all: the same adapters change it as a whole, before and after.
    Nothing { n_rows: u64, n_columns: u64 },
}

/// Where the original of a tensor is.
#[derive(Clone, Copy)]
pub(super) enum Origin<'a> {
    /// In the checkpoint, but for the positions of which the ledger keeps it.
    Here,
    /// In the ledger.
    Ledger(TensorRef<'a>),
    /// In the base.
    Base(TensorRef<'a>),
}

impl<'a> Touched<'a> {
    pub(super) fn name(&self) -> &'a str {
        &self.tensor.info.name
    }
    /// The same for the change backwards.
    pub(super) fn backwards(&self) -> Self {
        Self { before: self.after, after: self.before, ..*self }
    }
    /// Bytes of a row, in the layout of its work.
    pub(super) fn row_bytes(&self) -> u64 {
        self.tensor.info.n_bytes() / self.n_rows()
    }
    pub(super) fn n_rows(&self) -> u64 {
        match self.work {
            Work::Positions(layout) => layout.n_rows(),
            Work::Rows { n_rows, .. } | Work::Nothing { n_rows, .. } => n_rows,
        }
    }
    /// Whether the ledger before keeps it at positions, and rows of it lie as they are stored.
    fn keeps_positions(&self, change: &Change<'_>) -> bool {
        matches!(change.before.kept(self.name()), Some(Kept::Positions(_)))
    }
}

impl<'a> Change<'a> {
    /// Every tensor that is touched before or after, by name.
    ///
    /// # Errors
    /// [`MergeError::NeedsBase`] where an original is needed that neither the ledger nor a given base has; [`MergeError::Refused`] where
    /// the base that was given does not have it.
    pub(super) fn touched(&self) -> Result<Vec<Touched<'a>>, MergeError> {
        let names: BTreeSet<&'a str> = self.before.targets.keys().chain(self.after.targets.keys()).copied().collect();
        names.into_iter().map(|name| self.touched_one(name)).collect()
    }

    /// The touched tensor of this name, where it is one.
    pub(super) fn touched_named(&self, name: &str) -> Result<Option<Touched<'a>>, MergeError> {
        let keys = self.before.targets.get_key_value(name).or_else(|| self.after.targets.get_key_value(name));
        keys.map(|(&name, _)| self.touched_one(name)).transpose()
    }

    fn touched_one(&self, name: &'a str) -> Result<Touched<'a>, MergeError> {
        let (before, after) = (self.before.targets.get(name), self.after.targets.get(name));
        let target = before.or(after).expect("it is a name of one of them");
        let is_whole = self.before.kept(name).and_then(Kept::hashes).is_some();
        let (n_rows, n_columns) = (target.n_rows, target.n_columns);
        let positions = if is_whole { None } else { after.or(before).and_then(MergeTarget::positions) };
        let is_same = before.zip(after).is_some_and(|(before, after)| before.is_same_as(after));
        let work = match positions {
            Some(layout) => Work::Positions(layout),
            None if is_whole && is_same => Work::Nothing { n_rows, n_columns },
            None => Work::Rows { n_rows, n_columns },
        };
        let origin = self.origin(name, target.tensor, work)?;
        Ok(Touched { tensor: target.tensor, before, after, work, origin })
    }

    fn origin(&self, name: &'a str, tensor: TensorRef<'a>, work: Work) -> Result<Origin<'a>, MergeError> {
        match self.before.kept(name) {
            // Merged, as far as is known; but nothing remembers it, so the base does.
            None if self.before.ledger.is_none() && self.before.targets.contains_key(name) => {
                self.in_base(tensor).map(Origin::Base)
            }
            None | Some(Kept::Positions(_)) => Ok(Origin::Here),
            Some(Kept::Whole(_)) => {
                let (shard, info) = self.before.whole(name).expect("checked when the ledger was opened");
                Ok(Origin::Ledger(TensorRef::of_file(shard, info)))
            }
            Some(Kept::Hash(_)) if matches!(work, Work::Nothing { .. }) && self.base.is_none() => Ok(Origin::Here),
            Some(Kept::Hash(_)) => self.in_base(tensor).map(Origin::Base),
        }
    }

    /// The base's tensor.
    pub(super) fn in_base(&self, tensor: TensorRef<'_>) -> Result<TensorRef<'a>, MergeError> {
        self.in_base_like(tensor.info)
    }

    /// The base's tensor of this name, type and shape.
    pub(super) fn in_base_like(&self, info: &TensorInfo) -> Result<TensorRef<'a>, MergeError> {
        let Some(base) = self.base else {
            let base = self.before.ledger.map_or_else(String::new, |ledger| ledger.document().base.clone());
            return Err(MergeError::NeedsBase { path: self.checkpoint.root().to_owned(), base });
        };
        let wrong = |what: String| MergeError::Refused {
            path: base.root().to_owned(),
            what: format!("\"{}\": {what}: not the base of this merge", Printable(&info.name)),
        };
        let found = base.tensor(&info.name).ok_or_else(|| wrong("there is no such tensor".to_owned()))?;
        match found.info.is_like(info) {
            true => Ok(found),
            false => Err(wrong(format!("it is {} {:?}", dtype_name(found.info.dtype), found.info.shape))),
        }
    }

    /// What is kept of a tensor as a whole; none of one of which single elements are kept, or nothing.
    pub(super) fn keeps(&self, touched: &Touched<'_>) -> Option<KeptOriginals> {
        let after = touched.after?;
        match (touched.work, self.before.kept(touched.name())) {
            (Work::Positions(_), _) => None,
            (Work::Rows { .. }, _) if after.positions().is_some() => None,
            (_, Some(Kept::Whole(_))) => Some(KeptOriginals::Whole),
            (_, Some(Kept::Hash(_))) => Some(KeptOriginals::Hashes),
            (_, Some(Kept::Positions(_)) | None) => Some(self.keep),
        }
    }

    /// Whether an adapter is added by the change.
    pub(super) fn adds(&self, id: AdapterId) -> bool {
        !self.before.active.iter().any(|before| before.id == id)
    }

    /// Fails where the original of a tensor is needed and nowhere to be had.
    ///
    /// # Errors
    /// [`MergeError::NeedsBase`].
    pub(super) fn needs_original(&self, touched: &Touched<'_>) -> Result<(), MergeError> {
        match (self.before.kept(touched.name()), touched.origin) {
            (Some(Kept::Hash(_)), Origin::Here) => self.in_base(touched.tensor).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// Reads the originals of a run of a tensor's rows.
    pub(super) fn original_rows(
        &self,
        ctx: &Context<'_>,
        touched: &Touched<'_>,
        rows: &Range<u64>,
    ) -> Result<Vec<u8>, MergeError> {
        let row_bytes = touched.row_bytes();
        let range = rows.start * row_bytes..rows.end * row_bytes;
        let tensor = match touched.origin {
            Origin::Here => touched.tensor,
            Origin::Ledger(tensor) | Origin::Base(tensor) => tensor,
        };
        let mut bytes = tensor.read(ctx, range)?;
        self.lay_under(ctx, touched, rows, &mut bytes)?;
        Ok(bytes)
    }

    /// Puts what the ledger keeps of single elements into `bytes`, the tensor's own `rows`.
    pub(super) fn lay_under(
        &self,
        ctx: &Context<'_>,
        touched: &Touched<'_>,
        rows: &Range<u64>,
        bytes: &mut [u8],
    ) -> Result<(), MergeError> {
        if !matches!(touched.origin, Origin::Here) || !touched.keeps_positions(self) {
            return Ok(());
        }
        let width = touched.tensor.info.dtype.bitsize() / 8;
        let layout = touched.before.and_then(MergeTarget::positions).expect("positions are kept of what has them");
        let (start, end) = (rows.start * touched.row_bytes(), rows.end * touched.row_bytes());
        // The layout's rows are those of the matrix, or its columns: then all of them reach into these rows.
        let blocks: Vec<Range<u64>> = match layout.transposed {
            false => {
                let start = rows.start / GROUP_ROWS * GROUP_ROWS;
                std::iter::once(start..rows.end.next_multiple_of(GROUP_ROWS).min(layout.n_rows())).collect()
            }
            true => blocks_of(ctx, touched, layout, &[self.before]).collect(),
        };
        for block in blocks {
            let Some(before) = self.before.rows(ctx, touched.name(), &block)? else { continue };
            let recorded = self.recorded(ctx, touched, layout, &block, &before)?;
            for (row, column, at) in positions(&before.touched) {
                let place = layout.flat(block.start + row as u64, u64::from(column)) * width as u64;
                if (start..end).contains(&place) {
                    let place = (place - start) as usize;
                    bytes[place..place + width].copy_from_slice(&recorded[at * width..(at + 1) * width]);
                }
            }
        }
        Ok(())
    }

    /// The originals of the positions that `before` touches in `rows`.
    pub(super) fn recorded(
        &self,
        ctx: &Context<'_>,
        touched: &Touched<'_>,
        layout: RowLayout,
        rows: &Range<u64>,
        before: &StackRows,
    ) -> Result<Vec<u8>, MergeError> {
        match (self.before.kept(touched.name()), touched.origin) {
            (Some(Kept::Positions(_)), _) => {
                let ledger = self.before.ledger.expect("it keeps something");
                ledger.originals(touched.name(), rows.clone(), before.touched.nnz())
            }
            (_, Origin::Ledger(tensor) | Origin::Base(tensor)) => {
                Ok(gather_rows(ctx, tensor, layout, rows.start, &before.touched)?)
            }
            (_, Origin::Here) => unreachable!("what was changed has its original elsewhere"),
        }
    }

    /// What has to be known of a tensor before rows of it can be computed as `target` says.
    pub(super) fn prepare<'t>(
        &self,
        ctx: &Context<'_>,
        touched: &Touched<'_>,
        target: &'t MergeTarget<'t>,
    ) -> Result<Prepared<'t>, MergeError> {
        prepare(ctx, target, &|rows| self.original_rows(ctx, touched, rows))
    }

    /// A tensor's rows in blocks: of about as many chosen columns, or elements, as make a window.
    pub(super) fn blocks(
        &self,
        ctx: &Context<'_>,
        touched: &Touched<'_>,
    ) -> Box<dyn Iterator<Item = Range<u64>> + Send> {
        match touched.work {
            Work::Positions(layout) => Box::new(blocks_of(ctx, touched, layout, &[self.before, self.after])),
            Work::Rows { n_rows, n_columns } | Work::Nothing { n_rows, n_columns } => {
                Box::new(row_blocks(ctx, n_rows, n_columns))
            }
        }
    }
}

/// A tensor's rows in blocks that begin at multiples of 64 and hold about [`BLOCK_COLUMNS`] of the positions that `stacks` touch.
pub(super) fn blocks_of(
    ctx: &Context<'_>,
    touched: &Touched<'_>,
    layout: RowLayout,
    stacks: &[&Stack<'_>],
) -> impl Iterator<Item = Range<u64>> + Send + use<> {
    let (n_rows, name) = (layout.n_rows(), touched.name());
    let nnz: u64 = stacks.iter().map(|stack| stack.nnz(name)).sum();
    let by_columns = n_rows.saturating_mul(BLOCK_COLUMNS) / nnz.max(1);
    // Should all of them lie close together, a few blocks still fit side by side.
    let in_a_row: u64 = stacks.iter().map(|stack| stack.max_row_bytes(name)).sum();
    let by_memory = ctx.pass_bytes() / 4 / in_a_row.max(1);
    let by_bytes = n_rows.saturating_mul(ctx.window_bytes()) / touched.tensor.info.n_bytes().max(1);
    let step = by_columns.min(by_bytes).min(by_memory).next_multiple_of(GROUP_ROWS).max(GROUP_ROWS);
    (0..n_rows).step_by(step as usize).map(move |first| first..n_rows.min(first + step))
}

/// The values beneath a change, at chosen positions.
pub(super) struct Beneath<'c> {
    pub(super) change: &'c Change<'c>,
    pub(super) touched: &'c Touched<'c>,
}

impl BaseValues for Beneath<'_> {
    fn gather(
        &self,
        ctx: &Context<'_>,
        tensor: TensorRef<'_>,
        layout: RowLayout,
        first_row: u64,
        columns: &RowColumns,
    ) -> Result<Vec<u8>, CheckpointError> {
        let rows = first_row..first_row + columns.n_rows() as u64;
        let from = match self.touched.origin {
            Origin::Ledger(tensor) | Origin::Base(tensor) => {
                return gather_rows(ctx, tensor, layout, first_row, columns);
            }
            Origin::Here => tensor,
        };
        if !self.touched.keeps_positions(self.change) {
            return gather_rows(ctx, from, layout, first_row, columns);
        }
        let before = &self.change.before;
        let Some(merged) = before.rows(ctx, self.touched.name(), &rows).map_err(file_error)? else {
            return gather_rows(ctx, from, layout, first_row, columns);
        };
        let recorded = self.change.recorded(ctx, self.touched, layout, &rows, &merged).map_err(file_error)?;
        let all = union_columns(&[&merged.touched, columns]);
        let width = tensor.info.dtype.bitsize() / 8;
        let mut values = gather_rows(ctx, from, layout, first_row, &all)?;
        put(&all, &mut values, width, &merged.touched, &recorded);
        Ok(pick(&all, &values, width, columns))
    }
}

/// The same for all tensors.
pub(super) struct AllBeneath<'c>(pub(super) &'c Change<'c>);

impl BaseValues for AllBeneath<'_> {
    fn gather(
        &self,
        ctx: &Context<'_>,
        tensor: TensorRef<'_>,
        layout: RowLayout,
        first_row: u64,
        columns: &RowColumns,
    ) -> Result<Vec<u8>, CheckpointError> {
        match self.0.touched_named(&tensor.info.name).map_err(file_error)? {
            None => gather_rows(ctx, tensor, layout, first_row, columns),
            Some(touched) => {
                self.0.needs_original(&touched).map_err(file_error)?;
                Beneath { change: self.0, touched: &touched }.gather(ctx, tensor, layout, first_row, columns)
            }
        }
    }
}

/// An error about the ledger's file as one about a file.
pub(super) fn file_error(error: MergeError) -> CheckpointError {
    match error {
        MergeError::Checkpoint(error) => error,
        MergeError::BadLedger { path, what } => CheckpointError::BadFile { path, what },
        other => CheckpointError::io("read", "the ledger".as_ref(), std::io::Error::other(other.to_string())),
    }
}

pub(super) fn touched_by_either(before: Option<&StackRows>, after: Option<&StackRows>) -> RowColumns {
    let parts: Vec<&RowColumns> = before.into_iter().chain(after).map(|rows| &rows.touched).collect();
    union_columns(&parts)
}

/// Row, column and index of every element.
pub(super) fn positions(columns: &RowColumns) -> impl Iterator<Item = (usize, u32, usize)> {
    (0..columns.n_rows()).flat_map(move |row| {
        columns.row(row).iter().zip(columns.row_range(row)).map(move |(&column, at)| (row, column, at))
    })
}

/// Puts `elements` (one per column of `part`) where those columns stand among `all`.
pub(super) fn put(all: &RowColumns, bytes: &mut [u8], width: usize, part: &RowColumns, elements: &[u8]) {
    if all == part {
        bytes.copy_from_slice(elements);
        return;
    }
    for row in 0..part.n_rows() {
        let (mut at, columns) = (all.row_range(row).start, all.columns());
        for (&column, from) in part.row(row).iter().zip(part.row_range(row)) {
            while columns[at] != column {
                at += 1;
            }
            bytes[at * width..(at + 1) * width].copy_from_slice(&elements[from * width..(from + 1) * width]);
        }
    }
}

/// The bits of a little-endian element, most significant first.
pub(super) fn hex(element: &[u8]) -> String {
    element.iter().rev().map(|byte| format!("{byte:02x}")).collect()
}
