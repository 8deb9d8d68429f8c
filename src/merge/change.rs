//! From one set of active adapters to another: first everything is checked, then the weights are patched.
//!
//! A weight's value is a pure function of its original and the active adapters. A change therefore needs no memory of how
//! a checkpoint came to be: examining it ([`Change::examine`](super::examine)) compares what lies on disk with what `before`
//! says, proves the adapters' anchors and records the originals that `after` needs; [`patch`] writes what `after` says.
//! Rolling back is [`patch`] in the other direction, and both may be repeated.

use std::{collections::BTreeMap, ops::Range};

use super::{
    MergeError,
    ledger::GROUP_ROWS,
    stack::{Active, Stack, StackRows},
};
use crate::{
    backend::{merged_values, pick, union_columns},
    checkpoint::{Checkpoint, Context, Patcher, Place, Printable, TensorRef, for_each_ordered},
    mask::TargetInfo,
    tensor::{RowColumns, RowLayout, dtype_name},
    weights::{Answers, Unplaced, WeightMap},
};

/// Chosen columns in one block of rows, about.
const BLOCK_COLUMNS: u64 = 1 << 16;

/// A step from one stack to another on one checkpoint.
pub(super) struct Change<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) before: &'a Stack,
    pub(super) after: &'a Stack,
}

/// A tensor that some adapter before or after the change touches.
#[derive(Clone, Copy)]
pub(super) struct Touched<'a> {
    pub(super) name: &'a str,
    pub(super) tensor: TensorRef<'a>,
    pub(super) layout: RowLayout,
}

impl<'a> Change<'a> {
    /// Every tensor that is touched before or after.
    ///
    /// # Errors
    /// [`MergeError::Unmatched`] lists all tensors of an adapter that the checkpoint does not have as the adapter needs them.
    pub(super) fn touched(&self) -> Result<Vec<Touched<'a>>, MergeError> {
        // What was merged before is not matched again.
        let is_new = |active: &Active| !self.before.active.iter().any(|before| before.id == active.id);
        let map = match self.after.active.iter().any(is_new) {
            true => Some(WeightMap::new(self.checkpoint, Answers::default())?),
            false => None,
        };
        let mut touched: BTreeMap<&str, Touched<'a>> = BTreeMap::new();
        for active in self.before.active.iter().chain(&self.after.active) {
            let mut problems = Vec::new();
            // What an earlier version merged can be taken out again, whatever it is.
            let map = map.as_ref().filter(|_| is_new(active));
            for target in active.adapter.targets() {
                match self.match_target(map, target) {
                    Ok(tensor) => {
                        let layout = target.layout;
                        let first =
                            touched.entry(&target.name).or_insert(Touched { name: &target.name, tensor, layout });
                        if first.layout != layout {
                            problems
                                .push(format!("\"{}\": another adapter reads it transposed", Printable(&target.name)));
                        }
                    }
                    Err(problem) => problems.push(format!("\"{}\": {problem}", Printable(&target.name))),
                }
            }
            if !problems.is_empty() {
                return Err(MergeError::Unmatched {
                    adapter: active.adapter.path().to_owned(),
                    base: self.checkpoint.name(),
                    n_targets: active.adapter.targets().len(),
                    problems,
                });
            }
        }
        Ok(touched.into_values().collect())
    }

    /// Why a target has no tensor, with the names that are most like its own.
    fn nearest(&self, map: &WeightMap<'a>, target: &TargetInfo) -> String {
        match map.find(&target.name, |_| false) {
            Err(Unplaced::Shape { name, .. }) if name != target.name => {
                format!("the base has no such tensor; the nearest is \"{}\"", Printable(&name))
            }
            Err(unplaced @ (Unplaced::Missing { .. } | Unplaced::Coded(_))) => map.explain(&target.name, &unplaced),
            _ => "the base has no such tensor".to_owned(),
        }
    }

    /// The tensor of a target; `map` is there for those of new adapters.
    fn match_target(&self, map: Option<&WeightMap<'a>>, target: &TargetInfo) -> Result<TensorRef<'a>, String> {
        let tensor = match map {
            Some(map) => {
                let tensor = self.checkpoint.numbers(&target.name).map_err(|_| self.nearest(map, target))?;
                if let Some(tie) = map.tie(&target.name).filter(|tie| tie.stored.len() > 1) {
                    return Err(format!(
                        "the model shares this weight ({}), and the checkpoint stores it {} times: a sparse merge would change one of \
                         the copies; remove the others first",
                        tie.uses(),
                        tie.stored.len()
                    ));
                }
                tensor
            }
            None => self.checkpoint.tensor(&target.name).ok_or("the base has no such tensor")?,
        };
        if tensor.info.shape != target.shape {
            return Err(format!("adapter was made for {:?}, base has {:?}", target.shape, tensor.info.shape));
        }
        if tensor.info.dtype != target.dtype {
            return Err(format!(
                "adapter was made for {}, base has {}",
                dtype_name(target.dtype),
                dtype_name(tensor.info.dtype)
            ));
        }
        Ok(tensor)
    }
}

