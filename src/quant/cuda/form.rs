//! What the kernels are told of a packed weight: the struct `Weight` of
//! `csrc/kernels/formats.cuh`.

use crate::error::{Error, Result};
use crate::ffi::cuda::{Argument, aligned};
use crate::quant::{Fp8Format, PackedWeight, Scheme};
use tch::{Kind, Tensor};

/// Units of a weight are counted in 32 bits on the device.
const UNITS: i64 = u32::MAX as i64;

/// The name of a dtype in `csrc/kernels/common.cuh`.
pub(super) fn type_name(kind: Kind) -> Result<&'static str> {
    match kind {
        Kind::Float => Ok("f32"),
        Kind::BFloat16 => Ok("bf16"),
        Kind::Half => Ok("f16"),
        other => Err(Error::Mismatch {
            name: "dtype of a kernel".into(),
            expected: "f32, bf16 or f16".into(),
            found: format!("{other:?}"),
        }),
    }
}

/// A packed weight as kernels see it.
#[derive(Debug)]
pub(super) struct Form {
    /// A format of `formats.cuh`, for weights of dtype `W`, rounded to `B`.
    pub(super) format: &'static str,
    pub(super) kind: Kind,
    pub(super) rows: i64,
    pub(super) inn: i64,
    /// Whether rows and blocks are whole units of eight elements.
    pub(super) units: bool,
    bytes: Tensor,
    scales: Tensor,
    /// Codes of scales, shifts or zeros.
    more: Option<Tensor>,
    /// Map, factors and sum of doubly quantised scales.
    nested: Option<[Tensor; 3]>,
    block: i64,
    packed_rows: i64,
    /// Elements whose codes are in 16 bytes.
    chunk: i64,
}

impl Form {
    /// `None` for a weight that has no kernel.
    pub(super) fn of(weight: &dyn PackedWeight) -> Result<Option<Form>> {
        let Some(scheme) = weight.scheme() else { return Ok(None) };
        let [rows, inn] = weight.shape();
        let mut tensors = weight.tensors()?;
        let mut take = |name: &str| {
            let at = tensors.iter().position(|(n, _)| n == name)?;
            Some(tensors.swap_remove(at).1)
        };
        let (mut more, mut nested, mut packed_rows, mut block) = (None, None, 1, inn);
        let Some(bytes) = take("weight") else { return Ok(None) };
        let scales = take(match scheme {
            Scheme::LlmInt8 => "SCB",
            Scheme::Nf4 { .. } | Scheme::Fp4 { .. } => "weight.absmax",
            _ => "weight.scale",
        });
        let Some(mut scales) = scales else { return Ok(None) };
        let format = match scheme {
            Scheme::Int8 => "Bytes<I8, W, B>",
            Scheme::Fp8 { format: Fp8Format::E4m3 } => "Bytes<E4m3, W, B>",
            Scheme::Fp8 { format: Fp8Format::E5m2 } => "Bytes<E5m2, W, B>",
            Scheme::LlmInt8 => "Absmax<W, B>",
            Scheme::Nf4 { block_size, double_quant } | Scheme::Fp4 { block_size, double_quant } => {
                block = block_size;
                if double_quant {
                    let parts = ["weight.nested_quant_map", "weight.nested_absmax", "weight.nested_offset"].map(take);
                    let [Some(map), Some(factors), Some(offset)] = parts else { return Ok(None) };
                    // The codes are no scales: the kernel reads these from the map.
                    more = Some(std::mem::replace(&mut scales, map.shallow_clone()));
                    nested = Some([map, factors, offset]);
                }
                match (matches!(scheme, Scheme::Fp4 { .. }), double_quant) {
                    (false, false) => "Codes<Nf4, Plain, W, B>",
                    (false, true) => "Codes<Nf4, Doubled, W, B>",
                    (true, false) => "Codes<Fp4, Plain, W, B>",
                    (true, true) => "Codes<Fp4, Doubled, W, B>",
                }
            }
            Scheme::Int4 { .. } | Scheme::Int2 { .. } => {
                (packed_rows, block) = bytes.size2()?;
                more = take("weight.shift");
                if matches!(scheme, Scheme::Int4 { .. }) { "Groups<4, W, B>" } else { "Groups<2, W, B>" }
            }
            Scheme::Mxfp4 => "Powers<W, B>",
            Scheme::Gptq { group_size } => {
                // Groups out of order are left to the operators.
                if group_size % 2 != 0 || inn % group_size != 0 || !weight.in_order() {
                    return Ok(None);
                }
                block = group_size;
                more = take("weight.zero");
                "Zeros<W, B>"
            }
            // Served by their own operators.
            Scheme::Bf16 | Scheme::F16 => return Ok(None),
        };
        let units = inn % 8 == 0 && block % 8 == 0 && rows * inn / 8 <= UNITS && aligned(&bytes);
        // Int4's and int2's bytes hold one code of a row each.
        let nibbles = matches!(scheme, Scheme::Nf4 { .. } | Scheme::Fp4 { .. } | Scheme::Mxfp4 | Scheme::Gptq { .. });
        let (kind, chunk) = (weight.kind(), if nibbles { 32 } else { 16 });
        Ok(Some(Form { format, kind, rows, inn, units, bytes, scales, more, nested, block, packed_rows, chunk }))
    }

    /// Whether blocks are whole numbers of 16 bytes, and rows of four times that.
    pub(super) fn chunks(&self) -> bool {
        self.units && self.block % self.chunk == 0 && self.inn % (4 * self.chunk) == 0
    }

    /// Elements whose codes are in eight bytes, if rows and blocks are whole numbers of these.
    pub(super) fn half_chunk(&self) -> Option<i64> {
        let half = self.chunk / 2;
        (self.units && self.block % half == 0 && self.inn % half == 0).then_some(half)
    }

    /// The fields of `Weight`.
    pub(super) fn arguments(&self) -> Vec<Argument<'_>> {
        fn optional(tensor: Option<&Tensor>) -> Argument<'_> {
            tensor.map_or(Argument::Absent, Argument::Read)
        }
        let nested = |i: usize| optional(self.nested.as_ref().and_then(|parts| parts.get(i)));
        vec![
            Argument::Read(&self.bytes),
            Argument::Read(&self.scales),
            optional(self.more.as_ref()),
            nested(0),
            nested(1),
            nested(2),
            Argument::Int(self.inn),
            Argument::Int(self.block),
            Argument::Int(self.packed_rows),
        ]
    }
}
