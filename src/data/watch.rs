//! Work on a stranger's template, watched from outside while it is under way.
//!
//! minijinja's fuel bounds almost all that a template does, but single instructions can still be endless: a list that holds itself
//! twice, forty times over, is small until it is compared, joined or concatenated. Nothing stops a thread from outside. So the work is
//! done on a thread of its own, and who waits for it looks at the clock, at the process's memory and at the user's wish to stop. Where a
//! limit is passed the waiting thread returns an error at once and the work is abandoned: it ends with the process, or by itself.

use std::{
    fs,
    sync::{
        OnceLock,
        mpsc::{RecvTimeoutError, sync_channel},
    },
    time::{Duration, Instant},
};

use crate::checkpoint::{CheckpointError, Context, guarded};

/// How long a piece of work runs before it is looked at, and between two looks.
const INTERVAL: Duration = Duration::from_millis(20);

/// Stack for what a template of the largest size nests, and for values as deep as its fuel can make them: each level takes some
/// hundred bytes to compile, to print and to drop. Only what is used of it is ever memory.
const STACK_BYTES: usize = 256 << 20;

/// What one piece of work may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Limits {
    /// Time on the clock.
    pub time: Duration,
    /// Growth of the process's resident memory while it is under way. Known on Linux alone.
    pub n_bytes: u64,
}

/// Why there is no result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Abandoned {
    /// The user asked to stop.
    Cancelled,
    /// It took more time than it may.
    TooLong,
    /// It took more memory than it may.
    TooLarge,
    /// It panicked.
    Panicked,
}

/// Threads that work on a stranger's template.
pub(super) struct Watched {
    pool: rayon::ThreadPool,
    limits: Limits,
    /// Why work was abandoned, once it was: its thread may still run, and no more work is begun.
    abandoned: OnceLock<Abandoned>,
}

impl Watched {
    /// As many threads as the current rayon pool has.
    pub(super) fn new(limits: Limits) -> Result<Self, CheckpointError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(rayon::current_num_threads())
            .thread_name(|_| "template".to_owned())
            .stack_size(STACK_BYTES)
            .build()
            .map_err(|e| CheckpointError::io("start threads for", "templates".as_ref(), std::io::Error::other(e)))?;
        Ok(Self { pool, limits, abandoned: OnceLock::new() })
    }

    /// Does the work on another thread, and waits for it.
    ///
    /// Costs a hand-over between two threads; only work that takes longer than [`INTERVAL`] is looked at.
    pub(super) fn run<T: Send + 'static>(
        &self,
        ctx: &Context<'_>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Abandoned> {
        if let Some(why) = self.abandoned.get() {
            return Err(*why);
        }
        let (sender, receiver) = sync_channel(1);
        self.pool.spawn(move || {
            // Nobody may wait any more.
            let _abandoned = sender.send(guarded(work));
        });
        let began = Instant::now();
        let mut before = None;
        loop {
            match receiver.recv_timeout(INTERVAL) {
                Ok(result) => return result.map_err(|_| Abandoned::Panicked),
                Err(RecvTimeoutError::Disconnected) => return Err(Abandoned::Panicked),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let resident = resident_bytes();
            let grown =
                resident.zip(*before.get_or_insert(resident)).map_or(0, |(now, before)| now.saturating_sub(before));
            let why = if let Some(why) = self.abandoned.get() {
                *why
            } else if ctx.observer.is_cancelled() {
                Abandoned::Cancelled
            } else if grown > self.limits.n_bytes {
                Abandoned::TooLarge
            } else if began.elapsed() > self.limits.time {
                Abandoned::TooLong
            } else {
                continue;
            };
            return Err(*self.abandoned.get_or_init(|| why));
        }
    }
}

/// The process's resident memory, where the system tells.
fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let n_pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(n_pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Observer;

    struct Stop;

    impl Observer for Stop {
        fn is_cancelled(&self) -> bool {
            true
        }
    }

    fn watched(time: Duration, n_bytes: u64) -> Watched {
        Watched::new(Limits { time, n_bytes }).expect("threads")
    }

    #[test]
    fn work_that_is_abandoned_says_why_and_ends_the_rest() {
        let endless = || std::thread::sleep(Duration::from_secs(600));
        let ctx = Context::default();
        let quick = watched(Duration::from_millis(50), u64::MAX);
        assert_eq!(quick.run(&ctx, || 7), Ok(7));
        assert_eq!(quick.run(&ctx, endless), Err(Abandoned::TooLong));
        assert_eq!(quick.run(&ctx, || 7), Err(Abandoned::TooLong), "no more work is begun");
        let stopped = Context { observer: &Stop, ..ctx };
        let slow = watched(Duration::from_secs(600), u64::MAX);
        assert_eq!(slow.run(&stopped, endless), Err(Abandoned::Cancelled));
        assert_eq!(
            watched(Duration::from_secs(600), 0).run(&ctx, || panic!("inside")),
            Err::<(), _>(Abandoned::Panicked)
        );
    }

    #[test]
    fn work_that_grows_is_abandoned() {
        // Where the system does not tell how much memory a process has, there is nothing to see.
        if resident_bytes().is_none() {
            return;
        }
        let grows = || {
            let mut all = Vec::new();
            for _ in 0..256 {
                all.push(vec![1_u8; 1 << 20]);
                std::thread::sleep(Duration::from_millis(2));
            }
            all.len()
        };
        assert_eq!(
            watched(Duration::from_secs(600), 64 << 20).run(&Context::default(), grows),
            Err(Abandoned::TooLarge)
        );
    }
}
