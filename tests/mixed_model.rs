//! Thousands of random changes with adapters of every kind against a plain model in memory: merges and unmerges in place and out of
//! place, with kept originals or with the base, cut short by crashes, cancelled and gone on with.
//!
//! `NEUROADA_MODEL_STEPS=10000 cargo test --test mixed_model` runs the full number of steps.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::atomic::{AtomicI64, Ordering},
};

use neuroada_ckpt::{
    Context, ErrorKind, Failure, KeptOriginals, MergeError, MergeOptions, MergeReport, Observer, Recovered,
    VerifyOptions, Which, internals::merge,
};

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

use mixture::{Active, Mixture, in_place, to_new};
use stop_at::stop_at;
use unnamed::unnamed;
use world::{Random, tree};

/// Panics at the n-th block that is patched.
struct CrashAt(AtomicI64, AtomicI64);

impl CrashAt {
    fn new(block: u64) -> Self {
        Self(AtomicI64::new(block as i64), AtomicI64::new(0))
    }
}

impl Observer for CrashAt {
    fn begin(&self, what: &str, _bytes: u64) {
        self.1.store(i64::from(what == "patching"), Ordering::SeqCst);
    }
    fn advance(&self, _bytes: u64) {
        assert!(self.1.load(Ordering::SeqCst) == 0 || self.0.fetch_sub(1, Ordering::SeqCst) != 0, "the power failed");
    }
}

fn observed(observer: &dyn Observer) -> Context<'_> {
    Context { max_memory: 1, observer, ..Context::default() }
}

/// What is asked for.
enum Step {
    Add(Active),
    Remove(Active),
    RemoveAll,
}

#[derive(Default, Debug)]
struct Counts {
    in_place: u64,
    out_of_place: u64,
    resumed: u64,
    crashes: u64,
    crashes_in_recovery: u64,
    recovered_by_a_change: u64,
    cancelled: u64,
    without_base: u64,
    moved: u64,
    verified: u64,
    flipped: u64,
    fresh: u64,
}

/// The checkpoint under test, and what should be in it.
struct Work {
    mixture: Mixture,
    random: Random,
    path: PathBuf,
    n_folders: u64,
    active: Active,
    /// Whether its ledger has hashes alone of some tensor.
    needs_base: bool,
    fresh: BTreeMap<String, BTreeMap<PathBuf, Vec<u8>>>,
    counts: Counts,
}

/// The files of a checkpoint without what is remembered of merges.
fn shards(mut tree: BTreeMap<PathBuf, Vec<u8>>) -> BTreeMap<PathBuf, Vec<u8>> {
    tree.retain(|path, _| !path.starts_with(".neuroada"));
    tree
}

