//! Writes the pickles that torch and NumPy read back as dictionaries of tensors.

use crate::tensor::Dtype;

/// A pickle on its way. Protocol 4 where bytes may be longer than 4 GiB, else 2.
pub(super) struct PickleWriter {
    pub(super) bytes: Vec<u8>,
}

/// torch's name for a storage of these elements.
pub(super) fn storage_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F64 => "DoubleStorage",
        Dtype::F32 => "FloatStorage",
        Dtype::F16 => "HalfStorage",
        Dtype::BF16 => "BFloat16Storage",
        Dtype::I64 => "LongStorage",
        other => unreachable!("no storage of {other:?} is written"),
    }
}

impl PickleWriter {
    pub(super) fn new(protocol: u8) -> Self {
        Self { bytes: vec![0x80, protocol] }
    }

    /// Appends opcodes without arguments.
    pub(super) fn ops(&mut self, ops: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(ops);
        self
    }

    /// Appends a name.
    pub(super) fn name(&mut self, module: &str, name: &str) -> &mut Self {
        self.bytes.extend(format!("c{module}\n{name}\n").bytes());
        self
    }

    /// Appends a string.
    pub(super) fn text(&mut self, text: &str) -> &mut Self {
        self.bytes.push(b'X');
        self.bytes.extend((text.len() as u32).to_le_bytes());
        self.bytes.extend(text.bytes());
        self
    }

    /// Appends an integer.
    pub(super) fn int(&mut self, n: u64) -> &mut Self {
        if let Ok(small) = i32::try_from(n) {
            self.bytes.push(b'J');
            self.bytes.extend(small.to_le_bytes());
        } else {
            // Nine bytes: the highest is the sign.
            self.bytes.extend([0x8a, 9]);
            self.bytes.extend(n.to_le_bytes());
            self.bytes.push(0);
        }
        self
    }

    /// Appends a reference to the storage `key` of `n` elements; `end` is what the tuple ends with.
    pub(super) fn storage(&mut self, dtype: Dtype, key: &str, n: u64, end: &[u8]) -> &mut Self {
        self.ops(b"(")
            .text("storage")
            .name("torch", storage_name(dtype))
            .text(key)
            .text("cpu")
            .int(n)
            .ops(end)
            .ops(b"tQ")
    }

    /// Appends what follows the storage in a call that makes a contiguous tensor of it, and the call.
    pub(super) fn rest_of_tensor(&mut self, shape: &[u64]) -> &mut Self {
        self.int(0).ops(b"(");
        shape.iter().for_each(|&size| {
            self.int(size);
        });
        self.ops(b"t(");
        for i in 0..shape.len() {
            self.int(shape[i + 1..].iter().product());
        }
        self.ops(b"t\x89").name("collections", "OrderedDict").ops(b")RtR")
    }
}

/// What stands before the elements of a storage that is saved by itself, as NumPy's pickles of tensors hold it.
pub(super) fn nested_storage_head(dtype: Dtype, n: u64) -> Vec<u8> {
    let mut magic = PickleWriter::new(2);
    magic.ops(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.");
    let mut protocol = PickleWriter::new(2);
    protocol.int(1001).ops(b".");
    let mut machine = PickleWriter::new(2);
    machine.ops(b"}(").text("protocol_version").int(1001).text("little_endian").ops(b"\x88");
    machine.text("type_sizes").ops(b"}(").text("short").int(2).text("int").int(4).text("long").int(4).ops(b"uu.");
    let mut storage = PickleWriter::new(2);
    storage.storage(dtype, "0", n, b"N").ops(b".");
    let mut keys = PickleWriter::new(2);
    keys.ops(b"]").text("0").ops(b"a.");
    let mut head = [magic, protocol, machine, storage, keys].map(|pickle| pickle.bytes).concat();
    head.extend(n.to_le_bytes());
    head
}
