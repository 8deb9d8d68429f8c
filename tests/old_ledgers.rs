//! Merged checkpoints as version 0.1.0 left them, with ledgers of version 1 and low-rank records of versions 1 and 2: they are shown,
//! proven, undone to the base's bytes, one adapter at a time or all at once, and recovered where a change was cut short.
//!
//! `fixtures/make_ledgers.py` says how each was made.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

#[path = "cli/harness.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod harness;
#[path = "support/unnamed.rs"]
mod unnamed;

use harness::{Workspace, copy, fixtures};
use unnamed::unnamed;

/// A fixture.
struct Case {
    name: &'static str,
    base: &'static str,
    n_adapters: usize,
    keeps: Keeps,
    /// What the merge was told of how to read its adapters.
    options: &'static str,
}

/// What the checkpoint keeps of its base.
#[derive(Clone, Copy, PartialEq)]
enum Keeps {
    /// The originals of sparse adapters.
    Ledger,
    /// All originals of the tensors that a LoRA touched.
    Originals,
    /// Only their hashes.
    Hashes,
}
use Keeps::{Hashes, Ledger, Originals};

const fn case(name: &'static str, base: &'static str, n_adapters: usize, keeps: Keeps) -> Case {
    Case { name, base, n_adapters, keeps, options: "" }
}

const CASES: [Case; 25] = [
    case("sparse-out-of-place", "mixed", 1, Ledger),
    case("sparse-two-out-of-place", "mixed", 2, Ledger),
    case("sparse-two-in-place", "mixed", 2, Ledger),
    case("sparse-one-taken-out", "mixed", 2, Ledger),
    case("sparse-transposed", "gpt2", 2, Ledger),
    case("sparse-file-out-of-place", FILE, 1, Ledger),
    case("sparse-file-in-place", FILE, 2, Ledger),
    case("lora-hashes", "mixed", 1, Hashes),
    case("lora-originals", "mixed", 1, Originals),
    case("lora-and-sparse", "mixed", 2, Hashes),
    case("lora-and-sparse-originals", "mixed", 3, Originals),
    case("lora-one-taken-out", "mixed", 2, Hashes),
    case("lora-transposed", "gpt2", 1, Hashes),
    case("lora-file", FILE, 2, Hashes),
    case("lora-file-originals", FILE, 2, Originals),
    case("dora", "mixed", 2, Hashes),
    case("bias", "biased", 1, Originals),
    case("full", "biased", 1, Hashes),
    case("embedding", "biased", 1, Originals),
    Case { options: "--tied-weights", ..case("tied", "tied", 1, Hashes) },
    Case { options: "--expert-order rank-first", ..case("experts", "experts", 1, Hashes) },
    Case {
        options: "--expert-order expert-first --expert-axes in-out",
        ..case("square-experts", "square-experts", 1, Hashes)
    },
    Case { options: "--axes square=in-out", ..case("axes", "unknown", 1, Originals) },
    Case { options: "--axes square=out-in --rename model.*=backbone.*", ..case("rename", "unknown", 2, Hashes) },
    case("torn-second-merge", "mixed", 1, Ledger),
];

/// The base of the merges into one file.
const FILE: &str = "single.safetensors";

impl Case {
    fn is_file(&self) -> bool {
        self.base == FILE
    }

    /// A name for an output of the same layout.
    fn named(&self, name: &str) -> String {
        format!("{name}{}", if self.is_file() { ".safetensors" } else { "" })
    }

    /// Copies the merged checkpoint with its state, and its base, into a folder of their own; the base is `base`, or
    /// `base.safetensors`.
    fn copied(&self) -> Copied<'_> {
        let workspace = Workspace::new();
        let ledgers = fixtures().join("ledgers");
        copy(&ledgers.join("bases").join(self.base), &workspace.path(&self.named("base")));
        copy(&ledgers.join(self.name), &workspace.path("case"));
        let merged = if self.is_file() { "case/m.safetensors" } else { "case/merged" }.to_owned();
        let state = format!("{merged}{}", if self.is_file() { ".neuroada" } else { "/.neuroada" });
        Copied { case: self, workspace, merged, state }
    }
}

/// A copy of a fixture; names are below the folder that commands run in.
struct Copied<'c> {
    case: &'c Case,
    workspace: Workspace,
    merged: String,
    state: String,
}

/// A merged adapter: its id and its scale.
type Active = (String, f64);

