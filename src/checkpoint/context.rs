//! What every long command is given: how much memory, how to read, whom to tell.

use super::CheckpointError;

/// The smallest limit that is accepted, in bytes; a smaller one counts as this.
pub const MIN_MEMORY: u64 = 16 << 20;

/// How tensor data is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Io {
    /// What is in memory is mapped; the rest is read directly where the file system can, so that other programs' pages stay
    /// in memory, else mapped.
    #[default]
    Auto,
    /// Windows of the file are mapped.
    Mapped,
    /// Windows of the file are read past the page cache, and mapped where the file system cannot.
    Direct,
    /// Windows of the file are read through the page cache.
    Read,
}

/// Told what a long command does, and asked whether to go on.
///
/// Called from many threads, often: implementations are quick.
pub trait Observer: Sync {
    /// A pass over `bytes` bytes begins.
    fn begin(&self, _what: &str, _bytes: u64) {}
    /// A pass over `n` things begins, `unit` in the plural; told apart from bytes where that can be shown.
    fn begin_count(&self, what: &str, _unit: &'static str, n: u64) {
        self.begin(what, n);
    }
    /// `bytes` more bytes of the pass are done, or things where it counts things.
    fn advance(&self, _bytes: u64) {}
    /// Something to know before the work goes on.
    fn note(&self, _message: &str) {}
    /// Whether the user asked to stop.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Tells nobody and never stops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// What every long command is given.
///
/// Threads are those of the current rayon pool.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Bytes of resident memory to stay within, mapped pages and I/O buffers counted; 1 GiB by default.
    pub max_memory: u64,
    /// How tensor data is read.
    pub io: Io,
    /// Told of progress, asked whether to stop.
    pub observer: &'a dyn Observer,
}

impl Default for Context<'_> {
    fn default() -> Self {
        Self { max_memory: 1 << 30, io: Io::Auto, observer: &Silent }
    }
}

impl Context<'_> {
    /// Fails where the user asked to stop; long loops ask once per block.
    pub fn check(&self) -> Result<(), CheckpointError> {
        if self.observer.is_cancelled() { Err(CheckpointError::Cancelled) } else { Ok(()) }
    }

    /// Bytes that everything on its way through one pass may take together: windows of files, scratch and results that wait.
    ///
    /// Half of [`Self::max_memory`]: the rest is for what a command keeps between its passes. The passes of this folder see to it:
    /// each item has a cost in bytes, and none begins before there is room for it.
    pub fn pass_bytes(&self) -> u64 {
        self.max_memory.max(MIN_MEMORY) / 2
    }

    /// Bytes of one window, small enough that each thread has several of them on their way within [`Self::pass_bytes`].
    pub fn window_bytes(&self) -> u64 {
        let share = self.max_memory / 2 / (8 * rayon::current_num_threads() as u64);
        // Whole pages, and so whole elements of every type.
        share.clamp(64 << 10, 8 << 20) & !0xfff
    }

    /// Fails where an item of `cost` bytes can never have room.
    ///
    /// # Errors
    /// [`CheckpointError::MemoryLimit`] with the limit that would do.
    pub fn check_fits(&self, cost: u64) -> Result<(), CheckpointError> {
        if cost <= self.pass_bytes() {
            return Ok(());
        }
        let needed = cost.saturating_mul(2).checked_next_multiple_of(1 << 20).unwrap_or(u64::MAX);
        Err(CheckpointError::MemoryLimit { needed, limit: self.max_memory })
    }
}
