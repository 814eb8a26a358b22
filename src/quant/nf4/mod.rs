//! `nf4`: 4-bit NormalFloat in blocks of 64, bytes as in bitsandbytes.
//!
//! Element `2i` of the flat weight is the high nibble of byte `i`, element
//! `2i + 1` the low one; blocks run over row ends, and the last may be short.

mod blocks;
mod cpu;

use super::dynamic_map::dynamic_map;
use super::{PackedWeight, Scheme};
use crate::error::Result;
use crate::ffi::bytes;
use crate::ffi::shared::SharedTensor;
use blocks::{pack_nibbles, quantize_blocks};
use cpu::Float;
use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

/// Values that share a scale.
pub(super) const BLOCK: i64 = 64;
/// Scales that share a scale of their own under double quantisation.
pub(super) const NESTED_BLOCK: i64 = 256;

/// The 16 values of the code, in order.
#[rustfmt::skip]
const CODE: [f32; 16] = [
    -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5, -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
    0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24, 0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
];

#[derive(Debug)]
pub(super) struct Nf4 {
    /// u8 (⌈n / 2⌉, 1) of n values.
    data: SharedTensor,
    scales: Scales,
    sizes: Vec<i64>,
    kind: Kind,
    device: Device,
}

/// One scale per block.
#[derive(Debug)]
enum Scales {
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

impl Nf4 {
    /// Packs a contiguous, finite weight.
    pub(super) fn pack(weight: &Tensor, double_quant: bool) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let flat = weight.f_view([-1])?;
        let (data, absmax) = match (device, kind) {
            (Device::Cpu, Kind::Float) => pack_with_kernel::<f32>(&flat)?,
            (Device::Cpu, Kind::BFloat16) => pack_with_kernel::<bf16>(&flat)?,
            (Device::Cpu, Kind::Half) => pack_with_kernel::<f16>(&flat)?,
            _ => pack_with_operators(&flat)?,
        };
        let data = data.f_unsqueeze(1)?;
        let scales = if double_quant { Scales::double(&absmax)? } else { Scales::Plain(SharedTensor::new(absmax)) };
        Ok(Nf4 { data: SharedTensor::new(data), scales, sizes, kind, device })
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
        let code = Tensor::f_from_slice(&CODE)?.f_to_device(self.device)?;
        let blocks = Tensor::f_arange_start(start, start + len, (Kind::Int64, self.device))?;
        let blocks = blocks.f_divide_scalar_mode(BLOCK, "floor")?;
        let scale = self.scales.dense()?.f_index_select(0, &blocks)?;
        let values = code.f_index_select(0, &nibbles)?.f_mul(&scale)?.f_to_kind(self.kind)?;
        out.f_copy_(&values.f_view(out.size().as_slice())?)?;
        Ok(())
    }

