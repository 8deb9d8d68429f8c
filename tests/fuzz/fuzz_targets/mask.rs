//! A mask of one target: the fuzzer writes the document and the data, the header around them is right.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::{Context, MaskFile};

fuzz_target!(|input: common::Input| {
    let ctx = Context::default();
    if let Ok(file) = MaskFile::open(&common::write(input)) {
        for target in file.targets() {
            let n_rows = target.layout.n_rows().min(64);
            if let Ok(columns) = file.read_columns(&ctx, target, 0..n_rows) {
                common::check(&columns, target.layout.d_in);
            }
        }
    }
});
