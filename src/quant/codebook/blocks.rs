//! Block-wise nearest codes with libtorch's operators: the path of every
//! device, and of the scales under double quantisation.

use crate::error::Result;
use tch::{Kind, Tensor};

/// bitsandbytes' floor for the scale of a block, so that zeros divide.
pub(super) const TINY: f64 = 1e-38;

/// Nearest of the rising values of `code`, as indices (u8, one per value; ties
/// to the lower), and scales `max|x|` of
/// an f32 vector in blocks. The arithmetic is bitsandbytes', step by step: a
/// full block is multiplied by the reciprocal of its scale, a short last one
/// divided by it.
pub(super) fn quantize_blocks(values: &Tensor, block: i64, code: &Tensor) -> Result<(Tensor, Tensor)> {
    let len = values.size1()?;
    let full = len - len % block;
    let mut scaled = Vec::new();
    let mut scales = Vec::new();
    if full > 0 {
        let blocks = values.f_narrow(0, 0, full)?.f_view([-1, block])?;
        let absmax = blocks.f_abs()?.f_amax([1], true)?;
        let factor = absmax.f_clamp_min(TINY)?.f_reciprocal()?;
        scaled.push(blocks.f_mul(&factor)?.f_clamp_(-1.0, 1.0)?.f_view([-1])?);
        scales.push(absmax.f_view([-1])?);
    }
    if full < len {
        let rest = values.f_narrow(0, full, len - full)?;
        let absmax = rest.f_abs()?.f_amax([0], true)?.f_clamp_min(TINY)?;
        scaled.push(rest.f_div(&absmax)?.f_clamp_(-1.0, 1.0)?);
        scales.push(absmax);
    }
    let n = code.size1()?;
    let bounds = code.f_narrow(0, 0, n - 1)?.f_add(&code.f_narrow(0, 1, n - 1)?)?.f_div_scalar(2.0)?;
    let codes = Tensor::f_cat(&scaled, 0)?.f_bucketize(&bounds, true, false)?;
    Ok((codes.f_to_kind(Kind::Uint8)?, Tensor::f_cat(&scales, 0)?))
}

/// Two codes per byte. An odd one out is paired with `filler`, the code of 0.
pub(super) fn pack_nibbles(codes: &Tensor, filler: u8) -> Result<Tensor> {
    let odd = codes.size1()? % 2;
    let filler = Tensor::f_full([odd], i64::from(filler), (Kind::Uint8, codes.device()))?;
    let codes = Tensor::f_cat(&[codes.shallow_clone(), filler], 0)?;
    let pairs = codes.f_view([-1, 2])?;
    let high = pairs.f_select(1, 0)?.f_bitwise_left_shift_tensor_scalar(4)?;
    Ok(high.f_bitwise_or_tensor(&pairs.f_select(1, 1)?)?)
}
