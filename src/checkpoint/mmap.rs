//! Windows of files, mapped or read: the one place that maps.

#![allow(unsafe_code)]

use std::{fs::File, io, ops::Deref};

use memmap2::{Mmap, MmapOptions};

/// A run of bytes of a file, given back when dropped.
pub struct Window(Backing);

enum Backing {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Deref for Window {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Backing::Mapped(map) => map,
            Backing::Owned(bytes) => bytes,
        }
    }
}

impl Window {
    /// A window over bytes that were read.
    pub(super) fn owned(bytes: Vec<u8>) -> Self {
        Self(Backing::Owned(bytes))
    }

    /// Maps `len` bytes of `file` from `offset`, of any alignment; the pages are in memory when this returns.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn map(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        if len == 0 {
            return Ok(Self::owned(Vec::new()));
        }
        // SAFETY: the map is private to this window and read-only. What Rust cannot rule out is another process changing
        // the file meanwhile: bytes are only ever read as plain integers, for which every bit pattern is valid, and
        // the caller compares the file's length and modification time with those at opening before it trusts a result.
        let map = unsafe { MmapOptions::new().offset(offset).len(len).populate().map(file)? };
        Ok(Self(Backing::Mapped(map)))
    }
}