impl Copied<'_> {
    /// The bytes of all files of a checkpoint but its state.
    fn content(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let path = self.workspace.path(name);
        if path.is_file() {
            return BTreeMap::from([(String::new(), fs::read(path).unwrap())]);
        }
        let files = fs::read_dir(path).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file());
        // Programs of before 0.2 wrote no model card.
        let files = files.filter(|entry| entry.file_name() != "README.md");
        files.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
    }

    fn base_content(&self) -> BTreeMap<String, Vec<u8>> {
        self.content(&self.case.named("base"))
    }

    /// What `inspect` shows of the merges.
    fn merges(&self, name: &str) -> serde_json::Value {
        self.workspace.json(&format!("inspect {name}"))["merges"].clone()
    }

    fn active(&self, name: &str) -> Vec<Active> {
        let merges = self.merges(name);
        let one =
            |active: &serde_json::Value| (active["id"].as_str().unwrap().to_owned(), active["scale"].as_f64().unwrap());
        merges["active"].as_array().map(|all| all.iter().map(one).collect()).unwrap_or_default()
    }

    /// ` --base NAME`, where undoing needs it.
    fn needed_base(&self) -> String {
        match self.case.keeps {
            Hashes => format!(" --base {}", self.case.named("base")),
            Ledger | Originals => String::new(),
        }
    }

    /// The command line that merges these of the adapters that lie in the state into the base.
    fn merge_line(&self, adapters: &[Active], output: &str) -> String {
        let mut line = format!("merge {} -o {output} {}", self.case.named("base"), self.case.options);
        for (id, scale) in adapters {
            let folder = format!("{}/adapters/{id}", self.state);
            let suffix = if self.workspace.path(&folder).is_dir() { "" } else { ".safetensors" };
            line.push_str(&format!(" --adapter {folder}{suffix}={scale}"));
        }
        line
    }

    fn is_verified(&self, name: &str) {
        for base in [String::new(), format!(" --base {}", self.case.named("base"))] {
            let told = self.workspace.run(&format!("verify {name}{base}"));
            assert!(told.starts_with("exit: 0") && told.contains(" verified\n"), "{}{base}: {told}", self.case.name);
        }
    }

    /// Finishes or rolls back what was cut short, where something was.
    fn recovered(self) -> Self {
        self.workspace.stdout(&format!("recover {}", self.merged));
        self
    }
}

#[test]
fn old_merges_are_shown_and_verified() {
    for case in &CASES {
        let copied = case.copied().recovered();
        let merges = copied.merges(&copied.merged);
        assert_eq!(merges["active"].as_array().unwrap().len(), case.n_adapters, "{}: {merges}", case.name);
        assert_eq!(merges["needs_base"], case.keeps == Hashes, "{}: {merges}", case.name);
        assert!(merges["n_touched"].as_u64().unwrap() > 0, "{}: {merges}", case.name);
        copied.is_verified(&copied.merged);
    }
}

#[test]
fn merging_the_same_adapters_anew_gives_the_bytes_of_old_merges() {
    for case in &CASES {
        let copied = case.copied().recovered();
        let again = case.named("again");
        copied.workspace.stdout(&copied.merge_line(&copied.active(&copied.merged), &again));
        assert!(unnamed(copied.content(&again)) == unnamed(copied.content(&copied.merged)), "{}", case.name);
    }
}

#[test]
fn taking_all_adapters_out_of_old_merges_gives_the_bytes_of_the_base() {
    for case in &CASES {
        let copied = case.copied().recovered();
        let (merged, undone) = (&copied.merged, case.named("undone"));
        assert!(copied.content(merged) != copied.base_content(), "{}: something was merged", case.name);
        if case.keeps == Hashes {
            let alone = copied.workspace.run(&format!("unmerge {merged} -o {undone}"));
            assert!(
                alone.starts_with("exit: 4") && alone.contains("hint: --base PATH names it"),
                "{}: {alone}",
                case.name
            );
        }
        copied.workspace.stdout(&format!("unmerge {merged} -o {undone}{}", copied.needed_base()));
        assert!(copied.content(&undone) == copied.base_content(), "{}", case.name);
        assert!(copied.active(&undone).is_empty(), "{}", case.name);
        if case.keeps == Ledger {
            undo_in_place(&copied);
        }
    }
}

#[test]

fn old_merges_of_lora_are_undone_in_place() {
    for case in CASES.iter().filter(|case| case.keeps != Ledger) {
        undo_in_place(&case.copied());
    }
}

fn undo_in_place(copied: &Copied<'_>) {
    let (name, merged) = (copied.case.name, &copied.merged);
    copied.workspace.stdout(&format!("unmerge {merged} --in-place{}", copied.needed_base()));
    assert!(copied.content(merged) == copied.base_content(), "{name}");
    assert!(copied.active(merged).is_empty(), "{name}");
}

