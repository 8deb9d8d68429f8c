//! What the pickles of saved tensors are made of.

use std::{ops::Range, rc::Rc};

use crate::tensor::Dtype;

/// What a pickle may be made of.
#[derive(Clone, Debug)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i128),
    Text(Rc<str>),
    /// Where the bytes lie in the file.
    Bytes(Range<u64>),
    Tuple(Rc<Items>),
    List(Items),
    /// Keys and values by turns.
    Dict(Items),
    Name(Name),
    Storage(Rc<Storage>),
    Tensor(Rc<Tensor>),
    /// NumPy's array of one object before and after it got the object.
    Array(Option<Rc<Value>>),
    /// NumPy's type of arrays of objects.
    ObjectType,
    /// A list or dictionary that is to be used a second time, which no file of ours does.
    Taken,
}

/// Values in a container, and how deep they are nested.
#[derive(Clone, Debug, Default)]
pub(super) struct Items {
    pub(super) values: Vec<Value>,
    pub(super) depth: u8,
}

/// The only names that may be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Name {
    RebuildTensor,
    RebuildParameter,
    LoadFromBytes,
    OrderedDict,
    Reconstruct,
    NdArray,
    NumpyDtype,
    Storage(Dtype),
}

/// The memory that tensors are views of.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    pub(super) dtype: Dtype,
    pub(super) key: Rc<str>,
    /// Elements.
    pub(super) n: u64,
    /// Where its bytes lie in the file, where the pickle itself holds them.
    pub(super) place: Option<Range<u64>>,
}

/// A view of a storage; all of it lies inside.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) storage: Rc<Storage>,
    /// Elements before the first.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    /// Elements from one to the next, by dimension.
    pub(super) strides: Vec<u64>,
}

impl Value {
    /// How deep containers are nested in it.
    pub(super) fn depth(&self) -> u8 {
        match self {
            Self::Tuple(items) => items.depth,
            Self::List(items) | Self::Dict(items) => items.depth,
            Self::Array(Some(value)) => value.depth(),
            _ => 0,
        }
    }

    /// A number that is not negative.
    pub(super) fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }
    pub(super) fn as_text(&self) -> Option<&Rc<str>> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
    /// The values of a tuple.
    pub(super) fn as_tuple(&self) -> Option<&[Value]> {
        match self {
            Self::Tuple(items) => Some(&items.values),
            _ => None,
        }
    }
    /// A tuple of numbers that are not negative.
    pub(super) fn as_sizes(&self) -> Option<Vec<u64>> {
        self.as_tuple()?.iter().map(Self::as_u64).collect()
    }

    /// What kind of value it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "a truth value",
            Self::Int(_) => "a number",
            Self::Text(_) => "a string",
            Self::Bytes(_) => "bytes",
            Self::Tuple(_) => "a tuple",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Name(_) | Self::ObjectType => "a type",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
            Self::Array(_) => "an array",
            Self::Taken => "a container",
        }
    }
}

impl Tensor {
    /// Whether all elements lie inside the storage.
    pub(super) fn check(&self) -> Result<(), String> {
        let outside = || {
            let (shape, strides, n) = (&self.shape, &self.strides, self.storage.n);
            format!("a tensor of shape {shape:?}, strides {strides:?}, reaches past its storage of {n} elements")
        };
        if self.shape.len() != self.strides.len() || self.shape.len() > 8 {
            return Err("a tensor has no sizes and strides that belong together".to_owned());
        }
        if self.shape.contains(&0) {
            return Ok(());
        }
        let mut last = self.offset;
        for (size, stride) in self.shape.iter().zip(&self.strides) {
            let along = (size - 1).checked_mul(*stride).ok_or_else(outside)?;
            last = last.checked_add(along).ok_or_else(outside)?;
        }
        if last < self.storage.n { Ok(()) } else { Err(outside()) }
    }
}
