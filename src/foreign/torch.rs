//! Tensors that torch saved: beside their pickle in a zip file, or behind it in one stream as before there were zip files.

use std::{ops::Range, rc::Rc, sync::Arc};

use super::{
    elements::Elements,
    input::{Cursor, Input},
    pickle::{Unpickled, unpickle, unpickle_all},
    pickle_value::{Storage, Tensor, Value},
    zip::Zip,
};
use crate::{
    checkpoint::{CheckpointError, Context, Printable},
    tensor::Dtype,
};

/// What a stream of torch begins with.
const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
const PROTOCOL: i128 = 1001;
/// A pickle without the data of its tensors is not longer.
const LONGEST_PICKLE: u64 = 256 << 20;

/// Reads a storage that was saved as a byte string of its own, as NumPy's pickles of tensors hold it.
///
/// Five pickles (a magic number, a version, the machine's sizes, the storage, the keys) and then for each key the number of
/// elements and the elements.
fn nested_storage(input: &Input, range: Range<u64>) -> Result<Storage, CheckpointError> {
    let start = range.start;
    let mut cursor = Cursor::new(input, range);
    let Unpickled { value: magic, .. } = unpickle(&mut cursor, None)?;
    let Unpickled { value: protocol, .. } = unpickle(&mut cursor, None)?;
    if !matches!((magic, protocol), (Value::Int(MAGIC), Value::Int(PROTOCOL))) {
        return Err(input.bad(start, "not a saved storage: it does not begin with torch's magic number"));
    }
    let at = cursor.at();
    let Unpickled { value: machine, .. } = unpickle(&mut cursor, None)?;
    if !is_little_endian(&machine) {
        return Err(input.bad(at, "the storage was saved by a big-endian machine"));
    }
    let at = cursor.at();
    let Unpickled { value: Value::Storage(storage), .. } = unpickle(&mut cursor, None)? else {
        return Err(input.bad(at, "a saved storage is needed here"));
    };
    let at = cursor.at();
    let Unpickled { value: keys, .. } = unpickle(&mut cursor, None)?;
    let is_its_key = match &keys {
        Value::List(keys) => matches!(&keys.values[..], [Value::Text(key)] if *key == storage.key),
        _ => false,
    };
    if !is_its_key {
        return Err(input.bad(at, "the list of keys does not name the storage"));
    }
    let at = cursor.at();
    let n = cursor.number::<8>()?;
    if n != storage.n {
        return Err(input.bad(at, format!("the storage has {} elements, the data {n}", storage.n)));
    }
    let n_bytes = n.checked_mul(storage.dtype.bitsize() as u64 / 8);
    let left = cursor.end() - cursor.at();
    if n_bytes != Some(left) {
        let dtype = crate::tensor::dtype_name(storage.dtype);
        return Err(
            input.bad(cursor.at(), format!("{n} elements of {dtype} do not take the {left} bytes that are left"))
        );
    }
    let place = cursor.skip(left)?;
    Ok(Storage { place: Some(place), ..Storage::clone(&storage) })
}

fn is_little_endian(machine: &Value) -> bool {
    let Value::Dict(items) = machine else { return false };
    items.values.chunks_exact(2).any(|pair| match (pair[0].as_text(), &pair[1]) {
        (Some(key), Value::Bool(is_little)) => &**key == "little_endian" && *is_little,
        _ => false,
    })
}

/// Tensors by name, in the order of the file.
pub(super) type NamedTensors = Vec<(Rc<str>, SavedTensor)>;

/// A tensor and the file that holds its elements.
#[derive(Clone, Debug)]
pub(super) struct SavedTensor {
    pub(super) input: Arc<Input>,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    strides: Vec<u64>,
    /// Where the first element lies.
    start: u64,
}

impl SavedTensor {
    fn new(input: &Arc<Input>, tensor: &Tensor, place: &Range<u64>) -> Self {
        let dtype = tensor.storage.dtype;
        let start = place.start + tensor.offset * (dtype.bitsize() as u64 / 8);
        let Tensor { shape, strides, .. } = tensor.clone();
        Self { input: Arc::clone(input), dtype, shape, strides, start }
    }

    /// The elements of a tensor of one dimension, or column `column` of one of two.
    pub(super) fn along(&self, column: u64) -> Elements {
        let stride = self.strides.first().copied().unwrap_or(1);
        let before = column * self.strides.get(1).copied().unwrap_or(0);
        let n = self.shape.first().copied().unwrap_or(1);
        let start = self.start + before * (self.dtype.bitsize() as u64 / 8);
        Elements { input: Arc::clone(&self.input), dtype: self.dtype, start, stride, n }
    }
}

