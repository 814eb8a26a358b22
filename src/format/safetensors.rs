//! Tensors by name, to and from safetensors bytes.

use crate::error::{Error, Result};
use crate::ffi::bytes::{Buffer, TensorBytes, tensor_from_bytes};
use crate::ffi::mapped::Mapped;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tch::{Kind, Tensor};

/// A safetensors file that is not put together yet: its header, and tensors in
/// their order. Those on the CPU are lent, not copied.
#[derive(Debug)]
pub(crate) struct Layout {
    header: Vec<u8>,
    tensors: Vec<TensorBytes>,
}

impl Layout {
    /// Lays tensors out as the Python library does it: by falling dtype size,
    /// then by name.
    ///
    /// # Errors
    /// [`Error::Config`] for a dtype that safetensors doesn't have.
    pub(crate) fn of(tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        Self::with_metadata(tensors, BTreeMap::new())
    }

    /// The same with more entries in the header's metadata.
    ///
    /// # Errors
    /// Those of [`Layout::of`].
    pub(crate) fn with_metadata(
        tensors: &BTreeMap<String, Tensor>,
        mut metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut held = Vec::with_capacity(tensors.len());
        for (name, tensor) in tensors {
            let shape: Vec<usize> = tensor.size().iter().map(|&d| d as usize).collect();
            held.push((name, dtype(name, tensor.f_kind()?)?, shape, TensorBytes::of(tensor)?));
        }
        held.sort_by(|a, b| b.1.bitsize().cmp(&a.1.bitsize()).then_with(|| a.0.cmp(b.0)));
        let mut end = 0;
        let mut infos = Vec::with_capacity(held.len());
        let mut tensors = Vec::with_capacity(held.len());
        for (name, dtype, shape, bytes) in held {
            let start = end;
            end += bytes.as_slice().len();
            infos.push((name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
            tensors.push(bytes);
        }
        // What PEFT writes, and what `transformers` wants to see.
        metadata.insert("format".into(), "pt".into());
        let refused = |error: String| Error::config("tensors", "what safetensors can hold", error);
        let header = Metadata::new(Some(metadata.into_iter().collect()), infos);
        let header = header.map_err(|error| refused(error.to_string()))?;
        let mut header = serde_json::to_value(&header).map_err(|error| refused(error.to_string()))?;
        // The library keeps it as a hash map, without an order.
        if let Some(metadata) = header.get_mut("__metadata__") {
            metadata.sort_all_objects();
        }
        let mut json = serde_json::to_vec(&header).map_err(|error| refused(error.to_string()))?;
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);
        Ok(Layout { header, tensors })
    }

    /// The file, in pieces.
    pub(crate) fn pieces(&self) -> Vec<&[u8]> {
        let tensors = self.tensors.iter().map(TensorBytes::as_slice);
        [self.header.as_slice()].into_iter().chain(tensors).collect()
    }
}

/// The bytes of a safetensors file, as [`Layout::of`] has them.
///
/// # Errors
/// Those of [`Layout::of`].
pub(crate) fn serialize(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    Ok(Layout::of(tensors)?.pieces().concat())
}

/// [`serialize`] with more entries in the header's metadata.
///
/// # Errors
/// Those of [`Layout::of`].
pub(crate) fn serialize_with(
    tensors: &BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    Ok(Layout::with_metadata(tensors, metadata)?.pieces().concat())
}

/// All tensors of a file, on the CPU.
///
/// # Errors
/// [`Error::Io`]; [`Error::Corrupt`] for a file that is torn or not
/// safetensors, with the reason.
pub(crate) fn read(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    deserialize(path, &bytes)
}

/// The names of a file's tensors, sorted; only its header is read.
///
/// # Errors
/// Those of [`read`].
pub(crate) fn names(path: &Path) -> Result<Vec<String>> {
    let mapped = Mapped::open(path)?;
    let (_, header) = SafeTensors::read_metadata(mapped.bytes()).map_err(|error| torn(path, error))?;
    let mut names: Vec<String> = header.tensors().into_keys().collect();
    names.sort();
    Ok(names)
}

/// [`read`] for bytes in memory; `path` is named in errors.
pub(crate) fn deserialize(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    tensors(path, bytes, tensor_from_bytes)
}

/// The same without copying: the tensors are views of the buffer, to be read
/// only.
pub(crate) fn views(path: &Path, buffer: &Buffer) -> Result<BTreeMap<String, Tensor>> {
    let bytes = buffer.as_slice();
    let start = |data: &[u8]| data.as_ptr().addr() - bytes.as_ptr().addr();
    tensors(path, bytes, |data, shape, kind| buffer.view(start(data), shape, kind))
}

/// The entries of the header's metadata.
///
/// # Errors
/// [`Error::Corrupt`].
pub(crate) fn metadata(path: &Path, bytes: &[u8]) -> Result<HashMap<String, String>> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| torn(path, error))?;
    Ok(header.metadata().clone().unwrap_or_default())
}

fn torn(path: &Path, error: SafeTensorError) -> Error {
    Error::corrupt(path, format!("not a whole safetensors file ({error})"))
}

/// Each tensor of a file as `make` has it, from its bytes, shape and dtype.
fn tensors(
    path: &Path,
    bytes: &[u8],
    make: impl Fn(&[u8], &[i64], Kind) -> Result<Tensor>,
) -> Result<BTreeMap<String, Tensor>> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| torn(path, error))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let kind = kind(view.dtype())
            .ok_or_else(|| Error::corrupt(path, format!("{name} has dtype {:?}, unknown to libtorch", view.dtype())))?;
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        tensors.insert(name, make(view.data(), &shape, kind)?);
    }
    Ok(tensors)
}

fn dtype(name: &str, kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Uint8 => Dtype::U8,
        Kind::Int8 => Dtype::I8,
        Kind::Int16 => Dtype::I16,
        Kind::Int => Dtype::I32,
        Kind::Int64 => Dtype::I64,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::Bool => Dtype::BOOL,
        other => return Err(Error::config(name, "a dtype that safetensors has", format!("{other:?}"))),
    })
}

fn kind(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::U8 => Kind::Uint8,
        Dtype::I8 => Kind::Int8,
        Dtype::I16 => Kind::Int16,
        Dtype::I32 => Kind::Int,
        Dtype::I64 => Kind::Int64,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}
