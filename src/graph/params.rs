//! The parameter table and its arenas.
//!
//! Matrices that are used together are one entry (`query`, `key`, `value` as one `[3C, C]` matrix); each entry knows the checkpoint
//! names of its parts. Parameters with weight decay come first in memory, so that one optimizer call covers the flat arena.
//!
//! Where storage is bf16, the optimizer's weights, the masters, are f32, and products read a rounded copy of the same layout.

use std::ops::Range;

use crate::device::{Arena, DType, Device, Tensor};
use crate::error::Result;
use crate::ops::{Count, gather};
use crate::rng::{Site, Stream};

/// Number of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(usize);

/// Neighbouring entries of a table: those of a part of the graph.
pub type Entries = Range<usize>;

/// How a fresh parameter is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Normal with the model's `initializer_range`.
    Normal,
    /// As `Normal`, row `pad` zero.
    NormalWithPad(u32),
    /// 0: biases.
    Zeros,
    /// 1: LayerNorm weights.
    Ones,
}

/// A checkpoint tensor inside an entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Canonical checkpoint name.
    pub name: String,
    /// `[rows, columns]` or `[columns]`.
    pub shape: Vec<usize>,
    /// Whether weight decay applies.
    pub decay: bool,
    /// First element in its arena.
    pub offset: usize,
    entry: usize,
    start: usize,
    init: Init,
}

impl Part {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

#[derive(Clone, Debug)]
struct Entry {
    len: usize,
    decay: bool,
    /// What elements behind those of the parts hold.
    padding: f32,
}

/// Collects entries before the arenas are allocated.
#[derive(Clone, Debug, Default)]
pub struct Table {
    entries: Vec<Entry>,
    parts: Vec<Part>,
    prefix: String,
}

impl Table {
    /// What `add` adds has `prefix` before its names, so that a model can have a part of the graph twice.
    pub fn within<R>(&mut self, prefix: &str, add: impl FnOnce(&mut Table) -> R) -> R {
        let outer = std::mem::replace(&mut self.prefix, prefix.to_string());
        let added = add(self);
        self.prefix = outer;
        added
    }

    /// Those that were added since the table had `first`.
    pub fn since(&self, first: usize) -> Entries {
        first..self.len()
    }

    /// Entries so far.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none yet.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// One entry of several `[rows, columns]` matrices, one below the other.
    pub fn matrices(&mut self, names: &[String], rows: usize, columns: usize, init: Init) -> Id {
        self.entry(names, vec![rows, columns], true, init)
    }

    /// One entry of several vectors, one after the other. Vectors (biases, LayerNorm) do not decay.
    pub fn vectors(&mut self, names: &[String], len: usize, init: Init) -> Id {
        self.entry(names, vec![len], false, init)
    }

    /// Gives an entry room for `rows` rows or elements in all, those behind its parts filled with `padding`.
    pub fn pad(&mut self, id: Id, rows: usize, padding: f32) {
        let own = self.parts.iter().filter(|p| p.entry == id.0);
        let width = own.clone().next().map_or(1, |p| p.shape[1..].iter().product());
        let entry = &mut self.entries[id.0];
        (entry.len, entry.padding) = (entry.len.max(rows * width), padding);
    }

    fn entry(&mut self, names: &[String], shape: Vec<usize>, decay: bool, init: Init) -> Id {
        let size: usize = shape.iter().product();
        let entry = self.entries.len();
        for (i, name) in names.iter().enumerate() {
            let (name, shape) = (format!("{}{name}", self.prefix), shape.clone());
            self.parts.push(Part { name, shape, decay, offset: 0, entry, start: i * size, init });
        }
        self.entries.push(Entry { len: size * names.len(), decay, padding: 0.0 });
        Id(entry)
    }

    /// The checkpoint tensors, in table order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.parts.iter().map(Part::elements).sum()
    }

    /// Allocates weights and gradients.
    pub fn allocate(self, device: Device, storage: DType) -> Params {
        self.arenas(device, storage, true)
    }

    /// Allocates weights; gradients are empty, and there must be no backward.
    pub fn allocate_weights(self, device: Device, storage: DType) -> Params {
        self.arenas(device, storage, false)
    }

