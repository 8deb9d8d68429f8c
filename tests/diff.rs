//! Differences between checkpoints, adapters and masks, against numbers one can check by eye and against plain loops.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeMap, fs, path::Path};

use half::bf16;
use neuroada_ckpt::{
    Adapter, Checkpoint, Context, Dtype, Existing, Io, MaskFile, MaskOptions, MergeOptions, RowColumns, create_mask,
    diff_adapters, diff_checkpoints, diff_masks,
    internals::{checkpoint::TensorFileWriter, merge},
};

#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use world::World;

fn write(path: &Path, tensors: &[(&str, Dtype, &[u64], Vec<u8>)]) -> Checkpoint {
    let mut file = TensorFileWriter::create(path, Existing::Replace).unwrap();
    for (name, dtype, shape, bytes) in tensors {
        let id = file.add_tensor((*name).to_owned(), *dtype);
        file.append(id, bytes).unwrap();
        file.finish_tensor(id, shape.to_vec());
    }
    file.finish(&Context::default(), &BTreeMap::new()).unwrap();
    Checkpoint::open(path).unwrap()
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
}

#[test]
fn tensors_added_removed_retyped_and_changed_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let a = write(
        &dir.path().join("a"),
        &[
            ("changed", Dtype::BF16, &[2, 2], bf16s(&[1.0, 2.0, 3.0, f32::NAN])),
            ("gone", Dtype::U8, &[1], vec![0]),
            ("ints", Dtype::I32, &[2], vec![0; 8]),
            ("same", Dtype::F32, &[1], vec![1, 2, 3, 4]),
            ("typed", Dtype::F32, &[1], vec![0; 4]),
        ],
    );
    let b = write(
        &dir.path().join("b"),
        &[
            ("changed", Dtype::BF16, &[2, 2], bf16s(&[1.0, -2.0, 6.0, 0.0])),
            ("ints", Dtype::I32, &[2], vec![0, 0, 0, 0, 1, 1, 0, 0]),
            ("new", Dtype::U8, &[1], vec![0]),
            ("same", Dtype::F32, &[1], vec![1, 2, 3, 4]),
            ("typed", Dtype::F32, &[1, 1], vec![0; 4]),
        ],
    );
    let diff = diff_checkpoints(&Context::default(), &a, &b).unwrap();
    assert!(!diff.equal);
    assert_eq!((diff.removed, diff.added), (vec!["gone".to_owned()], vec!["new".to_owned()]));
    assert_eq!((diff.retyped[0].tensor.as_str(), diff.retyped.len()), ("typed", 1));
    let changed = &diff.changed[0];
    assert_eq!((changed.tensor.as_str(), changed.n_changed, changed.n_not_finite), ("changed", 3, 1));
    // 2 became -2, 3 became 6: changes of -4 and 3.
    assert_eq!((changed.largest_change, changed.change_norm), (Some(4.0), Some(5.0)));
    assert_eq!(changed.norm_of_changed, Some(13f64.sqrt()));
    assert_eq!((diff.changed[1].n_changed, diff.changed[1].largest_change), (1, None));
    assert_eq!((diff.n_same, diff.n_changed_elements), (1, 4));
    assert!(diff_checkpoints(&Context::default(), &a, &a).unwrap().equal);
}

#[test]
fn a_merge_changes_what_its_report_says() {
    let world = World::new();
    let out = world.at("out");
    let inputs = [world.input(0), world.input(3)];
    let report =
        merge::merge(&Context::default(), &world.base(), &inputs, &MergeOptions::new_checkpoint(&out)).unwrap();
    let (a, b) = (Checkpoint::open(&world.base()).unwrap(), Checkpoint::open(&out).unwrap());
    let expected = diff_checkpoints(&Context::default(), &a, &b).unwrap();
    assert_eq!(expected.n_changed_elements, report.total.n_changed);
    assert_eq!(expected.changed.len(), 6);
    for (threads, max_memory, io) in [(1, 1 << 20, Io::Read), (3, 1 << 30, Io::Mapped), (8, 3 << 20, Io::Direct)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let ctx = Context { max_memory, io, ..Context::default() };
        assert_eq!(pool.install(|| diff_checkpoints(&ctx, &a, &b)).unwrap(), expected, "{threads} threads");
    }
}

