//! The journal: bytes as they come, and a document with the right checksum behind it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::internals::merge::{Journal, LedgerDocument};

fuzz_target!(|bytes: &[u8]| {
    let _as_it_is = Journal::parse(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _checked = Journal::parse(format!("{text}\n{}\n", LedgerDocument::checksum(text)).as_bytes());
    }
});
