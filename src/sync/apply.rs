//! From a checkpoint and a delta to the newer checkpoint.

use std::{
    fs::File,
    io::{BufReader, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use serde_json::{Map, Value};
use zstd::stream::read::Decoder;

use super::{COMPRESSION, Checksum, DeltaHeader, Encoding, SyncError, SyncReport, SyncedTensor, export::report};
use crate::{
    checkpoint::{
        AtomicDir, Checkpoint, CheckpointError, Context, CopyMode, Existing, INDEX_FILE, Layout, LeftOut, Printable,
        Shard, SingleFile, TensorRef, copy_file, copy_side_files, malformed, open_to_change, read_whole,
    },
    foreign::Input,
    tensor::Dtype,
};

/// Indices larger than this are refused.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Delta bytes that are read from the file at a time.
const AHEAD: usize = 1 << 16;
/// What a frame may look back on, as a power of two: a hundred times what level 1 does.
const MAX_WINDOW: u32 = 26;

/// Applies the delta in `folder` to `base` and writes the newer checkpoint at `output`.
///
/// The checksum of every changed tensor is compared before the output appears, so a delta for another base, and one that
/// was applied already, is refused. Memory: a few windows. Disk: the checkpoint's size.
///
/// # Errors
/// A folder that is no delta, or a broken one; [`SyncError::Unmatched`] lists tensors that the base does not have;
/// [`SyncError::Unfit`] where the result has not the checksum that the delta tells. Nothing was written.
pub fn apply(
    ctx: &Context<'_>,
    base: &Checkpoint,
    folder: &Path,
    output: &Path,
    existing: Existing,
) -> Result<SyncReport, SyncError> {
    let header = read_header(&folder.join(INDEX_FILE))?;
    let delta = Checkpoint::open(folder)?;
    let pairs = pairs(base, &delta)?;
    ctx.observer.begin("copying", base.n_bytes());
    let target = NewCheckpoint::create(base, output, existing)?;
    let mut tensors = Vec::new();
    let mut by_shard: Vec<Vec<&TensorDelta<'_>>> = vec![Vec::new(); base.shards().len()];
    pairs.iter().for_each(|pair| by_shard[pair.base.shard_index].push(pair));
    for (shard, of_shard) in base.shards().iter().zip(by_shard) {
        let file = target.copy(ctx, shard)?;
        for pair in of_shard {
            tensors.push(pair.apply(ctx, &header, &file, &delta)?);
        }
        file.sync_all().map_err(|e| CheckpointError::io("sync", output, e))?;
    }
    base.unchanged()?;
    delta.unchanged()?;
    let left_out = target.commit(ctx, base)?;
    tensors.sort_by(|a, b| a.tensor.cmp(&b.tensor));
    let n_same = (base.tensors().len() - tensors.len()) as u64;
    Ok(SyncReport { left_out, ..report(base, &header, tensors, n_same, base.n_bytes()) })
}

/// What the index says about the delta.
fn read_header(path: &Path) -> Result<DeltaHeader, CheckpointError> {
    let bad = |what: String| CheckpointError::bad_file(path, what);
    let json = read_whole(path, MAX_INDEX_BYTES)?;
    #[derive(serde::Deserialize)]
    struct Index {
        #[serde(default)]
        metadata: Map<String, Value>,
    }
    let Index { metadata } = serde_json::from_slice(&json)
        .map_err(|e| bad(format!("the JSON is malformed: {}", malformed(&json, 0, &e))))?;
    if !metadata.contains_key("delta_encoding") {
        return Err(bad(
            "says nothing of a delta (`delta_encoding`): the folder is a whole checkpoint, to be used as it is"
                .to_owned(),
        ));
    }
    let text = |key: &str| {
        let value = metadata.get(key).and_then(Value::as_str);
        value.ok_or_else(|| bad(format!("its metadata has no `{key}`")))
    };
    let version = |key: &str| {
        let text = text(key)?;
        text.parse::<u64>().map_err(|_| bad(format!("`{key}` is \"{}\", a number is needed", Printable(text))))
    };
    let unknown = |key: &str, found: &str| bad(format!("`{key}` is \"{}\", which is not known", Printable(found)));
    let (encoding, checksum) = (text("delta_encoding")?, text("checksum_format")?);
    let compression = text("compression_format")?;
    if compression != COMPRESSION {
        return Err(unknown("compression_format", compression));
    }
    Ok(DeltaHeader {
        version: version("version")?,
        base_version: version("base_version")?,
        encoding: Encoding::of(encoding).ok_or_else(|| unknown("delta_encoding", encoding))?,
        checksum: Checksum::of(checksum).ok_or_else(|| unknown("checksum_format", checksum))?,
    })
}

/// A delta and the tensor that it changes.
struct TensorDelta<'a> {
    base: TensorRef<'a>,
    delta: TensorRef<'a>,
    /// The checksum of the new bytes.
    expected: &'a str,
}

fn pairs<'a>(base: &'a Checkpoint, delta: &'a Checkpoint) -> Result<Vec<TensorDelta<'a>>, SyncError> {
    let (mut pairs, mut problems, mut broken) = (Vec::new(), Vec::new(), Vec::new());
    for tensor in delta.tensors() {
        let name = Printable(&tensor.info.name);
        let expected = tensor.shard.header().metadata().get(&tensor.info.name);
        if tensor.info.dtype != Dtype::U8 || tensor.info.shape.len() != 1 {
            broken.push(format!("\"{name}\": a delta is a list of bytes"));
        }
        match (base.tensor(&tensor.info.name), expected) {
            (_, None) => broken.push(format!("\"{name}\": has no checksum in its file's metadata")),
            (None, _) => problems.push(format!("\"{name}\": the base has no such tensor")),
            (Some(base), Some(expected)) => pairs.push(TensorDelta { base, delta: tensor, expected }),
        }
    }
    if !broken.is_empty() {
        let what = "is no delta".to_owned();
        return Err(CheckpointError::Many { path: delta.root().to_owned(), what, problems: broken }.into());
    }
    if !problems.is_empty() {
        let n_targets = delta.tensors().len();
        return Err(SyncError::Unmatched { path: delta.root().to_owned(), base: base.name(), n_targets, problems });
    }
    pairs.sort_by_key(|pair| pair.base.info.data.start);
    Ok(pairs)
}

impl TensorDelta<'_> {
    /// Writes the tensor's new bytes to `file`, a copy of its shard, and proves them.
    fn apply(
        &self,
        ctx: &Context<'_>,
        header: &DeltaHeader,
        file: &File,
        delta: &Checkpoint,
    ) -> Result<SyncedTensor, SyncError> {
        let name = &self.base.info.name;
        let n_bytes = self.base.info.n_bytes();
        let mut changes = match header.encoding {
            Encoding::Xor => Changes::Xor(Box::new(self.plain(ctx, n_bytes)?)),
            Encoding::Overwrite => self.overwrite(ctx)?,
        };
        let (mut before, mut after) = (header.checksum.hasher(), header.checksum.hasher());
        let start = self.base.shard.file_range(self.base.info).start;
        let mut n_changed = 0;
        let mut bytes = Vec::new();
        for from in (0..n_bytes).step_by(ctx.window_bytes() as usize) {
            ctx.check()?;
            let window = self.base.window(ctx, from..n_bytes.min(from + ctx.window_bytes()))?;
            before.update(&window);
            bytes.clear();
            bytes.extend_from_slice(&window);
            changes.apply(from, &mut bytes)?;
            n_changed += window.iter().zip(&bytes).filter(|(a, b)| a != b).count() as u64;
            self.base.shard.confirm(&window)?;
            after.update(&bytes);
            file.write_all_at(&bytes, start + from).map_err(|e| CheckpointError::io("write", delta.root(), e))?;
        }
        changes.end()?;
        let (found, expected) = (after.finish(), self.expected);
        if found != expected {
            let why = match before.finish() == expected {
                true => "the base has the new bytes already: the delta was applied to it before".to_owned(),
                false => {
                    let (version, format) = (header.base_version, header.checksum.name());
                    format!(
                        "{format} of the result is {found}, the delta says {}: the base is not version {version}",
                        Printable(expected)
                    )
                }
            };
            let what = format!("tensor \"{}\": {why}", Printable(name));
            return Err(SyncError::Unfit { path: delta.root().to_owned(), what, problems: Vec::new() });
        }
        let (tensor, checksum, n_delta_bytes) = (name.clone(), found, self.delta.info.n_bytes());
        Ok(SyncedTensor { tensor, n_bytes, n_changed, n_delta_bytes, checksum })
    }

    /// The delta's bytes from the beginning, of which there are `n`.
    fn plain(&self, ctx: &Context<'_>, n: u64) -> Result<Plain, CheckpointError> {
        let input = Input::open(self.delta.shard.path())?;
        let range = self.delta.shard.file_range(self.delta.info);
        let what = (self.delta.shard.path().to_owned(), self.delta.info.name.clone());
        let reader = RangeReader { input, at: range.start, end: range.end };
        ctx.check()?;
        let decoder = || {
            let mut decoder = Decoder::new(reader)?;
            decoder.window_log_max(MAX_WINDOW)?;
            Ok::<_, std::io::Error>(decoder)
        };
        let decoder = decoder().map_err(|e| CheckpointError::io("decompress", &what.0, e))?;
        Ok(Plain { decoder: BufReader::with_capacity(AHEAD, decoder), left: n, what })
    }

    /// Positions and new bytes, which lie one behind the other and are read side by side.
    fn overwrite(&self, ctx: &Context<'_>) -> Result<Changes, CheckpointError> {
        let n_bytes = self.base.info.n_bytes();
        let mut count = [0; 4];
        self.plain(ctx, 4)?.read(&mut count)?;
        let n = u64::from(u32::from_le_bytes(count));
        if n > n_bytes {
            let what = format!("{n} bytes are said to change, the tensor has {n_bytes}");
            return Err(CheckpointError::bad_tensor(self.delta.shard.path(), &self.delta.info.name, what));
        }
        let (mut positions, mut values) = (self.plain(ctx, 4 + 4 * n)?, self.plain(ctx, 4 + 5 * n)?);
        positions.read(&mut count)?;
        values.skip(4 + 4 * n)?;
        let changes = Overwrite { positions, values, next: None, last: None, left: n, n_bytes };
        Ok(Changes::Overwrite(Box::new(changes)))
    }
}

