//! Merging, unmerging and proving, on small checkpoints made here and on results of other implementations.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    Adapter, AdapterNotes, Checkpoint, Context, Dtype, ErrorKind, Existing, Failure, MergeError, MergeInput,
    MergeOptions, MergeOutput, Observer, Recovered, RowColumns, VerifyOptions, Which,
    internals::{
        adapter::AdapterWriter,
        checkpoint::{Shard, TensorFileWriter},
        mask::{BaseInfo, Recipe},
        merge,
    },
};

#[path = "support/stop_at.rs"]
mod stop_at;
#[path = "support/unnamed.rs"]
mod unnamed;
#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use stop_at::stop_at;
use unnamed::unnamed;
use world::{Random, World, tree, values_at};

fn merge_new(world: &World, which: &[usize], name: &str) -> PathBuf {
    let out = world.at(name);
    let inputs: Vec<_> = which.iter().map(|&i| world.input(i)).collect();
    merge::merge(&Context::default(), &world.base(), &inputs, &MergeOptions::new_checkpoint(&out)).unwrap();
    out
}

fn merge_in_place(world: &World, path: &Path, which: &[usize]) -> Result<merge::MergeReport, MergeError> {
    let inputs: Vec<_> = which.iter().map(|&i| world.input(i)).collect();
    merge::merge(&Context::default(), path, &inputs, &MergeOptions::in_place())
}

#[test]
fn one_adapter_gives_the_published_merge_bit_for_bit() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/reference/merge");
    let dir = tempfile::tempdir().unwrap();
    let base_path = dir.path().join("base.safetensors");
    fs::copy(reference.join("base.safetensors"), &base_path).unwrap();
    let base = Checkpoint::open(&base_path).unwrap();
    let deltas = Shard::open(&reference.join("deltas.safetensors")).unwrap();
    let expected = Shard::open(&reference.join("expected.safetensors")).unwrap();
    let ctx = Context::default();
    let read = |shard: &Shard, name: &str| {
        let info = shard.header().tensor(name).unwrap();
        shard.window(&ctx, info, 0..info.n_bytes()).unwrap().to_vec()
    };
    let adapter = dir.path().join("adapter.safetensors");
    let mut writer = AdapterWriter::create(&adapter, Existing::Keep, Dtype::F32).unwrap();
    for tensor in base.tensors() {
        let name = &tensor.info.name;
        let k = deltas.header().tensor(&format!("{name}.columns")).unwrap().shape[1];
        let ints = |bytes: Vec<u8>| {
            bytes.chunks_exact(4).map(|le| u32::from_le_bytes(le.try_into().unwrap())).collect::<Vec<_>>()
        };
        let columns = ints(read(&deltas, &format!("{name}.columns")));
        let values = ints(read(&deltas, &format!("{name}.values"))).into_iter().map(f32::from_bits).collect::<Vec<_>>();
        // The reference lists columns in any order; ours ascend.
        let mut rows = RowColumns::default();
        let mut sorted = Vec::new();
        for (columns, values) in columns.chunks(k as usize).zip(values.chunks(k as usize)) {
            let mut pairs: Vec<_> = columns.iter().zip(values).collect();
            pairs.sort_by_key(|(column, _)| **column);
            rows.push_row(&pairs.iter().map(|(column, _)| **column).collect::<Vec<_>>());
            sorted.extend(pairs.iter().map(|(_, value)| **value));
        }
        writer.begin_target(name, tensor.info.dtype, &tensor.info.shape, false, Some(k)).unwrap();
        writer.push_rows(&rows, &sorted, &values_at(&base, name, &rows)).unwrap();
        writer.end_target(None);
    }
    writer.finish(&ctx, 1.0, &Recipe::custom(), &BaseInfo::of(&base), &AdapterNotes::default()).unwrap();

    for scale in ["1.0", "0.5", "-1.0"] {
        let out = dir.path().join(format!("merged{scale}.safetensors"));
        let input = MergeInput { adapter: adapter.clone(), scale: Some(scale.parse().unwrap()) };
        merge::merge(&ctx, &base_path, &[input], &MergeOptions::new_checkpoint(&out)).unwrap();
        let merged = Shard::open(&out).unwrap();
        for tensor in base.tensors() {
            let name = &tensor.info.name;
            assert_eq!(read(&merged, name), read(&expected, &format!("{name}.scale{scale}")), "{name} at {scale}");
        }
        merge::unmerge(&ctx, &out, &Which::All, &MergeOptions::in_place()).unwrap();
        assert_eq!(fs::read(&out).unwrap(), fs::read(&base_path).unwrap());
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5, "no ledger is left behind");
}

