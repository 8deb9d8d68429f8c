//! A small checkpoint and eight adapters of every kind that overlap, with a plain model of what they make of it.
//!
//! The model adds up one element at a time, in the order and the precision that the merge promises: fused float32 steps with the rank
//! ascending, `weight + sum * scale` with the ids ascending, rounded once. It shares no code with the merge but the readers of files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use neuroada_ckpt::{
    Adapter, AdapterId, AdapterNotes, AdapterReading, Checkpoint, Context, Dtype, Existing, ExpertOrder, MergeInput,
    MergeOptions, MergeOutput, RowColumns,
    internals::{
        adapter::AdapterWriter,
        checkpoint::{TensorFileWriter, gather_rows},
        mask::{BaseInfo, Recipe},
        merge,
        tensor::RowLayout,
    },
};
use tempfile::TempDir;

use crate::{lora::write_tensors, world::Random};

/// The tensors of the base: shard, name, type and shape.
pub(crate) const TENSORS: [(usize, &str, Dtype, &[u64]); 10] = [
    (1, "m.a.weight", Dtype::BF16, &[70, 33]),
    (1, "m.t.weight", Dtype::F16, &[33, 24]),
    (1, "m.a.bias", Dtype::F32, &[70]),
    (1, "m.other", Dtype::BF16, &[9]),
    (2, "m.f.weight", Dtype::F32, &[40, 25]),
    (2, "m.d.weight", Dtype::F64, &[20, 30]),
    (2, "m.d.bias", Dtype::F64, &[20]),
    (2, "m.experts.down_proj", Dtype::BF16, &[2, 24, 20]),
    (2, "m.wte.weight", Dtype::F16, &[90, 20]),
    (2, "m.head.weight", Dtype::BF16, &[12, 20]),
];

/// The adapters, by their place in [`Mixture::adapters`].
pub(crate) const SPARSE: [usize; 3] = [0, 1, 2];
pub(crate) const LORA: [usize; 2] = [3, 4];
pub(crate) const DORA: usize = 5;
pub(crate) const FULL: usize = 6;
pub(crate) const EMBEDDING: usize = 7;

/// What an adapter does to a tensor, element by element of the stored tensor.
#[derive(Clone)]
pub(crate) enum Part {
    /// Deltas by place.
    Sparse(BTreeMap<usize, f32>),
    /// A product, or a bias, before it is scaled.
    Sums { sums: Vec<f32>, scaling: f64, magnitude: Option<Magnitude> },
    /// What stands in for the original.
    Full(Vec<f32>),
}

#[derive(Clone)]
pub(crate) struct Magnitude {
    values: Vec<f32>,
    of_columns: bool,
}

pub(crate) struct AnyAdapter {
    pub(crate) path: PathBuf,
    pub(crate) id: AdapterId,
    pub(crate) scales: &'static [f64],
    pub(crate) parts: BTreeMap<String, Part>,
}

/// A set of active adapters: places in [`Mixture::adapters`] and scales, in ascending order of id.
pub(crate) type Active = Vec<(usize, f64)>;

pub(crate) struct Mixture {
    pub(crate) dir: TempDir,
    pub(crate) adapters: Vec<AnyAdapter>,
    originals: BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)>,
}

fn encode(dtype: Dtype, value: f64) -> Vec<u8> {
    match dtype {
        Dtype::F64 => value.to_le_bytes().to_vec(),
        Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value as f32).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(value as f32).to_le_bytes().to_vec(),
        other => unreachable!("{other:?}"),
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        Dtype::BF16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        other => unreachable!("{other:?}"),
    }
}

