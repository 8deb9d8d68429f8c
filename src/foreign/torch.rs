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
    tensor::{Dtype, checked_bytes},
};

/// What a stream of torch begins with.
const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
const PROTOCOL: i128 = 1001;
/// A pickle without the data of its tensors is not longer.
const MAX_PICKLE: u64 = 256 << 20;

/// Reads a storage that was saved as a byte string of its own, as NumPy's pickles of tensors hold it: a stream of torch whose object is
/// the storage.
fn nested_storage(input: &Input, range: Range<u64>) -> Result<Storage, CheckpointError> {
    let mut cursor = Cursor::new(input, range);
    read_preamble(&mut cursor)?;
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
    let place = read_elements(&mut cursor, &storage)?;
    end_of_stream(&cursor)?;
    Ok(Storage { place: Some(place), ..Storage::clone(&storage) })
}

/// Reads what a stream of torch begins with, three pickles: a magic number, a version, the machine's sizes. What follows is the object,
/// the keys of its storages, and for each key the number of elements and the elements.
fn read_preamble(cursor: &mut Cursor<'_>) -> Result<(), CheckpointError> {
    let (input, start) = (cursor.input(), cursor.at());
    let Unpickled { value: magic, .. } = unpickle(cursor, None)?;
    let Unpickled { value: protocol, .. } = unpickle(cursor, None)?;
    if !matches!((magic, protocol), (Value::Int(MAGIC), Value::Int(PROTOCOL))) {
        return Err(input.bad(start, "not a saved storage: it does not begin with torch's magic number"));
    }
    let at = cursor.at();
    let Unpickled { value: machine, .. } = unpickle(cursor, None)?;
    match is_little_endian(&machine) {
        true => Ok(()),
        false => Err(input.bad(at, "the storage was saved by a big-endian machine")),
    }
}

/// Passes over the elements of a storage in a stream and returns where they lie.
fn read_elements(cursor: &mut Cursor<'_>, storage: &Storage) -> Result<Range<u64>, CheckpointError> {
    let (input, at) = (cursor.input(), cursor.at());
    let n = cursor.number::<8>()?;
    if n != storage.n {
        return Err(input.bad(at, format!("the storage has {} elements, the data {n}", storage.n)));
    }
    let left = cursor.end() - cursor.at();
    match n.checked_mul(storage.dtype.bitsize() as u64 / 8).filter(|&n_bytes| n_bytes <= left) {
        Some(n_bytes) => cursor.skip(n_bytes),
        None => {
            let dtype = crate::tensor::dtype_name(storage.dtype);
            let what = format!("{n} elements of {dtype} take more than the {left} bytes that are left");
            Err(input.bad(cursor.at(), what))
        }
    }
}

fn end_of_stream(cursor: &Cursor<'_>) -> Result<(), CheckpointError> {
    match cursor.end() - cursor.at() {
        0 => Ok(()),
        n => Err(cursor.input().bad(cursor.at(), format!("{n} bytes behind the last storage"))),
    }
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

    /// Bytes of all elements; `None` where there are more than a number holds.
    pub(super) fn n_bytes(&self) -> Option<u64> {
        let n = self.shape.iter().try_fold(1u64, |n, &size| n.checked_mul(size))?;
        checked_bytes(self.dtype, n)
    }

    /// Hands all elements on, row-major, a piece at a time. Memory: a piece; of a tensor whose elements lie in another order, all that
    /// lies between its first and its last.
    ///
    /// # Errors
    /// Such a tensor that does not fit in a quarter of the memory allowed; what the system or `take` says.
    pub(super) fn for_each_piece(
        &self,
        ctx: &Context<'_>,
        mut take: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        const PIECE: u64 = 1 << 20;
        let width = self.dtype.bitsize() as u64 / 8;
        let n_bytes = self.n_bytes().expect("its caller has bounded it");
        if n_bytes == 0 {
            return Ok(());
        }
        if self.is_contiguous() {
            for at in (0..n_bytes).step_by(PIECE as usize) {
                ctx.check()?;
                take(&self.input.read(self.start + at..self.start + n_bytes.min(at + PIECE))?)?;
            }
            return Ok(());
        }
        let last: u64 = self.shape.iter().zip(&self.strides).map(|(size, stride)| (size - 1) * stride).sum();
        let span = (last + 1) * width;
        if span > ctx.max_memory / 4 {
            let what =
                format!("a tensor of {span} bytes whose elements are not in row-major order does not fit in memory");
            return Err(self.input.bad(self.start, what));
        }
        let all = self.input.read(self.start..self.start + span)?;
        let mut index = vec![0; self.shape.len()];
        let mut piece = Vec::with_capacity(PIECE as usize);
        for _ in 0..n_bytes / width {
            let at: u64 = index.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum();
            piece.extend_from_slice(&all[(at * width) as usize..][..width as usize]);
            if piece.len() as u64 >= PIECE {
                ctx.check()?;
                take(&piece)?;
                piece.clear();
            }
            for dimension in (0..index.len()).rev() {
                index[dimension] += 1;
                if index[dimension] < self.shape[dimension] {
                    break;
                }
                index[dimension] = 0;
            }
        }
        take(&piece)
    }

    /// Whether the elements lie one after the other, row-major.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
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

/// Reads a dictionary of tensors that `torch.save` wrote, as a zip file or as one stream.
///
/// Memory and errors: as [`open_saved`]; a stream has no checksums.
pub(super) fn open_any(ctx: &Context<'_>, input: Arc<Input>) -> Result<NamedTensors, CheckpointError> {
    let mut first = [0; 4];
    if input.n_bytes() >= 4 {
        input.read_at(&mut first, 0)?;
    }
    if first == *b"PK\x03\x04" { open_saved(ctx, input) } else { open_stream(input) }
}

/// Reads a dictionary of tensors that torch wrote before there were zip files, or was told to write so.
fn open_stream(input: Arc<Input>) -> Result<NamedTensors, CheckpointError> {
    let mut cursor = Cursor::new(&input, 0..input.n_bytes());
    read_preamble(&mut cursor)?;
    let Unpickled { value, storages } = unpickle(&mut cursor, None)?;
    let at = cursor.at();
    let Unpickled { value: Value::List(keys), .. } = unpickle(&mut cursor, None)? else {
        return Err(input.bad(at, "the list of the storages' keys is needed here"));
    };
    let mut places = std::collections::HashMap::new();
    for key in &keys.values {
        let storage = key.as_text().and_then(|key| storages.get(key));
        let storage = storage.ok_or_else(|| input.bad(at, "a storage is listed that no tensor names"))?;
        let place = read_elements(&mut cursor, storage)?;
        if places.insert(Rc::clone(&storage.key), place).is_some() {
            return Err(input.bad(at, format!("storage \"{}\" is listed twice", Printable(&storage.key))));
        }
    }
    end_of_stream(&cursor)?;
    named(&input, &value, |storage| places.get(&storage.key).cloned())
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
    if pickle.data.end - pickle.data.start > MAX_PICKLE {
        return Err(bad(format!("its pickle is longer than {MAX_PICKLE} bytes")));
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
