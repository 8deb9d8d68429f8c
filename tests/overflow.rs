//! Merges that would make finite weights infinite are refused before anything is written, and deltas of no plausible size are warned
//! about; neither stands in the way of undoing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use half::f16;
use neuroada_ckpt::{
    Adapter, AdapterNotes, Checkpoint, Context, Dtype, ErrorKind, Existing, Failure, MergeError, MergeInput,
    MergeOptions, MergeReport, Observer, RowColumns, VerifyOptions, Which,
    internals::{
        adapter::AdapterWriter,
        checkpoint::TensorFileWriter,
        mask::{BaseInfo, Recipe},
        merge,
    },
};

#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use world::{tree, values_at};

/// A folder with a base of two float16 tensors, `a` and `b`, `[4, 8]`, all 1.5 but `[2, 3]`, which is `large`.
struct Workspace(tempfile::TempDir);

impl Workspace {
    fn new(large: f32) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let base = dir.path().join("base");
        fs::create_dir(&base).unwrap();
        fs::write(base.join("config.json"), "{\"tie_word_embeddings\":false}").unwrap();
        let mut file = TensorFileWriter::create(&base.join("model.safetensors"), Existing::Keep).unwrap();
        for name in ["a.weight", "b.weight"] {
            let id = file.add_tensor(name.to_owned(), Dtype::F16);
            let value = |at| f16::from_f32(if at == 2 * 8 + 3 { large } else { 1.5 });
            file.append(id, &(0..32).flat_map(|at| value(at).to_le_bytes()).collect::<Vec<u8>>()).unwrap();
            file.finish_tensor(id, vec![4, 8]);
        }
        file.finish(&Context::default(), &BTreeMap::new()).unwrap();
        Self(dir)
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn base(&self) -> PathBuf {
        self.path("base")
    }

    /// A sparse adapter with `delta` at column 3 of every row of `tensor`, or at column 4.
    fn sparse(&self, name: &str, tensor: &str, column: u32, delta: f32) -> MergeInput {
        let (base, path) = (Checkpoint::open(&self.base()).unwrap(), self.path(name));
        let columns = RowColumns::uniform(vec![column; 4], 1);
        let mut writer = AdapterWriter::create(&path, Existing::Replace, Dtype::F32).unwrap();
        writer.begin_target(tensor, Dtype::F16, &[4, 8], false, Some(1)).unwrap();
        writer.push_rows(&columns, &[delta; 4], &values_at(&base, tensor, &columns)).unwrap();
        writer.end_target(None);
        let notes = AdapterNotes::default();
        writer.finish(&Context::default(), 1.0, &Recipe::custom(), &BaseInfo::of(&base), &notes).unwrap();
        MergeInput { adapter: path, scale: None }
    }

