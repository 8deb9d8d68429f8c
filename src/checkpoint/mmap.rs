//! Windows of files, mapped or read: the only place that maps files.
//!
//! Touching a mapped page whose file was truncated, or whose disk fails, raises SIGBUS, which by default ends the
//! process. Every mapped window is therefore entered in a small table, and a SIGBUS handler is installed with the
//! first window. The handler looks up the faulting address. If it lies in a window, the page is replaced by zeros, the
//! window is marked, and the reader continues; it checks the mark ([`Shard::confirm`](super::Shard::confirm)) before
//! trusting what it read. Any other SIGBUS goes to the previous handler. If the table is full, no handler can be
//! installed, or the file system cannot map, windows are read instead.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    ops::Deref,
    os::unix::fs::FileExt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use memmap2::{Mmap, MmapOptions};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use super::direct::DirectBytes;

/// A range of a file's bytes, released on drop.
pub struct Window(Backing);

enum Backing {
    // Fields drop in this order: the entry must leave the table before the address can be mapped again.
    Mapped { slot: WindowSlot, map: Mmap },
    Owned(Vec<u8>),
    Direct(DirectBytes),
}

impl Deref for Window {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Backing::Mapped { map, .. } => map,
            Backing::Owned(bytes) => bytes,
            Backing::Direct(bytes) => bytes,
        }
    }
}

impl Window {
    /// A window over bytes that were read.
    pub(super) fn owned(bytes: Vec<u8>) -> Self {
        Self(Backing::Owned(bytes))
    }
    /// A window over bytes that were read with direct I/O.
    pub(super) fn direct(bytes: DirectBytes) -> Self {
        Self(Backing::Direct(bytes))
    }

    /// Maps `len` bytes of `file` at `offset`, of any alignment. The pages are in memory on return, unless memory is
    /// short or the file ends before them. Reads the bytes if they cannot be mapped. `lost` is set when the window is
    /// dropped after some of its bytes could not be read.
    ///
    /// # Errors
    /// Errors of the system.
    pub(super) fn map(file: &File, offset: u64, len: usize, lost: &Arc<AtomicBool>) -> io::Result<Self> {
        if len == 0 {
            return Ok(Self::owned(Vec::new()));
        }
        let slot = if handler_is_installed() { WindowSlot::claim(lost) } else { None };
        if let Some(slot) = slot
            && let Ok(map) = map_populated(file, offset, len)
        {
            slot.watch(&map);
            return Ok(Self(Backing::Mapped { slot, map }));
        }
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(Self::owned(bytes))
    }
    /// Whether all bytes seen so far came from the file.
    pub(super) fn is_intact(&self) -> bool {
        match &self.0 {
            Backing::Mapped { slot, .. } => !slot.entry().lost.load(SeqCst),
            Backing::Owned(_) | Backing::Direct(_) => true,
        }
    }
}

fn map_populated(file: &File, offset: u64, len: usize) -> io::Result<Mmap> {
    // SAFETY: the map is private to one window and read-only. Rust cannot rule out that another process changes the
    // file in the meantime: bytes are only read as plain integers, for which every bit pattern is valid, and the
    // caller compares the file's length and modification time with those at opening before it trusts a result. Missing
    // pages are replaced, see the top of this file.
    unsafe { MmapOptions::new().offset(offset).len(len).populate().map(file) }
}

/// Pages sampled to determine whether a range is cached.
const SAMPLES: usize = 8;

/// Whether `len` bytes of `file` at `offset` are in the page cache, judged by a sample of their pages. Assumed if the
/// system does not report it.
pub(super) fn is_cached(file: &File, offset: u64, len: usize) -> bool {
    let page_bytes = rustix::param::page_size();
    // SAFETY: as in `map_populated`; nothing is read through this map.
    let Ok(map) = (unsafe { MmapOptions::new().offset(offset).len(len).map(file) }) else { return true };
    let first = map.as_ptr() as usize & !(page_bytes - 1);
    let n_pages = (map.as_ptr() as usize + len).div_ceil(page_bytes) - first / page_bytes;
    (0..SAMPLES).map(|i| i * (n_pages - 1) / (SAMPLES - 1)).all(|page| {
        let mut is_resident = 0u8;
        // SAFETY: the page belongs to the map, and the answer for one page is one byte.
        let status = unsafe { libc::mincore((first + page * page_bytes) as *mut _, 1, &mut is_resident) };
        status != 0 || is_resident & 1 == 1
    })
}

