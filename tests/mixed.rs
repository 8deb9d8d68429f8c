//! Adapters of different kinds in one checkpoint: what one leaves the others find, whoever goes comes out whole, and work that was
//! cut short is made whole.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use neuroada_ckpt::{
    Context, Dtype, ErrorKind, Failure, KeptOriginals, MergeError, MergeInput, Observer, Recovered, VerifyOptions,
    Which,
    internals::{checkpoint::Silent, merge},
};

#[path = "support/changes.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod changes;
#[path = "support/lora.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod lora;
#[path = "support/mixture.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod mixture;
#[path = "support/stop_at.rs"]
mod stop_at;
#[path = "support/unnamed.rs"]
mod unnamed;
#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use changes::{ctx, keeping, shards, whole};
use lora::{Tensors, Workspace, read};
use mixture::{DORA, EMBEDDING, FULL, LORA, Mixture, SPARSE, in_place, to_new};
use stop_at::stop_at;
use unnamed::unnamed;
use world::{Random, tree};

const SHARD: &str = "model-00001-of-00002.safetensors";

// --- what goes leaves what stays

#[test]
fn what_is_taken_out_leaves_what_the_others_alone_would_have_made() {
    let mixture = Mixture::new();
    let (a, b) = ((SPARSE[1], 0.3), (LORA[1], -0.15));
    mixture.add(&mixture.base(), &[b], &to_new(&mixture.at("alone"), false, None)).unwrap();
    let alone = unnamed(shards(&mixture.at("alone")));
    mixture.check(&mixture.at("alone"), &[b], "alone");
    for (name, options) in [
        ("whole", whole()),
        ("hashes", in_place(Some(mixture.base()))),
        ("both", keeping(KeptOriginals::Whole, in_place(Some(mixture.base())))),
    ] {
        for (first, second) in [(a, b), (b, a)] {
            let path = mixture.copy(&mixture.base(), name);
            mixture.add(&path, &[first], &options).unwrap();
            mixture.add(&path, &[second], &options).unwrap();
            mixture.check(&path, &mixture.sorted(vec![a, b]), name);
            mixture.remove(&path, &[a.0], &options).unwrap();
            assert!(unnamed(shards(&path)) == alone, "{name}");
            assert!(mixture.verify(&path, true).unwrap().ok && mixture.verify(&path, false).unwrap().ok);
            mixture.remove(&path, &[b.0], &options).unwrap();
            assert!(tree(&path) == tree(&mixture.base()), "{name}");
            fs::remove_dir_all(path).unwrap();
        }
    }
}

#[test]
fn one_of_two_low_rank_adapters_comes_out_of_a_checkpoint_that_kept_whole_originals() {
    let mixture = Mixture::new();
    let path = mixture.work();
    let both = [(LORA[0], 1.0), (LORA[1], -0.15)];
    mixture.add(&path, &both, &whole()).unwrap();
    mixture.check(&path, &mixture.sorted(both.to_vec()), "both");
    // Neither the adapters' files nor the base are needed.
    fs::remove_dir_all(&mixture.adapters[LORA[0]].path).unwrap();
    fs::remove_dir_all(&mixture.adapters[LORA[1]].path).unwrap();
    let report = mixture.remove(&path, &[LORA[0]], &in_place(None)).unwrap();
    assert!(!report.needs_base);
    mixture.check(&path, &both[1..], "one");
    mixture.remove_all(&path, &in_place(None)).unwrap();
    assert!(tree(&path) == tree(&mixture.base()));
}

