//! Layouts: what the stored tensors of a quantized weight mean.
//!
//! [`Codes`](super::Codes) says which stored tensors make a weight. A [`CodedLayout`] says how: it is resolved from the headers and the
//! quantization config when the weight is first used, every shape checked against the others, and decodes runs of the weight to
//! float32. Logical shapes are `[.., d_out, d_in]`, whatever the order on disk. A layout that is not known is refused by name.
//!
//! Three families cover all formats: codes that lie row by row ([`rows`]), integers packed along the columns of a transposed matrix
//! ([`columns`]: GPTQ, AWQ), and blocks that take no notice of rows ([`flat`]: bitsandbytes). All arithmetic is float32, each product
//! rounded once, as the formats' own libraries do it.

mod columns;
mod config;
mod flat;
mod grid;
mod resolve;
mod rows;

use std::ops::Range;

pub(super) use config::QuantizationConfig;
pub(super) use resolve::Resolver;

use super::{CheckpointError, Context, Shard, TensorInfo, Window};
use crate::tensor::{Dtype, RowLayout};

/// The offset of a decoded weight in its shard: where no file has bytes, so that a read that bypasses the layout fails.
const NOWHERE: u64 = 1 << 61;

/// How a quantized weight is stored, and how it is decoded.
#[derive(Debug)]
pub struct CodedLayout {
    /// The weight as a tensor of float32 numbers: its name in the model, its logical shape. Its data lies nowhere.
    info: TensorInfo,
    /// A stable name of the layout, such as `fp8-block`.
    name: String,
    /// The stored tensors: codes, then scales, in the order in which a whole weight is hashed.
    stored: Vec<Stored>,
    family: Family,
    /// Whether the model holds each matrix as `[d_in, d_out]`.
    is_transposed_in_memory: bool,
}

#[derive(Debug)]
enum Family {
    Rows(rows::RowCodes),
    Columns(columns::ColumnCodes),
    Flat(flat::FlatCodes),
}

/// A stored tensor by its place: which shard, which tensor of its header.
#[derive(Clone, Copy, Debug)]
struct Stored {
    shard: u32,
    tensor: u32,
}

impl Stored {
    fn shard(self, shards: &[Shard]) -> &Shard {
        &shards[self.shard as usize]
    }

    fn info(self, shards: &[Shard]) -> &TensorInfo {
        &self.shard(shards).header().tensors()[self.tensor as usize]
    }

    fn window(self, source: Source<'_>, range: Range<u64>) -> Result<Window, CheckpointError> {
        self.shard(source.shards).window(source.ctx, self.info(source.shards), range)
    }

    fn confirm(self, source: Source<'_>, window: &Window) -> Result<(), CheckpointError> {
        self.shard(source.shards).confirm(window)
    }

    /// A copy of the bytes `range`, proven to be the file's.
    fn read(self, source: Source<'_>, range: Range<u64>) -> Result<Vec<u8>, CheckpointError> {
        let window = self.window(source, range)?;
        let bytes = window.to_vec();
        self.confirm(source, &window)?;
        Ok(bytes)
    }

    /// The bytes `within` of each of the rows `rows`, one row after the other; a row has `row_bytes`.
    ///
    /// Memory: the result, and one window where most of the rows' bytes are wanted.
    fn rectangle(
        self,
        source: Source<'_>,
        row_bytes: u64,
        rows: Range<u64>,
        within: Range<u64>,
    ) -> Result<Vec<u8>, CheckpointError> {
        let width = within.end - within.start;
        if width == row_bytes {
            return self.read(source, rows.start * row_bytes..rows.end * row_bytes);
        }
        let mut bytes = vec![0; ((rows.end - rows.start) * width) as usize];
        let shard = self.shard(source.shards);
        let start = shard.file_range(self.info(source.shards)).start;
        for (row, strip) in rows.zip(bytes.chunks_exact_mut(width.max(1) as usize)) {
            if row % 1024 == 0 {
                source.ctx.check()?;
            }
            shard.read_at(strip, start + row * row_bytes + within.start)?;
        }
        Ok(bytes)
    }
}

/// Where stored tensors are read from.
#[derive(Clone, Copy)]
struct Source<'a> {
    ctx: &'a Context<'a>,
    shards: &'a [Shard],
}