/// A delta on its way.
enum Changes {
    Xor(Box<Plain>),
    Overwrite(Box<Overwrite>),
}

/// Positions and new bytes on their way, side by side.
struct Overwrite {
    positions: Plain,
    values: Plain,
    /// Read already, and not yet in the window.
    next: Option<u64>,
    last: Option<u64>,
    /// Positions that are not read yet.
    left: u64,
    n_bytes: u64,
}

impl Changes {
    /// Changes the tensor's bytes from `from` on.
    fn apply(&mut self, from: u64, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        let end = from + bytes.len() as u64;
        match self {
            Self::Xor(plain) => {
                let mut mask = vec![0; bytes.len()];
                plain.read(&mut mask)?;
                bytes.iter_mut().zip(&mask).for_each(|(byte, mask)| *byte ^= mask);
            }
            Self::Overwrite(changes) => {
                while let Some(position) = changes.next_below(end)? {
                    changes.values.read(&mut bytes[(position - from) as usize..][..1])?;
                }
            }
        }
        Ok(())
    }

    /// Whether all of the delta was used.
    fn end(self) -> Result<(), CheckpointError> {
        match self {
            Self::Xor(plain) => plain.end(),
            Self::Overwrite(changes) => changes.values.end(),
        }
    }
}

impl Overwrite {
    /// The next position, where it lies before `end`.
    fn next_below(&mut self, end: u64) -> Result<Option<u64>, CheckpointError> {
        if self.next.is_none() && self.left > 0 {
            let mut le = [0; 4];
            self.positions.read(&mut le)?;
            let position = u64::from(u32::from_le_bytes(le));
            if position >= self.n_bytes || self.last.is_some_and(|last| position <= last) {
                let what = format!("position {position} is out of order or out of the tensor");
                return Err(self.positions.bad(what));
            }
            self.left -= 1;
            (self.next, self.last) = (Some(position), Some(position));
        }
        Ok(self.next.take_if(|position| *position < end))
    }
}

