//! The delta between two checkpoints: merged, it gives the tuned one, or the list of what it cannot hold is right.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeMap, fs, path::Path};

use half::{bf16, f16};
use neuroada_ckpt::{
    Adapter, Checkpoint, Context, Dtype, ErrorKind, Existing, ExtractError, ExtractOptions, ExtractReport, Failure, Io,
    MergeInput, MergeOptions, MergeOutput, extract,
    internals::{
        checkpoint::TensorFileWriter,
        merge,
        tensor::{F8E4M3, F8E5M2, Float},
    },
};
use proptest::prelude::*;

#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use world::{Random, World};

type Tensor<'a> = (&'a str, Dtype, &'a [u64], Vec<u8>);

fn write(path: &Path, tensors: &[Tensor<'_>]) -> Checkpoint {
    let mut file = TensorFileWriter::create(path, Existing::Replace).unwrap();
    for (name, dtype, shape, bytes) in tensors {
        let id = file.add_tensor((*name).to_owned(), *dtype);
        file.append(id, bytes).unwrap();
        file.finish_tensor(id, shape.to_vec());
    }
    file.finish(&Context::default(), &BTreeMap::new()).unwrap();
    Checkpoint::open(path).unwrap()
}

/// Every option that could refuse a sparse change is open.
fn all() -> ExtractOptions {
    ExtractOptions { max_density: 1.0, ..ExtractOptions::default() }
}

/// Extracts to `delta` beside `base`, merges that into `base`, and returns the merged file's bytes.
fn there_and_back(
    base: &Checkpoint,
    tuned: &Checkpoint,
    options: &ExtractOptions,
) -> Result<(ExtractReport, Vec<u8>), ExtractError> {
    let folder = base.root().parent().unwrap();
    let (delta, merged) = (folder.join("delta"), folder.join("merged.safetensors"));
    let ctx = Context::default();
    let report = extract(&ctx, base, tuned, options, Some((&delta, Existing::Replace)))?;
    let input = MergeInput { adapter: delta, scale: None };
    let output = MergeOutput::New {
        path: merged.clone(),
        existing: Existing::Replace,
        ledger: false,
        link: false,
        resume: false,
    };
    merge::merge(&ctx, base.root(), &[input], &MergeOptions::to(output)).unwrap();
    Ok((report, fs::read(merged).unwrap()))
}

fn bytes_of<T: Float>(values: &[T]) -> Vec<u8> {
    let mut le = [0; 8];
    let mut bytes = Vec::new();
    for value in values {
        value.write_le(&mut le);
        bytes.extend_from_slice(&le[..T::BYTES]);
    }
    bytes
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    bytes_of(&values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>())
}

/// Weights of a model, and edits as training makes them: of about the weights' size, or smaller.
fn round_to(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => bytes_of(values),
        Dtype::BF16 => bf16s(values),
        Dtype::F16 => bytes_of(&values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>()),
        Dtype::F8_E4M3 => bytes_of(&values.iter().map(|&v| F8E4M3::from_f32(v)).collect::<Vec<_>>()),
        _ => bytes_of(&values.iter().map(|&v| F8E5M2::from_f32(v)).collect::<Vec<_>>()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn merging_what_was_extracted_gives_the_tuned_bytes(
        dtype in prop::sample::select(vec![Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E4M3, Dtype::F8_E5M2]),
        seed: u64,
        n_rows in 1u64..20,
        d_in in 1u64..40,
        transposed: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(seed);
        let n = (n_rows * d_in) as usize;
        let weights: Vec<f32> = (0..n).map(|_| random.delta() * 4.0).collect();
        let mut tuned = weights.clone();
        for _ in 0..1 + random.below(n as u64) {
            let at = random.below(n as u64) as usize;
            // An f32 sum cannot end much below its parts; what can be reached is the business of another test.
            tuned[at] = if dtype == Dtype::F32 { weights[at] * (1.0 + random.delta()) } else { random.delta() * 4.0 };
        }
        let [a, b] = [("a", weights), ("b", tuned)].map(|(name, values)| {
            let bytes = round_to(dtype, &values);
            write(&dir.path().join(format!("{name}.safetensors")), &[("w", dtype, &[n_rows, d_in], bytes)])
        });
        let transposed = if transposed { vec!["w".to_owned()] } else { Vec::new() };
        match there_and_back(&a, &b, &ExtractOptions { transposed, ..all() }) {
            Ok((report, merged)) => {
                prop_assert!(report.exact);
                prop_assert!(merged == fs::read(b.root()).unwrap());
            }
            Err(error) => prop_assert!(fs::read(a.root()).unwrap() == fs::read(b.root()).unwrap(), "{error}"),
        }
    }

    #[test]
    fn any_bits_are_extracted_exactly_or_refused(
        dtype in prop::sample::select(vec![Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E4M3, Dtype::F8_E5M2]),
        seed: u64,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(seed);
        let weights: Vec<u8> = (0..30 * dtype.bitsize() / 8).map(|_| random.next() as u8).collect();
        let mut tuned = weights.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(weights.len() as u64) as usize;
            tuned[at] = tuned[at].wrapping_add(1 << random.below(4));
        }
        let [a, b] = [("a", weights), ("b", tuned)].map(|(name, bytes)| {
            write(&dir.path().join(format!("{name}.safetensors")), &[("w", dtype, &[5, 6], bytes)])
        });
        match there_and_back(&a, &b, &all()) {
            Ok((_, merged)) => prop_assert!(merged == fs::read(b.root()).unwrap()),
            Err(error) => {
                prop_assert!(matches!(error, ExtractError::Unfit { .. } | ExtractError::Same { .. }), "{error}");
                prop_assert!(!dir.path().join("delta").exists());
            }
        }
    }
}

#[test]
fn each_tensor_gets_the_narrowest_type_that_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, wide: f32, narrow: f32| {
        let tensors = [
            ("halves", Dtype::F32, &[1u64, 2][..], bytes_of(&[0.5f32, narrow])),
            ("same", Dtype::F32, &[2], bytes_of(&[1.0f32, 2.0])),
            ("thirds", Dtype::F32, &[1, 2], bytes_of(&[wide, 1.0f32])),
        ];
        write(&dir.path().join(name), &tensors)
    };
    let (a, b) = (file("a.safetensors", 0.0, 1.0), file("b.safetensors", 1.0 / 3.0, 1.5));
    let (report, merged) = there_and_back(&a, &b, &ExtractOptions { max_density: 1.0, ..all() }).unwrap();
    assert!(merged == fs::read(b.root()).unwrap());
    let types: Vec<_> = report.tensors.iter().map(|t| (t.tensor.as_str(), t.values_dtype.as_str())).collect();
    assert_eq!(types, [("halves", "BF16"), ("thirds", "F32")]);
    assert_eq!((report.n_same, report.total.n_deltas), (1, 2));
    // Asked for a type that cannot, the tensors are listed.
    let error = there_and_back(&a, &b, &ExtractOptions { dtype: Some(Dtype::F16), ..all() }).unwrap_err();
    let words = error.to_string();
    assert!(words.contains("\"thirds\": no F16 delta gives 1 of its elements exactly"), "{words}");
    assert!(!words.contains("halves"), "{words}");
}

