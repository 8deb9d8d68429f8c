//! `W + s * B A`, for weights that stream through a device.

use std::ops::Range;

use super::{DeviceVec, Gpu, GpuError, Pinned, Queue, launch::is_known};
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
    /// The product is multiplied by this.
    pub scale: f32,
}

/// The plain form of [`LowRank::merge`], and its judge: for each element the products are summed in `f32` over the rank,
/// ascending, with fused steps; then `weight + sum * scale`, two roundings, and one to the weight's type.
///
/// Another order of the sum, as matrix libraries choose it, moves the sum by a few units of `f32`'s last place; after rounding
/// to BF16 or F16 the result is the same or the neighbour of it. A weight that is a NaN keeps its bits.
///
/// # Panics
/// Where lengths disagree, or the elements are not BF16, F16 or F32.
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
        assert!(is_known(rows.dtype()), "kernels know BF16, F16 and F32");
        assert_eq!(self.b.len(), rows.n_rows() * self.rank, "b is [n_rows, rank]");
        assert_eq!(self.a.len(), self.rank * rows.d_in(), "a is [rank, d_in]");
    }
}

/// Rows of one launch at most: a grid's second dimension is bounded.
const MOST_ROWS: usize = 65_535 * 64;

/// Merges low-rank deltas on a device: while one piece of the rows is there, the next is copied in and the last copied out.
pub struct LowRank {
    queue: Queue,
    slots: [Slot; 2],
    piece_bytes: usize,
}

struct Slot {
    weights: DeviceVec<u8>,
    b: DeviceVec<f32>,
    staged: Option<Pinned>,
    result: Option<Pinned>,
    /// The rows under way.
    rows: Option<Range<usize>>,
}

impl Slot {
    fn new(queue: &Queue) -> Result<Self, GpuError> {
        let (weights, b) = (queue.alloc(0, "nothing")?, queue.alloc(0, "nothing")?);
        Ok(Self { weights, b, staged: None, result: None, rows: None })
    }
}

