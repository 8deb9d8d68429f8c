//! What a weight is: which stored tensor a name of an adapter means, which way round, and what else changes with it. Every case is
//! one that was merged wrongly or refused before there was a map of weights; the numbers are small enough to check by eye.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

use std::{collections::BTreeMap, fs, path::Path};

use neuroada_ckpt::{
    AdapterReading, Answers, Axes, Checkpoint, Context, Dtype, Existing, ExpertOrder, MaskFile, MaskOptions,
    MergeOptions, VerifyOptions, WeightMap, Which, create_mask, diff_checkpoints, internals::merge,
};

#[path = "support/lora.rs"]
mod lora;

use lora::{Tensors, Workspace, read, said, write_tensors};

const CONFIG: &str = r#""r":1,"lora_alpha":1"#;
/// `B A` is `[[1, 2], [3, 6]]`, and transposed `[[1, 3], [2, 6]]`.
const OUT_IN: [f32; 4] = [1.0, 2.0, 3.0, 6.0];
const IN_OUT: [f32; 4] = [1.0, 3.0, 2.0, 6.0];

/// The factors of a module whose product is `[[1, 2], [3, 6]]`.
fn factors(module: &str) -> Vec<(String, &'static [u64], Vec<f32>)> {
    vec![
        (format!("base_model.model.{module}.lora_A.weight"), &[1, 2], vec![1.0, 2.0]),
        (format!("base_model.model.{module}.lora_B.weight"), &[2, 1], vec![1.0, 3.0]),
    ]
}

