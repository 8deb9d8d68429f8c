//! Laws of packed adapters as a whole.

use std::path::Path;

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::{
    adapter::{Adapter, AdapterNotes, AdapterWriter},
    checkpoint::Existing,
    error::{ErrorKind, Failure},
    mask::{
        BaseInfo,
        samples::{Sample, sample},
    },
    tensor::Dtype,
};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

fn write(path: &Path, samples: &[Sample], seed: u64) {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f32::from((state >> 48) as i16) * 2e-6
    };
    let mut writer = AdapterWriter::create(path, Existing::Replace, Dtype::F32).unwrap();
    for (i, sample) in samples.iter().enumerate() {
        writer.store_as(DTYPES[(seed as usize).wrapping_add(i) % 3]);
        let Sample { dtype, shape, transposed, uniform_k, .. } = sample;
        writer.begin_target(&format!("t{i}"), *dtype, shape, *transposed, *uniform_k).unwrap();
        let values: Vec<f32> = (0..sample.columns.nnz()).map(|_| next()).collect();
        writer.push_rows(&sample.columns, &values, &sample.base_values).unwrap();
        writer.end_target((i == 0).then(|| blake3::hash(b"whole")));
    }
    let notes = AdapterNotes { license: Some("MIT".to_owned()), ..AdapterNotes::default() };
    writer.finish(&Context::default(), 0.75, &Recipe::custom(), &BaseInfo::default(), &notes).unwrap();
}

fn pack(from: &Path, to: &Path, values: ValuesChoice) -> PackReport {
    let options = PackOptions { values, ..PackOptions::default() };
    pack_adapter(&Context::default(), &Adapter::open(from).unwrap(), &options, to, Existing::Replace).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_packed_adapter_is_the_adapter(samples in prop::collection::vec(sample(), 1..4), seed: u64, step in 1u64..6) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (plain, packed, again, ctx) = (path("plain"), path("packed"), path("again"), Context::default());
        write(&plain, &samples, seed);
        let report = pack(&plain, &packed, ValuesChoice::Keep);
        safetensors::SafeTensors::deserialize(&std::fs::read(&packed).unwrap()).unwrap();
        let (a, b) = (Adapter::open(&plain).unwrap(), Adapter::open(&packed).unwrap());
        let id = a.id(&ctx).unwrap();
        prop_assert_eq!((b.id(&ctx).unwrap(), b.claimed_id().unwrap(), &report.id), (id, id, &id.to_string()));
        prop_assert_eq!((a.scale(), a.recipe(), a.notes(), a.targets()), (b.scale(), b.recipe(), b.notes(), b.targets()));
        for target in a.targets() {
            prop_assert_eq!(a.values_dtype(target), b.values_dtype(target));
            let mut row = 0;
            for rows in b.row_ranges(&ctx, target, step).unwrap() {
                prop_assert_eq!(rows.start, row);
                row = rows.end;
                prop_assert_eq!(a.read_rows(&ctx, target, rows.clone()).unwrap(), b.read_rows(&ctx, target, rows).unwrap());
            }
            prop_assert_eq!(row, target.layout.n_rows());
        }
        b.write_plain(&ctx, &again, Existing::Keep).unwrap();
        prop_assert!(std::fs::read(&again).unwrap() == std::fs::read(&plain).unwrap(), "byte for byte");
        // Packing what is packed changes nothing.
        pack(&packed, &again.with_extension("packed"), ValuesChoice::Keep);
        let twice = std::fs::read(again.with_extension("packed")).unwrap();
        prop_assert!(twice == std::fs::read(&packed).unwrap());
    }

    #[test]
    fn shortened_values_are_an_adapter_of_their_own(samples in prop::collection::vec(sample(), 1..3), seed: u64, choice in 0usize..4) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (plain, packed, again, ctx) = (path("plain"), path("packed"), path("again"), Context::default());
        write(&plain, &samples, seed);
        let choice = [ValuesChoice::Bf16, ValuesChoice::F16, ValuesChoice::Int8, ValuesChoice::Int4][choice];
        let report = pack(&plain, &packed, choice);
        let short = Adapter::open(&packed).unwrap();
        prop_assert_eq!(short.id(&ctx).unwrap().to_string(), report.id.clone());
        short.write_plain(&ctx, &again, Existing::Keep).unwrap();
        let (whole, again) = (Adapter::open(&plain).unwrap(), Adapter::open(&again).unwrap());
        prop_assert_eq!(again.id(&ctx).unwrap().to_string(), report.id);
        prop_assert_eq!((again.plain_bytes(), again.notes()), (short.plain_bytes(), whole.notes()));
        let (mut largest, mut n_changed) = (0.0, 0);
        for target in whole.targets() {
            let rows = 0..target.layout.n_rows();
            let before = whole.read_rows(&ctx, target, rows.clone()).unwrap();
            let after = again.read_rows(&ctx, target, rows).unwrap();
            prop_assert_eq!(&before.columns, &after.columns);
            for (a, b) in before.values.iter().zip(&after.values) {
                n_changed += u64::from(a != b);
                largest = f64::max(largest, (f64::from(*a) - f64::from(*b)).abs());
            }
        }
        let error = report.error.unwrap();
        prop_assert_eq!((error.n_changed, error.largest), (n_changed, largest));
        let most = match choice { ValuesChoice::Int4 => 0.006, ValuesChoice::Int8 => 0.0008, _ => 0.0003 };
        prop_assert!(largest <= most, "{largest}");
    }
}

