//! On-disk layouts of packed weights.
//!
//! | layout | schemes | read | written |
//! |---|---|---|---|
//! | [`bnb`]: bitsandbytes, as `transformers` saves it | nf4, fp4, llm_int8 | yes | yes |
//! | [`quanto`]: optimum-quanto's state dictionary | int8, int4, int2, fp8 | yes | yes |
//! | [`gptq`]: GPTQ, and AWQ's `gemm` | gptq | yes | |
//! | `native`: the tensors as they are in memory | mxfp4, bf16, f16, gptq | yes | yes |
//!
//! Readers take nothing on trust: dtypes, shapes and values are checked in
//! [`assemble`](super::assemble), against the module's own sizes.

mod bnb;
mod files;
mod gptq;
mod quanto;
mod write;

pub(crate) use files::Files;
pub(crate) use write::{MAP_FILE, Shard, write_json, write_shards};

use super::act_order::ORDER;
use super::{Parts, Scheme};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// What the index of a folder that we wrote says about a packed weight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub(crate) scheme: Scheme,
    /// The dtype of its values, as safetensors names it.
    pub(crate) dtype: String,
}

/// A weight of the module that is to be loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// The module's path.
    pub(crate) path: &'a str,
    pub(crate) sizes: &'a [i64],
    /// The module's own dtype, for layouts that don't record one.
    pub(crate) kind: Kind,
    pub(crate) device: Device,
}

impl Wanted<'_> {
    /// The key of one of the module's tensors.
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.path)
    }

    fn parts(&self, scheme: Scheme, kind: Kind, tensors: BTreeMap<String, Tensor>) -> Parts {
        Parts { name: self.key("weight"), scheme, sizes: self.sizes.to_vec(), kind, tensors }
    }
}

/// The parts of the weight of a module, in whatever layout the files have it.
/// `None` if they have it dense, or not at all.
pub(crate) fn read(files: &Files, wanted: Wanted<'_>) -> Result<Option<Parts>> {
    let record = files.record(&wanted.key("weight"));
    if let Some(parts) = bnb::read(files, wanted)? {
        return agree(parts, record).map(Some);
    }
    if let Some(parts) = quanto::read(files, wanted, record)? {
        return agree(parts, record).map(Some);
    }
    if files.has(&wanted.key("qweight")) {
        return gptq::read(files, wanted).map(Some);
    }
    record.map(|record| native(files, wanted, record)).transpose()
}

/// What is packed in a file must be what its index says.
fn agree(mut parts: Parts, record: Option<&Record>) -> Result<Parts> {
    let Some(record) = record else { return Ok(parts) };
    if dtype_name(parts.kind) != record.dtype {
        return Err(parts.wrong("", format!("{} as recorded", record.dtype), dtype_name(parts.kind)));
    }
    // Files don't tell whether there was a search.
    let plain = |scheme| match scheme {
        Scheme::Int4 { group_size, .. } => Scheme::Int4 { group_size, hqq: false },
        Scheme::Int2 { group_size, .. } => Scheme::Int2 { group_size, hqq: false },
        other => other,
    };
    if plain(parts.scheme) != plain(record.scheme) {
        return Err(parts.wrong("", format!("{} as recorded", record.scheme), parts.scheme.to_string()));
    }
    parts.scheme = record.scheme;
    Ok(parts)
}

/// The names of the tensors that a scheme has in memory.
fn native_names(scheme: Scheme) -> &'static [&'static str] {
    match scheme {
        Scheme::Mxfp4 => &["weight", "weight.scale"],
        Scheme::Gptq { .. } => &["weight", "weight.scale", "weight.zero", "weight.group"],
        _ => &["weight"],
    }
}

fn native(files: &Files, wanted: Wanted<'_>, record: &Record) -> Result<Parts> {
    let kind = kind_named(&record.dtype)
        .ok_or_else(|| files.corrupt(format!("{} has the dtype {}, unknown here", wanted.path, record.dtype)))?;
    let mut tensors = BTreeMap::new();
    // Only a weight whose columns lie in an order of their own has one.
    let order = files.has(&wanted.key(ORDER)).then_some(ORDER);
    for name in native_names(record.scheme).iter().copied().chain(order) {
        tensors.insert(name.to_string(), files.take(&wanted.key(name), wanted.device)?);
    }
    Ok(wanted.parts(record.scheme, kind, tensors))
}

/// A packed weight as it goes to disk: keys and tensors.
pub(crate) fn write(path: &str, parts: Parts) -> Result<Vec<(String, Tensor)>> {
    let tensors = match parts.scheme {
        Scheme::Nf4 { .. } | Scheme::Fp4 { .. } => bnb::write(parts)?,
        Scheme::LlmInt8 => bnb::write_int8(parts)?,
        Scheme::Int8 | Scheme::Int4 { .. } | Scheme::Int2 { .. } | Scheme::Fp8 { .. } => quanto::write(parts)?,
        Scheme::Mxfp4 | Scheme::Bf16 | Scheme::F16 | Scheme::Gptq { .. } => parts.tensors.into_iter().collect(),
    };
    Ok(tensors.into_iter().map(|(name, tensor)| (format!("{path}.{name}"), tensor)).collect())
}

/// quanto's name of a scheme, for its quantisation map; `None` for schemes, or
/// groups, that it doesn't have.
pub(crate) fn quanto_name(scheme: Scheme, sizes: &[i64]) -> Option<&'static str> {
    quanto::qtype(scheme, sizes)
}

/// A tensor that must be there.
fn taken(tensors: &mut BTreeMap<String, Tensor>, name: &str, weight: &str) -> Result<Tensor> {
    tensors.remove(name).ok_or_else(|| Error::Mismatch {
        name: format!("{weight}: {name}"),
        expected: "a tensor".into(),
        found: "none".into(),
    })
}

/// safetensors' dtypes by their names, as far as libtorch has them.
const DTYPES: [(&str, Kind); 12] = [
    ("U8", Kind::Uint8),
    ("I8", Kind::Int8),
    ("I16", Kind::Int16),
    ("I32", Kind::Int),
    ("I64", Kind::Int64),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("F32", Kind::Float),
    ("F64", Kind::Double),
    ("BOOL", Kind::Bool),
    ("F8_E4M3", Kind::Float8e4m3fn),
    ("F8_E5M2", Kind::Float8e5m2),
];

fn dtype_name(kind: Kind) -> &'static str {
    DTYPES.iter().find(|(_, k)| *k == kind).map_or("unknown", |(name, _)| name)
}

fn kind_named(name: &str) -> Option<Kind> {
    DTYPES.iter().find(|(n, _)| *n == name).map(|(_, kind)| *kind)
}