fn borrowed<'a>(tensors: &'a [(String, &'a [u64], Vec<f32>)]) -> Vec<(&'a str, &'a [u64], Vec<f32>)> {
    tensors.iter().map(|(name, shape, values)| (name.as_str(), *shape, values.clone())).collect()
}

/// Merges an adapter of these modules and returns the tensors.
fn merged(
    workspace: &Workspace,
    config: &str,
    modules: &[&str],
    reading: AdapterReading,
) -> Result<BTreeMap<String, Vec<f32>>, String> {
    let tensors: Vec<_> = modules.iter().flat_map(|module| factors(module)).collect();
    let adapter = workspace.lora("adapter", config, &borrowed(&tensors));
    match workspace.merge(&[adapter], reading) {
        Ok(_) => Ok(read(&workspace.path("out"))),
        Err(error) => Err(error.to_string()),
    }
}

fn asked(axes: &str) -> AdapterReading {
    AdapterReading { axes: vec![axes.parse().unwrap()], ..AdapterReading::default() }
}

fn renaming(rule: &str) -> AdapterReading {
    AdapterReading { renames: vec![rule.parse().unwrap()], ..AdapterReading::default() }
}

const SQUARE: &[u64] = &[2, 2];

// --- names

#[test]
fn one_weight_is_found_under_all_its_names() {
    for (model_type, stored, keys) in [
        // The text model's adapter on models with more than text.
        ("qwen3_vl", "model.language_model.layers.0.self_attn.q_proj", &["model.layers.0.self_attn.q_proj"][..]),
        ("llava", "language_model.model.layers.0.self_attn.q_proj", &["model.layers.0.self_attn.q_proj"]),
        (
            "nemotron_h",
            "backbone.layers.0.self_attn.q_proj",
            &["model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.q_proj"],
        ),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", &["model.layers.0.mlp.gate"]),
        (
            "vit",
            "vit.encoder.layer.0.attention.attention.query",
            &[
                "vit.layers.0.attention.q_proj",
                "layers.0.attention.q_proj",
                "encoder.layer.0.attention.attention.query",
            ],
        ),
        // Trained on the model without its head, and the other way round.
        ("bert", "bert.encoder.layer.0.attention.self.query", &["encoder.layer.0.attention.self.query"]),
        ("bert", "encoder.layer.0.attention.self.query", &["bert.encoder.layer.0.attention.self.query"]),
        ("gpt_neox", "embed_out", &["lm_head"]),
    ] {
        let workspace = Workspace::new();
        let name = format!("{stored}.weight");
        let config = format!("{{\"model_type\":\"{model_type}\",\"tie_word_embeddings\":false}}");
        workspace.base(
            Dtype::F32,
            &config,
            &[(&name, SQUARE, vec![0.0; 4]), ("visual.x.weight", SQUARE, vec![5.0; 4])],
        );
        for key in keys {
            let found =
                merged(&workspace, CONFIG, &[key], AdapterReading::default()).unwrap_or_else(|e| panic!("{key}: {e}"));
            assert_eq!((&found[&name][..], &found["visual.x.weight"][..]), (&OUT_IN[..], &[5.0; 4][..]), "{key}");
        }
    }
}

#[test]
fn what_may_be_two_weights_is_refused_and_settled_by_a_rename() {
    let workspace = Workspace::new();
    let [text, vision] =
        ["text_model", "vision_model"].map(|tower| format!("{tower}.encoder.layers.0.self_attn.q_proj.weight"));
    let zeros = || vec![0.0; 4];
    workspace.base(Dtype::F32, r#"{"model_type":"clip"}"#, &[(&text, SQUARE, zeros()), (&vision, SQUARE, zeros())]);
    let key = "encoder.layers.0.self_attn.q_proj";
    let refused = merged(&workspace, CONFIG, &[key], AdapterReading::default()).unwrap_err();
    assert!(refused.contains("several tensors of the base may be meant") && refused.contains(&vision), "{refused}");
    let found = merged(&workspace, CONFIG, &[key], renaming("encoder.*=vision_model.encoder.*")).unwrap();
    assert_eq!((&found[&vision][..], &found[&text][..]), (&OUT_IN[..], &[0.0; 4][..]));
    // The result remembers the answer: it can be proven and undone.
    let out = workspace.path("out");
    let base = workspace.path("base");
    let report = merge::verify(
        &Context::default(),
        &out,
        &VerifyOptions { base: Some(base.clone()), ..VerifyOptions::default() },
    )
    .unwrap();
    assert!(report.ok, "{:?}", report.problems);
    let options = MergeOptions { base: Some(base.clone()), ..MergeOptions::new_checkpoint(workspace.path("back")) };
    merge::unmerge(&Context::default(), &out, &Which::All, &options).unwrap();
    assert_eq!(read(&workspace.path("back")), read(&base));
    // A rule that leads nowhere, one for no key, and two for one, are mistakes.
    let nowhere = merged(&workspace, CONFIG, &[key], renaming("encoder.*=nowhere.*")).unwrap_err();
    assert!(
        nowhere.contains("no tensor \"nowhere.layers.0.self_attn.q_proj.weight\", which a rename made of it"),
        "{nowhere}"
    );
    let idle = merged(&workspace, CONFIG, &[key], renaming("decoder.*=vision_model.encoder.*")).unwrap_err();
    assert!(idle.contains("no key of an adapter is called so"), "{idle}");
    let mut twice = renaming("encoder.*=vision_model.encoder.*");
    twice.renames.push("encoder.layers.*=text_model.encoder.layers.*".parse().unwrap());
    let twice = merged(&workspace, CONFIG, &[key], twice).unwrap_err();
    assert!(twice.contains("both encoder.*=vision_model.encoder.* and encoder.layers.*"), "{twice}");
}

#[test]
fn the_class_that_an_adapter_was_trained_on_tells_its_part_of_the_model() {
    let workspace = Workspace::new();
    let [text, vision] =
        ["text_model", "vision_model"].map(|tower| format!("{tower}.encoder.layers.0.self_attn.q_proj.weight"));
    let zeros = || vec![0.0; 4];
    workspace.base(Dtype::F32, r#"{"model_type":"clip"}"#, &[(&text, SQUARE, zeros()), (&vision, SQUARE, zeros())]);
    for (class, name, other) in [("CLIPTextModel", &text, &vision), ("CLIPVisionModel", &vision, &text)] {
        let config = format!("{CONFIG},\"auto_mapping\":{{\"base_model_class\":\"{class}\"}}");
        let key = "encoder.layers.0.self_attn.q_proj";
        let found = merged(&workspace, &config, &[key], AdapterReading::default()).unwrap();
        assert_eq!((&found[name][..], &found[other][..]), (&OUT_IN[..], &[0.0; 4][..]), "{class}");
    }
}

#[test]
fn an_expert_of_a_renamed_module_is_found_in_its_stack() {
    let workspace = Workspace::new();
    let stack = "odd.layers.0.experts.down_proj";
    workspace.base(Dtype::F32, r#"{"model_type":"gpt_oss"}"#, &[(stack, &[1, 2, 2], vec![0.0; 4])]);
    let reading = renaming("model.layers.0.mlp.experts.*=odd.layers.0.experts.*");
    let found = merged(&workspace, CONFIG, &["model.layers.0.mlp.experts.0.down_proj"], reading).unwrap();
    assert_eq!(found[stack], IN_OUT);
}

#[test]
fn a_name_that_is_not_there_is_refused_with_the_nearest() {
    let workspace = Workspace::new();
    let tensors: Tensors<'_> = &[
        ("tower.layers.0.self_attn.q_proj.weight", SQUARE, vec![0.0; 4]),
        ("model.layers.0.mlp.up_proj.weight", SQUARE, vec![0.0; 4]),
        ("model.norm.weight", &[2], vec![0.0; 2]),
    ];
    workspace.base(Dtype::F32, "{}", tensors);
    // A vision tower's weight is never taken for the text model's.
    let refused =
        merged(&workspace, CONFIG, &["visual.layers.0.self_attn.q_proj"], AdapterReading::default()).unwrap_err();
    assert!(refused.contains("no such tensor; the nearest is \"tower.layers.0.self_attn.q_proj.weight\""), "{refused}");
}

// --- which way round

/// A captioner of ViT and GPT-2, all of whose adapted weights are square.
#[test]
fn linear_and_conv1d_squares_are_told_apart_by_the_family_of_their_part() {
    let vit = "encoder.encoder.layer.0.attention.attention.query.weight";
    let gpt = "decoder.transformer.h.0.attn.c_proj.weight";
    let keys = ["encoder.layers.0.attention.q_proj", "decoder.transformer.h.0.attn.c_proj"];
    let config =
        r#"{"model_type":"vision-encoder-decoder","encoder":{"model_type":"vit"},"decoder":{"model_type":"gpt2"}}"#;
    let workspace = Workspace::new();
    workspace.base(Dtype::F32, config, &[(vit, SQUARE, vec![0.0; 4]), (gpt, SQUARE, vec![0.0; 4])]);
    // The adapter's config has the key of the module that PEFT adapted last, whichever that was.
    for fan_in_fan_out in [false, true] {
        let config = format!("{CONFIG},\"fan_in_fan_out\":{fan_in_fan_out}");
        let found = merged(&workspace, &config, &keys, AdapterReading::default()).unwrap();
        assert_eq!((&found[vit][..], &found[gpt][..]), (&OUT_IN[..], &IN_OUT[..]));
    }
    // Without a config: `q_proj` is linear in every family, and of `c_proj` another weight tells, whose bias is as long as d_out.
    workspace.base(Dtype::F32, "{}", &[(vit, SQUARE, vec![0.0; 4]), (gpt, SQUARE, vec![0.0; 4])]);
    let refused = merged(&workspace, CONFIG, &keys, AdapterReading::default()).unwrap_err();
    assert!(refused.contains("c_proj") && refused.contains("it is square, and neither its shape"), "{refused}");
    assert_eq!(merged(&workspace, CONFIG, &keys, asked("c_proj=in-out")).unwrap()[gpt], IN_OUT);
    assert_eq!(merged(&workspace, CONFIG, &keys, asked("c_proj=out-in")).unwrap()[gpt], OUT_IN);
    let beside: Tensors<'_> = &[
        (vit, SQUARE, vec![0.0; 4]),
        (gpt, SQUARE, vec![0.0; 4]),
        ("decoder.transformer.h.0.mlp.c_proj.weight", &[3, 2], vec![0.0; 6]),
        ("decoder.transformer.h.0.mlp.c_proj.bias", &[2], vec![0.0; 2]),
    ];
    workspace.base(Dtype::F32, "{}", beside);
    assert_eq!(merged(&workspace, CONFIG, &keys, AdapterReading::default()).unwrap()[gpt], IN_OUT);
}

/// gpt-oss: experts `[E, in, out]`, square; and Qwen3-VL's, whose hidden size is twice the intermediate size.
#[test]
fn an_expert_of_its_own_is_merged_into_the_stack_the_right_way_round() {
    let down = "model.layers.0.mlp.experts.down_proj";
    let gate_up = "model.layers.0.mlp.experts.gate_up_proj";
    let stack: Tensors<'_> = &[(down, &[2, 2, 2], vec![0.0; 8]), (gate_up, &[2, 2, 4], vec![0.0; 16])];
    let workspace = Workspace::new();
    for config in [r#"{"model_type":"gpt_oss"}"#, "{}"] {
        // Where the model's type says nothing, the stack beside it does.
        workspace.base(Dtype::F32, config, stack);
        for key in ["experts.1.down_proj", "experts.down_projs.1"] {
            let key = format!("model.layers.0.mlp.{key}");
            let found = merged(&workspace, CONFIG, &[&key], AdapterReading::default()).unwrap();
            assert_eq!((&found[down][..4], &found[down][4..]), (&[0.0; 4][..], &IN_OUT[..]), "{key}");
        }
    }
    // Alone and of no known model it may be either.
    workspace.base(Dtype::F32, "{}", &[(down, &[2, 2, 2], vec![0.0; 8])]);
    let key = "model.layers.0.mlp.experts.1.down_proj";
    let refused = merged(&workspace, CONFIG, &[key], AdapterReading::default()).unwrap_err();
    assert!(refused.contains("its experts are square"), "{refused}");
    assert_eq!(merged(&workspace, CONFIG, &[key], asked("down_proj=in-out")).unwrap()[down][4..], IN_OUT);
    let all = AdapterReading { expert_axes: Some(Axes::InOut), ..AdapterReading::default() };
    assert_eq!(merged(&workspace, CONFIG, &[key], all).unwrap()[down][4..], IN_OUT);

    // [E, H, 2 I] with H = 2 I = 2: `up` has the last column of each row, and what lies beside it keeps every bit.
    workspace.base(Dtype::F32, r#"{"model_type":"qwen3_vl_moe"}"#, &[(gate_up, &[2, 2, 2], vec![-0.0; 8])]);
    let up: Tensors<'_> = &[
        ("model.layers.0.mlp.experts.1.up_proj.lora_A.weight", &[1, 2], vec![1.0, 2.0]),
        ("model.layers.0.mlp.experts.1.up_proj.lora_B.weight", &[1, 1], vec![5.0]),
        ("model.layers.0.mlp.experts.0.gate_proj.lora_A.weight", &[1, 2], vec![1.0, 1.0]),
        ("model.layers.0.mlp.experts.0.gate_proj.lora_B.weight", &[1, 1], vec![7.0]),
        ("model.layers.0.mlp.experts.0.up_proj.lora_A.weight", &[1, 2], vec![1.0, 1.0]),
        ("model.layers.0.mlp.experts.0.up_proj.lora_B.weight", &[1, 1], vec![9.0]),
    ];
    let found = workspace.merged(workspace.lora("up", CONFIG, up));
    let bits: Vec<u32> = found[gate_up].iter().map(|value| value.to_bits()).collect();
    let expected = [7.0f32, 9.0, 7.0, 9.0, -0.0, 5.0, -0.0, 10.0].map(f32::to_bits);
    assert_eq!(bits, expected);

    // gpt-oss alternates gate and up in its columns.
    workspace.base(Dtype::F32, r#"{"model_type":"gpt_oss"}"#, stack);
    let found =
        merged(&workspace, CONFIG, &["model.layers.0.mlp.experts.0.up_proj"], AdapterReading::default()).unwrap();
    assert_eq!(found[gate_up][..8], [0.0, 1.0, 0.0, 3.0, 0.0, 2.0, 0.0, 6.0]);
}

#[test]
fn factors_of_a_square_stack_are_read_as_the_version_of_peft_has_them() {
    let down = "model.layers.0.mlp.experts.down_proj";
    let expert = |e: u64| format!("model.layers.0.mlp.experts.{e}.down_proj.weight");
    let factors: Tensors<'_> = &[
        ("model.layers.0.mlp.experts.lora_A.weight", &[2, 2], vec![1.0, 2.0, 0.0, 0.0]),
        ("model.layers.0.mlp.experts.lora_B.weight", &[2, 2], vec![1.0, 0.0, 3.0, 0.0]),
    ];
    let workspace = Workspace::new();
    // Which stack, with which PEFT: gpt-oss says that it is transposed, others do not, and PEFT 0.18 takes all for transposed.
    for (model_type, version, expected) in [
        ("gpt_oss", "0.21.2", IN_OUT),
        ("gpt_oss", "0.18.0", IN_OUT),
        ("qwen3_vl_moe", "0.19.0", IN_OUT),
        ("qwen3_vl_moe", "0.18.1", OUT_IN),
        ("llama4_text", "0.20.0", OUT_IN),
        ("granitemoe", "0.19.1.dev0", OUT_IN),
        ("granitemoe", "0.18.0", IN_OUT),
    ] {
        let config = format!("{{\"model_type\":\"{model_type}\"}}");
        workspace.base(Dtype::F32, &config, &[(down, &[2, 2, 2], vec![0.0; 8])]);
        let config =
            format!("{CONFIG},\"target_parameters\":[\"mlp.experts.down_proj\"],\"peft_version\":\"{version}\"");
        let found = workspace.merged(workspace.lora("a", &config, factors));
        assert_eq!(found[down][..4], expected, "{model_type}, PEFT {version}");
    }
    // Of gpt-oss the version does not matter.
    workspace.base(Dtype::F32, r#"{"model_type":"gpt_oss"}"#, &[(down, &[2, 2, 2], vec![0.0; 8])]);
    let config = format!("{CONFIG},\"target_parameters\":[\"mlp.experts.down_proj\"]");
    assert_eq!(workspace.merged(workspace.lora("a", &config, factors))[down][..4], IN_OUT);
    // Experts that lie apart are stacked as they are; without a version nobody knows.
    workspace.base(
        Dtype::F32,
        r#"{"model_type":"qwen3_moe"}"#,
        &[(&expert(0), SQUARE, vec![0.0; 4]), (&expert(1), SQUARE, vec![0.0; 4])],
    );
    let config = format!("{CONFIG},\"target_parameters\":[\"down_proj\"],\"peft_version\":\"0.21.0\"");
    assert_eq!(workspace.merged(workspace.lora("a", &config, factors))[&expert(0)], OUT_IN);
    let config = format!("{CONFIG},\"target_parameters\":[\"mlp.experts.down_proj\"]");
    let refused = said(workspace.merge(&[workspace.lora("a", &config, factors)], AdapterReading::default()));
    assert!(refused.contains("depends on the version of PEFT"), "{refused}");
}

/// `all-linear` of PEFT 0.19 on experts: the keys of `target_parameters` have no owner.
#[test]
fn a_parameter_without_an_owner_is_merged_as_with_its_owner() {
    let workspace = Workspace::new();
    let [down, q] = ["model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"];
    workspace.base(
        Dtype::F32,
        r#"{"model_type":"granitemoe"}"#,
        &[(down, &[2, 3, 2], vec![0.0; 12]), (q, SQUARE, vec![0.0; 4])],
    );
    let tensors: Tensors<'_> = &[
        ("model.layers.0.mlp.experts.lora_A.weight", &[4, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),
        ("model.layers.0.mlp.experts.lora_B.weight", &[3, 4], (0..12u8).map(f32::from).collect()),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", &[2, 2], vec![1.0, 2.0, 0.0, 0.0]),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", &[2, 2], vec![1.0, 0.0, 3.0, 0.0]),
    ];
    let of = |key: &str| {
        let config = format!("\"r\":2,\"lora_alpha\":2,\"target_parameters\":[\"{key}\"],\"peft_version\":\"0.21.0\"");
        let adapter = workspace.lora("a", &config, tensors);
        let reading = AdapterReading { expert_order: Some(ExpertOrder::RankFirst), ..AdapterReading::default() };
        workspace.merge(&[adapter], reading).unwrap();
        read(&workspace.path("out"))
    };
    let owned = of("mlp.experts.down_proj");
    assert_eq!(of("down_proj"), owned);
    assert_eq!(owned[q], OUT_IN);
    assert!(owned[down].iter().all(|value| *value != 0.0) || owned[down][0] != 0.0);
}

#[test]
fn modules_that_are_fused_on_one_side_only_share_their_rows() {
    let workspace = Workspace::new();
    let whole = "encoder.layer.0.mlp.weights_in.weight";
    workspace.base(Dtype::F32, r#"{"model_type":"dinov2"}"#, &[(whole, &[4, 2], vec![0.0; 8])]);
    let found = merged(&workspace, CONFIG, &["encoder.layer.0.mlp.up_proj"], AdapterReading::default()).unwrap();
    assert_eq!((&found[whole][..4], &found[whole][4..]), (&[0.0; 4][..], &OUT_IN[..]));
    let [gate, up] = ["gate_proj", "up_proj"].map(|half| format!("model.layers.0.mlp.{half}.weight"));
    workspace.base(Dtype::F32, "{}", &[(&gate, &[1, 2], vec![0.0; 2]), (&up, &[1, 2], vec![0.0; 2])]);
    let found = merged(&workspace, CONFIG, &["model.layers.0.mlp.gate_up_proj"], AdapterReading::default()).unwrap();
    assert_eq!((&found[&gate][..], &found[&up][..]), (&OUT_IN[..2], &OUT_IN[2..]));
}

#[test]
fn a_mask_has_the_rows_of_the_neurons_however_they_are_stored() {
    let workspace = Workspace::new();
    // Three inputs, two neurons: the first neuron's largest is input 1, the second's input 2.
    let c_fc = "transformer.h.0.mlp.c_fc.weight";
    let base =
        workspace.base(Dtype::F32, r#"{"model_type":"gpt2"}"#, &[(c_fc, &[3, 2], vec![1.0, 2.0, 9.0, 3.0, 4.0, 8.0])]);
    let checkpoint = Checkpoint::open(&base).unwrap();
    let path = workspace.path("mask.safetensors");
    let options = MaskOptions { targets: vec!["c_fc".to_owned()], ..MaskOptions::new(1) };
    let ctx = Context::default();
    create_mask(&ctx, &checkpoint, &options, Some((&path, Existing::Keep))).unwrap();
    let mask = MaskFile::open(&path).unwrap();
    let target = mask.target(c_fc).unwrap();
    assert!(target.transposed && mask.recipe().transposed == ["c_fc"]);
    assert_eq!(mask.read_columns(&ctx, target, 0..2).unwrap().columns(), [1, 2]);
    drop(mask);
    // What is known is not for the user to decide, and an answer about nothing is a mistake.
    for (axes, said) in [
        (&["c_fc=out-in"][..], "is stored as in-out, as is known from the model type gpt2"),
        (&["c_fc=in-out", "mlp.c_fc=out-in"], "--axes c_fc=in-out and --axes mlp.c_fc=out-in contradict each other"),
        (&["c_fc=in-out", "nosuch=in-out"], "--axes nosuch=in-out: no weight is of this kind"),
    ] {
        let axes = axes.iter().map(|axes| axes.parse().unwrap()).collect();
        let refused = create_mask(&ctx, &checkpoint, &MaskOptions { axes, ..options.clone() }, None).unwrap_err();
        assert!(refused.to_string().contains(said), "{refused}");
    }
}

// --- ties

/// Factors of a table of `[3, 2]`: an embedding's, and a linear layer's.
fn embedding(module: &str) -> Vec<(String, &'static [u64], Vec<f32>)> {
    vec![
        (format!("{module}.lora_embedding_A"), &[1, 3], vec![1.0, 2.0, 3.0]),
        (format!("{module}.lora_embedding_B"), &[2, 1], vec![1.0, 10.0]),
    ]
}

const TABLE: &[u64] = &[3, 2];
const CHANGED: [f32; 6] = [1.0, 10.0, 2.0, 20.0, 3.0, 30.0];

#[test]
fn every_family_is_asked_about_the_weights_that_it_ties() {
    for (config, stored, key) in [
        (r#"{"model_type":"t5"}"#, "shared", "shared"),
        (r#"{"model_type":"t5","architectures":["T5ForConditionalGeneration"]}"#, "shared", "lm_head"),
        (r#"{"model_type":"bart"}"#, "model.shared", "model.encoder.embed_tokens"),
        (r#"{"model_type":"mamba"}"#, "backbone.embeddings", "backbone.embeddings"),
        (r#"{"model_type":"whisper"}"#, "model.decoder.embed_tokens", "proj_out"),
        (r#"{"model_type":"gpt2"}"#, "transformer.wte", "lm_head"),
        (r#"{"model_type":"gpt_neox","tie_word_embeddings":true}"#, "gpt_neox.embed_in", "gpt_neox.embed_in"),
        (
            r#"{"architectures":["BertForMaskedLM"],"model_type":"bert"}"#,
            "bert.embeddings.word_embeddings",
            "cls.predictions.decoder",
        ),
        (r#"{"model_type":"gemma3"}"#, "language_model.model.embed_tokens", "model.language_model.embed_tokens"),
        (
            r#"{"model_type":"vision-encoder-decoder","decoder":{"model_type":"gpt2"}}"#,
            "decoder.transformer.wte",
            "decoder.lm_head",
        ),
    ] {
        let workspace = Workspace::new();
        let name = format!("{stored}.weight");
        let also = "model.encoder.layers.0.x.weight";
        workspace.base(Dtype::F32, config, &[(&name, TABLE, vec![0.0; 6]), (also, SQUARE, vec![0.0; 4])]);
        let adapter = workspace.lora("a", CONFIG, &borrowed(&embedding(key)));
        let refused = said(workspace.merge(std::slice::from_ref(&adapter), AdapterReading::default()));
        assert!(refused.contains("the model shares this weight"), "{config} {key}: {refused}");
        workspace.merge(&[adapter], AdapterReading { tied_head: true, ..AdapterReading::default() }).unwrap();
        assert_eq!(read(&workspace.path("out"))[&name], CHANGED, "{config} {key}");
    }
}

#[test]
fn an_encoder_without_a_head_and_an_untied_model_are_not_asked_about() {
    for (config, stored) in [
        (r#"{"model_type":"bert","architectures":["BertModel"]}"#, "embeddings.word_embeddings"),
        (
            r#"{"model_type":"bert","architectures":["BertForSequenceClassification"]}"#,
            "bert.embeddings.word_embeddings",
        ),
        (r#"{"model_type":"llama","tie_word_embeddings":false}"#, "model.embed_tokens"),
        (r#"{"model_type":"bart","tie_word_embeddings":false}"#, "model.shared"),
        (r#"{"model_type":"qwen3","architectures":["Qwen3Model"],"tie_word_embeddings":true}"#, "embed_tokens"),
    ] {
        let workspace = Workspace::new();
        let name = format!("{stored}.weight");
        // An untied BART stores a table for each reader.
        let own = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"];
        workspace.base(
            Dtype::F32,
            config,
            &[(&name, TABLE, vec![0.0; 6]), (own[0], TABLE, vec![1.0; 6]), (own[1], TABLE, vec![2.0; 6])],
        );
        assert_eq!(
            workspace.merged(workspace.lora("a", CONFIG, &borrowed(&embedding(stored))))[&name],
            CHANGED,
            "{config}"
        );
    }
}

#[test]
fn a_tied_weight_that_is_stored_twice_is_two_places_of_one_weight() {
    let workspace = Workspace::new();
    let config = r#"{"model_type":"llama","tie_word_embeddings":true}"#;
    let [embed, head] = ["model.embed_tokens.weight", "lm_head.weight"];
    workspace.base(Dtype::F32, config, &[(embed, TABLE, vec![0.0; 6]), (head, TABLE, vec![0.0; 6])]);
    let tied = AdapterReading { tied_head: true, ..AdapterReading::default() };
    let adapter = workspace.lora("a", CONFIG, &borrowed(&embedding("model.embed_tokens")));
    workspace.merge(std::slice::from_ref(&adapter), tied.clone()).unwrap();
    let found = read(&workspace.path("out"));
    assert_eq!((&found[embed][..], &found[head][..]), (&CHANGED[..], &CHANGED[..]));
    // Two that differ: which of them a loader takes depends on its version.
    workspace.base(Dtype::F32, config, &[(embed, TABLE, vec![0.0; 6]), (head, TABLE, vec![1.0; 6])]);
    let refused = said(workspace.merge(&[adapter], tied));
    assert!(refused.contains("and the two differ"), "{refused}");
}

#[test]
fn equal_copies_of_a_tied_weight_in_an_adapter_are_one_and_others_are_refused() {
    let workspace = Workspace::new();
    let [embed, head] = ["model.embed_tokens.weight", "lm_head.weight"];
    workspace.base(Dtype::F32, r#"{"model_type":"qwen2","tie_word_embeddings":true}"#, &[(embed, TABLE, vec![0.0; 6])]);
    let config = format!("{CONFIG},\"modules_to_save\":[\"embed_tokens\"],\"ensure_weight_tying\":true");
    let both = |second: f32| -> Vec<(&str, &[u64], Vec<f32>)> {
        vec![(embed, TABLE, CHANGED.to_vec()), (head, TABLE, [&CHANGED[..5], &[second]].concat())]
    };
    let report = workspace.merge(&[workspace.lora("same", &config, &both(30.0))], AdapterReading::default()).unwrap();
    assert_eq!(read(&workspace.path("out"))[embed], CHANGED);
    assert!(report.notes.iter().any(|note| note.contains("merged once")), "{:?}", report.notes);
    for tied_head in [false, true] {
        let reading = AdapterReading { tied_head, ..AdapterReading::default() };
        let refused = said(workspace.merge(&[workspace.lora("others", &config, &both(31.0))], reading));
        assert!(refused.contains("the adapter has different matrices for the two"), "{refused}");
    }
}

// --- two checkpoints

#[test]
fn checkpoints_are_compared_by_what_their_names_mean() {
    let workspace = Workspace::new();
    let old: Tensors<'_> = &[
        ("vit.encoder.layer.0.attention.attention.query.weight", SQUARE, OUT_IN.to_vec()),
        ("vit.encoder.layer.0.output.dense.weight", SQUARE, IN_OUT.to_vec()),
    ];
    let new: Tensors<'_> = &[
        ("vit.layers.0.attention.q_proj.weight", SQUARE, OUT_IN.to_vec()),
        ("vit.layers.0.mlp.fc2.weight", SQUARE, IN_OUT.to_vec()),
    ];
    let path = |name: &str| workspace.path(name);
    let write = |name: &str, tensors: Tensors<'_>| {
        fs::create_dir_all(path(name)).unwrap();
        fs::write(path(name).join("config.json"), r#"{"model_type":"vit"}"#).unwrap();
        write_tensors(&path(name).join("model.safetensors"), Dtype::F32, tensors);
        Checkpoint::open(&path(name)).unwrap()
    };
    let (a, b) = (write("old", old), write("new", new));
    assert!(diff_checkpoints(&Context::default(), &a, &b).unwrap().equal);
    let changed: Tensors<'_> = &[new[0].clone(), (new[1].0, SQUARE, vec![0.0; 4])];
    let diff = diff_checkpoints(&Context::default(), &a, &write("changed", changed)).unwrap();
    assert_eq!(diff.changed.iter().map(|tensor| tensor.tensor.as_str()).collect::<Vec<_>>(), [old[1].0]);
    assert!(diff.removed.is_empty() && diff.added.is_empty());
}

#[test]
fn a_wrong_total_size_is_a_note_and_the_result_has_the_right_one() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/accepted/index-with-wrong-total-size");
    let checkpoint = Checkpoint::open(&base).unwrap();
    assert_eq!(
        checkpoint.notes(),
        ["model.safetensors.index.json: metadata.total_size is 25, the tensors have 24 bytes"]
    );
    let workspace = Workspace::new();
    fs::create_dir(workspace.path("out")).unwrap();
    neuroada_ckpt::internals::checkpoint::copy_side_files(
        &Context::default(),
        &checkpoint,
        &workspace.path("out"),
        false,
    )
    .unwrap();
    let index = fs::read_to_string(workspace.path("out").join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 24);
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 3);
}

#[test]
fn the_map_of_many_tensors_is_made_without_looking_at_them() {
    // What is asked by its own name costs nothing; the first other name costs one pass over the names.
    let workspace = Workspace::new();
    let names: Vec<String> = (0..2000).map(|layer| format!("model.layers.{layer}.self_attn.q_proj.weight")).collect();
    let tensors: Vec<(&str, &[u64], Vec<f32>)> =
        names.iter().map(|name| (name.as_str(), SQUARE, vec![0.0; 4])).collect();
    let base = workspace.base(Dtype::F32, r#"{"model_type":"llama"}"#, &tensors);
    let checkpoint = Checkpoint::open(&base).unwrap();
    let map = WeightMap::new(&checkpoint, Answers::default()).unwrap();
    for name in &names {
        assert_eq!(map.find(name, |_| true).unwrap().tensor.info.name, *name);
        let inner = name.strip_prefix("model.").unwrap();
        assert_eq!(map.find(inner, |_| true).unwrap().tensor.info.name, *name);
    }
}
