//! Codes are not values: checkpoints of every quantized format are named for what they are, and nobody takes their codes, or their
//! scales, for numbers. Commands that read weights read the decoded ones.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use neuroada_ckpt::{
    AdapterNotes, Answers, Checkpoint, CheckpointError, Context, Dtype, ErrorKind, Existing, Failure, MaskFile,
    RowColumns, WeightMap,
    internals::{
        adapter::AdapterWriter,
        checkpoint::{CodedLayout, TensorFileWriter},
        mask::{BaseInfo, Recipe, select_targets},
        tensor::F8E4M3,
    },
};

/// Formats; words for their codes; the coded weights that each has; the layouts of those.
const MODELS: [(&str, &str, usize, &[&str]); 24] = [
    ("awq-gemm", "AWQ integers", 3, &["awq-int4"]),
    ("bnb-int8", "bitsandbytes int8", 7, &["bnb-int8"]),
    ("bnb-nf4", "bitsandbytes NF4", 7, &["bnb-nf4"]),
    ("bnb-nf4-nested", "bitsandbytes NF4", 7, &["bnb-nf4"]),
    ("ct-float-block", "FP8 with scales", 3, &["fp8-block"]),
    ("ct-float-channel", "FP8 with scales", 3, &["fp8-channel"]),
    ("ct-float-tensor", "FP8 with scales", 3, &["fp8-tensor"]),
    ("ct-int4-asym-g32", "packed integers (compressed-tensors)", 3, &["ct-int4"]),
    ("ct-int4-g128", "packed integers (compressed-tensors)", 4, &["ct-int4", "ct-int6"]),
    ("ct-int4-g32", "packed integers (compressed-tensors)", 5, &["ct-int4"]),
    ("ct-int8", "INT8 (compressed-tensors)", 3, &["int8"]),
    ("ct-mxfp4", "MXFP4 or MXFP6 (compressed-tensors)", 3, &["mxfp4"]),
    ("ct-mxfp8", "FP8 with scales", 2, &["mxfp8"]),
    ("ct-nvfp4", "NVFP4 (compressed-tensors)", 3, &["nvfp4"]),
    ("deepseek-v4-fp4-experts", "packed FP4 (DeepSeek-V4)", 5, &["fp8-block", "mxfp4"]),
    ("fp8-block", "FP8 with scales", 5, &["fp8-block"]),
    ("fp8-block-ue8m0-in-e8m0", "FP8 with scales", 5, &["fp8-block"]),
    ("fp8-block-ue8m0-in-f32", "FP8 with scales", 5, &["fp8-block"]),
    ("fp8-tensor", "FP8 with scales", 2, &["fp8-tensor"]),
    ("gpt-oss-mxfp4", "MXFP4 (gpt-oss)", 2, &["mxfp4"]),
    ("gptq-v1", "GPTQ integers", 3, &["gptq-int4"]),
    ("gptq-v1-sym-actorder", "GPTQ integers", 3, &["gptq-int4"]),
    ("modelopt-fp8", "FP8 with scales", 3, &["fp8-tensor"]),
    ("modelopt-nvfp4", "NVFP4 (ModelOpt)", 4, &["nvfp4"]),
];

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quant").join(name)
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_neuroada-ckpt")).args(arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes a plain adapter for one tensor, whatever the base says of it.
fn write_adapter(path: &Path, tensor: &str, dtype: Dtype, shape: &[u64], stored: &[u8]) {
    let n_rows = shape[..shape.len() - 1].iter().product::<u64>() as usize;
    let mut columns = RowColumns::with_capacity(n_rows, n_rows);
    (0..n_rows).for_each(|_| columns.push_row(&[0]));
    let mut writer = AdapterWriter::create(path, Existing::Keep, Dtype::F32).unwrap();
    writer.begin_target(tensor, dtype, shape, false, Some(1)).unwrap();
    writer.push_rows(&columns, &vec![0.25; n_rows], stored).unwrap();
    writer.end_target(None);
    let base = BaseInfo { name: "base".to_owned(), model_type: None };
    writer.finish(&Context::default(), 1.0, &Recipe::default(), &base, &AdapterNotes::default()).unwrap();
}

