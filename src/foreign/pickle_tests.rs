//! The restricted unpickler: what it refuses, and where.

use super::{super::input::test_input, *};
use crate::tensor::Dtype;

fn read(pickle: &[u8]) -> Result<Value, String> {
    let (_dir, input) = test_input(pickle);
    let found = unpickle_all(&input, 0..pickle.len() as u64, Some(|input, at| Err(input.bad(at.start, "no storage"))));
    // The folder's name is another in every run.
    found.map(|found| found.value).map_err(|e| e.to_string().split_once("/f: ").unwrap().1.to_owned())
}

#[test]
fn nothing_is_run() {
    for (pickle, refusal) in [
        // os.system("id"), as protocol 0 and protocol 4 write it.
        (&b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R."[..], "at byte 2: the pickle asks for `os.system`"),
        (b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", "at byte 19: the pickle asks for `posix.system`"),
        (b"\x80\x02cbuiltins\neval\n.", "at byte 2: the pickle asks for `builtins.eval`"),
        (b"\x80\x02cnumpy\nfromfile\n.", "at byte 2: the pickle asks for `numpy.fromfile`"),
        (b"\x80\x02ctorch\nload\n.", "at byte 2: the pickle asks for `torch.load`"),
    ] {
        let said = read(pickle).unwrap_err();
        assert!(said.starts_with(refusal) && said.ends_with("nothing else is imported or run"), "{said}");
    }
    // INST, OBJ, NEWOBJ, EXT1, GET by text, POP, DUP, INT by text, PERSID by text, BYTEARRAY8, NEXT_BUFFER.
    for op in *b"io\x81\x82g02IP\x96\x97" {
        let said = read(&[0x80, 2, op, 0]).unwrap_err();
        assert!(said.starts_with(&format!("at byte 2: opcode 0x{op:02x} has no place")), "{said}");
    }
    // Names that are known cannot be called with other arguments, nor can values be called.
    for pickle in [
        &b"\x80\x02ctorch.storage\n_load_from_bytes\nX\x01\0\0\0a\x85R."[..],
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02K\x01}b.",
    ] {
        assert!(read(pickle).is_err());
    }
}

#[test]
fn plain_values_are_read() {
    let Value::Dict(items) = read(b"\x80\x02}q\0(X\x01\0\0\0aq\x01K\x05X\x01\0\0\0bh\x01u.").unwrap() else {
        panic!("a dictionary was written")
    };
    assert_eq!(items.values[1].as_u64(), Some(5));
    assert_eq!(items.values[3].as_text().unwrap().as_ref(), "a");
    assert!(matches!(read(b"\x80\x02J\xfe\xff\xff\xff."), Ok(Value::Int(-2))));
    assert!(
        matches!(read(b"\x80\x02\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\0."), Ok(Value::Int(n)) if n == u64::MAX.into())
    );
    assert!(matches!(read(b"\x80\x02\x8a\0."), Ok(Value::Int(0))));
    assert!(matches!(read(b"\x80\x05\x8a\x01\xff."), Ok(Value::Int(-1))));
}

#[test]
fn malformed_pickles_are_told_where() {
    for (pickle, refusal) in [
        (&b""[..], "at byte 0: 1 bytes are needed"),
        (b"\x80\x02K\x01", "at byte 4: 1 bytes are needed"),
        (b"\x80\x02.", "at byte 2: the pickle ends with more or less than one value"),
        (b"\x80\x02K\x01K\x02.", "at byte 6: the pickle ends with more or less"),
        (b"\x80\x02K\x01.x", "at byte 5: 1 bytes behind the pickle"),
        (b"\x80\x01N.", "at byte 0: pickle protocol 1"),
        (b"\x80\x02\x85.", "at byte 2: 1 values are needed, the stack has 0"),
        (b"\x80\x02(K\x01(\x85.", "at byte 6: 1 values are needed, the stack has 0"),
        (b"\x80\x02t.", "at byte 2: no mark is open"),
        (b"\x80\x02h\x07.", "at byte 2: value 7 is used but was never stored"),
        (b"\x80\x02q\0.", "at byte 2: there is no value to remember"),
        (b"\x80\x02}(K\x01u.", "at byte 6: a key has no value"),
        (b"\x80\x02N(K\x01K\x02u.", "at byte 8: None is extended as a container"),
        (b"\x80\x02}q\0h\0.", "at byte 5: a list or dictionary is used twice"),
        (b"\x80\x02\x8c\x01\xff.", "at byte 2: a string is not UTF-8"),
        (b"\x80\x02X\xff\xff\xff\xff.", "at byte 2: a string of 4294967295 bytes"),
        (b"\x80\x02B\xff\xff\xff\x7f.", "at byte 7: 2147483647 bytes are needed, 1 are left"),
        (b"\x80\x02\x8a\xff.", "at byte 2: an integer has 255 bytes"),
        (b"\x80\x02K\x01Q.", "at byte 4: a reference that is not to a storage"),
    ] {
        let said = read(pickle).unwrap_err();
        assert!(said.starts_with(refusal), "{pickle:?}: {said}");
    }
}

#[test]
fn small_pickles_make_small_values() {
    // A tuple of two of the tuple before, again and again: 2^n values to whoever copies.
    let mut doubling = b"\x80\x02)q\0".to_vec();
    for _ in 0..40 {
        doubling.extend(b"h\0\x86q\0");
    }
    assert!(read(&doubling).is_err());
    let mut doubling = b"\x80\x02)q\0".to_vec();
    for _ in 0..10 {
        doubling.extend(b"h\0h\0\x86q\0");
    }
    doubling.extend(b"h\0\x85.");
    assert!(read(&doubling).unwrap_err().contains("ends with more or less"));

    let mut deep = b"\x80\x02)".to_vec();
    deep.extend([0x85; 100_000]);
    assert!(read(&deep).unwrap_err().contains("nested more than 16 deep"));

    let mut many = b"\x80\x02".to_vec();
    many.resize(3_000_000, b')');
    assert!(read(&many).unwrap_err().contains("makes more than 2000000 values"));

    let mut marks = b"\x80\x02".to_vec();
    marks.resize(3_000_000, b'(');
    assert!(read(&marks).unwrap_err().contains("makes more than 2000000 values"));
}

#[test]
fn tensors_lie_inside_their_storages() {
    let tensor = |offset: u64, shape: &[u64], strides: &[u64]| {
        let storage = Storage { dtype: Dtype::F32, key: "0".into(), n: 10, place: None };
        Tensor { storage: Rc::new(storage), offset, shape: shape.to_vec(), strides: strides.to_vec() }.check()
    };
    assert_eq!(tensor(0, &[10], &[1]), Ok(()));
    assert_eq!(tensor(0, &[5, 2], &[1, 5]), Ok(()));
    assert_eq!(tensor(9, &[0], &[100]), Ok(()));
    assert!(tensor(1, &[10], &[1]).is_err());
    assert!(tensor(0, &[2], &[u64::MAX]).is_err());
    assert!(tensor(u64::MAX, &[2], &[1]).is_err());
    assert!(tensor(0, &[u64::MAX, u64::MAX], &[u64::MAX, u64::MAX]).is_err());
    assert!(tensor(0, &[2], &[]).is_err());
}
