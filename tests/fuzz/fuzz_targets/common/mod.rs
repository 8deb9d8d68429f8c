//! A mask or an adapter of one target, written around what the fuzzer made up.

use std::{cell::RefCell, collections::BTreeMap, path::PathBuf};

use neuroada_ckpt::{Context, Dtype, Existing, RowColumns, internals::checkpoint::TensorFileWriter};

thread_local! {
    static FOLDER: RefCell<Option<(tempfile::TempDir, PathBuf)>> = const { RefCell::new(None) };
}

/// Where the file is written, in memory if there is a place.
pub fn path() -> PathBuf {
    FOLDER.with_borrow_mut(|folder| {
        let (_, path) = folder.get_or_insert_with(|| {
            let memory = std::path::Path::new("/dev/shm");
            let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            let folder = folder.expect("a temporary folder can be made");
            let path = folder.path().join("f.safetensors");
            (folder, path)
        });
        path.clone()
    })
}

/// Document, shape of the columns, columns, offsets, values.
pub type Input = (String, Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>);

/// Writes the file and returns where it lies.
pub fn write(input: Input) -> PathBuf {
    let (document, shape, columns, offsets, values) = input;
    let (path, ctx) = (path(), Context::default());
    let mut writer = TensorFileWriter::create(&path, Existing::Replace).expect("it can be written");
    let mut add = |name: &str, dtype: Dtype, bytes: &[u8], shape: Option<Vec<u64>>| {
        let width = dtype.bitsize() / 8;
        let n = bytes.len() / width;
        let id = writer.add_tensor(name.to_owned(), dtype);
        writer.append(id, &bytes[..n * width]).expect("it can be written");
        let shape = shape.filter(|shape| shape.iter().product::<u64>() == n as u64).unwrap_or(vec![n as u64]);
        writer.finish_tensor(id, shape);
    };
    let shape: Vec<u64> = shape.iter().take(3).map(|&size| u64::from(size)).collect();
    add("w.columns", Dtype::U16, &columns, Some(shape.clone()));
    if !offsets.is_empty() {
        add("w.row_offsets", Dtype::U32, &offsets, None);
    }
    if !values.is_empty() {
        add("w.values", Dtype::F32, &values, Some(shape));
    }
    let metadata = BTreeMap::from([("neuroada".to_owned(), document)]);
    writer.finish(&ctx, &metadata).expect("it can be written");
    path
}

/// Whatever is read has columns that ascend inside their row.
pub fn check(columns: &RowColumns, d_in: u64) {
    for row in 0..columns.n_rows() {
        assert!(columns.row(row).is_sorted_by(|a, b| a < b));
        assert!(columns.row(row).iter().all(|&column| u64::from(column) < d_in));
    }
}
