//! bitsandbytes' layouts, as `transformers` saves them.

use super::{Files, Wanted, dtype_name, kind_named, taken};
use crate::error::Result;
use crate::quant::{Parts, Scheme, matrix};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// What the names of the JSON blobs of 4-bit weights begin with.
const STATE: &str = "weight.quant_state.bitsandbytes__";

/// The JSON blob, its fields in bitsandbytes' order.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    quant_type: String,
    blocksize: i64,
    dtype: String,
    shape: Vec<i64>,
    #[serde(flatten)]
    nested: Option<Nested>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Nested {
    nested_blocksize: i64,
    nested_dtype: String,
    nested_offset: f64,
}

/// torch's names of the dtypes of weights.
const DTYPES: [(&str, Kind); 3] = [("float32", Kind::Float), ("bfloat16", Kind::BFloat16), ("float16", Kind::Half)];

pub(super) fn read(files: &Files, wanted: Wanted<'_>) -> Result<Option<Parts>> {
    let prefix = wanted.key(STATE);
    if let Some(blob) = files.beginning(&prefix).next() {
        return four_bit(files, wanted, blob).map(Some);
    }
    if files.has(&wanted.key("SCB")) {
        return int8(files, wanted).map(Some);
    }
    Ok(None)
}

fn four_bit(files: &Files, wanted: Wanted<'_>, blob: &str) -> Result<Parts> {
    let broken = |reason: String| files.corrupt(format!("{blob}: {reason}"));
    if files.describe(blob).is_none_or(|(shape, kind)| shape.len() != 1 || kind != Kind::Uint8) {
        return Err(broken("expected a vector of bytes".into()));
    }
    let bytes = Vec::<u8>::try_from(files.take(blob, Device::Cpu)?)?;
    let state: State = serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
    let kind = DTYPES.iter().find(|(name, _)| *name == state.dtype).map(|(_, kind)| *kind);
    let kind = kind.ok_or_else(|| broken(format!("dtype {:?}, expected float32, bfloat16 or float16", state.dtype)))?;
    let (block_size, double_quant) = (state.blocksize, state.nested.is_some());
    if !crate::quant::scheme::valid_block(block_size) {
        return Err(broken(format!("block size {block_size}, expected a power of two from 32 to 4096")));
    }
    let scheme = match state.quant_type.as_str() {
        "nf4" => Scheme::Nf4 { block_size, double_quant },
        "fp4" => Scheme::Fp4 { block_size, double_quant },
        other => return Err(broken(format!("quantisation type {other:?}, expected nf4 or fp4"))),
    };
    let mut parts = wanted.parts(scheme, kind, BTreeMap::new());
    if state.shape != wanted.sizes {
        return Err(parts.wrong("", format!("{:?}", wanted.sizes), format!("{:?}", state.shape)));
    }
    // The bytes may be stored under another dtype (`bnb_4bit_quant_storage`).
    let len: i64 = wanted.sizes.iter().product();
    let data = files.take(&wanted.key("weight"), wanted.device)?.f_contiguous()?.f_view([-1])?;
    let data = data.f_view_dtype(Kind::Uint8)?;
    if data.size1()? != (len + 1) / 2 {
        return Err(parts.wrong("weight", format!("{} bytes", (len + 1) / 2), format!("{} bytes", data.size1()?)));
    }
    parts.tensors.insert("weight".into(), data.f_unsqueeze(1)?);
    let names: &[&str] = match state.nested {
        None => &["weight.absmax", "weight.quant_map"],
        Some(_) => &["weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"],
    };
    for name in names {
        parts.tensors.insert((*name).to_string(), files.take(&wanted.key(name), wanted.device)?);
    }
    if let Some(nested) = state.nested {
        if (nested.nested_blocksize, nested.nested_dtype.as_str()) != (256, "float32") {
            let found = format!("{} in {}", nested.nested_blocksize, nested.nested_dtype);
            return Err(broken(format!("nested blocks of {found}, expected 256 in float32")));
        }
        let offset = Tensor::from(nested.nested_offset as f32).f_to_device(wanted.device)?;
        parts.tensors.insert("weight.nested_offset".into(), offset);
    }
    Ok(parts)
}

