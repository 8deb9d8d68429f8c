//! `merge` with `resume`: shards of a run that was cut short are taken over where they are proven, and made again where not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    AdapterNotes, Checkpoint, Context, Dtype, Existing, MergeError, MergeInput, MergeOptions, MergeOutput, MergeReport,
    Observer, RowColumns,
    internals::{
        adapter::AdapterWriter,
        checkpoint::{Silent, gather_rows},
        mask::{BaseInfo, Recipe},
        merge,
        tensor::RowLayout,
    },
};

#[path = "support/stop_at.rs"]
mod stop_at;
#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use stop_at::stop_at;
use world::{World, tree};

const SHARD: &str = "model-00001-of-00002.safetensors";

/// A world, what an undisturbed merge of its first adapter makes, and a merge of it that stopped in the second shard.
struct Stopped {
    world: World,
    expected: BTreeMap<PathBuf, Vec<u8>>,
}

impl Stopped {
    fn new() -> Self {
        let world = World::new();
        let options = MergeOptions::new_checkpoint(world.at("expected"));
        merge::merge(&Context::default(), &world.base(), &[world.input(0)], &options).unwrap();
        let expected = tree(&world.at("expected"));
        let stopped = Self { world, expected };
        stopped.stop(0);
        stopped
    }
    fn out(&self) -> PathBuf {
        self.world.at("out")
    }
    fn partial(&self) -> PathBuf {
        self.world.at(".out.neuroada-partial")
    }
    fn shard(&self) -> PathBuf {
        self.partial().join(SHARD)
    }
    fn record(&self) -> PathBuf {
        self.partial().join(format!(".{SHARD}.record"))
    }

    fn merge(&self, adapter: usize, observer: &dyn Observer) -> Result<MergeReport, MergeError> {
        let options = resumable(&self.out(), false);
        let ctx = Context { observer, ..Context::default() };
        merge::merge(&ctx, &self.world.base(), &[self.world.input(adapter)], &options)
    }

    /// Stopped later and later, until it is in the second shard.
    fn stop(&self, adapter: usize) {
        let stopped = (0..).find(|&block| {
            self.merge(adapter, &stop_at("merging", block, false)).unwrap_err();
            self.shard().exists()
        });
        assert!(stopped > Some(0), "pieces of the first shard come first");
        assert!(!self.out().exists() && !self.partial().join("model-00002-of-00002.safetensors").exists());
    }

    /// Goes on; what comes out is what would have come out without a stop. Returns the notes.
    #[track_caller]
    fn go_on(&self) -> Vec<String> {
        let report = self.merge(0, &Silent).unwrap();
        assert!(tree(&self.out()) == self.expected && !self.partial().exists());
        report.notes
    }
}

fn inode(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().ino()
}

#[test]
fn a_resumed_merge_takes_over_finished_shards_of_the_same_plan_alone() {
    let stopped = Stopped::new();
    let finished = inode(&stopped.shard());
    assert!(stopped.go_on().is_empty());
    assert_eq!(inode(&stopped.out().join(SHARD)), finished);

    // Another adapter is another plan: nothing of the first is taken over.
    fs::remove_dir_all(stopped.out()).unwrap();
    stopped.stop(3);
    assert!(stopped.go_on().is_empty());
}

/// Changes what a stopped merge left, goes on, and compares the words about the first shard.
#[track_caller]
fn assert_made_anew(expected: &str, disturb: impl FnOnce(&Stopped)) {
    let stopped = Stopped::new();
    disturb(&stopped);
    let notes = stopped.go_on();
    assert!(notes.len() == 1 && notes[0].contains(expected) && notes[0].starts_with(SHARD), "{expected}: {notes:?}");
}

#[test]
fn a_shard_with_a_flipped_byte_is_made_anew() {
    for part in 0..4 {
        assert_made_anew("does not have the recorded bytes", |stopped| {
            let mut bytes = fs::read(stopped.shard()).unwrap();
            let at = (bytes.len() - 1) * part / 3;
            bytes[at] ^= 1;
            fs::write(stopped.shard(), bytes).unwrap();
        });
    }
}

#[test]
fn a_shard_cut_short_or_grown_is_made_anew() {
    for change in [-1i64, 1, i64::MIN] {
        assert_made_anew("does not have the recorded length", |stopped| {
            let file = fs::File::options().write(true).open(stopped.shard()).unwrap();
            file.set_len(file.metadata().unwrap().len().saturating_add_signed(change)).unwrap();
        });
    }
}

#[test]
fn a_shard_without_a_sound_record_is_made_anew() {
    assert_made_anew("has no record", |stopped| fs::remove_file(stopped.record()).unwrap());
    assert_made_anew("has a damaged record", |stopped| {
        let mut bytes = fs::read(stopped.record()).unwrap();
        bytes[20] ^= 1;
        fs::write(stopped.record(), bytes).unwrap();
    });
    assert_made_anew("has a damaged record", |stopped| fs::write(stopped.record(), b"").unwrap());
}

