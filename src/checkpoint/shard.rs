//! One safetensors file: its header in memory, its data in windows.

use std::{
    fs::{File, Metadata},
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use super::{
    CheckpointError, Context, FileId, Header, InUse, Io, MAX_HEADER_BYTES, OwnFolder, TensorInfo, Window,
    direct::{self, DirectBytes},
    json::open_regular,
    mmap::is_cached,
    other_format::{START_BYTES, recognize_start},
};

/// Shorter ranges are mapped, cached or not: the page cache's read-ahead helps small reads.
const MIN_DIRECT: usize = 64 << 10;

/// One open safetensors file.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    file: File,
    header: Header,
    stamp: Stamp,
    /// The file reopened for direct reads, if supported.
    direct: OnceLock<Option<File>>,
    /// Set by windows some of whose bytes could not be read.
    lost: Arc<AtomicBool>,
    /// Prevents outputs that replace the file.
    _in_use: Option<InUse>,
}

/// The properties that must not change while a file is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    file_bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self { file_bytes: meta.len(), modified: (meta.mtime(), meta.mtime_nsec()) }
    }
}

impl Shard {
    /// Opens a safetensors file and validates its header strictly.
    ///
    /// Memory: the parsed header; at most about three times its size while parsing.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; for an invalid file, a description of what it is instead.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (file, meta) = open_regular(path, "open")?;
        let in_use = InUse::file(path, &meta);
        Self::of_file(path, file, &meta, Some(in_use))
    }

    /// Opens a file of this program's own state; `None` if it does not exist.
    ///
    /// # Errors
    /// As [`Self::open`]; the file is a link.
    pub(crate) fn open_own(folder: &OwnFolder, name: &str) -> Result<Option<Self>, CheckpointError> {
        let Some((file, meta)) = folder.open_file(name)? else { return Ok(None) };
        Self::of_file(&folder.path().join(name), file, &meta, None).map(Some)
    }

    fn of_file(path: &Path, file: File, meta: &Metadata, in_use: Option<InUse>) -> Result<Self, CheckpointError> {
        let stamp = Stamp::of(meta);
        let json = read_header(path, &file, stamp.file_bytes)?;
        let header = Header::parse(path, &json, stamp.file_bytes)?;
        let (direct, lost) = (OnceLock::new(), Arc::default());
        Ok(Self { path: path.to_owned(), file, header, stamp, direct, lost, _in_use: in_use })
    }

    /// Reopens the file for reading and writing: this very file, not another one that now has its name.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] if another file is there; errors of the system.
    pub fn open_for_writing(&self) -> Result<File, CheckpointError> {
        let file = File::options().read(true).write(true).open(&self.path);
        let file = file.map_err(|e| CheckpointError::io("open for writing", &self.path, e))?;
        let id = |file: &File| {
            let meta = file.metadata().map_err(|e| CheckpointError::io("examine", &self.path, e))?;
            Ok::<_, CheckpointError>(FileId::of(&meta))
        };
        if id(&file)? != id(&self.file)? {
            let what = "it was replaced by another file since it was examined".to_owned();
            return Err(CheckpointError::Changed { path: self.path.clone(), what });
        }
        Ok(file)
    }

    /// Fails if the shard's path now leads to another file, or to none.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`]; the path cannot be examined.
    pub fn still_named(&self) -> Result<(), CheckpointError> {
        let meta = self.file.metadata().map_err(|e| CheckpointError::io("examine", &self.path, e))?;
        match super::probe::metadata(&self.path)? {
            Some(named) if FileId::of(&named) == FileId::of(&meta) => Ok(()),
            _ => {
                let what = "it was replaced by another file since it was examined".to_owned();
                Err(CheckpointError::Changed { path: self.path.clone(), what })
            }
        }
    }

    /// The number of names (hard links) of the file.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn n_names(&self) -> Result<u64, CheckpointError> {
        let meta = self.file.metadata().map_err(|e| CheckpointError::io("examine", &self.path, e))?;
        Ok(meta.nlink())
    }

    /// Device and inode: the same for every path to the file.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn identity(&self) -> Result<(u64, u64), CheckpointError> {
        let meta = self.file.metadata().map_err(|e| CheckpointError::io("examine", &self.path, e))?;
        Ok((meta.dev(), meta.ino()))
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// The file's name without its folder.
    pub fn file_name(&self) -> String {
        self.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }
    /// The validated header.
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// The header's JSON as stored in the file, read again.
    pub fn header_json(&self) -> Result<Vec<u8>, CheckpointError> {
        let mut json = vec![0; self.header.header_bytes() as usize];
        self.read_at(&mut json, 8)?;
        Ok(json)
    }
    /// The open file, for copying and locking.
    pub fn file(&self) -> &File {
        &self.file
    }
    /// The size of the file when it was opened, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.stamp.file_bytes
    }

    /// The range of `tensor`'s data, in bytes from the start of the file.
    pub fn file_range(&self, tensor: &TensorInfo) -> Range<u64> {
        let start = self.header.data_start();
        start + tensor.data.start..start + tensor.data.end
    }

    /// The bytes `range` of `tensor`, relative to its start. Call [`Shard::confirm`] after using them.
    ///
    /// # Panics
    /// If `range` is outside the tensor.
    pub fn window(&self, ctx: &Context<'_>, tensor: &TensorInfo, range: Range<u64>) -> Result<Window, CheckpointError> {
        assert!(range.start <= range.end && range.end <= tensor.n_bytes(), "a window lies inside its tensor");
        let offset = self.file_range(tensor).start + range.start;
        let len = (range.end - range.start) as usize;
        match ctx.io {
            Io::Auto if self.is_cold(offset, len) => self.read_direct(offset, len),
            Io::Direct => self.read_direct(offset, len),
            Io::Auto | Io::Mapped => self.map(offset, len),
            Io::Read => {
                let mut bytes = vec![0; len];
                self.read_at(&mut bytes, offset)?;
                Ok(Window::owned(bytes))
            }
        }
    }

    fn map(&self, offset: u64, len: usize) -> Result<Window, CheckpointError> {
        let file_bytes = self.stamp_now()?.file_bytes;
        if file_bytes < self.stamp.file_bytes {
            return Err(self.shrank(file_bytes));
        }
        Window::map(&self.file, offset, len, &self.lost).map_err(|e| self.read_error(e))
    }

    /// Reads with direct I/O, or maps if that is not supported.
    fn read_direct(&self, offset: u64, len: usize) -> Result<Window, CheckpointError> {
        let Some(file) = self.direct_file() else {
            return self.map(offset, len);
        };
        match direct::read(file, offset, len) {
            Ok(bytes) => Ok(Window::direct(bytes)),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => self.map(offset, len),
            Err(e) => Err(self.read_error(e)),
        }
    }

    /// Reads a range of the file into owned memory, with direct I/O if it is not cached.
    pub(super) fn read_copy(&self, ctx: &Context<'_>, range: Range<u64>) -> Result<DirectBytes, CheckpointError> {
        let (offset, len) = (range.start, (range.end - range.start) as usize);
        let past_cache = match ctx.io {
            Io::Auto => self.is_cold(offset, len),
            Io::Direct => true,
            Io::Mapped | Io::Read => false,
        };
        let direct = past_cache.then(|| self.direct_file()).flatten();
        match direct.map(|file| direct::read(file, offset, len)) {
            Some(Ok(bytes)) => return Ok(bytes),
            Some(Err(e)) if e.kind() != io::ErrorKind::InvalidInput => return Err(self.read_error(e)),
            _ => {}
        }
        let mut bytes = DirectBytes::new(offset, len);
        self.read_at(bytes.as_mut(), offset)?;
        Ok(bytes)
    }

    fn direct_file(&self) -> Option<&File> {
        self.direct.get_or_init(|| direct::open(&self.path, &self.file)).as_ref()
    }

    /// Whether these bytes should be read from disk with direct I/O.
    fn is_cold(&self, offset: u64, len: usize) -> bool {
        len >= MIN_DIRECT && !is_cached(&self.file, offset, len)
    }

    /// Whether windows of `tensor` will be read from disk with direct I/O, judged by one of them.
    pub(super) fn reads_directly(&self, ctx: &Context<'_>, tensor: &TensorInfo) -> bool {
        let range = self.file_range(tensor);
        let len = ctx.window_bytes().min(range.end - range.start);
        match ctx.io {
            Io::Auto => self.is_cold(range.start, len as usize),
            Io::Direct => true,
            Io::Mapped | Io::Read => false,
        }
    }

    /// Fills `bytes` from the file at `offset`.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        self.file.read_exact_at(bytes, offset).map_err(|e| self.read_error(e))
    }

    /// The file's length and modification time at opening, as text: unchanged as long as nobody writes the file.
    pub fn stamp(&self) -> String {
        let (seconds, nanoseconds) = self.stamp.modified;
        format!("{} bytes, modified {seconds}.{nanoseconds:09}", self.stamp.file_bytes)
    }

    /// Fails if some of the window's bytes were replaced by zeros, because the file shrank or the disk failed while
    /// they were read.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] or [`CheckpointError::Io`].
    pub fn confirm(&self, window: &Window) -> Result<(), CheckpointError> {
        if window.is_intact() { Ok(()) } else { Err(self.loss()) }
    }

    /// Fails if the file's length or modification time changed since opening, or if some of its bytes could not be
    /// read.
    pub fn unchanged(&self) -> Result<(), CheckpointError> {
        if self.lost.load(SeqCst) {
            return Err(self.loss());
        }
        let now = self.stamp_now()?;
        if now.file_bytes < self.stamp.file_bytes {
            return Err(self.shrank(now.file_bytes));
        }
        if now != self.stamp {
            return Err(CheckpointError::Changed {
                path: self.path.clone(),
                what: "changed while being read".to_owned(),
            });
        }
        Ok(())
    }

    fn stamp_now(&self) -> Result<Stamp, CheckpointError> {
        let meta = self.file.metadata().map_err(|e| CheckpointError::io("read", &self.path, e))?;
        Ok(Stamp::of(&meta))
    }

    /// The reason why a mapped page was missing.
    fn loss(&self) -> CheckpointError {
        match self.stamp_now() {
            Ok(now) if now.file_bytes < self.stamp.file_bytes => self.shrank(now.file_bytes),
            Ok(now) if now != self.stamp => {
                CheckpointError::Changed { path: self.path.clone(), what: "shrank while being read".to_owned() }
            }
            _ => CheckpointError::io("read", &self.path, io::Error::other("the system could not read a mapped page")),
        }
    }

    fn read_error(&self, e: io::Error) -> CheckpointError {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => self.shrank(self.file.metadata().map_or(0, |meta| meta.len())),
            _ => CheckpointError::io("read", &self.path, e),
        }
    }

    fn shrank(&self, now: u64) -> CheckpointError {
        let what = format!("shrank while being read, from {} to {now} bytes", self.stamp.file_bytes);
        CheckpointError::Changed { path: self.path.clone(), what }
    }
}

