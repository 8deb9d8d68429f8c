//! What a person sees while a command works, and how they stop it.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use neuroada_ckpt::checkpoint::Observer;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::page;

const BAR: &str = "{msg} {bar:24} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} ETA {eta}";
/// A pass that ends sooner is not worth a bar that flickers.
const BAR_DELAY: Duration = Duration::from_millis(200);

/// The progress bar on a terminal, and the flag that Ctrl-C sets.
pub(super) struct Progress {
    bar: ProgressBar,
    /// On a terminal, not quiet.
    draws: bool,
    verbose: bool,
    pass: Mutex<Option<Pass>>,
    done: AtomicU64,
    cancelled: Arc<AtomicBool>,
}

struct Pass {
    what: String,
    began: Instant,
}

impl Progress {
    /// Listens to signals from here on; draws on stderr where that is a terminal.
    pub(super) fn new(quiet: bool, verbose: bool) -> io::Result<Self> {
        let bar = ProgressBar::hidden();
        bar.set_style(ProgressStyle::with_template(BAR).expect("the template is well formed").progress_chars("=> "));
        let cancelled = Arc::new(AtomicBool::new(false));
        listen(&cancelled)?;
        let draws = !quiet && io::stderr().is_terminal();
        Ok(Self { bar, draws, verbose, pass: Mutex::new(None), done: AtomicU64::new(0), cancelled })
    }

    /// Takes the bar away, and tells of the pass that ended.
    pub(super) fn clear(&self) {
        self.end_pass(None);
    }

    /// Prints a line on stderr, above the bar.
    pub(super) fn tell(&self, words: &str) {
        // With stderr gone there is nobody left to tell.
        self.bar.suspend(|| {
            let _nobody = writeln!(io::stderr().lock(), "{words}");
        });
    }

    fn end_pass(&self, next: Option<Pass>) {
        let last = std::mem::replace(&mut *self.pass.lock().expect("nobody panics with the lock"), next);
        let n_bytes = self.done.swap(0, Ordering::Relaxed);
        self.bar.finish_and_clear();
        self.bar.set_draw_target(ProgressDrawTarget::hidden());
        if let Some(Pass { what, began }) = last
            && self.verbose
        {
            let (size, took) = (page::bytes(n_bytes), page::duration(began.elapsed()));
            self.tell(&format!("{what}: {size} in {took}, {}", page::rate(n_bytes, began.elapsed())));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // Before an error is told.
        self.clear();
    }
}

impl Observer for Progress {
    fn begin(&self, what: &str, bytes: u64) {
        self.end_pass(Some(Pass { what: what.to_owned(), began: Instant::now() }));
        self.bar.reset();
        self.bar.set_length(bytes);
        self.bar.set_message(what.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.bar.inc(bytes);
        if self.draws && self.bar.is_hidden() && self.bar.elapsed() > BAR_DELAY {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// The first of these signals sets the flag, the second ends the process at once. One that is ignored stays ignored:
/// under `nohup` a command outlives its terminal.
fn listen(cancelled: &Arc<AtomicBool>) -> io::Result<()> {
    let ignored = ignored_signals();
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        if ignored >> (signal - 1) & 1 == 0 {
            // In this order: the flag that the first signal sets arms what the second one does.
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(cancelled))?;
            signal_hook::flag::register(signal, Arc::clone(cancelled))?;
        }
    }
    Ok(())
}

/// Signals that the process was started to ignore, one bit each; none where the system does not say.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
