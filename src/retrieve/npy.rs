//! Files of vectors that others read: NPY version 1.0 and faiss's flat index of inner products.
//!
//! Both are a header and then the rows, little-endian.

use half::f16;
use half::slice::HalfFloatSliceExt;
use serde::{Deserialize, Serialize};

use crate::device::Element;

/// Type of a stored number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Stored {
    /// 32 bits.
    F32,
    /// 16 bits: half the disk, three digits.
    F16,
}

impl Stored {
    /// Bytes of a number.
    pub fn size(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::F16 => 2,
        }
    }

    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Stored::F32 => "f32",
            Stored::F16 => "f16",
        }
    }

    /// The bytes of `values`, appended to `out`; the place of the first that is too large for the type.
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
        match self {
            Stored::F32 => out.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            Stored::F16 => {
                for (i, &x) in values.iter().enumerate() {
                    let half = f16::from_f32(x);
                    if half.is_infinite() {
                        return Err(i);
                    }
                    out.extend(half.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    /// The numbers in `bytes`, which are as many as `out`.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Stored::F32 => {
                out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
            }
            Stored::F16 => {
                let mut halves = [f16::ZERO; PIECE];
                for (out, bytes) in out.chunks_mut(PIECE).zip(bytes.chunks(2 * PIECE)) {
                    let halves = &mut halves[..out.len()];
                    halves.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(x, b)| *x = f16::from_le_bytes(*b));
                    halves.convert_to_f32_slice(out);
                }
            }
        }
    }
}

/// A type that stored numbers are read as.
pub trait Number: Element + Default {
    /// The numbers in `bytes`, which are as many as `out`; whether all are finite in this type.
    fn decode(stored: Stored, bytes: &[u8], out: &mut [Self]) -> bool;

    /// Whether it is a number, and not infinite.
    fn is_finite(self) -> bool;
}

// Without branches: all exponents are looked at.
impl Number for f32 {
    fn decode(stored: Stored, bytes: &[u8], out: &mut [f32]) -> bool {
        stored.decode(bytes, out);
        out.iter().fold(true, |all, x| all & x.is_finite())
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

/// Numbers in f32 are rounded, to infinity where they are too large.
impl Number for f16 {
    fn decode(stored: Stored, bytes: &[u8], out: &mut [f16]) -> bool {
        match stored {
            Stored::F16 => out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(x, b)| *x = f16::from_le_bytes(*b)),
            Stored::F32 => {
                let mut wide = [0.0; PIECE];
                for (out, bytes) in out.chunks_mut(PIECE).zip(bytes.chunks(4 * PIECE)) {
                    let wide = &mut wide[..out.len()];
                    stored.decode(bytes, wide);
                    out.convert_from_f32_slice(wide);
                }
            }
        }
        out.iter().fold(true, |all, x| all & x.is_finite())
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

/// Numbers that are converted at a time.
const PIECE: usize = 1024;

/// Bytes of [`header`].
pub const HEADER: usize = 128;

/// The header of an NPY file of `[rows, width]` numbers.
pub fn header(stored: Stored, rows: u64, width: usize) -> [u8; HEADER] {
    let descr = match stored {
        Stored::F32 => "<f4",
        Stored::F16 => "<f2",
    };
    header_of(descr, rows, width)
}

/// The header of an NPY file of `[rows, width]` elements of the type that numpy calls `descr`.
pub fn header_of(descr: &str, rows: u64, width: usize) -> [u8; HEADER] {
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, {width}), }}");
    let mut bytes = [b' '; HEADER];
    bytes[..8].copy_from_slice(b"\x93NUMPY\x01\x00");
    bytes[8..10].copy_from_slice(&(HEADER as u16 - 10).to_le_bytes());
    // 20 digits for each number at most: always shorter than the room there is.
    bytes[10..10 + text.len()].copy_from_slice(text.as_bytes());
    bytes[HEADER - 1] = b'\n';
    bytes
}

/// Bytes of [`faiss_header`].
pub const FAISS_HEADER: usize = 45;

/// The header of a faiss `IndexFlatIP` of `rows` vectors of `width` numbers in f32.
pub fn faiss_header(rows: u64, width: u32) -> [u8; FAISS_HEADER] {
    let mut bytes = [0; FAISS_HEADER];
    let fields: [&[u8]; 8] = [
        b"IxFI",
        &width.to_le_bytes(),
        &rows.to_le_bytes(),
        &(1u64 << 20).to_le_bytes(),
        &(1u64 << 20).to_le_bytes(),
        // Trained, and the metric: inner product.
        &[1],
        &0u32.to_le_bytes(),
        &(rows * u64::from(width)).to_le_bytes(),
    ];
    let mut at = 0;
    for field in fields {
        bytes[at..at + field.len()].copy_from_slice(field);
        at += field.len();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_those_of_numpy_and_faiss() {
        let bytes = header(Stored::F16, 12, 384);
        let text = "{'descr': '<f2', 'fortran_order': False, 'shape': (12, 384), }";
        assert!(bytes.starts_with(b"\x93NUMPY\x01\x00\x76\x00") && bytes[10..].starts_with(text.as_bytes()));
        assert!(bytes[10 + text.len()..127].iter().all(|b| *b == b' ') && bytes[127] == b'\n');
        let longest = header(Stored::F32, u64::MAX, usize::MAX);
        assert!(longest.windows(3).any(|w| w == b", }"));
        let bytes = faiss_header(3, 2);
        assert_eq!(bytes[..16], *b"IxFI\x02\0\0\0\x03\0\0\0\0\0\0\0");
        assert_eq!(bytes[32..], [1, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn numbers_come_back() {
        let values: Vec<f32> = (0..3000).map(|i| i as f32 - 1500.0).collect();
        for stored in [Stored::F32, Stored::F16] {
            let (mut bytes, mut back) = (Vec::new(), vec![0.0; values.len()]);
            stored.encode(&values, &mut bytes).unwrap();
            assert_eq!(bytes.len(), values.len() * stored.size());
            stored.decode(&bytes, &mut back);
            assert_eq!(back, values);
        }
        assert_eq!(Stored::F16.encode(&[1.0, 70_000.0], &mut Vec::new()), Err(1));
    }

    #[test]
    fn halves_come_from_either_type() {
        let values: Vec<f32> = (0..3000).map(|i| (i as f32 - 1500.0) / 3.0).collect();
        let halves: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
        for stored in [Stored::F32, Stored::F16] {
            let (mut bytes, mut back) = (Vec::new(), vec![f16::NAN; values.len()]);
            stored.encode(&values, &mut bytes).unwrap();
            assert!(<f16 as Number>::decode(stored, &bytes, &mut back));
            assert_eq!(back, halves);
        }
        let finite = |x: f32| <f16 as Number>::decode(Stored::F32, &x.to_le_bytes(), &mut [f16::ZERO]);
        assert!(finite(-65_504.0) && !finite(65_520.0) && !finite(f32::NAN));
    }
}
