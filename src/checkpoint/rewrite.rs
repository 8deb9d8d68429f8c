//! Copies a shard with edits: every byte is read once and written once.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use super::{
    CheckpointError, Context, Io, Shard,
    copy::{create_like, preallocate},
    direct::{self, DirectBytes},
    read_and_map_ordered,
    scan::readers_for,
};

/// Shorter runs of pages are written through the page cache.
const MIN_DIRECT: usize = 64 << 10;

/// Copies `source` to the new file `target`, with its mode, synced: first the JSON `header`, which may differ from the
/// source's, then the tensor data piece by piece. Each of `pieces` is a range of the source; `edit` may change its
/// bytes before they are written, and its result goes to `sink` in the pieces' order.
///
/// `held` is the maximum number of bytes that `edit` allocates per piece beyond the piece itself: scratch memory and
/// the result. Pieces ascend and cover the data. Uncached data is read with direct I/O, and everything is written with
/// direct I/O if the file system supports it (with a header of another length, if the difference is whole pages).
/// Reading, editing and writing overlap. Memory: the header, plus the pieces with their `held` bytes, within
/// [`Context::pass_bytes`].
///
/// # Errors
/// Errors of `edit` or `sink`; a failure to read or write; [`CheckpointError::Changed`] if the source changed in the
/// meantime; [`CheckpointError::Cancelled`]. A partial `target` may then exist.
///
/// # Panics
/// If the pieces leave a gap.
pub fn rewrite_shard<T, R, E>(
    ctx: &Context<'_>,
    source: &Shard,
    (target, header): (&Path, &[u8]),
    pieces: impl IntoIterator<Item = (Range<u64>, T), IntoIter: Send>,
    held: impl Fn(&T) -> u64 + Sync,
    edit: impl Fn(&T, &mut [u8]) -> Result<R, E> + Sync,
    mut sink: impl FnMut(T, R) -> Result<(), E>,
) -> Result<(), E>
where
    T: Send,
    R: Send,
    E: From<CheckpointError> + Send,
{
    let meta = source.file().metadata().map_err(|e| CheckpointError::io("read", source.path(), e))?;
    let file = create_like(&meta, target)?;
    let data = source.header().data_start()..source.file_bytes();
    let prefix = [&(header.len() as u64).to_le_bytes(), header].concat();
    let new_start = prefix.len() as u64;
    preallocate(&file, target, new_start + data.end - data.start)?;
    file.write_all_at(&prefix, 0).map_err(|e| CheckpointError::io("write", target, e))?;
    ctx.observer.advance(data.start);
    let writer = Writer::new(ctx, &file, target);
    let tensors = source.header().tensors().iter().map(|info| (source, info));
    let mut n_written = data.start;
    read_and_map_ordered(
        ctx,
        pieces,
        |(range, tag)| range.end - range.start + direct::SLACK + held(tag),
        readers_for(ctx, tensors),
        |(range, _)| Ok(source.read_copy(ctx, range.clone())?),
        |(range, tag), mut bytes| {
            let result = edit(tag, bytes.as_mut())?;
            writer.write(&bytes, new_start + (range.start - data.start))?;
            ctx.observer.advance(range.end - range.start);
            Ok(result)
        },
        |(range, tag), result| {
            assert_eq!(range.start, n_written, "pieces leave no gap");
            n_written = range.end;
            sink(tag, result)
        },
    )?;
    assert_eq!(n_written, data.end, "pieces leave no gap");
    source.unchanged()?;
    // Not retried on failure: the system may have dropped the pages and would then report success.
    Ok(file.sync_all().map_err(|e| CheckpointError::io("sync", target, e))?)
}

