//! Reads past the page cache, into aligned buffers that are used again.
//!
//! What is not in memory comes from the disk faster this way than through the page cache, and what other programs have there
//! stays there. Not every file system can; callers then read as usual.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::{Deref, Range},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Mutex,
};

use rustix::fs::OFlags;

/// Addresses, offsets and lengths of direct reads and writes are multiples of this, which suits every disk in use.
pub(super) const ALIGNMENT: usize = 4096;

/// The most bytes that a buffer takes beside those asked for: pages at both ends, and what aligns it.
pub(crate) const SLACK: u64 = 3 * ALIGNMENT as u64;

/// Buffers that nobody uses at the moment, the last used last; taking one again spares the system's clearing of fresh memory.
///
/// Buffers in use and spare ones together never take much more than the most that was ever in use at once: a buffer is taken again for
/// about its own size alone, and where none fits, as many bytes of spare ones are freed as are allocated.
static SPARE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A buffer whose first byte lies on an [`ALIGNMENT`] boundary.
pub(super) struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// A buffer of `len` bytes of no meaning.
    pub(super) fn new(len: usize) -> Self {
        let memory = spare_buffer(len + ALIGNMENT).unwrap_or_else(|| vec![0; len + ALIGNMENT]);
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        assert!(start < ALIGNMENT, "bytes can be aligned");
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

/// A spare buffer of at least `needed` bytes and at most an eighth more; where there is none, room is made for a fresh one.
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

/// Frees the buffers that nobody uses.
pub(super) fn free_spare_buffers() {
    if let Ok(mut spare) = SPARE.lock() {
        spare.clear();
    }
}

/// Bytes of a file, so placed in memory that whole pages of the file are whole pages of memory.
pub(super) struct DirectBytes {
    buffer: AlignedBuffer,
    range: Range<usize>,
}

impl DirectBytes {
    /// Room for `len` bytes from `offset` of a file, of no meaning yet.
    pub(super) fn new(offset: u64, len: usize) -> Self {
        let skipped = (offset % ALIGNMENT as u64) as usize;
        let buffer = AlignedBuffer::new((skipped + len).next_multiple_of(ALIGNMENT));
        Self { buffer, range: skipped..skipped + len }
    }

    /// The bytes, to be filled or changed.
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.as_mut()[self.range.clone()]
    }

    /// Which of them fill whole pages of the file.
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

/// Opens the file at `path` once more for direct reads; none where that cannot be, or where another file lies there now.
pub(super) fn open(path: &Path, file: &File) -> Option<File> {
    open_as(File::options().read(true), path, file)
}

/// The same for direct writes.
pub(super) fn open_for_writing(path: &Path, file: &File) -> Option<File> {
    open_as(File::options().write(true), path, file)
}

/// The same for both.
pub(super) fn open_for_rewriting(path: &Path, file: &File) -> Option<File> {
    open_as(File::options().read(true).write(true), path, file)
}

fn open_as(options: &mut OpenOptions, path: &Path, file: &File) -> Option<File> {
    let direct = options.custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok()?;
    let (meta, same) = (direct.metadata().ok()?, file.metadata().ok()?);
    ((meta.dev(), meta.ino()) == (same.dev(), same.ino())).then_some(direct)
}

/// Reads `len` bytes of `direct` from `offset`, of any alignment.
///
/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] where the file is shorter, and what the system says, as
/// [`io::ErrorKind::InvalidInput`] where this file cannot be read directly.
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
        // What ends off a boundary is the end of the file.
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
    fn any_run_of_bytes_can_be_read() {
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
                // This file system has no direct reads, and what to do without is tested where they are used.
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
