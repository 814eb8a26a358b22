//! Which kernel serves which scheme on the CPU: lends the packed tensors to
//! the kernels as slices.

use super::kernels::{
    self, Absmax, Bytes, Codes, Double, Dtype, E4m3, E5m2, Float, Floats, Groups, I8, InBf16, Powers, Tile, Zeros,
};
use super::op::Op;
use super::{Fp8Format, PackedWeight, Scheme};
use crate::error::Result;
use crate::ffi::bytes::{read, write};
use half::{bf16, f16};
use tch::{Kind, Tensor};

/// Does what is asked of a weight on the CPU, and answers whether a kernel could.
pub(super) fn run(weight: &dyn PackedWeight, op: Op) -> Result<bool> {
    let Some(scheme) = weight.scheme() else { return Ok(false) };
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
            let block = block_size as usize;
            read(data, |bytes| {
                read(code, |code: &[f32]| {
                    let Some(code) = code.first_chunk() else { return Ok(false) };
                    codes(&tensor, &Codes { bytes, scales: (), code, block, dtype }, shape, op)
                })
            })??
        }
        Scheme::Fp8 { format } => {
            let (Some(data), Some(scale)) = (data, tensor("weight.scale")) else { return Ok(false) };
            let data = data.f_view_dtype(Kind::Uint8)?;
            read(&data, |data| {
                floats(scale, |scales| match format {
                    Fp8Format::E4m3 => serve(&Bytes::<E4m3>::new(data, scales, shape[1]), shape, op),
                    Fp8Format::E5m2 => serve(&Bytes::<E5m2>::new(data, scales, shape[1]), shape, op),
                })
            })?
        }
        Scheme::Int4 { .. } | Scheme::Int2 { .. } => {
            let parts = [data, tensor("weight.scale"), tensor("weight.shift")];
            let [Some(data), Some(scale), Some(shift)] = parts else { return Ok(false) };
            let (bits, group) = (if matches!(scheme, Scheme::Int2 { .. }) { 2 } else { 4 }, data.size2()?.1 as usize);
            read(data, |data| {
                floats(scale, |scales| {
                    floats(shift, |shifts| serve(&Groups::new(data, scales, shifts, group, bits), shape, op))
                })
            })?
        }
        Scheme::LlmInt8 => {
            let (Some(data), Some(absmax)) = (data, tensor("SCB")) else { return Ok(false) };
            let Some(dtype) = dtype(weight.kind()) else { return Ok(false) };
            let data = data.f_view_dtype(Kind::Uint8)?;
            read(&data, |bytes| {
                read(absmax, |scales| {
                    let step = super::int8::STEP as f32;
                    serve(&Absmax { bytes, scales, step, row: shape[1], dtype }, shape, op)
                })
            })??
        }
        Scheme::Mxfp4 => {
            let (Some(data), Some(scale)) = (data, tensor("weight.scale")) else { return Ok(false) };
            let Some(dtype) = dtype(weight.kind()) else { return Ok(false) };
            read(data, |bytes| {
                read(scale, |scales| {
                    let code = &super::mxfp4::CODE;
                    serve(&Powers { bytes, scales, code, row: shape[1], dtype }, shape, op)
                })
            })??
        }
        Scheme::Gptq { group_size } => {
            let [Some(data), Some(scale), Some(zero)] = [data, tensor("weight.scale"), tensor("weight.zero")] else {
                return Ok(false);
            };
            let size = group_size as usize;
            // Groups out of order are left to the operators.
            if !size.is_multiple_of(2) || !shape[1].is_multiple_of(size) || !weight.in_order() {
                return Ok(false);
            }
            read(data, |data| {
                read(zero, |zeros| floats(scale, |scales| serve(&Zeros::new(data, scales, zeros, size), shape, op)))
            })??
        }
        // Served by their own operators.
        _ => Ok(false),
    }
}

/// Whether the kernels do better than libtorch with a weight and any number of rows of this dtype.
pub(super) fn multiplies_many(weight: &dyn PackedWeight, kind: Kind) -> bool {
    let integers = kind == Kind::Float && matches!(weight.scheme(), Some(Scheme::Int8 | Scheme::LlmInt8));
    dtype(kind).is_some_and(kernels::multiply_many)
        || integers && kernels::multiply_integers(weight.shape().map(|n| n as usize))
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

/// Serves a weight in bitsandbytes' layout with its scales, quantised or not.
fn codes<'t>(
    tensor: &dyn Fn(&str) -> Option<&'t Tensor>,
    codes: &Codes<()>,
    shape: [usize; 2],
    op: Op,
) -> Result<bool> {
    let Some(absmax) = tensor("weight.absmax") else { return Ok(false) };
    let nested = ["weight.nested_quant_map", "weight.nested_absmax", "weight.nested_offset"].map(tensor);
    let [Some(map), Some(nested), Some(offset)] = nested else {
        return read(absmax, |scales: &[f32]| serve(&codes.with(scales), shape, op))?;
    };
    let offset = f64::try_from(offset)? as f32;
    read(absmax, |scales: &[u8]| {
        read(map, |map: &[f32]| {
            read(nested, |nested: &[f32]| {
                let Some(map) = map.first_chunk() else { return Ok(false) };
                serve(&codes.with(Double { codes: scales, map, nested, offset }), shape, op)
            })
        })
    })???
}

/// Runs the kernel for the dtype of the tile or the activations.
fn serve<F: InBf16>(format: &F, shape: [usize; 2], op: Op) -> Result<bool> {
    match op.kind()? {
        Kind::Float => serve_as::<F, f32>(format, shape, op),
        Kind::BFloat16 => serve_as::<F, bf16>(format, shape, op),
        Kind::Half => serve_as::<F, f16>(format, shape, op),
        _ => Ok(false),
    }
}

fn serve_as<F: InBf16, T: Float>(format: &F, shape: [usize; 2], op: Op) -> Result<bool> {
    match op {
        Op::Unpack { row, columns, out } => {
            let tile = Tile { inn: shape[1], row: row as usize, columns: columns.start as usize..columns.end as usize };
            write::<T, _>(out, |out| kernels::unpack(format, &tile, out))??;
        }
        Op::UnpackIndex { index, out } => {
            read(index, |index: &[i64]| {
                write::<T, _>(out, |out| kernels::unpack_index(format, shape[1], index, out))
            })???;
        }
        Op::Product { x: rows, .. } | Op::ProductTransposed { g: rows, .. }
            if !kernels::fits::<F, T>(format, shape[1], rows.size2()?.0 as usize) =>
        {
            return Ok(false);
        }
        Op::Product { x, y } => {
            read::<T, _>(x, |x| write::<T, _>(y, |y| kernels::product(format, shape, x, y)))???;
        }
        Op::ProductTransposed { g, dx } => {
            read::<T, _>(g, |g| write::<T, _>(dx, |dx| kernels::product_transposed(format, shape, g, dx)))???;
        }
    }
    Ok(true)
}

#[cfg(test)]
pub(super) mod tests;
