//! Writing a shard: pieces of its tensors on all threads, each read, cast and written to its place.

use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

use super::{
    CastError, CastOptions,
    plan::{Output, Shard},
};
use crate::{
    checkpoint::{CheckpointError, Context, TensorRef, create_new_file, n_readers, read_and_map_ordered, window_cost},
    tensor::{Accumulator, Dtype, Float, RowLayout, bf16_of, f16_of, with_float},
};

/// Writes the shard to the new file `path`; returns how many numbers became infinite.
pub(super) fn shard(
    ctx: &Context<'_>,
    shard: &Shard<'_>,
    path: &Path,
    options: &CastOptions,
) -> Result<u64, CastError> {
    shard_into(ctx, shard, &create_new_file(path)?, path, options)
}

/// A run of a tensor's elements, or of the rows of a transposed matrix.
struct Piece<'p, 'a> {
    output: &'p Output<'a>,
    run: Run,
    /// Where it goes in the file.
    at: u64,
}

enum Run {
    /// Elements as they are stored, in elements.
    Elements(Range<u64>),
    /// Bytes of elements that are no whole bytes, or no floats.
    Bytes(Range<u64>),
    /// Of one matrix of a stack, columns that become rows.
    Columns { stack: u64, columns: Range<u64> },
}

/// The same for a file that is open.
pub(super) fn shard_into(
    ctx: &Context<'_>,
    shard: &Shard<'_>,
    file: &File,
    path: &Path,
    options: &CastOptions,
) -> Result<u64, CastError> {
    let io = |e| CheckpointError::io("write", path, e);
    file.write_all_at(&(shard.header_json.len() as u64).to_le_bytes(), 0).map_err(io)?;
    file.write_all_at(&shard.header_json, 8).map_err(io)?;
    file.set_len(shard.header.file_bytes()).map_err(io)?;
    let pieces = shard.header.tensors().iter().flat_map(|info| {
        let output = &shard.tensors[info.name.as_str()];
        let at = shard.header.data_start() + info.data.start;
        pieces(ctx, output, at)
    });
    let sources: Vec<TensorRef<'_>> = shard.tensors.values().map(|output| output.from).collect();
    let mut n_overflowed = 0;
    read_and_map_ordered(
        ctx,
        pieces,
        cost,
        n_readers(ctx, &sources),
        |piece| Ok(piece.read(ctx)?),
        |piece, window| {
            let (bytes, overflow) = piece.cast(&window);
            piece.output.from.shard.confirm(&window)?;
            file.write_all_at(&bytes, piece.at).map_err(io)?;
            ctx.observer.advance(bytes.len() as u64);
            match overflow {
                Some(first) if !options.allow_overflow => Err(piece.overflow(first)),
                overflow => Ok(overflow.map_or(0, |first| first.n)),
            }
        },
        |_, n| {
            n_overflowed += n;
            Ok(())
        },
    )?;
    // Not tried again on failure: the system may have dropped the pages and would then report success.
    file.sync_all().map_err(|e| CheckpointError::io("sync", path, e))?;
    Ok(n_overflowed)
}

/// The pieces of a tensor, which begins at byte `at` of the file.
fn pieces<'p, 'a>(ctx: &Context<'_>, output: &'p Output<'a>, at: u64) -> Vec<Piece<'p, 'a>> {
    let info = output.from.info;
    let (bits, window) = (info.dtype.bitsize() as u64, ctx.window_bytes());
    let piece = |run, at| Piece { output, run, at };
    let step_over = |n: u64, step: u64| (0..n).step_by(step as usize).map(move |start| start..n.min(start + step));
    if output.transposed {
        let layout = RowLayout::new(&info.shape, false).expect("a decoded weight is a matrix or a stack of them");
        // One matrix is decoded at a time where it fits.
        let columns = (ctx.pass_bytes() / 16 / (4 * layout.d_out)).clamp(32, layout.d_in.max(32));
        let width = output.dtype.bitsize() as u64 / 8;
        let of_stack = move |stack: u64| {
            step_over(layout.d_in, columns).map(move |columns| {
                let row = stack * layout.d_in + columns.start;
                (Run::Columns { stack, columns }, at + row * layout.d_out * width)
            })
        };
        return (0..layout.n_stacks).flat_map(of_stack).map(|(run, at)| piece(run, at)).collect();
    }
    if output.dtype == info.dtype && output.from.layout().is_none() {
        return step_over(info.n_bytes(), window).map(|run| piece(Run::Bytes(run.clone()), at + run.start)).collect();
    }
    let step = (window * 8 / bits.max(1)).max(1);
    let width = output.dtype.bitsize() as u64 / 8;
    step_over(info.n_elements(), step).map(|run| piece(Run::Elements(run.clone()), at + run.start * width)).collect()
}