#[test]
fn what_no_delta_can_do_is_refused_all_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, tiny: f32, nan: f32, zero: f32, dense: f32| {
        let tensors = [
            ("box", Dtype::BF16, &[1u64, 1, 1, 2][..], bf16s(&[1.0, dense])),
            ("cancelled", Dtype::F32, &[2, 2], bytes_of(&[1.0f32, 1.0, 1.0, tiny])),
            ("dense", Dtype::BF16, &[2, 2], bf16s(&[dense, dense, 7.0, dense])),
            ("ids", Dtype::I64, &[1], (dense as i64).to_le_bytes().to_vec()),
            ("nan", Dtype::BF16, &[2, 2], bf16s(&[1.0, 1.0, 1.0, nan])),
            ("signed", Dtype::F32, &[2, 2], bytes_of(&[1.0f32, zero, 1.0, 1.0])),
            ("fine", Dtype::BF16, &[2, 2], bf16s(&[1.0, 1.0, dense, 1.0])),
        ];
        write(&dir.path().join(name), &tensors)
    };
    let a = file("a.safetensors", 1.0, 1.0, 0.0, 1.0);
    let b = file("b.safetensors", 1e-10, f32::NAN, -0.0, 2.0);
    let options = ExtractOptions { max_density: 0.5, ..ExtractOptions::default() };
    let error = there_and_back(&a, &b, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let words = error.to_string();
    let lines: Vec<_> = words.lines().skip(1).map(str::trim).collect();
    let expected = [
        "\"box\": changed, and shape [1, 1, 1, 2] is neither a vector, a matrix nor a stack of matrices",
        "\"cancelled\": no F32 delta gives 1 of its elements exactly, the first in row 1, column 1, from 1e0 to 1.000000013351432e-10",
        "\"dense\": 75.000 % of 4 elements would get a delta, at most 50.000 % may",
        "\"ids\": changed, and elements are I64, expected F64, F32, F16, BF16, F8_E4M3 or F8_E5M2",
        "\"nan\": 1 changed elements are NaN or infinite, the first in row 1",
        "\"signed\": no F32 delta gives 1 of its elements exactly, the first in row 0, column 1, from 0e0 to -0e0",
    ];
    assert_eq!(lines, expected);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing was written");

    // Chosen targets are exact for themselves, and the rest is told.
    let options = ExtractOptions { targets: vec!["fine".to_owned()], ..options };
    let (report, merged) = there_and_back(&a, &b, &options).unwrap();
    assert_eq!((report.exact, report.left_out.len(), report.total.n_deltas), (false, 6, 1));
    let merged_file = dir.path().join("merged.safetensors");
    fs::write(&merged_file, merged).unwrap();
    let (merged, fine) = (Checkpoint::open(&merged_file).unwrap(), bf16s(&[1.0, 1.0, 2.0, 1.0]));
    assert_eq!(*merged.tensor("fine").unwrap().window(&Context::default(), 0..8).unwrap(), fine[..]);
}

