//! `mxfp4`: e2m1 floats that share a power of two in blocks of 32.
//!
//! OCP Microscaling Formats specification 1.0, sections 5.3 and 6.3. Blocks
//! don't run over row ends; the last of a row may be short. Element `2i` of a
//! row is the low nibble of byte `i`, as in torch's `float4_e2m1fn_x2`.

use super::kernels::power;
use super::{Meta, PackedWeight, Parts, Scheme, matrix, packing, tiles};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Device, Kind, Tensor};

/// Values that share a scale.
const BLOCK: i64 = 32;
/// Exponent of the largest e2m1 value, 6 = 1.5 · 2².
const LARGEST_EXPONENT: i64 = 2;
/// The code of NaN among the scales.
const NAN_SCALE: i64 = 255;

/// The values of the codes; the upper half has the sign.
pub(super) const CODE: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

#[derive(Debug)]
pub(super) struct Mxfp4 {
    /// u8 (rows, ⌈columns / 2⌉).
    data: SharedTensor,
    /// e8m0 as u8 (rows, ⌈columns / 32⌉): 2^(byte − 127).
    scale: SharedTensor,
    tables: Tables,
    meta: Meta,
}

/// What the codes stand for, f32, where the data is: handing it over in each
/// step would let a device wait for its host.
#[derive(Debug)]
struct Tables {
    /// The values (16).
    values: SharedTensor,
    /// The powers of two (256).
    powers: SharedTensor,
}

impl Tables {
    fn new(device: Device) -> Result<Self> {
        let on = |table: &[f32]| -> Result<SharedTensor> {
            Ok(SharedTensor::new(Tensor::f_from_slice(table)?.f_to_device(device)?))
        };
        Ok(Tables { values: on(&CODE)?, powers: on(&powers())? })
    }
}

/// The power of two of each byte.
fn powers() -> [f32; 256] {
    std::array::from_fn(|byte| power(byte as u8))
}

impl Mxfp4 {
    /// Packs a contiguous, finite weight. The shared exponent of a block is that
    /// of its largest magnitude less 2; elements are rounded to nearest, ties
    /// to even, and saturate at ±6.
    pub(super) fn pack(weight: &Tensor) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let weight = weight.f_view(matrix(&sizes))?;
        let [data, scale] = packing::mxfp4(&weight)?.map_or_else(|| Self::pack_by_operators(&weight), Ok)?;
        let (data, scale, tables) = (SharedTensor::new(data), SharedTensor::new(scale), Tables::new(device)?);
        Ok(Mxfp4 { data, scale, tables, meta: Meta { sizes, kind, device } })
    }

    /// Codes and scales of a weight (rows, columns), with libtorch's operators.
    pub(super) fn pack_by_operators(weight: &Tensor) -> Result<[Tensor; 2]> {
        let (device, (rows, columns)) = (weight.device(), weight.size2()?);
        let blocks = (columns + BLOCK - 1) / BLOCK;
        let data = Tensor::f_empty([rows, (columns + 1) / 2], (Kind::Uint8, device))?;
        let scale = Tensor::f_empty([rows, blocks], (Kind::Uint8, device))?;
        tiles::for_each(rows, columns, |start, rows| {
            let tile = weight.f_narrow(0, start, rows)?.f_to_kind(Kind::Float)?;
            let tile = tile.f_constant_pad_nd([0, blocks * BLOCK - columns])?.f_view([rows, blocks, BLOCK])?;
            let (_, exponent) = tile.f_abs()?.f_amax([2], true)?.f_frexp()?;
            // frexp's mantissa is in [½, 1), and its exponent of zero is zero.
            let zeros = tile.f_eq(0.0)?.f_all_dim(2, true)?;
            let exponent = exponent.f_sub_scalar(1 + LARGEST_EXPONENT)?.f_masked_fill(&zeros, -127)?;
            let byte = exponent.f_add_scalar(127)?.f_clamp_(0, NAN_SCALE - 1)?;
            scale.f_narrow(0, start, rows)?.f_copy_(&byte.f_squeeze_dim(2)?)?;
            let step = Tensor::f_from_slice(&powers())?.f_to_device(device)?.f_take(&byte.f_to_kind(Kind::Int64)?)?;
            let codes = nearest(&tile.f_div(&step)?)?.f_view([rows, blocks * BLOCK / 2, 2])?;
            let high = codes.f_select(2, 1)?.f_bitwise_left_shift_tensor_scalar(4)?;
            let bytes = codes.f_select(2, 0)?.f_bitwise_or_tensor(&high)?;
            data.f_narrow(0, start, rows)?.f_copy_(&bytes.f_narrow(1, 0, (columns + 1) / 2)?)?;
            Ok(())
        })?;
        Ok([data, scale])
    }

    pub(super) fn assemble(mut parts: Parts) -> Result<Self> {
        let ([rows, columns], device) = (matrix(&parts.sizes), parts.device());
        let data = parts.take("weight", Kind::Uint8, &[rows, (columns + 1) / 2])?;
        let scale = parts.take("weight.scale", Kind::Uint8, &[rows, (columns + BLOCK - 1) / BLOCK])?;
        if i64::try_from(scale.get().f_max()?)? == NAN_SCALE {
            return Err(parts.wrong("weight.scale", "finite scales", "NaN"));
        }
        let (sizes, kind) = parts.finish()?;
        Ok(Mxfp4 { data, scale, tables: Tables::new(device)?, meta: Meta { sizes, kind, device } })
    }

    fn unpack(&self, out: &mut Tensor, rows: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let columns = matrix(&self.meta.sizes)[1];
        let (data, scale) = (rows(&self.data.get())?, rows(&self.scale.get())?);
        let n = data.size2()?.0;
        let codes = Tensor::f_stack(&[data.f_bitwise_and(15)?, data.f_bitwise_right_shift_tensor_scalar(4)?], 2)?;
        let value = |table: &SharedTensor, at: &Tensor| table.get().f_take(&at.f_to_kind(Kind::Int64)?);
        let values = value(&self.tables.values, &codes.f_view([n, -1])?.f_narrow(1, 0, columns)?)?;
        let step = value(&self.tables.powers, &scale)?.f_repeat_interleave_self_int(BLOCK, 1, None)?;
        let values = values.f_mul(&step.f_narrow(1, 0, columns)?)?;
        out.f_copy_(&values.f_to_kind(self.meta.kind)?)?;
        Ok(())
    }
}

/// The codes (u8) of the nearest e2m1 values, ties to the even mantissa.
fn nearest(values: &Tensor) -> Result<Tensor> {
    let magnitude = values.f_abs()?;
    let mut codes = values.f_signbit()?.f_to_kind(Kind::Uint8)?.f_mul_scalar_(8)?;
    // Half-way values belong to the code below where that is even.
    for (code, middle) in [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0].into_iter().enumerate() {
        let above = if code % 2 == 0 { magnitude.f_gt(middle)? } else { magnitude.f_ge(middle)? };
        let _ = codes.f_add_(&above)?;
    }
    Ok(codes)
}

impl PackedWeight for Mxfp4 {
    fn scheme(&self) -> Option<Scheme> {
        Some(Scheme::Mxfp4)
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![("weight".into(), self.data.get()), ("weight.scale".into(), self.scale.get())])
    }

    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let rows = out.size2()?.0;
        self.unpack(out, |t| Ok(t.f_narrow(0, start, rows)?))
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        self.unpack(out, |t| super::select(t, index))
    }
}
