//! Resuming a run that was cut short: shards that it finished are proven before the next run takes them over.
//!
//! Beside each finished shard `NAME` lies its record, `.NAME.record`: two lines of text ([`checksummed`]). The document names the plan,
//! which says what the output will be, the shard's bytes, and the BLAKE3 of each run of them, taken while they were written. The order on disk is: the shard's bytes under a temporary name, its record, its name; each
//! durable before the next. Whatever a kill or a power loss leaves is therefore a shard with its record, or something that is removed.

use std::{collections::BTreeSet, fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    AtomicDir, CheckpointError, Context, EntryKind, Existing, OwnFolder, Printable, checksummed, for_each_ordered,
    windows, write_atomic,
};
use crate::error::{ErrorKind, Failure};

/// Records larger than this are not read; a piece takes about 90 bytes.
const MAX_RECORD_BYTES: u64 = 256 << 20;
/// A file is hashed this many bytes at a time.
const READ_BYTES: u64 = 1 << 20;

/// A run of a shard's bytes: where it ends, and its BLAKE3.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Piece(u64, String);

impl Piece {
    pub(crate) fn new(end: u64, hash: blake3::Hash) -> Self {
        Self(end, hash.to_hex().to_string())
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShardRecord {
    version: u32,
    /// BLAKE3 of the plan.
    plan: String,
    n_bytes: u64,
    /// Ascending; together they are the whole file.
    pieces: Vec<Piece>,
}

impl ShardRecord {
    /// Parses the two lines; none where a bit of them is not as written.
    fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_str(checksummed::document_of(bytes)?).ok().filter(|record: &Self| record.version == 1)
    }

    /// The pieces with their ranges; none where they are not the whole file.
    fn ranges(&self) -> Option<Vec<(Range<u64>, &str)>> {
        let starts = std::iter::once(0).chain(self.pieces.iter().map(|piece| piece.0));
        let ranges: Vec<_> = starts.zip(&self.pieces).map(|(start, Piece(end, hash))| (start..*end, &**hash)).collect();
        let ascends = ranges.iter().all(|(range, _)| range.start < range.end);
        let end = ranges.last().map_or(0, |(range, _)| range.end);
        (ascends && end == self.n_bytes).then_some(ranges)
    }
}

/// An output folder that an earlier run may have begun.
pub(crate) struct Resume {
    folder: OwnFolder,
    plan: String,
    /// Names of shards that were taken over.
    proven: BTreeSet<String>,
    notes: Vec<String>,
}

impl Resume {
    /// Proves the shards that lie at `root`, reading all of them, and removes everything else there but the plan: shards that are not
    /// what their records say, shards and records without each other, unfinished files, a ledger.
    ///
    /// # Errors
    /// What cannot be read or removed.
    pub(crate) fn begin(
        ctx: &Context<'_>,
        root: &Path,
        plan: &str,
        shards: &[String],
    ) -> Result<Self, CheckpointError> {
        let plan = blake3::hash(plan.as_bytes()).to_hex().to_string();
        let mut resume = Self { folder: OwnFolder::at(root)?, plan, proven: BTreeSet::new(), notes: Vec::new() };
        let mut left = Vec::new();
        let mut n_bytes = 0;
        for name in shards {
            let Some(kind) = resume.folder.kind_of(name)? else { continue };
            if kind == EntryKind::File {
                n_bytes += resume.folder.open_file(name)?.map_or(0, |(_, meta)| meta.len());
            }
            left.push(name.clone());
        }
        ctx.observer.begin("proving finished shards", n_bytes);
        for name in left {
            match resume.prove(ctx, &name)? {
                Ok(()) => _ = resume.proven.insert(name),
                Err(what) => {
                    let name = Printable(&name);
                    resume.notes.push(format!("{name}: left by an earlier run, {what}: it was written again"));
                }
            }
        }
        resume.remove_unproven()?;
        Ok(resume)
    }

    /// Whether an earlier run finished this shard.
    pub(crate) fn has(&self, shard: &str) -> bool {
        self.proven.contains(shard)
    }

    /// Records a shard, durably, before it gets its name.
    pub(crate) fn record(&self, name: &str, pieces: Vec<Piece>) -> Result<(), CheckpointError> {
        let n_bytes = pieces.last().map_or(0, |piece| piece.0);
        let record = ShardRecord { version: 1, plan: self.plan.clone(), n_bytes, pieces };
        write_atomic(&self.folder.path().join(record_name(name)), Existing::Replace, &checksummed::to_bytes(&record))
    }

    /// The same for a shard whose bytes are those of the finished file at `path`.
    pub(crate) fn record_file(&self, ctx: &Context<'_>, name: &str, path: &Path) -> Result<(), CheckpointError> {
        let io = |e| CheckpointError::io("read", path, e);
        let file = File::open(path).map_err(io)?;
        let n_bytes = file.metadata().map_err(io)?.len();
        let mut pieces = Vec::new();
        for_each_ordered(
            ctx,
            windows(ctx, 0..n_bytes),
            |range| READ_BYTES.min(range.end - range.start),
            |range| hash_range(ctx, &file, path, range),
            |range, hash| {
                pieces.push(Piece::new(range.end, hash));
                Ok::<_, CheckpointError>(())
            },
        )?;
        self.record(name, pieces)
    }