/// Writes what `after` says at every position that `before` or `after` touches; `files` are the shards, open for writing,
/// in the checkpoint's order, `None` for those that may not be written.
///
/// The result depends on the two ledgers alone, not on what the shards hold: it may be repeated, and undone by exchanging
/// `before` and `after`. The shards are synced at the end.
pub(super) fn patch(
    ctx: &Context<'_>,
    touched: &[Touched<'_>],
    files: &[Option<Patcher>],
    before: &Stack,
    after: &Stack,
) -> Result<(), MergeError> {
    ctx.observer.begin("patching", touched.iter().map(|t| t.tensor.info.n_bytes()).sum());
    let blocks =
        touched.iter().flat_map(|target| row_blocks(ctx, target, &[before, after]).map(move |rows| (target, rows)));
    for_each_ordered(
        ctx,
        blocks,
        |(target, rows)| {
            let write = files[target.tensor.shard_index].as_ref().map_or(0, Patcher::write_cost);
            before.rows_bytes(ctx, target.name, rows) + after.rows_bytes(ctx, target.name, rows) + write
        },
        |(target, rows)| {
            let file = files[target.tensor.shard_index].as_ref().expect("touched shards are open for writing");
            patch_block(ctx, target, rows, file, before, after)
        },
        |_, ()| Ok::<_, MergeError>(()),
    )?;
    for file in files.iter().flatten() {
        file.sync()?;
    }
    Ok(())
}

fn patch_block(
    ctx: &Context<'_>,
    target: &Touched<'_>,
    rows: &Range<u64>,
    file: &Patcher,
    before: &Stack,
    after: &Stack,
) -> Result<(), MergeError> {
    let Touched { name, tensor, layout } = *target;
    let dtype = tensor.info.dtype;
    let width = dtype.bitsize() / 8;
    let before_rows = before.rows(ctx, name, rows)?;
    let after_rows = after.rows(ctx, name, rows)?;
    let all = touched_by_either(before_rows.as_ref(), after_rows.as_ref());
    let mut values = vec![0; all.nnz() * width];
    for (stack, rows_of) in [(before, &before_rows), (after, &after_rows)] {
        if let Some(rows_of) = rows_of {
            let originals = stack.originals(name, rows, &rows_of.touched)?;
            put(&all, &mut values, width, &rows_of.touched, &originals);
        }
    }
    if let Some(after) = &after_rows {
        let originals = pick(&all, &values, width, &after.touched);
        let (merged, _) = merged_values(dtype, &after.layers(), &after.touched, &originals);
        put(&all, &mut values, width, &after.touched, &merged);
    }
    let place =
        |row: u64, column: u64| tensor.shard.file_range(tensor.info).start + layout.flat(row, column) * width as u64;
    let mut places: Vec<Place> =
        positions(&all).map(|(row, column, at)| (place(rows.start + row as u64, u64::from(column)), at)).collect();
    places.sort_unstable();
    // Transposed rows lie between those of other blocks.
    let own = match layout.transposed {
        true => 0..0,
        false => place(rows.start, 0)..place(rows.end - 1, layout.d_in - 1) + width as u64,
    };
    file.write(own, &places, &values, width)?;
    ctx.observer.advance((rows.end - rows.start) * tensor.info.n_bytes() / layout.n_rows());
    Ok(())
}

/// A tensor's rows in blocks that begin at multiples of 64 and hold about [`BLOCK_COLUMNS`] of the positions that `stacks` touch.
pub(super) fn row_blocks(
    ctx: &Context<'_>,
    target: &Touched<'_>,
    stacks: &[&Stack],
) -> impl Iterator<Item = Range<u64>> + Send + use<> {
    let n_rows = target.layout.n_rows();
    let nnz: u64 = stacks.iter().map(|stack| stack.nnz(target.name)).sum();
    let by_columns = n_rows.saturating_mul(BLOCK_COLUMNS) / nnz.max(1);
    // Should all of them lie close together, a few blocks still fit side by side.
    let in_a_row: u64 = stacks.iter().map(|stack| stack.max_row_bytes(target.name)).sum();
    let by_memory = ctx.pass_bytes() / 4 / in_a_row.max(1);
    let by_bytes = n_rows.saturating_mul(ctx.window_bytes()) / target.tensor.info.n_bytes().max(1);
    let step = by_columns.min(by_bytes).min(by_memory).next_multiple_of(GROUP_ROWS).max(GROUP_ROWS);
    (0..n_rows).step_by(step as usize).map(move |first| first..n_rows.min(first + step))
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