fn read_header(path: &Path, file: &File, file_bytes: u64) -> Result<Vec<u8>, CheckpointError> {
    let bad = |what: String| CheckpointError::bad_file(path, what);
    let read = |bytes: &mut [u8], offset| {
        file.read_exact_at(bytes, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                let what = format!("shrank while being read, from {file_bytes} bytes");
                CheckpointError::Changed { path: path.to_owned(), what }
            }
            _ => CheckpointError::io("read", path, e),
        })
    };
    let mut start = [0u8; START_BYTES];
    let known = file_bytes.min(START_BYTES as u64) as usize;
    read(&mut start[..known], 0)?;
    if let Some(format) = recognize_start(&start[..known]) {
        return Err(CheckpointError::other_format(path, format, "a safetensors file"));
    }
    if file_bytes < 8 {
        return Err(bad(format!("has {file_bytes} bytes: too short for a safetensors file")));
    }
    let claimed = u64::from_le_bytes(start[..8].try_into().expect("eight bytes"));
    if claimed > MAX_HEADER_BYTES {
        return Err(bad(format!("header claims {claimed} bytes, at most {MAX_HEADER_BYTES} are accepted")));
    }
    if claimed > file_bytes - 8 {
        return Err(bad(format!(
            "header claims {claimed} bytes, the file has {} after it: the download is incomplete",
            file_bytes - 8
        )));
    }
    let mut json = vec![0; claimed as usize];
    read(&mut json, 8)?;
    Ok(json)
}
