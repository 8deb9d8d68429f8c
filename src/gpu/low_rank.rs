//! `W + s * B A`, for weights that stream through a device.
//!
//! cuBLAS is not used: its order of summation would give other bits than the CPU. It would also not be faster. Each
//! 16-bit weight crosses the link twice: at 50 GB/s each way (PCIe 5) that is 25 billion weights per second. Rank 16
//! needs 25e9 * 2 * 16 = 0.8 TFLOP/s, rank 256 needs 12.8: a fifth of an H100's 67 in float32. The factors also use
//! the link, which lowers the requirement.

use std::{
    ops::Range,
    sync::{Arc, Weak},
};

use super::{DeviceVec, Gpu, GpuError, Pinned, Queue, launch::is_supported};
use crate::tensor::{Accumulator, Dtype, Float, RowBlock, with_float};

/// The factors of a low-rank delta, widened to `f32`.
#[derive(Clone, Copy)]
pub struct LowRankFactors<'a> {
    /// `[n_rows, rank]`.
    pub b: &'a [f32],
    /// `[rank, d_in]`.
    pub a: &'a [f32],
    /// The rank.
    pub rank: usize,
    /// Multiplied into the product.
    pub scale: f32,
}

/// The plain reference implementation of [`LowRank::merge`]. For each element the products are summed in `f32` over
/// the rank, ascending, with fused multiply-adds; then `weight + sum * scale`, with two roundings, and one rounding to
/// the weight's dtype.
///
/// A different order of the sum, as in matrix libraries, changes the sum by a few units in the last place of `f32`;
/// after rounding to BF16 or F16 the result is the same or a neighboring value. A NaN weight keeps its bits.
///
/// # Panics
/// If the lengths are inconsistent, or the elements are not BF16, F16 or F32.
pub fn merged_low_rank(rows: RowBlock<'_>, factors: &LowRankFactors<'_>) -> Vec<u8> {
    fn merged<T: Float>(rows: RowBlock<'_>, factors: &LowRankFactors<'_>) -> Vec<u8> {
        let (d_in, rank) = (rows.d_in(), factors.rank);
        let mut bytes = rows.bytes().to_vec();
        for (at, element) in bytes.chunks_exact_mut(T::BYTES).enumerate() {
            let (row, column) = (at / d_in, at % d_in);
            let fused = |sum: f32, r: usize| factors.b[row * rank + r].mul_add(factors.a[r * d_in + column], sum);
            let sum = (0..rank).fold(0.0, fused);
            let weight = T::from_le(element);
            if !weight.is_nan() {
                let delta = T::Acc::from_f64(f64::from(sum));
                let scale = T::Acc::from_f64(f64::from(factors.scale));
                T::from_acc(weight.widen().add_scaled(delta, scale)).write_le(element);
            }
        }
        bytes
    }
    factors.check(rows);
    with_float!(rows.dtype(), T => merged::<T>(rows, factors), else unreachable!("checked"))
}

impl LowRankFactors<'_> {
    fn check(&self, rows: RowBlock<'_>) {
        assert!(is_supported(rows.dtype()), "kernels support BF16, F16 and F32");
        assert_eq!(self.b.len(), rows.n_rows() * self.rank, "b is [n_rows, rank]");
        assert_eq!(self.a.len(), self.rank * rows.d_in(), "a is [rank, d_in]");
    }
}

/// The effects on weights, counted as on the CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LowRankCounts {
    /// Weights whose delta is not zero.
    pub nonzero: u64,
    /// Those among them that kept their bits, NaNs excluded.
    pub absorbed: u64,
    /// Weights that changed their bits.
    pub changed: u64,
    /// Finite weights that became infinite or NaN.
    pub overflowed: u64,
}

/// Maximum number of rows per launch, because a grid's second dimension is limited.
const MAX_ROWS: usize = 65_535 * 64;

/// Size of the counts of one piece in bytes.
const COUNTS_BYTES: usize = 32;

/// Device memory besides the pieces.
fn fixed_bytes(a_len: usize) -> usize {
    4 * a_len + 2 * COUNTS_BYTES
}

/// Merges low-rank deltas on a device. While one piece of the rows is processed, the next is copied in and the
/// previous copied out.
pub struct LowRank {
    queue: Queue,
    slots: [Slot; 2],
    /// The factor on the device, and its source.
    a: DeviceVec<f32>,
    held: Weak<Vec<f32>>,
    device_bytes: usize,
}

struct Slot {
    weights: DeviceVec<u8>,
    b: DeviceVec<f32>,
    counts: DeviceVec<u64>,
    /// Weights, then `b`.
    staged: Option<Pinned>,
    /// Weights, then counts.
    result: Option<Pinned>,
    /// The rows in flight.
    rows: Option<Range<usize>>,
}

impl Slot {
    fn new(queue: &Queue) -> Result<Self, GpuError> {
        let (weights, b, counts) = (queue.alloc(0, "nothing")?, queue.alloc(0, "nothing")?, queue.alloc(0, "nothing")?);
        Ok(Self { weights, b, counts, staged: None, result: None, rows: None })
    }
}

