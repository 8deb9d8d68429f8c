//! Runs untrusted templates on separate threads with limits on time and memory.
//!
//! minijinja's fuel limits almost everything a template does, but a single instruction can still be endless: a list
//! that contains itself twice, forty levels deep, is small until it is compared, joined or concatenated. A thread
//! cannot be stopped from outside. So the work runs on its own thread, and the waiting thread checks the clock, the
//! process's memory and cancellation. If a limit is exceeded, the waiting thread returns an error at once and abandons
//! the work, which ends by itself or with the process.

use std::{
    fs,
    sync::{
        OnceLock,
        mpsc::{RecvTimeoutError, sync_channel},
    },
    time::{Duration, Instant},
};

use crate::checkpoint::{CheckpointError, Context, guarded};

/// Time until the first check of a task, and between checks.
const INTERVAL: Duration = Duration::from_millis(20);

/// Stack size for the deepest nesting of a template of maximum size, and for values as deep as its fuel allows: each
/// level takes a few hundred bytes to compile, print and drop. Only used pages are resident.
const STACK_BYTES: usize = 256 << 20;

/// The limits of one task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Limits {
    /// Wall-clock time.
    pub time: Duration,
    /// Growth of the process's resident memory during the task. Known only on Linux.
    pub n_bytes: u64,
}

/// Why there is no result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Abandoned {
    /// The user stopped the command.
    Cancelled,
    /// The time limit was exceeded.
    TooLong,
    /// The memory limit was exceeded.
    TooLarge,
    /// The task panicked.
    Panicked,
}

/// Threads for untrusted templates.
pub(super) struct Watched {
    pool: rayon::ThreadPool,
    limits: Limits,
    /// Set once a task was abandoned: its thread may still be running, and no new task is started.
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

    /// Runs the work on another thread and waits for it.
    ///
    /// Costs one hand-over between threads; only work that takes longer than [`INTERVAL`] is checked.
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
            // The receiver may be gone.
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

/// The process's resident memory, if the system reports it.
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
    fn abandoned_work_reports_the_reason_and_stops_later_work() {
        let endless = || std::thread::sleep(Duration::from_secs(600));
        let ctx = Context::default();
        let quick = watched(Duration::from_millis(50), u64::MAX);
        assert_eq!(quick.run(&ctx, || 7), Ok(7));
        assert_eq!(quick.run(&ctx, endless), Err(Abandoned::TooLong));
        assert_eq!(quick.run(&ctx, || 7), Err(Abandoned::TooLong), "no new work is started");
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
        // Skip if the system does not report the memory of a process.
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
