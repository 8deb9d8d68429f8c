//! Chooses the largest entries of each row, for rows that stream through a device.
//!
//! A block of rows is split into pieces. Each thread with a block takes a lane: a queue with two slots of pinned and
//! device memory. While the device processes one piece (copy in, kernels, copy out), the thread copies the next one
//! into pinned memory, and the lanes of other threads work in parallel. The memory limits are fixed when the ranker is
//! created.

use std::{
    ops::Range,
    sync::{Condvar, Mutex},
};

use super::{
    Copyable, DeviceVec, Gpu, GpuError, MAX_COLUMNS, Pinned, Queue,
    launch::{KeyRows, is_supported},
};
use crate::tensor::{Dtype, Float, RowBlock, with_float};

/// What enters the score besides the weights' magnitude. Gradients are rows of the weights' shape.
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    /// `|w|`.
    None,
    /// `|w|`, smallest first.
    Smallest,
    /// `|g|`.
    Gradient(RowBlock<'a>),
    /// `|w * g|`.
    Product(RowBlock<'a>),
    /// `g * g`.
    Square(RowBlock<'a>),
    /// `|w| * norm[column]`.
    Norms {
        /// `[n_matrices, d_in]`, for the matrices that the rows belong to.
        norms: &'a [f32],
        /// The row of the first matrix at which the rows begin.
        first_row: u32,
        /// Number of rows of one matrix.
        d_out: u32,
    },
}

impl<'a> Factor<'a> {
    fn rows(&self) -> Option<RowBlock<'a>> {
        match *self {
            Self::Gradient(rows) | Self::Product(rows) | Self::Square(rows) => Some(rows),
            Self::None | Self::Smallest | Self::Norms { .. } => None,
        }
    }

    /// The kind of score as numbered in `score.cu`; `None` if the weights are their own keys.
    fn kind(&self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Smallest => Some(0),
            Self::Gradient(_) => Some(1),
            Self::Product(_) => Some(2),
            Self::Square(_) => Some(3),
            Self::Norms { .. } => Some(4),
        }
    }
}

/// The columns chosen in a block of rows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ranked {
    /// `[n_rows, k]`, ascending within a row.
    pub columns: Vec<u32>,
    /// The row and column of the first NaN weight, gradient or score; the columns are then meaningless.
    pub first_nan: Option<(usize, usize)>,
}

/// Chooses the largest entries of each row on a device, for as many concurrent threads as there are lanes.
pub struct RowRanker {
    gpu: Gpu,
    /// Device memory and pinned memory per slot.
    slot_bytes: usize,
    pinned_bytes: usize,
    lanes: Mutex<Lanes>,
    returned: Condvar,
}

struct Lanes {
    free: Vec<Lane>,
    n_made: usize,
    most: usize,
    /// Set after a fatal failure: no more lanes are handed out.
    failure: Option<GpuError>,
}

/// A queue with its two pieces in flight.
struct Lane {
    queue: Queue,
    slots: [Slot; 2],
    norms: DeviceVec<f32>,
    /// Device memory per slot; reduced if the device has less than expected.
    slot_bytes: usize,
}

/// Memory of one piece; grows on demand.
struct Slot {
    weights: DeviceVec<u8>,
    gradients: DeviceVec<u8>,
    keys: DeviceVec<u8>,
    columns: DeviceVec<u32>,
    first_nan: DeviceVec<u64>,
    /// Weights, then gradients.
    staged: Option<Pinned>,
    /// `first_nan`, then columns.
    result: Option<Pinned>,
    /// The rows in flight.
    rows: Option<Range<usize>>,
}

/// Bytes per row in a slot.
#[derive(Clone, Copy)]
struct RowBytes {
    weights: usize,
    gradients: usize,
    keys: usize,
    columns: usize,
}

impl RowBytes {
    fn on_device(self) -> usize {
        self.weights + self.gradients + self.keys + self.columns
    }
    fn pinned(self) -> usize {
        self.weights + self.gradients + self.columns
    }
}

/// Extra bytes per slot: `first_nan`.
const SLOT_EXTRA: usize = 8;
const SLOTS: usize = 2;

