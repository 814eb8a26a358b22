//! Tensors by name, to and from safetensors bytes.

use crate::error::{Error, Result};
use crate::ffi::bytes::{TensorBytes, tensor_from_bytes};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tch::{Kind, Tensor};

/// The bytes of a safetensors file, laid out as the Python library does it:
/// tensors by falling dtype size, then by name.
///
/// # Errors
/// [`Error::Config`] for a dtype that safetensors doesn't have.
pub(crate) fn serialize(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    let mut held = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let shape: Vec<usize> = tensor.size().iter().map(|&d| d as usize).collect();
        held.push((name, dtype(name, tensor.f_kind()?)?, shape, TensorBytes::of(tensor)?));
    }
    let views = held
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((name, TensorView::new(*dtype, shape.clone(), bytes.as_slice())?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
    // What PEFT writes, and what `transformers` wants to see.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|error| Error::config("tensors", "what safetensors can hold", error))
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

/// [`read`] for bytes in memory; `path` is named in errors.
pub(crate) fn deserialize(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| Error::corrupt(path, format!("not a whole safetensors file ({error})")))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let kind = kind(view.dtype())
            .ok_or_else(|| Error::corrupt(path, format!("{name} has dtype {:?}, unknown to libtorch", view.dtype())))?;
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        tensors.insert(name, tensor_from_bytes(view.data(), &shape, kind)?);
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
