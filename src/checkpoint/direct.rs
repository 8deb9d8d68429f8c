//! Direct I/O: reads that bypass the page cache, into aligned, reusable buffers.
//!
//! Data that is not cached arrives faster this way, and other programs' cached pages are not evicted. Not every file
//! system supports it; callers then read normally.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::{Deref, Range},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Mutex,
};

use rustix::fs::OFlags;

/// Addresses, offsets and lengths of direct I/O are multiples of this, which suits every disk in use.
pub(super) const ALIGNMENT: usize = 4096;

/// Maximum overhead of a buffer: partial pages at both ends, and the alignment.
pub(crate) const SLACK: u64 = 3 * ALIGNMENT as u64;

/// Buffers that are not in use, most recently used last. Reusing one saves the system's clearing of fresh memory.
///
/// Used and spare buffers together never take much more than the peak in use: a buffer is reused only for about its
/// own size, and if none fits, as many spare bytes are freed as are allocated.
static SPARE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A buffer whose first byte is aligned to [`ALIGNMENT`].
pub(super) struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// A buffer of `len` bytes with arbitrary content.
    pub(super) fn new(len: usize) -> Self {
        let memory = spare_buffer(len + ALIGNMENT).unwrap_or_else(|| vec![0; len + ALIGNMENT]);
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        assert!(start < ALIGNMENT, "any address can be aligned");
        Self { memory, start, len }
    }

    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if let Ok(mut spare) = SPARE.lock() {
            spare.push(std::mem::take(&mut self.memory));
        }
    }
}

/// A spare buffer of at least `needed` bytes and at most an eighth more; if there is none, frees spare memory for a
/// new one.
fn spare_buffer(needed: usize) -> Option<Vec<u8>> {
    let mut spare = SPARE.lock().ok()?;
    let fits = |memory: &Vec<u8>| (needed..=needed + needed / 8).contains(&memory.len());
    if let Some(found) = spare.iter().rposition(fits) {
        return Some(spare.remove(found));
    }
    let mut n_freed = 0;
    while n_freed < needed && !spare.is_empty() {
        n_freed += spare.remove(0).len();
    }
    None
}

/// Frees the spare buffers.
pub(super) fn free_spare_buffers() {
    if let Ok(mut spare) = SPARE.lock() {
        spare.clear();
    }
}

/// Bytes of a file in a buffer where whole pages of the file are whole pages of memory.
pub(super) struct DirectBytes {
    buffer: AlignedBuffer,
    range: Range<usize>,
}

impl DirectBytes {
    /// A buffer for `len` bytes at `offset` of a file, with arbitrary content.
    pub(super) fn new(offset: u64, len: usize) -> Self {
        let skipped = (offset % ALIGNMENT as u64) as usize;
        let buffer = AlignedBuffer::new((skipped + len).next_multiple_of(ALIGNMENT));
        Self { buffer, range: skipped..skipped + len }
    }

    /// The bytes, mutable.
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.as_mut()[self.range.clone()]
    }

    /// The part that covers whole pages of the file.
    pub(super) fn whole_pages(&self) -> Range<usize> {
        let start = self.range.start.next_multiple_of(ALIGNMENT);
        let end = self.range.end - self.range.end % ALIGNMENT;
        if start < end { start - self.range.start..end - self.range.start } else { 0..0 }
    }
}

impl Deref for DirectBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

/// Reopens the file at `path` for direct reads; `None` if this is not supported, or if another file is there now.
pub(super) fn open(path: &Path, file: &File) -> Option<File> {
    open_as(File::options().read(true), path, file)
}

/// The same for direct writes.
pub(super) fn open_for_writing(path: &Path, file: &File) -> Option<File> {
    open_as(File::options().write(true), path, file)
}

/// The same for reads and writes.
pub(super) fn open_for_rewriting(path: &Path, file: &File) -> Option<File> {
    open_as(File::options().read(true).write(true), path, file)
}

fn open_as(options: &mut OpenOptions, path: &Path, file: &File) -> Option<File> {
    let direct = options.custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok()?;
    let (meta, same) = (direct.metadata().ok()?, file.metadata().ok()?);
    ((meta.dev(), meta.ino()) == (same.dev(), same.ino())).then_some(direct)
}

/// Reads `len` bytes of `direct` at `offset`, of any alignment.
///
/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] if the file is shorter; errors of the system, such as
/// [`io::ErrorKind::InvalidInput`] if this file does not support direct reads.
pub(super) fn read(direct: &File, offset: u64, len: usize) -> io::Result<DirectBytes> {
    let mut bytes = DirectBytes::new(offset, len);
    let (first, needed) = (offset - bytes.range.start as u64, bytes.range.end);
    let mut n_read = 0;
    while n_read < needed {
        match direct.read_at(&mut bytes.buffer.as_mut()[n_read..], first + n_read as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n_read += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        // A read that ends off a boundary has reached the end of the file.
        if n_read % ALIGNMENT != 0 && n_read < needed {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_of_bytes_can_be_read() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let path = dir.path().join("f");
        let bytes: Vec<u8> = (0..20_001).map(|i| (i * 31 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        let Some(direct) = open(&path, &file) else {
            return;
        };
        for range in [0..20_001, 0..1, 4095..4097, 4096..8192, 19_999..20_001, 123..123] {
            match read(&direct, range.start as u64, range.len()) {
                Ok(read) => assert_eq!(*read, bytes[range]),
                // This file system has no direct I/O; the fallback is tested by its users.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => return,
                Err(e) => panic!("{e}"),
            }
        }
        for (offset, len) in [(20_000, 2), (20_001, 1), (30_000, 5), (0, 20_002)] {
            let error = read(&direct, offset, len).err().map(|e| e.kind());
            assert_eq!(error, Some(io::ErrorKind::UnexpectedEof), "{offset} {len}");
        }
    }
}