#[test]
fn taking_one_adapter_out_of_an_old_merge_equals_merging_the_others() {
    let mut n_taken_out = 0;
    for case in CASES.iter().filter(|case| case.n_adapters > 1) {
        let copied = case.copied();
        let active = copied.active(&copied.merged);
        for (id, _) in &active {
            let others: Vec<Active> = active.iter().filter(|(other, _)| other != id).cloned().collect();
            let (less, alone) = (case.named(&format!("less-{}", &id[..8])), case.named(&format!("alone-{}", &id[..8])));
            let base = copied.needed_base();
            copied.workspace.stdout(&format!("unmerge {} --adapter {} -o {less}{base}", copied.merged, &id[..12]));
            copied.workspace.stdout(&copied.merge_line(&others, &alone));
            assert!(copied.content(&less) == copied.content(&alone), "{}: {id}", case.name);
            assert!(copied.content(&less) != copied.content(&copied.merged), "{}: {id}", case.name);
            assert_eq!(copied.active(&less), others, "{}: {id}", case.name);
            copied.is_verified(&less);
            n_taken_out += 1;
        }
    }
    assert!(n_taken_out >= 20, "{n_taken_out}");
}

#[test]
fn more_is_merged_into_an_old_sparse_merge_in_place_and_taken_out_again() {
    let (first, both) = (&CASES[0], &CASES[1]);
    let (copied, other) = (first.copied(), both.copied());
    let one = copied.active(&copied.merged);
    let (id, _) = other.active(&other.merged).into_iter().find(|(id, _)| *id != one[0].0).unwrap();
    let adapter = other.workspace.path(&format!("{}/adapters/{id}.safetensors", other.state));
    copy(&adapter, &copied.workspace.path("more.safetensors"));
    copied.workspace.stdout(&format!("merge {} --adapter more.safetensors=-1.7 --in-place", copied.merged));
    let active = copied.active(&copied.merged);
    assert_eq!(active.len(), 2);
    copied.is_verified(&copied.merged);
    copied.workspace.stdout(&copied.merge_line(&active, "anew"));
    assert!(unnamed(copied.content("anew")) == unnamed(copied.content(&copied.merged)));
    copied.workspace.stdout(&format!("unmerge {} --adapter {id} --in-place", copied.merged));
    assert_eq!(copied.active(&copied.merged), one);
    assert!(unnamed(copied.content(&copied.merged)) == unnamed(first.copied().content("case/merged")));
    undo_in_place(&copied);
}

#[test]
fn a_flipped_bit_of_old_state_or_weights_is_found() {
    for name in ["sparse-two-in-place", "lora-hashes", "lora-originals"] {
        let case = CASES.iter().find(|case| case.name == name).unwrap();
        let copied = case.copied();
        let state = |file: &str| copied.workspace.path(&copied.state).join(file);
        let files: Vec<PathBuf> = ["ledger", "low-rank", "originals.safetensors"].into_iter().map(state).collect();
        for file in files.iter().filter(|file| file.exists()) {
            flip_last_byte_but(3, file);
            let told = copied.workspace.run(&format!("unmerge {} -o undone{}", copied.merged, copied.needed_base()));
            assert!(told.starts_with("exit: 3") || told.starts_with("exit: 4"), "{name}: {}: {told}", file.display());
            assert!(!copied.workspace.path("undone").exists(), "{name}: {}", file.display());
            flip_last_byte_but(3, file);
        }
        // The last tensor of the first shard is a touched one.
        flip_last_byte_but(1, &copied.workspace.path(&copied.merged).join("model-00001-of-00002.safetensors"));
        let told = copied.workspace.run(&format!("verify {} --base base", copied.merged));
        assert!(told.starts_with("exit: 1"), "{name}: {told}");
    }
}

fn flip_last_byte_but(n: usize, path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() - 1 - n;
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn old_changes_in_place_that_were_cut_short_are_rolled_back_or_finished() {
    for (name, base, did, n_active) in [
        ("torn-first-merge", "mixed", "rolled back", 0),
        ("torn-second-merge", "mixed", "rolled back", 1),
        ("torn-unmerge", "mixed", "rolled back", 2),
        ("torn-file", FILE, "rolled back", 0),
        ("committed-merge", "mixed", "finished", 2),
        ("committed-unmerge", "mixed", "finished", 0),
    ] {
        let case = case(name, base, n_active, Ledger);
        let copied = case.copied();
        let merged = &copied.merged;
        let told = copied.workspace.run(&format!("verify {merged}"));
        assert!(told.starts_with("exit: 6"), "{name}: {told}");
        let told = copied.workspace.run(&format!("recover {merged}"));
        assert!(told.starts_with("exit: 0") && told.contains(did), "{name}: {told}");
        let active = copied.active(merged);
        assert_eq!(active.len(), n_active, "{name}");
        for left in ["txn", "ledger.new"] {
            assert!(!copied.workspace.path(&copied.state).join(left).exists(), "{name}: {left}");
        }
        if n_active == 0 {
            assert!(copied.content(merged) == copied.base_content(), "{name}");
            continue;
        }
        copied.is_verified(merged);
        copied.workspace.stdout(&copied.merge_line(&active, "anew"));
        assert!(unnamed(copied.content("anew")) == unnamed(copied.content(merged)), "{name}");
        undo_in_place(&copied);
    }
}