/// What becomes of -0, for which formats have codes of their own that tools exchange with those of +0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NegativeZero {
    /// It becomes +0: equal numbers have equal bytes.
    Positive,
    /// It stays, as the formats' own libraries leave it.
    Kept,
}

/// Takes decoded numbers in their order.
struct Sink {
    bytes: Vec<u8>,
    negative_zero: NegativeZero,
}

impl Sink {
    fn push(&mut self, numbers: &[f32]) {
        let at = self.bytes.len();
        self.bytes.resize(at + 4 * numbers.len(), 0);
        // -0 + 0 is +0, and -0 + -0 is -0; nothing else changes.
        let zero = if self.negative_zero == NegativeZero::Kept { -0.0 } else { 0.0 };
        for (le, number) in self.bytes[at..].chunks_exact_mut(4).zip(numbers) {
            le.copy_from_slice(&(number + zero).to_le_bytes());
        }
    }
}

impl CodedLayout {
    /// The weight as a tensor of float32 numbers.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// A stable name of the layout, such as `fp8-block` or `gptq-int4`, for files and reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the model holds each matrix as `[d_in, d_out]` once it is decoded (experts of gpt-oss), so that a plain checkpoint stores it so.
    pub fn is_transposed_in_memory(&self) -> bool {
        self.is_transposed_in_memory
    }

    /// The stored tensors of the weight: codes, then scales.
    pub(super) fn stored<'a>(&self, shards: &'a [Shard]) -> impl ExactSizeIterator<Item = (&'a Shard, &'a TensorInfo)> {
        self.stored.iter().map(move |stored| (stored.shard(shards), stored.info(shards)))
    }

    /// The shard of its codes.
    pub(super) fn first_shard<'a>(&self, shards: &'a [Shard]) -> (usize, &'a Shard) {
        let first = self.stored[0];
        (first.shard as usize, first.shard(shards))
    }

    /// Bytes of all stored tensors.
    pub(super) fn stored_bytes(&self, shards: &[Shard]) -> u64 {
        self.stored(shards).map(|(_, info)| info.n_bytes()).sum()
    }

    /// The bytes `range` of the weight as little-endian float32 numbers, in bytes from its start.
    ///
    /// Memory: the result, and the codes and scales behind it.
    ///
    /// # Errors
    /// A failure to read.
    ///
    /// # Panics
    /// Where `range` is not inside the weight, or cuts a number.
    pub(super) fn window(
        &self,
        ctx: &Context<'_>,
        shards: &[Shard],
        range: Range<u64>,
        negative_zero: NegativeZero,
    ) -> Result<Window, CheckpointError> {
        assert!(range.start <= range.end && range.end <= self.info.n_bytes(), "a window lies inside its weight");
        assert!(range.start.is_multiple_of(4) && range.end.is_multiple_of(4), "a window holds whole numbers");
        let bytes = Vec::with_capacity((range.end - range.start) as usize);
        let mut sink = Sink { bytes, negative_zero };
        let elements = range.start / 4..range.end / 4;
        if !elements.is_empty() {
            let source = Source { ctx, shards };
            match &self.family {
                Family::Rows(codes) => codes.decode(source, elements, &mut sink)?,
                Family::Columns(codes) => codes.decode(source, elements, &mut sink)?,
                Family::Flat(codes) => codes.decode(source, elements, &mut sink)?,
            }
        }
        Ok(Window::owned(sink.bytes))
    }
}

/// A run of elements cut at the ends of rows: each row with its columns.
fn row_pieces(elements: Range<u64>, d_in: u64) -> impl Iterator<Item = (u64, Range<u64>)> {
    let (first, last) = (elements.start / d_in, (elements.end - 1) / d_in);
    (first..=last).map(move |row| {
        let start = elements.start.max(row * d_in) - row * d_in;
        let end = elements.end.min((row + 1) * d_in) - row * d_in;
        (row, start..end)
    })
}

/// The tensor of float32 numbers that a weight decodes to.
fn decoded_info(name: &str, shape: Vec<u64>) -> Result<(TensorInfo, RowLayout), String> {
    let layout = RowLayout::of(Dtype::F32, &shape, false)?;
    let data = NOWHERE..NOWHERE + 4 * layout.n_elements();
    Ok((TensorInfo { name: name.to_owned(), dtype: Dtype::F32, shape, data }, layout))
}
