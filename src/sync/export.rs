//! From two checkpoints to a delta.

use std::{collections::BTreeMap, io::Write, ops::Range, path::Path};

use serde_json::json;
use zstd::stream::write::Encoder;

use super::{COMPRESSION, Checksum, DeltaHeader, Encoding, SyncError, SyncReport, SyncedTensor};
use crate::{
    checkpoint::{
        AtomicDir, Checkpoint, CheckpointError, Context, Existing, INDEX_FILE, Printable, TensorFileWriter, TensorId,
        TensorRef, create_new_file, for_each_ordered, probe, window_cost,
    },
    tensor::{Dtype, dtype_name},
};

/// The only file of tensors.
const SHARD: &str = "model-00000-of-00001.safetensors";
/// What slime compresses with.
const LEVEL: i32 = 1;

/// How to export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExportOptions {
    /// How changes are encoded.
    pub encoding: Encoding,
    /// What proves the new bytes.
    pub checksum: Checksum,
    /// The version that the folder makes; its name says it.
    pub version: u64,
    /// The version that it is applied to.
    pub base_version: u64,
}

/// Writes what turns `base` into `tuned` as a folder that SGLang's and slime's weight sync reads.
///
/// Reads both checkpoints once, and changed tensors twice (`xor`) or three times (`overwrite`) more. Memory: a few windows per thread.
///
/// # Errors
/// [`SyncError::Unmatched`] lists tensors that only one of the two has, or that have another type or shape;
/// [`SyncError::Unfit`] where nothing changed, or for `overwrite` a tensor has 4 GiB or more. Nothing was written.
pub fn export(
    ctx: &Context<'_>,
    base: &Checkpoint,
    tuned: &Checkpoint,
    options: &ExportOptions,
    output: &Path,
    existing: Existing,
) -> Result<SyncReport, SyncError> {
    let pairs = pairs(base, tuned)?;
    let folder = AtomicDir::create(output, existing)?;
    ctx.observer.begin("comparing", pairs.iter().map(TensorPair::n_bytes).sum());
    let mut changed = Vec::new();
    for pair in &pairs {
        match pair.n_changed(ctx)? {
            0 => {}
            n => changed.push((pair, n)),
        }
    }
    check(tuned, base, &changed, options.encoding)?;
    let path = folder.path().join(SHARD);
    let mut file = TensorFileWriter::create(&path, Existing::Keep)?;
    let mut tensors = Vec::new();
    ctx.observer.begin("encoding", changed.iter().map(|(pair, _)| pair.n_bytes()).sum());
    for (pair, n_changed) in &changed {
        tensors.push(pair.encode(ctx, options, *n_changed, &mut file, &path)?);
    }
    base.unchanged()?;
    tuned.unchanged()?;
    let checksums: BTreeMap<String, String> =
        tensors.iter().map(|tensor| (tensor.tensor.clone(), tensor.checksum.clone())).collect();
    file.finish(ctx, &checksums)?;
    let index_path = folder.path().join(INDEX_FILE);
    write_index(&index_path, options, &tensors)?;
    let n_bytes = probe::n_bytes(&path)? + probe::n_bytes(&index_path)?;
    folder.commit()?;
    let ExportOptions { encoding, checksum, version, base_version } = *options;
    let n_same = (pairs.len() - tensors.len()) as u64;
    let header = DeltaHeader { version, base_version, encoding, checksum };
    Ok(report(base, &header, tensors, n_same, n_bytes))
}

pub(super) fn report(
    base: &Checkpoint,
    header: &DeltaHeader,
    tensors: Vec<SyncedTensor>,
    n_same: u64,
    n_bytes: u64,
) -> SyncReport {
    SyncReport {
        base: base.name(),
        version: header.version,
        base_version: header.base_version,
        encoding: header.encoding.name().to_owned(),
        checksum: header.checksum.name().to_owned(),
        n_changed_bytes: tensors.iter().map(|tensor| tensor.n_changed).sum(),
        tensors,
        n_same,
        n_bytes,
        left_out: Vec::new(),
    }
}