#[test]
fn unmerge_restores_every_bit_of_every_type() {
    let world = World::new();
    let before = tree(&world.base());
    let out = merge_new(&world, &[0, 1, 2, 3], "out");
    let merged = tree(&out);
    for name in ["config.json", "model.safetensors.index.json"] {
        assert_eq!(merged[Path::new(name)], before[Path::new(name)], "side files come along");
    }
    assert_ne!(
        merged[Path::new("model-00001-of-00002.safetensors")],
        before[Path::new("model-00001-of-00002.safetensors")]
    );
    let report = merge::unmerge(&Context::default(), &out, &Which::All, &MergeOptions::in_place()).unwrap();
    assert_eq!((report.removed.len(), report.active.len()), (4, 0));
    assert_eq!(tree(&out), before);
    assert_eq!(tree(&world.base()), before, "the base was only read");
}

#[test]
fn any_order_of_merges_and_unmerges_is_a_fresh_merge_of_what_is_left() {
    let world = World::new();
    let mut fresh: BTreeMap<Vec<usize>, BTreeMap<PathBuf, Vec<u8>>> = BTreeMap::new();
    fresh.insert(Vec::new(), tree(&world.base()));
    let path = world.copy_base("work");
    let mut random = Random(42);
    let mut active: Vec<usize> = Vec::new();
    for _ in 0..40 {
        let i = random.below(4) as usize;
        match active.iter().position(|&j| j == i) {
            Some(at) => {
                active.remove(at);
                let which = Which::Some(vec![world.ids[i]]);
                merge::unmerge(&Context::default(), &path, &which, &MergeOptions::in_place()).unwrap();
            }
            None => {
                active.push(i);
                active.sort_unstable();
                merge_in_place(&world, &path, &[i]).unwrap();
            }
        }
        let expected = fresh.entry(active.clone()).or_insert_with(|| {
            let name = format!("fresh{active:?}");
            let mut fresh = tree(&merge_new(&world, &active, &name));
            // In place this program wrote no file of the folder's.
            fresh.remove(Path::new(".neuroada/files"));
            fresh
        });
        // Weights, ledger and adapters' copies: all of it is a function of the active set, but for where its names stand.
        assert!(unnamed(tree(&path)) == unnamed(expected.clone()), "{active:?}");
        assert!(!active.is_empty() || &tree(&path) == expected, "the base's bytes");
    }
    assert!(fresh.len() > 8, "many sets were visited");
}