#[test]
fn adapters_overlap_as_a_plain_loop_says() {
    let world = World::new();
    let ctx = Context::default();
    let [a, b] = [0, 3].map(|i| Adapter::open(&world.at(&format!("{i}.safetensors"))).unwrap());
    let diff = diff_adapters(&ctx, &a, &b).unwrap();
    assert!(!diff.equal);
    let status: Vec<_> = diff.tensors.iter().map(|tensor| (tensor.tensor.as_str(), tensor.status)).collect();
    let expected = [
        ("w.BF16", "both"),
        ("w.F16", "both"),
        ("w.F32", "both"),
        ("w.F64", "only_a"),
        ("w.F8_E4M3", "only_a"),
        ("w.F8_E5M2", "only_a"),
    ];
    assert_eq!(status, expected);
    let deltas = |adapter: &Adapter| -> BTreeMap<(usize, u32), f32> {
        let Some(target) = adapter.target("w.F16") else { return BTreeMap::new() };
        let rows = adapter.read_rows(&ctx, target, 0..target.layout.n_rows()).unwrap();
        let of_row =
            |row: usize, columns: &RowColumns| columns.row_range(row).map(move |at| (row, at)).collect::<Vec<_>>();
        (0..rows.columns.n_rows())
            .flat_map(|row| of_row(row, &rows.columns))
            .map(|(row, at)| ((row, rows.columns.columns()[at]), rows.values[at]))
            .collect()
    };
    let (of_a, of_b) = (deltas(&a), deltas(&b));
    let overlap = &diff.tensors[1].overlap;
    let shared: Vec<_> = of_a.keys().filter(|key| of_b.contains_key(key)).collect();
    assert!(shared.len() > 10, "they do overlap");
    assert_eq!(overlap.n_shared, shared.len() as u64);
    assert_eq!(
        (overlap.n_only_a, overlap.n_only_b),
        ((of_a.len() - shared.len()) as u64, (of_b.len() - shared.len()) as u64)
    );
    let conflicts = shared.iter().filter(|key| of_a[key] * of_b[key] < 0.0).count() as u64;
    assert_eq!(overlap.n_sign_conflicts, conflicts);
    let norm = |deltas: &BTreeMap<_, f32>| deltas.values().map(|&d| f64::from(d) * f64::from(d)).sum::<f64>().sqrt();
    assert!((overlap.norm_a - norm(&of_a)).abs() < 1e-12 && (overlap.norm_b - norm(&of_b)).abs() < 1e-12);
    let dot: f64 = shared.iter().map(|key| f64::from(of_a[key]) * f64::from(of_b[key])).sum();
    assert!((overlap.cosine.unwrap() - dot / norm(&of_a) / norm(&of_b)).abs() < 1e-12);
    let union = (of_a.len() + of_b.len() - shared.len()) as f64;
    assert_eq!(overlap.jaccard, shared.len() as f64 / union);

    let same = diff_adapters(&ctx, &a, &a).unwrap();
    assert!(same.equal);
    assert_eq!((same.total.jaccard, same.total.largest_difference), (1.0, 0.0));
    assert!((same.total.cosine.unwrap() - 1.0).abs() < 1e-12);
}

#[test]
fn masks_are_compared_by_position() {
    let dir = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama")).unwrap();
    let mask = |k: u64| {
        let path = dir.path().join(format!("{k}.safetensors"));
        create_mask(&Context::default(), &base, &MaskOptions::new(k), Some((&path, Existing::Keep))).unwrap();
        MaskFile::open(&path).unwrap()
    };
    let diff = diff_masks(&Context::default(), &mask(1), &mask(3)).unwrap();
    // The best is among the three best.
    assert_eq!((diff.total.n_only_a, diff.total.n_shared, diff.total.n_only_b), (0, 1216, 2432));
    assert!(!diff.equal && diff.total.cosine.is_none());
    assert!(fs::metadata(dir.path().join("1.safetensors")).unwrap().len() > 0);
}
