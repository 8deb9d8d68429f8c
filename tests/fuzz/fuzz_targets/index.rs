//! Whatever index is accepted names plain files only.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::internals::checkpoint::Index;

fuzz_target!(|json: &[u8]| {
    if let Ok(index) = Index::parse(Path::new("model.safetensors.index.json"), json) {
        for name in index.shard_names() {
            assert!(!name.contains(['/', '\\', '\0']) && name != ".." && name != "." && !name.is_empty());
        }
    }
});
