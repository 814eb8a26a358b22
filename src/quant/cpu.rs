//! Which kernel serves which scheme on the CPU: lends the packed tensors to
//! the kernels as slices.

use super::kernels::{
    self, Absmax, Bytes, Codes, Double, Dtype, E4m3, E5m2, Float, Floats, Groups, I8, InBf16, Powers, Tile, Zeros,
};
use super::op::Op;
use super::{Fp8Format, PackedWeight, Scheme};
use crate::error::Result;
use crate::ffi::bytes::{read, write};
use crate::ffi::runtime::rounds_f32_products;
use half::{bf16, f16};
use tch::{Kind, Tensor};

/// What is done with the element type of a dtype, or no answer if kernels don't know it.
macro_rules! of_dtype {
    ($kind:expr, $t:ident => $result:expr) => {
        match $kind {
            Kind::Float => of_dtype!(f32 as $t, $result),
            Kind::BFloat16 => of_dtype!(bf16 as $t, $result),
            Kind::Half => of_dtype!(f16 as $t, $result),
            _ => Ok(false),
        }
    };
    ($type:ty as $t:ident, $result:expr) => {{
        type $t = $type;
        $result
    }};
}

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
            of_dtype!(weight.kind(), W => codes::<W>(&tensor, block_size as usize, shape, op))
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
            let bits = if matches!(scheme, Scheme::Int2 { .. }) { 2 } else { 4 };
            of_dtype!(scale.f_kind()?, W => groups::<W>([data, scale, shift], bits, shape, op))
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
            of_dtype!(scale.f_kind()?, W => {
                read(data, |data| {
                    read(zero, |zeros| {
                        read(scale, |scales: &[W]| serve(&Zeros::new(data, scales, zeros, size), shape, op))
                    })
                })???
            })
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

/// Serves a weight in bitsandbytes' layout of 4 bits, its scales quantised or not.
fn codes<'t, W: Float>(
    tensor: &dyn Fn(&str) -> Option<&'t Tensor>,
    block: usize,
    shape: [usize; 2],
    op: Op,
) -> Result<bool> {
    let [Some(data), Some(code), Some(absmax)] = ["weight", "weight.quant_map", "weight.absmax"].map(tensor) else {
        return Ok(false);
    };
    let nested = ["weight.nested_quant_map", "weight.nested_absmax", "weight.nested_offset"].map(tensor);
    read(data, |data| {
        read(code, |code: &[f32]| {
            let Some(code) = code.first_chunk() else { return Ok(false) };
            let [Some(map), Some(nested), Some(offset)] = nested else {
                return read(absmax, |scales: &[f32]| {
                    serve(&Codes::<_, W>::new(data, scales, code, block), shape, op)
                })?;
            };
            let offset = f64::try_from(offset)? as f32;
            read(absmax, |codes: &[u8]| {
                read(map, |map: &[f32]| {
                    read(nested, |nested: &[f32]| {
                        let Some(map) = map.first_chunk() else { return Ok(false) };
                        let scales = Double { codes, map, nested, offset };
                        serve(&Codes::<_, W>::new(data, scales, code, block), shape, op)
                    })
                })
            })???
        })
    })??
}

/// Serves a weight in optimum-quanto's layout of 4 or 2 bits, with scales and shifts of its dtype.
fn groups<W: Float>([data, scale, shift]: [&Tensor; 3], bits: usize, shape: [usize; 2], op: Op) -> Result<bool> {
    let group = data.size2()?.1 as usize;
    read(data, |data| {
        read(scale, |scales: &[W]| {
            read(shift, |shifts| serve(&Groups::new(data, scales, shifts, group, bits), shape, op))
        })
    })???
}

/// Runs the kernel for the dtype of the tile or the activations.
fn serve<F: InBf16>(format: &F, shape: [usize; 2], op: Op) -> Result<bool> {
    of_dtype!(op.kind()?, T => serve_as::<F, T>(format, shape, op))
}

fn serve_as<F: InBf16, T: Float>(format: &F, shape: [usize; 2], op: Op) -> Result<bool> {
    let may_round = T::DTYPE == Dtype::F32 && rounds_f32_products();
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
            if !kernels::fits::<F, T>(format, shape[1], rows.size2()?.0 as usize, may_round) =>
        {
            return Ok(false);
        }
        Op::Product { x, y } => {
            read::<T, _>(x, |x| write::<T, _>(y, |y| kernels::product(format, shape, x, y, may_round)))???;
        }
        Op::ProductTransposed { g, dx } => {
            read::<T, _>(g, |g| {
                write::<T, _>(dx, |dx| kernels::product_transposed(format, shape, g, dx, may_round))
            })???;
        }
    }
    Ok(true)
}

#[cfg(test)]
pub(super) mod tests;
