//! Masks compared with other implementations and brute force, and their invariants.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use neuroada_ckpt::{
    Amount, Checkpoint, Context, Dtype, ErrorKind, Existing, Failure, Io, MaskFile, MaskOptions, MaskReport, Scope,
    ScoreKind, create_mask,
    internals::{
        checkpoint::{Shard, TensorFileWriter},
        tensor::{F8E4M3, F8E5M2},
    },
};
use proptest::prelude::*;

/// A tensor of a generated checkpoint.
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

impl Tensor {
    fn new(name: &str, dtype: Dtype, shape: &[u64], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|&v| encode(dtype, v)).collect();
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    }
}

fn encode(dtype: Dtype, v: f32) -> Vec<u8> {
    match dtype {
        Dtype::F64 => f64::from(v).to_le_bytes().to_vec(),
        Dtype::F32 => v.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(v).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(v).to_le_bytes().to_vec(),
        Dtype::F8_E4M3 => vec![F8E4M3::from_f32(v).to_bits()],
        Dtype::F8_E5M2 => vec![F8E5M2::from_f32(v).to_bits()],
        other => unreachable!("{other:?}"),
    }
}

/// The stored value of `v`.
fn rounded(dtype: Dtype, v: f32) -> f32 {
    match dtype {
        Dtype::F8_E4M3 => F8E4M3::from_f32(v).to_f32(),
        Dtype::F8_E5M2 => F8E5M2::from_f32(v).to_f32(),
        // All numbers here have few bits.
        _ => v,
    }
}

fn write(path: &Path, tensors: &[Tensor]) {
    let mut writer = TensorFileWriter::create(path, Existing::Replace).unwrap();
    for tensor in tensors {
        let id = writer.add_tensor(tensor.name.clone(), tensor.dtype);
        writer.append(id, &tensor.bytes).unwrap();
        writer.finish_tensor(id, tensor.shape.clone());
    }
    writer.finish(&Context::default(), &BTreeMap::new()).unwrap();
}

/// Chosen columns per target and row.
type Columns = BTreeMap<String, Vec<Vec<u32>>>;

struct Made {
    report: MaskReport,
    columns: Columns,
    bytes: Vec<u8>,
}

fn make(ctx: &Context<'_>, base: &Path, options: &MaskOptions<'_>) -> Made {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mask.safetensors");
    let checkpoint = Checkpoint::open(base).unwrap();
    let report = create_mask(ctx, &checkpoint, options, Some((&path, Existing::Keep))).unwrap();
    let mask = MaskFile::open(&path).unwrap();
    let mut columns = Columns::new();
    for target in mask.targets() {
        let rows = mask.read_columns(ctx, target, 0..target.layout.n_rows()).unwrap();
        columns.insert(target.name.clone(), (0..rows.n_rows()).map(|row| rows.row(row).to_vec()).collect());
    }
    Made { report, columns, bytes: fs::read(&path).unwrap() }
}

fn all(k: u64) -> MaskOptions<'static> {
    MaskOptions { targets: vec!["*weight".to_owned()], ..MaskOptions::new(k) }
}

fn reference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/reference/mask")
}

#[test]
fn masks_equal_those_of_torch() {
    let expected = Shard::open(&reference().join("expected.safetensors")).unwrap();
    let ctx = Context::default();
    let mut n_compared = 0;
    for k in [1, 2, 20, 256] {
        let made = make(&ctx, &reference().join("weights.safetensors"), &all(k));
        for (name, rows) in &made.columns {
            let info = expected.header().tensor(&format!("{name}.k{k}.columns")).unwrap();
            let bytes = expected.window(&ctx, info, 0..info.n_bytes()).unwrap();
            let expected: Vec<u32> =
                bytes.chunks_exact(4).map(|le| u32::from_le_bytes(le.try_into().unwrap())).collect();
            assert_eq!(rows.concat(), expected, "{name} at k={k}");
            n_compared += 1;
        }
    }
    assert_eq!(n_compared, 4 * 31);
}

#[test]
fn threads_blocks_and_io_mode_do_not_change_the_mask() {
    for scope in [Scope::Row, Scope::Tensor, Scope::Global] {
        let options = MaskOptions { scope, hash: true, ..all(20) };
        let expected = make(&Context::default(), &reference().join("weights.safetensors"), &options).bytes;
        for (threads, max_memory, io) in
            [(1, 1 << 20, Io::Mapped), (2, 1 << 20, Io::Read), (3, 1 << 30, Io::Auto), (8, 1 << 24, Io::Direct)]
        {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let ctx = Context { max_memory, io, ..Context::default() };
            let found = pool.install(|| make(&ctx, &reference().join("weights.safetensors"), &options).bytes);
            assert!(found == expected, "{scope:?} with {threads} threads");
        }
    }
}

