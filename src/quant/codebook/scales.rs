//! The scales of blocks, as they are or quantised themselves.

use super::Parts;
use super::blocks::quantize_blocks;
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use crate::quant::dynamic_map::dynamic_map;
use crate::quant::kernels::Double;
use tch::{Device, Kind, Tensor};

/// Scales that share a scale of their own under double quantisation.
const NESTED_BLOCK: i64 = Double::NESTED_BLOCK as i64;

/// One scale per block.
#[derive(Debug)]
pub(super) enum Scales {
    /// f32 (blocks).
    Plain(SharedTensor),
    /// `map[codes[b]] · nested[b / 256] + offset`
    Double {
        /// u8 (blocks).
        codes: SharedTensor,
        /// f32 (256).
        map: SharedTensor,
        /// f32 (⌈blocks / 256⌉).
        nested: SharedTensor,
        /// f32 scalar, the mean of the scales.
        offset: SharedTensor,
    },
}

impl Scales {
    /// Quantises the scales around their mean.
    pub(super) fn double(absmax: &Tensor) -> Result<Self> {
        // Each device sums up in an order of its own; the bytes are the same on all of them.
        let on_cpu = absmax.f_to_device(Device::Cpu)?;
        let mut offset = on_cpu.f_mean(Kind::Float)?;
        if !f64::try_from(&offset)?.is_finite() {
            // The sum overflowed; the mean of finite scales doesn't.
            offset = on_cpu.f_mean(Kind::Double)?.f_to_kind(Kind::Float)?;
        }
        let offset = offset.f_to_device(absmax.device())?;
        let map = Tensor::f_from_slice(&dynamic_map(true)?)?.f_to_device(absmax.device())?;
        let (codes, nested) = quantize_blocks(&absmax.f_sub(&offset)?, NESTED_BLOCK, &map)?;
        Ok(Scales::Double {
            codes: SharedTensor::new(codes),
            map: SharedTensor::new(map),
            nested: SharedTensor::new(nested),
            offset: SharedTensor::new(offset),
        })
    }

    /// Takes the scales of this many blocks.
    pub(super) fn take(parts: &mut Parts, blocks: i64, double: bool) -> Result<Self> {
        if !double {
            return Ok(Scales::Plain(parts.take("weight.absmax", Kind::Float, &[blocks])?));
        }
        Ok(Scales::Double {
            codes: parts.take("weight.absmax", Kind::Uint8, &[blocks])?,
            map: parts.take("weight.nested_quant_map", Kind::Float, &[256])?,
            nested: parts.take("weight.nested_absmax", Kind::Float, &[(blocks + NESTED_BLOCK - 1) / NESTED_BLOCK])?,
            offset: parts.take("weight.nested_offset", Kind::Float, &[])?,
        })
    }

    /// The tensors by bitsandbytes' names.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&'static str, Tensor)> {
        match self {
            Scales::Plain(absmax) => vec![("absmax", absmax.get())],
            Scales::Double { codes, map, nested, offset } => vec![
                ("absmax", codes.get()),
                ("nested_quant_map", map.get()),
                ("nested_absmax", nested.get()),
                ("nested_offset", offset.get()),
            ],
        }
        .into_iter()
    }

    /// All scales as f32 (blocks).
    pub(super) fn dense(&self) -> Result<Tensor> {
        match self {
            Scales::Plain(absmax) => Ok(absmax.get()),
            Scales::Double { codes, map, nested, offset } => {
                let codes = codes.get().f_to_kind(Kind::Int64)?;
                let scale = nested.get().f_repeat_interleave_self_int(NESTED_BLOCK, 0, None)?;
                let scale = scale.f_narrow(0, 0, codes.size1()?)?;
                Ok(map.get().f_index_select(0, &codes)?.f_mul(&scale)?.f_add(&offset.get())?)
            }
        }
    }
}
