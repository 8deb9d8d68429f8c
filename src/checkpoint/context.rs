//! What every long command is given: how much memory, how to read, whom to tell.

use super::CheckpointError;

/// How tensor data is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
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
    /// Bytes of resident memory to stay within, mapped pages counted; 1 GiB by default.
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

    /// Bytes of one window, so that all threads' windows and what is made from them stay within `max_memory`.
    pub fn window_bytes(&self) -> u64 {
        // Each thread holds up to two windows (a base and its partner) and results of about their size.
        let share = self.max_memory / (8 * rayon::current_num_threads() as u64);
        // Whole pages, and so whole elements of every type.
        share.clamp(64 << 10, 8 << 20) & !0xfff
    }
}
