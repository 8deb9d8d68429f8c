//! One pass over many tensors: threads share blocks of rows, results arrive in order.

use rayon::prelude::*;

use super::{CheckpointError, Context, TensorRef};
use crate::tensor::{RowBlock, RowLayout};

/// A tensor to scan by rows, as stored (`layout` is not transposed).
#[derive(Clone, Copy, Debug)]
pub struct RowScan<'a> {
    /// The tensor.
    pub tensor: TensorRef<'a>,
    /// How it is read as rows.
    pub layout: RowLayout,
}

/// A run of rows of one of the scanned tensors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowSpan {
    /// Which of the scanned tensors.
    pub target: usize,
    /// The first row.
    pub first_row: u64,
    /// How many rows.
    pub n_rows: usize,
}

/// Maps `items` on all threads and hands the results to `sink` in the items' order.
///
/// Items are taken in batches of a few per thread, so that memory is bounded whatever their number. The first error in
/// the items' order is returned, whichever thread met one first.
///
/// # Errors
/// What `map` or `sink` return, or [`CheckpointError::Cancelled`].
pub fn for_each_ordered<T, R, E>(
    ctx: &Context<'_>,
    items: impl IntoIterator<Item = T>,
    map: impl Fn(&T) -> Result<R, E> + Sync,
    mut sink: impl FnMut(T, R) -> Result<(), E>,
) -> Result<(), E>
where
    T: Send + Sync,
    R: Send,
    E: From<CheckpointError> + Send,
{
    let batch_len = 4 * rayon::current_num_threads();
    let mut items = items.into_iter().peekable();
    while items.peek().is_some() {
        ctx.check()?;
        let batch: Vec<T> = items.by_ref().take(batch_len).collect();
        let results: Vec<Result<R, E>> = batch.par_iter().with_max_len(1).map(&map).collect();
        for (item, result) in batch.into_iter().zip(results) {
            sink(item, result?)?;
        }
    }
    Ok(())
}

/// Reads all rows of `targets` once, in blocks of whole rows, and hands what `map` made of each block to `sink` in order.
///
/// Memory: two windows per thread (see [`Context::window_bytes`]; a row longer than that is one window) and the results
/// of a few blocks per thread.
///
/// # Errors
/// What `map` or `sink` return, a failure to read, or [`CheckpointError::Cancelled`].
///
/// # Panics
/// Where a layout is transposed: its rows do not lie in one piece.
pub fn scan_rows<R, E>(
    ctx: &Context<'_>,
    what: &str,
    targets: &[RowScan<'_>],
    map: impl Fn(RowSpan, RowBlock<'_>) -> Result<R, E> + Sync,
    sink: impl FnMut(RowSpan, R) -> Result<(), E>,
) -> Result<(), E>
where
    R: Send,
    E: From<CheckpointError> + Send,
{
    assert!(targets.iter().all(|target| !target.layout.transposed), "transposed rows do not lie in one piece");
    ctx.observer.begin(what, targets.iter().map(|target| target.tensor.info.n_bytes()).sum());
    let spans = (0..targets.len()).flat_map(|t| row_spans(ctx, t, &targets[t]));
    let mut sink = sink;
    for_each_ordered(
        ctx,
        spans,
        |span| {
            let RowScan { tensor, layout } = targets[span.target];
            let row_bytes = tensor.info.n_bytes() / layout.n_rows();
            let start = span.first_row * row_bytes;
            let n_bytes = span.n_rows as u64 * row_bytes;
            let window = tensor.window(ctx, start..start + n_bytes)?;
            let result = map(*span, RowBlock::new(&window, tensor.info.dtype, span.n_rows, layout.d_in as usize));
            ctx.observer.advance(n_bytes);
            result
        },
        &mut sink,
    )
}

/// A tensor's rows in runs of about one window.
fn row_spans(ctx: &Context<'_>, target: usize, scan: &RowScan<'_>) -> impl Iterator<Item = RowSpan> + use<> {
    let n_rows = scan.layout.n_rows();
    let row_bytes = scan.tensor.info.n_bytes() / n_rows;
    let step = (ctx.window_bytes() / row_bytes.max(1)).max(1);
    (0..n_rows).step_by(step as usize).map(move |first_row| RowSpan {
        target,
        first_row,
        n_rows: step.min(n_rows - first_row) as usize,
    })
}
