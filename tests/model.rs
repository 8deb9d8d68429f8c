//! Thousands of random merges, unmerges, crashes and recoveries against a plain model in memory.
//!
//! The model knows the base's elements and every adapter's deltas, and adds them up one element at a time. Crashes are
//! panics in the middle of patching: nothing is rolled back, the journal stays. `NEUROADA_MODEL_STEPS=10000 cargo test
//! --release --test model` runs the full number of steps.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicI64, Ordering},
};

use half::{bf16, f16};
use neuroada_ckpt::{
    Adapter, Checkpoint, Context, Dtype, MergeError, MergeInput, MergeOptions, Observer, Recovered, VerifyOptions,
    Which,
    internals::{
        merge,
        tensor::{F8E4M3, F8E5M2},
    },
};

#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use world::{Random, World, tree};

/// The deltas of one adapter: element by tensor and place.
type Deltas = BTreeMap<String, BTreeMap<usize, f32>>;

struct Model {
    /// Type and bytes of every tensor that can be merged into.
    base: BTreeMap<String, (Dtype, Vec<u8>)>,
    adapters: Vec<Deltas>,
    /// What is merged: adapter and scale, in ascending order of id.
    active: Vec<(usize, f64)>,
}

/// `original + delta * scale + …`, written out type by type.
fn value(dtype: Dtype, bits: &[u8], deltas: &[(f32, f64)]) -> Vec<u8> {
    let sum32 = |original: f32| deltas.iter().fold(original, |sum, &(delta, scale)| sum + delta * scale as f32);
    let vec_of = |bits: u64, n: usize| bits.to_le_bytes()[..n].to_vec();
    macro_rules! in_f32 {
        ($t:ty, $from:expr, $nan:expr) => {{
            let original: $t = $from;
            if original.is_nan() {
                return bits.to_vec();
            }
            let sum = sum32(original.to_f32());
            if sum.is_nan() {
                vec_of($nan, bits.len())
            } else {
                vec_of(u64::from(<$t>::from_f32(sum).to_bits()), bits.len())
            }
        }};
    }
    match dtype {
        Dtype::F64 => {
            let original = f64::from_le_bytes(bits.try_into().unwrap());
            let sum = deltas.iter().fold(original, |sum, &(delta, scale)| sum + f64::from(delta) * scale);
            if original.is_nan() { bits.to_vec() } else { sum.to_le_bytes().to_vec() }
        }
        Dtype::F32 => {
            let original = f32::from_le_bytes(bits.try_into().unwrap());
            if original.is_nan() { bits.to_vec() } else { sum32(original).to_le_bytes().to_vec() }
        }
        Dtype::F16 => in_f32!(f16, f16::from_le_bytes(bits.try_into().unwrap()), 0x7e00),
        Dtype::BF16 => in_f32!(bf16, bf16::from_le_bytes(bits.try_into().unwrap()), 0x7fc0),
        Dtype::F8_E4M3 => in_f32!(F8E4M3, F8E4M3::from_bits(bits[0]), 0x7f),
        Dtype::F8_E5M2 => in_f32!(F8E5M2, F8E5M2::from_bits(bits[0]), 0x7e),
        other => unreachable!("{other:?} is no target"),
    }
}

impl Model {
    fn new(world: &World) -> Self {
        let ctx = Context::default();
        let checkpoint = Checkpoint::open(&world.base()).unwrap();
        let mut base = BTreeMap::new();
        for tensor in checkpoint.tensors().filter(|tensor| tensor.info.name.starts_with("w.")) {
            let bytes = tensor.window(&ctx, 0..tensor.info.n_bytes()).unwrap().to_vec();
            base.insert(tensor.info.name.clone(), (tensor.info.dtype, bytes));
        }
        let mut adapters = Vec::new();
        for i in 0..world.ids.len() {
            let adapter = Adapter::open(&world.input(i).adapter).unwrap();
            let mut deltas = Deltas::new();
            for target in adapter.targets() {
                let rows = adapter.read_rows(&ctx, target, 0..target.layout.n_rows()).unwrap();
                let of_target = deltas.entry(target.name.clone()).or_default();
                for row in 0..rows.columns.n_rows() {
                    for at in rows.columns.row_range(row) {
                        let workspace = row * target.layout.d_in as usize + rows.columns.columns()[at] as usize;
                        of_target.insert(workspace, rows.values[at]);
                    }
                }
            }
            adapters.push(deltas);
        }
        Self { base, adapters, active: Vec::new() }
    }

