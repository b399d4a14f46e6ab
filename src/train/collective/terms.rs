//! What ranks can sum.

use half::bf16;

use crate::device::Element;

/// A number that has a sum.
pub(super) trait Term: Element {
    fn plus(self, other: Self) -> Self;
}

impl Term for f32 {
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl Term for f64 {
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl Term for bf16 {
    fn plus(self, other: Self) -> Self {
        bf16::from_f32(self.to_f32() + other.to_f32())
    }
}

/// Calls a generic method for the type of a tensor's elements.
macro_rules! by_type {
    ($tensor:expr, $self:ident.$method:ident($($argument:expr),*)) => {
        match $tensor.dtype() {
            $crate::device::DType::F32 => $self.$method::<f32>($($argument),*),
            $crate::device::DType::F64 => $self.$method::<f64>($($argument),*),
            $crate::device::DType::BF16 => $self.$method::<half::bf16>($($argument),*),
            other => Err($crate::error::Error::refused(format!("ranks have no sum of {other:?}"))
                .remedy("report this as a defect")),
        }
    };
}
pub(super) use by_type;
