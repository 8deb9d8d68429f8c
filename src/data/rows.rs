//! Reads the rows of a file one at a time: a JSON array or JSON lines, detected from the content.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{DataError, RowLocation};
use crate::checkpoint::{CheckpointError, Printable, open_regular, recognize_file};

/// Maximum size of one row, that of a long book; a larger one more likely has a missing quote or bracket.
pub const MAX_ROW_BYTES: usize = 16 << 20;

/// Maximum number of values in one row. Parsed, each takes up to 100 bytes, however short it is in the file.
const MAX_ROW_VALUES: usize = 1 << 18;

/// One row, an object.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// Its position.
    pub place: RowLocation,
    /// Its fields.
    pub fields: Map<String, Value>,
    /// Its length in the file in bytes.
    pub n_bytes: usize,
}

/// Reads the rows of a file in order.
///
/// Accepts a byte order mark, CRLF line endings and empty lines. Memory: one row, at most [`MAX_ROW_BYTES`].
pub struct RowReader {
    path: PathBuf,
    n_bytes: u64,
    bytes: Bytes,
    form: Form,
    n_rows: u64,
    /// The current row's text; the allocation is reused.
    text: Vec<u8>,
    is_over: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Lines,
    Array,
}

impl RowReader {
    /// Opens a file and reads up to its first non-space byte.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let (file, meta) = open_regular(path, "read")?;
        let mut rows = Self {
            path: path.to_owned(),
            n_bytes: meta.len(),
            bytes: Bytes::new(file),
            form: Form::Lines,
            n_rows: 0,
            text: Vec::new(),
            is_over: false,
        };
        rows.skip_byte_order_mark()?;
        match rows.skip_space()? {
            None => rows.is_over = true,
            Some(b'[') => {
                rows.next_byte()?;
                rows.form = Form::Array;
            }
            Some(b'{') => {}
            Some(_) => {
                if let Some(format) = recognize_file(path) {
                    let expected = "rows as a JSON array or JSON lines";
                    return Err(CheckpointError::other_format(path, format, expected).into());
                }
                let start: Vec<u8> =
                    rows.bytes.buffer[rows.bytes.at..rows.bytes.end].iter().copied().take(24).collect();
                let start = String::from_utf8_lossy(&start).into_owned();
                let what = format!("neither a JSON array nor JSON lines: it begins with \"{}\"", Printable(&start));
                return Err(CheckpointError::bad_file(path, what).into());
            }
        }
        Ok(rows)
    }

    /// The next row, or `None` after the last.
    pub fn next_row(&mut self) -> Result<Option<Row>, DataError> {
        if self.is_over {
            return Ok(None);
        }
        let place = match self.form {
            Form::Lines => self.next_line()?,
            Form::Array => self.next_element()?,
        };
        let Some(place) = place else {
            self.is_over = true;
            return Ok(None);
        };
        self.n_rows += 1;
        let text = std::str::from_utf8(&self.text)
            .map_err(|e| self.bad(place, format!("not UTF-8, at byte {} of the row", e.valid_up_to())))?;
        let fields = match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => fields,
            Ok(other) => return Err(self.bad(place, format!("expected an object, found {}", kind(&other)))),
            Err(error) => {
                let message = error.to_string();
                let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
                let what = format!("{}, at column {} of the row", Printable(message), error.column());
                return Err(self.bad(place, what));
            }
        };
        Ok(Some(Row { place, fields, n_bytes: self.text.len() }))
    }

    /// Reads the rest of the file for its digest only.
    pub(super) fn drain(&mut self) -> Result<(), DataError> {
        self.is_over = true;
        while self.peek()?.is_some() {
            self.bytes.at = self.bytes.end;
        }
        Ok(())
    }

    /// Size of the file when it was opened.
    pub(super) fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Number of bytes read so far.
    pub fn n_bytes_read(&self) -> u64 {
        self.bytes.n_read
    }

    /// The BLAKE3 of the file, as printed by `b3sum`; known after the last row.
    pub fn digest(&self) -> blake3::Hash {
        self.bytes.hasher.finalize()
    }

    /// Reads the next non-empty line into `text`.
    fn next_line(&mut self) -> Result<Option<RowLocation>, DataError> {
        if self.skip_space()?.is_none() {
            return Ok(None);
        }
        let place = RowLocation::Line(self.bytes.line);
        let mut scan = Scan::default();
        self.text.clear();
        loop {
            match self.next_byte()? {
                None | Some(b'\n') => break,
                Some(byte) => self.take(byte, &mut scan, place)?,
            }
        }
        if scan.depth > 0 || scan.in_string {
            let what =
                "the object does not end on its line (JSON lines hold one object per line; an array begins with `[`)";
            return Err(self.bad(place, what.to_owned()));
        }
        Ok(Some(place))
    }

    /// Reads the next element of the array into `text`; only whitespace may follow the last one.
    fn next_element(&mut self) -> Result<Option<RowLocation>, DataError> {
        let ends_early = "the array does not end: is the file complete?";
        let mut first = self.skip_space()?;
        if self.n_rows > 0 && first == Some(b',') {
            self.next_byte()?;
            first = self.skip_space()?;
        } else if self.n_rows > 0 && first.is_some_and(|byte| byte != b']') {
            let place = RowLocation::Element(self.n_rows, self.bytes.line);
            return Err(self.bad(place, "expected `,` or `]` before it".to_owned()));
        }
        let place = RowLocation::Element(self.n_rows, self.bytes.line);
        match first {
            None => return Err(CheckpointError::bad_file(&self.path, ends_early).into()),
            Some(b']') => {
                self.next_byte()?;
                return match self.skip_space()? {
                    None => Ok(None),
                    Some(_) => {
                        let what = format!("line {}: unexpected data after the end of the array", self.bytes.line);
                        Err(CheckpointError::bad_file(&self.path, what).into())
                    }
                };
            }
            Some(b'{') => {}
            Some(_) => return Err(self.bad(place, "expected an object".to_owned())),
        }
        let mut scan = Scan::default();
        self.text.clear();
        while self.text.is_empty() || scan.depth > 0 {
            let Some(byte) = self.next_byte()? else { return Err(self.bad(place, ends_early.to_owned())) };
            self.take(byte, &mut scan, place)?;
        }
        Ok(Some(place))
    }

    fn take(&mut self, byte: u8, scan: &mut Scan, place: RowLocation) -> Result<(), DataError> {
        scan.see(byte);
        self.text.push(byte);
        if self.text.len() > MAX_ROW_BYTES {
            return Err(self.bad(place, format!("the row is longer than {MAX_ROW_BYTES} bytes")));
        }
        if scan.n_values > MAX_ROW_VALUES {
            return Err(self.bad(place, format!("the row has more than {MAX_ROW_VALUES} values")));
        }
        Ok(())
    }

    fn skip_byte_order_mark(&mut self) -> Result<(), DataError> {
        for byte in "\u{feff}".bytes() {
            if self.peek()? != Some(byte) {
                break;
            }
            self.next_byte()?;
        }
        Ok(())
    }

    /// Skips whitespace and peeks at the next byte.
    fn skip_space(&mut self) -> Result<Option<u8>, DataError> {
        loop {
            match self.peek()? {
                Some(b' ' | b'\t' | b'\r' | b'\n') => self.next_byte()?,
                other => return Ok(other),
            };
        }
    }

    fn peek(&mut self) -> Result<Option<u8>, DataError> {
        self.bytes.peek().map_err(|e| CheckpointError::io("read", &self.path, e).into())
    }

    fn next_byte(&mut self) -> Result<Option<u8>, DataError> {
        let byte = self.peek()?;
        if let Some(byte) = byte {
            self.bytes.at += 1;
            self.bytes.line += u64::from(byte == b'\n');
        }
        Ok(byte)
    }

    fn bad(&self, place: RowLocation, what: String) -> DataError {
        DataError::BadRow { path: self.path.clone(), place, what }
    }
}