/// The plain sums in one type of accumulator: `None` for elements that nothing touches.
macro_rules! plain_sums {
    ($name:ident, $acc:ty) => {
        fn $name(n_columns: usize, originals: &[$acc], parts: &[(&Part, f64)]) -> Vec<Option<$acc>> {
            let apply = |values: &mut [$acc], touched: &mut [bool], part: &Part, scale: f64| match part {
                Part::Sparse(deltas) => {
                    for (&at, &delta) in deltas {
                        let product = <$acc>::from(delta) * scale as $acc;
                        values[at] += product;
                        touched[at] = true;
                    }
                }
                Part::Full(full) => {
                    values.iter_mut().zip(full).for_each(|(value, &full)| *value = <$acc>::from(full));
                    touched.fill(true);
                }
                Part::Sums { sums, scaling, magnitude } => {
                    let scale = (scaling * scale) as f32;
                    values.iter_mut().zip(sums).for_each(|(value, sum)| *value += <$acc>::from(sum * scale));
                    touched.fill(true);
                    let square = |value: &$acc| f64::from(*value) * f64::from(*value);
                    match magnitude {
                        None => {}
                        Some(magnitude) if magnitude.of_columns => {
                            let mut squares = vec![0.0f64; n_columns];
                            for rows in values.chunks(16 * n_columns) {
                                let mut of_group = vec![0.0f64; n_columns];
                                for row in rows.chunks(n_columns) {
                                    of_group.iter_mut().zip(row).for_each(|(sum, value)| *sum += square(value));
                                }
                                squares.iter_mut().zip(of_group).for_each(|(sum, of_group)| *sum += of_group);
                            }
                            for row in values.chunks_mut(n_columns) {
                                for ((value, m), squares) in row.iter_mut().zip(&magnitude.values).zip(&squares) {
                                    *value *= <$acc>::from(m / squares.sqrt() as f32);
                                }
                            }
                        }
                        Some(magnitude) => {
                            for (row, m) in values.chunks_mut(n_columns).zip(&magnitude.values) {
                                let mut lanes = [0.0f64; 8];
                                row.iter().enumerate().for_each(|(i, value)| lanes[i % 8] += square(value));
                                let factor = m / lanes.iter().sum::<f64>().sqrt() as f32;
                                row.iter_mut().for_each(|value| *value *= <$acc>::from(factor));
                            }
                        }
                    }
                }
            };
            let (mut values, mut touched) = (originals.to_vec(), vec![false; originals.len()]);
            for &(part, scale) in parts {
                let has_magnitude = matches!(part, Part::Sums { magnitude: Some(_), .. });
                if has_magnitude && parts.len() > 1 {
                    // f(w0) - w0.
                    let (mut alone, mut own) = (originals.to_vec(), vec![false; originals.len()]);
                    apply(&mut alone, &mut own, part, scale);
                    for (at, alone) in alone.into_iter().enumerate().filter(|(at, _)| own[*at]) {
                        values[at] += alone - originals[at];
                        touched[at] = true;
                    }
                } else {
                    apply(&mut values, &mut touched, part, scale);
                }
            }
            values.into_iter().zip(touched).map(|(value, touched)| touched.then_some(value)).collect()
        }
    };
}

plain_sums!(sums_in_f32, f32);
plain_sums!(sums_in_f64, f64);

/// A LoRA adapter in the making.
struct LoraMaker<'r> {
    random: &'r mut Random,
    tensors: Vec<(String, Vec<u64>, Vec<f32>)>,
    parts: BTreeMap<String, Part>,
    rank: usize,
    /// `lora_alpha / r`.
    scaling: f64,
}

