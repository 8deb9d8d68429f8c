//! The limits of the machine, measured next to the program.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use neuroada_ckpt::{Checkpoint, Context, Io, internals::mask::LLAMA_PROJECTIONS};
use rayon::prelude::*;

/// The checkpoint's shards.
fn shards(checkpoint: &Path) -> Vec<PathBuf> {
    let checkpoint = Checkpoint::open(checkpoint).expect("the checkpoint opens");
    checkpoint.shards().iter().map(|shard| shard.path().to_owned()).collect()
}

/// Bytes of the tensors that `mask` reads.
pub fn target_bytes(checkpoint: &Path) -> u64 {
    let checkpoint = Checkpoint::open(checkpoint).expect("the checkpoint opens");
    let is_target = |name: &str| LLAMA_PROJECTIONS.iter().any(|projection| name.contains(projection));
    checkpoint.tensors().filter(|tensor| is_target(&tensor.info.name)).map(|tensor| tensor.info.n_bytes()).sum()
}

/// Evicts a checkpoint from the page cache.
pub fn chill(checkpoint: &Path) {
    for path in shards(checkpoint) {
        let file = File::open(path).expect("the shard opens");
        file.sync_all().expect("the shard can be synced");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("the cache takes advice");
    }
}

/// Loads a checkpoint into the page cache.
pub fn warm(checkpoint: &Path) {
    for path in shards(checkpoint) {
        io::copy(&mut File::open(path).expect("the shard opens"), &mut io::sink()).expect("the shard can be read");
        // Some systems do not actually read data that is copied to a sink.
    }
    read_mapped(checkpoint);
}

/// Reads all weights through memory maps, on all threads: the lower bound for any pass over a cached checkpoint.
pub fn read_mapped(checkpoint: &Path) -> Duration {
    let checkpoint = Checkpoint::open(checkpoint).expect("the checkpoint opens");
    let ctx = Context { io: Io::Mapped, ..Context::default() };
    let step = 4 << 20;
    let windows: Vec<_> = checkpoint
        .tensors()
        .flat_map(|tensor| {
            let n_bytes = tensor.info.n_bytes();
            (0..n_bytes).step_by(step as usize).map(move |start| (tensor, start..n_bytes.min(start + step)))
        })
        .collect();
    let began = Instant::now();
    let all = windows
        .into_par_iter()
        .map(|(tensor, range)| {
            let window = tensor.window(&ctx, range).expect("the window can be read");
            let mut all = [0u64; 32];
            for chunk in window.chunks_exact(256) {
                for (all, word) in all.iter_mut().zip(chunk.chunks_exact(8)) {
                    *all |= u64::from_le_bytes(word.try_into().expect("eight bytes"));
                }
            }
            all.iter().fold(0, |a, b| a | b)
        })
        .reduce(|| 0, |a, b| a | b);
    std::hint::black_box(all);
    began.elapsed()
}

/// Reads all shards with direct I/O, 8 MiB at a time, as `dd iflag=direct` does; `None` if the file system does not
/// support it.
pub fn read_direct(checkpoint: &Path) -> Option<Duration> {
    const BLOCK: usize = 8 << 20;
    const PAGE: usize = 4096;
    let paths = shards(checkpoint);
    let mut memory = vec![0u8; BLOCK + PAGE];
    let start = memory.as_ptr().align_offset(PAGE);
    let buffer = &mut memory[start..start + BLOCK];
    let began = Instant::now();
    for path in paths {
        let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
        let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
        let mut at = 0;
        loop {
            match file.read_at(buffer, at).ok()? {
                0 => break,
                n => at += n as u64,
            }
        }
    }
    Some(began.elapsed())
}