    /// A LoRA adapter of rank 1 on `b`: every delta is `value`, but for those of row 2, which are `of_row_2`.
    fn lora(&self, value: f32, of_row_2: f32) -> MergeInput {
        let folder = self.path("lora");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("adapter_config.json"), r#"{"peft_type":"LORA","r":1,"lora_alpha":1}"#).unwrap();
        let path = folder.join("adapter_model.safetensors");
        let mut file = TensorFileWriter::create(&path, Existing::Replace).unwrap();
        let factors = [("A", vec![1u64, 8], vec![1.0; 8]), ("B", vec![4, 1], vec![value, value, of_row_2, value])];
        for (factor, shape, values) in factors {
            let id = file.add_tensor(format!("base_model.model.b.lora_{factor}.weight"), Dtype::F32);
            file.append(id, &values.iter().flat_map(|value: &f32| value.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
            file.finish_tensor(id, shape);
        }
        file.finish(&Context::default(), &BTreeMap::new()).unwrap();
        MergeInput { adapter: folder, scale: None }
    }

    fn merge_lora(&self, ctx: &Context<'_>, input: MergeInput, allow: bool) -> Result<MergeReport, MergeError> {
        let options = MergeOptions { allow_overflow: allow, ..MergeOptions::new_checkpoint(self.path("out")) };
        merge::merge(ctx, &self.base(), &[input], &options)
    }
}

/// Remembers the passes of a command.
#[derive(Default)]
struct Passes(Mutex<Vec<String>>);

impl Observer for Passes {
    fn begin(&self, what: &str, _bytes: u64) {
        self.0.lock().unwrap().push(what.to_owned());
    }
    fn advance(&self, _bytes: u64) {}
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl Passes {
    fn have(&self, pass: &str) -> bool {
        self.0.lock().unwrap().iter().any(|begun| begun == pass)
    }
}

fn merge_to(path: &Path, inputs: &[MergeInput], options: &MergeOptions<'_>) -> Result<MergeReport, MergeError> {
    merge::merge(&Context::default(), path, inputs, options)
}

#[track_caller]
fn assert_overflow(error: &MergeError, expected: (&str, u64, u64, u64)) {
    let MergeError::Overflow { tensor, row, column, n_overflowed, .. } = error else { panic!("{error}") };
    assert_eq!((tensor.as_str(), *row, *column, *n_overflowed), expected, "{error}");
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[test]
fn a_sparse_merge_that_overflows_is_refused_before_anything_is_written() {
    let workspace = Workspace::new(65504.0);
    let inputs = [
        workspace.sparse("1.safetensors", "b.weight", 3, 50.0),
        workspace.sparse("2.safetensors", "a.weight", 3, 16.0),
    ];
    let before = tree(workspace.0.path());
    let mut options = MergeOptions::new_checkpoint(workspace.path("out"));
    let passes = Passes::default();
    let ctx = Context { observer: &passes, ..Context::default() };
    let error = merge::merge(&ctx, &workspace.base(), &inputs, &options).unwrap_err();
    assert_overflow(&error, ("a.weight", 2, 3, 2));
    assert!(passes.have("checking") && !passes.have("merging"), "nothing was copied");
    assert!(error.to_string().contains("\"a.weight\" [2, 3]") && error.to_string().ends_with("and 1 more"), "{error}");
    assert_overflow(
        &merge_to(&workspace.base(), &inputs, &MergeOptions::in_place()).unwrap_err(),
        ("a.weight", 2, 3, 2),
    );
    options.dry_run = true;
    assert_overflow(&merge_to(&workspace.base(), &inputs, &options).unwrap_err(), ("a.weight", 2, 3, 2));
    assert!(tree(workspace.0.path()) == before);

    options = MergeOptions { allow_overflow: true, ..MergeOptions::new_checkpoint(workspace.path("out")) };
    assert_eq!(merge_to(&workspace.base(), &inputs, &options).unwrap().total.n_overflowed, 2);
    assert!(merge::verify(&Context::default(), &workspace.path("out"), &VerifyOptions::default()).unwrap().ok);
    merge::unmerge(&Context::default(), &workspace.path("out"), &Which::All, &MergeOptions::in_place()).unwrap();
    assert!(tree(&workspace.path("out")) == tree(&workspace.base()), "what was let in comes out");
}

#[test]
fn a_sum_below_half_a_unit_neither_overflows_nor_costs_a_pass() {
    let workspace = Workspace::new(65504.0);
    let passes = Passes::default();
    let ctx = Context { observer: &passes, ..Context::default() };
    let input = workspace.sparse("1.safetensors", "b.weight", 3, 7.9);
    let report =
        merge::merge(&ctx, &workspace.base(), &[input], &MergeOptions::new_checkpoint(workspace.path("out"))).unwrap();
    assert_eq!((report.total.n_overflowed, passes.have("merging"), passes.have("checking")), (0, true, false));
}

#[test]
fn taking_an_adapter_out_is_never_refused_for_an_overflow() {
    let workspace = Workspace::new(30000.0);
    let up = workspace.sparse("up.safetensors", "b.weight", 3, 50000.0);
    let down = workspace.sparse("down.safetensors", "b.weight", 3, -50000.0);
    let down_id = Adapter::open(&down.adapter).unwrap().id(&Context::default()).unwrap();
    let out = workspace.path("out");
    merge_to(&workspace.base(), &[up, down], &MergeOptions::new_checkpoint(&out)).unwrap();
    let which = Which::Some(vec![down_id]);
    let copy = MergeOptions::new_checkpoint(workspace.path("copy"));
    let report = merge::unmerge(&Context::default(), &out, &which, &copy).unwrap();
    assert_eq!(report.total.n_overflowed, 1);
    merge::unmerge(&Context::default(), &out, &which, &MergeOptions::in_place()).unwrap();
    merge::unmerge(&Context::default(), &out, &Which::All, &MergeOptions::in_place()).unwrap();
    assert!(tree(&out) == tree(&workspace.base()));
}

#[test]
fn a_later_adapter_does_not_answer_for_an_overflow_that_was_allowed() {
    let workspace = Workspace::new(65504.0);
    let out = workspace.path("out");
    let allowed = MergeOptions { allow_overflow: true, ..MergeOptions::new_checkpoint(&out) };
    merge_to(&workspace.base(), &[workspace.sparse("1.safetensors", "b.weight", 3, 50.0)], &allowed).unwrap();
    let later = workspace.sparse("2.safetensors", "b.weight", 4, 0.5);
    let report = merge_to(&out, &[later], &MergeOptions::in_place()).unwrap();
    assert_eq!(report.total.n_overflowed, 1, "it is still there");
}

#[test]
fn a_lora_merge_that_overflows_is_refused_before_anything_is_written() {
    let workspace = Workspace::new(65504.0);
    let passes = Passes::default();
    let ctx = Context { observer: &passes, ..Context::default() };
    let input = workspace.lora(0.5, 40.0);
    let before = tree(workspace.0.path());
    assert_overflow(&workspace.merge_lora(&ctx, input.clone(), false).unwrap_err(), ("b.weight", 2, 3, 1));
    assert!(passes.have("checking") && !passes.have("merging"), "nothing was copied");
    assert!(tree(workspace.0.path()) == before);

    assert_eq!(workspace.merge_lora(&ctx, input, true).unwrap().total.n_overflowed, 1);
    let base = workspace.base();
    let undone = MergeOptions { base: Some(base.clone()), ..MergeOptions::new_checkpoint(workspace.path("undone")) };
    merge::unmerge(&Context::default(), &workspace.path("out"), &Which::All, &undone).unwrap();
    assert!(tree(&workspace.path("undone")) == tree(&base));
}

#[test]
fn an_ordinary_lora_merge_is_one_pass_without_warnings() {
    let workspace = Workspace::new(65504.0);
    let passes = Passes::default();
    let ctx = Context { observer: &passes, ..Context::default() };
    let report = workspace.merge_lora(&ctx, workspace.lora(0.5, 7.9), false).unwrap();
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    assert!(passes.have("merging") && !passes.have("checking"));
}

#[test]
fn a_flipped_exponent_bit_is_warned_about() {
    let flipped = f32::from_bits(0.01f32.to_bits() ^ 1 << 30);
    assert!(flipped > 1e36);
    let workspace = Workspace::new(1.0);
    let ctx = Context::default();
    // On float16 weights such a delta overflows; where that is allowed, the warning remains.
    let input = workspace.sparse("1.safetensors", "b.weight", 3, flipped);
    let id = Adapter::open(&input.adapter).unwrap().id(&ctx).unwrap().short();
    let mut options = MergeOptions { allow_overflow: true, ..MergeOptions::new_checkpoint(workspace.path("sparse")) };
    let expected =
        format!("warning: adapter {id}: tensor \"b.weight\": deltas of up to 3.4e36 on weights of at most 1.5e0");
    for dry_run in [true, false] {
        options.dry_run = dry_run;
        let report = merge_to(&workspace.base(), std::slice::from_ref(&input), &options).unwrap();
        assert!(report.notes.len() == 1 && report.notes[0].starts_with(&expected), "{:?}", report.notes);
    }
    let removed = merge::unmerge(&ctx, &workspace.path("sparse"), &Which::All, &MergeOptions::in_place()).unwrap();
    assert!(removed.notes.is_empty(), "{:?}", removed.notes);

    let report = workspace.merge_lora(&ctx, workspace.lora(0.01, flipped), true).unwrap();
    let words = "tensor \"b.weight\": deltas of up to 3.4e36 on weights of at most 1.5e0";
    assert!(report.notes.len() == 1 && report.notes[0].contains(words), "{:?}", report.notes);
    assert!(report.notes[0].starts_with("warning: adapter "), "{:?}", report.notes);
}

#[test]
fn a_scale_that_turns_zero_deltas_into_nan_is_refused() {
    let workspace = Workspace::new(1.0);
    let input = MergeInput { scale: Some(1e300), ..workspace.sparse("1.safetensors", "b.weight", 3, 0.0) };
    let error =
        merge_to(&workspace.base(), &[input], &MergeOptions::new_checkpoint(workspace.path("out"))).unwrap_err();
    assert_overflow(&error, ("b.weight", 0, 3, 4));
}