impl LoraMaker<'_> {
    fn tensor(&mut self, name: String, shape: &[usize]) -> Vec<f32> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.random.delta()).collect();
        self.tensors.push((name, shape.iter().map(|&n| n as u64).collect(), values.clone()));
        values
    }

    fn add_sums(&mut self, tensor: String, sums: Vec<f32>, magnitude: Option<Magnitude>) {
        let part = Part::Sums { sums, scaling: self.scaling, magnitude };
        assert!(self.parts.insert(tensor, part).is_none());
    }

    /// A product of `[d_out, rank] [rank, d_in]`, stored the other way round where `transposed`.
    fn linear(&mut self, module: &str, (d_out, d_in): (usize, usize), transposed: bool, has_magnitude: bool) {
        let rank = self.rank;
        let a = self.tensor(format!("{module}.lora_A.weight"), &[rank, d_in]);
        let b = self.tensor(format!("{module}.lora_B.weight"), &[d_out, rank]);
        let sum = |out: usize, inner: usize| {
            (0..rank).fold(0.0f32, |sum, t| b[out * rank + t].mul_add(a[t * d_in + inner], sum))
        };
        let sums = match transposed {
            false => (0..d_out * d_in).map(|at| sum(at / d_in, at % d_in)).collect(),
            true => (0..d_out * d_in).map(|at| sum(at % d_out, at / d_out)).collect(),
        };
        let magnitude = has_magnitude.then(|| {
            let values: Vec<f32> = (0..d_out).map(|i| 0.7 + i as f32 / 50.0).collect();
            self.tensors.push((format!("{module}.lora_magnitude_vector"), vec![d_out as u64], values.clone()));
            Magnitude { values, of_columns: transposed }
        });
        self.add_sums(format!("{module}.weight"), sums, magnitude);
    }

    fn bias(&mut self, module: &str, d_out: usize) {
        let sums = self.tensor(format!("{module}.lora_B.bias"), &[d_out]);
        self.add_sums(format!("{module}.bias"), sums, None);
    }

    fn embedding(&mut self, module: &str, vocabulary: usize, d_out: usize) {
        let rank = self.rank;
        let a = self.tensor(format!("{module}.lora_embedding_A"), &[rank, vocabulary]);
        let b = self.tensor(format!("{module}.lora_embedding_B"), &[d_out, rank]);
        let sum = |row: usize, out: usize| {
            (0..rank).fold(0.0f32, |sum, t| a[t * vocabulary + row].mul_add(b[out * rank + t], sum))
        };
        let sums = (0..vocabulary * d_out).map(|at| sum(at / d_out, at % d_out)).collect();
        self.add_sums(format!("{module}.weight"), sums, None);
    }

    /// A stack whose experts are stored `[d_in, d_out]`; the second factor is `[d_out, r, E]`.
    fn experts(&mut self, module: &str, parameter: &str, n_experts: usize, (d_out, d_in): (usize, usize)) {
        let rank = self.rank;
        let a = self.tensor(format!("{module}.lora_A.weight"), &[n_experts * rank, d_in]);
        let b = self.tensor(format!("{module}.lora_B.weight"), &[d_out, rank * n_experts]);
        let sum = |at: usize| {
            let (expert, inner, out) = (at / (d_in * d_out), at / d_out % d_in, at % d_out);
            let factors = (0..rank)
                .map(|t| (a[(expert * rank + t) * d_in + inner], b[out * rank * n_experts + t * n_experts + expert]));
            factors.fold(0.0f32, |sum, (a, b)| a.mul_add(b, sum))
        };
        let sums = (0..n_experts * d_in * d_out).map(sum).collect();
        self.add_sums(format!("{module}.{parameter}"), sums, None);
    }

    fn full(&mut self, name: &str, shape: &[usize]) {
        let values = self.tensor(format!("base_model.model.{name}"), shape);
        self.parts.insert(name.to_owned(), Part::Full(values));
    }
}

