//! Tensors in 8 bits with one scale for each block of 256 values.

use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use crate::quant::dynamic_map;
use tch::{Device, Kind, Tensor};

/// Values that share a scale.
pub(super) const BLOCK: i64 = 256;

/// A table of 256 sorted values in [-1, 1] with the midpoints between them.
#[derive(Debug)]
pub(super) struct Code {
    values: SharedTensor,
    midpoints: SharedTensor,
}

impl Code {
    /// The dynamic map, as `bitsandbytes.functional.create_dynamic_map` makes it.
    pub(super) fn dynamic(signed: bool, device: Device) -> Result<Code> {
        let values = dynamic_map(signed)?;
        let midpoints: Vec<f32> = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        let on = |values: &[f32]| -> Result<SharedTensor> {
            Ok(SharedTensor::new(Tensor::f_from_slice(values)?.f_to_device(device)?))
        };
        Ok(Code { values: on(&values)?, midpoints: on(&midpoints)? })
    }

    /// The table, f32 (256).
    pub(super) fn values(&self) -> Tensor {
        self.values.get()
    }

    /// Half-way between neighbours in the table, f32 (255).
    pub(super) fn midpoints(&self) -> Tensor {
        self.midpoints.get()
    }

    /// The scales that stand for all zeros: one for each block, f32.
    pub(super) fn zero_scales(values: i64, device: Device) -> Result<Tensor> {
        Ok(Tensor::f_zeros([(values + BLOCK - 1) / BLOCK], (Kind::Float, device))?)
    }

    /// f32 values of the codes' shape: table value times the block's scale.
    pub(super) fn dequantize(&self, codes: &Tensor, scales: &Tensor) -> Result<Tensor> {
        let values = self.values.get().f_index_select(0, &codes.f_flatten(0, -1)?.f_to_kind(Kind::Int)?)?;
        let blocks = into_blocks(&values)?.f_mul(&scales.f_unsqueeze(1)?)?;
        Ok(blocks.f_flatten(0, -1)?.f_narrow(0, 0, codes.numel() as i64)?.f_view_as(codes)?)
    }

    /// The u8 codes, in the shape of the f32 `values`, and the scales: the
    /// largest magnitude of each block. A code is that of the nearest table
    /// value, the lower of two equally near.
    pub(super) fn quantize(&self, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let blocks = into_blocks(&values.f_flatten(0, -1)?)?;
        let scales = blocks.f_abs()?.f_amax(1, false)?;
        // A block of zeros is divided by 1.
        let divisors = scales.f_add(&scales.f_eq(0.0)?)?.f_unsqueeze(1)?;
        let codes = blocks.f_div(&divisors)?.f_bucketize(&self.midpoints.get(), true, false)?;
        let codes = codes.f_flatten(0, -1)?.f_narrow(0, 0, values.numel() as i64)?;
        Ok((codes.f_to_kind(Kind::Uint8)?.f_view_as(values)?, scales))
    }
}

/// Rows of [`BLOCK`] values, the last filled up with zeros.
fn into_blocks(values: &Tensor) -> Result<Tensor> {
    let missing = (BLOCK - values.numel() as i64 % BLOCK) % BLOCK;
    let whole = if missing == 0 { values.shallow_clone() } else { values.f_constant_pad_nd([0, missing])? };
    Ok(whole.f_view([-1, BLOCK])?)
}
