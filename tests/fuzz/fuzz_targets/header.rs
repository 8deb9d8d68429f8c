//! The fuzzer writes the JSON, the right length is put in front. Law: whatever we accept, the safetensors crate accepts with
//! the same names, types, shapes and offsets.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::internals::checkpoint::Header;
use safetensors::SafeTensors;

fuzz_target!(|json: &[u8]| {
    // Data of every length up to some, so that files can fit their headers.
    for n_data in [0u64, 1, 2, 4, 8, 16, 64] {
        let Ok(header) = Header::parse(Path::new("f"), json, 8 + json.len() as u64 + n_data) else { continue };
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(json);
        file.resize(file.len() + n_data as usize, 0);
        let (_, theirs) = SafeTensors::read_metadata(&file).expect("what we accept, the crate accepts");
        assert_eq!(theirs.tensors().len(), header.tensors().len());
        for tensor in header.tensors() {
            let info = theirs.info(&tensor.name).expect("the crate has the same names");
            let shape: Vec<u64> = info.shape.iter().map(|&size| size as u64).collect();
            let (begin, end) = info.data_offsets;
            assert_eq!((info.dtype, shape), (tensor.dtype, tensor.shape.clone()));
            assert_eq!(begin as u64..end as u64, tensor.data);
        }
    }
});
