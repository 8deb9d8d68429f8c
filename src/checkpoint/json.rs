//! Limits the memory of untrusted JSON: files are measured before they are read, and all kept data is counted.

use std::{cell::Cell, fmt, fs::File, io::Read, os::unix::fs::OpenOptionsExt, path::Path};

use serde::de::{self, DeserializeSeed, Deserializer, Unexpected, Visitor};

use super::{CheckpointError, EntryKind, Printable};

/// Opens a file for reading; refuses anything but a regular file, and does not block on a pipe.
pub(crate) fn open_regular(path: &Path, verb: &'static str) -> Result<(File, std::fs::Metadata), CheckpointError> {
    let io = |e| CheckpointError::io(verb, path, e);
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(nonblocking).open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if EntryKind::of(meta.file_type()) != EntryKind::File {
        return Err(CheckpointError::bad_file(path, "not a regular file"));
    }
    Ok((file, meta))
}

/// Reads a whole file of at most `max_bytes` bytes.
///
/// # Errors
/// The file cannot be read, is not a regular file, or is longer.
pub fn read_whole(path: &Path, max_bytes: u64) -> Result<Vec<u8>, CheckpointError> {
    let (file, meta) = open_regular(path, "read")?;
    read_open(path, file, meta.len(), max_bytes)
}

/// The same for an open file of `n_bytes` bytes; `path` is for messages.
pub(super) fn read_open(path: &Path, file: File, n_bytes: u64, max_bytes: u64) -> Result<Vec<u8>, CheckpointError> {
    let too_long =
        |found: u64| CheckpointError::bad_file(path, format!("has {found} bytes, at most {max_bytes} are accepted"));
    if n_bytes > max_bytes {
        return Err(too_long(n_bytes));
    }
    let mut bytes = Vec::with_capacity(n_bytes as usize);
    // The reported length may be 0 for files that the system generates on reading.
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|e| CheckpointError::io("read", path, e))?;
    if bytes.len() as u64 > max_bytes { Err(too_long(bytes.len() as u64)) } else { Ok(bytes) }
}

/// Describes a serde_json error with its byte position in the file; `json` begins at `offset` of the file.
pub(crate) fn malformed(json: &[u8], offset: u64, error: &serde_json::Error) -> String {
    let (text, line, column) = (error.to_string(), error.line(), error.column());
    let place = format!(" at line {line} column {column}");
    let text = Printable(text.strip_suffix(&place).unwrap_or(&text)).to_string();
    if line == 0 {
        return text;
    }
    let line_start: usize = json.split_inclusive(|&byte| byte == b'\n').take(line - 1).map(<[u8]>::len).sum();
    // Columns count from 1; an unexpected end has the column of the last byte.
    format!("{text}, at byte {}", offset + (line_start + column.saturating_sub(1)) as u64)
}

/// Counts the memory that a parser keeps, so that a hostile document costs no more than an honest one.
pub(super) struct Allowance {
    max_bytes: usize,
    taken: Cell<usize>,
    longest: Cell<usize>,
}

impl Allowance {
    /// At most `max_bytes` bytes.
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, taken: Cell::new(0), longest: Cell::new(0) }
    }

    /// Counts `bytes` bytes.
    pub fn take<E: de::Error>(&self, bytes: usize) -> Result<(), E> {
        let taken = self.taken.get().saturating_add(bytes);
        self.taken.set(taken);
        if taken <= self.max_bytes {
            return Ok(());
        }
        Err(E::custom(format_args!("it would take more than {} bytes of memory", self.max_bytes)))
    }

    /// Counts the block that the allocator returns for `bytes` bytes.
    pub fn take_block<E: de::Error>(&self, bytes: usize) -> Result<(), E> {
        self.take(if bytes == 0 { 0 } else { (bytes + 8).next_multiple_of(16).max(32) })
    }

    /// Counts a string, and the parser's own copy of the longest one.
    pub fn take_text<E: de::Error>(&self, text: &str) -> Result<(), E> {
        let longer = text.len().saturating_sub(self.longest.get());
        self.longest.set(text.len().max(self.longest.get()));
        self.take::<E>(longer)?;
        self.take_block(text.len())
    }
}

/// A string whose memory is counted; the second field describes what is expected.
pub(super) struct Text<'a>(pub &'a Allowance, pub &'static str);

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = String;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = String;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        self.0.take_text(text)?;
        Ok(text.to_owned())
    }
}

/// The error for a string of the wrong place; serde's own error would contain the whole string, however long.
pub(super) fn not_a_string<E: de::Error>(found: &str, expected: &dyn de::Expected) -> E {
    E::invalid_type(Unexpected::Other(&format!("the string \"{}\"", Printable(found))), expected)
}
