//! A source that shrinks or changes while it is read gives an error, never a signal and never a result.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use neuroada_ckpt::{
    Checkpoint, Context, Dtype, ErrorKind, Existing, Failure, Io, MaskOptions, Observer, create_mask, diff_checkpoints,
    internals::checkpoint::TensorFileWriter,
};

/// Runs an action on a file after the n-th block.
struct After<'a> {
    block: u64,
    seen: AtomicU64,
    act: &'a (dyn Fn() + Sync),
}

impl Observer for After<'_> {
    fn advance(&self, _bytes: u64) {
        if self.seen.fetch_add(1, Ordering::SeqCst) == self.block {
            (self.act)();
        }
    }
}

fn write(path: &Path) -> u64 {
    let mut file = TensorFileWriter::create(path, Existing::Replace).unwrap();
    for name in ["a.q_proj.weight", "b.q_proj.weight"] {
        let id = file.add_tensor(name.to_owned(), Dtype::BF16);
        file.append(id, &[1u8; 2 * 512 * 4096]).unwrap();
        file.finish_tensor(id, vec![512, 4096]);
    }
    file.finish(&Context::default(), &BTreeMap::new()).unwrap();
    fs::metadata(path).unwrap().len()
}

#[test]
fn a_mask_of_a_shrinking_file_is_not_written() {
    for io in [Io::Mapped, Io::Direct, Io::Read] {
        for block in [0, 3, 20] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("m.safetensors");
            let n_bytes = write(&path);
            let cut = || fs::File::options().write(true).open(&path).unwrap().set_len(n_bytes / 3).unwrap();
            let observer = After { block, seen: AtomicU64::new(0), act: &cut };
            let ctx = Context { io, max_memory: 1 << 20, observer: &observer };
            let out = dir.path().join("mask.safetensors");
            let checkpoint = Checkpoint::open(&path).unwrap();
            let error = create_mask(&ctx, &checkpoint, &MaskOptions::new(2), Some((&out, Existing::Keep))).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            assert!(error.to_string().contains("shrank while being read"), "{io:?} {block}: {error}");
            assert!(!out.exists());
        }
    }
}

#[test]
fn a_window_that_loses_its_file_is_marked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    write(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tensor = checkpoint.tensor("b.q_proj.weight").unwrap();
    let ctx = Context { io: Io::Mapped, ..Context::default() };
    let window = tensor.window(&ctx, 0..tensor.info.n_bytes()).unwrap();
    tensor.shard.confirm(&window).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    // The pages are gone: without a handler, reading them would end this process.
    let sum: u64 = window.iter().map(|&byte| u64::from(byte)).sum();
    assert_eq!(sum, 0, "missing pages read as zeros");
    let error = tensor.shard.confirm(&window).unwrap_err();
    assert!(error.to_string().contains("shrank while being read"), "{error}");
    drop(window);
    assert_eq!(checkpoint.unchanged().unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn a_file_that_changes_during_a_comparison_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    write(&a);
    write(&b);
    let touch = || {
        let file = fs::File::options().write(true).open(&b).unwrap();
        file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(5)).unwrap();
    };
    let observer = After { block: 2, seen: AtomicU64::new(0), act: &touch };
    let ctx = Context { max_memory: 1 << 20, observer: &observer, ..Context::default() };
    let error = diff_checkpoints(&ctx, &Checkpoint::open(&a).unwrap(), &Checkpoint::open(&b).unwrap()).unwrap_err();
    assert!(error.to_string().contains("changed while being read"), "{error}");
}
