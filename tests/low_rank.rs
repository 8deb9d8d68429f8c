//! Merges of LoRA adapters: equal to PEFT's own, hand-made numbers for every form, the same bytes however the work is cut, and
//! back to the base's bytes.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    AdapterReading, Axes, Checkpoint, Context, Dtype, ExpertOrder, KeptOriginals, MergeError, MergeInput, MergeOptions,
    VerifyOptions, VerifyReport, Which, internals::merge,
};

#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

#[path = "support/lora.rs"]
mod lora;

use lora::{Tensors, Workspace, read, replacing, said};
use world::Random;

fn verify(ctx: &Context<'_>, path: &Path, base: Option<&Path>) -> Result<VerifyReport, MergeError> {
    merge::verify(ctx, path, &VerifyOptions { base: base.map(Path::to_owned), ..VerifyOptions::default() })
}

fn bytes_of(checkpoint: &Path) -> Vec<u8> {
    fs::read(checkpoint.join("model.safetensors")).unwrap()
}

// --- equal to PEFT

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/reference").join(name)
}

fn merged_as_peft_did(case: &str, base: &Path) -> (BTreeMap<String, Vec<f32>>, BTreeMap<String, Vec<f32>>) {
    let workspace = Workspace::new();
    let input = MergeInput { adapter: reference(&format!("peft/{case}")), scale: None };
    let options = MergeOptions::new_checkpoint(workspace.path("out"));
    merge::merge(&Context::default(), base, &[input], &options).unwrap();
    (read(&workspace.path("out")), read(&reference(&format!("peft/{case}/expected.safetensors"))))
}

fn assert_close(case: &str, merged: &BTreeMap<String, Vec<f32>>, expected: BTreeMap<String, Vec<f32>>) {
    for (name, expected) in expected {
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        for (found, expected) in merged[&name].iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-6 * largest, "{case} {name}: {found}, PEFT has {expected}");
        }
    }
}

#[test]
fn merged_weights_are_those_that_peft_wrote() {
    for (case, base) in [("lora", "llama"), ("lora_rslora", "qwen2"), ("lora_dora", "llama")] {
        let (merged, expected) = merged_as_peft_did(case, &reference(&format!("model/{base}")));
        assert_close(case, &merged, expected);
    }
}

#[test]
fn ranks_and_scalings_by_pattern_are_those_of_peft() {
    // Of the base, the weights that are compared; the others are zeros of the shapes that the adapter needs.
    let workspace = Workspace::new();
    let kept = read(&reference("peft/lora_patterns/base.safetensors"));
    let adapter = Checkpoint::open(&reference("peft/lora_patterns/adapter_model.safetensors")).unwrap();
    let mut tensors: Vec<(String, Vec<u64>, Vec<f32>)> =
        vec![("lm_head.weight".to_owned(), vec![320, 64], vec![0.0; 320 * 64])];
    for tensor in adapter.tensors() {
        let Some(module) = tensor.info.name.strip_suffix(".lora_A.weight") else { continue };
        let b = adapter.tensor(&format!("{module}.lora_B.weight")).unwrap();
        let shape = vec![b.info.shape[0], tensor.info.shape[1]];
        let name = format!("{}.weight", module.trim_start_matches("base_model.model."));
        let zeros = || vec![0.0; (shape[0] * shape[1]) as usize];
        let values = kept.get(&name).cloned().unwrap_or_else(zeros);
        tensors.push((name, shape, values));
    }
    let tensors: Vec<_> = tensors.iter().map(|(name, shape, v)| (name.as_str(), &shape[..], v.clone())).collect();
    let base = workspace.base(Dtype::F32, "{\"tie_word_embeddings\":false}", &tensors);
    let (merged, expected) = merged_as_peft_did("lora_patterns", &base);
    assert_eq!(merged["lm_head.weight"], read(adapter.root())["base_model.model.lm_head.weight"]);
    assert_close("lora_patterns", &merged, expected);
}

