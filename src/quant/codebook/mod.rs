//! `nf4` and `fp4`: a 4-bit code and a scale per block, bytes as in bitsandbytes.
//!
//! Element `2i` of the flat weight is the high nibble of byte `i`, element
//! `2i + 1` the low one; blocks run over row ends, and the last may be short.

mod blocks;
mod code;
mod cpu;
mod scales;

use super::{Meta, PackedWeight, Parts, Scheme};
use crate::error::Result;
use crate::ffi::bytes;
use crate::ffi::shared::SharedTensor;
use blocks::{pack_nibbles, quantize_blocks};
use code::{Code, FP4, NF4};
use cpu::{Float, Packed};
use half::{bf16, f16};
use scales::Scales;
use tch::{Device, Kind, Tensor};

#[derive(Debug)]
pub(super) struct Codebook {
    /// u8 (⌈n / 2⌉, 1) of n values.
    data: SharedTensor,
    scales: Scales,
    code: &'static Code,
    /// Values that share a scale.
    block: i64,
    scheme: Scheme,
    meta: Meta,
}

/// Code, block size, and whether the scales are quantised.
fn choices(scheme: Scheme) -> (&'static Code, i64, bool) {
    match scheme {
        Scheme::Fp4 { block_size, double_quant } => (&FP4, block_size, double_quant),
        Scheme::Nf4 { block_size, double_quant } => (&NF4, block_size, double_quant),
        _ => (&NF4, 64, false),
    }
}

impl Codebook {
    /// Packs a contiguous, finite weight.
    pub(super) fn pack(weight: &Tensor, scheme: Scheme) -> Result<Self> {
        let (code, block, double_quant) = choices(scheme);
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let flat = weight.f_view([-1])?;
        let (data, absmax) = match (device, kind) {
            (Device::Cpu, Kind::Float) => pack_with_kernel::<f32>(&flat, code, block)?,
            (Device::Cpu, Kind::BFloat16) => pack_with_kernel::<bf16>(&flat, code, block)?,
            (Device::Cpu, Kind::Half) => pack_with_kernel::<f16>(&flat, code, block)?,
            _ => pack_with_operators(&flat, code, block)?,
        };
        let data = SharedTensor::new(data.f_unsqueeze(1)?);
        let scales = if double_quant { Scales::double(&absmax)? } else { Scales::Plain(SharedTensor::new(absmax)) };
        Ok(Codebook { data, scales, code, block, scheme, meta: Meta { sizes, kind, device } })
    }

    pub(super) fn assemble(mut parts: Parts) -> Result<Self> {
        let (scheme, device) = (parts.scheme, parts.device());
        let (code, block, double_quant) = choices(scheme);
        let len: i64 = parts.sizes.iter().product();
        let blocks = (len + block - 1) / block;
        let data = parts.take("weight", Kind::Uint8, &[(len + 1) / 2, 1])?;
        let map = parts.take("weight.quant_map", Kind::Float, &[16])?.get();
        if Vec::<f32>::try_from(&map)? != code.values {
            return Err(parts.wrong("weight.quant_map", format!("the values of {scheme}"), "others"));
        }
        let scales = Scales::take(&mut parts, blocks, double_quant)?;
        let (sizes, kind) = parts.finish()?;
        Ok(Codebook { data, scales, code, block, scheme, meta: Meta { sizes, kind, device } })
    }

    /// Unpacks flat elements `start..` into a (rows, columns) tensor with libtorch's
    /// operators: the path for devices without a kernel of ours.
    fn unpack_with_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let len = out.numel() as i64;
        let (first, last) = (start / 2, (start + len + 1) / 2);
        let bytes = self.data.get().f_view([-1])?.f_narrow(0, first, last - first)?;
        let high = bytes.f_bitwise_right_shift_tensor_scalar(4)?;
        let nibbles = Tensor::f_stack(&[high, bytes.f_bitwise_and(15)?], 1)?.f_view([-1])?;
        let nibbles = nibbles.f_narrow(0, start - 2 * first, len)?.f_to_kind(Kind::Int64)?;
        let code = self.code.tensor(self.meta.device)?;
        let blocks = Tensor::f_arange_start(start, start + len, (Kind::Int64, self.meta.device))?;
        let blocks = blocks.f_divide_scalar_mode(self.block, "floor")?;
        let scale = self.scales.dense()?.f_index_select(0, &blocks)?;
        let values = code.f_index_select(0, &nibbles)?.f_mul(&scale)?.f_to_kind(self.meta.kind)?;
        out.f_copy_(&values.f_view(out.size().as_slice())?)?;
        Ok(())
    }

    /// Unpacks flat elements `start..` into `out` with the CPU kernel, rounding
    /// to the weight's dtype `W` first.
    fn unpack_with_kernel<W: Float, T: Float>(&self, start: usize, out: &mut Tensor) -> Result<()> {
        let (data, code, block) = (self.data.get(), self.code, self.block as usize);
        bytes::read::<u8, _>(&data, |data| {
            self.scales.read(|scale| {
                let packed = Packed { code, block, data, scale };
                bytes::write::<T, _>(out, |out| cpu::unpack::<W, T>(&packed, start, out))
            })
        })??
    }

    fn unpack_on_cpu<W: Float>(&self, start: usize, out: &mut Tensor) -> Result<()> {
        match out.f_kind()? {
            Kind::Float => self.unpack_with_kernel::<W, f32>(start, out),
            Kind::BFloat16 => self.unpack_with_kernel::<W, bf16>(start, out),
            Kind::Half => self.unpack_with_kernel::<W, f16>(start, out),
            _ => self.unpack_with_operators(start as i64, out),
        }
    }
}

