//! Writing what a change says into files that are there.

use std::ops::Range;

use super::{
    MergeError,
    change::{Change, Touched, Work, positions, put, touched_by_either},
    compute::{merge_cost, merge_rows, prepare, row_blocks},
    plan::MergeTarget,
    stack::Stack,
};
use crate::{
    backend::pick,
    checkpoint::{Context, Destination, Patcher, TensorRef, for_each_ordered, window_cost},
    tensor::RowLayout,
};

/// Writes what `change.after` says into every touched tensor; `files` are the shards, open for writing, in the checkpoint's order,
/// `None` for those that may not be written.
///
/// The result depends on the two ledgers and the base alone, not on what the shards hold: it may be repeated, and undone by exchanging
/// `before` and `after`, both of which have their ledgers. The shards are synced at the end.
pub(super) fn patch(
    ctx: &Context<'_>,
    change: &Change<'_>,
    touched: &[Touched<'_>],
    files: &[Option<Patcher>],
) -> Result<(), MergeError> {
    let worked_on = || touched.iter().filter(|touched| !matches!(touched.work, Work::Nothing { .. }));
    ctx.observer.begin("patching", worked_on().map(|touched| touched.tensor.info.n_bytes()).sum());
    let file_of = |touched: &Touched<'_>| {
        files[touched.tensor.shard_index].as_ref().expect("touched shards are open for writing")
    };
    let at_positions = worked_on().filter_map(|touched| match touched.work {
        Work::Positions(layout) => Some((touched, layout)),
        _ => None,
    });
    let blocks =
        at_positions.flat_map(|(touched, layout)| change.blocks(ctx, touched).map(move |rows| (touched, layout, rows)));
    let (before, after) = (change.before, change.after);
    for_each_ordered(
        ctx,
        blocks.collect::<Vec<_>>(),
        |(touched, _, rows)| {
            let name = touched.name();
            before.rows_bytes(ctx, name, rows) + after.rows_bytes(ctx, name, rows) + file_of(touched).write_cost()
        },
        |(touched, layout, rows)| patch_block(ctx, change, (touched, *layout), rows, file_of(touched)),
        |_, ()| Ok::<_, MergeError>(()),
    )?;
    for touched in worked_on().filter(|touched| matches!(touched.work, Work::Rows { .. })) {
        patch_whole(ctx, change, touched, file_of(touched))?;
    }
    for file in files.iter().flatten() {
        file.sync()?;
    }
    Ok(())
}

fn patch_block(
    ctx: &Context<'_>,
    change: &Change<'_>,
    (touched, layout): (&Touched<'_>, RowLayout),
    rows: &Range<u64>,
    file: &Patcher,
) -> Result<(), MergeError> {
    let (tensor, name) = (touched.tensor, touched.name());
    let dtype = tensor.info.dtype;
    let width = dtype.bitsize() / 8;
    let before_rows = change.before.rows(ctx, name, rows)?;
    let after_rows = change.after.rows(ctx, name, rows)?;
    let all = touched_by_either(before_rows.as_ref(), after_rows.as_ref());
    let mut values = vec![0; all.nnz() * width];
    for (stack, rows_of) in [(change.before, &before_rows), (change.after, &after_rows)] {
        if let Some(rows_of) = rows_of {
            let ledger = stack.ledger.expect("both stacks have their ledgers");
            let originals = ledger.originals(name, rows.clone(), rows_of.touched.nnz())?;
            put(&all, &mut values, width, &rows_of.touched, &originals);
        }
    }
    if let Some(after) = &after_rows {
        let originals = pick(&all, &values, width, &after.touched);
        let (merged, _) = after.merged(dtype, &originals);
        put(&all, &mut values, width, &after.touched, &merged);
    }
    let place =
        |row: u64, column: u64| file.data_start() + tensor.info.data.start + layout.flat(row, column) * width as u64;
    let mut places: Vec<Destination> =
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

/// Writes all rows of a tensor, from originals that lie elsewhere.
fn patch_whole(
    ctx: &Context<'_>,
    change: &Change<'_>,
    touched: &Touched<'_>,
    file: &Patcher,
) -> Result<(), MergeError> {
    let originals = lasting_originals(change, touched)?;
    let (n_rows, row_bytes) = (touched.n_rows(), touched.row_bytes());
    let read = |rows: &Range<u64>| Ok(originals.read(ctx, rows.start * row_bytes..rows.end * row_bytes)?);
    let prepared = match touched.after {
        Some(target) => Some(prepare(ctx, target, &read)?),
        None => None,
    };
    let start = file.data_start() + touched.tensor.info.data.start;
    let n_columns = touched.tensor.info.n_elements() / n_rows;
    for_each_ordered(
        ctx,
        row_blocks(ctx, n_rows, n_columns),
        |rows| {
            let n_bytes = (rows.end - rows.start) * row_bytes;
            2 * window_cost(n_bytes) + touched.after.map_or(0, |target: &MergeTarget<'_>| merge_cost(ctx, target, rows))
        },
        |rows| {
            let mut bytes = read(rows)?;
            if let Some(prepared) = &prepared {
                merge_rows(ctx, change.computer, prepared, rows, &mut bytes)?;
            }
            file.write_run(start + rows.start * row_bytes, &bytes)?;
            ctx.observer.advance(bytes.len() as u64);
            Ok(())
        },
        |_, ()| Ok::<_, MergeError>(()),
    )
}

/// Where the original of a tensor lies that is overwritten as a whole: in the ledger of either side, or in the base.
pub(super) fn lasting_originals<'a>(change: &Change<'a>, touched: &Touched<'a>) -> Result<TensorRef<'a>, MergeError> {
    let kept = |stack: &Stack<'a>| stack.whole(touched.name());
    match kept(change.after).or_else(|| kept(change.before)) {
        Some((shard, info)) => Ok(TensorRef::of_file(shard, info)),
        None => change.in_base(touched.tensor),
    }
}
