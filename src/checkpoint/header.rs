//! Strict validation of a safetensors header.
//!
//! The safetensors crate accepts some headers that the format forbids, duplicate names above all; this code does not.
//! A [`Header`] needs no further checks: names are unique, tensors are sorted by offset without holes or overlaps,
//! every size equals shape times dtype, and the data ends at the end of the file.
//!
//! The format: 8 bytes of little-endian header length `n`, `n` bytes of JSON, tensor data. Sources:
//! <https://github.com/huggingface/safetensors#format> and `safetensors/src/tensor.rs` 0.8.

use std::{collections::BTreeMap, ops::Range, path::Path};

use super::{CheckpointError, json::malformed, raw_header::RawHeader};
use crate::tensor::{Dtype, checked_bytes, dtype_name};

/// The metadata key of this program's own files: masks, adapters, ledgers.
pub const DOCUMENT_KEY: &str = "neuroada";
/// The metadata key under which a checkpoint's shards, or its index, record the merged adapters.
pub const MERGED_KEY: &str = "neuroada.merged";
/// Maximum header size, here and in the safetensors crate.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Maximum number of tensors per file: forty times the largest published shard.
pub const MAX_TENSORS: usize = 1_000_000;

/// One tensor of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo {
    /// The name as stored; print it through [`Printable`](super::Printable).
    pub name: String,
    /// The dtype of the elements.
    pub dtype: Dtype,
    /// The shape as stored.
    pub shape: Vec<u64>,
    /// The range of the data, in bytes from the end of the header.
    pub data: Range<u64>,
}

impl TensorInfo {
    /// Whether the other tensor has the same dtype and shape.
    pub fn is_like(&self, other: &Self) -> bool {
        (self.dtype, &self.shape) == (other.dtype, &other.shape)
    }

    /// Size of the tensor's data in bytes.
    pub fn n_bytes(&self) -> u64 {
        self.data.end - self.data.start
    }
    /// Number of elements; checked not to overflow.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// A header that passed validation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Sorted by offset; no holes, no overlaps.
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<u32>,
    metadata: BTreeMap<String, String>,
    header_bytes: u64,
}

impl Header {
    /// Parses `json`, the header of a file of `file_bytes` bytes; `path` is for messages.
    ///
    /// Memory: including `json`, at most three times the largest accepted header.
    ///
    /// # Errors
    /// [`CheckpointError::BadFile`] or [`CheckpointError::BadTensor`], with the position.
    pub fn parse(path: &Path, json: &[u8], file_bytes: u64) -> Result<Self, CheckpointError> {
        let bad = |what: String| CheckpointError::bad_file(path, what);
        if json.first() != Some(&b'{') {
            return Err(bad(format!("the header must begin with '{{', found {}", first_byte(json))));
        }
        let text = std::str::from_utf8(json)
            .map_err(|e| bad(format!("the header is not UTF-8 at byte {}", 8 + e.valid_up_to())))?;
        let raw =
            RawHeader::parse(text).map_err(|e| bad(format!("the header is malformed: {}", malformed(json, 8, &e))))?;
        Self::check(path, raw, json.len() as u64, file_bytes)
    }

