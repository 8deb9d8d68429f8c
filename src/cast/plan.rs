//! The new checkpoint, planned from headers: its tensors and its shards.

use std::collections::BTreeMap;

use super::{CastError, CastOptions, CastReport};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, CodedLayout, Header, Layout, TensorRef, tensor_file_header},
    tensor::{Dtype, checked_bytes, dtype_name, is_float},
};

/// The limit on a shard's tensor data that transformers has.
const USUAL_SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor of the new checkpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output<'a> {
    pub(super) from: TensorRef<'a>,
    pub(super) dtype: Dtype,
    /// Whether each matrix is written as `[d_in, d_out]`, which is how the model holds it.
    pub(super) transposed: bool,
}

impl Output<'_> {
    /// Its shape.
    pub(super) fn shape(&self) -> Vec<u64> {
        let mut shape = self.from.info.shape.clone();
        if let (true, [.., rows, columns]) = (self.transposed, &mut shape[..]) {
            std::mem::swap(rows, columns);
        }
        shape
    }

    fn n_bytes(&self) -> Result<u64, CastError> {
        let info = self.from.info;
        checked_bytes(self.dtype, info.n_elements()).ok_or_else(|| {
            let what = format!("shape {:?} overflows 64 bits as {}", info.shape, dtype_name(self.dtype));
            CheckpointError::bad_tensor(self.from.shard.path(), &info.name, what).into()
        })
    }
}

/// A shard of the new checkpoint.
pub(super) struct Shard<'a> {
    pub(super) name: String,
    pub(super) header_json: Vec<u8>,
    pub(super) header: Header,
    /// By name.
    pub(super) tensors: BTreeMap<&'a str, Output<'a>>,
}

/// All of it.
pub(super) struct Plan<'a> {
    pub(super) shards: Vec<Shard<'a>>,
    pub(super) options: CastOptions,
    n_decoded: u64,
    n_cast: u64,
}

impl<'a> Plan<'a> {
    pub(super) fn new(base: &'a Checkpoint, options: &CastOptions) -> Result<Self, CastError> {
        let is_quantized = !base.codes().weights().is_empty();
        let mut outputs = Vec::new();
        for tensor in base.tensors() {
            match options.dtype {
                // Scales and codes go with their weights.
                Some(_) if tensor.coded().is_some() => {}
                Some(dtype) if !is_quantized && is_float(tensor.info.dtype) => {
                    outputs.push(Output { from: tensor, dtype, transposed: false });
                }
                _ => outputs.push(Output { from: tensor, dtype: tensor.info.dtype, transposed: false }),
            }
        }
        let n_cast = outputs.iter().filter(|output| output.dtype != output.from.info.dtype).count() as u64;
        let mut n_decoded = 0;
        if let Some(dtype) = options.dtype {
            for weight in base.codes().weights() {
                let from = base.decoded(weight)?;
                let transposed = from.layout().is_some_and(CodedLayout::is_transposed_in_memory);
                outputs.push(Output { from, dtype, transposed });
                n_decoded += 1;
            }
        }
        // Neighbours stay neighbours, so that both checkpoints are read and written from front to back.
        outputs.sort_by_cached_key(|output| {
            let stored = output.from.stored().next().map_or(0, |(_, info)| info.data.start);
            (output.from.shard_index, stored, output.from.info.name.clone())
        });
        let shards = shards(base, options, outputs)?;
        Ok(Self { shards, options: options.clone(), n_decoded, n_cast })
    }

    /// Bytes of all shards.
    pub(super) fn n_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.header.file_bytes()).sum()
    }

    /// What the output will be: a later run goes on with what an earlier one left only where this is the same.
    pub(super) fn text(&self, base: &Checkpoint) -> String {
        let mut text = format!("cast v1\n{:?} {}\n", self.options.dtype, self.options.allow_overflow);
        for shard in base.shards() {
            text += &format!("{} {}\n", shard.file_name(), shard.stamp());
        }
        for shard in &self.shards {
            text += &format!("{} {}\n", shard.name, blake3::hash(&shard.header_json).to_hex());
        }
        text
    }

    /// Bytes of all tensors.
    pub(super) fn n_data_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.header.file_bytes() - shard.header.data_start()).sum()
    }

    pub(super) fn report(&self, base: &Checkpoint) -> CastReport {
        let tensors = || self.shards.iter().flat_map(|shard| shard.tensors.values());
        let mut notes = base.notes();
        if self.n_decoded > 0
            && tensors().any(|output| is_float(output.dtype) && Some(output.dtype) != self.options.dtype)
        {
            notes.push("tensors that are not quantized keep their types".to_owned());
        }
        CastReport {
            base: base.name(),
            dry_run: false,
            dtype: self.options.dtype.map(dtype_name),
            n_tensors: tensors().count() as u64,
            n_decoded: self.n_decoded,
            n_cast: self.n_cast,
            n_parameters: tensors().map(|output| output.from.info.n_elements()).sum(),
            n_overflowed: 0,
            n_shards: self.shards.len() as u64,
            bytes_read: base.n_bytes(),
            bytes_written: self.n_bytes(),
            left_out: Vec::new(),
            notes,
        }
    }
}

/// The tensors in shards: each takes tensors until the next would make it too large.
fn shards<'a>(
    base: &'a Checkpoint,
    options: &CastOptions,
    outputs: Vec<Output<'a>>,
) -> Result<Vec<Shard<'a>>, CastError> {
    let is_file = base.layout() == Layout::File;
    let limit = match options.max_shard_bytes {
        Some(limit) => limit,
        None if is_file => u64::MAX,
        None => USUAL_SHARD_BYTES,
    };
    let mut cut: Vec<Vec<Output<'a>>> = Vec::new();
    let mut n_bytes = 0u64;
    for output in outputs {
        let more = output.n_bytes()?;
        match cut.last_mut() {
            Some(shard) if n_bytes.saturating_add(more) <= limit => shard.push(output),
            _ => {
                cut.push(vec![output]);
                n_bytes = 0;
            }
        }
        n_bytes = n_bytes.saturating_add(more);
    }
    let n = cut.len();
    let metadata = metadata(base);
    let shard = |(i, tensors): (usize, Vec<Output<'a>>)| {
        let name = match n {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let path = base.root();
        let described = tensors.iter().map(|it| (it.from.info.name.clone(), it.dtype, it.shape())).collect();
        let (header_json, _) = tensor_file_header(path, described, &metadata)?;
        let header = Header::parse_text(path, &header_json)?;
        let tensors = tensors.into_iter().map(|output| (output.from.info.name.as_str(), output)).collect();
        Ok(Shard { name, header_json, header, tensors })
    };
    cut.into_iter().enumerate().map(shard).collect()
}

/// What the old shards say of their format; names of merged adapters belong to the old bytes.
fn metadata(base: &Checkpoint) -> BTreeMap<String, String> {
    let of_shard = |shard: &'_ crate::checkpoint::Shard| shard.header().metadata().get("format").cloned();
    let format = base.shards().iter().find_map(of_shard).unwrap_or_else(|| "pt".to_owned());
    BTreeMap::from([("format".to_owned(), format)])
}