#[test]
fn vectors_take_part_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, x: f32| {
        let tensors = [
            ("bias", Dtype::F32, &[3u64][..], bytes_of(&[x, 2.0 * x, 3.0])),
            ("norm", Dtype::BF16, &[2], bf16s(&[x, -x])),
            ("w", Dtype::BF16, &[2, 4], bf16s(&[x, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])),
        ];
        write(&dir.path().join(name), &tensors)
    };
    let (a, b) = (file("a.safetensors", 1.0), file("b.safetensors", 1.25));
    // The highest density is that of matrices.
    let options = ExtractOptions { max_density: 0.125, ..all() };
    let (report, merged) = there_and_back(&a, &b, &options).unwrap();
    assert!(report.exact && merged == fs::read(b.root()).unwrap());
    let deltas: Vec<_> = report.tensors.iter().map(|tensor| (tensor.tensor.as_str(), tensor.n_deltas)).collect();
    assert_eq!(deltas, [("bias", 2), ("norm", 2), ("w", 1)]);

    let options = ExtractOptions { targets: vec!["*a*".to_owned(), "norm".to_owned()], ..options };
    let (report, _) = there_and_back(&a, &b, &options).unwrap();
    assert_eq!((report.total.n_deltas, report.left_out.len()), (4, 1), "{report:?}");

    // Nothing is chosen among one element, and what is not finite is refused as in a matrix.
    let (report, _) = there_and_back(&a, &b, &ExtractOptions { k: Some(1), ..all() }).unwrap();
    let left_out: Vec<_> = report.left_out.iter().map(|left| left.why.as_str()).collect();
    let expected = [
        "shape [3] is neither a matrix nor a stack of matrices",
        "shape [2] is neither a matrix nor a stack of matrices",
    ];
    assert_eq!((report.total.n_deltas, &left_out[..]), (1, &expected[..]));
    let error = there_and_back(&a, &file("c.safetensors", f32::INFINITY), &all()).unwrap_err().to_string();
    assert!(error.contains("\"norm\": 2 changed elements are NaN or infinite, the first in row 0"), "{error}");
}

