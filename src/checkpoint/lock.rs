//! One writer at a time, and files that others see too.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::Component,
};

use rustix::fs::{FlockOperation, flock};

use super::{Checkpoint, CheckpointError, Printable};

/// The right to change a checkpoint in place; given back when dropped, or when the process ends, however it ends.
///
/// An advisory lock on the first shard's file: nothing is created, so a refused command leaves no trace.
#[derive(Debug)]
pub struct CheckpointLock {
    file: File,
}

impl Drop for CheckpointLock {
    fn drop(&mut self) {
        unlock(&self.file);
    }
}

/// Gives a lock back at once. Closing the file would not, as long as a child process that is just being started shares it.
pub(super) fn unlock(file: &File) {
    let _closed_soon = flock(file, FlockOperation::Unlock);
}

impl CheckpointLock {
    /// Takes the lock, or fails at once.
    ///
    /// # Errors
    /// [`CheckpointError::Refused`] naming who holds it.
    pub fn acquire(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let shard = checkpoint.shards().first().expect("a checkpoint has a shard");
        // Network file systems lock only what is open for writing.
        let file = File::options()
            .read(true)
            .write(true)
            .open(shard.path())
            .map_err(|e| CheckpointError::io("open for writing", shard.path(), e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { file }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what = format!("{} is changing it", holder(&file));
                Err(CheckpointError::Refused { path: checkpoint.root().to_owned(), what })
            }
            Err(e) => Err(CheckpointError::io("lock", shard.path(), e.into())),
        }
    }
}

/// Who holds the lock on a file, as Linux tells it.
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

/// The process in a line such as `1: FLOCK  ADVISORY  WRITE 4242 fe:00:1234 0 EOF`.
fn pid_of(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (kind, pid, place) = (words.next()?, words.nth(2)?, words.next()?);
        let is_file = kind == "FLOCK" && place.rsplit(':').next()?.parse() == Ok(inode);
        is_file.then(|| pid.parse().ok()).flatten()
    })
}

/// Why changing a checkpoint in place would change what others see: shards that are links, that have several names, or
/// that lie in a Hugging Face cache. One line each.
pub fn in_place_hazards(checkpoint: &Checkpoint) -> Vec<String> {
    let mut hazards = Vec::new();
    for shard in checkpoint.shards() {
        let name = Printable(&shard.file_name()).to_string();
        let is_link = shard.path().symlink_metadata().is_ok_and(|meta| meta.is_symlink());
        if is_link {
            hazards.push(format!("{name} is a symbolic link"));
        }
        match shard.file().metadata() {
            Ok(meta) if meta.nlink() > 1 => hazards.push(format!("{name} has {} names (hard links)", meta.nlink())),
            _ => {}
        }
    }
    let real = checkpoint.root().canonicalize().unwrap_or_else(|_| checkpoint.root().to_owned());
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
        hazards.push("it lies in a Hugging Face cache, which other programs share".to_owned());
    }
    hazards
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn checkpoint(folder: &Path) -> Checkpoint {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("model.safetensors"), [&2u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
        Checkpoint::open(folder).unwrap()
    }

    #[test]
    fn a_second_writer_is_told_who_the_first_is() {
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
        assert_eq!(in_place_hazards(&checkpoint(&dir.path().join("plain"))), Vec::<String>::new());
        let cached = dir.path().join("models--a--b/snapshots/123");
        let found = checkpoint(&cached);
        fs::hard_link(cached.join("model.safetensors"), dir.path().join("second")).unwrap();
        let hazards = in_place_hazards(&found).join("; ");
        assert!(hazards.contains("2 names") && hazards.contains("Hugging Face cache"), "{hazards}");
    }
}