fn check(
    tuned: &Checkpoint,
    base: &Checkpoint,
    changed: &[(&TensorPair<'_>, u64)],
    encoding: Encoding,
) -> Result<(), SyncError> {
    let unfit = |what: String, problems| Err(SyncError::Unfit { path: tuned.root().to_owned(), what, problems });
    if changed.is_empty() {
        return unfit(
            format!("every tensor is the same in {}: there is no delta", Printable(&base.name())),
            Vec::new(),
        );
    }
    let is_long = |pair: &TensorPair<'_>| encoding == Encoding::Overwrite && u32::try_from(pair.n_bytes()).is_err();
    let problems: Vec<String> = changed
        .iter()
        .filter(|(pair, _)| is_long(pair))
        .map(|(pair, _)| format!("\"{}\": {} bytes", Printable(&pair.tuned.info.name), pair.n_bytes()))
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    unfit("overwrite has 32-bit positions, xor has none:".to_owned(), problems)
}

fn write_index(path: &Path, options: &ExportOptions, tensors: &[SyncedTensor]) -> Result<(), CheckpointError> {
    let io = |e| CheckpointError::io("write", path, e);
    let weight_map: BTreeMap<&str, &str> = tensors.iter().map(|tensor| (tensor.tensor.as_str(), SHARD)).collect();
    let index = json!({
        "metadata": {
            "version": format!("{:06}", options.version),
            "base_version": format!("{:06}", options.base_version),
            "delta_encoding": options.encoding.name(),
            "compression_format": COMPRESSION,
            "checksum_format": options.checksum.name(),
        },
        "weight_map": weight_map,
    });
    let mut file = create_new_file(path)?;
    file.write_all(index.to_string().as_bytes()).map_err(io)?;
    file.sync_all().map_err(|e| CheckpointError::io("sync", path, e))
}

/// A tensor before and after.
struct TensorPair<'a> {
    base: TensorRef<'a>,
    tuned: TensorRef<'a>,
}

fn pairs<'a>(base: &'a Checkpoint, tuned: &'a Checkpoint) -> Result<Vec<TensorPair<'a>>, SyncError> {
    let (mut pairs, mut problems) = (Vec::new(), Vec::new());
    for b in tuned.tensors() {
        let name = Printable(&b.info.name);
        match base.tensor(&b.info.name) {
            None => problems.push(format!("\"{name}\": the base has no such tensor")),
            Some(a) if !a.info.is_like(b.info) => {
                let [from, to] = [a, b].map(|tensor| dtype_name(tensor.info.dtype));
                problems.push(format!("\"{name}\": {from} {:?} became {to} {:?}", a.info.shape, b.info.shape));
            }
            Some(a) => pairs.push(TensorPair { base: a, tuned: b }),
        }
    }
    for a in base.tensors().filter(|a| tuned.tensor(&a.info.name).is_none()) {
        problems.push(format!("\"{}\": is missing, a delta cannot remove it", Printable(&a.info.name)));
    }
    if problems.is_empty() {
        return Ok(pairs);
    }
    let n_targets = tuned.tensors().len();
    Err(SyncError::Unmatched { path: tuned.root().to_owned(), base: base.name(), n_targets, problems })
}

impl TensorPair<'_> {
    fn n_bytes(&self) -> u64 {
        self.tuned.info.n_bytes()
    }

    fn windows(&self, ctx: &Context<'_>) -> impl Iterator<Item = Range<u64>> + Send + use<> {
        let (n, step) = (self.n_bytes(), ctx.window_bytes());
        (0..n).step_by(step as usize).map(move |start| start..n.min(start + step))
    }

    /// Bytes that differ.
    fn n_changed(&self, ctx: &Context<'_>) -> Result<u64, SyncError> {
        let mut n_changed = 0;
        for_each_ordered(
            ctx,
            self.windows(ctx),
            |range| 2 * window_cost(range.end - range.start),
            |range| {
                let (a, b) = (self.base.window(ctx, range.clone())?, self.tuned.window(ctx, range.clone())?);
                ctx.observer.advance(range.end - range.start);
                let n = if *a == *b { 0 } else { a.iter().zip(b.iter()).filter(|(a, b)| a != b).count() };
                self.confirm(&a, &b)?;
                Ok::<_, SyncError>(n as u64)
            },
            |_, n| {
                n_changed += n;
                Ok(())
            },
        )?;
        Ok(n_changed)
    }

    fn confirm(&self, a: &crate::checkpoint::Window, b: &crate::checkpoint::Window) -> Result<(), CheckpointError> {
        self.base.shard.confirm(a)?;
        self.tuned.shard.confirm(b)
    }

    /// Hands the bytes of both on, a window at a time, in order: where it begins, before, after.
    fn for_each_window(
        &self,
        ctx: &Context<'_>,
        mut take: impl FnMut(u64, &[u8], &[u8]) -> Result<(), SyncError>,
    ) -> Result<(), SyncError> {
        for range in self.windows(ctx) {
            ctx.check()?;
            let (a, b) = (self.base.window(ctx, range.clone())?, self.tuned.window(ctx, range.clone())?);
            take(range.start, &a, &b)?;
            self.confirm(&a, &b)?;
        }
        Ok(())
    }

    /// Writes the tensor's delta.
    fn encode(
        &self,
        ctx: &Context<'_>,
        options: &ExportOptions,
        n_changed: u64,
        file: &mut TensorFileWriter,
        path: &Path,
    ) -> Result<SyncedTensor, SyncError> {
        let name = &self.tuned.info.name;
        let n_plain = match options.encoding {
            Encoding::Xor => self.n_bytes(),
            Encoding::Overwrite => 4 + 5 * n_changed,
        };
        let mut delta = Compressed::begin(file, name, n_plain, path)?;
        let mut hasher = options.checksum.hasher();
        let mut bytes = Vec::new();
        match options.encoding {
            Encoding::Xor => self.for_each_window(ctx, |_, a, b| {
                hasher.update(b);
                bytes.clear();
                bytes.extend(a.iter().zip(b).map(|(a, b)| a ^ b));
                Ok(delta.write(&bytes)?)
            })?,
            Encoding::Overwrite => {
                delta.write(&(n_changed as u32).to_le_bytes())?;
                self.for_each_window(ctx, |start, a, b| {
                    hasher.update(b);
                    bytes.clear();
                    for (i, _) in a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b) {
                        bytes.extend((start as u32 + i as u32).to_le_bytes());
                    }
                    Ok(delta.write(&bytes)?)
                })?;
                self.for_each_window(ctx, |_, a, b| {
                    bytes.clear();
                    bytes.extend(a.iter().zip(b).filter(|(a, b)| a != b).map(|(_, b)| *b));
                    Ok(delta.write(&bytes)?)
                })?;
            }
        }
        ctx.observer.advance(self.n_bytes());
        let n_delta_bytes = delta.end()?;
        let (tensor, n_bytes, checksum) = (name.clone(), self.n_bytes(), hasher.finish());
        Ok(SyncedTensor { tensor, n_bytes, n_changed, n_delta_bytes, checksum })
    }
}

