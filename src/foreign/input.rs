//! Bytes at an address of a file, and a reader that walks over them.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use crate::checkpoint::{CheckpointError, InUse, open_regular};

/// Bytes that a [`Cursor`] reads ahead.
const AHEAD: u64 = 64 << 10;

/// A file of which parts are read; nothing of it is mapped or held.
#[derive(Debug)]
pub(crate) struct Input {
    path: PathBuf,
    file: File,
    n_bytes: u64,
    modified: (i64, i64),
    /// No output replaces the file meanwhile.
    _in_use: InUse,
    /// Bytes that were read so far.
    #[cfg(test)]
    pub(crate) n_read: std::sync::atomic::AtomicU64,
}

impl Input {
    /// Opens a regular file.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (file, meta) = open_regular(path, "open")?;
        let modified = (meta.mtime(), meta.mtime_nsec());
        let in_use = InUse::file(path, &meta);
        Ok(Self {
            path: path.to_owned(),
            file,
            n_bytes: meta.len(),
            modified,
            _in_use: in_use,
            #[cfg(test)]
            n_read: std::sync::atomic::AtomicU64::new(0),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
    pub(crate) fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// A failure to read, or a file that became shorter.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.n_bytes) {
            return Err(self.bad(offset, format!("{} bytes are needed, the file ends before", buffer.len())));
        }
        #[cfg(test)]
        self.n_read.fetch_add(buffer.len() as u64, std::sync::atomic::Ordering::Relaxed);
        self.file.read_exact_at(buffer, offset).map_err(|e| CheckpointError::io("read", &self.path, e))
    }

    /// The bytes of `range`, which its caller has bounded.
    pub(crate) fn read(&self, range: Range<u64>) -> Result<Vec<u8>, CheckpointError> {
        if range.start > range.end || range.end > self.n_bytes {
            return Err(self.bad(range.start, "the file ends before"));
        }
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.read_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Something is wrong at `offset`.
    pub(crate) fn bad(&self, offset: u64, what: impl AsRef<str>) -> CheckpointError {
        CheckpointError::bad_file(&self.path, format!("at byte {offset}: {}", what.as_ref()))
    }

    /// Fails where the file changed since it was opened.
    pub(crate) fn unchanged(&self) -> Result<(), CheckpointError> {
        let meta = self.file.metadata().map_err(|e| CheckpointError::io("read", &self.path, e))?;
        if (meta.len(), meta.mtime(), meta.mtime_nsec()) == (self.n_bytes, self.modified.0, self.modified.1) {
            return Ok(());
        }
        let what = "changed while it was read".to_owned();
        Err(CheckpointError::Changed { path: self.path.clone(), what })
    }
}

/// Reads a run of an [`Input`] from its beginning, byte by byte or in short pieces.
pub(crate) struct Cursor<'a> {
    input: &'a Input,
    at: u64,
    end: u64,
    ahead: Vec<u8>,
    /// Where `ahead` begins.
    ahead_at: u64,
}

impl<'a> Cursor<'a> {
    /// At the beginning of `range`, which lies inside the input.
    pub(crate) fn new(input: &'a Input, range: Range<u64>) -> Self {
        debug_assert!(range.start <= range.end && range.end <= input.n_bytes());
        Self { input, at: range.start, end: range.end, ahead: Vec::new(), ahead_at: 0 }
    }

    pub(crate) fn input(&self) -> &'a Input {
        self.input
    }
    /// Where the next byte lies.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }
    /// Where the last byte ends.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// The next `n` bytes, at most 64 KiB of them.
    pub(crate) fn take(&mut self, n: u64) -> Result<&[u8], CheckpointError> {
        debug_assert!(n <= AHEAD);
        if n > self.end - self.at {
            return Err(self.input.bad(self.at, format!("{n} bytes are needed, {} are left", self.end - self.at)));
        }
        let held = self.ahead_at..self.ahead_at + self.ahead.len() as u64;
        if self.at < held.start || self.at + n > held.end {
            self.ahead.resize(AHEAD.min(self.end - self.at) as usize, 0);
            self.input.read_at(&mut self.ahead, self.at)?;
            self.ahead_at = self.at;
        }
        let start = (self.at - self.ahead_at) as usize;
        self.at += n;
        Ok(&self.ahead[start..start + n as usize])
    }

    /// The next byte.
    pub(crate) fn byte(&mut self) -> Result<u8, CheckpointError> {
        Ok(self.take(1)?[0])
    }

    /// The next `N` bytes as a little-endian number without a sign.
    pub(crate) fn number<const N: usize>(&mut self) -> Result<u64, CheckpointError> {
        let mut le = [0; 8];
        le[..N].copy_from_slice(self.take(N as u64)?);
        Ok(u64::from_le_bytes(le))
    }

    /// Passes over `n` bytes and returns where they lie.
    pub(crate) fn skip(&mut self, n: u64) -> Result<Range<u64>, CheckpointError> {
        if n > self.end - self.at {
            return Err(self.input.bad(self.at, format!("{n} bytes are needed, {} are left", self.end - self.at)));
        }
        let start = self.at;
        self.at += n;
        Ok(start..self.at)
    }

    /// The bytes up to the next line feed, which is passed over; at most `most`.
    pub(crate) fn line(&mut self, most: usize) -> Result<Vec<u8>, CheckpointError> {
        let mut line = Vec::new();
        loop {
            match self.byte()? {
                b'\n' => return Ok(line),
                _ if line.len() == most => {
                    return Err(self.input.bad(self.at, format!("a line is longer than {most} bytes")));
                }
                byte => line.push(byte),
            }
        }
    }
}

/// A file of these bytes, gone when dropped.
#[cfg(test)]
pub(crate) fn test_input(bytes: &[u8]) -> (tempfile::TempDir, Input) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), bytes).unwrap();
    let input = Input::open(&dir.path().join("f")).unwrap();
    (dir, input)
}
