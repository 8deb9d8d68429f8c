//! What a merged checkpoint says of its merges without its ledger, and that taking adapters out leaves no trace of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    Checkpoint, Context, Existing, Failure, MergeError, MergeOptions, MergeOutput, Recovered, VerifyOptions, Which,
    internals::{checkpoint::MERGED_KEY, merge},
};

#[path = "support/stop_at.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod stop_at;
#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use stop_at::stop_at;
use world::{World, tree, whole_tree};

const INDEX: &str = "model.safetensors.index.json";

fn ctx() -> Context<'static> {
    Context::default()
}

fn add(world: &World, path: &Path, adapter: usize, options: &MergeOptions<'_>) -> Result<(), MergeError> {
    merge::merge(&ctx(), path, &[world.input(adapter)], &allowing(options)).map(|_| ())
}

/// The world's weights have every bit pattern.
fn allowing<'a>(options: &MergeOptions<'a>) -> MergeOptions<'a> {
    MergeOptions { allow_overflow: true, ..options.clone() }
}

fn new(path: &Path) -> MergeOptions<'static> {
    MergeOptions::new_checkpoint(path)
}

fn take_out(world: &World, path: &Path, adapter: usize, options: &MergeOptions<'_>) {
    merge::unmerge(&ctx(), path, &Which::Some(vec![world.ids[adapter]]), options).unwrap();
}

/// Ids that each shard's header names, and those that the index names.
fn named(path: &Path) -> (Vec<Vec<String>>, Vec<String>) {
    let ids = |value: Option<&str>| -> Vec<String> {
        let Some(value) = value else { return Vec::new() };
        let document: serde_json::Value = serde_json::from_str(value).unwrap();
        let adapters = document["adapters"].as_array().unwrap();
        adapters.iter().map(|adapter| adapter["id"].as_str().unwrap().to_owned()).collect()
    };
    let checkpoint = Checkpoint::open(path).unwrap();
    let of_shard = |shard: &neuroada_ckpt::internals::checkpoint::Shard| {
        ids(shard.header().metadata().get(MERGED_KEY).map(String::as_str))
    };
    let headers = checkpoint.shards().iter().map(of_shard).collect();
    let index: serde_json::Value = match fs::read(path.join(INDEX)) {
        Ok(json) => serde_json::from_slice(&json).unwrap(),
        Err(_) => serde_json::Value::Null,
    };
    (headers, ids(index["metadata"][MERGED_KEY].as_str()))
}

fn id(world: &World, adapter: usize) -> String {
    world.ids[adapter].to_string()
}

fn without_ledger(path: &Path) -> PathBuf {
    fs::remove_dir_all(path.join(".neuroada")).unwrap();
    path.to_owned()
}

#[test]
fn headers_of_a_new_checkpoint_name_the_adapters_that_changed_the_shard() {
    let world = World::new();
    let out = world.at("out");
    // The third is on one tensor, of the second shard.
    add(&world, &world.base(), 2, &new(&out)).unwrap();
    assert_eq!(named(&out), (vec![vec![], vec![id(&world, 2)]], vec![]));
    let first = "model-00001-of-00002.safetensors";
    assert_eq!(fs::read(out.join(first)).unwrap(), fs::read(world.base().join(first)).unwrap());
    let report =
        merge::verify(&ctx(), &out, &VerifyOptions { base: Some(world.base()), ..Default::default() }).unwrap();
    assert!(report.ok, "{:?}", report.problems);

    let both = world.at("both");
    add(&world, &out, 0, &new(&both)).unwrap();
    let mut ids = vec![id(&world, 0), id(&world, 2)];
    ids.sort();
    assert_eq!(named(&both), (vec![vec![id(&world, 0)], ids], vec![]));
}

#[test]
fn merging_twice_is_refused_without_a_ledger_too() {
    let world = World::new();
    for in_place in [false, true] {
        let path = match in_place {
            true => world.copy_base("in_place"),
            false => world.at("out"),
        };
        let options = if in_place { MergeOptions::in_place() } else { new(&path) };
        let from = if in_place { path.clone() } else { world.base() };
        add(&world, &from, 0, &options).unwrap();
        let path = without_ledger(&path);
        let before = whole_tree(&path);
        for options in [MergeOptions::in_place(), new(&world.at("again"))] {
            match add(&world, &path, 0, &options) {
                Err(MergeError::MergedBefore { id, .. }) => assert_eq!(id, world.ids[0]),
                other => panic!("in place {in_place}: {other:?}"),
            }
        }
        assert!(whole_tree(&path) == before && !world.at("again").exists());
        // Another one is not, and it does not hide the first.
        let next = world.at(if in_place { "next_in_place" } else { "next" });
        merge_unchecked(&world, &path, &next);
        let next = without_ledger(&next);
        assert!(matches!(add(&world, &next, 0, &new(&world.at("again"))), Err(MergeError::MergedBefore { .. })));
    }
}

/// Merges an adapter that fits the checkpoint as it is.
fn merge_unchecked(world: &World, path: &Path, output: &Path) {
    let adapter = world.at("of_merged.safetensors");
    _ = fs::remove_file(&adapter);
    world::write_adapter(path, &adapter, 99, &["w.BF16", "w.F32"], true);
    let input = merge::MergeInput { adapter, scale: None };
    merge::merge(&ctx(), path, &[input], &allowing(&new(output))).unwrap();
}

