//! Quantized weights are decoded to the numbers that the formats' own libraries decode them to.
//!
//! `fixtures/reference/quant` was recorded from those libraries; its README says which.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    Checkpoint, Context, Existing, MaskFile, MaskOptions, TensorRef, create_mask, internals::checkpoint::Shard,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// All formats.
fn formats() -> Vec<String> {
    let entries = fs::read_dir(fixtures().join("reference/quant")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !name.contains('.'));
    names.sort();
    assert_eq!(names.len(), 24);
    names
}

fn open(format: &str) -> Checkpoint {
    Checkpoint::open(&fixtures().join("quant").join(format)).unwrap()
}

fn reference(format: &str, file: &str) -> Shard {
    Shard::open(&fixtures().join("reference/quant").join(format).join(file)).unwrap()
}

/// The tensors of a reference file, with their bytes.
fn tensors(shard: &Shard) -> Vec<(String, Vec<u64>, Vec<u8>)> {
    let ctx = Context::default();
    let read = |info: &_| TensorRef::of_file(shard, info).read(&ctx, 0..TensorRef::of_file(shard, info).info.n_bytes());
    let infos = shard.header().by_name();
    infos.map(|info| (info.name.clone(), info.shape.clone(), read(info).unwrap())).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|le| f32::from_le_bytes(le.try_into().unwrap())).collect()
}

fn integers(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|le| i32::from_le_bytes(le.try_into().unwrap())).collect()
}

/// The weight that a reference calls `X.weight`; stacks that are parameters of their own are called `X`.
fn weight_of<'a>(checkpoint: &'a Checkpoint, name: &str) -> TensorRef<'a> {
    let names = [Some(name), name.strip_suffix(".weight")];
    let mut found = names.into_iter().flatten().filter_map(|name| checkpoint.weight(name).unwrap());
    found.next().unwrap_or_else(|| panic!("{}: {name}", checkpoint.name()))
}

#[test]
fn every_format_decodes_to_what_its_own_library_decodes() {
    let ctx = Context::default();
    for format in formats() {
        let checkpoint = open(&format);
        let shard = reference(&format, "dequantised.safetensors");
        let expected = tensors(&shard);
        assert!(expected.len() >= checkpoint.codes().weights().len(), "{format}");
        for (name, shape, bytes) in expected.into_iter().filter(|(name, ..)| !name.ends_with(".bfloat16")) {
            let weight = weight_of(&checkpoint, &name);
            assert!(weight.layout().is_some(), "{format}: {name}");
            assert_eq!(weight.info.shape, shape, "{format}: {name}");
            let found = floats(&weight.read(&ctx, 0..weight.info.n_bytes()).unwrap());
            let expected = floats(&bytes);
            let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "{format}: {name} is {:?}", weight.layout());
            // Any run of elements is that run of the whole.
            let n = found.len() as u64;
            let mut seed = n;
            for _ in 0..200 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let start = (seed >> 33) % n;
                let end = start + (seed >> 13) % (n - start).min(300) + 1;
                let run = floats(&weight.read(&ctx, 4 * start..4 * end).unwrap());
                assert!(run == found[start as usize..end as usize], "{format}: {name} [{start}..{end}]");
            }
        }
    }
}

#[test]
fn masks_choose_the_largest_decoded_values() {
    let (ctx, folder) = (Context::default(), tempfile::tempdir().unwrap());
    for format in formats() {
        let checkpoint = open(&format);
        for (name, shape, bytes) in tensors(&reference(&format, "topk.safetensors")) {
            let (weight, k) = name.rsplit_once(".k").unwrap();
            let k: u64 = k.parse().unwrap();
            let path = folder.path().join(format!("{format}-{name}"));
            let weight = weight_of(&checkpoint, weight).info.name.clone();
            let options = MaskOptions { targets: vec![weight], ..MaskOptions::new(k) };
            let output = Some((path.as_path(), Existing::Keep));
            create_mask(&ctx, &checkpoint, &options, output).unwrap_or_else(|e| panic!("{format}: {name}: {e}"));
            let mask = MaskFile::open(&path).unwrap();
            let target = &mask.targets()[0];
            let columns = mask.read_columns(&ctx, target, 0..target.layout.n_rows()).unwrap();
            let n_rows: u64 = shape[..shape.len() - 1].iter().product();
            assert_eq!(columns.n_rows() as u64, n_rows, "{format}: {name}");
            for (row, expected) in integers(&bytes).chunks_exact(*shape.last().unwrap() as usize).enumerate() {
                let mut expected: Vec<u32> = expected.iter().map(|&column| column as u32).collect();
                expected.sort_unstable();
                assert_eq!(columns.row(row), expected, "{format}: {name}, row {row}");
            }
        }
    }
}