    /// The bytes of a tensor with the active adapters in it.
    fn tensor(&self, name: &str) -> Vec<u8> {
        let (dtype, bytes) = &self.base[name];
        let width = dtype.bitsize() / 8;
        let mut touched: BTreeMap<usize, Vec<(f32, f64)>> = BTreeMap::new();
        for &(i, scale) in &self.active {
            for (&workspace, &delta) in self.adapters[i].get(name).into_iter().flatten() {
                touched.entry(workspace).or_default().push((delta, scale));
            }
        }
        let mut bytes = bytes.clone();
        for (workspace, deltas) in touched {
            let element = workspace * width..(workspace + 1) * width;
            let merged = value(*dtype, &bytes[element.clone()], &deltas);
            bytes[element].copy_from_slice(&merged);
        }
        bytes
    }

    fn check(&self, path: &Path, step: &str) {
        let ctx = Context::default();
        let checkpoint = Checkpoint::open(path).unwrap();
        for (name, (_, base)) in &self.base {
            let tensor = checkpoint.tensor(name).unwrap();
            let found = tensor.window(&ctx, 0..base.len() as u64).unwrap();
            assert!(*found == *self.tensor(name), "{step}: {name} with {:?}", self.active);
        }
    }
}

/// Panics at the n-th block that is patched.
struct CrashAt(AtomicI64, AtomicI64);

impl Observer for CrashAt {
    fn begin(&self, what: &str, _bytes: u64) {
        self.1.store(i64::from(what == "patching"), Ordering::SeqCst);
    }
    fn advance(&self, _bytes: u64) {
        assert!(self.1.load(Ordering::SeqCst) == 0 || self.0.fetch_sub(1, Ordering::SeqCst) != 0, "the power failed");
    }
}

#[test]
fn the_checkpoint_is_always_what_the_model_says() {
    let n_steps: u64 = std::env::var("NEUROADA_MODEL_STEPS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    // In memory where that can be: every step syncs.
    let memory = PathBuf::from("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let world = World::in_folder(folder.unwrap());
    let path = world.copy_base("work");
    let mut model = Model::new(&world);
    let mut random = Random(99);
    let (mut n_crashes, mut n_recovered, mut n_changes) = (0, 0, 0);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        let said = info.to_string();
        if !said.contains("the power failed") {
            eprintln!("{said}");
        }
    }));
    for step in 0..n_steps {
        let i = random.below(4) as usize;
        let crash = random.below(4) == 0;
        let observer = CrashAt(AtomicI64::new(if crash { random.below(8) as i64 } else { -1 }), AtomicI64::new(0));
        let ctx = Context { max_memory: 1 << 20, observer: &observer, ..Context::default() };
        let mut next = model.active.clone();
        let merged = next.iter().position(|&(j, _)| j == i);
        let scale = [1.0, -0.3, 0.71, 2.0][random.below(4) as usize];
        let change = || -> Result<_, MergeError> {
            match merged {
                Some(_) => merge::unmerge(&ctx, &path, &Which::Some(vec![world.ids[i]]), &MergeOptions::in_place()),
                None => {
                    let input = MergeInput { adapter: world.input(i).adapter, scale: Some(scale) };
                    merge::merge(&ctx, &path, &[input], &MergeOptions::in_place())
                }
            }
        };
        match merged {
            Some(at) => {
                next.remove(at);
            }
            None => {
                next.push((i, scale));
                next.sort_by_key(|&(i, _)| world.ids[i]);
            }
        }
        match catch_unwind(AssertUnwindSafe(change)) {
            Ok(done) => {
                done.unwrap();
                model.active = next;
                n_changes += 1;
            }
            Err(_crashed) => {
                n_crashes += 1;
                // Either somebody recovers, or the next change does.
                if random.below(2) == 0 {
                    assert_eq!(merge::recover(&Context::default(), &path, None).unwrap(), Recovered::RolledBack);
                    n_recovered += 1;
                } else {
                    continue;
                }
            }
        }
        model.check(&path, &format!("step {step}"));
        if step % 100 == 0 && !model.active.is_empty() {
            let options = VerifyOptions { base: Some(world.base()), ..VerifyOptions::default() };
            assert!(merge::verify(&Context::default(), &path, &options).unwrap().ok);
        }
    }
    std::panic::set_hook(hook);
    merge::recover(&Context::default(), &path, None).unwrap();
    if !model.active.is_empty() {
        merge::unmerge(&Context::default(), &path, &Which::All, &MergeOptions::in_place()).unwrap();
    }
    assert!(tree(&path) == tree(&world.base()), "all of the base returns");
    eprintln!("{n_steps} steps: {n_changes} changes, {n_crashes} crashes, {n_recovered} recovered by hand");
    assert!(n_changes > n_steps / 2 && n_crashes > 0, "{n_changes} {n_crashes}");
    fs::remove_dir_all(&path).unwrap();
}
