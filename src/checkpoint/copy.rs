//! Copies of whole files, by the cheapest means that the file system offers.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use rustix::{
    fs::{FallocateFlags, copy_file_range, fallocate, ioctl_ficlone, statvfs},
    io::Errno,
};

use super::{AtomicFile, CheckpointError, Context, Shard};

/// Bytes copied between two checks for cancellation.
const CHUNK_BYTES: usize = 8 << 20;

/// How a file may be copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CopyMode {
    /// A reflink if the file system supports it, otherwise a copy of the bytes.
    #[default]
    Auto,
    /// A hard link if the file system supports it, otherwise as [`CopyMode::Auto`]: both names refer to one file.
    Link,
}

/// How a file was copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copied {
    /// A reflink: the files share blocks until one is written.
    Reflinked,
    /// A hard link: both names refer to one file.
    Linked,
    /// A copy of the bytes.
    Bytes,
}

/// Creates `target` from `source`, with its mode, synced, if this needs no copying: as a reflink, or with
/// [`CopyMode::Link`] as a hard link. Returns `None` if neither is possible.
///
/// # Errors
/// A failure to create or sync `target`.
pub fn share_file(source: &Path, target: &Path, mode: CopyMode) -> Result<Option<Copied>, CheckpointError> {
    let from = File::open(source).map_err(|e| CheckpointError::io("read", source, e))?;
    if mode == CopyMode::Link && link(source, target)? {
        return Ok(Some(Copied::Linked));
    }
    let meta = from.metadata().map_err(|e| CheckpointError::io("read", source, e))?;
    let to = create_like(&meta, target)?;
    if ioctl_ficlone(&to, &from).is_err() {
        fs::remove_file(target).map_err(|e| CheckpointError::io("remove", target, e))?;
        return Ok(None);
    }
    to.sync_all().map_err(|e| CheckpointError::io("sync", target, e))?;
    Ok(Some(Copied::Reflinked))
}

/// Creates the hard link `target` to `source`, if the file system supports it.
fn link(source: &Path, target: &Path) -> Result<bool, CheckpointError> {
    // The path may be a symbolic link: link the file it points to.
    let real = source.canonicalize().map_err(|e| CheckpointError::io("read", source, e))?;
    match fs::hard_link(&real, target) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(CheckpointError::io("write", target, e)),
        Err(_another_file_system) => Ok(false),
    }
}

/// Copies `source` to the new file `target`, with its mode, synced.
///
/// Memory: one buffer of at most 8 MiB.
///
/// # Errors
/// A failure to read or write, or [`CheckpointError::Cancelled`]; a partial `target` may then exist.
pub fn copy_file(ctx: &Context<'_>, source: &Path, target: &Path, mode: CopyMode) -> Result<Copied, CheckpointError> {
    let read_error = |e| CheckpointError::io("read", source, e);
    let from = File::open(source).map_err(read_error)?;
    let meta = from.metadata().map_err(read_error)?;
    if mode == CopyMode::Link && link(source, target)? {
        ctx.observer.advance(meta.len());
        return Ok(Copied::Linked);
    }
    let to = create_like(&meta, target)?;
    let copied = if ioctl_ficlone(&to, &from).is_ok() {
        ctx.observer.advance(meta.len());
        Copied::Reflinked
    } else {
        copy_bytes(ctx, (&from, source), (&to, target), meta.len())?;
        Copied::Bytes
    };
    to.sync_all().map_err(|e| CheckpointError::io("sync", target, e))?;
    Ok(copied)
}

/// Replaces a shard that is a link, or has several names, by a copy of its own, atomically. Other names keep the old
/// file unchanged.
///
/// # Errors
/// As [`copy_file`]; the shard is then unchanged.
pub fn unshare(ctx: &Context<'_>, shard: &Shard) -> Result<(), CheckpointError> {
    let path = shard.path();
    let meta = shard.file().metadata().map_err(|e| CheckpointError::io("read", path, e))?;
    let copy = AtomicFile::create_unshared(path)?;
    if ioctl_ficlone(copy.file(), shard.file()).is_err() {
        copy_bytes(ctx, (shard.file(), path), (copy.file(), path), meta.len())?;
    }
    shard.unchanged()?;
    let mode = fs::Permissions::from_mode(meta.mode() & 0o777);
    copy.file().set_permissions(mode).map_err(|e| CheckpointError::io("write", path, e))?;
    copy.commit()
}

