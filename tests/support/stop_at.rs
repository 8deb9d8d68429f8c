//! Work that is cut short at a chosen place.

use std::sync::atomic::{AtomicU64, Ordering};

use neuroada_ckpt::Observer;

/// Stops, or ends the whole process, at the n-th block of a pass.
pub(crate) struct StopAt {
    pass: &'static str,
    block: u64,
    abort: bool,
    in_pass: AtomicU64,
    seen: AtomicU64,
}

impl Observer for StopAt {
    fn begin(&self, what: &str, _bytes: u64) {
        self.in_pass.store(u64::from(what == self.pass), Ordering::SeqCst);
    }
    fn advance(&self, _bytes: u64) {
        if self.in_pass.load(Ordering::SeqCst) == 1
            && self.seen.fetch_add(1, Ordering::SeqCst) == self.block
            && self.abort
        {
            // As sudden as a kill: no destructor runs.
            std::process::abort();
        }
    }
    fn is_cancelled(&self) -> bool {
        !self.abort && self.seen.load(Ordering::SeqCst) > self.block
    }
}

pub(crate) fn stop_at(pass: &'static str, block: u64, abort: bool) -> StopAt {
    StopAt { pass, block, abort, in_pass: AtomicU64::new(0), seen: AtomicU64::new(0) }
}