#[test]
fn ledger_and_weights_are_a_function_of_the_active_set() {
    for keep in [KeptOriginals::Hashes, KeptOriginals::Whole] {
        let mixture = Mixture::new();
        // A ledger of hashes tells the name of the base: this one has it too.
        fs::create_dir(mixture.at("elsewhere")).unwrap();
        let path = mixture.copy(&mixture.base(), "elsewhere/base");
        let base = (keep == KeptOriginals::Hashes).then(|| mixture.base());
        let mut fresh: BTreeMap<Vec<usize>, BTreeMap<PathBuf, Vec<u8>>> = BTreeMap::new();
        fresh.insert(Vec::new(), tree(&mixture.base()));
        let (mut random, mut active) = (Random(8), Vec::new());
        for _ in 0..24 {
            let i = random.below(mixture.adapters.len() as u64) as usize;
            let options = keeping(keep, in_place(base.clone()));
            if active.contains(&i) {
                active.retain(|&j| j != i);
                mixture.remove(&path, &[i], &options).unwrap();
            } else {
                active.push(i);
                active.sort_unstable();
                mixture.add(&path, &[(i, 1.0)], &options).unwrap();
            }
            let expected = fresh.entry(active.clone()).or_insert_with(|| {
                let out = mixture.at(&format!("fresh{active:?}"));
                let all: Vec<_> = active.iter().map(|&i| (i, 1.0)).collect();
                mixture.add(&mixture.base(), &all, &keeping(keep, to_new(&out, false, None))).unwrap();
                let mut fresh = tree(&out);
                // In place this program wrote no file of the folder's.
                fresh.remove(Path::new(".neuroada/files"));
                fresh
            });
            assert!(!active.is_empty() || tree(&path) == *expected, "the base's bytes");
            let (found, expected) = (unnamed(tree(&path)), unnamed(expected.clone()));
            let differing: Vec<_> = found.iter().filter(|(name, bytes)| expected.get(*name) != Some(*bytes)).collect();
            let names: Vec<_> = differing.iter().map(|(name, _)| name).collect();
            assert!(found == expected, "{keep:?} {active:?}: {names:?}");
        }
        assert!(fresh.len() > 12, "many sets were visited");
    }
}

#[test]
fn a_checkpoint_that_kept_hashes_takes_a_sparse_adapter_on_other_tensors_without_its_base() {
    let mixture = Mixture::new();
    let path = mixture.at("out");
    let embedding = (EMBEDDING, 1.0);
    let (other, same) = ((SPARSE[1], 0.3), (SPARSE[0], -1.7));
    assert!(mixture.add(&mixture.base(), &[embedding], &to_new(&path, false, None)).unwrap().needs_base);
    mixture.add(&path, &[other], &in_place(None)).unwrap();
    mixture.check(&path, &mixture.sorted(vec![embedding, other]), "other tensors");
    assert!(mixture.verify(&path, false).unwrap().ok);
    let before = tree(mixture.dir.path());
    for options in [in_place(None), whole(), to_new(&mixture.at("new"), false, None)] {
        let refused = mixture.add(&path, &[same], &options).unwrap_err();
        assert!(matches!(refused, MergeError::NeedsBase { .. }), "{refused}");
    }
    assert!(tree(mixture.dir.path()) == before);
    mixture.add(&path, &[same], &in_place(Some(mixture.base()))).unwrap();
    mixture.check(&path, &mixture.sorted(vec![embedding, other, same]), "the same tensor");
    // What is on other tensors comes out again without the base too.
    mixture.remove(&path, &[other.0], &in_place(None)).unwrap();
    mixture.check(&path, &mixture.sorted(vec![embedding, same]), "taken out");
    // Where nothing is changed as a whole any more, the ledger has what it needs.
    assert!(!mixture.remove(&path, &[EMBEDDING], &in_place(Some(mixture.base()))).unwrap().needs_base);
    mixture.remove_all(&path, &in_place(None)).unwrap();
    assert!(tree(&path) == tree(&mixture.base()));
}

