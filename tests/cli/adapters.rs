//! Adapters of the tiny model, small enough to check by eye.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    AdapterNotes, Checkpoint, Context, Dtype, Existing, RowColumns, TensorRef,
    internals::{
        adapter::AdapterWriter,
        checkpoint::gather_rows,
        mask::{BaseInfo, Recipe},
    },
};

use super::harness::{Workspace, fixtures};

/// All seven projections of both layers.
pub(crate) const PROJECTIONS: &str = "_proj.weight";

/// Writes an adapter made from `[FIXTURES]/tiny-llama`: on each row of the tensors whose name ends with `targets`, `delta` on
/// column `first` and a quarter of it on the next.
pub(crate) fn write_adapter(workspace: &Workspace, name: &str, targets: &str, first: u32, delta: f32) -> PathBuf {
    write_adapter_for(&fixtures().join("tiny-llama"), &workspace.path(name), targets, first, delta)
}

/// The same for any base.
pub(crate) fn write_adapter_for(base: &Path, path: &Path, targets: &str, first: u32, delta: f32) -> PathBuf {
    let (base, ctx) = (Checkpoint::open(base).unwrap(), Context::default());
    let mut adapter = AdapterWriter::create(path, Existing::Replace, Dtype::F32).unwrap();
    for tensor in base.tensors().filter(|tensor| tensor.info.name.ends_with(targets)) {
        let layout = tensor.rows(false).unwrap();
        let n_rows = layout.n_rows() as usize;
        let columns = RowColumns::uniform([first, first + 1].repeat(n_rows), 2);
        let base_values = gather_rows(&ctx, tensor, layout, 0, &columns).unwrap();
        adapter.begin_target(&tensor.info.name, tensor.info.dtype, &tensor.info.shape, false, Some(2)).unwrap();
        adapter.push_rows(&columns, &[delta, delta / 4.0].repeat(n_rows), &base_values).unwrap();
        adapter.end_target(None);
    }
    adapter.finish(&ctx, 1.0, &Recipe::custom(), &BaseInfo::of(&base), &AdapterNotes::default()).unwrap();
    path.to_owned()
}

/// The bytes of a file or a tensor, of which a failing comparison prints the hash alone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, BLAKE3 {}", self.0.len(), blake3::hash(&self.0))
    }
}

/// The tensors of a checkpoint, with their bytes: what is the same wherever a merge was made.
pub(crate) fn weights(folder: &Path) -> Vec<(String, Bytes)> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let bytes = |tensor: TensorRef<'_>| tensor.read(&Context::default(), 0..tensor.info.n_bytes()).unwrap();
    checkpoint.tensors().map(|tensor| (tensor.info.name.clone(), Bytes(bytes(tensor)))).collect()
}

/// The bytes of all files of a checkpoint's folder, by name, without the folder that remembers and the card that names the adapters.
pub(crate) fn content(folder: &Path) -> Vec<(String, Bytes)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file() && entry.file_name() != "README.md")
        .map(|entry| (entry.file_name().into_string().unwrap(), Bytes(fs::read(entry.path()).unwrap())))
        .collect();
    files.sort();
    files
}
