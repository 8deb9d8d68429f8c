//! Other tools' adapters against what those tools made of them.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::bf16;
use neuroada_ckpt::{
    Adapter, AdapterNotes, Answers, Checkpoint, Context, ConvertError, ConvertReport, Dtype, ErrorKind, Existing,
    Failure, Format, MergeInput, MergeOptions, RowColumns, WeightMap, convert,
    internals::{
        adapter::AdapterWriter,
        checkpoint::{TensorFileWriter, gather_rows},
        mask::{BaseInfo, Recipe},
        merge,
    },
};
use tempfile::TempDir;

#[allow(dead_code, reason = "shared with the tests that merge")]
#[path = "support/world.rs"]
mod world;

use world::Random;

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/reference").join(name)
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

/// The reference model, its weights rounded to bf16 as torch rounds them.
fn bf16_model(folder: &Path) -> PathBuf {
    let path = folder.join("base-bf16");
    fs::create_dir(&path).unwrap();
    let ctx = Context::default();
    let mut file = TensorFileWriter::create(&path.join("model.safetensors"), Existing::Keep).unwrap();
    for tensor in open(&reference("model/llama")).tensors() {
        let wide = tensor.window(&ctx, 0..tensor.info.n_bytes()).unwrap();
        let id = file.add_tensor(tensor.info.name.clone(), Dtype::BF16);
        let narrow: Vec<u8> = wide
            .chunks_exact(4)
            .flat_map(|le| bf16::from_f32(f32::from_le_bytes(le.try_into().unwrap())).to_le_bytes())
            .collect();
        file.append(id, &narrow).unwrap();
        file.finish_tensor(id, tensor.info.shape.clone());
    }
    file.finish(&ctx, &BTreeMap::new()).unwrap();
    path
}

fn to(format: Format, input: &Path, base: Option<&Path>, output: &Path) -> Result<ConvertReport, ConvertError> {
    let base = base.map(open);
    let map = base.as_ref().map(|base| WeightMap::new(base, Answers::default()).unwrap());
    convert(&Context::default(), input, map.as_ref(), format, output, Existing::Keep)
}

/// BLAKE3 of each tensor of `base` with `adapter` in it.
fn merged_digests(base: &Path, adapter: &Path) -> BTreeMap<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let (ctx, output) = (Context::default(), dir.path().join("merged"));
    let input = MergeInput { adapter: adapter.to_owned(), scale: None };
    merge::merge(&ctx, base, &[input], &MergeOptions::new_checkpoint(&output)).unwrap();
    let digest = |tensor: neuroada_ckpt::TensorRef<'_>| {
        let bytes = tensor.window(&ctx, 0..tensor.info.n_bytes()).unwrap();
        (tensor.info.name.clone(), blake3::hash(&bytes).to_string())
    };
    open(&output).tensors().map(digest).collect()
}

/// Digests of the tensors that the reference tool left behind.
fn expected_digests(name: &str) -> BTreeMap<String, String> {
    serde_json::from_slice(&fs::read(reference(name)).unwrap()).unwrap()
}

struct Workspace {
    dir: TempDir,
    base: PathBuf,
}

impl Workspace {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = bf16_model(dir.path());
        Self { dir, base }
    }
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn the_published_files_merge_to_the_weights_of_the_published_code() {
    let workspace = Workspace::new();
    let adapter = workspace.at("adapter.safetensors");
    let report = to(Format::NeuroAda, &reference("convert/published"), Some(&workspace.base), &adapter).unwrap();
    assert!(report.exact && report.n_entries == 3456 && report.n_written == 3456);
    let merged = merged_digests(&workspace.base, &adapter);
    for (name, expected) in expected_digests("convert/published/expected.json") {
        assert_eq!(merged[&name], expected, "{name}");
    }
    // Two of each row, as the published code chooses them.
    assert!(Adapter::open(&adapter).unwrap().targets().iter().all(|target| target.uniform_k == Some(2)));
}

