//! Settings of every long command: memory limit, I/O mode, progress and cancellation.

use super::CheckpointError;

/// The smallest memory limit, in bytes; smaller limits are raised to it.
pub const MIN_MEMORY: u64 = 16 << 20;

/// How tensor data is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Io {
    /// Data in the page cache is mapped. The rest is read with direct I/O, so that other programs' pages stay cached;
    /// it is mapped if the file system does not support that.
    #[default]
    Auto,
    /// Windows of the file are mapped.
    Mapped,
    /// Windows of the file are read with direct I/O, or mapped if the file system does not support it.
    Direct,
    /// Windows of the file are read through the page cache.
    Read,
}

/// Receives the progress of a long command, and can cancel it.
///
/// Called often and from many threads: implementations must be fast.
pub trait Observer: Sync {
    /// A pass over `bytes` bytes begins.
    fn begin(&self, _what: &str, _bytes: u64) {}
    /// A pass over `n` items begins; `unit` is their plural. Separate from bytes for displays that show the
    /// difference.
    fn begin_count(&self, what: &str, _unit: &'static str, n: u64) {
        self.begin(what, n);
    }
    /// `bytes` more bytes (or items) of the pass are done.
    fn advance(&self, _bytes: u64) {}
    /// Something to know before the work goes on.
    fn note(&self, _message: &str) {}
    /// Whether the user has cancelled the command.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Reports nothing and never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// The settings of a long command.
///
/// Work runs on the threads of the current rayon pool.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The limit on resident memory in bytes, including mapped pages and I/O buffers; 1 GiB by default.
    pub max_memory: u64,
    /// How tensor data is read.
    pub io: Io,
    /// Receives progress and can cancel.
    pub observer: &'a dyn Observer,
}

impl Default for Context<'_> {
    fn default() -> Self {
        Self { max_memory: 1 << 30, io: Io::Auto, observer: &Silent }
    }
}

impl Context<'_> {
    /// Fails if the user has cancelled; long loops check once per block.
    pub fn check(&self) -> Result<(), CheckpointError> {
        if self.observer.is_cancelled() { Err(CheckpointError::Cancelled) } else { Ok(()) }
    }

    /// The memory that one pass may use in total: file windows, scratch memory and queued results.
    ///
    /// Half of [`Self::max_memory`]; the rest is for data that a command keeps between passes. The passes of this
    /// folder enforce it: each item has a cost in bytes and starts only when there is room for it.
    pub fn pass_bytes(&self) -> u64 {
        self.max_memory.max(MIN_MEMORY) / 2
    }

    /// Bytes per window, small enough that each thread can have several in flight within [`Self::pass_bytes`].
    pub fn window_bytes(&self) -> u64 {
        let share = self.max_memory / 2 / (8 * rayon::current_num_threads() as u64);
        // Whole pages, and therefore whole elements of every dtype.
        share.clamp(64 << 10, 8 << 20) & !0xfff
    }

    /// Fails if an item of `cost` bytes can never fit.
    ///
    /// # Errors
    /// [`CheckpointError::MemoryLimit`] with the limit that would suffice.
    pub fn check_fits(&self, cost: u64) -> Result<(), CheckpointError> {
        if cost <= self.pass_bytes() {
            return Ok(());
        }
        let needed = cost.saturating_mul(2).checked_next_multiple_of(1 << 20).unwrap_or(u64::MAX);
        Err(CheckpointError::MemoryLimit { needed, limit: self.max_memory })
    }
}
