//! Element types of stored tensors, and their conversion to and from the floats the engine computes with.
//!
//! All formats on disk are little-endian; conversions go through `from_le_bytes`, so nothing depends on alignment.

use half::{bf16, f16};

/// Element type of a stored tensor, with the names of the safetensors format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE double precision.
    F64,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// 8-bit float, 4 exponent bits; known by size only.
    F8E4m3,
    /// 8-bit float, 5 exponent bits; known by size only.
    F8E5m2,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 64-bit integer.
    U64,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 8-bit integer.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

const ALL: [(Dtype, &str, usize); 15] = [
    (Dtype::F64, "F64", 8),
    (Dtype::F32, "F32", 4),
    (Dtype::F16, "F16", 2),
    (Dtype::Bf16, "BF16", 2),
    (Dtype::F8E4m3, "F8_E4M3", 1),
    (Dtype::F8E5m2, "F8_E5M2", 1),
    (Dtype::I64, "I64", 8),
    (Dtype::I32, "I32", 4),
    (Dtype::I16, "I16", 2),
    (Dtype::I8, "I8", 1),
    (Dtype::U64, "U64", 8),
    (Dtype::U32, "U32", 4),
    (Dtype::U16, "U16", 2),
    (Dtype::U8, "U8", 1),
    (Dtype::Bool, "BOOL", 1),
];

impl Dtype {
    /// The type with this name in a safetensors header.
    pub fn parse(name: &str) -> Option<Self> {
        ALL.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        ALL[self as usize].1
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        ALL[self as usize].2
    }

    /// Whether [`decode_f32`] and [`decode_f64`] can read it.
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::Bf16)
    }

    /// The name PyTorch and `config.json` use, for the types a model is stored in.
    pub fn torch_name(self) -> Option<&'static str> {
        Some(match self {
            Dtype::F64 => "float64",
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
            _ => return None,
        })
    }
}

/// Converts stored floats to f32. `false` when the type is not a float; `bytes` must hold `out.len()` elements.
#[must_use]
pub fn decode_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> bool {
    debug_assert_eq!(bytes.len(), out.len() * dtype.size());
    match dtype {
        Dtype::F32 => each::<4, _>(bytes, out, f32::from_le_bytes),
        Dtype::F16 => each::<2, _>(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::Bf16 => each::<2, _>(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F64 => each::<8, _>(bytes, out, |b| f64::from_le_bytes(b) as f32),
        _ => return false,
    }
    true
}

/// Converts stored floats to f64. `false` when the type is not a float; `bytes` must hold `out.len()` elements.
#[must_use]
pub fn decode_f64(dtype: Dtype, bytes: &[u8], out: &mut [f64]) -> bool {
    debug_assert_eq!(bytes.len(), out.len() * dtype.size());
    match dtype {
        Dtype::F32 => each::<4, _>(bytes, out, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F16 => each::<2, _>(bytes, out, |b| f16::from_le_bytes(b).to_f64()),
        Dtype::Bf16 => each::<2, _>(bytes, out, |b| bf16::from_le_bytes(b).to_f64()),
        Dtype::F64 => each::<8, _>(bytes, out, f64::from_le_bytes),
        _ => return false,
    }
    true
}

/// Converts stored integers and booleans to i64. `false` when the type is a float, or a value does not fit.
#[must_use]
pub fn decode_i64(dtype: Dtype, bytes: &[u8], out: &mut [i64]) -> bool {
    debug_assert_eq!(bytes.len(), out.len() * dtype.size());
    match dtype {
        Dtype::I64 => each::<8, _>(bytes, out, i64::from_le_bytes),
        Dtype::I32 => each::<4, _>(bytes, out, |b| i32::from_le_bytes(b).into()),
        Dtype::I16 => each::<2, _>(bytes, out, |b| i16::from_le_bytes(b).into()),
        Dtype::I8 => each::<1, _>(bytes, out, |b| i8::from_le_bytes(b).into()),
        Dtype::U32 => each::<4, _>(bytes, out, |b| u32::from_le_bytes(b).into()),
        Dtype::U16 => each::<2, _>(bytes, out, |b| u16::from_le_bytes(b).into()),
        Dtype::U8 | Dtype::Bool => each::<1, _>(bytes, out, |b| b[0].into()),
        Dtype::U64 => {
            each::<8, _>(bytes, out, i64::from_le_bytes);
            return out.iter().all(|v| *v >= 0);
        }
        _ => return false,
    }
    true
}

fn each<const N: usize, T>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; N]) -> T) {
    for (value, chunk) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = convert(*chunk);
    }
}

/// Appends `values` in a float type, rounded to nearest even. `false` when the type is not a float.
#[must_use]
pub fn encode(dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) -> bool {
    bytes.reserve(values.len() * dtype.size());
    match dtype {
        Dtype::F32 => values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes())),
        Dtype::F16 => values.iter().for_each(|v| bytes.extend_from_slice(&f16::from_f32(*v).to_le_bytes())),
        Dtype::Bf16 => values.iter().for_each(|v| bytes.extend_from_slice(&bf16::from_f32(*v).to_le_bytes())),
        Dtype::F64 => values.iter().for_each(|v| bytes.extend_from_slice(&f64::from(*v).to_le_bytes())),
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (dtype, name, size) in ALL {
            assert_eq!((dtype.name(), dtype.size(), Dtype::parse(name)), (name, size, Some(dtype)));
        }
    }
}