/// The address of a mapped window, for the handler. `start` is 0 if the entry is free and 1 while it is being filled.
struct Entry {
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

const FREE: usize = 0;
const CLAIMED: usize = 1;

/// Maximum number of windows mapped at once in the process: a few per thread.
const MAX_WINDOWS: usize = 2048;
static WINDOWS: [Entry; MAX_WINDOWS] =
    [const { Entry { start: AtomicUsize::new(FREE), len: AtomicUsize::new(0), lost: AtomicBool::new(false) } };
        MAX_WINDOWS];

/// Ownership of one entry of the table.
struct WindowSlot {
    index: usize,
    /// Set on drop if the entry was marked.
    lost: Arc<AtomicBool>,
}

impl WindowSlot {
    fn claim(lost: &Arc<AtomicBool>) -> Option<Self> {
        // Threads start searching at different entries, so that they rarely collide.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let first = NEXT.fetch_add(1, SeqCst);
        let index = (0..MAX_WINDOWS)
            .map(|i| first.wrapping_add(i) % MAX_WINDOWS)
            .find(|&i| WINDOWS[i].start.compare_exchange(FREE, CLAIMED, SeqCst, SeqCst).is_ok())?;
        WINDOWS[index].lost.store(false, SeqCst);
        Some(Self { index, lost: Arc::clone(lost) })
    }

    fn entry(&self) -> &'static Entry {
        &WINDOWS[self.index]
    }

    fn watch(&self, map: &Mmap) {
        self.entry().len.store(map.len(), SeqCst);
        self.entry().start.store(map.as_ptr() as usize, SeqCst);
    }
}

impl Drop for WindowSlot {
    fn drop(&mut self) {
        if self.entry().lost.load(SeqCst) {
            self.lost.store(true, SeqCst);
        }
        self.entry().start.store(FREE, SeqCst);
    }
}

/// The SIGBUS handler that was installed before ours.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Installs the handler, once.
fn handler_is_installed() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // Query the page size here, so that it is known in the handler.
        let _known = rustix::param::page_size();
        // SAFETY: all-zero bytes are a valid `sigaction`: no handler, no flags, an empty mask. `sa_sigaction` is set
        // to a function of the type that SA_SIGINFO requires, which calls only async-signal-safe functions. The
        // previous handler is saved before ours can run.
        unsafe {
            let mut previous: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut previous) != 0 {
                return false;
            }
            PREVIOUS.get_or_init(|| previous);
            let mut ours: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
            ours.sa_sigaction = handler as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut()) == 0
        }
    })
}

/// The SIGBUS handler, which runs on the thread that touched a missing page.
extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes a valid `siginfo_t` for this signal, which for SIGBUS holds an address.
    let address = unsafe { (*info).si_addr() } as usize;
    if mark(address) && replace_page(address) {
        return;
    }
    // SAFETY: this forwards the signal to the previous handler with the arguments that its flags require. If there was
    // none, the default is restored: the instruction runs again and ends the process, as it would have without us.
    unsafe {
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        let previous = PREVIOUS.get().unwrap_or(&default);
        match previous.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                libc::sigaction(signal, &default, std::ptr::null_mut());
                // A signal that was sent, not caused by a fault, does not recur by itself; it stays blocked until we
                // return.
                if (*info).si_code <= 0 {
                    libc::raise(signal);
                }
            }
            handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}

/// Marks the window that contains `address`; returns false if none does.
fn mark(address: usize) -> bool {
    let mut found = false;
    for entry in &WINDOWS {
        let start = entry.start.load(SeqCst);
        // An entry that changes during the search may be marked by mistake; its reader then merely fails without need.
        // The entry of the faulting window cannot change, because its reader waits for this handler.
        if start > CLAIMED && address.wrapping_sub(start) < entry.len.load(SeqCst) {
            entry.lost.store(true, SeqCst);
            found = true;
        }
    }
    found
}

/// Replaces the page at `address` by a page of zeros.
fn replace_page(address: usize) -> bool {
    let page_bytes = rustix::param::page_size();
    let page = (address & !(page_bytes - 1)) as *mut std::ffi::c_void;
    // SAFETY: the page belongs to a live window of this process, which is read-only and unreadable at this page, hence
    // the fault. The new page has the same address and protection, and is unmapped with the rest of the window.
    unsafe { mmap_anonymous(page, page_bytes, ProtFlags::READ, MapFlags::PRIVATE | MapFlags::FIXED) }.is_ok()
}