/// One target `[n_rows, 300]` of rows with 3 columns, in BF16.
fn three_columns(n_rows: u64) -> Sample {
    let mut columns = RowColumns::default();
    (0..n_rows as u32).for_each(|row| columns.push_row(&[row % 90, 90 + row % 100, 200 + row * 7 % 100]));
    let shape = vec![n_rows, 300];
    let layout = crate::tensor::RowLayout::new(&shape, false).unwrap();
    let base_values = vec![1; columns.nnz() * 2];
    Sample { dtype: Dtype::BF16, shape, transposed: false, layout, uniform_k: Some(3), columns, base_values }
}

#[test]
fn rows_are_read_across_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, packed, ctx) = (folder.path().join("plain"), folder.path().join("packed"), Context::default());
    // Four blocks of 5,461 rows and one of 3.
    let n_rows = 4 * (block::BLOCK / 3) + 3;
    write(&plain, &[three_columns(n_rows)], 1);
    pack(&plain, &packed, ValuesChoice::Keep);
    let (a, b) = (Adapter::open(&plain).unwrap(), Adapter::open(&packed).unwrap());
    let target = &a.targets()[0];
    for rows in [0..n_rows, 5460..5462, 5461..5461, 10_000..21_846, n_rows - 1..n_rows, 0..1] {
        assert_eq!(a.read_rows(&ctx, target, rows.clone()).unwrap(), b.read_rows(&ctx, target, rows).unwrap());
    }
}

#[test]
fn the_same_bytes_come_from_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    write(&plain, &[three_columns(30_000), three_columns(100)], 2);
    let packed: Vec<Vec<u8>> = [1, 2, 7]
        .into_iter()
        .map(|threads| {
            let path = folder.path().join(format!("packed-{threads}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| pack(&plain, &path, ValuesChoice::Int8));
            std::fs::read(&path).unwrap()
        })
        .collect();
    assert!(packed.iter().all(|bytes| *bytes == packed[0]));
}

#[test]
fn a_damaged_file_is_refused_and_never_another_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, packed, ctx) = (folder.path().join("plain"), folder.path().join("packed"), Context::default());
    write(&plain, &[three_columns(40)], 3);
    pack(&plain, &packed, ValuesChoice::Keep);
    let id = Adapter::open(&packed).unwrap().id(&ctx).unwrap();
    let whole = std::fs::read(&packed).unwrap();
    let mut n_refused = 0;
    for at in 8..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        std::fs::write(&packed, &damaged).unwrap();
        match Adapter::open(&packed).and_then(|adapter| adapter.id(&ctx)) {
            Ok(found) => assert_eq!(found, id, "byte {at}"),
            Err(e) => {
                n_refused += 1;
                assert_eq!(e.kind(), ErrorKind::BadInput, "byte {at}: {e}");
            }
        }
    }
    // What may change and stay unnoticed is not content: white space, and what names nothing.
    assert!(n_refused * 100 > whole.len() * 80, "{n_refused} of {}", whole.len());
}

#[test]
fn a_value_that_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, packed) = (folder.path().join("plain"), folder.path().join("packed"));
    let sample = three_columns(2);
    let mut writer = AdapterWriter::create(&plain, Existing::Keep, Dtype::F32).unwrap();
    writer.begin_target("w", sample.dtype, &sample.shape, false, Some(3)).unwrap();
    writer.push_rows(&sample.columns, &[0.0, 0.0, 0.0, 0.0, 1e5, 0.0], &sample.base_values).unwrap();
    writer.end_target(None);
    let (recipe, base) = (Recipe::custom(), BaseInfo::default());
    writer.finish(&Context::default(), 1.0, &recipe, &base, &AdapterNotes::default()).unwrap();
    let options = PackOptions { values: ValuesChoice::F16, ..PackOptions::default() };
    let adapter = Adapter::open(&plain).unwrap();
    let error = pack_adapter(&Context::default(), &adapter, &options, &packed, Existing::Keep).unwrap_err();
    assert!(error.to_string().ends_with("tensor \"w\": row 1, column 91: the delta does not fit f16"), "{error}");
    assert!(!packed.exists());
}

#[test]
fn trained_values_take_their_entropy() {
    // Bell-shaped: the sum of twelve even numbers.
    let mut state = 5u64;
    let mut even = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 16_777_216.0
    };
    let n_rows = 20_000;
    let sample = three_columns(n_rows);
    let values: Vec<f32> =
        (0..3 * n_rows).map(|_| bf16::from_f32(((0..12).map(|_| even()).sum::<f32>() - 6.0) * 0.01).to_f32()).collect();
    let folder = tempfile::tempdir().unwrap();
    let (plain, packed) = (folder.path().join("plain"), folder.path().join("packed"));
    let mut writer = AdapterWriter::create(&plain, Existing::Keep, Dtype::BF16).unwrap();
    writer.begin_target("w", sample.dtype, &sample.shape, false, Some(3)).unwrap();
    writer.push_rows(&sample.columns, &values, &sample.base_values).unwrap();
    writer.end_target(None);
    let (recipe, base) = (Recipe::custom(), BaseInfo::default());
    writer.finish(&Context::default(), 1.0, &recipe, &base, &AdapterNotes::default()).unwrap();
    let report = pack(&plain, &packed, ValuesChoice::Keep);
    assert!((report.values_bytes as f64) < report.values_limit * 1.02, "{report:?}");
    assert!(report.values_limit / (3.0 * n_rows as f64) < 1.4);
    assert!((report.columns_bytes as f64) < report.columns_limit * 1.01);
}