/// Row top-k by sorting: larger score first, then the smaller column.
fn by_sorting(scores: &[f64], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

#[test]
fn every_type_and_awkward_size_equals_sorting() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("m.safetensors");
    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2] {
        for d_in in [1usize, 7, 8, 9, 31, 32, 33, 300, 4096, 4097] {
            // Few distinct values: many ties.
            let values: Vec<f32> =
                (0..3 * d_in).map(|i| rounded(dtype, ((i * 7919 + 13) % 61) as f32 / 8.0 - 3.5)).collect();
            write(&base, &[Tensor::new("a.weight", dtype, &[3, d_in as u64], &values)]);
            for k in [1usize, 2, 5, 20, 100, 5000] {
                let made = make(&Context::default(), &base, &all(k as u64));
                for (row, columns) in made.columns["a.weight"].iter().enumerate() {
                    let scores: Vec<f64> = values[row * d_in..][..d_in].iter().map(|v| f64::from(v.abs())).collect();
                    assert_eq!(*columns, by_sorting(&scores, k), "{dtype:?} d_in {d_in} k {k}");
                }
                assert_eq!(made.report.clamped.len(), usize::from(k > d_in));
            }
        }
    }
}

#[test]
fn scores_from_files_equal_their_formulas() {
    let dir = tempfile::tempdir().unwrap();
    let [base, gradients, norms] = ["m", "g", "n"].map(|name| dir.path().join(format!("{name}.safetensors")));
    let weights: Vec<f32> = (0..4 * 50).map(|i| ((i * 31) % 47) as f32 / 16.0 - 1.4).collect();
    let grads: Vec<f32> = (0..4 * 50).map(|i| ((i * 17) % 53) as f32 / 4.0 - 6.0).collect();
    let columns: Vec<f32> = (0..50).map(|i| ((i * 13) % 29) as f32 / 2.0).collect();
    let w16: Vec<f32> = weights.iter().map(|&w| bf16::from_f32(w).to_f32()).collect();
    write(&base, &[Tensor::new("l.q_proj.weight", Dtype::BF16, &[4, 50], &weights)]);
    write(&gradients, &[Tensor::new("l.q_proj.weight", Dtype::F32, &[4, 50], &grads)]);
    write(&norms, &[Tensor::new("l.q_proj", Dtype::F32, &[50], &columns)]);
    let (gradients, norms) = (Checkpoint::open(&gradients).unwrap(), Checkpoint::open(&norms).unwrap());
    type Formula = fn(f32, f32, f32) -> f32;
    let cases: [(ScoreKind, Formula); 5] = [
        (ScoreKind::Gradient, |_, g, _| g.abs()),
        (ScoreKind::Snip, |w, g, _| (w * g).abs()),
        (ScoreKind::Fisher, |_, g, _| g * g),
        (ScoreKind::Wanda, |w, _, n| (w * n).abs()),
        (ScoreKind::Smallest, |w, _, _| -w.abs()),
    ];
    for (score, formula) in cases {
        for k in [1, 3, 30] {
            let options = MaskOptions {
                score,
                gradients: score.needs_gradients().then_some(&gradients),
                activations: (score == ScoreKind::Wanda).then_some(&norms),
                ..MaskOptions::new(k)
            };
            let made = make(&Context::default(), &base, &options);
            for (row, found) in made.columns["l.q_proj.weight"].iter().enumerate() {
                let scores: Vec<f64> =
                    (0..50).map(|c| f64::from(formula(w16[row * 50 + c], grads[row * 50 + c], columns[c]))).collect();
                assert_eq!(*found, by_sorting(&scores, k as usize), "{score:?} k {k} row {row}");
            }
        }
    }
    let missing = MaskOptions { score: ScoreKind::Snip, ..MaskOptions::new(1) };
    let error = create_mask(&Context::default(), &Checkpoint::open(&base).unwrap(), &missing, None).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Usage, "score snip needs gradients"));
    let unfit = MaskOptions { score: ScoreKind::Snip, gradients: Some(&norms), ..MaskOptions::new(1) };
    let error = create_mask(&Context::default(), &Checkpoint::open(&base).unwrap(), &unfit, None).unwrap_err();
    assert!(error.to_string().contains("\"l.q_proj.weight\": it has no such tensor"), "{error}");
}

