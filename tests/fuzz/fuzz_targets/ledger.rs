//! The ledger's document: the fuzzer writes it, the right checksum is put beside it.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::internals::merge::LedgerDocument;

fuzz_target!(|document: (String, String)| {
    let (text, checksum) = document;
    let metadata = |checksum: String| {
        BTreeMap::from([("neuroada".to_owned(), text.clone()), ("neuroada.blake3".to_owned(), checksum)])
    };
    assert!(LedgerDocument::parse(&metadata(checksum)).is_err(), "a checksum is not guessed");
    let right = LedgerDocument::checksum(&text);
    if let Ok(ledger) = LedgerDocument::parse(&metadata(right)) {
        let _elements = (ledger.n_touched(), ledger.needs_base());
    }
});