impl PackedWeight for Codebook {
    fn scheme(&self) -> Option<Scheme> {
        Some(self.scheme)
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Named as bitsandbytes names them, but for `nested_offset`, which it
    /// keeps in its JSON blob.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = vec![("weight".to_string(), self.data.get())];
        tensors.extend(self.scales.tensors().map(|(name, tensor)| (format!("weight.{name}"), tensor)));
        tensors.push(("weight.quant_map".into(), self.code.tensor(self.meta.device)?));
        Ok(tensors)
    }

    fn unpack_rows(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let start = start * self.shape()[1];
        if self.meta.device != Device::Cpu || !out.is_contiguous() {
            return self.unpack_with_operators(start, out);
        }
        match self.meta.kind {
            Kind::BFloat16 => self.unpack_on_cpu::<bf16>(start as usize, out),
            Kind::Half => self.unpack_on_cpu::<f16>(start as usize, out),
            _ => self.unpack_on_cpu::<f32>(start as usize, out),
        }
    }
}

/// Packed bytes (⌈n / 2⌉) and scales of a flat weight, by the CPU kernel, which
/// needs no temporaries.
fn pack_with_kernel<W: Float>(flat: &Tensor, code: &'static Code, block: i64) -> Result<(Tensor, Tensor)> {
    let (len, cpu) = (flat.size1()?, Device::Cpu);
    let mut data = Tensor::f_empty([(len + 1) / 2], (Kind::Uint8, cpu))?;
    let mut absmax = Tensor::f_empty([(len + block - 1) / block], (Kind::Float, cpu))?;
    bytes::read::<W, _>(flat, |values| {
        bytes::write::<u8, _>(&mut data, |data| {
            bytes::write::<f32, _>(&mut absmax, |absmax| cpu::quantize(code, block as usize, values, data, absmax))
        })
    })???;
    Ok((data, absmax))
}

/// The same with libtorch's operators, on any device, in chunks of whole blocks
/// so that only a chunk is held in f32.
fn pack_with_operators(flat: &Tensor, code: &'static Code, block: i64) -> Result<(Tensor, Tensor)> {
    let order = Tensor::f_from_slice(&code.order)?.f_to_device(flat.device())?;
    let rising = code.tensor(flat.device())?.f_index_select(0, &order.f_to_kind(Kind::Int64)?)?;
    let (mut data, mut absmax) = (Vec::new(), Vec::new());
    // Blocks are powers of two, at most this large.
    let (len, chunk) = (flat.size1()?, 1 << 20);
    for start in (0..len).step_by(chunk as usize) {
        let part = flat.f_narrow(0, start, chunk.min(len - start))?.f_to_kind(Kind::Float)?;
        let (places, scales) = quantize_blocks(&part, block, &rising)?;
        let codes = order.f_index_select(0, &places.f_to_kind(Kind::Int64)?)?;
        data.push(pack_nibbles(&codes, code.zero())?);
        absmax.push(scales);
    }
    Ok((Tensor::f_cat(&data, 0)?, Tensor::f_cat(&absmax, 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The kernels and libtorch's operators are two implementations of one
    // definition: they must agree to the bit.

    #[test]
    fn both_ways_of_packing_agree() {
        for (len, kind) in [(1, Kind::Float), (63, Kind::Half), (200_001, Kind::BFloat16), (64 << 15, Kind::Float)] {
            let flat = Tensor::randn([len], (Kind::Float, Device::Cpu)).to_kind(kind);
            let flat = flat.f_mul(&flat.f_gt(-1.0).unwrap()).unwrap();
            for (code, block) in [(&NF4, 64), (&FP4, 64), (&NF4, 32), (&FP4, 4096)] {
                let kernel = match kind {
                    Kind::Half => pack_with_kernel::<f16>(&flat, code, block),
                    Kind::BFloat16 => pack_with_kernel::<bf16>(&flat, code, block),
                    _ => pack_with_kernel::<f32>(&flat, code, block),
                };
                let (kernel, operators) = (kernel.unwrap(), pack_with_operators(&flat, code, block).unwrap());
                for (a, b) in [(kernel.0, operators.0), (kernel.1, operators.1)] {
                    assert_eq!(bytes::tensor_bytes(&a).unwrap(), bytes::tensor_bytes(&b).unwrap(), "{len} {kind:?}");
                }
            }
        }
    }

    #[test]
    fn both_ways_of_unpacking_agree_from_any_row() {
        for (shape, kind) in
            [([5, 37], Kind::Float), ([64, 128], Kind::BFloat16), ([3, 1], Kind::Half), ([700, 130], Kind::Float)]
        {
            let weight = Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            for scheme in [
                Scheme::NF4,
                Scheme::NF4_DOUBLE,
                Scheme::FP4,
                Scheme::Fp4 { block_size: 32, double_quant: true },
                Scheme::Nf4 { block_size: 4096, double_quant: true },
            ] {
                let packed = Codebook::pack(&weight, scheme).unwrap();
                for out_kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                    for start in 0..shape[0].min(3) {
                        let rows = shape[0] - start;
                        let mut kernel = Tensor::zeros([rows, shape[1]], (out_kind, Device::Cpu));
                        let mut operators = kernel.copy();
                        packed.unpack_rows(start, &mut kernel).unwrap();
                        packed.unpack_with_operators(start * shape[1], &mut operators).unwrap();
                        assert_eq!(bytes::tensor_bytes(&kernel).unwrap(), bytes::tensor_bytes(&operators).unwrap());
                    }
                }
            }
        }
    }
}