#[test]
fn transposed_and_stacked_tensors_give_the_same_choice_as_plain_ones() {
    let dir = tempfile::tempdir().unwrap();
    let [plain, other] = ["plain", "other"].map(|name| dir.path().join(format!("{name}.safetensors")));
    let (e, d_out, d_in) = (3usize, 11usize, 19usize);
    let values: Vec<f32> = (0..e * d_out * d_in).map(|i| ((i * 7919) % 257) as f32 / 64.0 - 2.0).collect();
    let mut turned = vec![0.0; values.len()];
    for s in 0..e {
        for r in 0..d_out {
            for c in 0..d_in {
                turned[(s * d_in + c) * d_out + r] = values[(s * d_out + r) * d_in + c];
            }
        }
    }
    write(&plain, &[Tensor::new("a.weight", Dtype::BF16, &[(e * d_out) as u64, d_in as u64], &values)]);
    let shape = [e as u64, d_in as u64, d_out as u64];
    write(&other, &[Tensor::new("a.weight", Dtype::BF16, &shape, &turned)]);
    for scope in [Scope::Row, Scope::Tensor] {
        let expected = make(&Context::default(), &plain, &MaskOptions { scope, ..all(3) }).columns;
        let transposed = vec!["a.weight".to_owned()];
        let found = make(&Context::default(), &other, &MaskOptions { scope, transposed, ..all(3) }).columns;
        assert_eq!(found, expected, "{scope:?}");
    }
}

#[test]
fn a_fraction_of_the_neurons_is_exact_and_seeded() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("m.safetensors");
    let values: Vec<f32> = (0..200 * 10).map(|i| i as f32).collect();
    write(&base, &[Tensor::new("a.weight", Dtype::F32, &[200, 10], &values)]);
    let with = |seed| MaskOptions { neuron_fraction: 0.3, seed, ..all(2) };
    let first = make(&Context::default(), &base, &with(1));
    let taken = |made: &Made| made.columns["a.weight"].iter().map(|row| !row.is_empty()).collect::<Vec<_>>();
    assert_eq!(taken(&first).iter().filter(|&&taken| taken).count(), 60);
    assert!(first.columns["a.weight"].iter().all(|row| row.is_empty() || *row == [8, 9]));
    assert_eq!(first.report.total.n_chosen, 120);
    assert_eq!(make(&Context::default(), &base, &with(1)).bytes, first.bytes);
    assert_ne!(taken(&make(&Context::default(), &base, &with(2))), taken(&first));
    let random = |seed| MaskOptions { score: ScoreKind::Random, seed, ..all(3) };
    let (a, b) =
        (make(&Context::default(), &base, &random(1)).columns, make(&Context::default(), &base, &random(2)).columns);
    assert_ne!(a, b);
    let mut hits = [0u32; 10];
    a["a.weight"].iter().flatten().for_each(|&column| hits[column as usize] += 1);
    assert!(hits.iter().all(|&n| (30..=90).contains(&n)), "about 60 each: {hits:?}");
}

#[test]
fn a_nan_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("m.safetensors");
    let mut values = vec![1.0; 100 * 300];
    values[77 * 300 + 5] = f32::NAN;
    values[90 * 300] = f32::NAN;
    write(&base, &[Tensor::new("a.weight", Dtype::BF16, &[100, 300], &values)]);
    let out = dir.path().join("mask.safetensors");
    for scope in [Scope::Row, Scope::Global] {
        let options = MaskOptions { scope, ..all(1) };
        let checkpoint = Checkpoint::open(&base).unwrap();
        let error = create_mask(&Context::default(), &checkpoint, &options, Some((&out, Existing::Keep))).unwrap_err();
        let expected = format!("{}: tensor \"a.weight\": row 77, column 5: the weight is not a number", base.display());
        assert_eq!((error.to_string(), error.kind()), (expected, ErrorKind::BadInput));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was written");
    }
}