    fn arenas(mut self, device: Device, storage: DType, gradients: bool) -> Params {
        let order: Vec<usize> = [true, false]
            .into_iter()
            .flat_map(|decay| (0..self.entries.len()).map(move |i| (i, decay)))
            .filter(|&(i, decay)| self.entries[i].decay == decay)
            .map(|(i, _)| i)
            .collect();
        let mut place = vec![0; order.len()];
        for (position, &entry) in order.iter().enumerate() {
            place[entry] = position;
        }
        let lengths: Vec<usize> = order.iter().map(|&i| self.entries[i].len).collect();
        let arena = |dtype| Arena::zeros(device, dtype, lengths.iter().copied());
        let masters = arena(storage.wide());
        let gradients = match gradients {
            true => arena(storage.wide()),
            false => Arena::zeros(device, storage.wide(), lengths.iter().map(|_| 0)),
        };
        let copies = (storage != storage.wide()).then(|| arena(storage));
        for part in &mut self.parts {
            part.offset = masters.offset(place[part.entry]) + part.start;
        }
        let first_plain = self.entries.iter().filter(|e| e.decay).count();
        let decayed = if first_plain < order.len() { masters.offset(first_plain) } else { masters.whole().len() };
        for (i, entry) in self.entries.iter().enumerate().filter(|(_, e)| e.padding != 0.0) {
            let parts = self.parts.iter().filter(|p| p.entry == i).map(Part::elements).sum();
            let padding = masters.tensor(place[i]).slice(parts..entry.len);
            upload_f32(&padding, &vec![entry.padding; entry.len - parts]);
        }
        Params { parts: self.parts, place, masters, copies, gradients, decayed, device }
    }
}

/// Weights and gradients of a model.
pub struct Params {
    parts: Vec<Part>,
    place: Vec<usize>,
    masters: Arena,
    /// In the storage type, where that is another.
    copies: Option<Arena>,
    gradients: Arena,
    device: Device,
    /// Elements of the arenas before this one decay.
    pub decayed: usize,
}

impl Params {
    /// Weights of an entry in the storage type.
    pub fn weight(&self, id: Id) -> &Tensor {
        self.copies.as_ref().unwrap_or(&self.masters).tensor(self.place[id.0])
    }

    /// Weights of an entry as the optimizer has them.
    pub fn master(&self, id: Id) -> &Tensor {
        self.masters.tensor(self.place[id.0])
    }

    /// Gradients of an entry.
    pub fn gradient(&self, id: Id) -> &Tensor {
        self.gradients.tensor(self.place[id.0])
    }

    /// All weights as the optimizer has them, flat.
    pub fn weights(&self) -> &Tensor {
        self.masters.whole()
    }

    /// Their copy in the storage type, where that is another.
    pub fn copies(&self) -> Option<&Tensor> {
        self.copies.as_ref().map(Arena::whole)
    }

    /// Makes the copy anew, after [`Self::weights`] were written.
    pub fn refresh(&self) {
        if let Some(copies) = self.copies() {
            let exact = self.device.tensor(&[(copies.len() / COPY_ROW) as u32]);
            let rows = Count::on_device(copies.len() / COPY_ROW, &exact);
            gather::rounded(self.device, self.weights(), rows, COPY_ROW, copies);
        }
    }

    /// All gradients, flat.
    pub fn gradients(&self) -> &Tensor {
        self.gradients.whole()
    }

    /// Number of entries.
    pub fn entries(&self) -> usize {
        self.place.len()
    }

    /// Where neighbouring entries lie in the flat arenas: those with weight decay, and those without. Gaps behind them included.
    pub fn spans(&self, entries: &Entries) -> [Range<usize>; 2] {
        let (arena, len) = (&self.masters, self.masters.whole().len());
        let span = |decayed: bool| {
            let places = self.place[entries.clone()].iter().copied();
            let places = places.filter(|&place| (arena.offset(place) < self.decayed) == decayed);
            let (first, last) =
                places.fold((usize::MAX, 0), |(first, last), place| (first.min(place), last.max(place)));
            if first > last {
                return 0..0;
            }
            let end = if last + 1 < self.place.len() { arena.offset(last + 1) } else { len };
            arena.offset(first)..end
        };
        [span(true), span(false)]
    }

