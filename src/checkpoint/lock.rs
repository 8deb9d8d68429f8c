//! The lock that allows one writer at a time, and the hazards of changing shared files.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{Checkpoint, CheckpointError, EntryKind, FileId, Printable, Shard, probe};

/// The exclusive right to change a checkpoint in place. Released on drop, or when the process ends for any reason.
///
/// Advisory locks on the files of all shards. No file is created, so a refused command leaves no trace, and every path
/// to the folder, a shard or a link to a shard leads to the same lock.
#[derive(Debug)]
pub struct CheckpointLock {
    files: Vec<File>,
}

impl Drop for CheckpointLock {
    fn drop(&mut self) {
        self.files.iter().for_each(unlock);
    }
}

/// Releases a lock at once. Closing the file would not, while a child process that is being started shares the
/// descriptor.
pub(super) fn unlock(file: &File) {
    let _closed_soon = flock(file, FlockOperation::Unlock);
}

/// The outcome of an attempt to lock a file.
pub(super) enum LockAttempt {
    /// The lock is ours.
    Locked,
    /// Another process holds the lock.
    Held,
    /// The file system does not support locks.
    Unsupported,
    /// The attempt failed.
    Failed(std::io::Error),
}

/// Tries to lock an open file without waiting.
pub(super) fn try_lock(file: &File) -> LockAttempt {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => LockAttempt::Locked,
        Err(Errno::WOULDBLOCK) => LockAttempt::Held,
        Err(Errno::NOSYS | Errno::OPNOTSUPP) => LockAttempt::Unsupported,
        Err(e) => LockAttempt::Failed(e.into()),
    }
}

impl CheckpointLock {
    /// Takes the lock, or fails at once.
    ///
    /// # Errors
    /// [`CheckpointError::Refused`] with the holder's name; [`CheckpointError::Io`] if the file system does not
    /// support locks.
    pub fn acquire(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let mut files = Vec::with_capacity(checkpoint.shards().len());
        let mut locked = HashSet::new();
        for shard in checkpoint.shards() {
            let file = open_to_lock(shard)?;
            let meta = file.metadata().map_err(|e| CheckpointError::io("lock", shard.path(), e))?;
            // Two names of one file share one lock.
            if !locked.insert(FileId::of(&meta)) {
                continue;
            }
            match try_lock(&file) {
                LockAttempt::Locked => files.push(file),
                LockAttempt::Held => {
                    let what = format!("{} is changing it", holder(&file));
                    return Err(CheckpointError::Refused { path: checkpoint.root().to_owned(), what });
                }
                LockAttempt::Unsupported => {
                    let e = std::io::Error::other(
                        "this file system does not support file locks, which in-place changes need",
                    );
                    return Err(CheckpointError::io("lock", shard.path(), e));
                }
                LockAttempt::Failed(e) => return Err(CheckpointError::io("lock", shard.path(), e)),
            }
        }
        Ok(Self { files })
    }

    /// Also locks a file that is about to replace a locked one, so that the checkpoint is locked at every moment.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn extend(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let file =
            File::options().read(true).write(true).open(path).map_err(|e| CheckpointError::io("lock", path, e))?;
        match try_lock(&file) {
            LockAttempt::Locked => self.files.push(file),
            LockAttempt::Held | LockAttempt::Unsupported => {
                return Err(CheckpointError::io("lock", path, io::ErrorKind::WouldBlock.into()));
            }
            LockAttempt::Failed(e) => return Err(CheckpointError::io("lock", path, e)),
        }
        Ok(())
    }
}

/// Opens a file for locking. Network file systems lock only files open for writing. Elsewhere a read-only file can be
/// locked too, and a failure to write is found later.
fn open_to_lock(shard: &Shard) -> Result<File, CheckpointError> {
    match shard.open_for_writing() {
        Err(CheckpointError::Io { source, .. })
            if matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) =>
        {
            File::open(shard.path()).map_err(|e| CheckpointError::io("lock", shard.path(), e))
        }
        opened => opened,
    }
}

/// The holder of the lock on a file, as reported by Linux.
fn holder(file: &File) -> String {
    let pid = file.metadata().ok().and_then(|meta| {
        let locks = fs::read_to_string("/proc/locks").ok()?;
        pid_of(&locks, meta.ino())
    });
    match pid {
        Some(pid) => {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({})", Printable(name.trim_end()))
        }
        None => "another process".to_owned(),
    }
}

/// The process id in a line such as `1: FLOCK  ADVISORY  WRITE 4242 fe:00:1234 0 EOF`.
fn pid_of(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (kind, pid, place) = (words.next()?, words.nth(2)?, words.next()?);
        let is_file = kind == "FLOCK" && place.rsplit(':').next()?.parse() == Ok(inode);
        is_file.then(|| pid.parse().ok()).flatten()
    })
}

/// Reasons why changing a checkpoint in place would affect others: shards that are links, have several names, or lie
/// in a Hugging Face cache. One line each.
///
/// # Errors
/// A path cannot be examined.
pub fn in_place_hazards(checkpoint: &Checkpoint) -> Result<Vec<String>, CheckpointError> {
    let mut hazards = Vec::new();
    for shard in checkpoint.shards() {
        let name = Printable(&shard.file_name()).to_string();
        if probe::entry_kind(shard.path())? == Some(EntryKind::Link) {
            hazards.push(format!("{name} is a symbolic link"));
        }
        let n_names = shard.n_names()?;
        if n_names > 1 {
            hazards.push(format!("{name} has {n_names} names (hard links)"));
        }
    }
    let real = fs::canonicalize(checkpoint.root()).map_err(|e| CheckpointError::io("examine", checkpoint.root(), e))?;
    let names: Vec<String> = real
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
            _ => None,
        })
        .collect();
    let in_cache =
        names.windows(2).any(|pair| pair[0].starts_with("models--") && (pair[1] == "snapshots" || pair[1] == "blobs"));
    if in_cache {
        hazards.push("it is in a Hugging Face cache, which other programs share".to_owned());
    }
    Ok(hazards)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(folder: &Path) -> Checkpoint {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("model.safetensors"), [&2u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
        Checkpoint::open(folder).unwrap()
    }

    #[test]
    fn a_second_writer_learns_who_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(dir.path());
        let lock = CheckpointLock::acquire(&checkpoint).unwrap();
        let error = CheckpointLock::acquire(&checkpoint).unwrap_err().to_string();
        let by_us = format!("process {} (", std::process::id());
        assert!(error.contains(&by_us) || error.contains("another process"), "{error}");
        drop(lock);
        CheckpointLock::acquire(&checkpoint).unwrap();
    }

    #[test]
    fn a_line_of_proc_locks_names_the_process() {
        let locks = "1: POSIX  ADVISORY  READ 7 fe:00:99 0 EOF\n2: FLOCK  ADVISORY  WRITE 4242 fe:00:99 0 EOF\n";
        assert_eq!(pid_of(locks, 99), Some(4242));
        assert_eq!(pid_of(locks, 98), None);
    }

    #[test]
    fn links_and_caches_are_hazards() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(in_place_hazards(&checkpoint(&dir.path().join("plain"))).unwrap(), Vec::<String>::new());
        let cached = dir.path().join("models--a--b/snapshots/123");
        let found = checkpoint(&cached);
        fs::hard_link(cached.join("model.safetensors"), dir.path().join("second")).unwrap();
        let hazards = in_place_hazards(&found).unwrap().join("; ");
        assert!(hazards.contains("2 names") && hazards.contains("Hugging Face cache"), "{hazards}");
    }
}
