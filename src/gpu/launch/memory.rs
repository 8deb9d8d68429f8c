//! Device memory, and the queue that it belongs to.

use std::{marker::PhantomData, ops::Range, sync::Arc};

use cudarc::driver::{
    CudaEvent, CudaStream, result,
    sys::{self, CUevent_flags_enum as EventFlags, CUresult},
};

use super::Gpu;
use crate::gpu::GpuError;

/// A queue of asynchronous work on a device (a CUDA stream), executed in order.
pub struct Queue {
    pub(super) gpu: Gpu,
    pub(super) stream: Arc<CudaStream>,
}

/// Types for which every bit pattern is valid.
pub trait Copyable: Copy + Send + Sync + 'static {}
impl Copyable for u8 {}
impl Copyable for u16 {}
impl Copyable for u32 {}
impl Copyable for u64 {}
impl Copyable for f32 {}
impl Copyable for f64 {}

/// Device memory for `len` values, which belongs to one queue.
pub struct DeviceVec<T> {
    pub(super) at: sys::CUdeviceptr,
    pub(super) len: usize,
    /// Whether it is freed on drop; borrowed memory is not.
    is_owned: bool,
    stream: Arc<CudaStream>,
    marker: PhantomData<fn() -> T>,
}

impl<T> DeviceVec<T> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<T> Drop for DeviceVec<T> {
    fn drop(&mut self) {
        // Work that uses the memory may be in flight; errors cannot be reported here.
        let waited = self.stream.context().bind_to_thread().and_then(|()| self.stream.synchronize());
        if self.is_owned && self.len > 0 {
            // SAFETY: allocated in `Queue::alloc`, freed once, and all work on it goes through the stream that was
            // just waited for (after a sticky error, the driver does no more work).
            let freed = unsafe { result::free_sync(self.at) };
            let _ignored = (waited, freed);
        }
    }
}

/// Pinned host memory, which the device copies directly.
pub struct Pinned {
    at: *mut u8,
    len: usize,
    /// The last copy from or to this memory.
    copied: CudaEvent,
    gpu: Gpu,
}

// SAFETY: plain memory with one owner; the driver allows any thread bound to the context to use it.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Waits, without spinning, until no copy is in flight.
    fn wait(&self) -> Result<(), GpuError> {
        self.copied.synchronize().map_err(|e| self.gpu.failed("waiting for a copy", e))
    }

    /// The bytes, once the last copy is done.
    ///
    /// # Errors
    /// Errors of the driver, also of earlier work.
    pub fn bytes(&self) -> Result<&[u8], GpuError> {
        self.wait()?;
        // SAFETY: `len` bytes, initialized when allocated; no copy is in flight, and none starts while they are
        // borrowed.
        Ok(unsafe { std::slice::from_raw_parts(self.at, self.len) })
    }

    /// As [`Self::bytes`], mutable.
    ///
    /// # Errors
    /// As [`Self::bytes`].
    pub fn bytes_mut(&mut self) -> Result<&mut [u8], GpuError> {
        self.wait()?;
        // SAFETY: as in `bytes`, and the borrow is the only one.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at, self.len) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let waited = self.wait();
        // SAFETY: allocated in `Queue::pinned`, freed once, with no copy in flight.
        let freed = unsafe { result::free_host(self.at.cast()) };
        let _ignored = (waited, freed);
    }
}

