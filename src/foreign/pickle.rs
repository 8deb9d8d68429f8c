//! Reads the few pickles that torch and NumPy write around tensors, and refuses every other.
//!
//! A pickle is a program for a small stack machine, and unrestricted it may call anything. This machine knows the opcodes
//! and the names below and no more: calling one of them builds a plain [`Value`], nothing is imported and nothing runs.
//! The first opcode or name that is not known ends the reading, with its place in the message. What is built is counted
//! ([`MAX_VALUES`]) and nested at most [`MAX_NESTED`] deep; long byte strings stay in the file.
//!
//! Source: <https://docs.python.org/3/library/pickletools.html> describes every opcode.

use std::{collections::HashMap, ops::Range, rc::Rc};

use super::{
    input::{Cursor, Input},
    opcode,
    pickle_value::{Items, Name, Storage, Tensor, Value},
};
use crate::{
    checkpoint::{CheckpointError, Printable},
    tensor::Dtype,
};

/// Values that one pickle may make: those of some sixty thousand tensors.
const MAX_VALUES: usize = 2_000_000;
/// Bytes of text that one pickle may hold, and of one string.
const MAX_TEXT: u64 = 64 << 20;
const MAX_TEXT_BYTES: u64 = 64 << 10;
/// Containers inside containers.
const MAX_NESTED: u8 = 16;

/// What a pickle held: its value, and the storages that it named, by key.
pub(super) struct Unpickled {
    pub(super) value: Value,
    pub(super) storages: HashMap<Rc<str>, Rc<Storage>>,
}

/// Reads a storage that was saved as a byte string of its own.
pub(super) type ReadNested = fn(&Input, Range<u64>) -> Result<Storage, CheckpointError>;

/// Reads one pickle and leaves `cursor` behind it. `read_nested`: what reads byte strings in it that are saved storages, where there may
/// be any.
///
/// # Errors
/// The first thing in it that has no place in saved tensors, and where it stands.
pub(super) fn unpickle(cursor: &mut Cursor<'_>, read_nested: Option<ReadNested>) -> Result<Unpickled, CheckpointError> {
    let mut machine = Machine {
        cursor,
        read_nested,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        storages: HashMap::new(),
        n_values: 0,
        n_text: 0,
        op_at: 0,
    };
    let value = machine.run()?;
    Ok(Unpickled { value, storages: machine.storages })
}

struct Machine<'c, 'i> {
    cursor: &'c mut Cursor<'i>,
    read_nested: Option<ReadNested>,
    stack: Vec<Value>,
    /// Heights of the stack at the marks that are open.
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    storages: HashMap<Rc<str>, Rc<Storage>>,
    n_values: usize,
    n_text: u64,
    /// Where the opcode at hand stands.
    op_at: u64,
}

impl Machine<'_, '_> {
    fn run(&mut self) -> Result<Value, CheckpointError> {
        loop {
            self.op_at = self.cursor.at();
            let op = self.cursor.byte()?;
            if op == opcode::STOP {
                return match (self.stack.pop(), self.stack.is_empty() && self.marks.is_empty()) {
                    (Some(value), true) => Ok(value),
                    _ => Err(self.bad("the pickle ends with more or less than one value")),
                };
            }
            self.step(op)?;
        }
    }

