//! Two lines of text: a JSON document, and the BLAKE3 of that document in hexadecimal. So every bit is covered.

use serde::Serialize;

/// The two lines.
///
/// # Panics
/// Where the document is one that JSON cannot hold.
pub(crate) fn to_bytes(document: &impl Serialize) -> Vec<u8> {
    let document = serde_json::to_string(document).expect("strings and numbers serialise");
    format!("{document}\n{}\n", blake3::hash(document.as_bytes()).to_hex()).into_bytes()
}

/// The document; none where a bit of the two lines is not as written.
pub(crate) fn document_of(bytes: &[u8]) -> Option<&str> {
    let (document, rest) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
    (rest == format!("{}\n", blake3::hash(document.as_bytes()).to_hex())).then_some(document)
}