#[test]
fn merged_bf16_weights_are_within_one_unit_of_those_that_peft_wrote() {
    let workspace = Workspace::new();
    let llama = read(&reference("model/llama"));
    let checkpoint = Checkpoint::open(&reference("model/llama")).unwrap();
    let tensors: Vec<_> =
        checkpoint.tensors().map(|t| (t.info.name.as_str(), &t.info.shape[..], llama[&t.info.name].clone())).collect();
    let base = workspace.base(Dtype::BF16, "{}", &tensors);
    let (merged, expected) = merged_as_peft_did("lora_bf16", &base);
    let (mut n, mut n_equal) = (0, 0);
    for (name, expected) in expected {
        for (found, expected) in merged[&name].iter().zip(&expected) {
            let steps = (i64::from(found.to_bits() >> 16) - i64::from(expected.to_bits() >> 16)).abs();
            assert!(steps <= 1, "{name}: {found}, PEFT has {expected}");
            n += 1;
            n_equal += u32::from(steps == 0);
        }
    }
    assert!(f64::from(n_equal) > 0.99 * f64::from(n), "{n_equal} of {n} have the same bits");
}

// --- hand-made numbers

#[test]
fn a_product_is_scaled_and_added_whichever_way_the_weight_is_stored() {
    let workspace = Workspace::new();
    let ones = vec![1.0; 6];
    workspace.base(
        Dtype::F32,
        "{}",
        &[("a.weight", &[2, 3], ones.clone()), ("t.weight", &[3, 2], ones), ("a.bias", &[2], vec![5.0, 6.0])],
    );
    // B A = [[1], [10]] [[1, 2, 3]], scaled by 4 / 2.
    let factors = |module: &str| {
        [
            (format!("base_model.model.{module}.lora_A.weight"), [1u64, 3], vec![1.0, 2.0, 3.0]),
            (format!("base_model.model.{module}.lora_B.weight"), [2, 1], vec![1.0, 10.0]),
        ]
    };
    let (a, t) = (factors("a"), factors("t"));
    let mut tensors: Vec<(&str, &[u64], Vec<f32>)> =
        a.iter().chain(&t).map(|(name, shape, values)| (name.as_str(), &shape[..], values.clone())).collect();
    let config = r#""r":1,"lora_alpha":2,"lora_bias":true"#;
    tensors.push(("base_model.model.a.lora_B.bias", &[2], vec![0.5, 1.0]));
    tensors.push(("base_model.model.t.lora_B.bias", &[2], vec![0.0, 0.0]));
    let without_bias = workspace.lora("broken", config, &tensors);
    assert!(
        said(workspace.merge(&[without_bias], AdapterReading::default()))
            .contains("\"t.bias\": the adapter adds to a bias that the base has not")
    );
    tensors.retain(|(name, ..)| !name.contains("model.t."));
    let merged = workspace.merged(workspace.lora("a", config, &tensors));
    assert_eq!(merged["a.weight"], [3.0, 5.0, 7.0, 21.0, 41.0, 61.0]);
    assert_eq!(merged["a.bias"], [6.0, 8.0]);
    assert_eq!(merged["t.weight"], [1.0; 6]);
    let tensors: Vec<_> = t.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], values.clone())).collect();
    let merged = workspace.merged(workspace.lora("t", r#""r":1,"lora_alpha":2,"fan_in_fan_out":true"#, &tensors));
    assert_eq!(merged["t.weight"], [3.0, 21.0, 5.0, 41.0, 7.0, 61.0]);
}

#[test]
fn a_square_weight_of_an_unknown_kind_is_read_as_the_config_says_or_asked_about() {
    let workspace = Workspace::new();
    workspace.base(Dtype::F32, "{}", &[("s.weight", &[2, 2], vec![0.0; 4]), ("t.weight", &[3, 2], vec![0.0; 6])]);
    let square: Tensors<'_> =
        &[("s.lora_A.weight", &[1, 2], vec![1.0, 2.0]), ("s.lora_B.weight", &[2, 1], vec![1.0, 3.0])];
    assert_eq!(
        workspace.merged(workspace.lora("a", r#""r":1,"lora_alpha":1"#, square))["s.weight"],
        [1.0, 2.0, 3.0, 6.0]
    );
    let turned = workspace.lora("b", r#""r":1,"lora_alpha":1,"fan_in_fan_out":true"#, square);
    assert_eq!(workspace.merged(turned)["s.weight"], [1.0, 3.0, 2.0, 6.0]);
    let mut both = square.to_vec();
    both.extend([("t.lora_A.weight", &[1u64, 3][..], vec![0.0; 3]), ("t.lora_B.weight", &[2, 1], vec![0.0; 2])]);
    // Another kind is stored the other way round, and nothing is known of this one.
    let both = workspace.lora("c", r#""r":1,"lora_alpha":1"#, &both);
    let refused = said(workspace.merge(std::slice::from_ref(&both), AdapterReading::default()));
    assert!(refused.contains("\"s.weight\": it is square, and neither its shape"), "{refused}");
    for (axes, expected) in [("s=out-in", [1.0, 2.0, 3.0, 6.0]), ("s=in-out", [1.0, 3.0, 2.0, 6.0])] {
        let reading = AdapterReading { axes: vec![axes.parse().unwrap()], ..AdapterReading::default() };
        workspace.merge(std::slice::from_ref(&both), reading).unwrap();
        assert_eq!(read(&workspace.path("out"))["s.weight"], expected);
    }
}

#[test]
fn a_convolution_is_a_product_over_channels_and_kernel() {
    let workspace = Workspace::new();
    // Two channels out, one in, a kernel of 1 x 3: B is a convolution with a kernel of one.
    workspace.base(Dtype::F32, "{}", &[("c.weight", &[2, 1, 1, 3], vec![1.0; 6])]);
    let adapter = workspace.lora(
        "a",
        r#""r":1,"lora_alpha":2"#,
        &[
            ("base_model.model.c.lora_A.weight", &[1, 1, 1, 3], vec![1.0, 2.0, 3.0]),
            ("base_model.model.c.lora_B.weight", &[2, 1, 1, 1], vec![1.0, 10.0]),
        ],
    );
    assert_eq!(workspace.merged(adapter)["c.weight"], [3.0, 5.0, 7.0, 21.0, 41.0, 61.0]);
}

#[test]
fn embeddings_and_full_tensors_are_merged() {
    let workspace = Workspace::new();
    workspace.base(
        Dtype::F32,
        "{\"tie_word_embeddings\":false}",
        &[("model.embed_tokens.weight", &[3, 2], vec![1.0; 6]), ("lm_head.weight", &[3, 2], vec![0.0; 6])],
    );
    let adapter = workspace.lora(
        "a",
        r#""r":1,"lora_alpha":1,"modules_to_save":["lm_head"]"#,
        &[
            ("base_model.model.model.embed_tokens.lora_embedding_A", &[1, 3], vec![1.0, 2.0, 3.0]),
            ("base_model.model.model.embed_tokens.lora_embedding_B", &[2, 1], vec![1.0, 10.0]),
            ("base_model.model.lm_head.weight", &[3, 2], vec![7.0; 6]),
        ],
    );
    let scaled = MergeInput { scale: Some(0.5), ..adapter.clone() };
    assert!(
        said(workspace.merge(&[scaled], AdapterReading::default()))
            .contains("holds it in full, and a scale of 0.5 has no meaning")
    );
    let merged = workspace.merged(adapter);
    assert_eq!(merged["model.embed_tokens.weight"], [2.0, 11.0, 3.0, 21.0, 4.0, 31.0]);
    assert_eq!(merged["lm_head.weight"], [7.0; 6]);
}

#[test]
fn magnitudes_are_reached_by_rows_or_by_columns() {
    let workspace = Workspace::new();
    let config = r#""r":1,"lora_alpha":1,"use_dora":true"#;
    workspace.base(
        Dtype::F32,
        "{\"tie_word_embeddings\":false}",
        &[("a.weight", &[2, 2], vec![3.0, 3.0, 0.0, 5.0]), ("wte.weight", &[2, 2], vec![3.0, 0.0, 4.0, 5.0])],
    );
    // The product moves the first row to [3, 4].
    let rows: Tensors<'_> = &[
        ("a.lora_A.weight", &[1, 2], vec![0.0, 1.0]),
        ("a.lora_B.weight", &[2, 1], vec![1.0, 0.0]),
        ("a.lora_magnitude_vector", &[2], vec![10.0, 1.0]),
    ];
    assert_eq!(workspace.merged(workspace.lora("a", config, rows))["a.weight"], [6.0, 8.0, 0.0, 1.0]);
    let columns: Tensors<'_> = &[
        ("wte.lora_embedding_A", &[1, 2], vec![0.0, 0.0]),
        ("wte.lora_embedding_B", &[2, 1], vec![0.0, 0.0]),
        ("wte.lora_magnitude_vector", &[2], vec![10.0, 1.0]),
    ];
    assert_eq!(workspace.merged(workspace.lora("b", config, columns))["wte.weight"], [6.0, 0.0, 8.0, 1.0]);
    workspace.base(Dtype::F32, "{}", &[("a.weight", &[2, 2], vec![0.0, -1.0, 0.0, 5.0])]);
    let zero = said(workspace.merge(&[workspace.lora("a", config, rows)], AdapterReading::default()));
    assert!(zero.contains("row 0: its norm is 0"), "{zero}");
}

#[test]
fn stacks_of_experts_are_read_as_the_user_says() {
    let workspace = Workspace::new();
    // Two experts of [d_out 2, d_in 3], rank 2.
    workspace.base(Dtype::F32, "{}", &[("m.experts.down_proj", &[2, 2, 3], vec![0.0; 12])]);
    let config = r#""r":2,"lora_alpha":2,"target_parameters":["experts.down_proj"]"#;
    let tensors: Tensors<'_> = &[
        // Expert 0: rows [1, 0, 0] and [0, 1, 0]; expert 1: [0, 0, 1] and [1, 1, 1].
        ("m.experts.lora_A.weight", &[4, 3], vec![1., 0., 0., 0., 1., 0., 0., 0., 1., 1., 1., 1.]),
        ("m.experts.lora_B.weight", &[2, 4], vec![1., 2., 3., 4., 5., 6., 7., 8.]),
    ];
    let adapter = workspace.lora("a", config, tensors);
    let ask = said(workspace.merge(std::slice::from_ref(&adapter), AdapterReading::default()));
    assert!(ask.contains("may be [d_out, r, E], as PEFT has it, or [d_out, E, r]"), "{ask}");
    let with = |order| {
        workspace
            .merge(std::slice::from_ref(&adapter), AdapterReading { expert_order: Some(order), ..Default::default() })
            .unwrap();
        read(&workspace.path("out"))["m.experts.down_proj"].clone()
    };
    // [d_out, r, E]: expert 0 has columns 0 and 2 of B, expert 1 has 1 and 3.
    assert_eq!(with(ExpertOrder::RankFirst), [1., 3., 0., 5., 7., 0., 4., 4., 6., 8., 8., 14.]);
    // [d_out, E, r]: expert 0 has columns 0 and 1, expert 1 has 2 and 3.
    assert_eq!(with(ExpertOrder::ExpertFirst), [1., 2., 0., 5., 6., 0., 4., 4., 7., 8., 8., 15.]);
    // Stored the other way round.
    workspace.base(Dtype::F32, "{}", &[("m.experts.down_proj", &[2, 3, 2], vec![0.0; 12])]);
    assert_eq!(with(ExpertOrder::RankFirst), [1., 5., 3., 7., 0., 0., 4., 8., 4., 8., 6., 14.]);
    // One tensor per expert.
    let apart = ["m.mlp.experts.0.down_proj.weight", "m.mlp.experts.1.down_proj.weight"];
    workspace.base(Dtype::F32, "{}", &apart.map(|name| (name, &[2u64, 3][..], vec![0.0; 6])));
    let tensors: Vec<_> =
        tensors.iter().map(|(name, shape, v)| (name.replace("m.", "m.mlp."), *shape, v.clone())).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, shape, v)| (name.as_str(), *shape, v.clone())).collect();
    let reading = AdapterReading { expert_order: Some(ExpertOrder::RankFirst), ..Default::default() };
    workspace.merge(&[workspace.lora("b", config, &tensors)], reading).unwrap();
    assert_eq!(read(&workspace.path("out"))[apart[1]], [4., 4., 6., 8., 8., 14.]);
}