    fn step(&mut self, op: u8) -> Result<(), CheckpointError> {
        match op {
            opcode::PROTO => match self.cursor.byte()? {
                2..=5 => Ok(()),
                other => Err(self.bad(format!("pickle protocol {other}; 2 to 5 are read"))),
            },
            // A frame only says how far to read ahead.
            opcode::FRAME => self.cursor.number::<8>().map(|_| ()),
            opcode::NONE => self.push(Value::None),
            opcode::NEWTRUE => self.push(Value::Bool(true)),
            opcode::NEWFALSE => self.push(Value::Bool(false)),
            opcode::BININT1 => self.read_int::<1>(false),
            opcode::BININT2 => self.read_int::<2>(false),
            opcode::BININT => self.read_int::<4>(true),
            opcode::LONG1 => self.read_long(),
            opcode::SHORT_BINUNICODE => self.read_text::<1>(),
            opcode::BINUNICODE => self.read_text::<4>(),
            opcode::SHORT_BINBYTES => self.read_bytes::<1>(),
            opcode::BINBYTES => self.read_bytes::<4>(),
            opcode::BINBYTES8 => self.read_bytes::<8>(),
            opcode::EMPTY_DICT => self.push(Value::Dict(Items::default())),
            opcode::EMPTY_LIST => self.push(Value::List(Items::default())),
            opcode::EMPTY_TUPLE => self.push_tuple(Vec::new()),
            opcode::MARK => {
                self.count()?;
                self.marks.push(self.stack.len());
                Ok(())
            }
            opcode::TUPLE => {
                let values = self.pop_mark()?;
                self.push_tuple(values)
            }
            opcode::TUPLE1 => self.tuple_of(1),
            opcode::TUPLE2 => self.tuple_of(2),
            opcode::TUPLE3 => self.tuple_of(3),
            opcode::APPEND => {
                let values = self.pop_n(1)?;
                self.extend(false, values)
            }
            opcode::APPENDS => {
                let values = self.pop_mark()?;
                self.extend(false, values)
            }
            opcode::SETITEM => {
                let values = self.pop_n(2)?;
                self.extend(true, values)
            }
            opcode::SETITEMS => {
                let values = self.pop_mark()?;
                self.extend(true, values)
            }
            opcode::BINPUT => self.read_key::<1>().and_then(|key| self.remember(key)),
            opcode::LONG_BINPUT => self.read_key::<4>().and_then(|key| self.remember(key)),
            opcode::MEMOIZE => self.remember(self.memo.len() as u64),
            opcode::BINGET => self.read_key::<1>().and_then(|key| self.recall(key)),
            opcode::LONG_BINGET => self.read_key::<4>().and_then(|key| self.recall(key)),
            opcode::GLOBAL => {
                let (module, name) = (self.cursor.line(1000)?, self.cursor.line(1000)?);
                let name = self.name(&String::from_utf8_lossy(&module), &String::from_utf8_lossy(&name))?;
                self.push(Value::Name(name))
            }
            opcode::STACK_GLOBAL => {
                let parts = self.pop_n(2)?;
                let (Some(module), Some(name)) = (parts[0].as_text(), parts[1].as_text()) else {
                    return Err(self.bad("a name is not made of strings"));
                };
                let name = self.name(module, name)?;
                self.push(Value::Name(name))
            }
            opcode::REDUCE => self.call(),
            opcode::BUILD => self.build(),
            opcode::BINPERSID => self.persistent(),
            other => {
                Err(self.bad(format!("opcode 0x{other:02x} has no place in saved tensors; it is not carried out")))
            }
        }
    }

    fn bad(&self, what: impl AsRef<str>) -> CheckpointError {
        self.cursor.input().bad(self.op_at, what)
    }

    /// Counts a value that takes memory.
    fn count(&mut self) -> Result<(), CheckpointError> {
        self.n_values += 1;
        if self.n_values > MAX_VALUES {
            return Err(self.bad(format!("the pickle makes more than {MAX_VALUES} values")));
        }
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<(), CheckpointError> {
        self.count()?;
        self.stack.push(value);
        Ok(())
    }

    fn push_tuple(&mut self, values: Vec<Value>) -> Result<(), CheckpointError> {
        let mut items = Items::default();
        self.put(&mut items, values)?;
        self.push(Value::Tuple(Rc::new(items)))
    }

    fn tuple_of(&mut self, n: usize) -> Result<(), CheckpointError> {
        let values = self.pop_n(n)?;
        self.push_tuple(values)
    }

    /// Appends to a container and says how deep it is now.
    fn put(&self, items: &mut Items, values: Vec<Value>) -> Result<(), CheckpointError> {
        let deepest = values.iter().map(Value::depth).max().unwrap_or(0);
        items.depth = items.depth.max(deepest + 1);
        if items.depth > MAX_NESTED {
            return Err(self.bad(format!("containers are nested more than {MAX_NESTED} deep")));
        }
        if items.values.is_empty() {
            items.values = values;
        } else {
            items.values.extend(values);
        }
        Ok(())
    }

    /// Lowest height that may be popped to.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop_n(&mut self, n: usize) -> Result<Vec<Value>, CheckpointError> {
        if self.stack.len() < self.floor() + n {
            return Err(self.bad(format!("{n} values are needed, the stack has {}", self.stack.len() - self.floor())));
        }
        Ok(self.stack.split_off(self.stack.len() - n))
    }

    fn pop_mark(&mut self) -> Result<Vec<Value>, CheckpointError> {
        let mark = self.marks.pop().ok_or_else(|| self.bad("no mark is open"))?;
        Ok(self.stack.split_off(mark))
    }

    fn read_int<const N: usize>(&mut self, signed: bool) -> Result<(), CheckpointError> {
        let n = self.cursor.number::<N>()?;
        self.push(Value::Int(if signed { i128::from(n as u32 as i32) } else { i128::from(n) }))
    }