    /// The checkpoint tensors and where they lie in the flat arenas.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Fills every part of the masters and makes the copy anew: `read` puts a tensor of the given name and shape into the slice, or says
    /// that it has none; the missing ones are initialised from `seed` with standard deviation `range`. Returns the names of the missing.
    pub fn load(
        &self,
        seed: u64,
        range: f32,
        mut read: impl FnMut(&str, &[usize], &mut [f32]) -> Result<bool>,
    ) -> Result<Vec<String>> {
        let mut fresh = Vec::new();
        let mut buffer = Vec::new();
        for part in &self.parts {
            buffer.clear();
            buffer.resize(part.elements(), 0.0);
            if !read(&part.name, &part.shape, &mut buffer)? {
                initialise(part, seed, range, &mut buffer);
                fresh.push(part.name.clone());
            }
            self.set(part, &buffer);
        }
        self.refresh();
        Ok(fresh)
    }

    /// Copies `values` to the masters of `part`; [`Self::refresh`] brings them to the copy.
    pub fn set(&self, part: &Part, values: &[f32]) {
        upload_f32(&self.masters.whole().slice(part.offset..part.offset + part.elements()), values);
    }

    /// The weights of `part`, as f32.
    pub fn get(&self, part: &Part) -> Vec<f32> {
        to_f32(&self.masters.whole().slice(part.offset..part.offset + part.elements()))
    }

    /// The gradient of `part`, as f32.
    pub fn get_gradient(&self, part: &Part) -> Vec<f32> {
        to_f32(&self.gradients.whole().slice(part.offset..part.offset + part.elements()))
    }
}

/// Elements that are rounded as one row; arenas consist of whole ones.
const COPY_ROW: usize = 64;

/// Copies f32 values to the first elements of a tensor of f32 or f64.
pub fn upload_f32(to: &Tensor, values: &[f32]) {
    match to.dtype() {
        DType::F64 => to.upload(&values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()),
        _ => to.upload(values),
    }
}

/// The elements of a floating-point tensor as f32.
pub fn to_f32(t: &Tensor) -> Vec<f32> {
    match t.dtype() {
        DType::F64 => t.to_vec::<f64>().into_iter().map(|x| x as f32).collect(),
        DType::BF16 => t.to_vec::<half::bf16>().into_iter().map(half::bf16::to_f32).collect(),
        _ => t.to_vec(),
    }
}

/// Fills a fresh parameter; the stream is named by seed and tensor name, so it does not depend on the rest of the model.
fn initialise(part: &Part, seed: u64, range: f32, out: &mut [f32]) {
    match part.init {
        Init::Zeros => out.fill(0.0),
        Init::Ones => out.fill(1.0),
        Init::Normal | Init::NormalWithPad(_) => {
            let name = u64::from(crc32c::crc32c(part.name.as_bytes()));
            let mut stream = Stream::new(seed, 0, Site::Init, name);
            out.fill_with(|| stream.normal() * range);
        }
    }
    if let Init::NormalWithPad(pad) = part.init {
        let width = part.shape[1];
        if let Some(row) = out.get_mut(pad as usize * width..(pad as usize + 1) * width) {
            row.fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decayed_entries_come_first_and_parts_are_where_they_say() {
        let mut t = Table::default();
        let bias = t.vectors(&["a.bias".into(), "b.bias".into()], 5, Init::Ones);
        let weight = t.matrices(&["a.weight".into(), "b.weight".into()], 5, 3, Init::Normal);
        assert_eq!(t.parameters(), 40);
        let p = t.allocate(Device::Cpu, DType::F32);
        let fresh = p.load(1, 0.02, |name, _, out| {
            out.fill(7.0);
            Ok(name == "b.weight")
        });
        assert_eq!(fresh.unwrap(), ["a.bias", "b.bias", "a.weight"]);
        assert!(p.decayed >= 30 && p.parts()[0].offset >= p.decayed);
        assert_eq!(p.weight(bias).to_vec::<f32>(), [1.0; 10]);
        assert_eq!(p.weight(weight).to_vec::<f32>()[15..], [7.0; 15]);
        assert!(p.weight(weight).to_vec::<f32>()[..15].iter().all(|x| *x != 0.0 && x.abs() < 0.12));
    }
}
