//! One pass over many tensors: threads process blocks of rows, and results arrive in order.

use std::ops::Range;

use super::{CheckpointError, Context, Shard, TensorInfo, TensorRef, Window, direct, read_and_map_ordered};
use crate::tensor::{Dtype, RowBlock, RowLayout};

/// A tensor to scan by rows.
#[derive(Clone, Copy, Debug)]
pub struct RowScan<'a> {
    /// The tensor.
    pub tensor: TensorRef<'a>,
    /// How it is read as rows.
    pub layout: RowLayout,
}

/// A block of rows in memory.
pub struct RowWindow {
    bytes: Window,
    dtype: Dtype,
    n_rows: usize,
    d_in: usize,
}

impl RowWindow {
    /// The rows.
    pub fn block(&self) -> RowBlock<'_> {
        RowBlock::new(&self.bytes, self.dtype, self.n_rows, self.d_in)
    }
}

impl RowScan<'_> {
    /// Size of one row in bytes.
    pub fn row_bytes(&self) -> u64 {
        self.tensor.info.n_bytes() / self.layout.n_rows()
    }

    /// Bytes of memory per row while reading.
    pub fn read_bytes(&self) -> u64 {
        // A transposed tensor needs a strip per stored row, and an element per row.
        let strip = if self.layout.transposed { self.row_bytes() / self.layout.d_in.max(1) } else { 0 };
        // A quantized weight needs its codes and scales in addition to the decoded numbers.
        let codes = self.tensor.layout().map_or(0, |_| self.tensor.stored_bytes().div_ceil(self.layout.n_rows()));
        self.row_bytes() + strip + codes
    }

    /// The memory of a span including its rows, given the `held` memory beyond them.
    fn cost(&self, held: Held) -> Held {
        Held { span: held.span + direct::SLACK, row: held.row + self.read_bytes() }
    }

    /// Reads the rows `rows`, each contiguous: a window of the file, or a copy if the tensor is stored transposed.
    ///
    /// Memory: the rows.
    ///
    /// # Panics
    /// If the rows are outside the tensor.
    pub fn read(&self, ctx: &Context<'_>, rows: Range<u64>) -> Result<RowWindow, CheckpointError> {
        assert!(rows.start <= rows.end && rows.end <= self.layout.n_rows(), "rows lie inside their tensor");
        let row_bytes = self.row_bytes();
        let bytes = if self.layout.transposed {
            Window::owned(self.gather(ctx, rows.clone())?)
        } else {
            self.tensor.window(ctx, rows.start * row_bytes..rows.end * row_bytes)?
        };
        let n_rows = (rows.end - rows.start) as usize;
        Ok(RowWindow { bytes, dtype: self.tensor.info.dtype, n_rows, d_in: self.layout.d_in as usize })
    }

    /// Transposes stored columns into rows: reads from every stored row the strip that belongs to `rows`.
    fn gather(&self, ctx: &Context<'_>, rows: Range<u64>) -> Result<Vec<u8>, CheckpointError> {
        let TensorRef { shard, info, .. } = self.tensor;
        let row_bytes = self.row_bytes() as usize;
        let n = row_bytes / self.layout.d_in as usize;
        let mut gathered = vec![0; (rows.end - rows.start) as usize * row_bytes];
        let mut strip = Vec::new();
        let mut first = rows.start;
        while first < rows.end {
            // One expert's matrix after another.
            let end = rows.end.min((first / self.layout.d_out + 1) * self.layout.d_out);
            let out = &mut gathered[(first - rows.start) as usize * row_bytes..];
            strip.resize((end - first) as usize * n, 0);
            for column in 0..self.layout.d_in {
                if column % 1024 == 0 {
                    ctx.check()?;
                }
                let offset = shard.file_range(info).start + self.layout.flat(first, column) * n as u64;
                shard.read_at(&mut strip, offset)?;
                let at = column as usize * n;
                for (row, element) in out.chunks_exact_mut(row_bytes).zip(strip.chunks_exact(n)) {
                    row[at..at + n].copy_from_slice(element);
                }
            }
            first = end;
        }
        Ok(gathered)
    }
}

