//! Rows of a file, one at a time: a JSON array or JSON lines, whichever it holds, whatever its name.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{DataError, RowLocation};
use crate::checkpoint::{CheckpointError, Printable, open_regular, recognize_file};

/// Most bytes of one row: a long book; beyond it a missing quote or bracket is the likelier reason.
pub const MAX_ROW_BYTES: usize = 16 << 20;

/// Most values in one row. Parsed, each takes up to 100 bytes, however short it was in the file.
const MAX_ROW_VALUES: usize = 1 << 18;

/// One row, an object.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// Where it stands.
    pub place: RowLocation,
    /// Its fields.
    pub fields: Map<String, Value>,
    /// Its length in the file.
    pub n_bytes: usize,
}

/// Reads the rows of a file in their order.
///
/// A byte order mark, CRLF line ends and empty lines are let through. Memory: one row, at most [`MAX_ROW_BYTES`] of it.
pub struct RowReader {
    path: PathBuf,
    n_bytes: u64,
    bytes: Bytes,
    form: Form,
    n_rows: u64,
    /// The current row's text, kept for its memory.
    text: Vec<u8>,
    is_over: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Lines,
    Array,
}

impl RowReader {
    /// Opens a file, and looks at its first byte that is no space.
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

    /// The next row, or nothing after the last.
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
                let words = error.to_string();
                let words = words.rsplit_once(" at line ").map_or(words.as_str(), |(words, _)| words);
                let what = format!("{}, at column {} of the row", Printable(words), error.column());
                return Err(self.bad(place, what));
            }
        };
        Ok(Some(Row { place, fields, n_bytes: self.text.len() }))
    }

    /// Reads the rest of the file for its digest, and makes nothing of it.
    pub(super) fn drain(&mut self) -> Result<(), DataError> {
        self.is_over = true;
        while self.peek()?.is_some() {
            self.bytes.at = self.bytes.end;
        }
        Ok(())
    }

    /// Bytes of the file when it was opened.
    pub(super) fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Bytes read so far.
    pub fn n_bytes_read(&self) -> u64 {
        self.bytes.n_read
    }

    /// The BLAKE3 of the file, as `b3sum` prints it; known after the last row.
    pub fn digest(&self) -> blake3::Hash {
        self.bytes.hasher.finalize()
    }

    /// Puts the next line that is not empty into `text`.
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

    /// Puts the next element of the array into `text`; after the last one, nothing but space may follow.
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
                        let what = format!("line {}: more follows after the array's end", self.bytes.line);
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
            return Err(self.bad(place, format!("longer than the {MAX_ROW_BYTES} bytes that a row may have")));
        }
        if scan.n_values > MAX_ROW_VALUES {
            return Err(self.bad(place, format!("more than the {MAX_ROW_VALUES} values that a row may have")));
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

    /// The next byte that is no space, left where it is.
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

/// Where a scan stands within JSON, without judging it: serde_json does.
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

/// A file's bytes one by one, hashed and counted as they come.
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

/// What a JSON value is, in words.
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
        let words = |e: DataError| e.to_string().replace(&*path.to_string_lossy(), "F");
        let mut rows = RowReader::open(&path).map_err(words)?;
        let mut all = Vec::new();
        while let Some(row) = rows.next_row().map_err(words)? {
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
    fn the_form_is_seen_in_the_content() {
        let lines = [(RowLocation::Line(1), 1.into()), (RowLocation::Line(2), 2.into())];
        assert_eq!(places(b"{\"a\":1}\n{\"a\":2}\n"), lines);
        let array = [(RowLocation::Element(0, 2), 1.into()), (RowLocation::Element(1, 5), 2.into())];
        assert_eq!(places(b"[\n{\"a\":1\n}\n,\n{\"a\":2}]\n"), array);
        assert_eq!(read(b""), Ok(vec![]));
        assert_eq!(read(b" [ ] "), Ok(vec![]));
    }

    #[test]
    fn byte_order_marks_line_ends_and_empty_lines_are_let_through() {
        let rows = places("\u{feff}\r\n{\"a\":1}\r\n\r\n  {\"a\":\"[\\\"]\"}".as_bytes());
        assert_eq!(rows, [(RowLocation::Line(2), 1.into()), (RowLocation::Line(4), "[\"]".into())]);
        assert_eq!(places("\u{feff}[{\"a\":3}]\r\n".as_bytes()), [(RowLocation::Element(0, 1), 3.into())]);
    }

    #[test]
    fn what_is_wrong_is_placed() {
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
            (b"[]\nx", "F: line 2: more follows after the array's end"),
        ] {
            assert_eq!(read(bytes), Err(expected.to_owned()));
        }
    }

    #[test]
    fn hostile_rows_cost_no_more_than_they_may() {
        let deep = [b"{\"a\":".to_vec(), vec![b'['; 5000]].concat();
        assert!(read(&[&b"["[..], &deep].concat()).is_err());
        let closed = [deep, vec![b']'; 5000], b"}".to_vec()].concat();
        assert!(read(&closed).expect_err("too deep").contains("recursion limit exceeded"));
        let wide = format!("{{\"a\":[{}1]}}", "1,".repeat(MAX_ROW_VALUES));
        let words = read(wide.as_bytes()).expect_err("too many values");
        assert_eq!(words, "F: line 1: more than the 262144 values that a row may have");
        let long = format!("[{{\"a\":\"{}", "x".repeat(MAX_ROW_BYTES + 1));
        let words = read(long.as_bytes()).expect_err("too long");
        assert_eq!(words, "F: row [0] (line 1): longer than the 16777216 bytes that a row may have");
    }
}
