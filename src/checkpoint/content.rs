//! What a file of a checkpoint is to hold.

use crate::error::Result;
use crate::ffi::bytes::Buffer;
use crate::format::safetensors;
use std::collections::BTreeMap;
use tch::Tensor;

/// What a file of a checkpoint is to hold.
///
/// ```
/// use std::collections::BTreeMap;
/// use tch::Tensor;
/// use tch_peft::checkpoint::Content;
///
/// let content = Content::Tensors(BTreeMap::from([("shift".to_string(), Tensor::from_slice(&[1.0f32, 2.0]))]));
/// let bytes = content.to_bytes()?; // a safetensors file
/// assert_eq!(bytes[8], b'{');
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug)]
pub enum Content {
    /// Its bytes.
    Bytes(Vec<u8>),
    /// Tensors by name, in safetensors format.
    Tensors(BTreeMap<String, Tensor>),
}

impl Content {
    /// The file's bytes.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a dtype that safetensors
    /// doesn't have; libtorch's.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(self.lay_out()?.pieces().concat())
    }

    pub(super) fn lay_out(&self) -> Result<LaidOut<'_>> {
        Ok(match self {
            Content::Bytes(bytes) => LaidOut::Bytes(bytes),
            Content::Tensors(tensors) => LaidOut::Tensors(safetensors::Layout::of(tensors)?),
        })
    }

    /// A copy of the file, which training doesn't change; in the memory of
    /// `spare` if it fits.
    pub(super) fn gather(&self, spare: Option<Buffer>) -> Result<Buffer> {
        Buffer::gather(&self.lay_out()?.pieces(), spare)
    }
}

/// A file as it goes to disk.
pub(super) enum LaidOut<'a> {
    Bytes(&'a [u8]),
    Tensors(safetensors::Layout),
}

impl LaidOut<'_> {
    /// Its bytes, in pieces.
    pub(super) fn pieces(&self) -> Vec<&[u8]> {
        match self {
            LaidOut::Bytes(bytes) => vec![bytes],
            LaidOut::Tensors(layout) => layout.pieces(),
        }
    }
}