/// Reads a dictionary of tensors that `torch.save` wrote as a zip file, and proves every byte that they use by its checksum.
///
/// Memory: the pickle's values; the tensors stay in the file.
///
/// # Errors
/// What is wrong with the zip file, the first opcode or name of the pickle that has no place there, or a value that is no tensor.
pub(super) fn open_saved(ctx: &Context<'_>, input: Arc<Input>) -> Result<NamedTensors, CheckpointError> {
    let zip = Zip::open(&input)?;
    let bad = |what: String| CheckpointError::bad_file(input.path(), what);
    let found = zip.entries().iter().find(|entry| entry.name.ends_with("/data.pkl"));
    let pickle = found.ok_or_else(|| bad("not a file of torch: it has no `data.pkl`".to_owned()))?;
    let folder = pickle.name.trim_end_matches("data.pkl");
    if let Some(order) = zip.entry(&format!("{folder}byteorder")) {
        let n = order.data.end - order.data.start;
        if n > 16 || input.read(order.data.clone())? != b"little" {
            return Err(input.bad(order.data.start, "the tensors were saved by a big-endian machine"));
        }
    }
    if pickle.data.end - pickle.data.start > LONGEST_PICKLE {
        return Err(bad(format!("its pickle is longer than {LONGEST_PICKLE} bytes")));
    }
    zip.prove(ctx, &input, pickle)?;
    let Unpickled { value, storages } = unpickle_all(&input, pickle.data.clone(), None)?;
    let mut places = std::collections::HashMap::new();
    for (key, storage) in &storages {
        let name = format!("{folder}data/{key}");
        let entry = zip.entry(&name).ok_or_else(|| bad(format!("`{}` is missing", Printable(&name))))?;
        let (n, width) = (entry.data.end - entry.data.start, storage.dtype.bitsize() as u64 / 8);
        if storage.n.checked_mul(width) != Some(n) {
            let dtype = crate::tensor::dtype_name(storage.dtype);
            let what = format!("`{}` has {n} bytes, {} elements of {dtype} are needed", Printable(&name), storage.n);
            return Err(bad(what));
        }
        zip.prove(ctx, &input, entry)?;
        places.insert(Rc::clone(key), entry.data.clone());
    }
    named(&input, &value, |storage| places.get(&storage.key).cloned())
}

/// Reads a dictionary of tensors from a file of NumPy that holds it as one pickled object.
///
/// # Errors
/// As [`open_saved`].
pub(super) fn open_pickled_array(input: Arc<Input>) -> Result<NamedTensors, CheckpointError> {
    let header = super::npy::Header::read(&input, 0..input.n_bytes())?;
    if !header.is_object || header.shape.iter().any(|&size| size != 1) {
        return Err(CheckpointError::bad_file(input.path(), "one pickled dictionary is needed, this is another array"));
    }
    let Unpickled { value, .. } = unpickle_all(&input, header.data_start..input.n_bytes(), Some(nested_storage))?;
    let Value::Array(Some(value)) = value else {
        return Err(input.bad(header.data_start, format!("an array is needed, the pickle holds {}", value.kind())));
    };
    named(&input, &value, |storage| storage.place.clone())
}

/// The tensors of a dictionary by name; each name once, each value a tensor.
fn named(
    input: &Arc<Input>,
    value: &Value,
    place: impl Fn(&Storage) -> Option<Range<u64>>,
) -> Result<NamedTensors, CheckpointError> {
    let bad = |what: String| CheckpointError::bad_file(input.path(), what);
    let Value::Dict(items) = value else {
        return Err(bad(format!("a dictionary of tensors is needed, the pickle holds {}", value.kind())));
    };
    let mut tensors = Vec::with_capacity(items.values.len() / 2);
    let mut names = std::collections::HashSet::new();
    for pair in items.values.chunks_exact(2) {
        let Some(name) = pair[0].as_text() else {
            return Err(bad(format!("a key of the dictionary is {}, a string is needed", pair[0].kind())));
        };
        if !names.insert(Rc::clone(name)) {
            return Err(CheckpointError::bad_tensor(input.path(), name, "is there twice"));
        }
        let tensor = match &pair[1] {
            Value::Tensor(tensor) => tensor,
            other => {
                let what = format!("a tensor is needed, the dictionary has {}", other.kind());
                return Err(CheckpointError::bad_tensor(input.path(), name, what));
            }
        };
        let place = place(&tensor.storage)
            .ok_or_else(|| CheckpointError::bad_tensor(input.path(), name, "the file does not hold its elements"))?;
        tensors.push((Rc::clone(name), SavedTensor::new(input, tensor, &place)));
    }
    Ok(tensors)
}