/// A compressed delta's bytes.
struct Plain {
    decoder: BufReader<Decoder<'static, BufReader<RangeReader>>>,
    left: u64,
    what: (std::path::PathBuf, String),
}

impl Plain {
    fn bad(&self, what: impl Into<String>) -> CheckpointError {
        CheckpointError::bad_tensor(&self.what.0, &self.what.1, what)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<(), CheckpointError> {
        if into.len() as u64 > self.left {
            return Err(self.bad("the delta is shorter than it says"));
        }
        self.left -= into.len() as u64;
        self.decoder.read_exact(into).map_err(|e| self.bad(format!("cannot be decompressed: {e}")))
    }

    fn skip(&mut self, n: u64) -> Result<(), CheckpointError> {
        let mut buffer = vec![0; AHEAD];
        let mut left = n;
        while left > 0 {
            let piece = left.min(AHEAD as u64);
            self.read(&mut buffer[..piece as usize])?;
            left -= piece;
        }
        Ok(())
    }

    fn end(mut self) -> Result<(), CheckpointError> {
        let mut one = [0];
        match self.decoder.read(&mut one) {
            Ok(0) if self.left == 0 => Ok(()),
            Ok(_) => Err(self.bad("the delta is longer or shorter than the tensor needs")),
            Err(e) => Err(self.bad(format!("cannot be decompressed: {e}"))),
        }
    }
}

/// A run of a file as a stream.
struct RangeReader {
    input: Input,
    at: u64,
    end: u64,
}

impl Read for RangeReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = buffer.len().min((self.end - self.at) as usize);
        self.input.read_at(&mut buffer[..n], self.at).map_err(|e| std::io::Error::other(e.to_string()))?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Where the new checkpoint grows.
enum NewCheckpoint {
    Folder(AtomicDir),
    File(SingleFile),
}

impl NewCheckpoint {
    fn create(base: &Checkpoint, output: &Path, existing: Existing) -> Result<Self, CheckpointError> {
        Ok(match base.layout() {
            Layout::File => Self::File(SingleFile::create(output, existing)?),
            _ => Self::Folder(AtomicDir::create(output, existing)?),
        })
    }

    /// A copy of a shard, open for changes.
    fn copy(&self, ctx: &Context<'_>, shard: &Shard) -> Result<File, CheckpointError> {
        let path = match self {
            Self::Folder(folder) => folder.path().join(shard.file_name()),
            Self::File(file) => file.root(),
        };
        copy_file(ctx, shard.path(), &path, CopyMode::Auto)?;
        open_to_change(&path)
    }

    /// Brings the other files of the base along, but for those that contradict the new weights, and lets the checkpoint appear.
    fn commit(self, ctx: &Context<'_>, base: &Checkpoint) -> Result<Vec<LeftOut>, CheckpointError> {
        let folder = match self {
            Self::File(file) => return file.commit().map(|()| Vec::new()),
            Self::Folder(folder) => folder,
        };
        let left_out = copy_side_files(ctx, base, folder.path(), false)?;
        folder.commit()?;
        Ok(left_out)
    }
}
