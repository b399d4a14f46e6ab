//! Tensor maps, by which the copy engine of Hopper GPUs (TMA) knows a matrix.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUresult, CUtensorMapDataType as Element, CUtensorMapFloatOOBfill as OutOfBounds,
    CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle,
};

use super::driver::check;
use crate::device::launch::{TensorLayout, TensorMap};
use crate::error::{Error, Result};

/// The map of a matrix. The context is current.
pub fn encode(layout: &TensorLayout) -> Result<TensorMap> {
    let refused = || {
        Error::device(format!("no tensor map for {layout:?}"))
            .remedy("align base and rows to 16 bytes and keep the box within 256 x 256")
    };
    let element = match layout.element_bytes {
        1 => Element::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2 => Element::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        4 => Element::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        _ => return Err(refused()),
    };
    let swizzle =
        if layout.swizzle_128b { Swizzle::CU_TENSOR_MAP_SWIZZLE_128B } else { Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE };
    let mut map = TensorMap::default();
    let (sizes, rows) = ([layout.width, layout.height], [layout.row_bytes]);
    let (tile, steps) = ([layout.box_width, layout.box_height], [1u32; 2]);
    // SAFETY: the map has the size and alignment of the driver's, and the arrays one entry a dimension, strides one less.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            element,
            2,
            layout.base as *mut c_void,
            sizes.as_ptr(),
            rows.as_ptr(),
            tile.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            OutOfBounds::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    if code == CUresult::CUDA_ERROR_INVALID_VALUE {
        return Err(refused());
    }
    check(code, &"encoding a tensor map").map(|()| map)
}