#[test]
fn thread_count_block_size_and_reading_do_not_show() {
    let world = World::new();
    let expected = tree(&merge_new(&world, &[0, 1, 3], "expected"));
    for (threads, max_memory, io) in [
        (1, 1 << 20, neuroada_ckpt::Io::Mapped),
        (2, 1 << 30, neuroada_ckpt::Io::Read),
        (3, 16 << 20, neuroada_ckpt::Io::Auto),
        (8, 1 << 20, neuroada_ckpt::Io::Direct),
    ] {
        let out = world.at(&format!("t{threads}"));
        let ctx = Context { max_memory, io, ..Context::default() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let inputs: Vec<_> = [3, 0, 1].iter().map(|&i| world.input(i)).collect();
        pool.install(|| merge::merge(&ctx, &world.base(), &inputs, &MergeOptions::new_checkpoint(&out))).unwrap();
        assert!(tree(&out) == expected, "{threads} threads, {max_memory} bytes, {io:?}");
    }
}

#[test]
fn refusals_leave_the_same_tree() {
    let world = World::new();
    let path = world.copy_base("work");
    merge_in_place(&world, &path, &[2]).unwrap();
    let before = tree(world.dir.path());

    let again = merge_in_place(&world, &path, &[2]).unwrap_err();
    assert!(matches!(again, MergeError::AlreadyMerged { id, .. } if id == world.ids[2]), "{again}");
    let twice = merge_in_place(&world, &path, &[0, 0]).unwrap_err();
    assert!(matches!(twice, MergeError::Usage(_)), "{twice}");
    let absent = Which::Some(vec![world.ids[1]]);
    let absent = merge::unmerge(&Context::default(), &path, &absent, &MergeOptions::in_place()).unwrap_err();
    assert!(absent.to_string().contains("is not merged into it"), "{absent}");
    let nothing =
        merge::unmerge(&Context::default(), &world.base(), &Which::All, &MergeOptions::in_place()).unwrap_err();
    assert!(nothing.to_string().contains("nothing to take out"), "{nothing}");
    for out in [world.base(), world.base().join("inside"), world.at("0.safetensors"), world.base().join("config.json")]
    {
        let options = MergeOptions::new_checkpoint(&out);
        let error = merge::merge(&Context::default(), &world.base(), &[world.input(0)], &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    }
    assert!(tree(world.dir.path()) == before);
}

#[test]
fn an_adapter_for_another_base_is_refused_by_content() {
    let world = World::new();
    let other = world.copy_base("other");
    let shard = other.join("model-00002-of-00002.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    // Some weights of w.BF16, the first tensor of this shard.
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[start..start + 2000].iter_mut().for_each(|byte| *byte ^= 1);
    fs::write(&shard, bytes).unwrap();
    let before = tree(world.dir.path());
    let error = merge_in_place(&world, &other, &[0]).unwrap_err();
    assert!(matches!(&error, MergeError::WrongBase { tensor, .. } if tensor == "w.BF16"), "{error}");
    assert!(error.to_string().contains("5 of 6 tensors have its values"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(tree(world.dir.path()) == before);
}

/// Remembers the passes of a command.
#[derive(Default)]
struct Passes(std::sync::Mutex<Vec<String>>);

impl Observer for Passes {
    fn begin(&self, what: &str, _bytes: u64) {
        self.0.lock().unwrap().push(what.to_owned());
    }
    fn advance(&self, _bytes: u64) {}
    fn is_cancelled(&self) -> bool {
        false
    }
}

#[test]
fn a_wrong_base_is_found_before_anything_is_copied_whichever_tensor_tells() {
    let world = World::new();
    for (number, shard) in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"].iter().enumerate() {
        let header = Shard::open(&world.base().join(shard)).unwrap();
        for info in header.header().tensors().iter().filter(|info| info.name.starts_with("w.")) {
            let other = world.copy_base(&format!("{number}-{}", info.name));
            let mut bytes = fs::read(other.join(shard)).unwrap();
            let range = header.file_range(info);
            bytes[range.start as usize..range.end as usize].iter_mut().for_each(|byte| *byte ^= 1);
            fs::write(other.join(shard), bytes).unwrap();
            let passes = Passes::default();
            let ctx = Context { observer: &passes, ..Context::default() };
            let options = MergeOptions::new_checkpoint(world.at("out"));
            let error = merge::merge(&ctx, &other, &[world.input(0)], &options).unwrap_err();
            assert!(matches!(&error, MergeError::WrongBase { tensor, .. } if *tensor == info.name), "{error}");
            assert!(!passes.0.lock().unwrap().iter().any(|pass| pass == "merging"), "{}: copied", info.name);
            assert!(!world.at("out").exists());
            fs::remove_dir_all(other).unwrap();
        }
    }
}

#[test]
fn every_unmatched_tensor_is_listed() {
    let world = World::new();
    let other = world.at("other.safetensors");
    let mut file = TensorFileWriter::create(&other, Existing::Keep).unwrap();
    for (name, dtype, shape) in [("w.F32", Dtype::F32, vec![10, 37]), ("w.F16", Dtype::BF16, vec![200, 37])] {
        let id = file.add_tensor(name.to_owned(), dtype);
        file.append(id, &vec![0; shape.iter().product::<u64>() as usize * dtype.bitsize() / 8]).unwrap();
        file.finish_tensor(id, shape);
    }
    file.finish(&Context::default(), &BTreeMap::new()).unwrap();
    let error = merge_in_place(&world, &other, &[0]).unwrap_err().to_string();
    for line in [
        "6 of 6 tensors do not match the base other:",
        "\"w.F32\": adapter was made for [200, 37], base has [10, 37]",
        "\"w.F16\": adapter was made for F16, base has BF16",
        "\"w.BF16\": the base has no such tensor",
    ] {
        assert!(error.contains(line), "{error}");
    }
}

#[test]
fn a_changed_weight_is_found_before_anything_is_written() {
    let world = World::new();
    let path = merge_new(&world, &[2], "out");
    let adapter = Adapter::open(&world.at("2.safetensors")).unwrap();
    let target = adapter.target("w.BF16").unwrap();
    let rows = adapter.read_rows(&Context::default(), target, 0..1).unwrap();
    let column = rows.columns.row(0)[1];
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tensor = checkpoint.tensor("w.BF16").unwrap();
    let (shard, at) =
        (tensor.shard.path().to_owned(), tensor.shard.file_range(tensor.info).start + 2 * u64::from(column));
    drop(checkpoint);
    let mut bytes = fs::read(&shard).unwrap();
    bytes[at as usize] ^= 0x10;
    fs::write(&shard, bytes).unwrap();
    let before = tree(&path);

    let error = merge::unmerge(&Context::default(), &path, &Which::All, &MergeOptions::in_place()).unwrap_err();
    assert!(matches!(error, MergeError::Tampered { n_changed: 1, .. }), "{error}");
    assert!(error.to_string().contains(&format!("\"w.BF16\" [0, {column}]")), "{error}");
    assert!(tree(&path) == before);
    let report = merge::verify(&Context::default(), &path, &VerifyOptions::default()).unwrap();
    assert_eq!((report.ok, report.n_wrong), (false, 1));
}

#[test]
fn verify_says_yes_and_no_after_any_one_byte_is_changed() {
    let world = World::new();
    let path = merge_new(&world, &[0, 1], "out");
    let with_base = VerifyOptions { base: Some(world.base()), ..VerifyOptions::default() };
    let report = merge::verify(&Context::default(), &path, &with_base).unwrap();
    assert!(report.ok && report.base_compared && report.bytes_compared > 100_000, "{report:?}");
    let mut random = Random(3);
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let bytes = fs::read(path.join(shard)).unwrap();
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
        for _ in 0..20 {
            let at = start + random.below(bytes.len() as u64 - start);
            let mut changed = bytes.clone();
            changed[at as usize] ^= 1 << random.below(8);
            fs::write(path.join(shard), changed).unwrap();
            let report = merge::verify(&Context::default(), &path, &with_base).unwrap();
            assert!(!report.ok && !report.problems.is_empty(), "byte {at} of {shard}");
        }
        fs::write(path.join(shard), bytes).unwrap();
    }
    assert!(merge::verify(&Context::default(), &path, &with_base).unwrap().ok);
}

#[test]
fn a_merge_without_a_ledger_is_verified_from_base_and_adapters() {
    let world = World::new();
    let out = world.at("out");
    let output =
        MergeOutput::New { path: out.clone(), existing: Existing::Keep, ledger: false, link: true, resume: false };
    let inputs = [world.input(2)];
    merge::merge(&Context::default(), &world.base(), &inputs, &MergeOptions::to(output)).unwrap();
    assert!(!out.join(".neuroada").exists());
    let ask = |adapters: &[MergeInput]| {
        let options =
            VerifyOptions { base: Some(world.base()), adapters: adapters.to_vec(), ..VerifyOptions::default() };
        merge::verify(&Context::default(), &out, &options).unwrap().ok
    };
    assert!(ask(&inputs));
    assert!(!ask(&[MergeInput { scale: Some(0.5), ..inputs[0].clone() }]));
    assert!(!ask(&[world.input(3)]));
    use std::os::unix::fs::MetadataExt;
    let inode = |folder: &Path| fs::metadata(folder.join("model-00001-of-00002.safetensors")).unwrap().ino();
    assert_eq!(inode(&out), inode(&world.base()), "the shard that no delta touches is linked");
}

#[test]
fn adapters_may_change_or_go_after_the_merge_and_the_folder_may_move() {
    let world = World::new();
    let before = tree(&world.base());
    let path = merge_new(&world, &[0, 3], "out");
    fs::remove_file(world.at("0.safetensors")).unwrap();
    fs::write(world.at("3.safetensors"), b"something else").unwrap();
    let moved = world.at("elsewhere");
    fs::rename(&path, &moved).unwrap();
    merge::unmerge(&Context::default(), &moved, &Which::All, &MergeOptions::in_place()).unwrap();
    assert!(tree(&moved) == before);
}

#[test]
fn unmerge_can_write_a_new_checkpoint() {
    let world = World::new();
    let path = merge_new(&world, &[0, 1], "out");
    let only_one = merge_new(&world, &[1], "expected");
    let merged = tree(&path);
    let less = world.at("less");
    let which = Which::Some(vec![world.ids[0]]);
    merge::unmerge(&Context::default(), &path, &which, &MergeOptions::new_checkpoint(&less)).unwrap();
    assert!(tree(&less) == tree(&only_one));
    assert!(tree(&path) == merged);
}

#[test]
fn a_dry_run_reports_the_same_and_writes_nothing() {
    let world = World::new();
    let before = tree(world.dir.path());
    let mut options = MergeOptions::new_checkpoint(world.at("out"));
    options.dry_run = true;
    let dry = merge::merge(&Context::default(), &world.base(), &[world.input(0)], &options).unwrap();
    assert!(tree(world.dir.path()) == before);
    options.dry_run = false;
    let real = merge::merge(&Context::default(), &world.base(), &[world.input(0)], &options).unwrap();
    assert_eq!((dry.kinds, dry.total, dry.bytes_written), (real.kinds, real.total, real.bytes_written));
}

#[test]
fn a_cancelled_change_is_rolled_back() {
    let world = World::new();
    let path = world.copy_base("work");
    merge_in_place(&world, &path, &[1]).unwrap();
    let before = tree(&path);
    for (pass, block) in [("checking", 0), ("patching", 0), ("patching", 3)] {
        let observer = stop_at(pass, block, false);
        let ctx = Context { max_memory: 1 << 20, observer: &observer, ..Context::default() };
        let inputs = [world.input(0), world.input(3)];
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let error = pool.install(|| merge::merge(&ctx, &path, &inputs, &MergeOptions::in_place())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert!(tree(&path) == before, "{pass} {block}");
    }
    let out = world.at("out");
    let observer = stop_at("merging", 0, false);
    let ctx = Context { observer: &observer, ..Context::default() };
    merge::merge(&ctx, &world.base(), &[world.input(0)], &MergeOptions::new_checkpoint(&out)).unwrap_err();
    let left: Vec<_> = fs::read_dir(world.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 6, "{left:?}");
}

/// What the next test runs in a process of its own.
#[test]
fn child_that_dies_while_patching() {
    let Ok(arguments) = std::env::var("DIE_WHILE_PATCHING") else { return };
    let mut arguments = arguments.split('|');
    let (path, adapter, block) = (arguments.next().unwrap(), arguments.next().unwrap(), arguments.next().unwrap());
    let observer = stop_at("patching", block.parse().unwrap(), true);
    let ctx = Context { observer: &observer, max_memory: 1 << 20, ..Context::default() };
    let path = Path::new(path);
    if adapter == "all" {
        merge::unmerge(&ctx, path, &Which::All, &MergeOptions::in_place()).unwrap();
    } else {
        let input = MergeInput { adapter: adapter.into(), scale: None };
        merge::merge(&ctx, path, &[input], &MergeOptions::in_place()).unwrap();
    }
}

#[test]
fn a_process_that_dies_while_patching_is_recovered_from() {
    let world = World::new();
    let path = world.copy_base("work");
    merge_in_place(&world, &path, &[1, 2]).unwrap();
    let before = tree(&path);
    let adapter = world.at("0.safetensors").display().to_string();
    for (block, what) in [(0, adapter.as_str()), (3, &adapter), (0, "all"), (2, "all")] {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_dies_while_patching", "--nocapture"])
            .env("DIE_WHILE_PATCHING", format!("{}|{what}|{block}", path.display()))
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(!status.success());
        assert!(path.join(".neuroada/txn").exists(), "it died after the journal was written");
        let asked = merge::verify(&Context::default(), &path, &VerifyOptions::default()).unwrap_err();
        assert_eq!(asked.kind(), ErrorKind::Interrupted, "{asked}");
        let copied =
            merge::merge(&Context::default(), &path, &[world.input(3)], &MergeOptions::new_checkpoint(world.at("x")));
        assert_eq!(copied.unwrap_err().kind(), ErrorKind::Interrupted);
        if block == 3 {
            // The next change in place recovers by itself, then does its work.
            merge_in_place(&world, &path, &[3]).unwrap();
            let which = Which::Some(vec![world.ids[3]]);
            merge::unmerge(&Context::default(), &path, &which, &MergeOptions::in_place()).unwrap();
        } else {
            assert_eq!(merge::recover(&Context::default(), &path, None).unwrap(), Recovered::RolledBack);
        }
        assert!(tree(&path) == before, "block {block} of {what}");
        assert_eq!(merge::recover(&Context::default(), &path, None).unwrap(), Recovered::Nothing);
    }
}

#[test]
fn a_flipped_bit_of_the_ledger_is_found_and_the_shards_stay() {
    let world = World::new();
    let path = merge_new(&world, &[0, 1], "out");
    let before = tree(&path);
    let ledger = path.join(".neuroada/ledger");
    let bytes = fs::read(&ledger).unwrap();
    let mut random = Random(11);
    for round in 0..500 {
        // The header and its padding in the first half of the rounds, anywhere in the second.
        let within = if round < 250 { 3000 } else { bytes.len() as u64 };
        let at = random.below(within) as usize;
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << random.below(8);
        fs::write(&ledger, flipped).unwrap();
        let error = merge::unmerge(&Context::default(), &path, &Which::All, &MergeOptions::in_place()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadInput, "byte {at}: {error}");
        let asked = merge::verify(&Context::default(), &path, &VerifyOptions::default()).unwrap_err();
        assert_eq!(asked.kind(), ErrorKind::BadInput, "byte {at}");
    }
    fs::write(&ledger, &bytes).unwrap();
    assert!(tree(&path) == before);
    let copy = path.join(format!(".neuroada/adapters/{}.safetensors", world.ids[0]));
    let mut bytes = fs::read(&copy).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&copy, &bytes).unwrap();
    let error = merge::unmerge(&Context::default(), &path, &Which::All, &MergeOptions::in_place()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadInput, "{error}");
}