/// Maximum memory, in bytes, that the mapping function uses for a span beyond the rows themselves: input, scratch
/// memory, result.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// Per span, whatever its length.
    pub span: u64,
    /// Per row of the span.
    pub row: u64,
}

/// A range of rows of one of the scanned tensors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowSpan {
    /// The index of the tensor.
    pub target: usize,
    /// The first row.
    pub first_row: u64,
    /// The number of rows.
    pub n_rows: usize,
}

/// Reads all rows of `targets` once, in blocks of whole rows, and passes the result of `map` for each block to `sink`
/// in order.
///
/// `held` is the memory that `map` uses per span of a target beyond its rows. Memory: everything together within
/// [`Context::pass_bytes`].
///
/// # Errors
/// Errors of `map` or `sink`; [`CheckpointError::MemoryLimit`], before anything is read, if a row is too long for the
/// available memory; a failure to read; [`CheckpointError::Changed`] if a file changed since it was opened;
/// [`CheckpointError::Cancelled`].
pub fn scan_rows<R, E>(
    ctx: &Context<'_>,
    what: &str,
    targets: &[RowScan<'_>],
    held: impl Fn(usize) -> Held,
    map: impl Fn(RowSpan, RowBlock<'_>) -> Result<R, E> + Sync,
    mut sink: impl FnMut(RowSpan, R) -> Result<(), E>,
) -> Result<(), E>
where
    R: Send,
    E: From<CheckpointError> + Send,
{
    scan_rows_keeping(ctx, what, targets, held, false, map, |span, result, _| sink(span, result))
}

/// As [`scan_rows`], optionally keeping the windows: `sink` then also receives each window, for work that must be done
/// in order.
///
/// Memory: as for [`scan_rows`].
///
/// # Errors
/// As [`scan_rows`].
pub fn scan_rows_keeping<R, E>(
    ctx: &Context<'_>,
    what: &str,
    targets: &[RowScan<'_>],
    held: impl Fn(usize) -> Held,
    keep: bool,
    map: impl Fn(RowSpan, RowBlock<'_>) -> Result<R, E> + Sync,
    mut sink: impl FnMut(RowSpan, R, Option<&RowWindow>) -> Result<(), E>,
) -> Result<(), E>
where
    R: Send,
    E: From<CheckpointError> + Send,
{
    ctx.observer.begin(what, targets.iter().map(|target| target.tensor.info.n_bytes()).sum());
    let costs: Vec<Held> = targets.iter().enumerate().map(|(i, target)| target.cost(held(i))).collect();
    costs.iter().try_for_each(|cost| ctx.check_fits(cost.span + cost.row))?;
    let spans = (0..targets.len()).flat_map(|t| row_spans(ctx, t, &targets[t], costs[t]));
    let tensors: Vec<TensorRef<'_>> = targets.iter().map(|target| target.tensor).collect();
    read_and_map_ordered(
        ctx,
        spans,
        |span| costs[span.target].span + span.n_rows as u64 * costs[span.target].row,
        n_readers(ctx, &tensors),
        |span| {
            let rows = span.first_row..span.first_row + span.n_rows as u64;
            Ok::<_, E>(targets[span.target].read(ctx, rows)?)
        },
        |span, window| {
            let scan = &targets[span.target];
            let result = map(*span, window.block());
            // Checked before the result: an error in the result may come from missing bytes.
            scan.tensor.shard.confirm(&window.bytes)?;
            ctx.observer.advance(span.n_rows as u64 * scan.row_bytes());
            Ok((result?, keep.then_some(window)))
        },
        |span, (result, window)| {
            sink(span, result, window.as_ref())?;
            match window {
                Some(window) => Ok(targets[span.target].tensor.shard.confirm(&window.bytes)?),
                None => Ok(()),
            }
        },
    )?;
    for (i, target) in targets.iter().enumerate() {
        let shard = target.tensor.shard;
        if i == 0 || !std::ptr::eq(shard, targets[i - 1].tensor.shard) {
            shard.unchanged()?;
        }
    }
    Ok(())
}

/// The number of read-ahead threads for a pass over `tensors`: several if they come from disk, none if they are
/// cached.
///
/// Disks are fastest with several large requests queued: a virtual disk reached 1.2 GB/s with one request of 8 MiB,
/// 1.7 with four, 1.9 with eight.
pub fn n_readers<'a>(ctx: &Context<'_>, tensors: &[TensorRef<'a>]) -> usize {
    let stored = |tensor: &TensorRef<'a>| tensor.stored().next().expect("a weight is stored somewhere");
    readers_for(ctx, tensors.iter().map(stored))
}

/// Maximum bytes of memory for a window of `n_bytes`.
pub fn window_cost(n_bytes: u64) -> u64 {
    n_bytes + direct::SLACK
}

/// As [`n_readers`], for tensors known only by their location.
pub(super) fn readers_for<'a>(
    ctx: &Context<'_>,
    tensors: impl ExactSizeIterator<Item = (&'a Shard, &'a TensorInfo)>,
) -> usize {
    /// Number of tensors to sample.
    const SAMPLES: usize = 32;
    let step = tensors.len().div_ceil(SAMPLES).max(1);
    let sampled: Vec<bool> = tensors.step_by(step).map(|(shard, info)| shard.reads_directly(ctx, info)).collect();
    let n_direct = sampled.iter().filter(|&&is_direct| is_direct).count();
    if 2 * n_direct > sampled.len() { (4 * rayon::current_num_threads()).min(16) } else { 0 }
}

/// The rows of a tensor in runs of about one window; if the held memory is large, of at most four windows including
/// it.
fn row_spans(
    ctx: &Context<'_>,
    target: usize,
    scan: &RowScan<'_>,
    cost: Held,
) -> impl Iterator<Item = RowSpan> + use<> {
    let n_rows = scan.layout.n_rows();
    let window = ctx.window_bytes();
    let step = (window / scan.row_bytes().max(1)).min(4 * window / cost.row.max(1)).max(1);
    (0..n_rows).step_by(step as usize).map(move |first_row| RowSpan {
        target,
        first_row,
        n_rows: step.min(n_rows - first_row) as usize,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, Existing, TensorFileWriter};

    #[test]
    fn transposed_rows_are_gathered_from_stored_columns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let mut writer = TensorFileWriter::create(&path, Existing::Keep).unwrap();
        let id = writer.add_tensor("t".to_owned(), Dtype::U16);
        // Two matrices stored as [d_in 3, d_out 5]: element (stack, column, row) is 100 stack + 10 column + row.
        let elements = (0..2u16).flat_map(|e| (0..3).flat_map(move |c| (0..5).map(move |r| 100 * e + 10 * c + r)));
        writer.append(id, &elements.flat_map(u16::to_le_bytes).collect::<Vec<u8>>()).unwrap();
        writer.finish_tensor(id, vec![2, 3, 5]);
        writer.finish(&Context::default(), &Default::default()).unwrap();

        let checkpoint = Checkpoint::open(&path).unwrap();
        let layout = RowLayout::new(&[2, 3, 5], true).unwrap();
        let scan = RowScan { tensor: checkpoint.tensor("t").unwrap(), layout };
        // Rows 4 and 5 are the last of the first matrix and the first of the second.
        let window = scan.read(&Context::default(), 4..6).unwrap();
        let rows = window.block();
        let values = |row: usize| -> Vec<u16> {
            rows.row(row).chunks(2).map(|pair| u16::from_le_bytes(pair.try_into().unwrap())).collect()
        };
        assert_eq!((rows.n_rows(), rows.d_in()), (2, 3));
        assert_eq!((values(0), values(1)), (vec![4, 14, 24], vec![100, 110, 120]));
    }
}
