//! An adapter of one target: the fuzzer writes the document and the data, the header around them is right.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::{Adapter, Context};

fuzz_target!(|input: common::Input| {
    let ctx = Context::default();
    if let Ok(file) = Adapter::open(&common::write(input)) {
        for target in file.targets() {
            let n_rows = target.layout.n_rows().min(64);
            if let Ok(rows) = file.read_rows(&ctx, target, 0..n_rows) {
                assert!(rows.values.iter().all(|value| value.is_finite()));
                common::check(&rows.columns, target.layout.d_in);
            }
        }
    }
});
