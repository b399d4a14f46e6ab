//! A pickle interpreter that knows what PyTorch state dicts are made of, and nothing else.
//!
//! A pickle is a program that may call anything by name. This interpreter has no way to call: the few names a state dict needs are
//! built in, every other name, call or instruction is refused at its offset. Lists, dicts, tensors and storages live in arenas and are
//! referred to by index, so that shared or self-containing objects cost nothing and nothing recurses; memory is bounded by a
//! constant factor of the pickle's length, which the caller bounds.

use super::element::Dtype;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::path::Path;

/// Longest pickle interpreted. A state dict takes about 150 bytes a tensor.
pub(super) const MAX_PICKLE: usize = 4 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// The number that opens PyTorch's format before 1.6, as its ten little-endian bytes.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const REMEDY: &str = "take the model as model.safetensors, or convert it to that on a machine where it may run";

/// A value; containers, strings, tensors and storages are indices into [`Loaded`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float,
    LegacyMagic,
    Str(u32),
    /// A tuple or a list.
    Seq(u32),
    Dict(u32),
    Global(Global),
    Storage(u32),
    Tensor(u32),
}

/// The names a state dict may mention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    StorageType(Dtype),
}

/// A piece of memory that tensors look into.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage {
    pub key: String,
    pub dtype: Dtype,
    /// Elements.
    pub length: u64,
}

/// A view of a storage; offset and strides in elements. Checked to lie inside the storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub storage: u32,
    pub offset: u64,
    pub shape: Vec<usize>,
    pub stride: Vec<u64>,
}

/// The result: the top-level value and everything it refers to.
#[derive(Debug)]
pub(super) struct Loaded {
    pub root: Value,
    /// Bytes the pickle took, up to and including its STOP.
    pub consumed: usize,
    pub strings: Vec<String>,
    pub seqs: Vec<Vec<Value>>,
    pub dicts: Vec<Vec<(Value, Value)>>,
    pub storages: Vec<Storage>,
    pub tensors: Vec<Tensor>,
}

impl Loaded {
    /// The text of a string value.
    pub fn text(&self, value: Value) -> Option<&str> {
        match value {
            Value::Str(i) => self.strings.get(i as usize).map(String::as_str),
            _ => None,
        }
    }
}

/// Interprets the pickle at the start of `bytes`; `base` is its offset in the file, for messages.
pub(super) fn load(bytes: &[u8], path: &Path, base: u64) -> Result<Loaded> {
    let mut machine = Machine {
        bytes: &bytes[..bytes.len().min(MAX_PICKLE)],
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        by_key: HashMap::new(),
        out: Loaded {
            root: Value::None,
            consumed: 0,
            strings: Vec::new(),
            seqs: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        },
    };
    loop {
        let start = machine.at;
        match machine.step() {
            Ok(false) => {}
            Ok(true) => break,
            Err(cause) => {
                return Err(Error::refused(cause).path(path).offset(base + start as u64).remedy(REMEDY));
            }
        }
    }
    machine.out.consumed = machine.at;
    Ok(machine.out)
}

/// A refusal: what was found.
type Step<T> = std::result::Result<T, String>;

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Stack heights.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    /// Index of every storage.
    by_key: HashMap<String, u32>,
    out: Loaded,
}

