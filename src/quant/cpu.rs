//! Which kernel serves which scheme on the CPU: lends the packed tensors to
//! the kernels as slices.

use super::kernels::{self, Bytes, Codes, Dtype, Float, Floats, Format, I8, Scales, Tile};
use super::{PackedWeight, Scheme};
use crate::error::Result;
use crate::ffi::bytes::{read, write};
use half::{bf16, f16};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// What is asked of the kernels. Tensors are contiguous and on the CPU.
pub(super) enum Op<'a> {
    /// Writes the values of `columns` from row `row` on into `out` (rows, columns).
    Unpack { row: i64, columns: Range<i64>, out: &'a mut Tensor },
    /// y = x · Wᵀ: x (n, in), y (n, out) of the same dtype.
    Product { x: &'a Tensor, y: &'a mut Tensor },
    /// dX = g · W: g (n, out), dx (n, in) of the same dtype.
    ProductTransposed { g: &'a Tensor, dx: &'a mut Tensor },
}

impl Op<'_> {
    /// The dtype of tiles or activations.
    fn kind(&self) -> Result<Kind> {
        Ok(match self {
            Op::Unpack { out, .. } => out.f_kind()?,
            Op::Product { x, .. } => x.f_kind()?,
            Op::ProductTransposed { g, .. } => g.f_kind()?,
        })
    }
}

/// Does what is asked, and answers whether a kernel could.
pub(super) fn run(weight: &dyn PackedWeight, op: Op) -> Result<bool> {
    let Some(scheme) = weight.scheme().filter(|_| weight.device() == Device::Cpu) else { return Ok(false) };
    if !matches!(op.kind()?, Kind::Float | Kind::BFloat16 | Kind::Half) {
        return Ok(false);
    }
    let tensors = weight.tensors()?;
    let tensor = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor);
    let shape = weight.shape().map(|n| n as usize);
    let data = tensor("weight");
    match scheme {
        Scheme::Int8 => {
            let (Some(data), Some(scale)) = (data, tensor("weight.scale")) else { return Ok(false) };
            let data = data.f_view_dtype(Kind::Uint8)?;
            read(&data, |data| floats(scale, |scales| serve(&Bytes::<I8>::new(data, scales, shape[1]), shape, op)))?
        }
        Scheme::Nf4 { block_size, .. } | Scheme::Fp4 { block_size, .. } => {
            let (Some(data), Some(code)) = (data, tensor("weight.quant_map")) else { return Ok(false) };
            let Some(dtype) = dtype(weight.kind()) else { return Ok(false) };
            read(data, |bytes| {
                read(code, |code: &[f32]| {
                    let Some(code) = code.first_chunk() else { return Ok(false) };
                    with_scales(&tensor, |scales| {
                        serve(&Codes { bytes, scales, code, block: block_size as usize, dtype }, shape, op)
                    })
                })
            })??
        }
        // Served by their own operators.
        _ => Ok(false),
    }
}

fn dtype(kind: Kind) -> Option<Dtype> {
    match kind {
        Kind::Float => Some(Dtype::F32),
        Kind::BFloat16 => Some(Dtype::Bf16),
        Kind::Half => Some(Dtype::F16),
        _ => None,
    }
}

/// Lends scales or shifts in the weight's dtype.
fn floats(tensor: &Tensor, f: impl FnOnce(Floats) -> Result<bool>) -> Result<bool> {
    match tensor.f_kind()? {
        Kind::Float => read(tensor, |v: &[f32]| f(Floats::F32(v)))?,
        Kind::BFloat16 => read(tensor, |v: &[bf16]| f(Floats::Bf16(v)))?,
        Kind::Half => read(tensor, |v: &[f16]| f(Floats::F16(v)))?,
        _ => Ok(false),
    }
}

/// Lends the scales of a weight in bitsandbytes' layout, quantised or not.
fn with_scales<'t>(
    tensor: &dyn Fn(&str) -> Option<&'t Tensor>,
    f: impl FnOnce(Scales) -> Result<bool>,
) -> Result<bool> {
    let Some(absmax) = tensor("weight.absmax") else { return Ok(false) };
    let nested = ["weight.nested_quant_map", "weight.nested_absmax", "weight.nested_offset"].map(tensor);
    let [Some(map), Some(nested), Some(offset)] = nested else {
        return read(absmax, |scales: &[f32]| f(Scales::Plain(scales)))?;
    };
    let offset = f64::try_from(offset)? as f32;
    read(absmax, |codes: &[u8]| {
        read(map, |map: &[f32]| {
            read(nested, |nested: &[f32]| {
                let nested_block = super::codebook::NESTED_BLOCK as usize;
                f(Scales::Double { codes, map, nested, nested_block, offset })
            })
        })
    })???
}

/// Runs the kernel for the dtype of the tile or the activations.
fn serve<F: Format>(format: &F, shape: [usize; 2], op: Op) -> Result<bool> {
    match op.kind()? {
        Kind::Float => serve_as::<F, f32>(format, shape, op),
        Kind::BFloat16 => serve_as::<F, bf16>(format, shape, op),
        Kind::Half => serve_as::<F, f16>(format, shape, op),
        _ => Ok(false),
    }
}

fn serve_as<F: Format, T: Float>(format: &F, shape: [usize; 2], op: Op) -> Result<bool> {
    match op {
        Op::Unpack { row, columns, out } => {
            let tile = Tile { inn: shape[1], row: row as usize, columns: columns.start as usize..columns.end as usize };
            write::<T, _>(out, |out| kernels::unpack(format, &tile, out))??;
        }
        _ if !kernels::fits(format, shape[1]) => return Ok(false),
        Op::Product { x, y } => {
            read::<T, _>(x, |x| write::<T, _>(y, |y| kernels::product(format, shape, x, y)))???;
        }
        Op::ProductTransposed { g, dx } => {
            read::<T, _>(g, |g| write::<T, _>(dx, |dx| kernels::product_transposed(format, shape, g, dx)))???;
        }
    }
    Ok(true)
}