fn write_base(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let mut random = Random(17);
    let mut weight_map = BTreeMap::new();
    for shard in [1, 2] {
        let file_name = format!("model-0000{shard}-of-00002.safetensors");
        let mut file = TensorFileWriter::create(&folder.join(&file_name), Existing::Keep).unwrap();
        for &(_, name, dtype, shape) in TENSORS.iter().filter(|(of, ..)| *of == shard) {
            let id = file.add_tensor(name.to_owned(), dtype);
            for at in 0..shape.iter().product::<u64>() {
                let value = match (name, at) {
                    // What no norm is taken of may hold what is no number.
                    ("m.d.weight" | "m.experts.down_proj", 5) => f64::NAN,
                    ("m.d.weight" | "m.experts.down_proj", 6) => f64::NEG_INFINITY,
                    (_, 7) => -0.0,
                    _ => f64::from(random.delta()),
                };
                file.append(id, &encode(dtype, value)).unwrap();
            }
            file.finish_tensor(id, shape.to_vec());
            weight_map.insert(name, file_name.clone());
        }
        file.finish(&Context::default(), &BTreeMap::from([("format".to_owned(), "pt".to_owned())])).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(folder.join("config.json"), r#"{"model_type":"llama","tie_word_embeddings":false}"#).unwrap();
}

/// A sparse adapter of none to four deltas in each row; of a name with `true` the rows are the stored tensor's columns.
pub(crate) fn write_sparse(base: &Path, path: &Path, seed: u64, targets: &[(&str, bool)]) -> AnyAdapter {
    let (checkpoint, ctx) = (Checkpoint::open(base).unwrap(), Context::default());
    let mut random = Random(seed);
    let mut writer = AdapterWriter::create(path, Existing::Keep, Dtype::F32).unwrap();
    let mut parts = BTreeMap::new();
    for &(name, transposed) in targets {
        let tensor = checkpoint.tensor(name).unwrap();
        let layout = RowLayout::new(&tensor.info.shape, transposed).unwrap();
        let (mut columns, mut deltas) = (RowColumns::default(), BTreeMap::new());
        for row in 0..layout.n_rows() {
            let n = random.below(5).min(layout.d_in);
            let mut chosen = BTreeSet::new();
            while (chosen.len() as u64) < n {
                chosen.insert(random.below(layout.d_in) as u32);
            }
            columns.push_row(&chosen.iter().copied().collect::<Vec<_>>());
            for column in chosen {
                deltas.insert((row, column), random.delta());
            }
        }
        let values: Vec<f32> = deltas.values().copied().collect();
        let originals = gather_rows(&ctx, tensor, layout, 0, &columns).unwrap();
        writer.begin_target(name, tensor.info.dtype, &tensor.info.shape, transposed, None).unwrap();
        writer.push_rows(&columns, &values, &originals).unwrap();
        writer.end_target(None);
        let workspace = |((row, column), delta): ((u64, u32), f32)| (layout.flat(row, column.into()) as usize, delta);
        parts.insert(name.to_owned(), Part::Sparse(deltas.into_iter().map(workspace).collect()));
    }
    writer.finish(&ctx, 1.0, &Recipe::custom(), &BaseInfo::of(&checkpoint), &AdapterNotes::default()).unwrap();
    let id = Adapter::open(path).unwrap().id(&ctx).unwrap();
    AnyAdapter { path: path.to_owned(), id, scales: &[0.3, -1.7], parts }
}

/// A LoRA adapter; `config` is what its config has beside the type and the rank.
fn write_lora(
    folder: &Path,
    random: &mut Random,
    (rank, config): (usize, &str),
    make: impl FnOnce(&mut LoraMaker<'_>),
) -> AnyAdapter {
    // PEFT's own `lora_alpha`, where a config has none, is 8.
    let mut maker = LoraMaker { random, tensors: Vec::new(), parts: BTreeMap::new(), rank, scaling: 8.0 / rank as f64 };
    make(&mut maker);
    fs::create_dir_all(folder).unwrap();
    let config = format!("{{\"peft_type\":\"LORA\",\"r\":{rank}{config}}}");
    fs::write(folder.join("adapter_config.json"), config).unwrap();
    let tensors: Vec<_> =
        maker.tensors.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], values.clone())).collect();
    write_tensors(&folder.join("adapter_model.safetensors"), Dtype::F32, &tensors);
    let id = merge::adapter_id(&Context::default(), folder).unwrap();
    AnyAdapter { path: folder.to_owned(), id, scales: &[1.0, -0.15], parts: maker.parts }
}

