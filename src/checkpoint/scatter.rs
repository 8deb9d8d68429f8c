//! Writes elements at chosen positions of a file, with as few and as long writes as is efficient.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use super::{
    CheckpointError, Context, Io, Shard,
    direct::{self, ALIGNMENT},
    mmap::is_cached,
    window_cost,
};

/// For cached data, the distance in bytes up to which one longer write is cheaper than two calls.
const CLOSE: u64 = 1024;
/// The same for data on disk, where the page of each element would be read first, one after another.
const CLOSE_ON_DISK: u64 = 32 << 10;
/// Maximum length of a write; a window, if that is shorter.
const MAX_WRITE: u64 = 4 << 20;
/// Shorter runs go through the page cache.
const MIN_DIRECT: u64 = 64 << 10;

/// A file that is open for changes in place.
#[derive(Debug)]
pub struct Patcher {
    path: PathBuf,
    file: File,
    /// The file reopened for direct I/O, if supported.
    direct: Option<File>,
    /// Set if the file system refused direct I/O.
    refused: AtomicBool,
    io: Io,
    /// Maximum length of a write.
    max_write: u64,
    /// Start of the tensor data.
    data_start: u64,
}

/// The destination of an element: byte offset in the file, and index among the elements.
pub type Destination = (u64, usize);

impl Patcher {
    /// Opens a shard for changes: the file that was examined, not another one that now has its name.
    ///
    /// # Errors
    /// As [`Shard::open_for_writing`].
    pub fn of(ctx: &Context<'_>, shard: &Shard) -> Result<Self, CheckpointError> {
        Ok(Self::new(ctx, shard.path(), shard.open_for_writing()?, shard.header().data_start()))
    }

    /// Opens the existing file `path`, part of an output, for reading and writing; its tensor data begins at
    /// `data_start`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn open(ctx: &Context<'_>, path: &Path, data_start: u64) -> Result<Self, CheckpointError> {
        let file = File::options().read(true).write(true).open(path);
        Ok(Self::new(ctx, path, file.map_err(|e| CheckpointError::io("open for writing", path, e))?, data_start))
    }

    fn new(ctx: &Context<'_>, path: &Path, file: File, data_start: u64) -> Self {
        let direct = match ctx.io {
            Io::Auto | Io::Direct => direct::open_for_rewriting(path, &file),
            Io::Mapped | Io::Read => None,
        };
        let max_write = MAX_WRITE.min(ctx.window_bytes());
        Self { path: path.to_owned(), file, direct, refused: AtomicBool::new(false), io: ctx.io, max_write, data_start }
    }

    /// Start of the tensor data, in bytes from the start of the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Maximum bytes of memory that [`Self::write`] uses beyond its arguments.
    pub fn write_cost(&self) -> u64 {
        window_cost(self.max_write)
    }

    /// Writes elements of `width` bytes at `destinations`, which ascend; `elements` holds them consecutively.
    ///
    /// Bytes between the elements do not change. No other writer may write in `own`, a range of the file, at the same
    /// time: there, uncached data is read and written in whole pages with direct I/O. Memory: [`Self::write_cost`].
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; some of the elements may then be written.
    pub fn write(
        &self,
        own: Range<u64>,
        destinations: &[Destination],
        elements: &[u8],
        width: usize,
    ) -> Result<(), CheckpointError> {
        let (Some(first), Some(last)) = (destinations.first(), destinations.last()) else { return Ok(()) };
        let page = ALIGNMENT as u64;
        let own = own.start.next_multiple_of(page)..own.end / page * page;
        let is_long = last.0 - first.0 >= MIN_DIRECT && own.end.saturating_sub(own.start) >= MIN_DIRECT;
        let patch = Patch { destinations, elements, width, max_write: self.max_write };
        let written = match self.direct.as_ref().filter(|_| is_long && !self.refused.load(Relaxed)) {
            Some(direct) if self.is_cold(&own) => match patch.write_past_cache(&self.file, direct, &own) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                    self.refused.store(true, Relaxed);
                    patch.write(&self.file)
                }
                written => written,
            },
            _ => patch.write(&self.file),
        };
        written.map_err(|e| CheckpointError::io("write", &self.path, e))
    }

    /// Writes consecutive bytes at `offset`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; some of the bytes may then be written.
    pub fn write_run(&self, offset: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file.write_all_at(bytes, offset).map_err(|e| CheckpointError::io("write", &self.path, e))
    }

    fn is_cold(&self, run: &Range<u64>) -> bool {
        self.io == Io::Direct || !is_cached(&self.file, run.start, (run.end - run.start) as usize)
    }

    /// Waits until all writes are on disk.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], as "sync". A retry proves nothing: the system may have dropped the pages and would
    /// then report success.
    pub fn sync(&self) -> Result<(), CheckpointError> {
        self.file.sync_data().map_err(|e| CheckpointError::io("sync", &self.path, e))
    }
}

/// Elements to be written to a file.
#[derive(Clone, Copy)]
struct Patch<'a> {
    destinations: &'a [Destination],
    elements: &'a [u8],
    width: usize,
    max_write: u64,
}

impl<'a> Patch<'a> {
    /// Copies the elements into `bytes`, which begin at `start` of the file.
    fn put(&self, bytes: &mut [u8], start: u64) {
        let width = self.width;
        for &(offset, at) in self.destinations {
            let place = (offset - start) as usize;
            bytes[place..place + width].copy_from_slice(&self.elements[at * width..(at + 1) * width]);
        }
    }

