//! Parameters by name, wherever they are: in a checkpoint, in a plain file of tensors, in the folder of a bi-encoder.

use super::names::Param;
use super::safetensors::SafeTensors;
use super::tensor_file::TensorFile;
use super::weights::Checkpoint;
use crate::error::Result;

/// Something that holds parameters under the engine's names.
pub trait Parameters {
    /// The shape of a parameter; `None` when it is not there.
    fn find(&self, name: &str) -> Option<Vec<usize>>;

    /// Reads a parameter as f32; false when it is not there.
    ///
    /// # Errors
    /// Another shape, no float, a value that is not finite, or a failed read.
    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool>;

    /// Whether all of the parameters are there.
    fn has_all(&self, params: &[Param]) -> bool {
        params.iter().all(|p| self.find(&p.name).is_some())
    }
}

impl Parameters for Checkpoint {
    fn find(&self, name: &str) -> Option<Vec<usize>> {
        self.shape(name)
    }

    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool> {
        if self.contains(name) { self.read_f32(name, shape, out).map(|()| true) } else { Ok(false) }
    }
}

impl Parameters for SafeTensors {
    fn find(&self, name: &str) -> Option<Vec<usize>> {
        self.info(name).map(|info| info.shape)
    }

    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool> {
        if self.info(name).is_some() { self.read_f32(name, shape, out).map(|()| true) } else { Ok(false) }
    }
}