/// A block of rows in host memory, and the delta to add.
struct Work<'a> {
    bytes: &'a mut [u8],
    dtype: Dtype,
    d_in: usize,
    row_bytes: usize,
    b: &'a [f32],
    rank: usize,
    scale: f32,
}

impl LowRank {
    /// A merger that uses at most `device_bytes` of device memory, and three times the size of a piece of pinned host
    /// memory.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn new(gpu: &Gpu, device_bytes: u64) -> Result<Self, GpuError> {
        let queue = Queue::new(gpu)?;
        let (slots, a) = ([Slot::new(&queue)?, Slot::new(&queue)?], queue.alloc(0, "nothing")?);
        let device_bytes = usize::try_from(device_bytes).unwrap_or(usize::MAX);
        Ok(Self { queue, slots, a, held: Weak::new(), device_bytes })
    }

    /// Whether weights of this dtype can be merged on a device.
    pub fn supports(dtype: Dtype) -> bool {
        is_supported(dtype)
    }

    /// The minimum device memory for rows of `row_bytes`; the factor `a` has `a_len` elements.
    pub fn min_bytes(row_bytes: usize, rank: usize, a_len: usize) -> u64 {
        (2 * (row_bytes + 4 * rank) + fixed_bytes(a_len)) as u64
    }

    /// The bytes of `rows + scale * b a`, bit for bit as in [`merged_low_rank`], and the counts.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`] if not even one row fits, [`GpuError::Kernel`] if the device failed.
    ///
    /// # Panics
    /// As [`merged_low_rank`].
    pub fn merge(
        &mut self,
        rows: RowBlock<'_>,
        factors: &LowRankFactors<'_>,
    ) -> Result<(Vec<u8>, LowRankCounts), GpuError> {
        factors.check(rows);
        let LowRankFactors { b, a, rank, scale } = *factors;
        let mut bytes = rows.bytes().to_vec();
        let a = Arc::new(a.to_vec());
        let counts = self.merge_in_place(rows.dtype(), &mut bytes, (b, &a, rank), scale)?;
        Ok((bytes, counts))
    }

    /// As [`Self::merge`], in place: `bytes` are `[n_rows, d_in]` of `dtype`, with the factors `b`, `a` and their
    /// rank. `a` is copied to the device if it differs from the previous one.
    ///
    /// # Errors
    /// As [`Self::merge`]. Without enough memory nothing is changed; after a failure of the device some rows may be.
    ///
    /// # Panics
    /// If the lengths are inconsistent, or the elements are not BF16, F16 or F32.
    pub fn merge_in_place(
        &mut self,
        dtype: Dtype,
        bytes: &mut [u8],
        (b, a, rank): (&[f32], &Arc<Vec<f32>>, usize),
        scale: f32,
    ) -> Result<LowRankCounts, GpuError> {
        assert!(is_supported(dtype), "kernels support BF16, F16 and F32");
        let mut counts = LowRankCounts::default();
        if bytes.is_empty() {
            return Ok(counts);
        }
        assert!(rank > 0 && a.len() % rank == 0 && b.len() % rank == 0, "b is [n_rows, rank], a is [rank, d_in]");
        let (n_rows, d_in) = (b.len() / rank, a.len() / rank);
        let row_bytes = d_in * dtype.bitsize() / 8;
        assert_eq!(bytes.len(), n_rows * row_bytes, "one row of b per row of weights");
        let n_piece = self.allocate_slots(n_rows, row_bytes, rank, a)?;
        // Discard the results of an earlier failed call.
        self.slots.iter_mut().for_each(|slot| slot.rows = None);
        let mut work = Work { bytes, dtype, d_in, row_bytes, b, rank, scale };
        let mut starts = (0..n_rows).step_by(n_piece);
        let mut turn = 0;
        loop {
            let next = starts.next().map(|start| start..n_rows.min(start + n_piece));
            let is_last = next.is_none();
            if let Some(piece) = next {
                self.submit(turn % 2, piece, &work)?;
            }
            turn += 1;
            self.collect(turn % 2, &mut work, &mut counts)?;
            if is_last {
                return Ok(counts);
            }
        }
    }

    /// Copies `a` to the device and allocates pieces in both slots, smaller if memory is short; returns the number of
    /// rows per piece.
    fn allocate_slots(
        &mut self,
        n_rows: usize,
        row_bytes: usize,
        rank: usize,
        a: &Arc<Vec<f32>>,
    ) -> Result<usize, GpuError> {
        let (needed, fixed) = (row_bytes + 4 * rank, fixed_bytes(a.len()));
        let mut n_piece = (self.device_bytes.saturating_sub(fixed) / 2 / needed).min(n_rows).min(MAX_ROWS);
        if n_piece == 0 {
            let (needed, available) = (Self::min_bytes(row_bytes, rank, a.len()), self.device_bytes as u64);
            let (ordinal, what) = (self.queue.gpu().ordinal(), "merging one row");
            return Err(GpuError::OutOfMemory { ordinal, what, needed, available });
        }
        loop {
            // Buffers that grew for other shapes may leave too little for this one.
            let grown =
                |slot: &Slot| slot.weights.len().max(n_piece * row_bytes) + 4 * slot.b.len().max(n_piece * rank);
            if self.slots.iter().map(grown).sum::<usize>() + fixed > self.device_bytes {
                self.slots = [Slot::new(&self.queue)?, Slot::new(&self.queue)?];
            }
            match self.hold(a).and_then(|()| self.allocate(n_piece, row_bytes, rank)) {
                Err(GpuError::OutOfMemory { .. }) if n_piece > 1 => {
                    self.slots = [Slot::new(&self.queue)?, Slot::new(&self.queue)?];
                    n_piece /= 2;
                }
                done => return done.map(|()| n_piece),
            }
        }
    }

    fn hold(&mut self, a: &Arc<Vec<f32>>) -> Result<(), GpuError> {
        // The address identifies the factor: while it is held here, no other can have the same address.
        if std::ptr::eq(self.held.as_ptr(), Arc::as_ptr(a)) {
            return Ok(());
        }
        self.held = Weak::new();
        self.a = self.queue.alloc(0, "nothing")?;
        self.a = self.queue.upload_all(a, "a factor of a low-rank delta")?;
        self.held = Arc::downgrade(a);
        Ok(())
    }

    fn allocate(&mut self, n_piece: usize, row_bytes: usize, rank: usize) -> Result<(), GpuError> {
        let Self { queue, slots, .. } = self;
        for slot in slots {
            let staged = n_piece * (row_bytes + 4 * rank);
            let result = n_piece * row_bytes + COUNTS_BYTES;
            if slot.weights.len() < n_piece * row_bytes {
                slot.weights = queue.alloc(0, "nothing")?;
                slot.weights = queue.alloc(n_piece * row_bytes, "merging rows")?;
            }
            if slot.b.len() < n_piece * rank {
                slot.b = queue.alloc(0, "nothing")?;
                slot.b = queue.alloc(n_piece * rank, "merging rows")?;
            }
            if slot.counts.is_empty() {
                slot.counts = queue.alloc(COUNTS_BYTES / 8, "merging rows")?;
            }
            if slot.staged.as_ref().is_none_or(|memory| memory.len() < staged) {
                slot.staged = Some(queue.pinned(staged)?);
            }
            if slot.result.as_ref().is_none_or(|memory| memory.len() < result) {
                slot.result = Some(queue.pinned(result)?);
            }
        }
        Ok(())
    }

    fn submit(&mut self, at: usize, piece: Range<usize>, work: &Work<'_>) -> Result<(), GpuError> {
        let Self { queue, slots, a, .. } = self;
        let slot = &mut slots[at];
        let staged = slot.staged.as_mut().expect("buffers were allocated");
        let result = slot.result.as_mut().expect("buffers were allocated");
        let (n_rows, rank) = (piece.len(), work.rank);
        let weights = &work.bytes[piece.start * work.row_bytes..piece.end * work.row_bytes];
        let b = &work.b[piece.start * rank..piece.end * rank];
        let end = weights.len() + size_of_val(b);
        let bytes = staged.bytes_mut()?;
        bytes[..weights.len()].copy_from_slice(weights);
        for (to, value) in bytes[weights.len()..end].chunks_exact_mut(4).zip(b) {
            to.copy_from_slice(&value.to_ne_bytes());
        }
        queue.upload(staged, 0..weights.len(), &mut slot.weights)?;
        queue.upload(staged, weights.len()..end, &mut slot.b)?;
        queue.fill(&mut slot.counts, 0)?;
        let shape = (n_rows, work.d_in, rank);
        queue.low_rank((&mut slot.weights, work.dtype), (&slot.b, a), work.scale, shape, &mut slot.counts)?;
        queue.download(&slot.weights, result, 0..weights.len())?;
        queue.download(&slot.counts, result, weights.len()..weights.len() + COUNTS_BYTES)?;
        slot.rows = Some(piece);
        Ok(())
    }

    fn collect(&mut self, at: usize, work: &mut Work<'_>, counts: &mut LowRankCounts) -> Result<(), GpuError> {
        let slot = &mut self.slots[at];
        let Some(rows) = slot.rows.take() else { return Ok(()) };
        let (merged, counted) =
            slot.result.as_ref().expect("buffers were allocated").bytes()?.split_at(rows.len() * work.row_bytes);
        work.bytes[rows.start * work.row_bytes..rows.end * work.row_bytes].copy_from_slice(merged);
        let (counted, _) = counted.as_chunks::<8>();
        let count = |at: usize| u64::from_ne_bytes(counted[at]);
        counts.nonzero += count(0);
        counts.absorbed += count(1);
        counts.changed += count(2);
        counts.overflowed += count(3);
        Ok(())
    }
}