#[test]
fn through_the_published_format_and_back_an_adapter_is_the_same() {
    let workspace = Workspace::new();
    let [first, again] = ["first.safetensors", "again.safetensors"].map(|name| workspace.at(name));
    to(Format::NeuroAda, &reference("convert/published"), Some(&workspace.base), &first).unwrap();
    to(Format::Published, &first, None, &workspace.at("published")).unwrap();
    to(Format::NeuroAda, &workspace.at("published"), Some(&workspace.base), &again).unwrap();
    assert!(fs::read(&first).unwrap() == fs::read(&again).unwrap());
    // From one foreign format to another, with an adapter between them.
    to(Format::Npz, &workspace.at("published"), Some(&workspace.base), &workspace.at("a.npz")).unwrap();
    to(Format::Npz, &again, None, &workspace.at("b.npz")).unwrap();
    assert!(fs::read(workspace.at("a.npz")).unwrap() == fs::read(workspace.at("b.npz")).unwrap());
}

#[test]
fn coordinates_keep_every_delta() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let base = at("base");
    world::write_checkpoint(&base);
    let names = ["w.F64", "w.F32", "w.F16", "w.BF16", "w.F8_E4M3"];
    world::write_adapter(&base, &at("a.safetensors"), 3, &names, false);
    let report = to(Format::Npz, &at("a.safetensors"), None, &at("a.npz")).unwrap();
    assert!(report.exact);
    to(Format::NeuroAda, &at("a.npz"), Some(&base), &at("b.safetensors")).unwrap();
    let ctx = Context::default();
    let [a, b] = ["a.safetensors", "b.safetensors"].map(|name| Adapter::open(&at(name)).unwrap());
    for (x, y) in a.targets().iter().zip(b.targets()) {
        assert_eq!((&x.name, x.anchor), (&y.name, y.anchor));
        assert_eq!(a.read_rows(&ctx, x, 0..200).unwrap(), b.read_rows(&ctx, y, 0..200).unwrap());
    }
    // The published format has no storage of 8-bit floats.
    let error = to(Format::Published, &at("a.safetensors"), None, &at("published")).unwrap_err();
    assert!(error.to_string().contains("\"w.F8_E4M3\": F8_E4M3") && error.kind() == ErrorKind::Refused, "{error}");
    assert!(!at("published").exists());
}

#[test]
fn deltas_that_do_not_fit_the_weights_type_are_rounded_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let base = at("base");
    world::write_checkpoint(&base);
    world::write_adapter(&base, &at("a.safetensors"), 3, &["w.BF16", "w.F32"], true);
    let report = to(Format::Published, &at("a.safetensors"), None, &at("published")).unwrap();
    let [bf16, f32] = &report.tensors[..] else { panic!("two tensors") };
    assert!(!report.exact && bf16.n_rounded > 300 && bf16.n_entries == 400, "{report:?}");
    assert!(bf16.largest_error > 0.0 && bf16.largest_error <= 0.25 / 512.0, "{report:?}");
    assert!(bf16.exactness().contains("rounded to BF16") && f32.exactness() == "exact");
}

#[test]
fn foreign_files_need_a_base_and_fit_it() {
    let workspace = Workspace::new();
    let published = reference("convert/published");
    let error = to(Format::NeuroAda, &published, None, &workspace.at("a")).unwrap_err();
    assert!(matches!(error, ConvertError::NoBase { .. }) && error.kind() == ErrorKind::Usage);
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama");
    let error = to(Format::NeuroAda, &published, Some(&other), &workspace.at("a")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("the base has no such tensor"), "{error}");
    assert!(!workspace.at("a").exists());
}