impl Work {
    fn new() -> Self {
        let mixture = Mixture::new();
        let path = mixture.copy(&mixture.base(), "work0");
        Self {
            mixture,
            random: Random(2026),
            path,
            n_folders: 1,
            active: Vec::new(),
            needs_base: false,
            fresh: BTreeMap::new(),
            counts: Counts::default(),
        }
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.random.below(n) == 0
    }
    fn new_folder(&mut self) -> PathBuf {
        self.n_folders += 1;
        self.mixture.at(&format!("work{}", self.n_folders))
    }
    /// Of so little memory that tensors are cut into blocks, or of much.
    fn context(&mut self) -> Context<'static> {
        Context { max_memory: [1, 1 << 30][self.random.below(2) as usize], ..Context::default() }
    }

    /// Merges one or two, or takes some or all out.
    fn choose(&mut self) -> (Step, Active) {
        let is_active = |active: &Active, i: usize| active.iter().any(|&(j, _)| i == j);
        let mut next = self.active.clone();
        if !self.active.is_empty() && (self.one_in(2) || self.active.len() == self.mixture.adapters.len()) {
            if self.one_in(6) {
                return (Step::RemoveAll, Vec::new());
            }
            let mut removed = Vec::new();
            for _ in 0..(1 + self.random.below(3)).min(next.len() as u64) {
                removed.push(next.remove(self.random.below(next.len() as u64) as usize));
            }
            return (Step::Remove(removed), next);
        }
        let mut added = Vec::new();
        for _ in 0..1 + self.random.below(2) {
            let i = self.random.below(self.mixture.adapters.len() as u64) as usize;
            if !is_active(&next, i) {
                let scales = self.mixture.adapters[i].scales;
                let new = (i, scales[self.random.below(scales.len() as u64) as usize]);
                next.push(new);
                added.push(new);
            }
        }
        if added.is_empty() {
            return self.choose();
        }
        (Step::Add(added), self.mixture.sorted(next))
    }

    fn apply(&self, ctx: &Context<'_>, step: &Step, options: &MergeOptions<'_>) -> Result<MergeReport, MergeError> {
        let id = |&(i, _): &(usize, f64)| self.mixture.adapters[i].id;
        match step {
            Step::Add(added) => merge::merge(ctx, &self.path, &self.mixture.inputs(added), options),
            Step::Remove(removed) => {
                merge::unmerge(ctx, &self.path, &Which::Some(removed.iter().map(id).collect()), options)
            }
            Step::RemoveAll => merge::unmerge(ctx, &self.path, &Which::All, options),
        }
    }

    fn done(&mut self, report: &MergeReport, next: Active) {
        assert_eq!(report.active.len(), next.len());
        self.needs_base = report.needs_base;
        self.active = next;
    }

    fn change(&mut self) {
        let (step, next) = self.choose();
        match self.one_in(4) {
            true => self.out_of_place(&step, next),
            false => self.in_place(&step, next),
        }
    }

    fn out_of_place(&mut self, step: &Step, next: Active) {
        let (ctx, out) = (self.context(), self.new_folder());
        let base = (self.needs_base || self.one_in(3)).then(|| self.mixture.base());
        let is_resumed = self.one_in(2);
        let keep = [KeptOriginals::Hashes, KeptOriginals::Whole][self.random.below(2) as usize];
        let options = MergeOptions { keep, ..to_new(&out, is_resumed, base) };
        if is_resumed {
            let pass = ["merging", "patching"][self.random.below(2) as usize];
            let block = self.random.below(12);
            match self.apply(&observed(&stop_at(pass, block, false)), step, &options) {
                Ok(_) => fs::remove_dir_all(&out).unwrap(),
                Err(stopped) => {
                    assert_eq!(stopped.kind(), ErrorKind::Cancelled, "{stopped}");
                    self.counts.resumed += 1;
                }
            }
        }
        let report = self.apply(&ctx, step, &options).unwrap();
        fs::remove_dir_all(&self.path).unwrap();
        self.path = out;
        self.counts.out_of_place += 1;
        self.done(&report, next);
    }

    fn in_place(&mut self, step: &Step, next: Active) {
        let (ctx, before) = (self.context(), tree(&self.path));
        // Without the base nothing is lost, whatever is refused.
        if self.needs_base && self.one_in(4) {
            let options = MergeOptions { keep: KeptOriginals::Whole, ..in_place(None) };
            match self.apply(&ctx, step, &options) {
                Ok(report) => {
                    self.counts.without_base += 1;
                    return self.done(&report, next);
                }
                Err(MergeError::NeedsBase { .. } | MergeError::KeepsNothing { .. }) => {
                    assert!(tree(&self.path) == before);
                }
                Err(other) => panic!("{other}"),
            }
        }
        let has_base = self.needs_base || self.one_in(2);
        let keep = match has_base && self.one_in(2) {
            true => KeptOriginals::Hashes,
            false => KeptOriginals::Whole,
        };
        let options = MergeOptions { keep, ..in_place(has_base.then(|| self.mixture.base())) };
        let block = self.random.below(6);
        if self.one_in(8) {
            if let Err(stopped) = self.apply(&observed(&stop_at("patching", block, false)), step, &options) {
                assert_eq!(stopped.kind(), ErrorKind::Cancelled, "{stopped}");
                assert!(tree(&self.path) == before, "a cancelled change is rolled back");
                self.counts.cancelled += 1;
            } else {
                return self.done_unreported(next, &options);
            }
        }
        if self.one_in(3) {
            let observer = CrashAt::new(block);
            let crashing = observed(&observer);
            match catch_unwind(AssertUnwindSafe(|| self.apply(&crashing, step, &options))) {
                Ok(done) => {
                    self.counts.in_place += 1;
                    return self.done(&done.unwrap(), next);
                }
                Err(_crashed) => {
                    self.counts.crashes += 1;
                    if !self.recover(&options, &before) {
                        let report = self.apply(&ctx, step, &options).unwrap();
                        assert_eq!(report.notes[0], "an interrupted change was recovered first");
                        self.counts.recovered_by_a_change += 1;
                        self.counts.in_place += 1;
                        return self.done(&report, next);
                    }
                }
            }
        }
        let report = self.apply(&ctx, step, &options).unwrap();
        self.counts.in_place += 1;
        self.done(&report, next);
    }

    /// After a change that was to be cancelled and came through: its report is gone, so what it keeps is asked for.
    fn done_unreported(&mut self, next: Active, options: &MergeOptions<'_>) {
        self.active = next;
        // Where the base was given, hashes may be all that is left.
        self.needs_base |= options.base.is_some() && !self.active.is_empty();
        self.counts.in_place += 1;
    }

    /// Recovers by hand, with crashes on the way, or leaves it to the next change: then false.
    fn recover(&mut self, options: &MergeOptions<'_>, before: &BTreeMap<PathBuf, Vec<u8>>) -> bool {
        let asked = merge::verify(&Context::default(), &self.path, &VerifyOptions::default()).unwrap_err();
        assert_eq!(asked.kind(), ErrorKind::Interrupted, "{asked}");
        if self.one_in(3) {
            return false;
        }
        let base = options.base.as_deref();
        if self.one_in(2) {
            let halfway = tree(&self.path);
            match merge::recover(&Context::default(), &self.path, None) {
                Ok(recovered) => {
                    assert_eq!(recovered, Recovered::RolledBack);
                    assert!(tree(&self.path) == *before, "recovered without the base");
                    return true;
                }
                Err(refused) => {
                    assert!(base.is_some() && matches!(refused, MergeError::NeedsBase { .. }), "{refused}");
                    assert!(tree(&self.path) == halfway, "a refused recovery changes nothing");
                }
            }
        }
        while self.one_in(3) {
            let observer = CrashAt::new(self.random.below(4));
            let crashing = observed(&observer);
            match catch_unwind(AssertUnwindSafe(|| merge::recover(&crashing, &self.path, base))) {
                Ok(recovered) => {
                    assert_eq!(recovered.unwrap(), Recovered::RolledBack);
                    assert!(tree(&self.path) == *before, "recovered");
                    return true;
                }
                Err(_crashed) => self.counts.crashes_in_recovery += 1,
            }
        }
        assert_eq!(merge::recover(&Context::default(), &self.path, base).unwrap(), Recovered::RolledBack);
        assert!(tree(&self.path) == *before, "recovered");
        assert_eq!(merge::recover(&Context::default(), &self.path, base).unwrap(), Recovered::Nothing);
        true
    }

    /// Compares the whole checkpoint with the model, now and then with a fresh merge too, or with what it says of itself.
    fn check(&mut self, step: &str) {
        self.mixture.check(&self.path, &self.active, step);
        let found = tree(&self.path);
        if self.active.is_empty() {
            assert!(found == tree(&self.mixture.base()), "{step}: all of the base returns");
            return;
        }
        if self.one_in(8) {
            let key = format!("{:?}", self.active);
            if !self.fresh.contains_key(&key) {
                let out = self.mixture.at("fresh");
                let options = to_new(&out, false, None);
                let (inputs, base) = (self.mixture.inputs(&self.active), self.mixture.base());
                merge::merge(&Context::default(), &base, &inputs, &options).unwrap();
                self.fresh.insert(key.clone(), unnamed(shards(tree(&out))));
                fs::remove_dir_all(&out).unwrap();
            }
            assert!(unnamed(shards(found)) == self.fresh[&key], "{step}: a fresh merge of {key} gives other files");
            self.counts.fresh += 1;
        }
        if self.one_in(6) {
            let base = self.one_in(2).then(|| self.mixture.base());
            let options = VerifyOptions { base, ..VerifyOptions::default() };
            let report = merge::verify(&self.context(), &self.path, &options).unwrap();
            assert!(report.ok, "{step}: {:?}", report.problems);
            self.counts.verified += 1;
            self.flip(&options);
        }
        if self.one_in(10) {
            let elsewhere = self.new_folder();
            mixture::copy_folder(&self.path, &elsewhere);
            fs::remove_dir_all(&self.path).unwrap();
            self.path = elsewhere;
            self.counts.moved += 1;
        }
    }

    /// A flipped bit of a weight is found: of any with the base, of tensors changed as a whole without it.
    fn flip(&mut self, options: &VerifyOptions) {
        let wholes = self.mixture.wholes(&self.active);
        let names: Vec<String> = mixture::TENSORS
            .iter()
            .filter(|(_, name, ..)| options.base.is_some() || wholes.contains(name))
            .map(|(_, name, ..)| (*name).to_owned())
            .collect();
        if names.is_empty() {
            return;
        }
        let name = &names[self.random.below(names.len() as u64) as usize];
        let (shard, workspace) = mixture::data_of(&self.path, name);
        let before = fs::read(&shard).unwrap();
        let mut bytes = before.clone();
        let at = workspace.start + self.random.below((workspace.end - workspace.start) as u64) as usize;
        bytes[at] ^= 1 << self.random.below(8);
        fs::write(&shard, bytes).unwrap();
        let report = merge::verify(&Context::default(), &self.path, options).unwrap();
        assert!(!report.ok, "{name}, byte {at} of {}", shard.display());
        fs::write(&shard, before).unwrap();
        self.counts.flipped += 1;
    }
}

#[test]
fn the_checkpoint_is_always_what_the_model_says() {
    let n_steps: u64 = std::env::var("NEUROADA_MODEL_STEPS").ok().and_then(|n| n.parse().ok()).unwrap_or(150);
    let mut work = Work::new();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        let said = info.to_string();
        if !said.contains("the power failed") {
            eprintln!("{said}");
        }
    }));
    for step in 0..n_steps {
        work.change();
        work.check(&format!("step {step}"));
    }
    std::panic::set_hook(hook);
    if !work.active.is_empty() {
        merge::unmerge(&Context::default(), &work.path, &Which::All, &in_place(Some(work.mixture.base()))).unwrap();
    }
    assert!(tree(&work.path) == tree(&work.mixture.base()), "all of the base returns");
    let counts = &work.counts;
    eprintln!("{n_steps} steps: {counts:?}");
    assert!(counts.in_place > n_steps / 2 && counts.out_of_place > n_steps / 8, "{counts:?}");
    assert!(counts.crashes > n_steps / 30 && counts.resumed > 0 && counts.flipped > 0, "{counts:?}");
}