#[test]
fn square_experts_are_asked_about() {
    let workspace = Workspace::new();
    workspace.base(Dtype::F32, "{}", &[("m.experts.down_proj", &[2, 2, 2], vec![0.0; 8])]);
    let tensors: Tensors<'_> = &[
        ("m.experts.lora_A.weight", &[2, 2], vec![1., 2., 0., 0.]),
        ("m.experts.lora_B.weight", &[2, 2], vec![1., 0., 3., 0.]),
    ];
    let adapter = workspace.lora("a", r#""r":1,"lora_alpha":1,"target_parameters":["experts.down_proj"]"#, tensors);
    assert!(
        said(workspace.merge(std::slice::from_ref(&adapter), AdapterReading::default()))
            .contains("its experts are square")
    );
    for (axes, first) in [(Axes::OutIn, [1., 2., 3., 6.]), (Axes::InOut, [1., 3., 2., 6.])] {
        let reading = AdapterReading { expert_axes: Some(axes), ..Default::default() };
        workspace.merge(std::slice::from_ref(&adapter), reading).unwrap();
        assert_eq!(read(&workspace.path("out"))["m.experts.down_proj"][..4], first);
    }
}

#[test]
fn a_tied_head_is_changed_on_request_and_once() {
    let workspace = Workspace::new();
    workspace.base(
        Dtype::F32,
        "{\"tie_word_embeddings\":true}",
        &[("model.embed_tokens.weight", &[3, 2], vec![1.0; 6])],
    );
    let config = r#""r":1,"lora_alpha":1"#;
    let head: Tensors<'_> =
        &[("lm_head.lora_A.weight", &[1, 2], vec![1.0, 10.0]), ("lm_head.lora_B.weight", &[3, 1], vec![1.0, 2.0, 3.0])];
    let adapter = workspace.lora("a", config, head);
    let refused = said(workspace.merge(std::slice::from_ref(&adapter), AdapterReading::default()));
    assert!(
        refused.contains("the adapter was trained for this one alone: merged, it would change the others too"),
        "{refused}"
    );
    let expected = [2.0, 11.0, 3.0, 21.0, 4.0, 31.0];
    let report = workspace.merge(&[adapter], AdapterReading { tied_head: true, ..Default::default() }).unwrap();
    assert!(report.notes[0].contains("what is merged into one changes the others"), "{:?}", report.notes);
    assert_eq!(read(&workspace.path("out"))["model.embed_tokens.weight"], expected);
    // An adapter of both, with the same factors, needs no asking and is added once.
    let mut both = head.to_vec();
    both.push(("model.embed_tokens.lora_embedding_A", &[1, 3], vec![1.0, 2.0, 3.0]));
    both.push(("model.embed_tokens.lora_embedding_B", &[2, 1], vec![1.0, 10.0]));
    let report = workspace.merge(&[workspace.lora("b", config, &both)], AdapterReading::default()).unwrap();
    assert!(report.notes[0].contains("merged once"), "{:?}", report.notes);
    assert_eq!(read(&workspace.path("out"))["model.embed_tokens.weight"], expected);
    both[2].2[0] = 9.0;
    let refused = said(workspace.merge(&[workspace.lora("c", config, &both)], AdapterReading::default()));
    assert!(refused.contains("different matrices for the two"), "{refused}");
}