    /// An integer of up to 15 bytes: torch's magic number has ten.
    fn read_long(&mut self) -> Result<(), CheckpointError> {
        let n = self.cursor.byte()?;
        if n > 15 {
            return Err(self.bad(format!("an integer has {n} bytes, at most 15 are read")));
        }
        let le = self.cursor.take(u64::from(n))?;
        let fill = if le.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; 16];
        wide[..le.len()].copy_from_slice(le);
        self.push(Value::Int(i128::from_le_bytes(wide)))
    }

    fn read_text<const N: usize>(&mut self) -> Result<(), CheckpointError> {
        let n = self.cursor.number::<N>()?;
        self.n_text += n;
        if n > MAX_TEXT_BYTES || self.n_text > MAX_TEXT {
            return Err(self.bad(format!(
                "a string of {n} bytes; at most {MAX_TEXT_BYTES} in one and {MAX_TEXT} in all are read"
            )));
        }
        let bytes = self.cursor.take(n)?.to_vec();
        let text = String::from_utf8(bytes).map_err(|_| self.bad("a string is not UTF-8"))?;
        self.push(Value::Text(text.into()))
    }

    fn read_bytes<const N: usize>(&mut self) -> Result<(), CheckpointError> {
        let n = self.cursor.number::<N>()?;
        let range = self.cursor.skip(n)?;
        self.push(Value::Bytes(range))
    }

    fn read_key<const N: usize>(&mut self) -> Result<u64, CheckpointError> {
        self.cursor.number::<N>()
    }

    /// Keeps the topmost value under a number. Containers that still grow are not kept: copies of them would go stale.
    fn remember(&mut self, key: u64) -> Result<(), CheckpointError> {
        self.count()?;
        if self.stack.len() == self.floor() {
            return Err(self.bad("there is no value to remember"));
        }
        let value = match &self.stack[self.stack.len() - 1] {
            Value::List(_) | Value::Dict(_) | Value::Array(_) => Value::Taken,
            value => value.clone(),
        };
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), CheckpointError> {
        match self.memo.get(&key).cloned() {
            None => Err(self.bad(format!("value {key} is used but was never stored"))),
            Some(Value::Taken) => Err(self.bad("a list or dictionary is used twice")),
            Some(value) => self.push(value),
        }
    }

    /// Appends to the list, or the dictionary, that is topmost.
    fn extend(&mut self, is_dict: bool, values: Vec<Value>) -> Result<(), CheckpointError> {
        if is_dict && values.len() % 2 == 1 {
            return Err(self.bad("a key has no value"));
        }
        if self.stack.len() == self.floor() {
            return Err(self.bad("there is no container to extend"));
        }
        let mut top = self.stack.pop().expect("it is not empty");
        match &mut top {
            Value::List(items) if !is_dict => self.put(items, values)?,
            Value::Dict(items) if is_dict => self.put(items, values)?,
            other => return Err(self.bad(format!("{} is extended as a container", other.kind()))),
        }
        self.stack.push(top);
        Ok(())
    }

    /// What a name stands for.
    fn name(&self, module: &str, name: &str) -> Result<Name, CheckpointError> {
        let storage = |dtype| Ok(Name::Storage(dtype));
        match (module, name) {
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Name::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Name::RebuildParameter),
            ("torch.storage", "_load_from_bytes") => Ok(Name::LoadFromBytes),
            ("collections", "OrderedDict") => Ok(Name::OrderedDict),
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Ok(Name::Reconstruct),
            ("numpy", "ndarray") => Ok(Name::NdArray),
            ("numpy", "dtype") => Ok(Name::NumpyDtype),
            ("torch", "DoubleStorage") => storage(Dtype::F64),
            ("torch", "FloatStorage") => storage(Dtype::F32),
            ("torch", "HalfStorage") => storage(Dtype::F16),
            ("torch", "BFloat16Storage") => storage(Dtype::BF16),
            ("torch", "LongStorage") => storage(Dtype::I64),
            ("torch", "IntStorage") => storage(Dtype::I32),
            ("torch", "ShortStorage") => storage(Dtype::I16),
            ("torch", "CharStorage") => storage(Dtype::I8),
            ("torch", "ByteStorage") => storage(Dtype::U8),
            ("torch", "BoolStorage") => storage(Dtype::BOOL),
            _ => Err(self.bad(format!(
                "the pickle asks for `{}.{}`: only tensors are read, nothing else is imported or run",
                Printable(module),
                Printable(name)
            ))),
        }
    }

    fn call(&mut self) -> Result<(), CheckpointError> {
        let parts = self.pop_n(2)?;
        let (Value::Name(name), Some(args)) = (&parts[0], parts[1].as_tuple()) else {
            return Err(self.bad(format!("{} is called", parts[0].kind())));
        };
        let unfit = || self.bad("a call has arguments that no saved tensor has");
        let made = match (name, args) {
            (Name::OrderedDict, []) => Value::Dict(Items::default()),
            (Name::RebuildTensor, [Value::Storage(storage), offset, shape, strides, Value::Bool(_), _hooks, ..])
                if args.len() <= 7 =>
            {
                let offset = offset.as_u64().ok_or_else(unfit)?;
                let (shape, strides) = (shape.as_sizes().ok_or_else(unfit)?, strides.as_sizes().ok_or_else(unfit)?);
                let tensor = Tensor { storage: Rc::clone(storage), offset, shape, strides };
                tensor.check().map_err(|what| self.bad(what))?;
                Value::Tensor(Rc::new(tensor))
            }
            (Name::RebuildParameter, [Value::Tensor(tensor), Value::Bool(_), _hooks]) => {
                Value::Tensor(Rc::clone(tensor))
            }
            (Name::LoadFromBytes, [Value::Bytes(bytes)]) => {
                let read_nested = self.read_nested.ok_or_else(unfit)?;
                Value::Storage(Rc::new(read_nested(self.cursor.input(), bytes.clone())?))
            }
            (Name::Reconstruct, [Value::Name(Name::NdArray), _, Value::Bytes(_)]) => Value::Array(None),
            (Name::NumpyDtype, [Value::Text(kind), Value::Bool(_), Value::Bool(_)])
                if matches!(&**kind, "O8" | "O4" | "O") =>
            {
                Value::ObjectType
            }
            _ => return Err(unfit()),
        };
        self.push(made)
    }

    /// Gives a NumPy type or array its state.
    fn build(&mut self) -> Result<(), CheckpointError> {
        let mut parts = self.pop_n(2)?;
        let state = parts.pop().expect("two were popped");
        // Modules leave notes on their state dictionaries, as attributes (`_metadata`).
        if matches!((&parts[0], &state), (Value::Dict(_), Value::Dict(_))) {
            return self.push(parts.swap_remove(0));
        }
        let unfit = || self.bad("an object gets a state that no array of one dictionary has");
        let state = state.as_tuple().ok_or_else(unfit)?;
        let built = match (&parts[0], state) {
            (Value::ObjectType, _) => Value::ObjectType,
            (Value::Array(None), [_version, shape, Value::ObjectType, Value::Bool(_), Value::List(items)])
                if shape.as_sizes().is_some_and(|shape| shape.iter().all(|&size| size == 1))
                    && items.values.len() == 1 =>
            {
                Value::Array(Some(Rc::new(items.values[0].clone())))
            }
            _ => return Err(unfit()),
        };
        self.push(built)
    }

    /// A reference to a storage whose bytes lie elsewhere: `("storage", type, key, location, elements, ..)`.
    fn persistent(&mut self) -> Result<(), CheckpointError> {
        let id = self.pop_n(1)?;
        let parts = id[0].as_tuple().unwrap_or_default();
        let unfit = || self.bad("a reference that is not to a storage");
        let [Value::Text(word), Value::Name(Name::Storage(dtype)), key, Value::Text(_location), n, ..] = parts else {
            return Err(unfit());
        };
        // What torch wrote before there were zip files has a view behind, always None since there are none.
        if &**word != "storage" || !matches!(&parts[5..], [] | [Value::None]) {
            return Err(unfit());
        }
        let (key, n) = (key.as_text().ok_or_else(unfit)?, n.as_u64().ok_or_else(unfit)?);
        let storage = match self.storages.get(key) {
            Some(known) if known.dtype == *dtype && known.n == n => Rc::clone(known),
            Some(_) => return Err(self.bad(format!("storage \"{}\" has two types or sizes", Printable(key)))),
            None => {
                self.count()?;
                let storage = Rc::new(Storage { dtype: *dtype, key: Rc::clone(key), n, place: None });
                self.storages.insert(Rc::clone(key), Rc::clone(&storage));
                storage
            }
        };
        self.push(Value::Storage(storage))
    }
}

/// Reads a pickle that is the whole of `range`.
///
/// # Errors
/// As [`unpickle`], and bytes behind the pickle.
pub(super) fn unpickle_all(
    input: &Input,
    range: Range<u64>,
    read_nested: Option<ReadNested>,
) -> Result<Unpickled, CheckpointError> {
    let mut cursor = Cursor::new(input, range);
    let found = unpickle(&mut cursor, read_nested)?;
    match cursor.end() - cursor.at() {
        0 => Ok(found),
        n => Err(input.bad(cursor.at(), format!("{n} bytes behind the pickle"))),
    }
}

#[cfg(test)]
#[path = "pickle_tests.rs"]
mod tests;
