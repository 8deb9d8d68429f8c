//! A small checkpoint of every float type and four adapters that overlap, for tests that merge.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    Adapter, AdapterId, AdapterNotes, Checkpoint, Context, Dtype, Existing, MergeInput, RowColumns,
    internals::{
        adapter::AdapterWriter,
        checkpoint::{TensorFileWriter, gather_rows},
        mask::{BaseInfo, Recipe},
        tensor::{RowLayout, dtype_name},
    },
};
use tempfile::TempDir;

/// A small generator of numbers, the same on every machine (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub(crate) fn delta(&mut self) -> f32 {
        (self.below(2001) as f32 - 1000.0) / 4000.0
    }
}

pub(crate) const FLOATS: [Dtype; 6] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2];

/// `w.DTYPE` for every float type, in two shards, with an integer tensor between them; every bit pattern may occur, NaNs included.
pub(crate) fn write_checkpoint(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let mut random = Random(7);
    let mut weight_map = BTreeMap::new();
    for (shard, dtypes) in [&FLOATS[..3], &FLOATS[3..]].into_iter().enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", shard + 1);
        let mut file = TensorFileWriter::create(&folder.join(&name), Existing::Keep).unwrap();
        for &dtype in dtypes {
            let tensor = format!("w.{}", dtype_name(dtype));
            let id = file.add_tensor(tensor.clone(), dtype);
            let bytes: Vec<u8> = (0..200 * 37 * dtype.bitsize() / 8).map(|_| random.next() as u8).collect();
            file.append(id, &bytes).unwrap();
            file.finish_tensor(id, vec![200, 37]);
            weight_map.insert(tensor, name.clone());
        }
        let id = file.add_tensor(format!("n{shard}"), Dtype::I32);
        file.append(id, &[1, 2, 3, 4]).unwrap();
        file.finish_tensor(id, vec![]);
        weight_map.insert(format!("n{shard}"), name);
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        file.finish(&Context::default(), &metadata).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(folder.join("config.json"), "{\"model_type\":\"llama\"}").unwrap();
}

/// The base's bytes at chosen columns.
pub(crate) fn values_at(checkpoint: &Checkpoint, name: &str, columns: &RowColumns) -> Vec<u8> {
    let tensor = checkpoint.tensor(name).unwrap();
    let layout = RowLayout::new(&tensor.info.shape, false).unwrap();
    gather_rows(&Context::default(), tensor, layout, 0, columns).unwrap()
}

/// An adapter of random deltas; `uniform` gives every row two columns, otherwise none to four.
pub(crate) fn write_adapter(base: &Path, path: &Path, seed: u64, names: &[&str], uniform: bool) -> AdapterId {
    let checkpoint = Checkpoint::open(base).unwrap();
    let mut random = Random(seed);
    let mut writer = AdapterWriter::create(path, Existing::Replace, Dtype::F32).unwrap();
    for name in names {
        let info = checkpoint.tensor(name).unwrap().info.clone();
        let mut columns = RowColumns::default();
        for _ in 0..info.shape[0] {
            let n = if uniform { 2 } else { random.below(5) };
            let mut row = std::collections::BTreeSet::new();
            while (row.len() as u64) < n {
                row.insert(random.below(info.shape[1]) as u32);
            }
            columns.push_row(&row.into_iter().collect::<Vec<_>>());
        }
        let values: Vec<f32> = (0..columns.nnz()).map(|_| random.delta()).collect();
        writer.begin_target(name, info.dtype, &info.shape, false, uniform.then_some(2)).unwrap();
        writer.push_rows(&columns, &values, &values_at(&checkpoint, name, &columns)).unwrap();
        writer.end_target(None);
    }
    let ctx = Context::default();
    writer.finish(&ctx, 1.0, &Recipe::custom(), &BaseInfo::of(&checkpoint), &AdapterNotes::default()).unwrap();
    Adapter::open(path).unwrap().id(&ctx).unwrap()
}

/// A base and four overlapping adapters.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) ids: Vec<AdapterId>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::in_folder(tempfile::tempdir().unwrap())
    }
    pub(crate) fn in_folder(dir: TempDir) -> Self {
        let base = dir.path().join("base");
        write_checkpoint(&base);
        let targets: [&[&str]; 4] = [
            &["w.F64", "w.F32", "w.F16", "w.BF16", "w.F8_E4M3", "w.F8_E5M2"],
            &["w.BF16", "w.F8_E4M3", "w.F64"],
            &["w.BF16"],
            &["w.BF16", "w.F32", "w.F16"],
        ];
        let ids = (0..4)
            .map(|i| {
                let path = dir.path().join(format!("{i}.safetensors"));
                write_adapter(&base, &path, i as u64, targets[i], i % 2 == 0)
            })
            .collect();
        Self { dir, ids }
    }
    pub(crate) fn base(&self) -> PathBuf {
        self.dir.path().join("base")
    }
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub(crate) fn input(&self, i: usize) -> MergeInput {
        // Scales that are no powers of two round differently in every order.
        let scale = [None, Some(0.3), Some(-1.7), Some(0.9)][i];
        MergeInput { adapter: self.dir.path().join(format!("{i}.safetensors")), scale }
    }
    pub(crate) fn copy_base(&self, name: &str) -> PathBuf {
        let to = self.at(name);
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(self.base()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    }
}

/// The card of a new checkpoint and what remembers it: work in place writes none.
fn is_card(path: &Path) -> bool {
    path == Path::new("README.md") || path == Path::new(".neuroada/card")
}

/// Every file below a folder, with its bytes, but for the card of a new checkpoint.
pub(crate) fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = whole_tree(folder);
    found.retain(|path, _| !is_card(path));
    found
}

/// Every file below a folder, with its bytes.
pub(crate) fn whole_tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, folder, &mut found);
    found
}
