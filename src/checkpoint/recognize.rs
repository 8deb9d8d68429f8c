//! Recognizes files of other formats by their first bytes.

use std::{os::unix::fs::FileExt, path::Path};

use super::{
    json::open_regular,
    other_format::{OtherFormat, START_BYTES, recognize_start},
};

/// What the file at `path` is, if it is of a known format other than safetensors; `None` if it cannot be read.
pub fn recognize_file(path: &Path) -> Option<OtherFormat> {
    let mut start = [0; START_BYTES];
    let n = open_regular(path, "open").ok().and_then(|(file, _)| file.read_at(&mut start, 0).ok())?;
    recognize_start(&start[..n])
}