/// Creates the new file `target` with the mode of `meta`.
pub(super) fn create_like(meta: &Metadata, target: &Path) -> Result<File, CheckpointError> {
    let mode = meta.mode() & 0o777;
    let mut options = File::options();
    let created = options.read(true).write(true).create_new(true).mode(mode).open(target);
    let file = created.map_err(|e| CheckpointError::io("create", target, e))?;
    // The umask may have removed bits that the source has.
    let set = file.set_permissions(fs::Permissions::from_mode(mode));
    set.map_err(|e| CheckpointError::io("write", target, e))?;
    Ok(file)
}

/// Reserves the space of `file`, so that a full disk is noticed before hours of copying. Without support of the file
/// system, it is noticed while copying.
pub(super) fn preallocate(file: &File, path: &Path, n_bytes: u64) -> Result<(), CheckpointError> {
    if n_bytes > 0
        && let Err(e @ (Errno::NOSPC | Errno::DQUOT)) = fallocate(file, FallocateFlags::empty(), 0, n_bytes)
    {
        return Err(CheckpointError::io("write", path, e.into()));
    }
    Ok(())
}

/// Copies `n_bytes` bytes, inside the kernel if possible.
fn copy_bytes(
    ctx: &Context<'_>,
    (from, source): (&File, &Path),
    (to, target): (&File, &Path),
    n_bytes: u64,
) -> Result<(), CheckpointError> {
    preallocate(to, target, n_bytes)?;
    let shrank = |at: u64| {
        let what = format!("shrank while being read, from {n_bytes} to {at} bytes");
        CheckpointError::Changed { path: source.to_owned(), what }
    };
    let mut at = 0;
    let mut in_kernel = true;
    let mut buffer = Vec::new();
    while at < n_bytes {
        ctx.check()?;
        let chunk = CHUNK_BYTES.min((n_bytes - at) as usize);
        let done = if in_kernel {
            let (mut read_at, mut write_at) = (at, at);
            match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), chunk) {
                Ok(0) => return Err(shrank(at)),
                Ok(done) => done,
                Err(Errno::INTR) => continue,
                Err(Errno::NOSPC | Errno::DQUOT) => {
                    return Err(CheckpointError::io("write", target, io::ErrorKind::StorageFull.into()));
                }
                // Not supported by these file systems or this kernel.
                Err(_) => {
                    in_kernel = false;
                    continue;
                }
            }
        } else {
            buffer.resize(chunk, 0);
            from.read_exact_at(&mut buffer, at).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => shrank(at),
                _ => CheckpointError::io("read", source, e),
            })?;
            to.write_all_at(&buffer, at).map_err(|e| CheckpointError::io("write", target, e))?;
            chunk
        };
        at += done as u64;
        ctx.observer.advance(done as u64);
    }
    Ok(())
}

/// Fails if the file system of `folder` has less than `needed` bytes available.
///
/// # Errors
/// [`CheckpointError::NoSpace`] with both numbers.
pub fn check_free_space(folder: &Path, needed: u64) -> Result<(), CheckpointError> {
    let stat = statvfs(folder).map_err(|e| CheckpointError::io("determine the free space of", folder, e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < needed { Err(CheckpointError::NoSpace { path: folder.to_owned(), needed, free }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_bytes_and_mode_and_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a"), dir.path().join("b"));
        let bytes: Vec<u8> = (0..CHUNK_BYTES + 12345).map(|i| (i * 7) as u8).collect();
        fs::write(&source, &bytes).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o640)).unwrap();
        let ctx = Context::default();
        assert_ne!(copy_file(&ctx, &source, &target, CopyMode::Auto).unwrap(), Copied::Linked);
        assert_eq!(fs::read(&target).unwrap(), bytes);
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o640);
        for mode in [CopyMode::Auto, CopyMode::Link] {
            assert!(copy_file(&ctx, &source, &target, mode).is_err());
        }
        let linked = dir.path().join("c");
        assert_eq!(copy_file(&ctx, &source, &linked, CopyMode::Link).unwrap(), Copied::Linked);
        assert_eq!(fs::metadata(&linked).unwrap().ino(), fs::metadata(&source).unwrap().ino());
    }

    #[test]
    fn missing_space_is_reported_in_bytes() {
        let error = check_free_space(Path::new("."), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("needs 18446744073709551615 bytes, the file system has "), "{error}");
    }
}