#[test]
fn checkpoints_of_other_tensors_are_refused_with_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let a = write(
        &dir.path().join("a"),
        &[("gone", Dtype::F32, &[1, 1], vec![0; 4]), ("w", Dtype::F32, &[1, 2], vec![0; 8])],
    );
    let b = write(
        &dir.path().join("b"),
        &[("new", Dtype::F32, &[1, 1], vec![0; 4]), ("w", Dtype::F32, &[2, 1], vec![0; 8])],
    );
    let error = extract(&Context::default(), &a, &b, &all(), None).unwrap_err();
    let expected = "no adapter can make it from a:\n  \"gone\" was removed\n  \"w\": F32 [1, 2] became F32 [2, 1]\n  \"new\" was added";
    assert!(error.to_string().ends_with(expected), "{error}");
    assert_eq!(error.kind(), ErrorKind::Refused);
    let error = extract(&Context::default(), &a, &a, &all(), None).unwrap_err();
    assert!(matches!(error, ExtractError::Same { .. }), "{error}");
}

#[test]
fn the_largest_changes_of_each_row() {
    let dir = tempfile::tempdir().unwrap();
    let a = write(&dir.path().join("a.safetensors"), &[("w", Dtype::F32, &[3, 4], bytes_of(&[0.0f32; 12]))]);
    let changes = [0.5f32, -3.0, 3.0, 4.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let b = write(&dir.path().join("b.safetensors"), &[("w", Dtype::F32, &[3, 4], bytes_of(&changes))]);
    let (report, merged) = there_and_back(&a, &b, &ExtractOptions { k: Some(2), ..all() }).unwrap();
    // Of equal changes the lower column is kept; the last row did not change.
    let kept = [0.0f32, -3.0, 0.0, 4.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    assert!(merged.ends_with(&bytes_of(&kept)));
    let total = &report.total;
    assert_eq!((total.n_changed, total.n_deltas, report.n_inexact, report.exact), (7, 4, 0, false));
    assert_eq!((total.norm.powi(2).round(), total.norm_lost.powi(2)), (37.0, 10.25));
    // A k beyond what changed is everything.
    let (report, merged) = there_and_back(&a, &b, &ExtractOptions { k: Some(9), ..all() }).unwrap();
    assert!(report.exact && merged == fs::read(b.root()).unwrap());
    let error = there_and_back(&a, &b, &ExtractOptions { k: Some(0), ..all() }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn a_merged_adapter_comes_back_whatever_threads_and_memory() {
    let world = World::new();
    let ctx = Context::default();
    let out = world.at("out");
    merge::merge(&ctx, &world.base(), &[world.input(3)], &MergeOptions::new_checkpoint(&out)).unwrap();
    let (a, b) = (Checkpoint::open(&world.base()).unwrap(), Checkpoint::open(&out).unwrap());
    let options = ExtractOptions { targets: vec!["w.BF16".to_owned(), "w.F16".to_owned()], k: Some(1), ..all() };
    let mut seen: Option<(ExtractReport, Vec<u8>)> = None;
    for (threads, max_memory, io) in [(1, 1 << 20, Io::Read), (3, 1 << 30, Io::Mapped), (8, 3 << 20, Io::Auto)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let ctx = Context { max_memory, io, ..Context::default() };
        let path = world.at("delta");
        let output = Some((&*path, Existing::Replace));
        let report = pool.install(|| extract(&ctx, &a, &b, &options, output));
        let Ok(report) = report else { panic!("{:?}", report.unwrap_err().to_string()) };
        let found = (report, fs::read(&path).unwrap());
        assert_eq!(seen.get_or_insert_with(|| found.clone()), &found, "{threads} threads");
    }
    let adapter = Adapter::open(&world.at("delta")).unwrap();
    assert_eq!((adapter.recipe().score.as_str(), adapter.recipe().k), ("extracted", Some(1)));
}