/// Bytes changed, cut and repeated at random: whatever comes of it, no panic, and no file.
#[test]
fn broken_pickles_and_archives_are_refused_in_words() {
    let workspace = Workspace::new();
    let base = open(&workspace.base);
    let ctx = Context::default();
    to(Format::NeuroAda, &reference("convert/published"), Some(&workspace.base), &workspace.at("a.safetensors"))
        .unwrap();
    to(Format::Npz, &workspace.at("a.safetensors"), None, &workspace.at("a.npz")).unwrap();
    let broken = workspace.at("broken");
    fs::create_dir_all(broken.join("tunable_para")).unwrap();
    let mut random = Random(11);
    for (name, whole) in [
        ("broken/positions.npy", reference("convert/published/positions.npy")),
        (
            "broken/tunable_para/state_dict_tunable.pt",
            reference("convert/published/tunable_para/state_dict_tunable.pt"),
        ),
        ("broken.npz", workspace.at("a.npz")),
    ] {
        fs::copy(reference("convert/published/positions.npy"), broken.join("positions.npy")).unwrap();
        let values = "tunable_para/state_dict_tunable.pt";
        fs::copy(reference("convert/published").join(values), broken.join(values)).unwrap();
        let bytes = fs::read(whole).unwrap();
        let mut n_refused = 0;
        for i in 0..150 {
            let mut changed = bytes.clone();
            let at = random.below(changed.len() as u64) as usize;
            match i % 3 {
                0 => changed.truncate(at),
                // Near the start of a file are its names and opcodes, near the end of an archive its directory.
                1 => {
                    let at = if i % 2 == 0 { at % 3000 } else { changed.len() - 1 - at % 3000 };
                    changed[at] ^= 1 << random.below(8);
                }
                _ => changed[at] = random.next() as u8,
            }
            fs::write(workspace.at(name), &changed).unwrap();
            let input = if name.ends_with("npz") { workspace.at(name) } else { broken.clone() };
            let output = workspace.at("out.safetensors");
            let map = WeightMap::new(&base, Answers::default()).unwrap();
            match convert(&ctx, &input, Some(&map), Format::NeuroAda, &output, Existing::Replace) {
                // A position or a value may be another one that is just as good.
                Ok(_) => fs::remove_file(&output).unwrap(),
                Err(error) => {
                    n_refused += 1;
                    let said = error.to_string();
                    assert!(matches!(error.kind(), ErrorKind::BadInput | ErrorKind::Refused), "{said}");
                    assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said}");
                    assert!(!output.exists());
                }
            }
        }
        assert!(n_refused >= 60, "{name}: {n_refused}");
    }
}

#[test]
fn entries_in_any_order_give_the_same_adapter_in_any_memory() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut random = Random(17);
    // A neuron is a stored column here, so what is written neuron by neuron jumps about in the tensor.
    let (d_in, d_out, k) = (600_u64, 400_u64, 200);
    let ctx = Context::default();
    let mut file = TensorFileWriter::create(&at("base"), Existing::Keep).unwrap();
    let id = file.add_tensor("w".to_owned(), Dtype::F32);
    let bytes: Vec<u8> = (0..d_in * d_out).flat_map(|_| random.delta().to_le_bytes()).collect();
    file.append(id, &bytes).unwrap();
    file.finish_tensor(id, vec![d_in, d_out]);
    file.finish(&ctx, &BTreeMap::new()).unwrap();
    let base = open(&at("base"));
    let tensor = base.tensor("w").unwrap();
    let layout = tensor.rows(true).unwrap();
    let mut columns = RowColumns::default();
    for _ in 0..d_out {
        let first = random.below(d_in - 2 * k) as u32;
        columns.push_row(&(0..k as u32).map(|i| first + 2 * i).collect::<Vec<_>>());
    }
    let values: Vec<f32> = (0..columns.nnz()).map(|_| random.delta()).collect();
    let originals = gather_rows(&ctx, tensor, layout, 0, &columns).unwrap();
    let mut writer = AdapterWriter::create(&at("a"), Existing::Keep, Dtype::F32).unwrap();
    writer.begin_target("w", Dtype::F32, &[d_in, d_out], true, Some(k)).unwrap();
    writer.push_rows(&columns, &values, &originals).unwrap();
    writer.end_target(None);
    writer.finish(&ctx, 1.0, &Recipe::custom(), &BaseInfo::of(&base), &AdapterNotes::default()).unwrap();
    let expected = merged_digests(&at("base"), &at("a"));

    to(Format::Npz, &at("a"), None, &at("a.npz")).unwrap();
    for (max_memory, name) in [(1 << 30, "much"), (16 << 20, "little")] {
        let ctx = Context { max_memory, ..Context::default() };
        let map = WeightMap::new(&base, Answers::default()).unwrap();
        convert(&ctx, &at("a.npz"), Some(&map), Format::NeuroAda, &at(name), Existing::Keep).unwrap();
    }
    assert!(fs::read(at("much")).unwrap() == fs::read(at("little")).unwrap());
    assert_eq!(Adapter::open(&at("much")).unwrap().nnz(), 80_000);
    assert!(merged_digests(&at("base"), &at("much")) == expected);
}

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