impl LowRank {
    /// A merger whose pieces take `device_bytes` of device memory together, beside the factor `a`. Three pieces of that size are pinned
    /// on the host.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn new(gpu: &Gpu, device_bytes: u64) -> Result<Self, GpuError> {
        let queue = Queue::new(gpu)?;
        let slots = [Slot::new(&queue)?, Slot::new(&queue)?];
        Ok(Self { queue, slots, piece_bytes: usize::try_from(device_bytes / 2).unwrap_or(usize::MAX) })
    }

    /// Whether weights of this type can be merged on a device.
    pub fn takes(dtype: Dtype) -> bool {
        is_known(dtype)
    }

    /// The bytes of `rows + scale * b a`; equals [`merged_low_rank`] bit for bit.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`] where not even one row fits, [`GpuError::Kernel`] where the device failed.
    ///
    /// # Panics
    /// As [`merged_low_rank`].
    pub fn merge(&mut self, rows: RowBlock<'_>, factors: &LowRankFactors<'_>) -> Result<Vec<u8>, GpuError> {
        factors.check(rows);
        let n_rows = rows.n_rows();
        if rows.bytes().is_empty() {
            return Ok(Vec::new());
        }
        let row_bytes = rows.bytes().len() / n_rows;
        let a = self.queue.upload_all(factors.a, "a factor of a low-rank delta")?;
        let n_piece = self.make_room(n_rows, row_bytes, factors.rank)?;
        let mut merged = Vec::with_capacity(rows.bytes().len());
        let mut starts = (0..n_rows).step_by(n_piece);
        let mut turn = 0;
        loop {
            let next = starts.next().map(|start| start..n_rows.min(start + n_piece));
            let is_last = next.is_none();
            if let Some(piece) = next {
                self.submit(turn % 2, piece, rows, factors, &a)?;
            }
            turn += 1;
            self.collect(turn % 2, row_bytes, &mut merged)?;
            if is_last {
                return Ok(merged);
            }
        }
    }

    /// Makes room for pieces in both slots, the smaller the less memory there is; how many rows a piece has.
    fn make_room(&mut self, n_rows: usize, row_bytes: usize, rank: usize) -> Result<usize, GpuError> {
        let needed = row_bytes + 4 * rank;
        loop {
            let n_piece = (self.piece_bytes / needed).min(n_rows).min(MOST_ROWS);
            if n_piece == 0 {
                let (needed, available) = (needed as u64, self.piece_bytes as u64);
                let (ordinal, what) = (self.queue.gpu().ordinal(), "merging one row");
                return Err(GpuError::OutOfMemory { ordinal, what, needed, available });
            }
            match self.allocate(n_piece, row_bytes, rank) {
                Err(GpuError::OutOfMemory { .. }) if n_piece > 1 => {
                    self.slots = [Slot::new(&self.queue)?, Slot::new(&self.queue)?];
                    self.piece_bytes = n_piece / 2 * needed;
                }
                done => return done.map(|()| n_piece),
            }
        }
    }

    fn allocate(&mut self, n_piece: usize, row_bytes: usize, rank: usize) -> Result<(), GpuError> {
        let Self { queue, slots, .. } = self;
        for slot in slots {
            let staged = n_piece * (row_bytes + 4 * rank);
            if slot.weights.len() < n_piece * row_bytes {
                slot.weights = queue.alloc(0, "nothing")?;
                slot.weights = queue.alloc(n_piece * row_bytes, "merging rows")?;
            }
            if slot.b.len() < n_piece * rank {
                slot.b = queue.alloc(0, "nothing")?;
                slot.b = queue.alloc(n_piece * rank, "merging rows")?;
            }
            if slot.staged.as_ref().is_none_or(|memory| memory.len() < staged) {
                slot.staged = Some(queue.pinned(staged)?);
            }
            if slot.result.as_ref().is_none_or(|memory| memory.len() < n_piece * row_bytes) {
                slot.result = Some(queue.pinned(n_piece * row_bytes)?);
            }
        }
        Ok(())
    }

    fn submit(
        &mut self,
        at: usize,
        piece: Range<usize>,
        rows: RowBlock<'_>,
        factors: &LowRankFactors<'_>,
        a: &DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        let Self { queue, slots, .. } = self;
        let slot = &mut slots[at];
        let staged = slot.staged.as_mut().expect("room was made");
        let result = slot.result.as_mut().expect("room was made");
        let (n_rows, rank) = (piece.len(), factors.rank);
        let weights = rows.slice(piece.clone()).bytes();
        let b = &factors.b[piece.start * rank..piece.end * rank];
        let end = weights.len() + size_of_val(b);
        let bytes = staged.bytes_mut()?;
        bytes[..weights.len()].copy_from_slice(weights);
        for (to, value) in bytes[weights.len()..end].chunks_exact_mut(4).zip(b) {
            to.copy_from_slice(&value.to_ne_bytes());
        }
        queue.upload(staged, 0..weights.len(), &mut slot.weights)?;
        queue.upload(staged, weights.len()..end, &mut slot.b)?;
        let shape = (n_rows, rows.d_in(), rank);
        queue.low_rank((&mut slot.weights, rows.dtype()), (&slot.b, a), factors.scale, shape)?;
        queue.download(&slot.weights, result, 0..weights.len())?;
        slot.rows = Some(piece);
        Ok(())
    }

    fn collect(&mut self, at: usize, row_bytes: usize, merged: &mut Vec<u8>) -> Result<(), GpuError> {
        let slot = &mut self.slots[at];
        let Some(rows) = slot.rows.take() else { return Ok(()) };
        let bytes = slot.result.as_ref().expect("room was made").bytes()?;
        merged.extend_from_slice(&bytes[..rows.len() * row_bytes]);
        Ok(())
    }
}