impl Machine<'_> {
    /// Runs one instruction; `true` after STOP.
    fn step(&mut self) -> Step<bool> {
        let opcode = self.byte()?;
        match opcode {
            b'.' => {
                self.out.root = self.pop()?;
                return Ok(true);
            }
            0x80 => {
                let protocol = self.byte()?;
                if !(2..=5).contains(&protocol) {
                    return Err(format!("pickle protocol {protocol} is unknown"));
                }
            }
            0x95 => drop(self.take(8)?), // FRAME: a hint about lengths
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(value.into()));
            }
            b'K' => {
                let value = self.byte()?;
                self.stack.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(value.into()));
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Float);
            }
            b'X' | b'T' => {
                let length = u32::from_le_bytes(self.array()?);
                self.string(length as usize)?;
            }
            0x8c | b'U' => {
                let length = self.byte()?;
                self.string(length.into())?;
            }
            _ => self.step_container(opcode)?,
        }
        Ok(false)
    }

    /// Containers and the memo.
    fn step_container(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            b')' | b']' => self.push_seq(Vec::new())?,
            b'}' => self.push_dict()?,
            b't' | b'l' => {
                let items = self.pop_mark()?;
                self.push_seq(items)?;
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let from = self.floor(count)?;
                let items = self.stack.split_off(from);
                self.push_seq(items)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.extend(items)?;
            }
            b's' | b'u' => {
                let items = if opcode == b'u' {
                    self.pop_mark()?
                } else {
                    let from = self.floor(2)?;
                    self.stack.split_off(from)
                };
                self.set_items(&items)?;
            }
            b'q' => {
                let slot = self.byte()?;
                self.remember(slot.into())?;
            }
            b'r' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.remember(slot)?;
            }
            0x94 => {
                let slot = index(self.memo.len())?;
                self.remember(slot)?;
            }
            b'h' => {
                let slot = self.byte()?;
                self.recall(slot.into())?;
            }
            b'j' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.recall(slot)?;
            }
            _ => self.step_object(opcode)?,
        }
        Ok(())
    }

    /// Names, calls and storages: where a pickle could do harm.
    fn step_object(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.stack.push(Value::Global(global(&module, &name)?));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Some(module), Some(name)) = (self.out.text(module), self.out.text(name)) else {
                    return Err("a name that is not a string".into());
                };
                let found = global(module, name)?;
                self.stack.push(Value::Global(found));
            }
            b'R' => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                let result = self.call(callable, arguments)?;
                self.stack.push(result);
            }
            b'b' => {
                // OrderedDict's attributes (`_metadata`: version numbers of modules) change no value.
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                    return Err("sets the state of something that is not a dict".into());
                }
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.persistent(id)?;
                self.stack.push(storage);
            }
            other => return Err(format!("pickle instruction {other:#04x} has no place in a state dict")),
        }
        Ok(())
    }

    /// The built-in meaning of the few callables.
    fn call(&mut self, callable: Value, arguments: Value) -> Step<Value> {
        let Value::Seq(arguments) = arguments else { return Err("a call without a tuple of arguments".into()) };
        let arguments = self.short(arguments)?;
        match (callable, arguments.as_slice()) {
            (Value::Global(Global::OrderedDict), []) => {
                self.push_dict()?;
                self.pop()
            }
            (Value::Global(Global::RebuildTensor), [storage, offset, shape, stride, _grad, _hooks, ..]) => {
                self.tensor(*storage, *offset, *shape, *stride)
            }
            (Value::Global(Global::RebuildParameter), [tensor @ Value::Tensor(_), ..]) => Ok(*tensor),
            (Value::Global(known), _) => Err(format!("{known:?} is called with other arguments than a state dict has")),
            _ => Err("calls something that is not a function".into()),
        }
    }

    /// `("storage", type, key, location, length[, view])`.
    fn persistent(&mut self, id: Value) -> Step<Value> {
        let Value::Seq(id) = id else { return Err("a persistent id that is not a tuple".into()) };
        let parts = self.short(id)?;
        let (kind, key, length) = match parts.as_slice() {
            [tag, Value::Global(Global::StorageType(dtype)), key, _location, Value::Int(length)]
            | [tag, Value::Global(Global::StorageType(dtype)), key, _location, Value::Int(length), Value::None]
                if self.out.text(*tag) == Some("storage") =>
            {
                (*dtype, *key, *length)
            }
            _ => return Err("a persistent id that is not a storage".into()),
        };
        let key = self.out.text(key).ok_or("a storage whose key is not a string")?.to_string();
        let length = u64::try_from(length).map_err(|_| format!("storage {key} has the length {length}"))?;
        let storage = Storage { key, dtype: kind, length };
        let next = index(self.out.storages.len())?;
        let known = *self.by_key.entry(storage.key.clone()).or_insert(next);
        if known == next {
            self.out.storages.push(storage);
        } else if self.out.storages[known as usize] != storage {
            return Err(format!("storage {} is described in two ways", storage.key));
        }
        Ok(Value::Storage(known))
    }

    /// Checks a view against its storage, so that reading it needs no further checks.
    fn tensor(&mut self, storage: Value, offset: Value, shape: Value, stride: Value) -> Step<Value> {
        let Value::Storage(storage) = storage else { return Err("a tensor without a storage".into()) };
        let Value::Int(offset) = offset else { return Err("a tensor whose offset is not a number".into()) };
        let (shape, stride) = (self.numbers(shape)?, self.numbers(stride)?);
        let offset = u64::try_from(offset).map_err(|_| format!("a tensor at the offset {offset}"))?;
        if shape.len() != stride.len() || shape.len() > MAX_RANK {
            return Err(format!("a tensor with {} dimensions and {} strides", shape.len(), stride.len()));
        }
        let wraps = || format!("a tensor of shape {shape:?}, strides {stride:?} does not lie in its storage");
        let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).ok_or_else(wraps)?;
        let length = self.out.storages[storage as usize].length;
        if elements > 0 {
            let steps =
                shape.iter().zip(&stride).try_fold(offset, |at, (d, s)| at.checked_add((d - 1).checked_mul(*s)?));
            if steps.is_none_or(|last| last >= length) {
                return Err(wraps());
            }
        }
        let shape = shape.iter().map(|d| usize::try_from(*d)).collect::<std::result::Result<_, _>>();
        let shape = shape.map_err(|_| "a tensor larger than the address space".to_string())?;
        self.out.tensors.push(Tensor { storage, offset, shape, stride });
        Ok(Value::Tensor(index(self.out.tensors.len() - 1)?))
    }

    fn numbers(&self, value: Value) -> Step<Vec<u64>> {
        let Value::Seq(items) = value else { return Err("a shape that is not a tuple".into()) };
        let number = |item: &Value| match item {
            Value::Int(n) => u64::try_from(*n).map_err(|_| format!("the size or stride {n}")),
            _ => Err("a size that is not a number".to_string()),
        };
        self.short(items)?.iter().map(number).collect()
    }

    /// A copy of a sequence that is short in every state dict; a long one used many times would take quadratic time.
    fn short(&self, seq: u32) -> Step<Vec<Value>> {
        let items = &self.out.seqs[seq as usize];
        if items.len() > MAX_RANK { Err("a longer tuple than a state dict has".into()) } else { Ok(items.clone()) }
    }

    /// LONG1: an integer of up to 8 bytes, or the magic number.
    fn long(&mut self) -> Step<()> {
        let count = usize::from(self.byte()?);
        let bytes = self.take(count)?;
        let value = if bytes == LEGACY_MAGIC {
            Value::LegacyMagic
        } else if count <= 8 {
            let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..count].copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(wide))
        } else {
            return Err(format!("an integer of {count} bytes"));
        };
        self.stack.push(value);
        Ok(())
    }

    fn string(&mut self, length: usize) -> Step<()> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "a string that is not UTF-8")?.to_string();
        self.out.strings.push(text);
        self.stack.push(Value::Str(index(self.out.strings.len() - 1)?));
        Ok(())
    }

    fn push_seq(&mut self, items: Vec<Value>) -> Step<()> {
        self.out.seqs.push(items);
        self.stack.push(Value::Seq(index(self.out.seqs.len() - 1)?));
        Ok(())
    }

    fn push_dict(&mut self) -> Step<()> {
        self.out.dicts.push(Vec::new());
        self.stack.push(Value::Dict(index(self.out.dicts.len() - 1)?));
        Ok(())
    }

    fn extend(&mut self, items: Vec<Value>) -> Step<()> {
        match self.stack.last() {
            Some(Value::Seq(list)) => self.out.seqs[*list as usize].extend(items),
            _ => return Err("appends to something that is not a list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Value]) -> Step<()> {
        let (pairs, rest) = items.as_chunks::<2>();
        match (self.stack.last(), rest) {
            (Some(Value::Dict(dict)), []) => self.out.dicts[*dict as usize].extend(pairs.iter().map(|p| (p[0], p[1]))),
            _ => return Err("sets items of something that is not a dict".into()),
        }
        Ok(())
    }

    fn remember(&mut self, slot: u32) -> Step<()> {
        let value = *self.stack.last().ok_or("remembers from an empty stack")?;
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Step<()> {
        let value = *self.memo.get(&slot).ok_or_else(|| format!("recalls slot {slot}, which was never set"))?;
        self.stack.push(value);
        Ok(())
    }

    /// The stack height after removing `count` values; they must lie above the last mark.
    fn floor(&self, count: usize) -> Step<usize> {
        let lowest = self.marks.last().copied().unwrap_or(0);
        self.stack.len().checked_sub(count).filter(|from| *from >= lowest).ok_or_else(|| "an empty stack".to_string())
    }

    fn pop(&mut self) -> Step<Value> {
        self.floor(1)?;
        self.stack.pop().ok_or_else(|| "an empty stack".to_string())
    }

    fn pop_mark(&mut self) -> Step<Vec<Value>> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| "the pickle ends too early".to_string())
    }

    fn take(&mut self, count: usize) -> Step<&[u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| match self.bytes.len() {
            MAX_PICKLE => "the pickle is larger than that of any state dict".to_string(),
            _ => "the pickle ends too early".to_string(),
        })?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn line(&mut self) -> Step<String> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().take(256).position(|b| *b == b'\n').ok_or("a name without an end")?;
        let text = std::str::from_utf8(&rest[..end]).map_err(|_| "a name that is not UTF-8")?.to_string();
        self.at += end + 1;
        Ok(text)
    }
}

fn index(i: usize) -> Step<u32> {
    u32::try_from(i).map_err(|_| "too many objects".to_string())
}

/// The whole list of names that mean something here.
fn global(module: &str, name: &str) -> Step<Global> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
        ("torch", "DoubleStorage") => Global::StorageType(Dtype::F64),
        ("torch", "FloatStorage") => Global::StorageType(Dtype::F32),
        ("torch", "HalfStorage") => Global::StorageType(Dtype::F16),
        ("torch", "BFloat16Storage") => Global::StorageType(Dtype::Bf16),
        ("torch", "LongStorage") => Global::StorageType(Dtype::I64),
        ("torch", "IntStorage") => Global::StorageType(Dtype::I32),
        ("torch", "ShortStorage") => Global::StorageType(Dtype::I16),
        ("torch", "CharStorage") => Global::StorageType(Dtype::I8),
        ("torch", "ByteStorage") => Global::StorageType(Dtype::U8),
        ("torch", "BoolStorage") => Global::StorageType(Dtype::Bool),
        _ => return Err(format!("the pickle asks for {module}.{name}, which no state dict needs; nothing was run")),
    })
}