#[test]
fn a_file_alone_is_merged_into_and_undone_with_adapters_of_two_kinds() {
    let workspace = Workspace::new();
    let mut random = Random(4);
    let weights: Vec<f32> = (0..77 * 13).map(|_| random.delta()).collect();
    let folder = workspace.base(Dtype::BF16, "{}", &[("m.a.weight", &[77, 13], weights)]);
    let before = tree(&folder);
    let tensors: Tensors<'_> =
        &[("m.a.lora_A.weight", &[1, 13], vec![0.5; 13]), ("m.a.lora_B.weight", &[77, 1], vec![0.25; 77])];
    world::write_adapter(&folder, &workspace.path("sparse.safetensors"), 3, &["m.a.weight"], true);
    let sparse = MergeInput { adapter: workspace.path("sparse.safetensors"), scale: None };
    let file = folder.join("model.safetensors");
    merge::merge(&ctx(), &file, &[workspace.lora("lora", r#""r":1"#, tensors), sparse], &whole()).unwrap();
    assert!(folder.join("model.safetensors.neuroada").is_dir());
    assert!(merge::verify(&ctx(), &file, &VerifyOptions::default()).unwrap().ok);
    merge::unmerge(&ctx(), &file, &Which::All, &in_place(None)).unwrap();
    assert!(tree(&folder) == before);
}

// --- arithmetic

#[test]
fn magnitudes_beside_another_adapter_add_what_they_make_of_the_original() {
    let workspace = Workspace::new();
    workspace.base(Dtype::F32, "{}", &[("a.weight", &[2, 2], vec![3.0, 3.0, 0.0, 5.0])]);
    // Alone it makes [6, 8, 0, 1] of them: it adds [3, 5, 0, -4].
    let dora: Tensors<'_> = &[
        ("a.lora_A.weight", &[1, 2], vec![0.0, 1.0]),
        ("a.lora_B.weight", &[2, 1], vec![1.0, 0.0]),
        ("a.lora_magnitude_vector", &[2], vec![10.0, 1.0]),
    ];
    let plain: Tensors<'_> =
        &[("a.lora_A.weight", &[1, 2], vec![1.0, 2.0]), ("a.lora_B.weight", &[2, 1], vec![10.0, 100.0])];
    let dora = workspace.lora("dora", r#""r":1,"lora_alpha":1,"use_dora":true"#, dora);
    let plain = workspace.lora("plain", r#""r":1,"lora_alpha":1"#, plain);
    workspace.merge(&[dora, plain], Default::default()).unwrap();
    assert_eq!(read(&workspace.path("out"))["a.weight"], [16.0, 28.0, 100.0, 201.0]);
}

#[test]
fn every_pair_of_kinds_is_the_plain_sum() {
    let mixture = Mixture::new();
    let out = mixture.at("out");
    let n = mixture.adapters.len();
    for (i, j) in (0..n).flat_map(|i| (i..n).map(move |j| (i, j))) {
        let scale = |i: usize| *mixture.adapters[i].scales.last().unwrap();
        let mut active = vec![(i, scale(i)), (j, scale(j))];
        active.dedup();
        mixture.add(&mixture.base(), &active, &to_new(&out, false, None)).unwrap();
        mixture.check(&out, &mixture.sorted(active), "a pair");
        fs::remove_dir_all(&out).unwrap();
    }
    let all: Vec<_> = (0..n).map(|i| (i, 1.0)).collect();
    mixture.add(&mixture.base(), &all, &to_new(&out, false, None)).unwrap();
    mixture.check(&out, &mixture.sorted(all), "all of them");
    assert_ne!(mixture.expected("m.f.weight", &[(DORA, 1.0)]), mixture.expected("m.f.weight", &[(LORA[1], 1.0)]));
}

// --- cut short

#[test]
fn a_resumed_merge_of_low_rank_adapters_takes_over_proven_shards() {
    use std::os::unix::fs::MetadataExt;
    let mixture = Mixture::new();
    let active = [(LORA[0], 1.0), (LORA[1], -0.15), (SPARSE[0], 0.3), (DORA, 1.0), (FULL, 1.0)];
    for keep in [KeptOriginals::Hashes, KeptOriginals::Whole] {
        let at = |name: &str| mixture.at(&format!("{name}-{keep:?}"));
        let (plain, out) = (at("plain"), at("out"));
        mixture.add(&mixture.base(), &active, &keeping(keep, to_new(&plain, false, None))).unwrap();
        let options = keeping(keep, to_new(&out, true, None));
        let merge = |observer: &dyn Observer| {
            let ctx = Context { observer, ..Context::default() };
            merge::merge(&ctx, &mixture.base(), &mixture.inputs(&active), &options)
        };
        let partial = mixture.at(&format!(".out-{keep:?}.neuroada-partial"));
        let inode = |path: PathBuf| fs::metadata(path).unwrap().ino();
        // Stopped later and later, until the first shard is whole.
        let stopped = (0..100).find(|&block| {
            merge(&stop_at("merging", block, false)).unwrap_err();
            partial.join(SHARD).exists()
        });
        assert!(stopped.is_some() && !out.exists());
        let finished = inode(partial.join(SHARD));
        let report = merge(&Silent).unwrap();
        assert!(report.notes.iter().all(|note| !note.contains("safetensors")), "{:?}", report.notes);
        assert_eq!(inode(out.join(SHARD)), finished, "{keep:?}");
        assert!(tree(&out) == tree(&plain), "{keep:?}");
    }
}

/// Panics at the first block that is patched.
#[derive(Default)]
struct Crash(AtomicBool);

impl Observer for Crash {
    fn begin(&self, what: &str, _bytes: u64) {
        self.0.store(what == "patching", Ordering::SeqCst);
    }
    fn advance(&self, _bytes: u64) {
        assert!(!self.0.load(Ordering::SeqCst), "the power failed");
    }
}

#[test]
fn recovery_refuses_another_base_and_changes_nothing_then() {
    let mixture = Mixture::new();
    let path = mixture.work();
    mixture.add(&path, &[(LORA[1], 1.0)], &in_place(Some(mixture.base()))).unwrap();
    let before = tree(&path);
    let crash = Crash::default();
    let crashing = Context { observer: &crash, ..Context::default() };
    let options = in_place(Some(mixture.base()));
    let inputs = mixture.inputs(&[(SPARSE[0], 1.0), (LORA[0], 1.0)]);
    catch_unwind(AssertUnwindSafe(|| merge::merge(&crashing, &path, &inputs, &options))).unwrap_err();
    let halfway = tree(&path);
    assert!(halfway.contains_key(Path::new(".neuroada/txn")));
    let other = mixture.other_base("other", "m.a.weight");
    let merged = mixture.at("merged");
    mixture.add(&mixture.base(), &[(FULL, 1.0)], &to_new(&merged, false, None)).unwrap();
    for base in [None, Some(other.as_path()), Some(merged.as_path()), Some(&mixture.at("absent"))] {
        merge::recover(&ctx(), &path, base).unwrap_err();
        assert!(tree(&path) == halfway, "{base:?}");
    }
    let recovered = merge::recover(&ctx(), &path, Some(&mixture.base())).unwrap();
    assert_eq!(recovered, Recovered::RolledBack);
    assert!(tree(&path) == before);
}

#[test]
fn a_change_that_was_cut_short_before_its_journal_or_after_its_commit_is_recovered() {
    let mixture = Mixture::new();
    let options = [whole(), in_place(Some(mixture.base()))];
    // What was merged, what comes or goes: positions become whole tensors, whole tensors become positions, or hashes change.
    let (sparse, lora, dora) = ((SPARSE[0], 0.3), (LORA[1], 1.0), (DORA, 1.0));
    let steps =
        [(vec![sparse], Some(lora)), (vec![sparse, lora], None), (vec![lora], Some(dora)), (vec![], Some(lora))];
    for (options, (first, added)) in options.iter().flat_map(|options| steps.iter().map(move |step| (options, step))) {
        let path = mixture.work();
        if !first.is_empty() {
            mixture.add(&path, first, options).unwrap();
        }
        let before = tree(&path);
        let change = |ctx: &Context<'_>| match added {
            Some(added) => merge::merge(ctx, &path, &mixture.inputs(&[*added]), options),
            None => {
                let which = Which::Some(vec![mixture.adapters[lora.0].id]);
                merge::unmerge(ctx, &path, &which, options)
            }
        };
        let crash = Crash::default();
        let crashing = Context { observer: &crash, ..Context::default() };
        catch_unwind(AssertUnwindSafe(|| change(&crashing))).unwrap_err();
        let halfway = tree(&path);
        let base = options.base.as_deref();
        assert_eq!(merge::recover(&ctx(), &path, base).unwrap(), Recovered::RolledBack);
        assert!(tree(&path) == before);
        change(&ctx()).unwrap();
        let after = tree(&path);
        let put = |tree: &BTreeMap<PathBuf, Vec<u8>>| {
            fs::remove_dir_all(&path).unwrap();
            for (name, bytes) in tree {
                fs::create_dir_all(path.join(name).parent().unwrap()).unwrap();
                fs::write(path.join(name), bytes).unwrap();
            }
        };
        // The journal stayed; copies that nothing needs stayed too.
        let txn = Path::new(".neuroada/txn");
        let mut committed = halfway.clone();
        committed.extend(after.clone());
        committed.remove(Path::new(".neuroada/ledger.new"));
        put(&committed);
        assert!(path.join(txn).exists());
        assert_eq!(merge::recover(&ctx(), &path, base).unwrap(), Recovered::Finished);
        assert!(tree(&path) == after, "{first:?} {added:?}");
        // The journal was not written yet.
        let mut early = halfway.clone();
        early.extend(before.clone());
        early.remove(txn);
        put(&early);
        assert!(path.join(".neuroada/ledger.new").exists());
        merge::recover(&ctx(), &path, base).unwrap();
        assert!(tree(&path) == before, "{first:?} {added:?}");
        // The new ledger is gone: nothing can put the weights back, and nothing is made worse.
        let mut lost = halfway.clone();
        lost.remove(Path::new(".neuroada/ledger.new"));
        put(&lost);
        let refused = merge::recover(&ctx(), &path, base).unwrap_err();
        assert!(refused.kind() == ErrorKind::BadInput && tree(&path) == lost, "{refused}");
        fs::remove_dir_all(&path).unwrap();
    }
}
