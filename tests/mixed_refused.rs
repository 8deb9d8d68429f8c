//! What is refused with adapters of different kinds, and what is found out: nothing is written then.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    Checkpoint, Dtype, ErrorKind, Failure, KeptOriginals, MergeError, MergeInput, MergeOptions, MergeOutput,
    VerifyOptions, internals::merge,
};

#[path = "support/changes.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod changes;
#[path = "support/lora.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod lora;
#[path = "support/mixture.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod mixture;
#[path = "support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use changes::{ctx, flip, keeping, shards, whole};
use lora::Tensors;
use mixture::{DORA, EMBEDDING, FULL, LORA, Mixture, SPARSE, in_place, to_new};
use world::{Random, tree};

fn read_f32(checkpoint: &Path, name: &str) -> Vec<f32> {
    let checkpoint = Checkpoint::open(checkpoint).unwrap();
    let tensor = checkpoint.tensor(name).unwrap();
    let bytes = tensor.window(&ctx(), 0..tensor.info.n_bytes()).unwrap();
    bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn what_cannot_be_added_up_is_refused_and_leaves_the_same_tree() {
    let mixture = Mixture::new();
    let path = mixture.work();
    mixture.add(&path, &[(FULL, 1.0), (LORA[1], 1.0)], &whole()).unwrap();
    // Others of the same tensors: in full, low-rank, sparse.
    let lora = |name: &str, tensors: Tensors<'_>| {
        let folder = mixture.at(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("adapter_config.json"), r#"{"peft_type":"LORA","r":1}"#).unwrap();
        lora::write_tensors(&folder.join("adapter_model.safetensors"), Dtype::F32, tensors);
        MergeInput { adapter: folder, scale: None }
    };
    let full = lora("full", &[("base_model.model.m.head.weight", &[12, 20], vec![1.0; 240])]);
    let low_rank = lora(
        "low-rank",
        &[("m.head.lora_A.weight", &[1, 20], vec![1.0; 20]), ("m.head.lora_B.weight", &[12, 1], vec![1.0; 12])],
    );
    let over = lora("over", &[("base_model.model.m.a.weight", &[70, 33], vec![1.0; 70 * 33])]);
    world::write_adapter(&mixture.base(), &mixture.at("sparse.safetensors"), 9, &["m.head.weight"], true);
    let sparse = MergeInput { adapter: mixture.at("sparse.safetensors"), scale: None };
    // The rows of one are the columns of the other; that shows where both are sparse.
    world::write_adapter(&mixture.base(), &mixture.at("turned.safetensors"), 9, &["m.t.weight"], true);
    let turned = MergeInput { adapter: mixture.at("turned.safetensors"), scale: None };
    let before = tree(mixture.dir.path());
    let (new, base) = (to_new(&mixture.at("new"), false, None), mixture.base());
    let in_full = "one adapter holds it in full";
    for (inputs, expected) in [
        (vec![full.clone()], in_full),
        (vec![low_rank.clone()], in_full),
        (vec![sparse.clone()], in_full),
        (vec![over.clone()], in_full),
        (vec![mixture.input(LORA[1], 1.0)], "is already merged into it"),
        (vec![mixture.input(SPARSE[1], 1.0), turned.clone()], "the rows of one are the columns of the other"),
    ] {
        for options in [&whole(), &in_place(Some(base.clone())), &new] {
            let refused = merge::merge(&ctx(), &path, &inputs, options).unwrap_err();
            assert!(refused.kind() == ErrorKind::Refused && refused.to_string().contains(expected), "{refused}");
        }
    }
    for (inputs, expected) in [
        ([mixture.input(FULL, 1.0), full], "two adapters hold it in full"),
        ([mixture.input(FULL, 1.0), low_rank], in_full),
        ([mixture.input(FULL, 1.0), sparse], in_full),
        ([mixture.input(LORA[0], 1.0), over], in_full),
    ] {
        let refused = merge::merge(&ctx(), &base, &inputs, &new).unwrap_err();
        assert!(refused.kind() == ErrorKind::Refused && refused.to_string().contains(expected), "{refused}");
    }
    let scaled = merge::merge(&ctx(), &base, &[mixture.input(FULL, 0.5)], &new).unwrap_err();
    assert!(scaled.to_string().contains("a scale of 0.5 has no meaning"), "{scaled}");
    let absent = mixture.remove(&path, &[LORA[0]], &whole()).unwrap_err();
    assert!(absent.to_string().contains("is not merged into it"), "{absent}");
    assert!(tree(mixture.dir.path()) == before);
}

#[test]
fn in_place_without_a_base_and_without_kept_originals_is_refused() {
    let mixture = Mixture::new();
    let path = mixture.work();
    mixture.add(&path, &[(SPARSE[1], 1.0)], &in_place(None)).unwrap();
    let before = tree(mixture.dir.path());
    let dry = MergeOptions { dry_run: true, ..in_place(None) };
    for options in [in_place(None), dry] {
        let refused = mixture.add(&path, &[(LORA[1], 1.0)], &options).unwrap_err();
        // m.a, m.t, m.f and the experts.
        let expected = 70 * 33 * 2 + 33 * 24 * 2 + 40 * 25 * 4 + 2 * 24 * 20 * 2;
        assert!(matches!(refused, MergeError::KeepsNothing { n_bytes, .. } if n_bytes == expected), "{refused}");
    }
    assert!(tree(mixture.dir.path()) == before);
}

#[test]
fn a_base_that_is_the_checkpoint_itself_is_refused() {
    let mixture = Mixture::new();
    let path = mixture.work();
    // Its hashes would be all that is left of the originals.
    std::os::unix::fs::symlink(&path, mixture.at("link")).unwrap();
    let before = tree(mixture.dir.path());
    for base in [path.clone(), mixture.at("link")] {
        for through_links in [false, true] {
            let output = MergeOutput::InPlace { through_links };
            let options = MergeOptions { output, ..in_place(Some(base.clone())) };
            let refused = mixture.add(&path, &[(LORA[1], 1.0)], &options).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
            assert!(tree(mixture.dir.path()) == before);
        }
    }
}

#[test]
fn a_base_that_holds_the_file_that_is_merged_into_is_refused() {
    let workspace = lora::Workspace::new();
    let folder = workspace.base(Dtype::BF16, "{}", &[("m.a.weight", &[7, 3], vec![0.5; 21])]);
    let tensors: Tensors<'_> =
        &[("m.a.lora_A.weight", &[1, 3], vec![0.5; 3]), ("m.a.lora_B.weight", &[7, 1], vec![0.25; 7])];
    let adapter = workspace.lora("lora", r#""r":1"#, tensors);
    let file = folder.join("model.safetensors");
    let before = tree(&folder);
    for (path, base) in [(&file, &folder), (&folder, &file)] {
        let refused =
            merge::merge(&ctx(), path, std::slice::from_ref(&adapter), &in_place(Some(base.clone()))).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
        assert!(tree(&folder) == before);
    }
}

#[test]
fn a_saved_copy_of_the_base_own_tensor_is_no_change_where_the_ledger_has_the_original() {
    let mixture = Mixture::new();
    let folder = mixture.at("copy");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("adapter_config.json"), r#"{"peft_type":"LORA","r":1}"#).unwrap();
    let tensors: Tensors<'_> = &[
        ("base_model.model.m.a.bias", &[70], read_f32(&mixture.base(), "m.a.bias")),
        ("base_model.model.m.head.lora_A.weight", &[1, 20], vec![0.5; 20]),
        ("base_model.model.m.head.lora_B.weight", &[12, 1], vec![0.5; 12]),
    ];
    lora::write_tensors(&folder.join("adapter_model.safetensors"), Dtype::F32, tensors);
    let copy = MergeInput { adapter: folder, scale: None };
    // Single elements of the copied tensor were changed, and their originals are in the ledger.
    let path = mixture.work();
    mixture.add(&path, &[(SPARSE[2], 1.0)], &in_place(None)).unwrap();
    merge::merge(&ctx(), &path, &[copy], &whole()).unwrap();
}

#[test]
fn a_base_that_is_needed_is_called_by_its_own_name() {
    let mixture = Mixture::new();
    let path = mixture.work();
    mixture.add(&path, &[(LORA[1], 1.0)], &in_place(Some(mixture.base()))).unwrap();
    let refused = mixture.remove_all(&path, &in_place(None)).unwrap_err().to_string();
    assert!(refused.contains("undoing needs the base base"), "{refused}");
}

#[test]
fn a_base_that_shares_its_files_with_the_checkpoint_keeps_them() {
    let mixture = Mixture::new();
    for base_is_given in [true, false] {
        // Its first shard is the base's own: nothing touches it.
        let path = mixture.at("work");
        let mut options = to_new(&path, false, None);
        let MergeOutput::New { link, .. } = &mut options.output else { unreachable!() };
        *link = true;
        mixture.add(&mixture.base(), &[(EMBEDDING, 1.0)], &options).unwrap();
        let before = tree(mixture.dir.path());
        let base = base_is_given.then(|| mixture.base());
        let options = MergeOptions { keep: KeptOriginals::Whole, ..in_place(base) };
        let refused = mixture.add(&path, &[(LORA[1], 1.0)], &options).unwrap_err();
        assert!(matches!(refused, MergeError::Linked { .. }), "{refused}");
        assert!(tree(mixture.dir.path()) == before);
        for keep in [KeptOriginals::Hashes, KeptOriginals::Whole] {
            let output = MergeOutput::InPlace { through_links: true };
            let options = MergeOptions { keep, output, ..options.clone() };
            if keep == KeptOriginals::Hashes && !base_is_given {
                let refused = mixture.add(&path, &[(LORA[1], 1.0)], &options).unwrap_err();
                assert!(matches!(refused, MergeError::KeepsNothing { .. }), "{refused}");
                assert!(tree(mixture.dir.path()) == before);
                continue;
            }
            let base = tree(&mixture.base());
            mixture.add(&path, &[(LORA[1], 1.0)], &options).unwrap();
            mixture.check(&path, &mixture.sorted(vec![(LORA[1], 1.0), (EMBEDDING, 1.0)]), "linked");
            assert!(tree(&mixture.base()) == base, "the base's own files stay");
            mixture.remove(&path, &[LORA[1]], &in_place(Some(mixture.base()))).unwrap();
            mixture.check(&path, &[(EMBEDDING, 1.0)], "taken out");
        }
        fs::remove_dir_all(path).unwrap();
    }
}

#[test]
fn a_saved_copy_of_the_base_own_tensor_is_no_change_in_whatever_order() {
    let mixture = Mixture::new();
    // PEFT saves embeddings beside what it trained, unchanged.
    let copy = mixture.at("copy");
    fs::create_dir(&copy).unwrap();
    fs::write(copy.join("adapter_config.json"), r#"{"peft_type":"LORA","r":1}"#).unwrap();
    let bias = read_f32(&mixture.base(), "m.a.bias");
    let tensors: Tensors<'_> = &[
        ("base_model.model.m.a.bias", &[70], bias),
        ("base_model.model.m.head.lora_A.weight", &[1, 20], vec![0.5; 20]),
        ("base_model.model.m.head.lora_B.weight", &[12, 1], vec![0.5; 12]),
    ];
    lora::write_tensors(&copy.join("adapter_model.safetensors"), Dtype::F32, tensors);
    let copy = MergeInput { adapter: copy, scale: None };
    // The one changes single elements of the copied tensor, the other all of it.
    for other in [mixture.input(SPARSE[2], 1.0), mixture.input(LORA[0], 1.0)] {
        let options = keeping(KeptOriginals::Whole, in_place(Some(mixture.base())));
        let mut expected = None;
        for inputs in [[&copy, &other], [&other, &copy]] {
            let path = mixture.work();
            for input in inputs {
                merge::merge(&ctx(), &path, std::slice::from_ref(input), &options).unwrap();
            }
            assert!(*expected.get_or_insert_with(|| tree(&path)) == tree(&path));
            fs::remove_dir_all(path).unwrap();
        }
    }
}

#[test]
fn another_base_is_refused_and_leaves_the_same_tree() {
    let mixture = Mixture::new();
    let path = mixture.work();
    mixture.add(&path, &[(LORA[1], 1.0), (SPARSE[0], 1.0)], &in_place(Some(mixture.base()))).unwrap();
    let clean = mixture.copy(&mixture.base(), "clean");
    let merged = mixture.at("merged");
    mixture.add(&mixture.base(), &[(FULL, 1.0)], &to_new(&merged, false, None)).unwrap();
    let others: Vec<PathBuf> = ["m.a.weight", "m.f.weight", "m.experts.down_proj"]
        .iter()
        .map(|tensor| mixture.other_base(&format!("other-{tensor}"), tensor))
        .chain([merged, mixture.at("absent")])
        .collect();
    let before = tree(mixture.dir.path());
    for other in &others {
        for options in [in_place(Some(other.clone())), to_new(&mixture.at("new"), false, Some(other.clone()))] {
            mixture.remove(&path, &[LORA[1]], &options).unwrap_err();
            mixture.remove_all(&path, &options).unwrap_err();
        }
        let hashes = in_place(Some(other.clone()));
        // Where nothing is merged yet, the base that is given must be what lies there.
        mixture.add(&clean, &[(LORA[1], 1.0)], &hashes).unwrap_err();
        assert!(tree(mixture.dir.path()) == before, "{}", other.display());
    }
    let refused = mixture.remove_all(&path, &in_place(Some(others[0].clone()))).unwrap_err();
    assert!(refused.kind() == ErrorKind::Refused && refused.to_string().contains("m.a.weight"), "{refused}");
    let report =
        merge::verify(&ctx(), &path, &VerifyOptions { base: Some(others[1].clone()), ..VerifyOptions::default() });
    assert!(report.map_or(true, |report| !report.ok), "a proof against another base");
    mixture.remove_all(&path, &in_place(Some(mixture.base()))).unwrap();
    assert!(tree(&path) == tree(&mixture.base()));
}

#[test]
fn a_sparse_adapter_of_another_base_is_refused_beside_adapters_of_other_kinds() {
    let mixture = Mixture::new();
    let lora = (LORA[1], 1.0);
    let (plain, hashed, whole_kept) = (mixture.work(), mixture.at("hashed"), mixture.at("whole-kept"));
    mixture.add(&mixture.base(), &[lora], &to_new(&hashed, false, None)).unwrap();
    let keep = keeping(KeptOriginals::Whole, to_new(&whole_kept, false, None));
    mixture.add(&mixture.base(), &[lora], &keep).unwrap();
    // Rows, and rows that are stored as columns.
    for (name, transposed) in [("m.a.weight", false), ("m.t.weight", true), ("m.experts.down_proj", true)] {
        let other = mixture.at(&format!("other-{name}"));
        mixture::copy_folder(&mixture.base(), &other);
        (0..2 * 33 * 24).for_each(|byte| flip(&other, name, byte));
        let adapter = mixture.at(&format!("of-other-{name}.safetensors"));
        mixture::write_sparse(&other, &adapter, 5, &[(name, transposed)]);
        let sparse = MergeInput { adapter, scale: None };
        let before = tree(mixture.dir.path());
        let base = Some(mixture.base());
        let new = mixture.at("new");
        for (path, inputs, options) in [
            (&plain, vec![sparse.clone(), mixture.input(lora.0, 1.0)], whole()),
            (&plain, vec![sparse.clone(), mixture.input(lora.0, 1.0)], in_place(base.clone())),
            (
                &plain,
                vec![sparse.clone(), mixture.input(DORA, 1.0), mixture.input(lora.0, 1.0)],
                to_new(&new, true, None),
            ),
            (&hashed, vec![sparse.clone()], in_place(base.clone())),
            (&hashed, vec![sparse.clone()], to_new(&new, false, base)),
            (&whole_kept, vec![sparse.clone()], in_place(None)),
            (&whole_kept, vec![sparse], to_new(&new, false, None)),
        ] {
            let refused = merge::merge(&ctx(), path, &inputs, &options).unwrap_err();
            assert!(matches!(&refused, MergeError::WrongBase { tensor, .. } if tensor == name), "{refused}");
            assert!(tree(mixture.dir.path()) == before);
        }
    }
}

#[test]
fn a_mixture_without_a_ledger_is_verified_from_base_and_adapters() {
    let mixture = Mixture::new();
    let active = mixture.sorted((0..mixture.adapters.len()).map(|i| (i, mixture.adapters[i].scales[0])).collect());
    let out = mixture.at("out");
    let mut options = to_new(&out, false, None);
    let MergeOutput::New { ledger, .. } = &mut options.output else { unreachable!() };
    *ledger = false;
    mixture.add(&mixture.base(), &active, &options).unwrap();
    mixture.check(&out, &active, "without a ledger");
    assert!(!out.join(".neuroada").join("ledger").exists());
    let verify = |active: &[(usize, f64)]| {
        let (base, adapters) = (Some(mixture.base()), mixture.inputs(active));
        merge::verify(&ctx(), &out, &VerifyOptions { base, adapters, reading: mixture::reading() }).unwrap()
    };
    let proof = verify(&active);
    assert!(proof.ok, "{:?}", proof.problems);
    for without in 0..active.len() {
        let mut fewer = active.clone();
        fewer.remove(without);
        assert!(!verify(&fewer).ok, "without {:?}", active[without]);
    }
    for (_, name, ..) in mixture::TENSORS {
        flip(&out, name, 9);
        assert!(!verify(&active).ok, "{name}");
        flip(&out, name, 9);
    }
    assert!(verify(&active).ok);
}

#[test]
fn weights_that_overflow_are_refused_unless_allowed_and_come_out_again() {
    let mixture = Mixture::new();
    let path = mixture.work();
    let large = (EMBEDDING, 1e7);
    let sparse = (SPARSE[0], 0.3);
    mixture.add(&path, &[sparse], &in_place(None)).unwrap();
    let before = tree(mixture.dir.path());
    for options in [whole(), in_place(Some(mixture.base())), to_new(&mixture.at("new"), false, None)] {
        let refused = mixture.add(&path, &[large], &options).unwrap_err();
        assert!(matches!(refused, MergeError::Overflow { .. }), "{refused}");
        assert!(tree(mixture.dir.path()) == before);
    }
    let report = mixture.add(&path, &[large], &MergeOptions { allow_overflow: true, ..whole() }).unwrap();
    assert!(report.total.n_overflowed > 0);
    mixture.check(&path, &mixture.sorted(vec![large, sparse]), "infinite");
    assert!(mixture.verify(&path, true).unwrap().ok);
    mixture.remove(&path, &[sparse.0], &in_place(None)).unwrap();
    mixture.check(&path, &[large], "infinite alone");
    mixture.remove_all(&path, &in_place(None)).unwrap();
    assert!(tree(&path) == tree(&mixture.base()));
}

#[test]
fn a_weight_that_somebody_changed_is_found_before_anything_is_written() {
    let mixture = Mixture::new();
    for (options, both) in [(whole(), true), (in_place(Some(mixture.base())), false)] {
        let path = mixture.work();
        mixture.add(&path, &[(LORA[1], 1.0), (SPARSE[0], 1.0)], &options).unwrap();
        for tensor in ["m.a.weight", "m.t.weight"] {
            flip(&path, tensor, 2);
            let before = tree(mixture.dir.path());
            for asked in [mixture.verify(&path, both), mixture.verify(&path, false)] {
                assert!(!asked.unwrap().ok);
            }
            let refused = mixture.remove(&path, &[LORA[1]], &options).unwrap_err();
            assert!(matches!(refused, MergeError::Tampered { .. }), "{refused}");
            let refused = mixture.add(&path, &[(DORA, 1.0)], &options).unwrap_err();
            assert!(matches!(refused, MergeError::Tampered { .. }), "{refused}");
            assert!(tree(mixture.dir.path()) == before);
            flip(&path, tensor, 2);
        }
        fs::remove_dir_all(path).unwrap();
    }
}

#[test]
fn a_flipped_bit_of_a_whole_original_is_found_and_the_shards_stay() {
    let mixture = Mixture::new();
    let path = mixture.work();
    mixture.add(&path, &[(LORA[1], 1.0), (SPARSE[0], 1.0), (DORA, 1.0)], &whole()).unwrap();
    let ledger = path.join(".neuroada/ledger");
    let sound = fs::read(&ledger).unwrap();
    let before = shards(&path);
    let start = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&sound[8..start]).unwrap();
    let (mut random, mut n) = (Random(3), 0);
    for (name, tensor) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let offset = |at: usize| tensor["data_offsets"][at].as_u64().unwrap() as usize;
        let mut flipped = sound.clone();
        let at = start + offset(0) + random.below((offset(1) - offset(0)) as u64) as usize;
        flipped[at] ^= 1 << random.below(8);
        fs::write(&ledger, flipped).unwrap();
        for result in [
            mixture.remove_all(&path, &in_place(None)),
            mixture.remove(&path, &[LORA[1]], &in_place(None)),
            mixture.add(&path, &[(LORA[0], 1.0)], &whole()),
            mixture.remove_all(&path, &to_new(&mixture.at("new"), false, None)),
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadInput, "{name}: {error}");
            assert!(shards(&path) == before && !mixture.at("new").exists(), "{name}");
        }
        let asked = mixture.verify(&path, false);
        assert!(asked.as_ref().is_err_and(|e| e.kind() == ErrorKind::BadInput), "{name}: {asked:?}");
        n += 1;
    }
    assert!(n > 4, "{n} tensors of the ledger");
    fs::write(&ledger, &sound).unwrap();
    mixture.remove_all(&path, &in_place(None)).unwrap();
    assert!(tree(&path) == tree(&mixture.base()));
}

#[test]
fn a_dry_run_of_a_mixture_reports_the_same_and_writes_nothing() {
    let mixture = Mixture::new();
    let path = mixture.work();
    mixture.add(&path, &[(SPARSE[0], 1.0)], &in_place(None)).unwrap();
    let before = tree(mixture.dir.path());
    let active = [(LORA[0], 1.0), (DORA, 1.0), (EMBEDDING, 1.0)];
    let dry = mixture.add(&path, &active, &MergeOptions { dry_run: true, ..whole() }).unwrap();
    assert!(tree(mixture.dir.path()) == before);
    let real = mixture.add(&path, &active, &whole()).unwrap();
    assert_eq!((&dry.kinds, &dry.total, dry.bytes_written), (&real.kinds, &real.total, real.bytes_written));
    assert_eq!((dry.active, dry.added, dry.needs_base), (real.active, real.added, real.needs_base));
}