fn int8(files: &Files, wanted: Wanted<'_>) -> Result<Parts> {
    let format = wanted.key("weight_format");
    if files.has(&format) {
        let format = files.take(&format, Device::Cpu)?;
        if format.numel() != 1 || i64::try_from(format.f_flatten(0, -1)?.f_select(0, 0)?)? != 0 {
            let parts = wanted.parts(Scheme::LlmInt8, wanted.kind, BTreeMap::new());
            return Err(parts.wrong("weight_format", "0, rows", "another, of older versions: save the model again"));
        }
    }
    let data = files.take(&wanted.key("weight"), wanted.device)?;
    let scb = files.take(&wanted.key("SCB"), wanted.device)?;
    let sizes = matrix(wanted.sizes);
    let data = if data.size() == wanted.sizes { data.f_reshape(sizes)? } else { data };
    let tensors = BTreeMap::from([("weight".to_string(), data), ("SCB".to_string(), scb.f_flatten(0, -1)?)]);
    // The file doesn't say which dtype the weight had.
    let kind = files.record(&wanted.key("weight")).and_then(|record| kind_named(&record.dtype));
    Ok(wanted.parts(Scheme::LlmInt8, kind.unwrap_or(wanted.kind), tensors))
}

/// A 4-bit weight, with its blob.
pub(super) fn write(mut parts: Parts) -> Result<Vec<(String, Tensor)>> {
    let name = &parts.name;
    let (quant_type, blocksize) = match parts.scheme {
        Scheme::Fp4 { block_size, .. } => ("fp4", block_size),
        Scheme::Nf4 { block_size, .. } => ("nf4", block_size),
        other => return Err(parts.wrong("", "nf4 or fp4", other.to_string())),
    };
    let nested = match parts.tensors.contains_key("weight.nested_offset") {
        false => None,
        true => Some(Nested {
            nested_blocksize: 256,
            nested_dtype: "float32".into(),
            nested_offset: f64::try_from(taken(&mut parts.tensors, "weight.nested_offset", name)?)?,
        }),
    };
    let dtype = DTYPES.iter().find(|(_, kind)| *kind == parts.kind).map_or(dtype_name(parts.kind), |(name, _)| name);
    let state =
        State { quant_type: quant_type.into(), blocksize, dtype: dtype.into(), shape: parts.sizes.clone(), nested };
    // Python's json puts a space after commas and colons.
    let blob =
        python_json(&serde_json::to_value(&state).map_err(|error| parts.wrong("", "a JSON blob", error.to_string()))?);
    let mut tensors: Vec<(String, Tensor)> = parts.tensors.into_iter().collect();
    tensors.push((format!("{STATE}{quant_type}"), Tensor::f_from_slice(blob.as_bytes())?));
    Ok(tensors)
}

/// An 8-bit weight.
pub(super) fn write_int8(parts: Parts) -> Result<Vec<(String, Tensor)>> {
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (name, tensor) in parts.tensors {
        let tensor = if name == "weight" { tensor.f_view(parts.sizes.as_slice())? } else { tensor };
        tensors.push((name, tensor));
    }
    tensors.push(("weight_format".into(), Tensor::f_zeros([] as [i64; 0], (Kind::Uint8, Device::Cpu))?));
    Ok(tensors)
}

/// A flat JSON object as Python's `json.dumps` writes it.
fn python_json(value: &serde_json::Value) -> String {
    use serde_json::Value;
    let list = |items: Vec<String>| items.join(", ");
    match value {
        Value::Object(fields) => {
            let fields =
                fields.iter().map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), python_json(value)));
            format!("{{{}}}", list(fields.collect()))
        }
        Value::Array(items) => format!("[{}]", list(items.iter().map(python_json).collect())),
        other => other.to_string(),
    }
}