    /// Unpacks flat elements `start..` into `out` with the CPU kernel, rounding
    /// to the weight's dtype `W` first.
    fn unpack_with_kernel<W: Float, T: Float>(&self, start: usize, out: &mut Tensor) -> Result<()> {
        let (data, scales) = (self.data.get(), self.scales.handles());
        bytes::read::<u8, _>(&data, |data| {
            let mut unpack = |scale: &(dyn Fn(usize) -> f32 + Sync)| {
                bytes::write::<T, _>(out, |out| cpu::unpack::<W, T>(data, scale, start, out))
            };
            match scales.as_slice() {
                [absmax] => bytes::read::<f32, _>(absmax, |absmax| unpack(&|b| absmax[b]))?,
                [codes, map, nested, offset] => bytes::read::<u8, _>(codes, |codes| {
                    bytes::read::<f32, _>(map, |map| {
                        bytes::read::<f32, _>(nested, |nested| {
                            bytes::read::<f32, _>(offset, |offset| {
                                let (block, offset) = (NESTED_BLOCK as usize, offset[0]);
                                unpack(&|b| map[codes[b] as usize] * nested[b / block] + offset)
                            })
                        })
                    })
                })????,
                _ => Ok(()),
            }
        })?
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

impl PackedWeight for Nf4 {
    fn scheme(&self) -> Option<Scheme> {
        Some(Scheme::Nf4 { double_quant: matches!(self.scales, Scales::Double { .. }) })
    }

    fn sizes(&self) -> &[i64] {
        &self.sizes
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn device(&self) -> Device {
        self.device
    }

    /// Named as bitsandbytes names them, but for `nested_offset`, which it
    /// keeps in its JSON blob.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = vec![("weight".to_string(), self.data.get())];
        let names: &[&str] = match self.scales {
            Scales::Plain(_) => &["absmax"],
            Scales::Double { .. } => &["absmax", "nested_quant_map", "nested_absmax", "nested_offset"],
        };
        let handles = self.scales.handles();
        tensors.extend(names.iter().map(|n| format!("weight.{n}")).zip(handles));
        let code = Tensor::f_from_slice(&CODE)?.f_to_device(self.device)?;
        tensors.push(("weight.quant_map".into(), code));
        Ok(tensors)
    }

    fn unpack_rows(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let start = start * self.shape()[1];
        if self.device != Device::Cpu || !out.is_contiguous() {
            return self.unpack_with_operators(start, out);
        }
        match self.kind {
            Kind::BFloat16 => self.unpack_on_cpu::<bf16>(start as usize, out),
            Kind::Half => self.unpack_on_cpu::<f16>(start as usize, out),
            _ => self.unpack_on_cpu::<f32>(start as usize, out),
        }
    }
}

/// Packed bytes (⌈n / 2⌉) and scales of a flat weight, by the CPU kernel, which
/// needs no temporaries.
fn pack_with_kernel<W: Float>(flat: &Tensor) -> Result<(Tensor, Tensor)> {
    let (len, cpu) = (flat.size1()?, Device::Cpu);
    let mut data = Tensor::f_empty([(len + 1) / 2], (Kind::Uint8, cpu))?;
    let mut absmax = Tensor::f_empty([(len + BLOCK - 1) / BLOCK], (Kind::Float, cpu))?;
    bytes::read::<W, _>(flat, |values| {
        bytes::write::<u8, _>(&mut data, |data| {
            bytes::write::<f32, _>(&mut absmax, |absmax| cpu::quantize(values, data, absmax))
        })
    })???;
    Ok((data, absmax))
}

/// The same with libtorch's operators, on any device, in chunks of whole blocks
/// so that only a chunk is held in f32.
fn pack_with_operators(flat: &Tensor) -> Result<(Tensor, Tensor)> {
    let code = Tensor::f_from_slice(&CODE)?.f_to_device(flat.device())?;
    let (mut data, mut absmax) = (Vec::new(), Vec::new());
    let (len, chunk) = (flat.size1()?, BLOCK << 14);
    for start in (0..len).step_by(chunk as usize) {
        let part = flat.f_narrow(0, start, chunk.min(len - start))?.f_to_kind(Kind::Float)?;
        let (codes, scales) = quantize_blocks(&part, BLOCK, &code)?;
        data.push(pack_nibbles(&codes)?);
        absmax.push(scales);
    }
    Ok((Tensor::f_cat(&data, 0)?, Tensor::f_cat(&absmax, 0)?))
}

impl Scales {
    /// Quantises the scales around their mean.
    fn double(absmax: &Tensor) -> Result<Self> {
        let mut offset = absmax.f_mean(Kind::Float)?;
        if !f64::try_from(&offset)?.is_finite() {
            // The sum overflowed; the mean of finite scales doesn't.
            offset = absmax.f_mean(Kind::Double)?.f_to_kind(Kind::Float)?;
        }
        let map = dynamic_map(absmax.device())?;
        let (codes, nested) = quantize_blocks(&absmax.f_sub(&offset)?, NESTED_BLOCK, &map)?;
        Ok(Scales::Double {
            codes: SharedTensor::new(codes),
            map: SharedTensor::new(map),
            nested: SharedTensor::new(nested),
            offset: SharedTensor::new(offset),
        })
    }

    /// The tensors, in the order of the fields.
    fn handles(&self) -> Vec<Tensor> {
        match self {
            Scales::Plain(absmax) => vec![absmax.get()],
            Scales::Double { codes, map, nested, offset } => {
                vec![codes.get(), map.get(), nested.get(), offset.get()]
            }
        }
    }

    /// All scales as f32 (blocks).
    fn dense(&self) -> Result<Tensor> {
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
            let kernel = match kind {
                Kind::Half => pack_with_kernel::<f16>(&flat),
                Kind::BFloat16 => pack_with_kernel::<bf16>(&flat),
                _ => pack_with_kernel::<f32>(&flat),
            };
            let (kernel, operators) = (kernel.unwrap(), pack_with_operators(&flat).unwrap());
            for (a, b) in [(kernel.0, operators.0), (kernel.1, operators.1)] {
                assert_eq!(bytes::tensor_bytes(&a).unwrap(), bytes::tensor_bytes(&b).unwrap(), "{len} {kind:?}");
            }
        }
    }

    #[test]
    fn both_ways_of_unpacking_agree_from_any_row() {
        for (shape, kind) in
            [([5, 37], Kind::Float), ([64, 128], Kind::BFloat16), ([3, 1], Kind::Half), ([700, 130], Kind::Float)]
        {
            let weight = Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            for double_quant in [false, true] {
                let packed = Nf4::pack(&weight, double_quant).unwrap();
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
