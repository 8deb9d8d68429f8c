//! Safetensors files written in one pass.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{
    AtomicFile, CheckpointError, Context, Existing, MAX_HEADER_BYTES, OutputKind, OwnFolder, check_output, probe,
};
use crate::tensor::{Dtype, checked_bytes, dtype_name};

/// The parent folder of a path.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A tensor of a [`TensorFileWriter`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorId(usize);

/// Where a tensor file appears.
enum Destination {
    /// An output of the command.
    Output(Existing),
    /// The program's own state: folder and name.
    Own(OwnFolder, String),
}

/// Removes the temporary path that tempfile adds to an error: it is meaningless to the user, and differs every time.
fn without_path(error: io::Error) -> io::Error {
    if error.raw_os_error().is_some() { error } else { error.kind().into() }
}

struct Pending {
    name: String,
    dtype: Dtype,
    /// Set by [`TensorFileWriter::finish_tensor`].
    shape: Option<Vec<u64>>,
    /// Ranges of the spool, in order.
    extents: Vec<(u64, u64)>,
}

impl Pending {
    fn n_bytes(&self) -> u64 {
        self.extents.iter().map(|(_, len)| len).sum()
    }
}

/// Writes a safetensors file in one pass, although the header comes first and is known last.
///
/// Tensors may grow in any order, interleaved. The bytes go to an unnamed spool file in the output's folder and are
/// copied behind the header at the end: widest dtype first, then by name, as the safetensors crate does. The same
/// content gives the same bytes in any order of writing.
///
/// Memory: one buffer, and 16 bytes for every switch from one tensor to another.
pub struct TensorFileWriter {
    target: PathBuf,
    destination: Destination,
    spool: BufWriter<File>,
    spooled: u64,
    tensors: Vec<Pending>,
}

impl TensorFileWriter {
    /// Starts a file that will appear at `target`.
    ///
    /// # Errors
    /// Everything that [`check_output`] refuses, immediately.
    pub fn create(target: &Path, existing: Existing) -> Result<Self, CheckpointError> {
        check_output(target, OutputKind::File, existing)?;
        Self::spooling(target, folder_of(target), Destination::Output(existing))
    }

    /// Starts a file of this program's own state; it replaces an existing file of that name. Its folder may be created
    /// later, if the parent exists.
    pub(crate) fn create_own(folder: &OwnFolder, name: &str) -> Result<Self, CheckpointError> {
        let target = folder.path().join(name);
        let mut spool_in = folder.path();
        while !probe::is_present(spool_in)? {
            spool_in = folder_of(spool_in);
        }
        Self::spooling(&target, spool_in, Destination::Own(folder.clone(), name.to_owned()))
    }

    fn spooling(target: &Path, folder: &Path, destination: Destination) -> Result<Self, CheckpointError> {
        // An unnamed file: it stays invisible, whatever happens.
        let spool =
            tempfile::tempfile_in(folder).map_err(|e| CheckpointError::io("create", target, without_path(e)))?;
        let spool = BufWriter::with_capacity(1 << 20, spool);
        Ok(Self { target: target.to_owned(), destination, spool, spooled: 0, tensors: Vec::new() })
    }

    /// Bytes of tensor data written so far.
    pub fn n_bytes(&self) -> u64 {
        self.spooled
    }

    /// Adds a tensor without data.
    pub fn add_tensor(&mut self, name: String, dtype: Dtype) -> TensorId {
        self.tensors.push(Pending { name, dtype, shape: None, extents: Vec::new() });
        TensorId(self.tensors.len() - 1)
    }

    /// Appends data to a tensor.
    pub fn append(&mut self, id: TensorId, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.spool.write_all(bytes).map_err(|e| CheckpointError::io("write", &self.target, e))?;
        let tensor = &mut self.tensors[id.0];
        assert!(tensor.shape.is_none(), "a finished tensor cannot grow");
        match tensor.extents.last_mut() {
            Some((start, len)) if *start + *len == self.spooled => *len += bytes.len() as u64,
            _ => tensor.extents.push((self.spooled, bytes.len() as u64)),
        }
        self.spooled += bytes.len() as u64;
        Ok(())
    }