#[test]
fn peft_adapters_merge_to_the_weights_that_peft_merges() {
    let dir = tempfile::tempdir().unwrap();
    let base = reference("model/llama");
    for name in ["shira", "supertuning"] {
        let adapter = dir.path().join(format!("{name}.safetensors"));
        let report = to(Format::NeuroAda, &reference(&format!("convert/{name}")), Some(&base), &adapter).unwrap();
        assert!(report.exact && report.from == name && report.tensors.len() == 21, "{report:?}");
        let merged = merged_digests(&base, &adapter);
        for (tensor, expected) in expected_digests(&format!("convert/{name}/expected.json")) {
            assert_eq!(merged[&tensor], expected, "{name}: {tensor}");
        }
    }
}

#[test]
fn through_every_peft_format_and_back_the_merged_weights_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (tiny("tiny-llama"), tiny("tiny-llama-adapter.safetensors"));
    let expected = merged_digests(&base, &adapter);
    for format in [Format::Shira, Format::SuperTuning, Format::Spiel] {
        let [folder, again] = ["folder", "again"].map(|name| dir.path().join(format!("{name}-{}", format.name())));
        let report = to(format, &adapter, None, &folder).unwrap();
        assert!(report.exact && report.n_written >= report.n_entries);
        let report = to(Format::NeuroAda, &folder, Some(&base), &again).unwrap();
        assert!(report.exact, "{report:?}");
        let read = Adapter::open(&again).unwrap();
        assert_eq!(read.nnz(), Adapter::open(&adapter).unwrap().nnz(), "padding is dropped");
        assert!(merged_digests(&base, &again) == expected, "{}", format.name());
    }
}

#[test]
fn every_layer_has_the_number_of_entries_that_peft_computes() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = tiny("tiny-llama-adapter.safetensors");
    for format in [Format::Shira, Format::SuperTuning] {
        let folder = dir.path().join(format.name());
        to(format, &adapter, None, &folder).unwrap();
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
        let file =
            neuroada_ckpt::internals::checkpoint::Shard::open(&folder.join("adapter_model.safetensors")).unwrap();
        assert_eq!(file.header().metadata()["format"], "pt");
        let mut n_layers = 0;
        for target in Adapter::open(&adapter).unwrap().targets() {
            let module = target.name.strip_suffix(".weight").unwrap();
            let (d_out, d_in) = (target.shape[0], target.shape[1]);
            let (values, expected) = match format {
                Format::Shira => ("shira_weight", config["r"].as_u64().unwrap() * (d_in + d_out)),
                // Python's `int(numel * (1 - sparsity))`.
                _ => {
                    let sparsity = config["sparsity"].as_f64().unwrap();
                    assert!((0.0..1.0).contains(&sparsity));
                    ("supertuning_values", ((d_out * d_in) as f64 * (1.0 - sparsity)) as u64)
                }
            };
            let tensor = file.header().tensor(&format!("base_model.model.{module}.{values}")).unwrap();
            assert_eq!(tensor.shape, [expected], "{module}");
            assert!(config["target_modules"].as_array().unwrap().contains(&module.into()));
            n_layers += 1;
        }
        assert_eq!(n_layers, 14);
    }
}