    /// Removes all records: what is in the folder now becomes a checkpoint. Returns what there is to tell.
    pub(crate) fn finish(self, shards: &[String]) -> Result<Vec<String>, CheckpointError> {
        for name in shards {
            self.folder.remove(&record_name(name))?;
        }
        Ok(self.notes)
    }

    /// Proves that a shard is what its record says; else what is wrong.
    fn prove(&self, ctx: &Context<'_>, name: &str) -> Result<Result<(), &'static str>, CheckpointError> {
        let path = self.folder.path().join(name);
        if self.folder.kind_of(name)? != Some(EntryKind::File) {
            return Ok(Err("is not a regular file"));
        }
        let Some((file, meta)) = self.folder.open_file(name)? else { return Ok(Err("is gone")) };
        let record = match self.folder.read(&record_name(name), MAX_RECORD_BYTES) {
            Ok(None) => return Ok(Err("has no record")),
            Err(e) if matches!(e.kind(), ErrorKind::BadInput | ErrorKind::Refused) => None,
            read => read?.and_then(|bytes| ShardRecord::parse(&bytes)),
        };
        let record = record.filter(|record| record.plan == self.plan);
        let Some((record, ranges)) = record.as_ref().and_then(|record| Some((record, record.ranges()?))) else {
            return Ok(Err("has a damaged record"));
        };
        if meta.len() != record.n_bytes {
            return Ok(Err("does not have the recorded length"));
        }
        let mut is_same = true;
        for_each_ordered(
            ctx,
            ranges,
            |(range, _)| READ_BYTES.min(range.end - range.start),
            |(range, hash)| Ok(hash_range(ctx, &file, &path, range)?.to_hex().as_str() == *hash),
            |_, equal| {
                is_same &= equal;
                Ok::<_, CheckpointError>(())
            },
        )?;
        Ok(if is_same { Ok(()) } else { Err("does not have the recorded bytes") })
    }

    fn remove_unproven(&self) -> Result<(), CheckpointError> {
        let mut kept: BTreeSet<String> = self.proven.iter().map(|name| record_name(name)).collect();
        kept.extend(self.proven.iter().cloned());
        kept.insert(AtomicDir::PLAN_FILE.to_owned());
        for (name, kind) in self.folder.entries()? {
            let name = name.to_string_lossy();
            match kind {
                _ if kept.contains(&*name) => {}
                EntryKind::Folder => self.folder.inside(&name).remove_all()?,
                _ => self.folder.remove(&name)?,
            }
        }
        Ok(())
    }
}

/// The name of a shard's record, short enough for every file system.
fn record_name(shard: &str) -> String {
    match shard.len() {
        ..=200 => format!(".{shard}.record"),
        _ => format!(".{}.record", blake3::hash(shard.as_bytes()).to_hex()),
    }
}

/// The BLAKE3 of a run of a file.
fn hash_range(
    ctx: &Context<'_>,
    file: &File,
    path: &Path,
    range: &Range<u64>,
) -> Result<blake3::Hash, CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; READ_BYTES.min(range.end - range.start) as usize];
    let mut at = range.start;
    while at < range.end {
        ctx.check()?;
        let n = READ_BYTES.min(range.end - at) as usize;
        file.read_exact_at(&mut buffer[..n], at).map_err(|e| CheckpointError::io("read", path, e))?;
        hasher.update(&buffer[..n]);
        at += n as u64;
    }
    ctx.observer.advance(range.end - range.start);
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_shard_record_is_found() {
        let pieces = vec![Piece::new(8, blake3::hash(b"a")), Piece::new(20, blake3::hash(b"b"))];
        let record = ShardRecord { version: 1, plan: "00".to_owned(), n_bytes: 20, pieces };
        let bytes = checksummed::to_bytes(&record);
        assert_eq!(ShardRecord::parse(&bytes).as_ref(), Some(&record));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(ShardRecord::parse(&flipped), None, "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert_eq!(ShardRecord::parse(&bytes[..len]), None, "cut at {len}");
        }
    }

    #[test]
    fn pieces_that_are_not_the_whole_file_prove_nothing() {
        let with = |ends: &[u64], n_bytes| {
            let pieces = ends.iter().map(|&end| Piece(end, String::new())).collect();
            ShardRecord { version: 1, plan: String::new(), n_bytes, pieces }
        };
        assert_eq!(with(&[3, 9], 9).ranges().map(|ranges| ranges[1].0.clone()), Some(3..9));
        for (ends, n_bytes) in [(&[3, 9][..], 10), (&[9, 3], 3), (&[3, 3], 3), (&[], 5), (&[0, 4], 4)] {
            assert!(with(ends, n_bytes).ranges().is_none(), "{ends:?} of {n_bytes}");
        }
    }
}
