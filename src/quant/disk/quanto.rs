//! optimum-quanto's layout: the state dictionary of a frozen module.

use super::{Files, Record, Wanted, taken};
use crate::error::{Error, Result};
use crate::quant::affine::Layout;
use crate::quant::{Fp8Format, Parts, Scheme, matrix};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// quanto's names of our schemes, in groups by its own rule.
const QTYPES: [(&str, Scheme); 6] = [
    ("qint8", Scheme::Int8),
    ("qint4", Scheme::INT4),
    ("qint2", Scheme::INT2),
    ("qfloat8_e4m3fn", Scheme::FP8),
    ("qfloat8", Scheme::FP8),
    ("qfloat8_e5m2", Scheme::Fp8 { format: Fp8Format::E5m2 }),
];

/// The name, where quanto's groups are the weight's.
pub(super) fn qtype(scheme: Scheme, sizes: &[i64]) -> Option<&'static str> {
    let plain = match scheme {
        Scheme::Int4 { .. } if Layout::of(scheme, sizes) == Layout::of(Scheme::INT4, sizes) => Scheme::INT4,
        Scheme::Int2 { .. } if Layout::of(scheme, sizes) == Layout::of(Scheme::INT2, sizes) => Scheme::INT2,
        other => other,
    };
    QTYPES.iter().find(|(_, scheme)| *scheme == plain).map(|(name, _)| *name)
}

pub(super) fn read(files: &Files, wanted: Wanted<'_>, record: Option<&Record>) -> Result<Option<Parts>> {
    let [whole, grouped] = ["weight._data", "weight._data._data"].map(|name| wanted.key(name));
    let data = if files.has(&grouped) { grouped } else { whole };
    let Some((shape, kind)) = files.describe(&data) else { return Ok(None) };
    let mapped = files.quanto(wanted.path);
    if let Some([_, activations]) = mapped.filter(|[_, activations]| *activations != "none") {
        let field = format!("{}: activations = {activations}", wanted.path);
        return Err(Error::Unsupported { fields: vec![field] });
    }
    let scheme = match (record, mapped, kind) {
        (Some(record), ..) => record.scheme,
        (None, Some([name, _]), _) => QTYPES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, scheme)| *scheme)
            .ok_or_else(|| Error::Unsupported { fields: vec![format!("{}: weights = {name}", wanted.path)] })?,
        (None, None, Kind::Int8) => Scheme::Int8,
        (None, None, Kind::Float8e4m3fn) => Scheme::FP8,
        (None, None, Kind::Float8e5m2) => Scheme::Fp8 { format: Fp8Format::E5m2 },
        (None, None, _) => by_shape(files, wanted, shape)?,
    };
    let scale = files.take(&wanted.key("weight._scale"), wanted.device)?;
    let value_kind = scale.f_kind()?;
    let mut parts = wanted.parts(scheme, value_kind, BTreeMap::new());
    let data = files.take(&data, wanted.device)?;
    let ([data_shape, scale_shape], shift) = match scheme {
        Scheme::Int4 { .. } | Scheme::Int2 { .. } => {
            let Layout { size, groups, byte_rows, .. } = Layout::of(scheme, wanted.sizes);
            ([[byte_rows, size], [groups, 1]], Some(files.take(&wanted.key("weight._shift"), wanted.device)?))
        }
        _ => ([matrix(wanted.sizes), [wanted.sizes[0], 1]], None),
    };
    let insert = |parts: &mut Parts, name: &str, tensor: Tensor, [rows, columns]: [i64; 2]| {
        let (found, numel) = (tensor.size(), tensor.numel() as i64);
        if Some(numel) != rows.checked_mul(columns) {
            return Err(parts.wrong(name, format!("{} values", rows * columns), format!("{found:?}")));
        }
        parts.tensors.insert(name.into(), tensor.f_reshape([rows, columns])?);
        Ok(())
    };
    insert(&mut parts, "weight", data, data_shape)?;
    insert(&mut parts, "weight.scale", scale, scale_shape)?;
    if let Some(shift) = shift {
        insert(&mut parts, "weight.shift", shift, scale_shape)?;
    }
    // The scales of activations mean nothing where these aren't quantised.
    for name in ["input_scale", "output_scale"] {
        files.pass_over(&wanted.key(name));
    }
    Ok(Some(parts))
}

/// Whether packed bytes are of 4 or 2 bits, without a quantisation map.
fn by_shape(files: &Files, wanted: Wanted<'_>, shape: &[i64]) -> Result<Scheme> {
    let bytes = shape.iter().try_fold(1i64, |n, &d| n.checked_mul(d));
    let fits = |scheme| {
        let layout = Layout::of(scheme, wanted.sizes);
        bytes == layout.byte_rows.checked_mul(layout.size)
    };
    match [Scheme::INT4, Scheme::INT2].map(fits) {
        [true, false] => Ok(Scheme::INT4),
        [false, true] => Ok(Scheme::INT2),
        [fits, _] => {
            let reason = if fits { "may be qint4 or qint2" } else { "fits neither qint4 nor qint2" };
            let what = format!("the weight of {}, {shape:?} for {:?}, {reason}", wanted.path, wanted.sizes);
            Err(files.corrupt(format!("{what}; put quanto's quantization_map.json beside the file")))
        }
    }
}

pub(super) fn write(mut parts: Parts) -> Result<Vec<(String, Tensor)>> {
    let (name, scheme, sizes) = (parts.name.clone(), parts.scheme, parts.sizes.clone());
    let data = taken(&mut parts.tensors, "weight", &name)?;
    let scale = taken(&mut parts.tensors, "weight.scale", &name)?;
    // Scales of whole rows have the dimensions of the weight.
    let per_row: Vec<i64> = sizes.iter().enumerate().map(|(i, &size)| if i == 0 { size } else { 1 }).collect();
    let mut tensors = match parts.tensors.remove("weight.shift") {
        Some(shift) => {
            let layout = Layout::of(scheme, &sizes);
            let whole_rows = layout.groups == sizes[0];
            let shaped =
                |t: Tensor| -> Result<Tensor> { Ok(if whole_rows { t.f_reshape(per_row.as_slice())? } else { t }) };
            let data = if whole_rows {
                let mut packed = sizes.clone();
                packed[0] = layout.byte_rows;
                data.f_reshape(packed.as_slice())?
            } else {
                data
            };
            vec![("weight._data._data", data), ("weight._scale", shaped(scale)?), ("weight._shift", shaped(shift)?)]
        }
        None => {
            // One row has one scale for the tensor.
            let scale_shape = if sizes[0] == 1 { vec![] } else { per_row };
            vec![
                ("weight._data", data.f_reshape(sizes.as_slice())?),
                ("weight._scale", scale.f_reshape(scale_shape.as_slice())?),
            ]
        }
    };
    for name in ["input_scale", "output_scale"] {
        tensors.push((name, Tensor::f_ones([] as [i64; 0], (parts.kind, Device::Cpu))?));
    }
    Ok(tensors.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect())
}