#[test]
fn taking_adapters_out_leaves_no_trace_wherever_they_were_merged() {
    let world = World::new();
    let base = whole_tree(&world.base());
    // Out of place, then in place; taken out in both orders, the last one both in place and out of place.
    for order in [[0, 3], [3, 0]] {
        for out_at_last in [false, true] {
            let path = world.at("work");
            add(&world, &world.base(), 0, &new(&path)).unwrap();
            add(&world, &path, 3, &MergeOptions::in_place()).unwrap();
            let (headers, index) = named(&path);
            assert_eq!((headers, index), (vec![vec![id(&world, 0)]; 2], vec![id(&world, 3)]));
            take_out(&world, &path, order[0], &MergeOptions::in_place());
            let left = match order[0] {
                0 => (vec![vec![]; 2], vec![id(&world, 3)]),
                _ => (vec![vec![id(&world, 0)]; 2], vec![]),
            };
            assert_eq!(named(&path), left, "{order:?}");
            let report =
                merge::verify(&ctx(), &path, &VerifyOptions { base: Some(world.base()), ..Default::default() })
                    .unwrap();
            assert!(report.ok, "{order:?}: {:?}", report.problems);
            let end = if out_at_last { world.at("end") } else { path.clone() };
            let options = if out_at_last { new(&end) } else { MergeOptions::in_place() };
            take_out(&world, &path, order[1], &options);
            assert!(whole_tree(&end) == base, "{order:?} {out_at_last}");
            fs::remove_dir_all(&path).unwrap();
            _ = fs::remove_dir_all(world.at("end"));
        }
    }
}

#[test]
fn a_new_checkpoint_of_one_merged_in_place_names_adapters_in_headers_alone() {
    let world = World::new();
    let path = world.copy_base("work");
    add(&world, &path, 0, &MergeOptions::in_place()).unwrap();
    let (out, direct) = (world.at("out"), world.at("direct"));
    add(&world, &path, 3, &new(&out)).unwrap();
    merge::merge(&ctx(), &world.base(), &[world.input(0), world.input(3)], &allowing(&new(&direct))).unwrap();
    assert!(tree(&out) == tree(&direct));
}

#[test]
fn without_a_ledger_nothing_is_named() {
    let world = World::new();
    let path = world.at("out");
    let output =
        MergeOutput::New { path: path.clone(), existing: Existing::Keep, ledger: false, link: false, resume: false };
    add(&world, &world.base(), 0, &MergeOptions::to(output)).unwrap();
    assert_eq!(named(&path), (vec![vec![]; 2], vec![]));
}

#[test]
fn a_header_that_stayed_behind_is_restored_by_recover_or_the_next_change() {
    let world = World::new();
    let base = whole_tree(&world.base());
    for next in ["recover", "merge"] {
        let path = world.at("work");
        add(&world, &world.base(), 0, &new(&path)).unwrap();
        // The change is committed; then it is cut short.
        let observer = stop_at("restoring headers", 0, false);
        let ctx_stopping = Context { observer: &observer, ..Context::default() };
        match merge::unmerge(&ctx_stopping, &path, &Which::All, &MergeOptions::in_place()) {
            Err(MergeError::Checkpoint(e)) => assert!(e.is_committed(), "{e}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(named(&path).0, vec![vec![id(&world, 0)]; 2]);
        match next {
            "recover" => assert_eq!(merge::recover(&ctx(), &path, None).unwrap(), Recovered::Finished),
            _ => {
                add(&world, &path, 0, &MergeOptions::in_place()).unwrap();
                merge::unmerge(&ctx(), &path, &Which::All, &MergeOptions::in_place()).unwrap();
            }
        }
        assert!(whole_tree(&path) == base, "{next}");
        fs::remove_dir_all(&path).unwrap();
    }
}

#[test]
fn a_single_file_merged_in_place_has_its_ledger_alone() {
    let world = World::new();
    let file = world.at("one.safetensors");
    fs::copy(world.base().join("model-00002-of-00002.safetensors"), &file).unwrap();
    let before = fs::read(&file).unwrap();
    add(&world, &file, 2, &MergeOptions::in_place()).unwrap();
    let header = |bytes: &[u8]| bytes[..8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize].to_vec();
    assert_eq!(header(&fs::read(&file).unwrap()), header(&before));
    // A new file names it, is renamed with its ledger, and forgets.
    let out = world.at("out.safetensors");
    merge::unmerge(&ctx(), &file, &Which::All, &MergeOptions::in_place()).unwrap();
    add(&world, &file, 2, &new(&out)).unwrap();
    assert_ne!(header(&fs::read(&out).unwrap()), header(&before));
    let renamed = world.at("renamed.safetensors");
    fs::rename(&out, &renamed).unwrap();
    fs::rename(world.at("out.safetensors.neuroada"), world.at("renamed.safetensors.neuroada")).unwrap();
    merge::unmerge(&ctx(), &renamed, &Which::All, &MergeOptions::in_place()).unwrap();
    assert!(fs::read(&renamed).unwrap() == before);
}