#[test]
fn every_format_is_named_for_what_it_is() {
    for (name, words, n, layouts) in MODELS {
        let checkpoint = Checkpoint::open(&model(name)).unwrap();
        let weights = checkpoint.codes().weights();
        let names: Vec<&str> = weights.iter().map(|weight| weight.name.as_str()).collect();
        assert_eq!(weights.len(), n, "{name}: {names:?}");
        assert!(weights.iter().any(|weight| weight.layout.starts_with(words)), "{name}: {weights:?}");
        for weight in weights {
            assert!(!weight.name.ends_with("_packed") && !weight.name.ends_with("_blocks"), "{name}: {weight:?}");
        }
        // What is left are numbers: norms, embeddings, routers, biases.
        for tensor in checkpoint.tensors().filter(|tensor| tensor.coded().is_none()) {
            let info = tensor.info;
            let is_plain = info.dtype == Dtype::BF16 || info.shape.is_empty() || info.shape == [1];
            assert!(is_plain, "{name}: {} {:?} {:?} is no number", info.name, info.dtype, info.shape);
        }
        let (code, page, _) = run(&["inspect", text(&model(name))]);
        assert!(code == Some(0) && page.contains(layouts[0]) && page.contains("quantized"), "{name}: {page}");
        let (_, json, _) = run(&["inspect", text(&model(name)), "--json"]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let quantized = json["quantized"].as_array().unwrap();
        let counted: u64 = quantized.iter().map(|of| of["n_weights"].as_u64().unwrap()).sum();
        assert_eq!(counted, n as u64, "{name}");
        let named: Vec<&str> = quantized.iter().map(|of| of["layout"].as_str().unwrap()).collect();
        assert_eq!(named, layouts, "{name}");
        // Weights are counted, not codes.
        let n_plain = checkpoint.tensors().filter(|tensor| tensor.coded().is_none()).count();
        assert_eq!(json["n_tensors"].as_u64(), Some((n_plain + n) as u64), "{name}");
        assert_eq!(json["n_parameters"].as_u64(), Some(checkpoint.n_parameters()), "{name}");
    }
}

#[test]
fn masks_choose_among_decoded_weights_and_never_among_scales() {
    let dir = tempfile::tempdir().unwrap();
    let (out, adapter) = (dir.path().join("mask.safetensors"), dir.path().join("adapter.safetensors"));
    for (name, ..) in MODELS {
        let path = model(name);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let map = WeightMap::new(&checkpoint, Answers::default()).unwrap();
        let (code, _, said) =
            run(&["mask", text(&path), "--k", "1", "--hash", "--targets", "all-linear", "-o", text(&out)]);
        assert_eq!(code, Some(0), "{name}: {said}");
        let mask = MaskFile::open(&out).unwrap();
        let weights: Vec<&str> = checkpoint.codes().weights().iter().map(|weight| weight.name.as_str()).collect();
        for weight in weights {
            let target = mask.target(weight).unwrap_or_else(|| panic!("{name}: {weight} was not chosen from"));
            let decoded = checkpoint.weight(weight).unwrap().unwrap();
            assert_eq!(target.quantized.as_deref(), decoded.layout().map(CodedLayout::name), "{name}: {weight}");
            assert_eq!((target.dtype, &target.shape), (Dtype::F32, &decoded.info.shape), "{name}: {weight}");
        }
        // An adapter on it knows its base by the decoded numbers and by the layout.
        let (code, _, said) = run(&["init", text(&path), "--mask", text(&out), "-o", text(&adapter)]);
        assert_eq!(code, Some(0), "{name}: {said}");
        let (code, page, said) = run(&["inspect", text(&adapter), "--tensors", "--json"]);
        assert!(code == Some(0) && page.contains("\"quantized\""), "{name}: {said}");
        let (code, _, said) =
            run(&["pack", text(&adapter), "--base", text(&path), "-o", text(&dir.path().join("packed"))]);
        assert_eq!(code, Some(0), "{name}: {said}");
        for file in ["mask.safetensors", "adapter.safetensors", "packed"] {
            fs::remove_file(dir.path().join(file)).unwrap();
        }
        // Scales are no weights, even where they are named.
        for weight in checkpoint.codes().weights() {
            for tensor in weight.tensors().iter().filter(|tensor| **tensor != weight.name).skip(1) {
                assert!(select_targets(&map, std::slice::from_ref(tensor), &[]).is_err(), "{name}: {tensor}");
            }
        }
    }
}

#[test]
fn deltas_are_never_added_to_codes() {
    let dir = tempfile::tempdir().unwrap();
    let (adapter, out) = (dir.path().join("a.safetensors"), dir.path().join("out"));
    for (name, ..) in MODELS {
        let path = model(name);
        let checkpoint = Checkpoint::open(&path).unwrap();
        for weight in checkpoint.codes().weights() {
            // Made for the codes, as an earlier version did it, or for the weight that a loader shows.
            let codes = checkpoint.tensor(&weight.tensors()[0]).unwrap();
            let is_f8 = matches!(codes.info.dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2);
            let (tensor, dtype) =
                if is_f8 { (&weight.tensors()[0], codes.info.dtype) } else { (&weight.name, Dtype::BF16) };
            let shape = if is_f8 { codes.info.shape.clone() } else { vec![4, 8] };
            let n_rows = shape[..shape.len() - 1].iter().product::<u64>() as usize;
            write_adapter(&adapter, tensor, dtype, &shape, &vec![0; n_rows * dtype.bitsize() / 8]);
            let (code, _, said) = run(&["merge", text(&path), "--adapter", text(&adapter), "-o", text(&out)]);
            assert_eq!(code, Some(4), "{name}: {tensor}: {said}");
            assert!(said.contains("codes are not numbers"), "{name}: {tensor}: {said}");
            assert!(!out.exists());
            fs::remove_file(&adapter).unwrap();
        }
    }
}

#[test]
fn low_rank_products_are_never_added_to_codes() {
    let dir = tempfile::tempdir().unwrap();
    let (lora, out) = (dir.path().join("lora"), dir.path().join("out"));
    fs::create_dir(&lora).unwrap();
    fs::write(lora.join("adapter_config.json"), r#"{"peft_type":"LORA","r":2,"lora_alpha":4}"#).unwrap();
    for (name, ..) in MODELS {
        let path = model(name);
        let checkpoint = Checkpoint::open(&path).unwrap();
        for weight in checkpoint.codes().weights() {
            let Some(module) = weight.name.strip_suffix(".weight") else { continue };
            let mut writer =
                TensorFileWriter::create(&lora.join("adapter_model.safetensors"), Existing::Replace).unwrap();
            for (part, shape) in [("lora_A", [2, 8]), ("lora_B", [8, 2])] {
                let id = writer.add_tensor(format!("base_model.model.{module}.{part}.weight"), Dtype::F32);
                writer.append(id, &[0; 64]).unwrap();
                writer.finish_tensor(id, shape.to_vec());
            }
            writer.finish(&Context::default(), &BTreeMap::new()).unwrap();
            let (code, _, said) = run(&["merge", text(&path), "--adapter", text(&lora), "-o", text(&out)]);
            assert!(code == Some(4) && said.contains("codes are not numbers"), "{name}: {module}: {code:?} {said}");
            assert!(!out.exists());
        }
    }
}

#[test]
fn differences_of_codes_are_compared_carried_and_extracted() {
    let dir = tempfile::tempdir().unwrap();
    for (name, ..) in MODELS {
        let path = model(name);
        let (code, page, said) = run(&["diff", text(&path), text(&path)]);
        assert!(code == Some(0) && page.contains("equal"), "{name}: {said}");
        // One changed code: one number, or none where it is another code for the same.
        let copy = dir.path().join(name);
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        let checkpoint = Checkpoint::open(&copy).unwrap();
        let weight = &checkpoint.codes().weights()[0];
        let codes = checkpoint.tensor(&weight.tensors()[0]).unwrap();
        let (file, at) = (codes.shard.path().to_owned(), codes.shard.file_range(codes.info).start as usize);
        let changed_name = weight.name.clone();
        let checkpoint_shape = checkpoint.decoded(weight).unwrap().info.shape.clone();
        drop(checkpoint);
        let mut bytes = fs::read(&file).unwrap();
        bytes[at] ^= 1;
        fs::write(&file, bytes).unwrap();
        let (code, json, _) = run(&["diff", text(&path), text(&copy), "--json"]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let changed = &json["changed"][0];
        assert!(code == Some(1) && changed["tensor"] == changed_name.as_str(), "{name}: {json}");
        assert!(changed["n_changed"].as_u64() <= Some(1) && changed["change_norm"].is_number(), "{name}: {changed}");
        assert!(json["bytes_compared"].as_u64().unwrap() > 0, "{name}: {json}");
        assert_eq!(changed["shape"][0], checkpoint_shape[0], "{name}: {changed}");
        // The same delta as inference servers get it, and back.
        let (sync, again) = (dir.path().join("weight_v000001"), dir.path().join(format!("{name}-again")));
        let base = text(&path);
        let (code, _, said) = run(&["sync", "export", text(&copy), "--base", base, "-o", text(&sync)]);
        assert_eq!(code, Some(0), "{name}: {said}");
        let (code, _, said) = run(&["sync", "apply", text(&sync), "--base", base, "-o", text(&again)]);
        assert_eq!(code, Some(0), "{name}: {said}");
        assert_eq!(run(&["diff", text(&copy), text(&again)]).0, Some(0), "{name}");
        fs::remove_dir_all(&sync).unwrap();
        // What changed is a delta of the decoded number.
        let delta = dir.path().join("e.safetensors");
        let (code, _, said) = run(&["extract", base, text(&copy), "-o", text(&delta)]);
        if changed["n_changed"] == 1 {
            assert_eq!(code, Some(0), "{name}: {said}");
            fs::remove_file(&delta).unwrap();
        } else {
            assert!(code == Some(4) && said.contains("same"), "{name}: {code:?} {said}");
        }
    }
}

#[test]
fn one_shard_knows_of_scales_in_another() {
    for (name, shard) in
        [("fp8-block", "model-00001-of-00002.safetensors"), ("ct-int4-g32", "model-00001-of-00002.safetensors")]
    {
        let checkpoint = Checkpoint::open(&model(name).join(shard)).unwrap();
        assert!(!checkpoint.codes().weights().is_empty(), "{name}");
        let map = WeightMap::new(&checkpoint, Answers::default()).unwrap();
        let Err(error) = select_targets(&map, &["*".to_owned()], &[]) else { panic!("{name}: codes were chosen") };
        assert_eq!(error.kind(), ErrorKind::Refused, "{name}: {error}");
    }
}

#[test]
fn floats_of_8_bits_without_scales_are_numbers_and_scales_have_many_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let write = |tensors: &[(&str, Dtype, &[u64])]| {
        write_zeros(&path, tensors);
        Checkpoint::open(&path).unwrap()
    };
    let f8 = ("a.q_proj.weight", Dtype::F8_E4M3, &[4u64, 4][..]);
    assert!(write(&[f8]).codes().weights().is_empty(), "plain 8-bit floats");
    for scale in [
        "a.q_proj.weight_scale_inv",
        "a.q_proj.weight_scale",
        "a.q_proj.scale",
        "a.q_proj.scale_weight",
        "a.q_proj.qscale_weight",
        "scaled_fp8",
    ] {
        let checkpoint = write(&[f8, (scale, Dtype::F32, &[1])]);
        assert_eq!(checkpoint.codes().weights().len(), 1, "{scale}");
        let error = checkpoint.tensor("a.q_proj.weight").unwrap().rows(false).unwrap_err();
        assert!(matches!(error, CheckpointError::Coded { .. }), "{scale}: {error}");
    }
    // A parameter of its own.
    let checkpoint = write(&[("a.q_norm.weight", Dtype::BF16, &[4]), ("a.q_norm.scale", Dtype::BF16, &[4])]);
    assert!(
        checkpoint.codes().weights().is_empty() && checkpoint.tensor("a.q_norm.scale").unwrap().any_rows(false).is_ok()
    );
}

/// Writes tensors of zeros as one file.
fn write_zeros(path: &Path, tensors: &[(&str, Dtype, &[u64])]) {
    let mut writer = TensorFileWriter::create(path, Existing::Replace).unwrap();
    for (name, dtype, shape) in tensors {
        let id = writer.add_tensor((*name).to_owned(), *dtype);
        writer.append(id, &vec![0; shape.iter().product::<u64>() as usize * dtype.bitsize() / 8]).unwrap();
        writer.finish_tensor(id, shape.to_vec());
    }
    writer.finish(&Context::default(), &BTreeMap::new()).unwrap();
}

#[test]
fn a_shard_by_itself_knows_the_codes_and_the_scales_that_the_whole_model_has() {
    for name in ["fp8-block", "ct-int4-g32"] {
        let whole = Checkpoint::open(&model(name)).unwrap();
        for shard in whole.shards() {
            let alone = Checkpoint::open(shard.path()).unwrap();
            for tensor in alone.tensors() {
                let in_whole = whole.tensor(&tensor.info.name).unwrap().coded().map(|weight| &weight.name);
                let in_shard = tensor.coded().map(|weight| &weight.name);
                assert_eq!(in_shard, in_whole, "{}: {}", shard.file_name(), tensor.info.name);
            }
        }
    }
    // A shard of nothing but scales, and plain weights of another one.
    let dir = tempfile::tempdir().unwrap();
    let tensors = [
        ("a.q_proj.weight_scale_inv", Dtype::F32, &[2u64, 2][..]),
        ("a.q_norm.scale", Dtype::F32, &[4, 4]),
        ("a.k_proj.weight", Dtype::BF16, &[4, 4]),
    ];
    write_zeros(&dir.path().join("model-00001-of-00002.safetensors"), &tensors);
    let index = r#"{"weight_map":{"a.q_proj.weight":"model-00002-of-00002.safetensors","a.q_proj.weight_scale_inv":
        "model-00001-of-00002.safetensors","a.q_norm.scale":"model-00001-of-00002.safetensors","a.k_proj.weight":
        "model-00001-of-00002.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let shard = Checkpoint::open(&dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    let coded: Vec<&str> = shard.tensors().filter(|it| it.coded().is_some()).map(|it| it.info.name.as_str()).collect();
    assert_eq!(coded, ["a.q_proj.weight_scale_inv"]);
}

#[test]
fn a_marker_of_scaled_files_is_no_weight_and_torchao_has_names_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let marker = "model.diffusion_model.scaled_fp8";
    write_zeros(&path, &[("model.diffusion_model.a.weight", Dtype::F8_E4M3, &[4, 4]), (marker, Dtype::F8_E4M3, &[2])]);
    let names = |checkpoint: &Checkpoint| -> Vec<String> {
        checkpoint.codes().weights().iter().map(|weight| weight.name.clone()).collect()
    };
    assert_eq!(names(&Checkpoint::open(&path).unwrap()), ["model.diffusion_model.a.weight"]);
    for dtype in [Dtype::I8, Dtype::F8_E4M3] {
        write_zeros(&path, &[("a._weight_qdata", dtype, &[4, 4]), ("a._weight_scale", Dtype::F32, &[4, 1])]);
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(names(&checkpoint), ["a.weight"]);
        assert!(checkpoint.tensors().all(|tensor| tensor.coded().is_some()), "{dtype:?}");
    }
}

#[test]
fn a_plain_weight_is_not_taken_for_codes_of_a_longer_name() {
    let dir = tempfile::tempdir().unwrap();
    let (base, lora, out) = (dir.path().join("m.safetensors"), dir.path().join("lora"), dir.path().join("out"));
    write_zeros(
        &base,
        &[
            ("head.weight", Dtype::BF16, &[4, 4]),
            ("mtp.head.weight", Dtype::F8_E4M3, &[4, 4]),
            ("mtp.head.weight_scale", Dtype::F32, &[1]),
        ],
    );
    let checkpoint = Checkpoint::open(&base).unwrap();
    let ends = |name| checkpoint.codes().find_by_suffix(name).map(|weight| weight.name.as_str());
    assert_eq!(ends("head.weight"), Some("mtp.head.weight"));
    assert_eq!(ends("model.mtp.head.weight"), Some("mtp.head.weight"));
    assert_eq!(ends("ahead.weight"), None);
    fs::create_dir(&lora).unwrap();
    let config = r#"{"peft_type":"SHIRA","r":1,"mask_type":"custom","target_modules":["head"]}"#;
    fs::write(lora.join("adapter_config.json"), config).unwrap();
    let shira = |module: &str| {
        let mut writer = TensorFileWriter::create(&lora.join("adapter_model.safetensors"), Existing::Replace).unwrap();
        let id = writer.add_tensor(format!("base_model.model.{module}.shira_weight"), Dtype::F32);
        writer.append(id, &0.25f32.to_le_bytes().repeat(4)).unwrap();
        writer.finish_tensor(id, vec![4]);
        let id = writer.add_tensor(format!("base_model.model.{module}.shira_indices"), Dtype::I32);
        let indices: Vec<u8> = [0i32, 1, 2, 3, 0, 1, 2, 3].iter().flat_map(|at| at.to_le_bytes()).collect();
        writer.append(id, &indices).unwrap();
        writer.finish_tensor(id, vec![2, 4]);
        writer.finish(&Context::default(), &BTreeMap::new()).unwrap();
    };
    let merge = || run(&["merge", text(&base), "--adapter", text(&lora), "-o", text(&out)]);
    shira("mtp.head");
    let (code, _, said) = merge();
    assert!(code == Some(4) && said.contains("is stored as FP8"), "{code:?} {said}");
    let (code, _, said) = run(&["convert", text(&lora), "--base", text(&base), "--to", "neuroada", "-o", text(&out)]);
    assert!(code == Some(4) && said.contains("is stored as FP8"), "{code:?} {said}");
    shira("head");
    let (code, _, said) = merge();
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn gradients_are_numbers_too() {
    let dir = tempfile::tempdir().unwrap();
    let [base, gradients, out] = ["m.safetensors", "g.safetensors", "out"].map(|name| dir.path().join(name));
    write_zeros(&base, &[("a.q_proj.weight", Dtype::BF16, &[4, 4])]);
    write_zeros(
        &gradients,
        &[("a.q_proj.weight", Dtype::F8_E4M3, &[4, 4]), ("a.q_proj.weight_scale", Dtype::F32, &[1])],
    );
    let (base, gradients, out) = (text(&base), text(&gradients), text(&out));
    let (code, _, said) = run(&["mask", base, "--k", "1", "--score", "gradient", "--gradients", gradients, "-o", out]);
    assert!(code == Some(4) && said.contains("codes are not numbers"), "{code:?} {said}");
}

/// A folder whose 8-bit floats are numbers, until [`make_codes`] says that they are codes.
fn plain_f8(dir: &Path) -> PathBuf {
    let base = dir.join("base");
    fs::create_dir(&base).unwrap();
    write_zeros(
        &base.join("model.safetensors"),
        &[("a.q_proj.weight", Dtype::F8_E4M3, &[4, 8]), ("embed.weight", Dtype::BF16, &[4, 8])],
    );
    fs::write(base.join("config.json"), "{}").unwrap();
    base
}

fn make_codes(base: &Path) {
    fs::write(base.join("config.json"), r#"{"quantization_config":{"quant_method":"fp8"}}"#).unwrap();
}

#[test]
fn no_command_takes_the_codes_of_its_base_for_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let base = plain_f8(dir.path());
    let [mask, adapter, out] = ["mask", "adapter", "out"].map(|name| dir.path().join(name));
    let (base_text, mask, adapter) = (text(&base), text(&mask), text(&adapter));
    let ok = |arguments: &[&str]| {
        let (code, _, said) = run(arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {said}");
    };
    ok(&["mask", base_text, "--k", "1", "--targets", "q_proj", "-o", mask]);
    ok(&["init", base_text, "--mask", mask, "-o", adapter]);
    make_codes(&base);
    for arguments in [
        &["init", base_text, "--mask", mask][..],
        &["merge", base_text, "--adapter", adapter],
        &["combine", adapter, adapter, "--base", base_text],
        &["pack", adapter, "--base", base_text],
        &["sync", "export", adapter, "--base", base_text],
    ] {
        let name = if arguments[0] == "sync" { "weight_v000001" } else { "out" };
        let out = out.with_file_name(name);
        let (code, _, said) = run(&[arguments, &["-o", text(&out)]].concat());
        let is_named = said.contains("codes are not numbers") || said.contains("its scales are missing");
        assert!(code == Some(4) && is_named, "{arguments:?}: {code:?} {said}");
        assert!(!out.exists(), "{arguments:?}");
    }
}

#[test]
fn merges_onto_codes_by_earlier_versions_are_verified_and_undone() {
    let dir = tempfile::tempdir().unwrap();
    let base = plain_f8(dir.path());
    let weights = base.join("model.safetensors");
    let before = fs::read(&weights).unwrap();
    let adapter = dir.path().join("adapter");
    write_adapter(&adapter, "a.q_proj.weight", Dtype::F8_E4M3, &[4, 8], &[0; 4]);
    assert_eq!(run(&["merge", text(&base), "--adapter", text(&adapter), "--in-place"]).0, Some(0));
    assert_ne!(fs::read(&weights).unwrap(), before);
    make_codes(&base);
    let (code, _, said) = run(&["verify", text(&base)]);
    assert_eq!(code, Some(0), "{said}");
    // What is merged into plain weights beside them goes on too.
    let plain = dir.path().join("plain");
    write_adapter(&plain, "embed.weight", Dtype::BF16, &[4, 8], &[0; 8]);
    assert_eq!(run(&["merge", text(&base), "--adapter", text(&plain), "--in-place"]).0, Some(0));
    assert_eq!(run(&["unmerge", text(&base), "--in-place"]).0, Some(0));
    assert_eq!(fs::read(&weights).unwrap(), before);
    assert_eq!(run(&["merge", text(&base), "--adapter", text(&adapter), "--in-place"]).0, Some(4));
}

#[test]
fn what_changed_in_plain_weights_beside_codes_is_extracted() {
    let dir = tempfile::tempdir().unwrap();
    let base = plain_f8(dir.path());
    make_codes(&base);
    let tuned = dir.path().join("tuned");
    fs::create_dir(&tuned).unwrap();
    let mut bytes = fs::read(base.join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(&base).unwrap();
    let start = |name: &str| {
        let tensor = checkpoint.tensor(name).unwrap();
        tensor.shard.file_range(tensor.info).start as usize
    };
    bytes[start("embed.weight") + 1] = 0x3f;
    fs::write(tuned.join("model.safetensors"), &bytes).unwrap();
    fs::copy(base.join("config.json"), tuned.join("config.json")).unwrap();
    let extract = |out: &str| run(&["extract", text(&base), text(&tuned), "-o", text(&dir.path().join(out))]);
    let (code, _, said) = extract("plain");
    assert_eq!(code, Some(0), "{said}");
    // Codes of the tuned checkpoint are none of the base's numbers.
    bytes[start("a.q_proj.weight")] = 0x38;
    fs::write(tuned.join("model.safetensors"), &bytes).unwrap();
    fs::write(base.join("config.json"), "{}").unwrap();
    let (code, _, said) = extract("coded");
    assert!(code == Some(4) && said.contains("codes are not numbers"), "{code:?} {said}");
}

/// The tiny Llama, with all projections stored as 8-bit floats with a scale for each row.
#[cfg(feature = "train")]
fn quantized_llama(dir: &Path) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama");
    let to = dir.join("llama");
    fs::create_dir(&to).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(&from).unwrap();
    let mut writer = TensorFileWriter::create(&to.join("model.safetensors"), Existing::Keep).unwrap();
    let mut write = |name: String, dtype: Dtype, shape: &[u64], bytes: &[u8]| {
        let id = writer.add_tensor(name, dtype);
        writer.append(id, bytes).unwrap();
        writer.finish_tensor(id, shape.to_vec());
    };
    for tensor in checkpoint.tensors() {
        let info = tensor.info;
        let bytes = tensor.read(&Context::default(), 0..info.n_bytes()).unwrap();
        if !info.name.contains("_proj") {
            write(info.name.clone(), info.dtype, &info.shape, &bytes);
            continue;
        }
        let numbers = bytes.chunks_exact(2).map(|le| half::bf16::from_le_bytes([le[0], le[1]]).to_f32());
        let codes: Vec<u8> = numbers.map(|x| F8E4M3::from_f32(x / 0.001).to_bits()).collect();
        write(info.name.clone(), Dtype::F8_E4M3, &info.shape, &codes);
        let scales = 0.001f32.to_le_bytes().repeat(info.shape[0] as usize);
        write(format!("{}_scale", info.name), Dtype::F32, &[info.shape[0], 1], &scales);
    }
    writer.finish(&Context::default(), &BTreeMap::new()).unwrap();
    to
}

#[cfg(feature = "train")]
#[test]
fn eval_reads_a_quantized_model_and_train_refuses_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = quantized_llama(dir.path());
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/commonsense.jsonl");
    let (plain, out) = (dir.path().join("plain"), dir.path().join("out"));
    let (code, _, message) = run(&["cast", text(&base), "--dtype", "f32", "-o", text(&plain)]);
    assert_eq!(code, Some(0), "{message}");
    let loss = |model: &Path| {
        let arguments = ["eval", text(model), "--data", text(&data), "--task", "loss", "--limit", "4", "--json"];
        let (code, json, message) = run(&arguments);
        assert_eq!(code, Some(0), "{message}");
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        json["loss"].as_f64().unwrap()
    };
    assert_eq!(loss(&base), loss(&plain), "decoded on the way and decoded before");
    let (code, _, message) = run(&["train", "--k", "1", "-o", text(&out), text(&base), "--data", text(&data)]);
    assert!(code == Some(4) && message.contains("is stored as FP8"), "{code:?} {message}");
}