#[test]
fn a_record_without_its_shard_is_dropped() {
    // As a kill between the two leaves it.
    let stopped = Stopped::new();
    fs::rename(stopped.shard(), stopped.shard().with_extension("part")).unwrap();
    assert!(stopped.go_on().is_empty());
}

#[test]
fn a_link_in_the_place_of_a_shard_is_not_followed() {
    let stopped = Stopped::new();
    let elsewhere = stopped.world.at("elsewhere");
    fs::rename(stopped.shard(), &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, stopped.shard()).unwrap();
    stopped.go_on();
    assert!(stopped.out().join(SHARD).symlink_metadata().unwrap().is_file());
    assert!(elsewhere.exists(), "what the link led to stays");
}

#[test]
fn what_else_lies_in_the_partial_folder_does_not_come_along() {
    let stopped = Stopped::new();
    let partial = stopped.partial();
    for name in ["extra.safetensors", "model.part", ".neuroada-aaaaaa.tmp", ".neuroada/adapters/other", "folder/file"] {
        fs::create_dir_all(partial.join(name).parent().unwrap()).unwrap();
        fs::write(partial.join(name), b"left behind").unwrap();
    }
    assert!(stopped.go_on().is_empty());
}

fn resumable(path: &Path, link: bool) -> MergeOptions<'static> {
    let output = MergeOutput::New { path: path.to_owned(), existing: Existing::Keep, ledger: true, link, resume: true };
    MergeOptions::to(output)
}

#[test]
fn shards_patched_after_they_were_copied_are_recorded_too() {
    let world = World::new();
    // Each of the two shards has a tensor whose rows are stored as columns.
    let adapter = world.at("transposed.safetensors");
    write_transposed(&world.base(), &adapter, &["w.F32", "w.BF16"]);
    let input = MergeInput { adapter, scale: None };
    let merge = |out: &Path, observer: &dyn Observer, options: &MergeOptions<'_>| {
        let ctx = Context { observer, ..Context::default() };
        merge::merge(&ctx, &world.base(), std::slice::from_ref(&input), options).map(|_| tree(out))
    };
    let plain = world.at("plain");
    let expected = merge(&plain, &Silent, &MergeOptions::new_checkpoint(&plain)).unwrap();
    let (out, partial) = (world.at("out"), world.at(".out.neuroada-partial"));
    let options = resumable(&out, false);
    let mut named = BTreeSet::new();
    for block in 0.. {
        if merge(&out, &stop_at("patching", block, false), &options).is_ok() {
            break;
        }
        if partial.join(SHARD).exists() {
            named.insert(inode(&partial.join(SHARD)));
        }
    }
    assert_eq!(named.len(), 1, "the first shard was taken over, whatever stopped afterwards");
    assert!(named.contains(&inode(&out.join(SHARD))) && tree(&out) == expected);
}

#[test]
fn linked_shards_are_linked_again() {
    let world = World::new();
    let (out, plain) = (world.at("out"), world.at("plain"));
    let merge = |observer: &dyn Observer, options: &MergeOptions<'_>| {
        let ctx = Context { observer, ..Context::default() };
        merge::merge(&ctx, &world.base(), &[world.input(2)], options)
    };
    merge(&Silent, &MergeOptions::new_checkpoint(&plain)).unwrap();
    let options = resumable(&out, true);
    merge(&stop_at("merging", 0, false), &options).unwrap_err();
    assert!(merge(&Silent, &options).unwrap().notes.is_empty());
    assert!(tree(&out) == tree(&plain));
    assert_eq!(inode(&out.join(SHARD)), inode(&world.base().join(SHARD)));
}

/// An adapter of one delta on each column of some tensors.
fn write_transposed(base: &Path, path: &Path, names: &[&str]) {
    let (base, ctx) = (Checkpoint::open(base).unwrap(), Context::default());
    let mut writer = AdapterWriter::create(path, Existing::Keep, Dtype::F32).unwrap();
    for name in names {
        let tensor = base.tensor(name).unwrap();
        let layout = RowLayout::new(&tensor.info.shape, true).unwrap();
        let columns = RowColumns::uniform(vec![7; layout.n_rows() as usize], 1);
        let values = gather_rows(&ctx, tensor, layout, 0, &columns).unwrap();
        writer.begin_target(name, tensor.info.dtype, &tensor.info.shape, true, Some(1)).unwrap();
        writer.push_rows(&columns, &vec![0.25; columns.nnz()], &values).unwrap();
        writer.end_target(None);
    }
    writer.finish(&ctx, 1.0, &Recipe::custom(), &BaseInfo::of(&base), &AdapterNotes::default()).unwrap();
}