impl Queue {
    /// A new queue.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        let stream = gpu.inner.context.new_stream().map_err(|e| gpu.failed("making a stream", e))?;
        Ok(Self { gpu: gpu.clone(), stream })
    }

    /// Its device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Allocates memory for `len` values, uninitialized.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`] with the free memory.
    pub fn alloc<T: Copyable>(&self, len: usize, what: &'static str) -> Result<DeviceVec<T>, GpuError> {
        self.gpu.bind()?;
        let n_bytes = len * size_of::<T>();
        let at = match n_bytes {
            0 => 0,
            // SAFETY: the size is not zero; `DeviceVec` frees the memory once.
            _ => unsafe { result::malloc_sync(n_bytes) }.map_err(|error| match error.0 {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => GpuError::OutOfMemory {
                    ordinal: self.gpu.ordinal(),
                    what,
                    needed: n_bytes as u64,
                    available: self.gpu.memory().map_or(0, |(free, _)| free),
                },
                _ => self.gpu.failed("allocating memory", error),
            })?,
        };
        Ok(DeviceVec { at, len, is_owned: true, stream: Arc::clone(&self.stream), marker: PhantomData })
    }

    /// Wraps device memory of another owner, such as a trainer's tensor, as memory of this queue.
    ///
    /// # Safety
    /// `at` is the address of `len` values on this queue's device, correctly aligned, that stay allocated until the
    /// returned value is dropped. Until then, nobody else uses them except after [`Self::wait`].
    pub unsafe fn from_raw<T: Copyable>(&self, at: u64, len: usize) -> DeviceVec<T> {
        DeviceVec { at, len, is_owned: false, stream: Arc::clone(&self.stream), marker: PhantomData }
    }

    /// Allocates pinned host memory for asynchronous copies.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn pinned(&self, len: usize) -> Result<Pinned, GpuError> {
        self.gpu.bind()?;
        let flags = Some(EventFlags::CU_EVENT_BLOCKING_SYNC);
        let copied = self.gpu.inner.context.new_event(flags).map_err(|e| self.gpu.failed("making an event", e))?;
        let len = len.max(1);
        // SAFETY: the size is not zero; ordinary cached memory (results are read back from it), freed once, by
        // `Pinned`.
        let at = unsafe { result::malloc_host(len, 0) }.map_err(|e| self.gpu.failed("allocating pinned memory", e))?;
        let at = at.cast::<u8>();
        // SAFETY: `len` bytes that were just allocated.
        unsafe { at.write_bytes(0, len) };
        Ok(Pinned { at, len, copied, gpu: self.gpu.clone() })
    }

    pub(super) fn owns<T>(&self, memory: &DeviceVec<T>) {
        assert!(Arc::ptr_eq(&self.stream, &memory.stream), "memory is used only by its own queue");
    }

    /// Starts a copy of the bytes `range` of `from` to the start of `to`.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If they do not fit, or the memory belongs to another queue.
    pub fn upload<T: Copyable>(
        &self,
        from: &mut Pinned,
        range: Range<usize>,
        to: &mut DeviceVec<T>,
    ) -> Result<(), GpuError> {
        self.upload_at(from, range, to, 0)
    }

    /// Starts a copy of the bytes `range` of `from` to `to`, at byte offset `at`.
    ///
    /// # Errors
    /// As [`Self::upload`].
    ///
    /// # Panics
    /// As [`Self::upload`].
    pub fn upload_at<T: Copyable>(
        &self,
        from: &mut Pinned,
        range: Range<usize>,
        to: &mut DeviceVec<T>,
        at: usize,
    ) -> Result<(), GpuError> {
        self.owns(to);
        let room = (to.len * size_of::<T>()).checked_sub(at);
        assert!(range.end <= from.len && room.is_some_and(|room| range.len() <= room), "the copied range fits");
        if range.is_empty() {
            return Ok(());
        }
        self.gpu.bind()?;
        // SAFETY: both sides contain the range, as asserted; the pinned bytes are accessible again, or freed, only
        // after the event recorded below, the device memory only through the same stream.
        unsafe {
            let bytes = std::slice::from_raw_parts(from.at.add(range.start), range.len());
            result::memcpy_htod_async(to.at + at as u64, bytes, self.stream.cu_stream())
        }
        .and_then(|()| from.copied.record(&self.stream))
        .map_err(|e| self.gpu.failed("copying", e))
    }

    /// Starts a copy of the first bytes of `from` to the bytes `range` of `to`.
    ///
    /// # Errors
    /// As [`Self::upload`].
    ///
    /// # Panics
    /// As [`Self::upload`].
    pub fn download<T: Copyable>(
        &self,
        from: &DeviceVec<T>,
        to: &mut Pinned,
        range: Range<usize>,
    ) -> Result<(), GpuError> {
        self.owns(from);
        assert!(range.end <= to.len && range.len() <= from.len * size_of::<T>(), "the copied range fits");
        if range.is_empty() {
            return Ok(());
        }
        self.gpu.bind()?;
        // SAFETY: as in `upload`, in the other direction.
        unsafe {
            let bytes = std::slice::from_raw_parts_mut(to.at.add(range.start), range.len());
            result::memcpy_dtoh_async(bytes, from.at, self.stream.cu_stream())
        }
        .and_then(|()| to.copied.record(&self.stream))
        .map_err(|e| self.gpu.failed("copying", e))
    }

    /// Allocates memory and copies `values` to it.
    ///
    /// # Errors
    /// As [`Self::alloc`] and [`Self::wait`].
    pub fn upload_all<T: Copyable>(&self, values: &[T], what: &'static str) -> Result<DeviceVec<T>, GpuError> {
        let memory = self.alloc(values.len(), what)?;
        if !values.is_empty() {
            // SAFETY: the memory is as long as the values, which are borrowed until the stream has finished the copy.
            unsafe { result::memcpy_htod_async(memory.at, values, self.stream.cu_stream()) }
                .map_err(|e| self.gpu.failed("copying", e))?;
            self.wait()?;
        }
        Ok(memory)
    }

    /// Copies device memory to the host, after all previous work.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn download_all<T: Copyable + Default>(&self, from: &DeviceVec<T>) -> Result<Vec<T>, GpuError> {
        self.download_first(from, from.len)
    }

    /// Copies the first `n` values of device memory to the host, after all previous work.
    ///
    /// # Errors
    /// As [`Self::wait`].
    ///
    /// # Panics
    /// If there are fewer values, or the memory belongs to another queue.
    pub fn download_first<T: Copyable + Default>(&self, from: &DeviceVec<T>, n: usize) -> Result<Vec<T>, GpuError> {
        self.owns(from);
        assert!(n <= from.len, "the memory has n values");
        self.gpu.bind()?;
        let mut values = vec![T::default(); n];
        if !values.is_empty() {
            // SAFETY: both sides have `n` values; `values` is not accessed until the stream has finished the copy.
            unsafe { result::memcpy_dtoh_async(&mut values, from.at, self.stream.cu_stream()) }
                .map_err(|e| self.gpu.failed("copying", e))?;
        }
        self.wait()?;
        Ok(values)
    }

    /// Starts a copy of all of `from` to the start of `to`, both on the device.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// As [`Self::upload`].
    pub fn copy<T: Copyable>(&self, from: &DeviceVec<T>, to: &mut DeviceVec<T>) -> Result<(), GpuError> {
        self.copy_part(from, 0, to, 0, from.len)
    }

    /// Starts `to[to_at..to_at + n] = from[from_at..from_at + n]`, both on the device.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// As [`Self::upload`].
    pub fn copy_part<T: Copyable>(
        &self,
        from: &DeviceVec<T>,
        from_at: usize,
        to: &mut DeviceVec<T>,
        to_at: usize,
        n: usize,
    ) -> Result<(), GpuError> {
        self.owns(from);
        self.owns(to);
        let fits = |at: usize, len: usize| at.checked_add(n).is_some_and(|end| end <= len);
        assert!(fits(from_at, from.len) && fits(to_at, to.len), "the copied range fits");
        if n == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        let bytes = |n: usize| n * size_of::<T>();
        let (to, from) = (to.at + bytes(to_at) as u64, from.at + bytes(from_at) as u64);
        // SAFETY: both sides contain the range, as asserted, and belong to this stream; one is borrowed mutably, so
        // they do not alias.
        unsafe { result::memcpy_dtod_async(to, from, bytes(n), self.stream.cu_stream()) }
            .map_err(|e| self.gpu.failed("copying", e))
    }

    /// Starts to fill memory with one byte value.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn fill<T: Copyable>(&self, memory: &mut DeviceVec<T>, byte: u8) -> Result<(), GpuError> {
        let n = memory.len;
        self.fill_first(memory, n, byte)
    }

    /// Starts to fill the first `n` values with one byte value.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If there are fewer values, or the memory belongs to another queue.
    pub fn fill_first<T: Copyable>(&self, memory: &mut DeviceVec<T>, n: usize, byte: u8) -> Result<(), GpuError> {
        self.owns(memory);
        assert!(n <= memory.len, "the memory has n values");
        if n == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        // SAFETY: the memory has `n` values; every bit pattern is valid for the type.
        unsafe { result::memset_d8_async(memory.at, byte, n * size_of::<T>(), self.stream.cu_stream()) }
            .map_err(|e| self.gpu.failed("copying", e))
    }

    /// Waits until all work is done.
    ///
    /// # Errors
    /// [`GpuError::Kernel`] if some of it failed.
    pub fn wait(&self) -> Result<(), GpuError> {
        self.gpu.bind()?;
        self.stream.synchronize().map_err(|e| self.gpu.failed("copying", e))
    }
}
