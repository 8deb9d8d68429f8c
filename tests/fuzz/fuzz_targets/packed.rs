//! A packed adapter: the fuzzer writes its document, the adapter's own header, the index and the codes.
#![no_main]

mod common;

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::{Adapter, Context, Dtype, Existing, internals::checkpoint::TensorFileWriter};

fuzz_target!(|input: (String, String, Vec<u8>, Vec<u8>)| {
    let (document, header, index, blocks) = input;
    let (path, ctx) = (common::path(), Context::default());
    let mut writer = TensorFileWriter::create(&path, Existing::Replace).expect("it can be written");
    let kept = |bytes: &[u8]| [&[0][..], &(bytes.len() as u32).to_le_bytes(), bytes].concat();
    for (name, bytes) in [("header", kept(header.as_bytes())), ("index", kept(&index)), ("blocks", blocks)] {
        let id = writer.add_tensor(name.to_owned(), Dtype::U8);
        writer.append(id, &bytes).expect("it can be written");
        writer.finish_tensor(id, vec![bytes.len() as u64]);
    }
    let metadata = BTreeMap::from([("neuroada".to_owned(), document)]);
    writer.finish(&ctx, &metadata).expect("it can be written");
    if let Ok(file) = Adapter::open(&path) {
        for target in file.targets() {
            let n_rows = target.layout.n_rows().min(64);
            if let Ok(rows) = file.read_rows(&ctx, target, 0..n_rows) {
                assert!(rows.values.iter().all(|value| value.is_finite()));
                common::check(&rows.columns, target.layout.d_in);
            }
        }
    }
});
