//! NumPy's files of one array: a header that is a Python literal, then the elements.
//!
//! Source: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use std::ops::Range;

use super::input::{Cursor, Input};
use crate::{
    checkpoint::{CheckpointError, Printable},
    tensor::Dtype,
};

const MAGIC: &[u8] = b"\x93NUMPY";
/// NumPy itself refuses longer headers of files it does not trust.
const MAX_HEADER: u64 = 10_000;

/// What the header of an array says.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Header {
    /// The element type; none where it is an object or one that is not known here.
    pub(crate) dtype: Option<Dtype>,
    /// Whether the elements are pickled objects.
    pub(crate) is_object: bool,
    pub(crate) shape: Vec<u64>,
    /// Where the elements begin.
    pub(crate) data_start: u64,
}

impl Header {
    /// Reads the header at the beginning of `range`.
    ///
    /// # Errors
    /// A file that is no array of NumPy, one in Fortran order, or more or fewer bytes than the shape needs.
    pub(crate) fn read(input: &Input, range: Range<u64>) -> Result<Self, CheckpointError> {
        let (start, end) = (range.start, range.end);
        let mut cursor = Cursor::new(input, range);
        if end - start < 10 || cursor.take(6)? != MAGIC {
            return Err(input.bad(start, "not an array of NumPy (.npy)"));
        }
        let (major, _minor) = (cursor.byte()?, cursor.byte()?);
        let n = match major {
            1 => cursor.number::<2>()?,
            2 | 3 => cursor.number::<4>()?,
            _ => {
                let what = format!("version {major} of the format; 1 to 3 are read");
                return Err(input.bad(start + 6, what));
            }
        };
        if n > MAX_HEADER {
            return Err(input.bad(start + 8, format!("the header has {n} bytes, at most {MAX_HEADER} are read")));
        }
        let text_at = cursor.at();
        let text = String::from_utf8_lossy(cursor.take(n)?).into_owned();
        let bad = |what: String| input.bad(text_at, what);
        let literal = Literal::parse(&text)
            .ok_or_else(|| bad(format!("the header is malformed: {}", Printable(text.trim_end()))))?;
        let Literal { descr, fortran_order, shape } = literal;
        if fortran_order && shape.len() > 1 {
            return Err(bad("the array is in Fortran order".to_owned()));
        }
        let is_object = descr.trim_start_matches('|') == "O";
        let header = Self { dtype: dtype_of(&descr), is_object, shape, data_start: cursor.at() };
        if let Some(dtype) = header.dtype {
            let n = header.shape.iter().try_fold(1u64, |n, &size| n.checked_mul(size));
            let needed = n.and_then(|n| crate::tensor::checked_bytes(dtype, n));
            let found = end - cursor.at();
            if needed != Some(found) {
                let shape = &header.shape;
                return Err(bad(format!("shape {shape:?} of {descr} does not take the {found} bytes that are there")));
            }
        }
        Ok(header)
    }

    /// The bytes of a header, padded as NumPy does it.
    pub(crate) fn write(descr: &str, shape: &[u64]) -> Vec<u8> {
        let sizes = match shape {
            [] => String::new(),
            [n] => format!("{n},"),
            _ => shape.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
        };
        let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({sizes}), }}").into_bytes();
        let padded = (MAGIC.len() + 4 + text.len() + 1).next_multiple_of(64);
        text.resize(padded - MAGIC.len() - 4 - 1, b' ');
        text.push(b'\n');
        [MAGIC, &[1, 0], &(text.len() as u16).to_le_bytes(), &text].concat()
    }
}

/// The type that NumPy spells so, little-endian.
fn dtype_of(descr: &str) -> Option<Dtype> {
    Some(match descr {
        "<f8" => Dtype::F64,
        "<f4" => Dtype::F32,
        "<f2" => Dtype::F16,
        "<i8" => Dtype::I64,
        "<i4" => Dtype::I32,
        "<u8" => Dtype::U64,
        "<u4" => Dtype::U32,
        "<u2" => Dtype::U16,
        _ => return None,
    })
}

/// The three fields of the dictionary in a header.
struct Literal {
    descr: String,
    fortran_order: bool,
    shape: Vec<u64>,
}

impl Literal {
    fn parse(text: &str) -> Option<Self> {
        let inside = text.trim().strip_prefix('{')?.strip_suffix('}')?;
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        let mut rest = inside.trim_start();
        while !rest.is_empty() {
            let (key, value) = quoted(rest)?;
            let value = value.trim_start().strip_prefix(':')?.trim_start();
            rest = match key {
                "descr" if descr.is_none() => {
                    let (text, rest) = quoted(value)?;
                    descr = Some(text.to_owned());
                    rest
                }
                "fortran_order" if fortran_order.is_none() => {
                    let (is_fortran, rest) = match value.strip_prefix("True") {
                        Some(rest) => (true, rest),
                        None => (false, value.strip_prefix("False")?),
                    };
                    fortran_order = Some(is_fortran);
                    rest
                }
                "shape" if shape.is_none() => {
                    let (sizes, rest) = value.strip_prefix('(')?.split_once(')')?;
                    let sizes = sizes.split(',').map(str::trim).filter(|size| !size.is_empty());
                    shape = Some(sizes.map(|size| size.parse().ok()).collect::<Option<Vec<u64>>>()?);
                    rest
                }
                _ => return None,
            };
            rest = rest.trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
        }
        Some(Self { descr: descr?, fortran_order: fortran_order?, shape: shape? })
    }
}

/// A string in quotes, and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
    text[1..].split_once(quote)
}

#[cfg(test)]
mod tests {
    use super::{super::input::test_input, *};

    fn read(bytes: Vec<u8>) -> Result<Header, String> {
        let (_dir, input) = test_input(&bytes);
        Header::read(&input, 0..bytes.len() as u64).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_written_is_read() {
        for (descr, shape, n, dtype) in [("<f4", vec![3], 12, Dtype::F32), ("<i8", vec![2, 2], 32, Dtype::I64)] {
            let mut bytes = Header::write(descr, &shape);
            assert_eq!(bytes.len() % 64, 0);
            let data_start = bytes.len() as u64;
            bytes.resize(bytes.len() + n, 0);
            assert_eq!(read(bytes.clone()), Ok(Header { dtype: Some(dtype), is_object: false, shape, data_start }));
            bytes.pop();
            assert!(read(bytes).unwrap_err().contains("does not take"), "{descr}");
        }
    }

    #[test]
    fn what_is_no_header_is_told() {
        let with = |text: &str| {
            let mut bytes = Header::write("<f4", &[0]);
            bytes.truncate(10);
            bytes[8..10].copy_from_slice(&(text.len() as u16).to_le_bytes());
            bytes.extend(text.as_bytes());
            read(bytes)
        };
        assert!(read(b"PK".to_vec()).unwrap_err().ends_with("not an array of NumPy (.npy)"));
        for text in [
            "{'descr': '<f4', 'fortran_order': False}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1, ), 'more': 1}",
            "{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
            "__import__('os')",
        ] {
            assert!(with(text).unwrap_err().contains("malformed"), "{text}");
        }
        let fortran = "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2)}";
        assert!(with(fortran).unwrap_err().ends_with("the array is in Fortran order"));
        let huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999, 99999999999999999)}";
        assert!(with(huge).unwrap_err().contains("does not take"));
    }
}