#[test]
fn foreign_methods_that_are_not_lists_of_deltas_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = reference("model/llama");
    let folder = dir.path().join("adapter");
    let write = |config: &str| {
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("adapter_config.json"), config).unwrap();
        let tensors = reference("convert/supertuning").join("adapter_model.safetensors");
        fs::copy(tensors, folder.join("adapter_model.safetensors")).unwrap();
        to(Format::NeuroAda, &folder, Some(&base), &dir.path().join("out")).unwrap_err()
    };
    let error = write(r#"{"peft_type": "SUPERTUNING", "r": 8}"#);
    assert!(error.to_string().contains("is a Supra adapter") && error.kind() == ErrorKind::Refused, "{error}");
    let error = write(r#"{"peft_type": "SHIRA"}"#);
    assert!(error.to_string().contains("no part of the method") && error.kind() == ErrorKind::BadInput, "{error}");
    for config in [r#"{"peft_type": "SHIRA""#, r#"{"r": 1}"#, "[]"] {
        assert_eq!(write(config).kind(), ErrorKind::BadInput);
    }
    assert!(!dir.path().join("out").exists());
}

mod weight_sync {
    use neuroada_ckpt::sync::{self, Checksum, Encoding, ExportOptions, SyncError, SyncReport};

    use super::*;

    /// A base of every float type, and the same with an adapter in it.
    struct Pair {
        dir: TempDir,
    }

    impl Pair {
        fn new() -> Self {
            let pair = Self { dir: tempfile::tempdir().unwrap() };
            world::write_checkpoint(&pair.at("base"));
            world::write_adapter(
                &pair.at("base"),
                &pair.at("a"),
                5,
                &world::FLOATS.map(name_of).each_ref().map(String::as_str),
                false,
            );
            let mut options = MergeOptions::new_checkpoint(pair.at("tuned"));
            if let merge::MergeOutput::New { ledger, .. } = &mut options.output {
                *ledger = false;
            }
            let input = MergeInput { adapter: pair.at("a"), scale: None };
            merge::merge(&Context::default(), &pair.at("base"), &[input], &options).unwrap();
            // The card of a merge is not that of what a delta makes.
            fs::remove_file(pair.at("tuned/README.md")).unwrap();
            pair
        }
        fn at(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }
        fn export(&self, encoding: Encoding, checksum: Checksum, name: &str) -> SyncReport {
            let options = ExportOptions { encoding, checksum, version: 1, base_version: 0 };
            let (base, tuned) = (open(&self.at("base")), open(&self.at("tuned")));
            let ctx = Context { max_memory: 1 << 20, ..Context::default() };
            sync::export(&ctx, &base, &tuned, &options, &self.at(name), Existing::Keep).unwrap()
        }
        fn apply(&self, base: &str, delta: &str, output: &str) -> Result<(), SyncError> {
            let base = open(&self.at(base));
            let ctx = Context { max_memory: 1 << 20, ..Context::default() };
            sync::apply(&ctx, &base, &self.at(delta), &self.at(output), Existing::Keep).map(|_| ())
        }
    }

    fn name_of(dtype: Dtype) -> String {
        format!("w.{}", neuroada_ckpt::internals::tensor::dtype_name(dtype))
    }

    #[test]
    fn a_delta_makes_the_newer_checkpoint_of_the_older_one() {
        let pair = Pair::new();
        for encoding in [Encoding::Overwrite, Encoding::Xor] {
            for checksum in [Checksum::Xxh3, Checksum::Blake3, Checksum::Adler32] {
                let (delta, output) = (pair.at("delta"), pair.at("out"));
                let report = pair.export(encoding, checksum, "delta");
                assert_eq!((report.tensors.len(), report.n_same), (6, 2));
                pair.apply("base", "delta", "out").unwrap();
                assert!(world::tree(&output) == world::tree(&pair.at("tuned")), "{encoding:?} {checksum:?}");
                fs::remove_dir_all(output).unwrap();
                fs::remove_dir_all(delta).unwrap();
            }
        }
    }

    #[test]
    fn the_index_says_what_servers_look_for() {
        let pair = Pair::new();
        pair.export(Encoding::Xor, Checksum::Adler32, "weight_v000001");
        let index = fs::read(pair.at("weight_v000001/model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let expected = serde_json::json!({
            "version": "000001", "base_version": "000000", "delta_encoding": "xor", "compression_format": "zstd",
            "checksum_format": "adler32",
        });
        assert_eq!(index["metadata"], expected);
        assert_eq!(index["weight_map"]["w.BF16"], "model-00000-of-00001.safetensors");
        // The frame says how long its content is: some readers allocate by that.
        let delta = open(&pair.at("weight_v000001"));
        let tensor = delta.tensor("w.BF16").unwrap();
        let bytes = tensor.window(&Context::default(), 0..tensor.info.n_bytes()).unwrap();
        assert_eq!(zstd::zstd_safe::get_frame_content_size(&bytes).unwrap(), Some(200 * 37 * 2));
    }

    #[test]
    fn xor_is_applied_once_and_overwrite_to_the_right_base() {
        let pair = Pair::new();
        for (encoding, name) in [(Encoding::Xor, "xor"), (Encoding::Overwrite, "overwrite")] {
            pair.export(encoding, Checksum::Xxh3, name);
        }
        let error = pair.apply("tuned", "xor", "out").unwrap_err();
        assert!(error.to_string().contains("was applied to it before"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Refused);
        // Positions and new bytes do no harm a second time.
        pair.apply("tuned", "overwrite", "twice").unwrap();
        assert!(world::tree(&pair.at("twice")) == world::tree(&pair.at("tuned")));
        // A base that differs where the delta says nothing.
        let other = pair.at("other");
        fs::create_dir(&other).unwrap();
        for (name, bytes) in world::tree(&pair.at("base")) {
            fs::write(other.join(name), bytes).unwrap();
        }
        let shard = other.join("model-00001-of-00002.safetensors");
        let mut bytes = fs::read(&shard).unwrap();
        let last = bytes.len() - 3000;
        bytes[last] ^= 1;
        fs::write(&shard, bytes).unwrap();
        for name in ["xor", "overwrite"] {
            let error = pair.apply("other", name, "out").unwrap_err();
            assert!(error.to_string().contains("the base is not version 0"), "{error}");
        }
        assert!(!pair.at("out").exists());
    }

    #[test]
    fn broken_deltas_are_refused_in_words() {
        let pair = Pair::new();
        let mut random = Random(3);
        for (encoding, name) in [(Encoding::Xor, "xor"), (Encoding::Overwrite, "overwrite")] {
            pair.export(encoding, Checksum::Blake3, name);
            let shard = pair.at(name).join("model-00000-of-00001.safetensors");
            let whole = fs::read(&shard).unwrap();
            let data_start = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap());
            for _ in 0..60 {
                let mut bytes = whole.clone();
                let at = data_start + random.below(whole.len() as u64 - data_start);
                bytes[at as usize] ^= 1 << random.below(8);
                fs::write(&shard, &bytes).unwrap();
                let error = pair.apply("base", name, "out").unwrap_err();
                assert!(matches!(error.kind(), ErrorKind::BadInput | ErrorKind::Refused), "{error}");
                assert!(!pair.at("out").exists());
            }
        }
        let error = pair.apply("base", "tuned", "out").unwrap_err();
        assert!(error.to_string().contains("the folder is a whole checkpoint"), "{error}");
        let index = pair.at("xor/model.safetensors.index.json");
        let good = fs::read_to_string(&index).unwrap();
        for (from, to, said) in [
            ("\"xor\"", "\"sub\"", "`delta_encoding` is \"sub\""),
            ("\"zstd\"", "\"gzip\"", "`compression_format` is \"gzip\""),
            ("\"blake3\"", "\"md5\"", "`checksum_format` is \"md5\""),
            ("\"000001\"", "\"one\"", "`version` is \"one\""),
        ] {
            fs::write(&index, good.replacen(from, to, 1)).unwrap();
            let error = pair.apply("base", "xor", "out").unwrap_err();
            assert!(error.to_string().contains(said) && error.kind() == ErrorKind::BadInput, "{error}");
        }
    }

    #[test]
    fn unlike_checkpoints_have_no_delta() {
        let pair = Pair::new();
        let options = ExportOptions { encoding: Encoding::Xor, checksum: Checksum::Xxh3, version: 1, base_version: 0 };
        let (base, other) = (open(&pair.at("base")), open(&tiny("tiny-llama")));
        let ctx = Context::default();
        let error = sync::export(&ctx, &base, &other, &options, &pair.at("d"), Existing::Keep).unwrap_err();
        assert!(error.to_string().contains("the base has no such tensor"), "{error}");
        let error = sync::export(&ctx, &base, &base, &options, &pair.at("d"), Existing::Keep).unwrap_err();
        assert!(error.to_string().contains("there is no delta"), "{error}");
        assert!(!pair.at("d").exists());
    }
}