/// Splits a range of a file into pieces of about one window, at page boundaries.
pub fn windows(ctx: &Context<'_>, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + Send + use<> {
    let step = ctx.window_bytes();
    let mut start = range.start;
    std::iter::from_fn(move || {
        let piece = start..range.end.min((start / step + 1) * step);
        start = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Writes pieces from any thread: whole pages with direct I/O, shared pages at the edges through the page cache.
struct Writer<'a> {
    file: &'a File,
    path: &'a Path,
    /// The file reopened for direct writes, if supported.
    direct: Option<File>,
    /// Set if the file system refused a direct write.
    refused: AtomicBool,
}

impl<'a> Writer<'a> {
    fn new(ctx: &Context<'_>, file: &'a File, path: &'a Path) -> Self {
        let direct = match ctx.io {
            Io::Auto | Io::Direct => direct::open_for_writing(path, file),
            Io::Mapped | Io::Read => None,
        };
        Self { file, path, direct, refused: AtomicBool::new(false) }
    }

    fn write(&self, bytes: &DirectBytes, offset: u64) -> Result<(), CheckpointError> {
        let error = |e| CheckpointError::io("write", self.path, e);
        let pages = bytes.whole_pages();
        if let Some(direct) = self.direct.as_ref().filter(|_| pages.len() >= MIN_DIRECT && !self.refused.load(Relaxed))
        {
            match direct.write_all_at(&bytes[pages.clone()], offset + pages.start as u64) {
                Ok(()) => {
                    self.file.write_all_at(&bytes[..pages.start], offset).map_err(error)?;
                    return self.file.write_all_at(&bytes[pages.end..], offset + pages.end as u64).map_err(error);
                }
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => self.refused.store(true, Relaxed),
                Err(e) => return Err(error(e)),
            }
        }
        self.file.write_all_at(bytes, offset).map_err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::{Existing, TensorFileWriter},
        tensor::Dtype,
    };

    #[test]
    fn pieces_of_any_size_are_copied_and_edited() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let path = dir.path().join("t.safetensors");
        let mut writer = TensorFileWriter::create(&path, Existing::Keep).unwrap();
        let id = writer.add_tensor("t".to_owned(), Dtype::U8);
        let data: Vec<u8> = (0..3_000_001u32).map(|i| (i * 31 % 251) as u8).collect();
        writer.append(id, &data).unwrap();
        writer.finish_tensor(id, vec![data.len() as u64]);
        writer.finish(&Context::default(), &Default::default()).unwrap();
        let shard = Shard::open(&path).unwrap();
        let (start, n) = (shard.header().data_start(), shard.file_bytes());
        let header = shard.header_json().unwrap();
        for (io, longer) in [(Io::Auto, 0), (Io::Direct, 4096), (Io::Direct, 7), (Io::Mapped, 7), (Io::Read, 0)] {
            let ctx = Context { io, max_memory: 1 << 20, ..Context::default() };
            // Pieces that end on pages, next to them, within one, and at arbitrary offsets.
            let cuts = [start, 4096, 4096 * 40, 4096 * 80 + 1, 4096 * 80 + 2, 1_000_003, 1_000_004, 2_500_000, n];
            let mut pieces: Vec<(Range<u64>, u8)> = cuts.windows(2).map(|cut| (cut[0]..cut[1], 0)).collect();
            pieces[3].1 = 9;
            pieces[7].1 = 7;
            let mut expected = std::fs::read(&path).unwrap();
            for (range, tag) in &pieces {
                expected[range.start as usize] ^= tag;
                expected[range.end as usize - 1] ^= tag;
            }
            let header = [&header[..], &vec![b' '; longer]].concat();
            expected.splice(..start as usize, [&(header.len() as u64).to_le_bytes()[..], &header].concat());
            let target = dir.path().join(format!("{io:?} {longer}"));
            let edit = |tag: &u8, bytes: &mut [u8]| {
                bytes[0] ^= tag;
                *bytes.last_mut().unwrap() ^= tag;
                Ok::<_, CheckpointError>(bytes.len() as u64)
            };
            let mut n_seen = 0;
            let sink = |_, n_bytes: u64| {
                n_seen += n_bytes;
                Ok(())
            };
            rewrite_shard(&ctx, &shard, (&target, &header), pieces, |_| 0, edit, sink).unwrap();
            assert_eq!(n_seen, n - start);
            assert!(std::fs::read(&target).unwrap() == expected, "{io:?} {longer}");
        }
    }

    #[test]
    fn windows_end_on_multiples_of_their_size() {
        let ctx = Context { max_memory: 0, ..Context::default() };
        let step = ctx.window_bytes();
        let pieces: Vec<_> = windows(&ctx, 100..2 * step + 5).collect();
        assert_eq!(pieces, [100..step, step..2 * step, 2 * step..2 * step + 5]);
        assert_eq!(windows(&ctx, 7..7).count(), 0);
    }
}