/// Bytes that a piece takes: what is read, with codes and scales behind it, and what is written.
fn cost(piece: &Piece<'_, '_>) -> u64 {
    let info = piece.output.from.info;
    let n_elements = match &piece.run {
        Run::Bytes(range) => return window_cost(range.end - range.start) * 2,
        Run::Elements(range) => range.end - range.start,
        Run::Columns { columns, .. } => {
            let d_out = info.shape[info.shape.len() - 2];
            (columns.end - columns.start) * d_out
        }
    };
    window_cost(n_elements * 16)
}

/// Numbers that became infinite: how many, and the first, by its element in the piece.
struct Overflow {
    n: u64,
    first: usize,
    value: f64,
}

impl Piece<'_, '_> {
    fn read(&self, ctx: &Context<'_>) -> Result<crate::checkpoint::Window, CheckpointError> {
        let from = self.output.from;
        let width = from.info.dtype.bitsize() as u64 / 8;
        match &self.run {
            Run::Bytes(range) => from.window(ctx, range.clone()),
            Run::Elements(range) => from.signed_window(ctx, range.start * width..range.end * width),
            Run::Columns { stack, columns } => from.signed_columns(ctx, *stack, columns.clone()),
        }
    }

    /// The bytes of the new tensor.
    fn cast(&self, window: &[u8]) -> (Vec<u8>, Option<Overflow>) {
        let (from, to) = (self.output.from.info.dtype, self.output.dtype);
        match &self.run {
            Run::Bytes(_) => (window.to_vec(), None),
            Run::Elements(_) => cast_all(from, to, window),
            Run::Columns { columns, .. } => {
                let width = (columns.end - columns.start) as usize;
                let n_rows = window.len() / 4 / width.max(1);
                let mut turned = vec![0; window.len()];
                for (i, le) in turned.chunks_exact_mut(4).enumerate() {
                    let at = ((i % n_rows) * width + i / n_rows) * 4;
                    le.copy_from_slice(&window[at..at + 4]);
                }
                cast_all(from, to, &turned)
            }
        }
    }

    fn overflow(&self, overflow: Overflow) -> CastError {
        let info = self.output.from.info;
        let d_in = info.shape.last().copied().unwrap_or(1).max(1);
        let (row, column) = match &self.run {
            Run::Bytes(_) => (0, 0),
            Run::Elements(range) => {
                let at = range.start + overflow.first as u64;
                (at / d_in, at % d_in)
            }
            Run::Columns { stack, columns } => {
                let d_out = info.shape[info.shape.len() - 2];
                let at = overflow.first as u64;
                (stack * d_out + at % d_out, columns.start + at / d_out)
            }
        };
        let path = self.output.from.shard.path().to_owned();
        let (tensor, dtype, value) = (info.name.clone(), self.output.dtype, overflow.value);
        CastError::Overflow { path, tensor, row, column, value, dtype }
    }
}

fn cast_all(from: Dtype, to: Dtype, bytes: &[u8]) -> (Vec<u8>, Option<Overflow>) {
    with_float!(from, T => cast_floats::<T>(to, bytes), else unreachable!("tensors that are cast are floats"))
}

fn cast_floats<T: Float>(to: Dtype, bytes: &[u8]) -> (Vec<u8>, Option<Overflow>) {
    let numbers = bytes.chunks_exact(T::BYTES).map(T::from_le);
    let mut cast = Vec::with_capacity(bytes.len() / T::BYTES * to.bitsize() / 8);
    let mut overflow: Option<Overflow> = None;
    for (i, number) in numbers.enumerate() {
        let value = number.widen().to_f64();
        let is_finite = match to {
            Dtype::BF16 => push(&mut cast, bf16_of(value).to_le_bytes(), bf16_of(value).is_finite()),
            Dtype::F16 => push(&mut cast, f16_of(value).to_le_bytes(), f16_of(value).is_finite()),
            _ => push(&mut cast, (value as f32).to_le_bytes(), (value as f32).is_finite()),
        };
        if !is_finite && value.is_finite() {
            let overflow = overflow.get_or_insert(Overflow { n: 0, first: i, value });
            overflow.n += 1;
        }
    }
    (cast, overflow)
}

fn push<const N: usize>(bytes: &mut Vec<u8>, le: [u8; N], is_finite: bool) -> bool {
    bytes.extend_from_slice(&le);
    is_finite
}
