//! The parameter table and its arenas.
//!
//! Matrices that are used together are one entry (`query`, `key`, `value` as one `[3C, C]` matrix); each entry knows the checkpoint
//! names of its parts. Parameters with weight decay come first in memory, so that one optimizer call covers the flat arena.

use crate::device::{Arena, DType, Tensor};
use crate::error::Result;
use crate::rng::{Site, Stream};

/// Number of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(usize);

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
}

/// Collects entries before the arenas are allocated.
#[derive(Clone, Debug, Default)]
pub struct Table {
    entries: Vec<Entry>,
    parts: Vec<Part>,
}

impl Table {
    /// One entry of several `[rows, columns]` matrices, one below the other.
    pub fn matrices(&mut self, names: &[String], rows: usize, columns: usize, init: Init) -> Id {
        self.entry(names, vec![rows, columns], true, init)
    }

    /// One entry of several vectors, one after the other. Vectors (biases, LayerNorm) do not decay.
    pub fn vectors(&mut self, names: &[String], len: usize, init: Init) -> Id {
        self.entry(names, vec![len], false, init)
    }

    fn entry(&mut self, names: &[String], shape: Vec<usize>, decay: bool, init: Init) -> Id {
        let size: usize = shape.iter().product();
        let entry = self.entries.len();
        for (i, name) in names.iter().enumerate() {
            let part =
                Part { name: name.clone(), shape: shape.clone(), decay, offset: 0, entry, start: i * size, init };
            self.parts.push(part);
        }
        self.entries.push(Entry { len: size * names.len(), decay });
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
    pub fn allocate(mut self, dtype: DType) -> Params {
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
        let weights = Arena::zeros(dtype, lengths.iter().copied());
        let gradients = Arena::zeros(dtype, lengths.iter().copied());
        for part in &mut self.parts {
            part.offset = weights.offset(place[part.entry]) + part.start;
        }
        let first_plain = self.entries.iter().filter(|e| e.decay).count();
        let decayed = if first_plain < order.len() { weights.offset(first_plain) } else { weights.whole().len() };
        Params { parts: self.parts, place, weights, gradients, decayed }
    }
}

/// Weights and gradients of a model.
pub struct Params {
    parts: Vec<Part>,
    place: Vec<usize>,
    weights: Arena,
    gradients: Arena,
    /// Elements of the arenas before this one decay.
    pub decayed: usize,
}

impl Params {
    /// Weights of an entry.
    pub fn weight(&self, id: Id) -> &Tensor {
        self.weights.tensor(self.place[id.0])
    }

    /// Gradients of an entry.
    pub fn gradient(&self, id: Id) -> &Tensor {
        self.gradients.tensor(self.place[id.0])
    }

    /// All weights, flat.
    pub fn weights(&self) -> &Tensor {
        self.weights.whole()
    }

    /// All gradients, flat.
    pub fn gradients(&self) -> &Tensor {
        self.gradients.whole()
    }

    /// The checkpoint tensors and where they lie in the flat arenas.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Fills every part: `read` puts a tensor of the given name and shape into the slice, or says that it has none; the missing ones
    /// are initialised from `seed` with standard deviation `range`. Returns the names of the missing.
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
        Ok(fresh)
    }

    /// Copies `values` to the weights of `part`.
    pub fn set(&self, part: &Part, values: &[f32]) {
        let to = self.weights.whole().slice(part.offset..part.offset + part.elements());
        match to.dtype() {
            DType::F64 => to.upload(&values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()),
            _ => to.upload(values),
        }
    }

    /// The weights of `part`, as f32.
    pub fn get(&self, part: &Part) -> Vec<f32> {
        to_f32(&self.weights.whole().slice(part.offset..part.offset + part.elements()))
    }

    /// The gradient of `part`, as f32.
    pub fn get_gradient(&self, part: &Part) -> Vec<f32> {
        to_f32(&self.gradients.whole().slice(part.offset..part.offset + part.elements()))
    }
}

/// The elements of a floating-point tensor as f32.
pub fn to_f32(t: &Tensor) -> Vec<f32> {
    match t.dtype() {
        DType::F64 => t.read::<f64>().iter().map(|&x| x as f32).collect(),
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
        let p = t.allocate(DType::F32);
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