impl Mixture {
    /// In memory where that can be: every change syncs.
    pub(crate) fn new() -> Self {
        let memory = PathBuf::from("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let at = |name: &str| dir.path().join(name);
        let base = at("base");
        write_base(&base);
        let mut random = Random(23);
        let random = &mut random;
        let sparse = [
            write_sparse(
                &base,
                &at("0.safetensors"),
                1,
                &[("m.a.weight", false), ("m.f.weight", false), ("m.d.weight", false), ("m.wte.weight", false)],
            ),
            write_sparse(
                &base,
                &at("1.safetensors"),
                2,
                &[("m.a.weight", false), ("m.t.weight", true), ("m.experts.down_proj", true)],
            ),
            write_sparse(
                &base,
                &at("2.safetensors"),
                3,
                &[("m.a.weight", false), ("m.t.weight", true), ("m.f.weight", false), ("m.a.bias", false)],
            ),
        ];
        let mut adapters = Vec::from(sparse);
        adapters.push(write_lora(&at("3"), random, (3, r#","lora_bias":true"#), |lora| {
            lora.linear("m.a", (70, 33), false, false);
            lora.bias("m.a", 70);
            lora.linear("m.d", (20, 30), false, false);
            lora.bias("m.d", 20);
        }));
        adapters.push(write_lora(&at("4"), random, (2, r#","target_parameters":["experts.down_proj"]"#), |lora| {
            lora.linear("m.a", (70, 33), false, false);
            lora.linear("m.t", (24, 33), true, false);
            lora.linear("m.f", (40, 25), false, false);
            lora.experts("m.experts", "down_proj", 2, (20, 24));
        }));
        adapters.push(write_lora(&at("5"), random, (2, r#","use_dora":true"#), |lora| {
            lora.linear("m.a", (70, 33), false, true);
            lora.linear("m.t", (24, 33), true, true);
            lora.linear("m.f", (40, 25), false, true);
        }));
        adapters.push(write_lora(&at("6"), random, (1, r#","modules_to_save":["head"]"#), |lora| {
            lora.full("m.head.weight", &[12, 20]);
            lora.linear("m.d", (20, 30), false, false);
        }));
        adapters.push(write_lora(&at("7"), random, (2, ""), |lora| lora.embedding("m.wte", 90, 20)));
        adapters[FULL].scales = &[1.0];
        let checkpoint = Checkpoint::open(&base).unwrap();
        let original = |tensor: neuroada_ckpt::TensorRef<'_>| {
            let bytes = tensor.window(&Context::default(), 0..tensor.info.n_bytes()).unwrap().to_vec();
            (tensor.info.name.clone(), (tensor.info.dtype, tensor.info.shape.clone(), bytes))
        };
        let originals = checkpoint.tensors().map(original).collect();
        Self { dir, adapters, originals }
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub(crate) fn base(&self) -> PathBuf {
        self.at("base")
    }
    pub(crate) fn copy(&self, from: &Path, name: &str) -> PathBuf {
        let to = self.at(name);
        copy_folder(from, &to);
        to
    }
    pub(crate) fn input(&self, i: usize, scale: f64) -> MergeInput {
        MergeInput { adapter: self.adapters[i].path.clone(), scale: Some(scale) }
    }
    pub(crate) fn inputs(&self, active: &[(usize, f64)]) -> Vec<MergeInput> {
        active.iter().map(|&(i, scale)| self.input(i, scale)).collect()
    }
    /// In ascending order of id.
    pub(crate) fn sorted(&self, mut active: Active) -> Active {
        active.sort_by_key(|&(i, _)| self.adapters[i].id);
        active
    }

    /// The names of the tensors that some active adapter changes as a whole.
    pub(crate) fn wholes(&self, active: &[(usize, f64)]) -> BTreeSet<&str> {
        let parts = active.iter().flat_map(|&(i, _)| &self.adapters[i].parts);
        parts.filter(|(_, part)| !matches!(part, Part::Sparse(_))).map(|(name, _)| name.as_str()).collect()
    }

    /// The bytes of a tensor with these adapters in it.
    pub(crate) fn expected(&self, name: &str, active: &[(usize, f64)]) -> Vec<u8> {
        let (dtype, shape, bytes) = &self.originals[name];
        let parts: Vec<(&Part, f64)> =
            active.iter().filter_map(|&(i, scale)| Some((self.adapters[i].parts.get(name)?, scale))).collect();
        if parts.is_empty() {
            return bytes.clone();
        }
        let width = dtype.bitsize() / 8;
        let n_columns = if shape.len() > 1 { *shape.last().unwrap() as usize } else { 1 };
        let originals: Vec<f64> = bytes.chunks(width).map(|element| decode(*dtype, element)).collect();
        let values: Vec<Option<f64>> = match dtype {
            Dtype::F64 => sums_in_f64(n_columns, &originals, &parts),
            _ => {
                let originals: Vec<f32> = originals.iter().map(|&value| value as f32).collect();
                sums_in_f32(n_columns, &originals, &parts).into_iter().map(|value| value.map(f64::from)).collect()
            }
        };
        let is_replaced = parts.iter().any(|(part, _)| matches!(part, Part::Full(_)));
        let mut merged = bytes.clone();
        for ((element, value), original) in merged.chunks_mut(width).zip(values).zip(originals) {
            if let Some(value) = value.filter(|_| !original.is_nan() || is_replaced) {
                element.copy_from_slice(&encode(*dtype, value));
            }
        }
        merged
    }

    /// Compares every tensor of a checkpoint with the model.
    #[track_caller]
    pub(crate) fn check(&self, path: &Path, active: &[(usize, f64)], step: &str) {
        let (checkpoint, ctx) = (Checkpoint::open(path).unwrap(), Context::default());
        assert_eq!(checkpoint.tensors().count(), self.originals.len());
        for (name, (.., original)) in &self.originals {
            let found = checkpoint.tensor(name).unwrap().window(&ctx, 0..original.len() as u64).unwrap();
            let expected = self.expected(name, active);
            let n = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert!(*found == *expected, "{step}: {name} with {active:?}: {n} of {} bytes", expected.len());
        }
    }
}

/// Copies a folder and all below it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// How the mixture's files are to be read.
pub(crate) fn reading() -> AdapterReading {
    AdapterReading { expert_order: Some(ExpertOrder::RankFirst), ..AdapterReading::default() }
}

/// In place, with the base where it is given.
pub(crate) fn in_place(base: Option<PathBuf>) -> MergeOptions<'static> {
    MergeOptions { reading: reading(), base, ..MergeOptions::in_place() }
}

/// To a new folder.
pub(crate) fn to_new(path: &Path, resume: bool, base: Option<PathBuf>) -> MergeOptions<'static> {
    let output =
        MergeOutput::New { path: path.to_owned(), existing: Existing::Keep, ledger: true, link: false, resume };
    MergeOptions { reading: reading(), base, ..MergeOptions::to(output) }
}

/// The shard of a tensor, and where its bytes are.
pub(crate) fn data_of(checkpoint: &Path, name: &str) -> (PathBuf, std::ops::Range<usize>) {
    let of_shard = TENSORS.iter().find(|(_, of, ..)| *of == name).unwrap().0;
    let shard = checkpoint.join(format!("model-0000{of_shard}-of-00002.safetensors"));
    let bytes = fs::read(&shard).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let offset = |at: usize| header[name]["data_offsets"][at].as_u64().unwrap() as usize;
    (shard, start + offset(0)..start + offset(1))
}
