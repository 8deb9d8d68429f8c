//! The progress bar, and the signals that stop a command.

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
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{
    color::{self, ColorChoice},
    page,
};
use crate::checkpoint::Observer;

const BAR: &str =
    "{msg} {bar:16} {percent:>3} % {decimal_bytes}/{decimal_total_bytes} {elapsed} {decimal_bytes_per_sec} ETA {eta}";
const COUNT_BAR: &str = "{msg} {bar:16} {percent:>3} % {human_pos}/{human_len} UNIT {elapsed} {per_sec} ETA {eta}";
/// A pass that ends sooner shows no bar, which would only flicker.
const BAR_DELAY: Duration = Duration::from_millis(200);

/// The progress bar on a terminal, and the flag that a signal sets.
pub(super) struct Progress {
    bar: ProgressBar,
    /// On a terminal, not quiet.
    draws: bool,
    is_colored: bool,
    quiet: bool,
    verbose: bool,
    pass: Mutex<Option<Pass>>,
    done: AtomicU64,
    cancelled: Arc<AtomicBool>,
}

struct Pass {
    what: String,
    began: Instant,
    /// The unit that is counted, if not bytes.
    unit: Option<&'static str>,
}

impl Progress {
    /// Installs the signal handlers. The bar is drawn on stderr if that is a terminal.
    pub(super) fn new(quiet: bool, verbose: bool, color: ColorChoice) -> io::Result<Self> {
        let bar = ProgressBar::hidden();
        let cancelled = Arc::new(AtomicBool::new(false));
        listen(&cancelled)?;
        let is_terminal = io::stderr().is_terminal();
        let (draws, is_colored) = (!quiet && is_terminal, color.applies_to(is_terminal));
        Ok(Self { bar, draws, is_colored, quiet, verbose, pass: Mutex::new(None), done: AtomicU64::new(0), cancelled })
    }

    /// Removes the bar, and reports the pass that ended.
    pub(super) fn clear(&self) {
        self.end_pass(None);
    }

    /// Prints a line on stderr, above the bar.
    pub(super) fn print(&self, message: &str) {
        let message = color::label(message, self.is_colored);
        // A closed stderr is not an error.
        self.bar.suspend(|| {
            let _nobody = writeln!(io::stderr().lock(), "{message}");
        });
    }

    /// Changes the text before the bar.
    #[cfg(feature = "train")]
    pub(super) fn set_message(&self, message: String) {
        self.bar.set_message(message);
    }

    fn begin_pass(&self, what: &str, unit: Option<&'static str>, n: u64) {
        self.end_pass(Some(Pass { what: what.to_owned(), began: Instant::now(), unit }));
        let template = unit.map_or(BAR.to_owned(), |unit| COUNT_BAR.replace("UNIT", unit));
        let style = ProgressStyle::with_template(&template).expect("the template is well formed");
        self.bar.set_style(style.progress_chars("=> "));
        self.bar.reset();
        self.bar.set_length(n);
        self.bar.set_message(what.to_owned());
    }

    fn end_pass(&self, next: Option<Pass>) {
        let last = std::mem::replace(&mut *self.pass.lock().expect("nobody panics with the lock"), next);
        let n_bytes = self.done.swap(0, Ordering::Relaxed);
        self.bar.finish_and_clear();
        self.bar.set_draw_target(ProgressDrawTarget::hidden());
        if let Some(Pass { what, began, unit }) = last
            && self.verbose
        {
            let (elapsed, n) = (began.elapsed(), n_bytes);
            let (size, rate) = match unit {
                None => (page::bytes(n), page::rate(n, elapsed)),
                Some(unit) => (
                    format!("{} {unit}", page::count(n)),
                    format!("{} {unit}/s", page::number(n as f64 / elapsed.as_secs_f64().max(1e-9))),
                ),
            };
            self.print(&format!("{what}: {size} in {}, {rate}", page::duration(elapsed)));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // Before an error is printed.
        self.clear();
    }
}

impl Observer for Progress {
    fn begin(&self, what: &str, bytes: u64) {
        self.begin_pass(what, None, bytes);
    }

    fn begin_count(&self, what: &str, unit: &'static str, n: u64) {
        self.begin_pass(what, Some(unit), n);
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.bar.inc(bytes);
        if self.draws && self.bar.is_hidden() && self.bar.elapsed() > BAR_DELAY {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    fn note(&self, message: &str) {
        if !self.quiet {
            self.print(message);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// The first of these signals sets the flag, the second ends the process at once. An ignored signal stays ignored: under `nohup` a
/// command outlives its terminal.
fn listen(cancelled: &Arc<AtomicBool>) -> io::Result<()> {
    let ignored = ignored_signals();
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        if ignored >> (signal - 1) & 1 == 0 {
            // In this order: the flag that the first signal sets arms the shutdown of the second.
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(cancelled))?;
            signal_hook::flag::register(signal, Arc::clone(cancelled))?;
        }
    }
    Ok(())
}

/// Signals that the process ignores since its start, one bit each; 0 if the system does not report them.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