// --- laws

/// A base of 16-bit and 64-bit weights whose sizes hurt, two LoRAs of which one has magnitudes, and a sparse adapter.
fn mixture(workspace: &Workspace, dtype: Dtype) -> Vec<MergeInput> {
    let mut random = Random(5);
    let mut numbers = |n: u64| (0..n).map(|_| random.delta()).collect::<Vec<f32>>();
    let base = workspace.base(
        dtype,
        "{\"model_type\":\"llama\",\"tie_word_embeddings\":false}",
        &[
            ("m.a.weight", &[77, 130], numbers(77 * 130)),
            ("m.b.weight", &[130, 33], numbers(130 * 33)),
            ("m.c.weight", &[40, 50], numbers(40 * 50)),
            ("m.other", &[9], numbers(9)),
            ("m.wte.weight", &[90, 20], numbers(90 * 20)),
        ],
    );
    let plain: Tensors<'_> = &[
        ("m.a.lora_A.weight", &[5, 130], numbers(5 * 130)),
        ("m.a.lora_B.weight", &[77, 5], numbers(77 * 5)),
        ("m.b.lora_A.weight", &[5, 130], numbers(5 * 130)),
        ("m.b.lora_B.weight", &[33, 5], numbers(33 * 5)),
    ];
    let dora: Tensors<'_> = &[
        ("m.c.lora_A.weight", &[2, 50], numbers(100)),
        ("m.c.lora_B.weight", &[40, 2], numbers(80)),
        ("m.c.lora_magnitude_vector", &[40], (0..40).map(|i| 1.0 + i as f32 / 8.0).collect()),
        ("m.wte.lora_embedding_A", &[2, 90], numbers(180)),
        ("m.wte.lora_embedding_B", &[20, 2], numbers(40)),
        ("m.wte.lora_magnitude_vector", &[20], (0..20).map(|i| 1.0 + i as f32 / 8.0).collect()),
    ];
    let other: Tensors<'_> =
        &[("m.a.lora_A.weight", &[3, 130], numbers(3 * 130)), ("m.a.lora_B.weight", &[77, 3], numbers(77 * 3))];
    let sparse = workspace.path("sparse.safetensors");
    world::write_adapter(&base, &sparse, 3, &["m.a.weight"], false);
    vec![
        workspace.lora("plain", r#""r":5"#, plain),
        MergeInput { scale: Some(0.25), ..workspace.lora("other", r#""r":3"#, other) },
        workspace.lora("dora", r#""r":2,"use_dora":true"#, dora),
        MergeInput { adapter: sparse, scale: Some(0.5) },
    ]
}

#[test]
fn the_bytes_do_not_depend_on_threads_memory_or_the_order_of_adapters() {
    let workspace = Workspace::new();
    let mut inputs = mixture(&workspace, Dtype::BF16);
    let mut first: Option<(Vec<u8>, serde_json::Value)> = None;
    for (n_threads, max_memory) in [(1, 1 << 30), (2, 1 << 16), (3, 1 << 22), (8, 1)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        inputs.rotate_left(1);
        let ctx = Context { max_memory, ..Context::default() };
        let options = replacing(&workspace.path("out"));
        let report = pool.install(|| merge::merge(&ctx, &workspace.path("base"), &inputs, &options)).unwrap();
        let found = (bytes_of(&workspace.path("out")), serde_json::to_value(&report).unwrap());
        assert!(*first.get_or_insert_with(|| found.clone()) == found, "{n_threads} threads");
        let record = fs::read(workspace.path("out/.neuroada/ledger")).unwrap();
        let kept = workspace.path("record");
        if kept.exists() {
            assert_eq!(fs::read(&kept).unwrap(), record);
        }
        fs::write(&kept, record).unwrap();
        assert!(verify(&ctx, &workspace.path("out"), Some(&workspace.path("base"))).unwrap().ok);
    }
}

#[test]
fn every_sum_is_the_plain_formula() {
    let workspace = Workspace::new();
    let inputs = mixture(&workspace, Dtype::F64);
    workspace.merge(&inputs[..1], AdapterReading::default()).unwrap();
    let (base, merged) = (read(&workspace.path("base")), read(&workspace.path("out")));
    let factors = read(&workspace.path("plain/adapter_model.safetensors"));
    let (a, b) = (&factors["m.a.lora_A.weight"], &factors["m.a.lora_B.weight"]);
    for (at, &weight) in base["m.a.weight"].iter().enumerate() {
        let (row, column) = (at / 130, at % 130);
        let sum = (0..5).fold(0.0f32, |sum, t| b[row * 5 + t].mul_add(a[t * 130 + column], sum));
        let expected = f64::from(weight) + f64::from(sum * 1.6);
        assert_eq!(merged["m.a.weight"][at], expected as f32, "[{row}, {column}]");
    }
}

#[test]
fn undoing_restores_every_bit_from_the_base_or_from_kept_originals() {
    let workspace = Workspace::new();
    let inputs = mixture(&workspace, Dtype::BF16);
    let base = workspace.path("base");
    let ctx = Context::default();
    for keep in [KeptOriginals::Hashes, KeptOriginals::Whole] {
        let from = (keep == KeptOriginals::Hashes).then_some(base.as_path());
        let options = |name: &str| MergeOptions { keep, ..replacing(&workspace.path(name)) };
        let undo = |name: &str| MergeOptions { base: from.map(Path::to_owned), ..options(name) };
        let report = merge::merge(&ctx, &base, &inputs, &options("out")).unwrap();
        assert_eq!(report.needs_base, keep == KeptOriginals::Hashes);
        assert!(verify(&ctx, &workspace.path("out"), from).unwrap().ok);
        // All out: the base's bytes, and no memory of the merge.
        merge::unmerge(&ctx, &workspace.path("out"), &Which::All, &undo("undone")).unwrap();
        assert_eq!(bytes_of(&workspace.path("undone")), bytes_of(&base));
        assert!(!workspace.path("undone/.neuroada").exists());
        // One out: the bytes of merging the others alone.
        let id = merge::adapter_id(&ctx, &inputs[0].adapter).unwrap();
        merge::unmerge(&ctx, &workspace.path("out"), &Which::Some(vec![id]), &undo("less")).unwrap();
        merge::merge(&ctx, &base, &inputs[1..], &options("others")).unwrap();
        assert_eq!(bytes_of(&workspace.path("less")), bytes_of(&workspace.path("others")));
        assert!(verify(&ctx, &workspace.path("less"), from).unwrap().ok);
    }
}

#[test]
fn undoing_refuses_another_base_and_verify_finds_a_changed_weight() {
    let workspace = Workspace::new();
    let inputs = mixture(&workspace, Dtype::BF16);
    let ctx = Context::default();
    workspace.merge(&inputs, AdapterReading::default()).unwrap();
    let out = workspace.path("out");
    let without = merge::unmerge(&ctx, &out, &Which::All, &MergeOptions::new_checkpoint(workspace.path("undone")));
    assert!(said(without).contains("undoing needs the base base"));
    let flip = |path: &Path| {
        let mut bytes = bytes_of(path);
        // The last two tensors of the file are touched.
        let at = bytes.len() - 3;
        bytes[at] ^= 1;
        fs::write(path.join("model.safetensors"), bytes).unwrap();
    };
    flip(&workspace.path("base"));
    let base = workspace.path("base");
    let from_base = MergeOptions { base: Some(base.clone()), ..MergeOptions::new_checkpoint(workspace.path("undone")) };
    let other = merge::unmerge(&ctx, &out, &Which::All, &from_base);
    assert!(said(other).contains("differ from those of the merge"));
    assert!(!workspace.path("undone").exists());
    flip(&workspace.path("base"));
    flip(&out);
    for base in [Some(base.as_path()), None] {
        let report = verify(&ctx, &out, base).unwrap();
        assert!(!report.ok && report.problems.len() == 1, "{:?}", report.problems);
    }
}

#[test]
fn what_cannot_be_combined_is_refused_and_nothing_is_written() {
    let workspace = Workspace::new();
    let inputs = mixture(&workspace, Dtype::BF16);
    let plain = &inputs[0];
    let full: Tensors<'_> = &[("base_model.model.m.a.weight", &[77, 130], vec![0.0; 77 * 130])];
    let absent: Tensors<'_> =
        &[("m.x.lora_A.weight", &[1, 50], vec![0.0; 50]), ("m.x.lora_B.weight", &[40, 1], vec![0.0; 40])];
    let resized: Tensors<'_> = &[("base_model.model.m.a.weight", &[78, 130], vec![0.0; 78 * 130])];
    for (adapters, expected) in [
        (vec![plain.clone(), plain.clone()], "is given twice"),
        (vec![plain.clone(), workspace.lora("full", r#""r":1"#, full)], "one adapter holds it in full"),
        (vec![workspace.lora("absent", r#""r":1"#, absent)], "\"m.x.weight\": the base has no such tensor"),
        (vec![workspace.lora("resized", r#""r":1"#, resized)], "--allow-new-tensors puts the adapter's in its place"),
        (vec![MergeInput { scale: Some(1e300), ..plain.clone() }], "not a number that float32 holds"),
    ] {
        let found = said(workspace.merge(&adapters, AdapterReading::default()));
        assert!(found.contains(expected), "{expected}: {found}");
        assert!(!workspace.path("out").exists(), "{expected}");
    }
    workspace.merge(std::slice::from_ref(plain), AdapterReading::default()).unwrap();
    let options = MergeOptions::new_checkpoint(workspace.path("again"));
    let again = merge::merge(&Context::default(), &workspace.path("out"), &inputs[..1], &options);
    assert!(said(again).contains("is already merged into it"));
}

#[test]
fn weights_of_eight_bits_and_integers_are_refused() {
    let workspace = Workspace::new();
    let tensors: Tensors<'_> =
        &[("q.lora_A.weight", &[1, 3], vec![0.0; 3]), ("q.lora_B.weight", &[2, 1], vec![0.0; 2])];
    for (dtype, expected) in [(Dtype::F8_E4M3, "mean nothing without the scales"), (Dtype::U8, "the base has U8")] {
        workspace.base(dtype, "{}", &[("q.weight", &[2, 3], vec![0.0; 6])]);
        let found = said(workspace.merge(&[workspace.lora("a", r#""r":1"#, tensors)], AdapterReading::default()));
        assert!(found.contains(expected), "{found}");
    }
}