/// A checkpoint with a sparse file as data: only headers are written.
fn sparse_checkpoint(path: &Path, tensors: &[(String, Vec<u64>)]) {
    let (mut header, mut at) = (serde_json::Map::new(), 0u64);
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<u64>();
        header.insert(name.clone(), serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let json = serde_json::to_vec(&header).unwrap();
    fs::write(path, [&(json.len() as u64).to_le_bytes()[..], &json].concat()).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_len(8 + json.len() as u64 + at).unwrap();
}

#[test]
fn the_trainable_share_of_llama_3_8b_matches_the_paper() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("llama-3-8b.safetensors");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![128_256, 4096]),
        ("lm_head.weight".to_owned(), vec![128_256, 4096]),
        ("model.norm.weight".to_owned(), vec![4096]),
    ];
    for layer in 0..32 {
        let shapes = [
            ("self_attn.q_proj", vec![4096, 4096]),
            ("self_attn.k_proj", vec![1024, 4096]),
            ("self_attn.v_proj", vec![1024, 4096]),
            ("self_attn.o_proj", vec![4096, 4096]),
            ("mlp.gate_proj", vec![14_336, 4096]),
            ("mlp.up_proj", vec![14_336, 4096]),
            ("mlp.down_proj", vec![4096, 14_336]),
            ("input_layernorm", vec![4096]),
            ("post_attention_layernorm", vec![4096]),
        ];
        tensors.extend(shapes.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    sparse_checkpoint(&path, &tensors);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let report = |k| create_mask(&Context::default(), &checkpoint, &MaskOptions::new(k), None).unwrap();
    assert_eq!(report(1).total.n_chosen, 1_376_256);
    assert_eq!(report(1).n_model_parameters, 8_030_261_248);
    assert_eq!(format!("{:.4}", 100.0 * report(1).trainable_share), "0.0171");
    assert_eq!(format!("{:.3}", 100.0 * report(20).trainable_share), "0.343");
    let budget = MaskOptions { amount: Amount::Share(0.0002), ..MaskOptions::new(1) };
    assert_eq!(create_mask(&Context::default(), &checkpoint, &budget, None).unwrap().k, Some(1));
    let small = MaskOptions { amount: Amount::Share(0.0001), ..MaskOptions::new(1) };
    let error = create_mask(&Context::default(), &checkpoint, &small, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
}

/// The best `n` entries of all tensors: by score, then tensor, row, column.
fn best(tensors: &[(&str, Vec<f32>, usize)], n: usize) -> Columns {
    let mut entries = Vec::new();
    for (name, values, d_in) in tensors {
        for (i, v) in values.iter().enumerate() {
            entries.push((std::cmp::Reverse(v.abs().to_bits()), *name, i / d_in, (i % d_in) as u32));
        }
    }
    entries.sort();
    let mut columns: Columns = tensors
        .iter()
        .map(|(name, values, d_in)| ((*name).to_owned(), vec![Vec::new(); values.len() / d_in]))
        .collect();
    for (_, name, row, column) in entries.into_iter().take(n) {
        columns.get_mut(name).unwrap()[row].push(column);
    }
    columns.values_mut().flatten().for_each(|row| row.sort_unstable());
    columns
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn wider_scopes_equal_sorting_everything(
        a in prop::collection::vec(-3i8..=3, 5 * 40), b in prop::collection::vec(-6i8..=6, 7 * 23),
        n in 1u64..361, mixed in any::<bool>(), memory in 9u32..24,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("m.safetensors");
        let floats = |v: &[i8]| v.iter().map(|&v| f32::from(v) / 4.0).collect::<Vec<f32>>();
        let (a, b) = (floats(&a), floats(&b));
        let other = if mixed { Dtype::F32 } else { Dtype::BF16 };
        write(&base, &[Tensor::new("a.weight", Dtype::BF16, &[5, 40], &a), Tensor::new("b.weight", other, &[7, 23], &b)]);
        let ctx = Context { max_memory: 1 << memory, ..Context::default() };
        let global = MaskOptions { amount: Amount::Count(n), scope: Scope::Global, ..all(1) };
        let made = make(&ctx, &base, &global);
        let both = [("a.weight", a.clone(), 40), ("b.weight", b.clone(), 23)];
        prop_assert_eq!(&made.columns, &best(&both, n as usize));
        prop_assert_eq!(made.report.total.n_chosen, n);

        let k = 1 + n % 25;
        let tensor = MaskOptions { scope: Scope::Tensor, ..all(k) };
        let mut expected = best(&both[..1], 5 * k.min(40) as usize);
        expected.extend(best(&both[1..], 7 * k.min(23) as usize));
        prop_assert_eq!(&make(&ctx, &base, &tensor).columns, &expected);
    }

    #[test]
    fn each_row_has_its_k_best(values in prop::collection::vec(-100i16..=100, 6 * 30), k in 1u64..40) {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("m.safetensors");
        let values: Vec<f32> = values.into_iter().map(f32::from).collect();
        write(&base, &[Tensor::new("a.weight", Dtype::F16, &[6, 30], &values)]);
        for (row, columns) in make(&Context::default(), &base, &all(k)).columns["a.weight"].iter().enumerate() {
            let key = |column: u32| values[row * 30 + column as usize].abs();
            prop_assert_eq!(columns.len() as u64, k.min(30));
            let worst = columns.iter().map(|&column| (key(column), std::cmp::Reverse(column)))
                .min_by(|a, b| a.partial_cmp(b).unwrap()).unwrap();
            for column in (0..30).filter(|column| !columns.contains(column)) {
                prop_assert!((key(column), std::cmp::Reverse(column)) < worst);
            }
        }
    }
}
