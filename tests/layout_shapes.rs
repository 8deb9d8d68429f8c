//! Every code and every scale of the quantized formats, and stored tensors that do not fit one another.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{fs, path::Path};

use half::{bf16, f16};
use neuroada_ckpt::{
    Checkpoint, Context, Dtype, ErrorKind, Existing, Failure, MaskError, MaskOptions, create_mask,
    internals::{
        checkpoint::TensorFileWriter,
        tensor::{F8E4M3, F8E5M2},
    },
};

/// A stored tensor: name, type, shape, bytes.
type Stored<'a> = (&'a str, Dtype, &'a [u64], Vec<u8>);

/// Writes a checkpoint of one file and its config.
fn write(folder: &Path, config: &str, tensors: &[Stored<'_>]) -> Checkpoint {
    let mut writer = TensorFileWriter::create(&folder.join("model.safetensors"), Existing::Replace).unwrap();
    for (name, dtype, shape, bytes) in tensors {
        let id = writer.add_tensor((*name).to_owned(), *dtype);
        writer.append(id, bytes).unwrap();
        writer.finish_tensor(id, shape.to_vec());
    }
    writer.finish(&Context::default(), &Default::default()).unwrap();
    fs::write(folder.join("config.json"), config).unwrap();
    Checkpoint::open(folder).unwrap()
}

fn decoded(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let weight = checkpoint.weight(name).unwrap().unwrap();
    let bytes = weight.read(&Context::default(), 0..weight.info.n_bytes()).unwrap();
    bytes.chunks_exact(4).map(|le| f32::from_le_bytes(le.try_into().unwrap())).collect()
}

fn assert_same(found: &[f32], expected: impl IntoIterator<Item = f32>, what: &str) {
    let expected: Vec<f32> = expected.into_iter().collect();
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        assert!(a == b || (a.is_nan() && b.is_nan()), "{what}: element {i} is {a}, not {b}");
    }
}

fn all_bytes() -> Vec<u8> {
    (0..=255).collect()
}

fn power(exponent: i32) -> f32 {
    // Of two halves, since 2^-127 is not normal.
    2f32.powi(exponent / 2) * 2f32.powi(exponent - exponent / 2)
}

#[test]
fn all_codes_and_all_scales_of_fp8() {
    let folder = tempfile::tempdir().unwrap();
    for (dtype, number) in [
        (Dtype::F8_E4M3, (|code| F8E4M3::from_bits(code).to_f32()) as fn(u8) -> f32),
        (Dtype::F8_E5M2, |code| F8E5M2::from_bits(code).to_f32()),
    ] {
        // A scale for each row: all exponents, and all bit patterns of the high byte of wider types.
        let codes = all_bytes().repeat(256);
        let exponents = |e: u8| if e == 255 { f32::NAN } else { power(i32::from(e) - 127) };
        let wide = |e: u8| f32::from_bits(u32::from(e) << 24 | 0x12_3456);
        for (scale_dtype, scales, value) in [
            (Dtype::F8_E8M0, all_bytes(), &exponents as &dyn Fn(u8) -> f32),
            (Dtype::U8, all_bytes(), &exponents),
            (Dtype::F32, all_bytes().into_iter().flat_map(|e| wide(e).to_le_bytes()).collect(), &wide),
            (Dtype::BF16, all_bytes().into_iter().flat_map(|e| [0x57, e]).collect(), &|e| {
                bf16::from_bits(u16::from(e) << 8 | 0x57).to_f32()
            }),
            (Dtype::F16, all_bytes().into_iter().flat_map(|e| [0x57, e]).collect(), &|e| {
                f16::from_bits(u16::from(e) << 8 | 0x57).to_f32()
            }),
        ] {
            let stored: [Stored<'_>; 2] = [
                ("a.q_proj.weight", dtype, &[256, 256], codes.clone()),
                ("a.q_proj.weight_scale", scale_dtype, &[256, 1], scales),
            ];
            let checkpoint = write(folder.path(), "{}", &stored);
            let expected = all_bytes().into_iter().flat_map(|e| all_bytes().into_iter().map(move |code| (code, e)));
            let expected = expected.map(|(code, e)| number(code) * value(e));
            assert_same(&decoded(&checkpoint, "a.q_proj.weight"), expected, &format!("{dtype:?} by {scale_dtype:?}"));
        }
    }
}

