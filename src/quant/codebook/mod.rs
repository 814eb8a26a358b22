//! `nf4` and `fp4`: a 4-bit code and a scale per block, bytes as in bitsandbytes.
//!
//! Element `2i` of the flat weight is the high nibble of byte `i`, element
//! `2i + 1` the low one; blocks run over row ends, and the last may be short.

mod blocks;
mod code;
mod scales;

use super::{Meta, PackedWeight, Parts, Scheme, packing, tiles};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use blocks::{pack_nibbles, quantize_blocks};
use code::{Code, FP4, NF4};
use scales::Scales;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct Codebook {
    /// u8 (⌈n / 2⌉, 1) of n values.
    data: SharedTensor,
    scales: Scales,
    /// The code's values, f32 (16), where the data is: handing them over in each step would let a
    /// device wait for its host.
    map: SharedTensor,
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
        let packed = packing::codes(&flat, code.sorted(), block)?;
        let [data, absmax] = packed.map_or_else(|| pack_with_operators(&flat, code, block), Ok)?;
        let data = SharedTensor::new(data.f_unsqueeze(1)?);
        let scales = if double_quant { Scales::double(&absmax)? } else { Scales::Plain(SharedTensor::new(absmax)) };
        let map = SharedTensor::new(code.tensor(device)?);
        Ok(Codebook { data, scales, map, block, scheme, meta: Meta { sizes, kind, device } })
    }

    pub(super) fn assemble(mut parts: Parts) -> Result<Self> {
        let (scheme, device) = (parts.scheme, parts.device());
        let (code, block, double_quant) = choices(scheme);
        let len: i64 = parts.sizes.iter().product();
        let blocks = (len + block - 1) / block;
        let data = parts.take("weight", Kind::Uint8, &[(len + 1) / 2, 1])?;
        let map = parts.take("weight.quant_map", Kind::Float, &[16])?;
        if Vec::<f32>::try_from(map.get())? != code.values {
            return Err(parts.wrong("weight.quant_map", format!("the values of {scheme}"), "others"));
        }
        let scales = Scales::take(&mut parts, blocks, double_quant)?;
        let (sizes, kind) = parts.finish()?;
        Ok(Codebook { data, scales, map, block, scheme, meta: Meta { sizes, kind, device } })
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
        let places = Tensor::f_arange_start(start, start + len, (Kind::Int64, self.meta.device))?;
        self.write_values(&nibbles, &places, &self.scales.dense()?, out)
    }

    /// Writes the values of codes (n) at these places of the flat weight (n).
    fn write_values(&self, codes: &Tensor, places: &Tensor, scales: &Tensor, out: &mut Tensor) -> Result<()> {
        let scale = scales.f_index_select(0, &places.f_divide_scalar_mode(self.block, "floor")?)?;
        let values = self.map.get().f_index_select(0, codes)?.f_mul(&scale)?.f_to_kind(self.meta.kind)?;
        out.f_copy_(&values.f_view(out.size().as_slice())?)?;
        Ok(())
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
        tensors.push(("weight.quant_map".into(), self.map.get()));
        Ok(tensors)
    }

    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        self.unpack_with_operators(start * self.shape()[1], out)
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        let (columns, scales) = (self.shape()[1], self.scales.dense()?);
        let column = Tensor::f_arange(columns, (Kind::Int64, self.meta.device))?;
        tiles::for_each(index.size1()?, columns, |start, rows| {
            let first = index.f_narrow(0, start, rows)?.f_mul_scalar(columns)?.f_unsqueeze(1)?;
            let places = first.f_add(&column)?.f_view([-1])?;
            let bytes = self.data.get().f_view([-1])?.f_index_select(0, &places.f_divide_scalar_mode(2, "floor")?)?;
            // By 4 for the first of two, by 0 for the second.
            let shift = places.f_remainder(2)?.f_mul_scalar(-4)?.f_add_scalar(4)?;
            let codes = bytes.f_to_kind(Kind::Int64)?.f_bitwise_right_shift(&shift)?.f_bitwise_and(15)?;
            self.write_values(&codes, &places, &scales, &mut out.f_narrow(0, start, rows)?)
        })
    }
}

/// Packed bytes (⌈n / 2⌉) and scales of a flat weight, with libtorch's
/// operators, in chunks of whole blocks so that only a chunk is held in f32.
fn pack_with_operators(flat: &Tensor, code: &'static Code, block: i64) -> Result<[Tensor; 2]> {
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
    Ok([Tensor::f_cat(&data, 0)?, Tensor::f_cat(&absmax, 0)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::bytes;
    use tch::Device;

    // The kernels and libtorch's operators are two implementations of one
    // definition: they must agree to the bit.

    #[test]
    fn both_ways_of_packing_agree() {
        for (len, kind) in [(1, Kind::Float), (63, Kind::Half), (200_001, Kind::BFloat16), (64 << 15, Kind::Float)] {
            let flat = Tensor::randn([len], (Kind::Float, Device::Cpu)).to_kind(kind);
            let flat = flat.f_mul(&flat.f_gt(-1.0).unwrap()).unwrap();
            for (code, block) in [(&NF4, 64), (&FP4, 64), (&NF4, 32), (&FP4, 4096)] {
                let kernel = packing::codes(&flat, code.sorted(), block).unwrap().unwrap();
                let operators = pack_with_operators(&flat, code, block).unwrap();
                for (a, b) in kernel.iter().zip(&operators) {
                    assert_eq!(bytes::tensor_bytes(a).unwrap(), bytes::tensor_bytes(b).unwrap(), "{len} {kind:?}");
                }
            }
        }
    }
}