    /// Runs of destinations at most `gap` bytes apart, each at most `max_write` long.
    fn runs(self, gap: u64) -> impl Iterator<Item = Self> {
        let mut rest = self.destinations;
        std::iter::from_fn(move || {
            let first = rest.first()?.0;
            let is_in = |pair: &&[Destination]| pair[1].0 - pair[0].0 <= gap && pair[1].0 - first < self.max_write;
            let n = 1 + rest.windows(2).take_while(is_in).count();
            let (run, others) = rest.split_at(n);
            rest = others;
            Some(Self { destinations: run, ..self })
        })
    }

    /// From the start of the first element to the end of the last.
    fn span(&self) -> Range<u64> {
        let (first, last) = (self.destinations[0].0, self.destinations[self.destinations.len() - 1].0);
        first..last + self.width as u64
    }

    /// Writes through the page cache, and only the elements themselves.
    fn write(self, file: &File) -> io::Result<()> {
        let mut buffer = Vec::new();
        for run in self.runs(CLOSE) {
            let span = run.span();
            buffer.resize((span.end - span.start) as usize, 0);
            if run.destinations.len() > 1 {
                file.read_exact_at(&mut buffer, span.start)?;
            }
            run.put(&mut buffer, span.start);
            file.write_all_at(&buffer, span.start)?;
        }
        Ok(())
    }

    /// Writes whole pages of `own` with direct I/O, everything else through the page cache.
    fn write_past_cache(self, file: &File, direct: &File, own: &Range<u64>) -> io::Result<()> {
        let before = self.destinations.partition_point(|place| place.0 < own.start);
        let inside =
            before + self.destinations[before..].partition_point(|place| place.0 + self.width as u64 <= own.end);
        let part = |destinations: &'a [Destination]| Self { destinations, ..self };
        part(&self.destinations[..before]).write(file)?;
        for run in part(&self.destinations[before..inside]).runs(CLOSE_ON_DISK) {
            let page = ALIGNMENT as u64;
            let (start, end) = (run.span().start / page * page, run.span().end.next_multiple_of(page));
            if end - start < MIN_DIRECT {
                run.write(file)?;
                continue;
            }
            let mut bytes = direct::read(direct, start, (end - start) as usize)?;
            run.put(bytes.as_mut(), start);
            direct.write_all_at(&bytes, start)?;
        }
        part(&self.destinations[inside..]).write(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positions at many distances, in the middle of the file and at its edges.
    fn destinations(n_bytes: u64, width: u64) -> Vec<u64> {
        let mut destinations = vec![0, width, 4096 - width, 4096, 4096 + 2 * width];
        let gaps =
            [width, 1000 * width, CLOSE, CLOSE + width, 5000 / width * width, CLOSE_ON_DISK, CLOSE_ON_DISK + width];
        for gap in gaps.into_iter().cycle() {
            let next = destinations[destinations.len() - 1] + gap;
            if next > n_bytes - width {
                break;
            }
            destinations.push(next);
        }
        destinations.extend((destinations[destinations.len() - 1] < n_bytes - width).then_some(n_bytes - width));
        destinations
    }

    #[test]
    fn only_the_chosen_elements_are_written() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let path = dir.path().join("f");
        for (n_bytes, width) in [(9_000_000_u64, 2_u64), (300_000, 4), (5000, 1), (8, 8)] {
            let bytes: Vec<u8> = (0..n_bytes).map(|i| (i * 31 % 251) as u8).collect();
            let mut offsets = destinations(n_bytes.max(9000), width);
            offsets.retain(|&offset| offset + width <= n_bytes);
            let elements: Vec<u8> = (0..offsets.len() as u64 * width).map(|i| (i * 17 % 253) as u8).collect();
            // The elements are in a different order than the places.
            let n = offsets.len();
            let placed: Vec<Destination> = offsets.iter().enumerate().map(|(i, &offset)| (offset, n - 1 - i)).collect();
            let mut expected = bytes.clone();
            for &(offset, at) in &placed {
                let (to, from) = (offset as usize, at * width as usize);
                expected[to..to + width as usize].copy_from_slice(&elements[from..from + width as usize]);
            }
            for io in [Io::Auto, Io::Direct, Io::Mapped, Io::Read] {
                for own in [0..n_bytes, 0..0, 4097..n_bytes.max(4097) - 1, n_bytes / 2..n_bytes] {
                    std::fs::write(&path, &bytes).unwrap();
                    let patcher = Patcher::open(&Context { io, ..Context::default() }, &path, 0).unwrap();
                    patcher.write(own.clone(), &placed, &elements, width as usize).unwrap();
                    patcher.sync().unwrap();
                    assert!(std::fs::read(&path).unwrap() == expected, "{n_bytes} {io:?} {own:?}");
                }
            }
        }
    }

    #[test]
    fn threads_share_pages_without_losing_a_byte() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let path = dir.path().join("f");
        const N: u64 = 64;
        // Each part ends in the middle of a page, where the next one begins.
        const PART: u64 = 70_001;
        std::fs::write(&path, vec![0; (N * PART) as usize]).unwrap();
        let patcher = Patcher::open(&Context { io: Io::Direct, ..Context::default() }, &path, 0).unwrap();
        std::thread::scope(|scope| {
            for part in 0..N {
                let patcher = &patcher;
                scope.spawn(move || {
                    let destinations: Vec<Destination> = (0..PART).map(|i| (part * PART + i, i as usize)).collect();
                    let elements = vec![part as u8 + 1; PART as usize];
                    patcher.write(part * PART..(part + 1) * PART, &destinations, &elements, 1).unwrap();
                });
            }
        });
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.iter().enumerate().all(|(i, &byte)| u64::from(byte) == i as u64 / PART + 1));
    }
}