    /// Parses `json`, a header alone, of a file that contains exactly the tensors it lists; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub(crate) fn parse_text(path: &Path, json: &[u8]) -> Result<Self, CheckpointError> {
        let bad = |what: String| CheckpointError::bad_file(path, what);
        let text = std::str::from_utf8(json).map_err(|e| bad(e.to_string()))?;
        let raw =
            RawHeader::parse(text).map_err(|e| bad(format!("the header is malformed: {}", malformed(json, 8, &e))))?;
        let end = raw.tensors.iter().map(|tensor| tensor.data.end).max().unwrap_or(0);
        Self::check(path, raw, json.len() as u64, end.saturating_add(8 + json.len() as u64))
    }

    fn check(path: &Path, raw: RawHeader, json_bytes: u64, file_bytes: u64) -> Result<Self, CheckpointError> {
        let mut tensors = raw.tensors;
        let bad = |tensor: &TensorInfo, what: String| CheckpointError::bad_tensor(path, &tensor.name, what);
        // Empty tensors share an offset with their successor; among themselves they are sorted by name.
        tensors.sort_unstable_by(|a, b| (a.data.start, a.data.end, &a.name).cmp(&(b.data.start, b.data.end, &b.name)));
        // Checked before the offsets: the wrong part of two entries with the same name and bytes is the name.
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_unstable_by(|&a, &b| tensors[a as usize].name.cmp(&tensors[b as usize].name));
        for pair in by_name.windows(2) {
            let (a, b) = (&tensors[pair[0] as usize], &tensors[pair[1] as usize]);
            if a.name == b.name {
                return Err(bad(a, format!("named twice, at data offsets {} and {}", a.data.start, b.data.start)));
            }
        }
        let mut end = 0;
        for tensor in &tensors {
            if tensor.data.end < tensor.data.start {
                return Err(bad(
                    tensor,
                    format!("data_offsets end at {} before they begin at {}", tensor.data.end, tensor.data.start),
                ));
            }
            // An empty tensor must not hide sizes whose product overflows in another order.
            let n_elements = tensor.shape.iter().filter(|&&d| d != 0).try_fold(1u64, |n, &d| n.checked_mul(d));
            let needed = n_elements
                .map(|n| if tensor.shape.contains(&0) { 0 } else { n })
                .ok_or_else(|| bad(tensor, format!("shape {:?} overflows 64 bits", tensor.shape)))
                .and_then(|n| {
                    checked_bytes(tensor.dtype, n).ok_or_else(|| {
                        let dtype = dtype_name(tensor.dtype);
                        bad(tensor, format!("{n} elements of {dtype} are not a whole number of bytes below 2^64"))
                    })
                })?;
            if tensor.n_bytes() != needed {
                let (dtype, found) = (dtype_name(tensor.dtype), tensor.n_bytes());
                return Err(bad(
                    tensor,
                    format!("shape {:?} of {dtype} takes {needed} bytes, data_offsets give {found}", tensor.shape),
                ));
            }
            if tensor.data.start < end {
                return Err(bad(
                    tensor,
                    format!("begins at {} inside the tensor before it, which ends at {end}", tensor.data.start),
                ));
            }
            if tensor.data.start > end {
                return Err(bad(tensor, format!("begins at {}, leaving a hole after {end}", tensor.data.start)));
            }
            end = tensor.data.end;
        }
        let needed = end.checked_add(8 + json_bytes);
        match needed {
            Some(needed) if needed == file_bytes => {}
            Some(needed) if needed < file_bytes => {
                let extra = file_bytes - needed;
                return Err(CheckpointError::bad_file(
                    path,
                    format!("{extra} bytes follow the last tensor: needs {needed} bytes, has {file_bytes}"),
                ));
            }
            _ => {
                let needed = needed.map_or("more than 2^64".to_owned(), |n| n.to_string());
                return Err(CheckpointError::bad_file(
                    path,
                    format!("needs {needed} bytes, has {file_bytes}: the download is incomplete"),
                ));
            }
        }
        Ok(Self { tensors, by_name, metadata: raw.metadata.unwrap_or_default(), header_bytes: json_bytes })
    }

    /// All tensors, sorted by offset.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }
    /// All tensors, sorted by name.
    pub fn by_name(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.by_name.iter().map(|&i| &self.tensors[i as usize])
    }
    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let found = self.by_name.binary_search_by(|&i| self.tensors[i as usize].name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[self.by_name[found] as usize])
    }
    /// `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
    /// Size of the JSON in bytes, without the length prefix.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }
    /// Size of the file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.data_start() + self.tensors.last().map_or(0, |tensor| tensor.data.end)
    }
    /// Start of the tensor data, in bytes from the start of the file.
    pub fn data_start(&self) -> u64 {
        8 + self.header_bytes
    }
}

fn first_byte(json: &[u8]) -> String {
    match json {
        [] => "an empty header".to_owned(),
        [0xef, 0xbb, 0xbf, ..] => "a byte order mark".to_owned(),
        [byte, ..] => format!("byte 0x{byte:02x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str, data_bytes: u64) -> Result<Header, String> {
        Header::parse(Path::new("m"), json.as_bytes(), 8 + json.len() as u64 + data_bytes).map_err(|e| e.to_string())
    }

    #[test]
    fn tensors_are_found_by_name_and_sorted_by_offset() {
        let json = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"a":{"shape":[],"dtype":"F32","data_offsets":[12,16]}} "#;
        let header = parse(json, 16).unwrap();
        assert_eq!(header.metadata()["format"], "pt");
        assert_eq!(header.tensors().iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!(header.by_name().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(header.tensor("a").unwrap().data, 12..16);
        assert_eq!(header.tensor("c"), None);
    }

    #[test]
    fn a_header_with_a_hole_is_rejected() {
        let error = parse(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#, 2).unwrap_err();
        assert_eq!(error, r#"m: tensor "a": begins at 1, leaving a hole after 0"#);
    }

    #[test]
    fn one_name_spelled_two_ways_is_rejected() {
        let json = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        assert_eq!(parse(json, 2).unwrap_err(), r#"m: tensor "a": named twice, at data offsets 0 and 1"#);
    }

    #[test]
    fn sizes_that_overflow_are_rejected() {
        for shape in ["[0,18446744073709551615,18446744073709551615]", "[18446744073709551615,3]"] {
            let error =
                parse(&format!(r#"{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}}}"#), 0).unwrap_err();
            assert!(error.contains("overflows") || error.contains("takes"), "{error}");
        }
    }

    #[test]
    fn a_truncated_file_says_how_much_is_missing() {
        let json = r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#;
        let needed = 8 + json.len() + 9;
        let error = parse(json, 8).unwrap_err();
        assert_eq!(error, format!("m: needs {needed} bytes, has {}: the download is incomplete", needed - 1));
    }
}