#[test]
fn all_codes_and_all_scales_of_fp4() {
    let folder = tempfile::tempdir().unwrap();
    let e2m1 = [0.0f32, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let number = |code: u8| if code < 8 { e2m1[usize::from(code)] } else { -e2m1[usize::from(code - 8)] };
    // Each row has every pair of codes, and one scale in all its groups.
    let codes = all_bytes().repeat(256);
    let of_pairs = |scale: f32| {
        all_bytes().into_iter().flat_map(move |pair| [number(pair & 15) * scale, number(pair >> 4) * scale])
    };
    let mx: [Stored<'_>; 2] = [
        ("a.q_proj.weight_packed", Dtype::U8, &[256, 256], codes.clone()),
        ("a.q_proj.weight_scale", Dtype::U8, &[256, 16], all_bytes().into_iter().flat_map(|e| [e; 16]).collect()),
    ];
    let checkpoint = write(folder.path(), "{}", &mx);
    let expected =
        all_bytes().into_iter().flat_map(|e| of_pairs(if e == 255 { f32::NAN } else { power(i32::from(e) - 127) }));
    assert_same(&decoded(&checkpoint, "a.q_proj.weight"), expected, "MXFP4");
    assert_eq!(checkpoint.weight("a.q_proj.weight").unwrap().unwrap().layout().unwrap().name(), "mxfp4");
    drop(checkpoint);

    let global = 0.0123f32;
    for (part, name, is_divided) in
        [("weight_global_scale", "weight_packed", true), ("weight_scale_2", "weight", false)]
    {
        let (codes_name, global_name) = (format!("a.q_proj.{name}"), format!("a.q_proj.{part}"));
        let nv: [Stored<'_>; 3] = [
            (&codes_name, Dtype::U8, &[256, 256], codes.clone()),
            (
                "a.q_proj.weight_scale",
                Dtype::F8_E4M3,
                &[256, 32],
                all_bytes().into_iter().flat_map(|e| [e; 32]).collect(),
            ),
            (&global_name, Dtype::F32, &[], global.to_le_bytes().to_vec()),
        ];
        let checkpoint = write(folder.path(), "{}", &nv);
        let scale = |e: u8| F8E4M3::from_bits(e).to_f32();
        let expected = all_bytes()
            .into_iter()
            .flat_map(|e| of_pairs(if is_divided { scale(e) / global } else { scale(e) * global }));
        assert_same(&decoded(&checkpoint, "a.q_proj.weight"), expected, name);
    }
}

#[test]
fn packed_integers_of_every_width() {
    let folder = tempfile::tempdir().unwrap();
    for n_bits in 1..=8u64 {
        // 64 rows of 96 columns; every value comes.
        let values: Vec<u32> =
            (0..64 * 96u32).map(|i| i.wrapping_mul(2_654_435_761) >> 7 & ((1 << n_bits) - 1)).collect();
        let words = 96 * n_bits / 32;
        let mut codes = Vec::new();
        for row in values.chunks(96) {
            let mut bits = vec![0u8; (words * 4) as usize];
            for (i, value) in row.iter().enumerate() {
                for bit in (0..n_bits).filter(|bit| value >> bit & 1 == 1) {
                    let at = i as u64 * n_bits + bit;
                    bits[(at / 8) as usize] |= 1 << (at % 8);
                }
            }
            codes.extend(bits);
        }
        let shape = [64i64, 96].into_iter().flat_map(i64::to_le_bytes).collect();
        let scales = (0..64 * 3).flat_map(|i| bf16::from_f32(0.01 * (i % 5 + 1) as f32).to_le_bytes()).collect();
        let config = format!(
            r#"{{"quantization_config":{{"quant_method":"compressed-tensors","config_groups":{{"g":{{"weights":{{"num_bits":{n_bits},"group_size":32}}}}}}}}}}"#
        );
        let checkpoint = write(
            folder.path(),
            &config,
            &[
                ("a.q_proj.weight_packed", Dtype::I32, &[64, words], codes),
                ("a.q_proj.weight_shape", Dtype::I64, &[2], shape),
                ("a.q_proj.weight_scale", Dtype::BF16, &[64, 3], scales),
            ],
        );
        let expected = values.iter().enumerate().map(|(i, &value)| {
            let group = i / 96 * 3 + i % 96 / 32;
            (value as f32 - (1u32 << (n_bits - 1)) as f32) * bf16::from_f32(0.01 * (group % 5 + 1) as f32).to_f32()
        });
        assert_same(&decoded(&checkpoint, "a.q_proj.weight"), expected, &format!("{n_bits} bits"));
    }
}

/// The message with which the weight `a.q_proj.weight` of such a checkpoint is refused, by a mask too.
fn refusal(folder: &Path, config: &str, tensors: &[Stored<'_>]) -> String {
    let checkpoint = write(folder, config, tensors);
    let error = checkpoint.weight("a.q_proj.weight").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    let options = MaskOptions { targets: vec!["q_proj".to_owned()], ..MaskOptions::new(1) };
    let of_mask = create_mask(&Context::default(), &checkpoint, &options, None).unwrap_err();
    assert!(matches!(of_mask, MaskError::Checkpoint(_)), "{of_mask}");
    assert_eq!(of_mask.to_string(), error.to_string());
    assert!(error.to_string().contains("\"a.q_proj.weight\" is stored as"), "{error}");
    error.to_string()
}

#[test]
fn stored_tensors_that_do_not_fit_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let fp8 = |shape: &'static [u64], scale: Stored<'static>| -> [Stored<'static>; 2] {
        let n = shape.iter().product::<u64>() as usize;
        [("a.q_proj.weight", Dtype::F8_E4M3, shape, vec![0; n]), scale]
    };
    let block = r#"{"quantization_config":{"quant_method":"fp8","weight_block_size":[128,128]}}"#;
    // Too few scales, of a type that scales have not, with another number of dimensions.
    let message =
        refusal(at, block, &fp8(&[300, 300], ("a.q_proj.weight_scale_inv", Dtype::F32, &[3, 2], vec![0; 24])));
    assert!(message.contains("weight_scale_inv\" have shape [3, 2]") && message.contains("[300, 300]"), "{message}");
    let message = refusal(at, block, &fp8(&[4, 8], ("a.q_proj.weight_scale_inv", Dtype::I32, &[1, 1], vec![0; 4])));
    assert!(message.contains("scales are I32"), "{message}");
    let message = refusal(at, block, &fp8(&[4, 8], ("a.q_proj.weight_scale_inv", Dtype::F32, &[2, 2, 2], vec![0; 32])));
    assert!(message.contains("[2, 2, 2]"), "{message}");
    let message = refusal(at, block, &fp8(&[4], ("a.q_proj.weight_scale_inv", Dtype::F32, &[1], vec![0; 4])));
    assert!(message.contains("is no matrix"), "{message}");
    let message = refusal(at, block, &[("a.q_proj.weight", Dtype::F8_E4M3, &[4, 8], vec![0; 32])]);
    assert!(message.contains("its scales are missing"), "{message}");

    // Packed integers: words that no width makes, a shape that is none, indices of groups that are not there.
    let shape = |sizes: [i64; 2]| sizes.into_iter().flat_map(i64::to_le_bytes).collect::<Vec<u8>>();
    let packed = |words: u64, sizes: [i64; 2]| -> Vec<Stored<'static>> {
        let stored: &'static [u64] = Box::leak(Box::new([4, words]));
        vec![
            ("a.q_proj.weight_packed", Dtype::I32, stored, vec![0; (16 * words) as usize]),
            ("a.q_proj.weight_scale", Dtype::BF16, &[4, 2], vec![0; 16]),
            ("a.q_proj.weight_shape", Dtype::I64, &[2], shape(sizes)),
        ]
    };
    let message = refusal(at, "{}", &packed(9, [4, 64]));
    assert!(message.contains("does not hold rows of 64 integers"), "{message}");
    let message = refusal(at, "{}", &packed(8, [4, -64]));
    assert!(message.contains("which is no matrix"), "{message}");
    let message = refusal(at, "{}", &packed(8, [5, 64]));
    assert!(message.contains("does not hold the rows"), "{message}");
    let mut with_groups = packed(8, [4, 64]);
    let groups = |last: i32| [vec![0; 63 * 4], last.to_le_bytes().to_vec()].concat();
    with_groups.push(("a.q_proj.weight_g_idx", Dtype::I32, &[64], groups(2)));
    let message = refusal(at, "{}", &with_groups);
    assert!(message.contains("entry 63 is 2, there are 2 groups"), "{message}");
    with_groups.last_mut().unwrap().3 = groups(-1);
    assert!(refusal(at, "{}", &with_groups).contains("entry 63 is -1"));
    with_groups.last_mut().unwrap().3 = vec![0xff; 256];
    assert!(write(at, "{}", &with_groups).weight("a.q_proj.weight").is_ok(), "all -1 means that nothing is reordered");

    // FP4 whose groups do not divide, NVFP4 with a scale that is none.
    let fp4: [Stored<'_>; 2] = [
        ("a.q_proj.weight_packed", Dtype::U8, &[4, 20], vec![0; 80]),
        ("a.q_proj.weight_scale", Dtype::U8, &[4, 3], vec![0; 12]),
    ];
    let message = refusal(at, "{}", &fp4);
    assert!(message.contains("does not hold a scale for each 32 elements"), "{message}");
    let nvfp4: [Stored<'_>; 3] = [
        ("a.q_proj.weight", Dtype::U8, &[4, 16], vec![0; 64]),
        ("a.q_proj.weight_scale", Dtype::F8_E4M3, &[4, 2], vec![0; 8]),
        ("a.q_proj.weight_scale_2", Dtype::F32, &[2], vec![0; 8]),
    ];
    assert!(refusal(at, "{}", &nvfp4).contains("holds more than one number"));

    // GPTQ whose parts do not fit, AWQ of a version that packs otherwise, torchao.
    let gptq = |rows: u64| -> [Stored<'static>; 3] {
        let scales: &'static [u64] = Box::leak(Box::new([rows, 16]));
        [
            ("a.q_proj.qweight", Dtype::I32, &[8, 16], vec![0; 512]),
            ("a.q_proj.qzeros", Dtype::I32, &[2, 2], vec![0; 16]),
            ("a.q_proj.scales", Dtype::F16, scales, vec![0; 32 * rows as usize]),
        ]
    };
    let config = |method: &str, more: &str| {
        format!(r#"{{"quantization_config":{{"quant_method":"{method}","bits":4,"group_size":32{more}}}}}"#)
    };
    assert!(refusal(at, &config("gptq", ""), &gptq(3)).contains("do not fit one another"));
    assert!(refusal(at, &config("awq", r#","version":"gemv""#), &gptq(2)).contains("AWQ's version \"gemv\""));
    assert!(refusal(at, &config("gptq", "").replace("\"bits\":4", "\"bits\":9"), &gptq(2)).contains("9 bits"));
    let torchao: [Stored<'_>; 2] = [
        ("a.q_proj._weight_qdata", Dtype::I8, &[4, 8], vec![0; 32]),
        ("a.q_proj._weight_scale", Dtype::F32, &[4, 1], vec![0; 16]),
    ];
    assert!(refusal(at, "{}", &torchao).contains("torchao's layouts"));
}