    /// Sets the shape of a tensor whose data is complete.
    ///
    /// # Panics
    /// If the length of the data does not match the shape.
    pub fn finish_tensor(&mut self, id: TensorId, shape: Vec<u64>) {
        let tensor = &mut self.tensors[id.0];
        let needed = checked_bytes(tensor.dtype, shape.iter().product());
        assert_eq!(needed, Some(tensor.n_bytes()), "tensor {} of shape {shape:?} got all its data", tensor.name);
        tensor.shape = Some(shape);
    }

    /// Writes header and data, and commits the file.
    ///
    /// # Errors
    /// [`CheckpointError::BadFile`] if two tensors have the same name, or if the header is longer than readers accept.
    pub fn finish(mut self, ctx: &Context<'_>, metadata: &BTreeMap<String, String>) -> Result<(), CheckpointError> {
        let target = self.target;
        let io = |e| CheckpointError::io("write", &target, e);
        let output = match &self.destination {
            Destination::Output(existing) => AtomicFile::create(&target, *existing)?,
            Destination::Own(folder, name) => AtomicFile::create_own(folder, name)?,
        };
        sort_for_header(&mut self.tensors);
        let header = header_json(&target, &self.tensors, metadata)?;
        let spool = self.spool.into_inner().map_err(|e| io(e.into_error()))?;
        let mut out = BufWriter::with_capacity(1 << 20, output.file());
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        out.write_all(&header).map_err(io)?;
        let mut buffer = vec![0; 1 << 20];
        for &(start, len) in self.tensors.iter().flat_map(|tensor| &tensor.extents) {
            let mut done = 0;
            while done < len {
                ctx.check()?;
                let n = buffer.len().min((len - done) as usize);
                spool.read_exact_at(&mut buffer[..n], start + done).map_err(io)?;
                out.write_all(&buffer[..n]).map_err(io)?;
                done += n as u64;
            }
        }
        out.flush().map_err(io)?;
        drop(out);
        output.commit()
    }
}

/// The header that [`TensorFileWriter`] would write for tensors of these names, dtypes and shapes, and the size of the
/// file; `target` is for messages.
///
/// # Errors
/// Two tensors of the same name, sizes that overflow, or a header longer than readers accept.
pub fn tensor_file_header(
    target: &Path,
    tensors: Vec<(String, Dtype, Vec<u64>)>,
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, u64), CheckpointError> {
    let mut pending = Vec::with_capacity(tensors.len());
    for (name, dtype, shape) in tensors {
        let n_elements = shape.iter().try_fold(1u64, |n, &size| n.checked_mul(size));
        let Some(n_bytes) = n_elements.and_then(|n| checked_bytes(dtype, n)) else {
            return Err(CheckpointError::bad_tensor(target, &name, format!("shape {shape:?} overflows 64 bits")));
        };
        pending.push(Pending { name, dtype, shape: Some(shape), extents: vec![(0, n_bytes)] });
    }
    sort_for_header(&mut pending);
    let json = header_json(target, &pending, metadata)?;
    let n_bytes = pending.iter().try_fold(8 + json.len() as u64, |sum, tensor| sum.checked_add(tensor.n_bytes()));
    let n_bytes = n_bytes.ok_or_else(|| CheckpointError::bad_file(target, "it would have more than 2^64 bytes"))?;
    Ok((json, n_bytes))
}

/// Widest dtype first, then by name, as the safetensors crate does.
fn sort_for_header(tensors: &mut [Pending]) {
    tensors.sort_by(|a, b| {
        let width = |tensor: &Pending| std::cmp::Reverse(tensor.dtype.bitsize());
        (width(a), &a.name).cmp(&(width(b), &b.name))
    });
}

fn header_json(
    target: &Path,
    tensors: &[Pending],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, CheckpointError> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut at = 0;
    for tensor in tensors {
        let shape = tensor.shape.as_ref().expect("every tensor was finished");
        let end = at + tensor.n_bytes();
        let entry = json!({ "dtype": dtype_name(tensor.dtype), "shape": shape, "data_offsets": [at, end] });
        if let Some(_first) = header.insert(tensor.name.clone(), entry) {
            return Err(CheckpointError::bad_tensor(target, &tensor.name, "two tensors would have this name"));
        }
        at = end;
    }
    let mut json = serde_json::to_vec(&Value::Object(header)).expect("strings and numbers serialize");
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > MAX_HEADER_BYTES {
        return Err(CheckpointError::bad_file(
            target,
            format!("the header would take {} bytes, readers accept {MAX_HEADER_BYTES}", json.len()),
        ));
    }
    Ok(json)
}