impl RowRanker {
    /// A ranker with one lane per thread for `n_lanes` threads, which together use at most `device_bytes` on the
    /// device and `pinned_bytes` of host memory. Nothing is allocated yet.
    pub fn new(gpu: &Gpu, n_lanes: usize, device_bytes: u64, pinned_bytes: u64) -> Self {
        let share = |n_bytes: u64| usize::try_from(n_bytes).unwrap_or(usize::MAX) / (SLOTS * n_lanes.max(1));
        Self {
            gpu: gpu.clone(),
            slot_bytes: share(device_bytes),
            pinned_bytes: share(pinned_bytes),
            lanes: Mutex::new(Lanes { free: Vec::new(), n_made: 0, most: n_lanes.max(1), failure: None }),
            returned: Condvar::new(),
        }
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether rows of this dtype and length can be chosen on a device with this score: BF16, F16 and F32, up to
    /// [`MAX_COLUMNS`].
    pub fn supports(dtype: Dtype, d_in: usize, factor: &Factor<'_>) -> bool {
        let known = |rows: RowBlock<'_>| is_supported(rows.dtype());
        is_supported(dtype) && (1..=MAX_COLUMNS).contains(&d_in) && factor.rows().is_none_or(known)
    }

    /// Chooses the `k` entries with the largest keys in each row; ties go to the lower column.
    ///
    /// Blocks until a lane is free.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`] if not even one row fits, [`GpuError::Kernel`] if the device failed,
    /// [`GpuError::WrongResult`] if the result is not a valid choice of columns.
    ///
    /// # Panics
    /// If [`Self::supports`] is false, or gradients or norms have another shape.
    pub fn topk_rows(&self, weights: RowBlock<'_>, factor: &Factor<'_>, k: usize) -> Result<Ranked, GpuError> {
        let (n_rows, d_in) = (weights.n_rows(), weights.d_in());
        assert!(Self::supports(weights.dtype(), d_in, factor), "the device supports these rows");
        if let Some(rows) = factor.rows() {
            assert_eq!((rows.n_rows(), rows.d_in()), (n_rows, d_in), "one gradient per weight");
        }
        let k = k.min(d_in);
        if k == 0 || n_rows == 0 {
            return Ok(Ranked::default());
        }
        let row_bytes = RowBytes {
            weights: weights.bytes().len() / n_rows,
            gradients: factor.rows().map_or(0, |rows| rows.bytes().len() / n_rows),
            keys: if factor.kind().is_some() { 4 * d_in } else { 0 },
            columns: 4 * k,
        };
        loop {
            let mut lane = self.acquire_lane()?;
            let room = self.allocate_slots(&mut lane, row_bytes, n_rows, factor);
            let ranked = room.and_then(|n_piece| lane.rank(weights, factor, k, n_piece));
            match ranked {
                Ok(ranked) => {
                    self.lock().free.push(lane);
                    self.returned.notify_one();
                    return Ok(ranked);
                }
                Err(error) => {
                    drop(lane);
                    self.drop_lane(error)?;
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Lanes> {
        self.lanes.lock().expect("no thread panics while holding the lock")
    }

    fn acquire_lane(&self) -> Result<Lane, GpuError> {
        let mut lanes = self.lock();
        loop {
            if let Some(error) = &lanes.failure {
                return Err(error.clone());
            }
            if let Some(lane) = lanes.free.pop() {
                return Ok(lane);
            }
            if lanes.n_made < lanes.most {
                lanes.n_made += 1;
                drop(lanes);
                match Lane::new(&self.gpu, self.slot_bytes) {
                    Ok(lane) => return Ok(lane),
                    Err(error) => self.drop_lane(error)?,
                }
                lanes = self.lock();
                continue;
            }
            lanes = self.returned.wait(lanes).expect("no thread panics while holding the lock");
        }
    }

    /// Removes a lane. If it only lacked memory next to the others, those continue; any other failure is permanent.
    fn drop_lane(&self, error: GpuError) -> Result<(), GpuError> {
        let mut lanes = self.lock();
        lanes.n_made -= 1;
        if lanes.n_made > 0 && lanes.failure.is_none() && matches!(error, GpuError::OutOfMemory { .. }) {
            // Continue with fewer lanes, which have enough memory.
            lanes.most = lanes.n_made;
            return Ok(());
        }
        lanes.failure.get_or_insert_with(|| error.clone());
        self.returned.notify_all();
        Err(error)
    }

    /// Allocates pieces in both slots, smaller if memory is short; returns the number of rows per piece.
    fn allocate_slots(
        &self,
        lane: &mut Lane,
        row: RowBytes,
        n_rows: usize,
        factor: &Factor<'_>,
    ) -> Result<usize, GpuError> {
        let needed = |n: usize| n * row.on_device() + SLOT_EXTRA;
        if needed(1) > self.slot_bytes {
            let ordinal = self.gpu.ordinal();
            let (needed, available) = (needed(1) as u64, self.slot_bytes as u64);
            return Err(GpuError::OutOfMemory { ordinal, what: "choosing in one row", needed, available });
        }
        loop {
            // One row is always tried: rows differ in length, so a failure for others need not be one here.
            let by_device = (lane.slot_bytes.max(needed(1)) - SLOT_EXTRA) / row.on_device();
            let by_host = (self.pinned_bytes / row.pinned()).max(1);
            let n_piece = by_device.min(by_host).min(n_rows);
            match lane.allocate_slots(n_piece, row, factor) {
                Err(GpuError::OutOfMemory { .. }) if n_piece > 1 => {
                    lane.free_memory()?;
                    lane.slot_bytes = needed(n_piece / 2);
                }
                done => return done.map(|()| n_piece),
            }
        }
    }
}

/// Grows `memory` to at least `len` values; its content is lost.
fn grow<T: Copyable>(queue: &Queue, memory: &mut DeviceVec<T>, len: usize) -> Result<(), GpuError> {
    if memory.len() < len {
        // Freed first, so that old and new memory need not fit together.
        *memory = queue.alloc(0, "nothing")?;
        *memory = queue.alloc(len, "choosing in rows")?;
    }
    Ok(())
}

fn grow_pinned(queue: &Queue, memory: &mut Option<Pinned>, len: usize) -> Result<(), GpuError> {
    if memory.as_ref().is_none_or(|memory| memory.len() < len) {
        *memory = None;
        *memory = Some(queue.pinned(len)?);
    }
    Ok(())
}

impl Slot {
    fn new(queue: &Queue) -> Result<Self, GpuError> {
        Ok(Self {
            weights: queue.alloc(0, "nothing")?,
            gradients: queue.alloc(0, "nothing")?,
            keys: queue.alloc(0, "nothing")?,
            columns: queue.alloc(0, "nothing")?,
            first_nan: queue.alloc(0, "nothing")?,
            staged: None,
            result: None,
            rows: None,
        })
    }
}

impl Lane {
    fn new(gpu: &Gpu, slot_bytes: usize) -> Result<Self, GpuError> {
        let queue = Queue::new(gpu)?;
        let slots = [Slot::new(&queue)?, Slot::new(&queue)?];
        Ok(Self { norms: queue.alloc(0, "nothing")?, queue, slots, slot_bytes })
    }

    fn free_memory(&mut self) -> Result<(), GpuError> {
        self.slots = [Slot::new(&self.queue)?, Slot::new(&self.queue)?];
        Ok(())
    }

    fn allocate_slots(&mut self, n_piece: usize, row: RowBytes, factor: &Factor<'_>) -> Result<(), GpuError> {
        let queue = &self.queue;
        for slot in &mut self.slots {
            grow(queue, &mut slot.weights, n_piece * row.weights)?;
            grow(queue, &mut slot.gradients, n_piece * row.gradients)?;
            grow(queue, &mut slot.keys, n_piece * row.keys)?;
            grow(queue, &mut slot.columns, n_piece * row.columns / 4)?;
            grow(queue, &mut slot.first_nan, 1)?;
            grow_pinned(queue, &mut slot.staged, n_piece * (row.weights + row.gradients))?;
            grow_pinned(queue, &mut slot.result, 8 + n_piece * row.columns)?;
        }
        if let Factor::Norms { norms, .. } = factor {
            self.norms = queue.upload_all(norms, "norms of activations")?;
        }
        Ok(())
    }

    /// Processes all pieces of a block: one is on the device while the next is prepared.
    fn rank(
        &mut self,
        weights: RowBlock<'_>,
        factor: &Factor<'_>,
        k: usize,
        n_piece: usize,
    ) -> Result<Ranked, GpuError> {
        let n_rows = weights.n_rows();
        let mut ranked = Ranked { columns: Vec::with_capacity(n_rows * k), first_nan: None };
        let mut starts = (0..n_rows).step_by(n_piece);
        let mut turn = 0;
        loop {
            let next = starts.next().map(|start| start..n_rows.min(start + n_piece));
            let is_last = next.is_none();
            if let Some(rows) = next {
                self.submit(turn % SLOTS, rows, weights, factor, k)?;
            }
            // The previous piece, or, at the end, the last.
            turn += 1;
            self.collect(turn % SLOTS, weights.d_in(), n_rows, k, &mut ranked)?;
            if is_last || ranked.first_nan.is_some() {
                for slot in &mut self.slots {
                    slot.rows = None;
                }
                return Ok(ranked);
            }
        }
    }

    /// Starts to process a piece.
    fn submit(
        &mut self,
        at: usize,
        rows: Range<usize>,
        weights: RowBlock<'_>,
        factor: &Factor<'_>,
        k: usize,
    ) -> Result<(), GpuError> {
        let Self { queue, slots, norms, .. } = self;
        let slot = &mut slots[at];
        let staged = slot.staged.as_mut().expect("buffers were allocated");
        let result = slot.result.as_mut().expect("buffers were allocated");
        let (n_rows, d_in) = (rows.len(), weights.d_in());
        let of_weights = weights.slice(rows.clone()).bytes();
        let of_factor = factor.rows().map(|all| (all.slice(rows.clone()).bytes(), all.dtype()));
        let end = of_weights.len() + of_factor.map_or(0, |(bytes, _)| bytes.len());
        let bytes = staged.bytes_mut()?;
        bytes[..of_weights.len()].copy_from_slice(of_weights);
        if let Some((of_factor, _)) = of_factor {
            bytes[of_weights.len()..end].copy_from_slice(of_factor);
        }
        queue.fill(&mut slot.first_nan, 0xff)?;
        queue.upload(staged, 0..of_weights.len(), &mut slot.weights)?;
        queue.upload(staged, of_weights.len()..end, &mut slot.gradients)?;
        let dtype = weights.dtype();
        let (mask, largest) = with_float!(dtype, T => T::KEY_BITS, else unreachable!("kernels support only floats"));
        let keys = match factor.kind() {
            None => {
                let (mask, largest) = (mask as u32, largest as u32);
                KeyRows { bytes: &slot.weights, key_bytes: dtype.bitsize() / 8, n_rows, d_in, mask, largest }
            }
            Some(kind) => {
                let place = match *factor {
                    // Row numbers continue after the previous pieces.
                    Factor::Norms { first_row, d_out, .. } => (first_row + rows.start as u32, d_out),
                    _ => (0, u32::MAX),
                };
                let gradients = of_factor.map(|(_, dtype)| (&slot.gradients, dtype));
                let (shape, weights) = ((n_rows, d_in), (&slot.weights, dtype));
                queue.score_keys(weights, gradients, norms, place, kind, shape, &mut slot.keys, &mut slot.first_nan)?;
                // NaNs have been found by this time.
                let (mask, largest) = (u32::MAX >> 1, u32::MAX >> 1);
                KeyRows { bytes: &slot.keys, key_bytes: 4, n_rows, d_in, mask, largest }
            }
        };
        queue.topk(&keys, k, &mut slot.columns, &mut slot.first_nan)?;
        queue.download(&slot.first_nan, result, 0..8)?;
        queue.download(&slot.columns, result, 8..8 + 4 * n_rows * k)?;
        slot.rows = Some(rows);
        Ok(())
    }

    /// Waits for a piece, if one is in flight, and appends its columns.
    fn collect(&mut self, at: usize, d_in: usize, n_all: usize, k: usize, ranked: &mut Ranked) -> Result<(), GpuError> {
        let slot = &mut self.slots[at];
        let Some(rows) = slot.rows.take() else { return Ok(()) };
        let kernel = self.queue.gpu().last_kernel();
        let ordinal = self.queue.gpu().ordinal();
        let bytes = slot.result.as_ref().expect("buffers were allocated").bytes()?;
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let (column, row) = (number(0), number(4));
        if (column, row) != (u32::MAX, u32::MAX) {
            ranked.first_nan = Some((rows.start + row as usize, column as usize));
            return Ok(());
        }
        let wrong = |row: usize| {
            let (row, n_rows) = (row as u64, n_all as u64);
            GpuError::WrongResult { ordinal, kernel, row, n_rows, why: "columns do not ascend within the row" }
        };
        for (row, of_row) in rows.zip(bytes[8..].chunks_exact(4 * k)) {
            let first = ranked.columns.len();
            ranked
                .columns
                .extend(of_row.chunks_exact(4).map(|le| u32::from_le_bytes(le.try_into().expect("four bytes"))));
            let chosen = &ranked.columns[first..];
            if !chosen.is_sorted_by(|a, b| a < b) || chosen.last().is_none_or(|&last| last as usize >= d_in) {
                return Err(wrong(row));
            }
        }
        Ok(())
    }
}