/// Tracks nesting and strings in JSON without validating it; serde_json does that.
#[derive(Default)]
struct Scan {
    depth: usize,
    in_string: bool,
    escaped: bool,
    n_values: usize,
}

impl Scan {
    fn see(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => {
                self.depth += 1;
                self.n_values += 1;
            }
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b',' => self.n_values += 1,
            _ => {}
        }
    }
}

/// A file's bytes one by one, hashed and counted.
struct Bytes {
    file: File,
    buffer: Box<[u8]>,
    at: usize,
    end: usize,
    line: u64,
    n_read: u64,
    hasher: blake3::Hasher,
}

impl Bytes {
    fn new(file: File) -> Self {
        let buffer = vec![0; 256 << 10].into();
        Self { file, buffer, at: 0, end: 0, line: 1, n_read: 0, hasher: blake3::Hasher::new() }
    }

    fn peek(&mut self) -> std::io::Result<Option<u8>> {
        if self.at == self.end {
            self.at = 0;
            self.end = loop {
                match self.file.read(&mut self.buffer) {
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    other => break other?,
                }
            };
            self.hasher.update(&self.buffer[..self.end]);
            self.n_read += self.end as u64;
        }
        Ok(self.buffer[..self.end].get(self.at).copied())
    }
}

/// The type of a JSON value as text.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<Row>, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("rows");
        std::fs::write(&path, bytes).expect("written");
        let message = |e: DataError| e.to_string().replace(&*path.to_string_lossy(), "F");
        let mut rows = RowReader::open(&path).map_err(message)?;
        let mut all = Vec::new();
        while let Some(row) = rows.next_row().map_err(message)? {
            all.push(row);
        }
        assert_eq!(rows.n_bytes_read(), bytes.len() as u64);
        assert_eq!(rows.digest(), blake3::hash(bytes));
        Ok(all)
    }

    fn places(bytes: &[u8]) -> Vec<(RowLocation, Value)> {
        let rows = read(bytes).expect("good rows");
        rows.into_iter().map(|row| (row.place, row.fields["a"].clone())).collect()
    }

    #[test]
    fn the_form_is_detected_from_the_content() {
        let lines = [(RowLocation::Line(1), 1.into()), (RowLocation::Line(2), 2.into())];
        assert_eq!(places(b"{\"a\":1}\n{\"a\":2}\n"), lines);
        let array = [(RowLocation::Element(0, 2), 1.into()), (RowLocation::Element(1, 5), 2.into())];
        assert_eq!(places(b"[\n{\"a\":1\n}\n,\n{\"a\":2}]\n"), array);
        assert_eq!(read(b""), Ok(vec![]));
        assert_eq!(read(b" [ ] "), Ok(vec![]));
    }

    #[test]
    fn byte_order_marks_line_endings_and_empty_lines_are_accepted() {
        let rows = places("\u{feff}\r\n{\"a\":1}\r\n\r\n  {\"a\":\"[\\\"]\"}".as_bytes());
        assert_eq!(rows, [(RowLocation::Line(2), 1.into()), (RowLocation::Line(4), "[\"]".into())]);
        assert_eq!(places("\u{feff}[{\"a\":3}]\r\n".as_bytes()), [(RowLocation::Element(0, 1), 3.into())]);
    }

    #[test]
    fn errors_have_a_position() {
        for (bytes, expected) in [
            (&b"PAR1\x15\x04"[..], "F: is a Parquet file, not rows as a JSON array or JSON lines"),
            (b"{\"a\":1}\n\n{\"a\":}\n", "F: line 3: expected value, at column 6 of the row"),
            (b"{\"a\":1}\n[1]\n", "F: line 2: expected an object, found an array"),
            (
                b"{\n\"a\":1\n}",
                "F: line 1: the object does not end on its line (JSON lines hold one object per line; an array begins with `[`)",
            ),
            (b"{\"a\":1} {\"a\":2}\n", "F: line 1: trailing characters, at column 9 of the row"),
            (b"{\"a\":\"\xff\"}\n", "F: line 1: not UTF-8, at byte 6 of the row"),
            (b"[{\"a\":1},\n7]", "F: row [1] (line 2): expected an object"),
            (b"[{\"a\":1}\n{\"a\":1}]", "F: row [1] (line 2): expected `,` or `]` before it"),
            (b"[{\"a\":1},\n{\"a\":", "F: row [1] (line 2): the array does not end: is the file complete?"),
            (b"[{\"a\":1},", "F: the array does not end: is the file complete?"),
            (b"[]\nx", "F: line 2: unexpected data after the end of the array"),
        ] {
            assert_eq!(read(bytes), Err(expected.to_owned()));
        }
    }

    #[test]
    fn hostile_rows_respect_the_limits() {
        let deep = [b"{\"a\":".to_vec(), vec![b'['; 5000]].concat();
        assert!(read(&[&b"["[..], &deep].concat()).is_err());
        let closed = [deep, vec![b']'; 5000], b"}".to_vec()].concat();
        assert!(read(&closed).expect_err("too deep").contains("recursion limit exceeded"));
        let wide = format!("{{\"a\":[{}1]}}", "1,".repeat(MAX_ROW_VALUES));
        let message = read(wide.as_bytes()).expect_err("too many values");
        assert_eq!(message, "F: line 1: the row has more than 262144 values");
        let long = format!("[{{\"a\":\"{}", "x".repeat(MAX_ROW_BYTES + 1));
        let message = read(long.as_bytes()).expect_err("too long");
        assert_eq!(message, "F: row [0] (line 1): the row is longer than 16777216 bytes");
    }
}
