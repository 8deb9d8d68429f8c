//! Folders for PEFT's sparse methods: the report is about what PEFT computes with them, and what PEFT does not load is not written.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::bf16;
use neuroada_ckpt::{
    Adapter, AdapterNotes, Answers, Checkpoint, Context, ConvertError, ConvertReport, Dtype, ErrorKind, Existing,
    Failure, Format, RowColumns, WeightMap, convert,
    internals::{
        adapter::AdapterWriter,
        checkpoint::TensorFileWriter,
        mask::{BaseInfo, Recipe},
    },
};
use tempfile::TempDir;

#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

const D_IN: u64 = 16;
const D_OUT: u64 = 48;

/// A folder with a base, of one shard, and what is made of it.
struct Workspace {
    dir: TempDir,
}

impl Workspace {
    fn new(model_type: &str, tensors: &[(&str, Dtype, &[u64])]) -> Self {
        let workspace = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(workspace.at("base")).unwrap();
        fs::write(workspace.at("base/config.json"), format!("{{\"model_type\":\"{model_type}\"}}")).unwrap();
        let mut file = TensorFileWriter::create(&workspace.at("base/model.safetensors"), Existing::Keep).unwrap();
        for (name, dtype, shape) in tensors {
            let id = file.add_tensor((*name).to_owned(), *dtype);
            let n_bytes = shape.iter().product::<u64>() as usize * dtype.bitsize() / 8;
            file.append(id, &vec![0; n_bytes]).unwrap();
            file.finish_tensor(id, shape.to_vec());
        }
        file.finish(&Context::default(), &BTreeMap::new()).unwrap();
        workspace
    }
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// An adapter of two random deltas in each row as stored.
    fn adapter(&self, names: &[&str]) -> PathBuf {
        world::write_adapter(&self.at("base"), &self.at("a"), 1, names, true);
        self.at("a")
    }
    fn to(&self, format: Format, input: &Path, has_base: bool) -> Result<ConvertReport, ConvertError> {
        let base = Checkpoint::open(&self.at("base")).unwrap();
        let map = WeightMap::new(&base, Answers::default()).unwrap();
        let output = self.at(format.name());
        convert(&Context::default(), input, has_base.then_some(&map), format, &output, Existing::Replace)
    }
    /// What is said of the targets that PEFT does not take, in each format, and whether the base would tell more.
    fn refused(&self, input: &Path, has_base: bool) -> (Vec<String>, bool) {
        let refused = [Format::Shira, Format::SuperTuning].map(|format| {
            let error = self.to(format, input, has_base).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(!self.at(format.name()).exists());
            match error {
                ConvertError::NotLinear { problems, needs_base, .. } => (problems, needs_base),
                other => panic!("{other}"),
            }
        });
        assert_eq!(refused[0], refused[1]);
        refused[0].clone()
    }
}

#[test]
fn roundings_are_those_that_peft_makes() {
    let name = "model.layers.0.self_attn.q_proj.weight";
    let workspace = Workspace::new("llama", &[(name, Dtype::BF16, &[D_OUT, D_IN])]);
    let adapter = workspace.adapter(&[name]);
    let (ctx, opened) = (Context::default(), Adapter::open(&adapter).unwrap());
    let deltas = opened.read_rows(&ctx, &opened.targets()[0], 0..D_OUT).unwrap().values;
    let errors: Vec<f64> = deltas.iter().map(|&x| f64::from((bf16::from_f32(x).to_f32() - x).abs())).collect();
    let n_rounded = errors.iter().filter(|error| **error > 0.0).count() as u64;
    assert!(n_rounded > D_OUT, "most deltas are no bf16");

    // Super-Tuning: `values.to(weight.dtype)`, then `scatter_add`.
    let report = workspace.to(Format::SuperTuning, &adapter, false).unwrap();
    let tensor = &report.tensors[0];
    assert_eq!((report.exact, report.n_rounded, tensor.n_rounded), (false, n_rounded, n_rounded));
    assert_eq!((&*tensor.stored_dtype, &*tensor.applied_dtype), ("F32", "BF16"));
    assert_eq!(tensor.largest_error, errors.iter().copied().fold(0.0, f64::max));
    assert!(tensor.exactness().starts_with(&format!("{n_rounded} rounded to BF16, by ")), "{}", tensor.exactness());
    assert!(report.remarks.iter().any(|remark| remark.contains("PEFT rounds")), "{:?}", report.remarks);
    // Read again, they are rounded as PEFT does it: as many.
    let folder = workspace.at("supertuning");
    assert_eq!(workspace.to(Format::NeuroAda, &folder, true).unwrap().n_rounded, n_rounded);

    // SHiRA: a sparse float32 matrix is added, the sum is rounded.
    let report = workspace.to(Format::Shira, &adapter, false).unwrap();
    assert!(report.exact && report.tensors[0].applied_dtype == "F32", "{report:?}");
}

