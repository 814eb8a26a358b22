//! GPTQ's and AWQ's layouts of 4-bit weights, which both hold the weight
//! transposed, eight codes to an i32.
//!
//! | tensor | GPTQ | AWQ (`gemm`) |
//! |---|---|---|
//! | `qweight` i32 | (in / 8, out) | (in, out / 8) |
//! | `qzeros` i32 | (groups, out / 8), less 1 in its first version | (groups, out / 8) |
//! | `scales` | (groups, out) | (groups, out) |
//! | `g_idx` i32 | (in), the group of each column; may be missing | |
//!
//! GPTQ's nibbles are in order. AWQ's hold columns 0, 2, 4, 6, 1, 3, 5, 7.

use super::{Files, Wanted};
use crate::error::Result;
use crate::quant::gptq::pairs;
use crate::quant::{Parts, Scheme, matrix};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Where column `i` of eight is among AWQ's nibbles.
const AWQ_ORDER: [i64; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

pub(super) fn read(files: &Files, wanted: Wanted<'_>) -> Result<Parts> {
    let [out, inn] = matrix(wanted.sizes);
    let tensor = |name: &str| files.take(&wanted.key(name), wanted.device);
    let (qweight, qzeros, scales) = (tensor("qweight")?, tensor("qzeros")?, tensor("scales")?);
    let kind = scales.f_kind()?;
    let mut parts = wanted.parts(Scheme::Gptq { group_size: inn }, kind, BTreeMap::new());
    let checked = |parts: &Parts, name: &str, t: &Tensor, shape: &[i64], expected: Kind| {
        if t.f_kind()? == expected && t.size() == shape {
            return Ok(());
        }
        Err(parts.wrong(name, format!("{expected:?} {shape:?}"), format!("{:?} {:?}", t.f_kind()?, t.size())))
    };
    let bits = files.config("bits");
    if bits.as_i64().is_some_and(|bits| bits != 4) {
        return Err(parts.wrong("qweight", "4 bits", format!("{bits} bits")));
    }
    let &[groups, _] = scales.size().as_slice() else {
        return Err(parts.wrong("scales", "(groups, out)", format!("{:?}", scales.size())));
    };
    if groups < 1 || groups > inn {
        return Err(parts.wrong("scales", format!("1 to {inn} groups"), groups.to_string()));
    }
    // Groups but the last are equally long.
    let group_size = match files.config("group_size").as_i64() {
        Some(size) if size > 0 => size.min(inn),
        Some(_) => inn,
        None => (inn + groups - 1) / groups,
    };
    if (inn + group_size - 1) / group_size != groups {
        let expected = format!("{} groups of {group_size}", (inn + group_size - 1) / group_size);
        return Err(parts.wrong("scales", expected, groups.to_string()));
    }
    checked(&parts, "scales", &scales, &[groups, out], kind)?;
    checked(&parts, "qzeros", &qzeros, &[groups, (out + 7) / 8], Kind::Int)?;
    let awq = qweight.size() == [inn, (out + 7) / 8] && inn != (inn + 7) / 8;
    let shape = if awq { [inn, (out + 7) / 8] } else { [(inn + 7) / 8, out] };
    checked(&parts, "qweight", &qweight, &shape, Kind::Int)?;

    // Codes of the weight as (out, in), of the zeros as (out, groups).
    let (codes, mut zeros) = if awq {
        (nibbles(&qweight, 1, true)?.f_narrow(1, 0, out)?, nibbles(&qzeros, 1, true)?)
    } else {
        (nibbles(&qweight, 0, false)?.f_narrow(0, 0, inn)?, nibbles(&qzeros, 1, false)?)
    };
    let first_version = files.config("checkpoint_format").as_str() != Some("gptq_v2");
    if !awq && first_version {
        zeros = zeros.f_add_scalar(1)?;
    }
    let g_idx = wanted.key("g_idx");
    let group = if files.has(&g_idx) {
        let group = files.take(&g_idx, wanted.device)?;
        checked(&parts, "g_idx", &group, &[inn], Kind::Int)?;
        group.f_to_kind(Kind::Int64)?
    } else {
        let columns = Tensor::f_arange(inn, (Kind::Int64, wanted.device))?;
        columns.f_divide_scalar_mode(group_size, "floor")?
    };
    parts.scheme = Scheme::Gptq { group_size };
    for (name, tensor) in [
        ("weight", pairs(&codes.f_tr()?)?),
        ("weight.scale", scales.f_tr()?.f_contiguous()?),
        ("weight.zero", zeros.f_narrow(1, 0, out)?.f_tr()?.f_contiguous()?),
        ("weight.group", group),
    ] {
        parts.tensors.insert(name.into(), tensor);
    }
    Ok(parts)
}

/// The eight codes (u8) of each i32, side by side along `dim`.
fn nibbles(packed: &Tensor, dim: i64, awq: bool) -> Result<Tensor> {
    let mut codes = Vec::with_capacity(8);
    for i in 0..8i64 {
        let place = if awq { AWQ_ORDER[i as usize] } else { i };
        let shifted = packed.f_bitwise_right_shift_tensor_scalar(4 * place)?;
        codes.push(shifted.f_bitwise_and(15)?.f_to_kind(Kind::Uint8)?);
    }
    let (rows, columns) = packed.size2()?;
    let shape = if dim == 0 { [8 * rows, columns] } else { [rows, 8 * columns] };
    Ok(Tensor::f_stack(&codes, dim + 1)?.f_reshape(shape)?)
}
