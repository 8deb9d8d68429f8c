//! The two pickles of the published code: the fuzzer writes the pickle, the frames of NumPy and of the zip file around it are right.
#![no_main]

use std::{cell::RefCell, fs, path::PathBuf};

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::{Context, internals::foreign::ForeignAdapter};

thread_local! {
    static FOLDER: RefCell<Option<(tempfile::TempDir, PathBuf)>> = const { RefCell::new(None) };
}

/// What `numpy.save` writes before a pickled object.
const NPY: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (), }                                                               \n";

fn folder() -> PathBuf {
    FOLDER.with_borrow_mut(|folder| {
        let (_, path) = folder.get_or_insert_with(|| {
            let memory = std::path::Path::new("/dev/shm");
            let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            let folder = folder.expect("a temporary folder can be made");
            let path = folder.path().to_owned();
            fs::create_dir(path.join("tunable_para")).expect("it can be made");
            (folder, path)
        });
        path.clone()
    })
}

/// A zip file of one stored entry.
fn zip(name: &str, bytes: &[u8]) -> Vec<u8> {
    let (crc, n) = (crc32(bytes).to_le_bytes(), (bytes.len() as u32).to_le_bytes());
    let common = [&[20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0][..], &crc, &n, &n, &(name.len() as u16).to_le_bytes(), &[0, 0]].concat();
    let local = [b"PK\x03\x04", &common[..], name.as_bytes(), bytes].concat();
    let central = [b"PK\x01\x02\x14\x00", &common[..], &[0; 14], name.as_bytes()].concat();
    let (size, at) = ((central.len() as u32).to_le_bytes(), (local.len() as u32).to_le_bytes());
    let end = [b"PK\x05\x06", &[0, 0, 0, 0, 1, 0, 1, 0][..], &size, &at, &[0, 0]].concat();
    [local, central, end].concat()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

fuzz_target!(|input: (&[u8], &[u8])| {
    let (positions, values) = input;
    let folder = folder();
    fs::write(folder.join("positions.npy"), [NPY, positions].concat()).expect("it can be written");
    let values = zip("state_dict_tunable/data.pkl", values);
    fs::write(folder.join("tunable_para/state_dict_tunable.pt"), values).expect("it can be written");
    let _refused = ForeignAdapter::open(&Context::default(), &folder);
});