#[test]
fn deltas_that_peft_would_round_to_infinity_are_refused() {
    let name = "model.layers.0.mlp.up_proj.weight";
    let workspace = Workspace::new("llama", &[(name, Dtype::F16, &[D_OUT, D_IN])]);
    let base = Checkpoint::open(&workspace.at("base")).unwrap();
    let mut writer = AdapterWriter::create(&workspace.at("a"), Existing::Keep, Dtype::F32).unwrap();
    writer.begin_target(name, Dtype::F16, &[D_OUT, D_IN], false, Some(1)).unwrap();
    let mut columns = RowColumns::default();
    (0..D_OUT).for_each(|_| columns.push_row(&[3]));
    let originals = world::values_at(&base, name, &columns);
    writer.push_rows(&columns, &vec![1e6; D_OUT as usize], &originals).unwrap();
    writer.end_target(None);
    let notes = AdapterNotes::default();
    writer.finish(&Context::default(), 1.0, &Recipe::custom(), &BaseInfo::of(&base), &notes).unwrap();
    for format in [Format::SuperTuning, Format::Published] {
        let error = workspace.to(format, &workspace.at("a"), false).unwrap_err().to_string();
        assert!(error.contains("the delta 1e6 does not fit F16"), "{error}");
        assert!(!workspace.at(format.name()).exists());
    }
    assert!(workspace.to(Format::Npz, &workspace.at("a"), false).unwrap().exact);
}

#[test]
fn what_peft_does_not_take_is_listed_and_not_written() {
    let (attn, wte) = ("h.0.attn.c_attn.weight", "wte.weight");
    let workspace = Workspace::new(
        "gpt2",
        &[
            (attn, Dtype::F32, &[D_IN, D_OUT]),
            ("h.0.attn.c_attn.bias", Dtype::F32, &[D_OUT]),
            (wte, Dtype::F32, &[64, D_IN]),
        ],
    );
    let conv1d = format!("\"{attn}\": stored as [d_in, d_out], a Conv1D");
    let adapter = workspace.adapter(&[attn, wte]);
    for has_base in [false, true] {
        let expected = (vec![conv1d.clone(), format!("\"{wte}\": an embedding")], false);
        assert_eq!(workspace.refused(&adapter, has_base), expected);
    }
    // SpIEL's fork and plain coordinates are another matter.
    for format in [Format::Spiel, Format::Npz] {
        assert!(workspace.to(format, &adapter, false).unwrap().exact);
    }
}

#[test]
fn where_the_family_does_not_tell_the_base_does() {
    let name = "blocks.0.attn.c_attn.weight";
    let unknown = |shape: &[u64]| {
        Workspace::new(
            "some-new-model",
            &[(name, Dtype::F32, shape), ("blocks.0.attn.c_attn.bias", Dtype::F32, &[D_OUT])],
        )
    };
    let asked = (vec![format!("\"{name}\": nothing tells whether it is an nn.Linear or a Conv1D")], true);
    let (linear, conv1d) = (unknown(&[D_OUT, D_IN]), unknown(&[D_IN, D_OUT]));
    for workspace in [&linear, &conv1d] {
        let adapter = workspace.adapter(&[name]);
        assert_eq!(workspace.refused(&adapter, false), asked);
    }
    assert!(linear.to(Format::Shira, &linear.at("a"), true).unwrap().exact);
    let (problems, needs_base) = conv1d.refused(&conv1d.at("a"), true);
    assert!(problems[0].ends_with("a Conv1D") && !needs_base, "{problems:?}");
}

#[test]
fn weights_of_eight_bits_are_refused() {
    let name = "model.layers.0.mlp.up_proj.weight";
    let workspace = Workspace::new("llama", &[(name, Dtype::F8_E4M3, &[D_OUT, D_IN])]);
    let adapter = workspace.adapter(&[name]);
    for format in [Format::Shira, Format::SuperTuning] {
        let error = workspace.to(format, &adapter, false).unwrap_err().to_string();
        assert!(error.contains("can add to:\n") && error.ends_with("the weight is F8_E4M3"), "{error}");
    }
}