/// A tensor of bytes that is compressed on its way into a file.
struct Compressed<'a> {
    file: &'a mut TensorFileWriter,
    id: TensorId,
    encoder: Encoder<'static, Vec<u8>>,
    n_bytes: u64,
    path: &'a Path,
}

impl<'a> Compressed<'a> {
    /// `n_plain` bytes will come; readers find the number in the frame.
    fn begin(
        file: &'a mut TensorFileWriter,
        name: &str,
        n_plain: u64,
        path: &'a Path,
    ) -> Result<Self, CheckpointError> {
        let id = file.add_tensor(name.to_owned(), Dtype::U8);
        let encoder = || {
            let mut encoder = Encoder::new(Vec::new(), LEVEL)?;
            encoder.set_pledged_src_size(Some(n_plain))?;
            encoder.include_contentsize(true)?;
            Ok::<_, std::io::Error>(encoder)
        };
        let encoder = encoder().map_err(|e| CheckpointError::io("compress", path, e))?;
        Ok(Self { file, id, encoder, n_bytes: 0, path })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.encoder.write_all(bytes).map_err(|e| CheckpointError::io("compress", self.path, e))?;
        let done = self.encoder.get_mut();
        self.n_bytes += done.len() as u64;
        self.file.append(self.id, done)?;
        done.clear();
        Ok(())
    }

    fn end(self) -> Result<u64, CheckpointError> {
        let rest = self.encoder.finish().map_err(|e| CheckpointError::io("compress", self.path, e))?;
        self.file.append(self.id, &rest)?;
        let n_bytes = self.n_bytes + rest.len() as u64;
        self.file.finish_tensor(self.id, vec![n_bytes]);
        Ok(n_bytes)
    }
}
