//! A byte for each value and a scale for each row: `int8`, `llm_int8`, `fp8`.

use super::{clamp, largest, padded, run_all, runs};
use crate::error::Result;
use crate::ffi::simd::{Kernel, LANES, Simd};
use crate::quant::kernels::Float;

/// How a row of dtype `T` becomes bytes.
pub(crate) trait RowCode<T: Float>: Sync {
    /// What is kept for each row.
    type Scale: Copy + Send;

    /// The values that are packed, and whose largest magnitude counts.
    #[inline(always)]
    fn prepare<S: Simd>(&self, _: S, v: S::V) -> S::V {
        v
    }

    /// What is kept of a row's largest magnitude, and what [`Self::encode`]
    /// gets of it.
    fn scale(&self, absmax: f32) -> (Self::Scale, f32);

    fn encode<S: Simd>(&self, s: S, v: S::V, scale: S::V) -> [u8; LANES];
}

/// 1 in place of 0, by which a row of zeros can be divided.
fn divisor(scale: f32) -> f32 {
    if scale == 0.0 { 1.0 } else { scale }
}

/// The nearest multiples of max|w| / 127, all in the weight's dtype.
#[derive(Debug)]
pub(crate) struct Int8Code {
    /// The largest scale.
    pub(crate) largest: f32,
}

impl<T: Float> RowCode<T> for Int8Code {
    type Scale = T;

    fn scale(&self, absmax: f32) -> (T, f32) {
        let step = T::DTYPE.round_one(absmax / 127.0).min(self.largest);
        (T::from_f32(step), divisor(step))
    }

    #[inline(always)]
    fn encode<S: Simd>(&self, s: S, v: S::V, step: S::V) -> [u8; LANES] {
        let q = T::DTYPE.round(s, s.div(v, step));
        s.to_bytes(clamp(s, q, -128.0, 127.0))
    }
}

/// bitsandbytes': the weight goes through f16, the arithmetic is f32.
#[derive(Debug)]
pub(crate) struct LlmInt8Code;

impl<T: Float> RowCode<T> for LlmInt8Code {
    type Scale = f32;

    #[inline(always)]
    fn prepare<S: Simd>(&self, s: S, v: S::V) -> S::V {
        s.round_f16(v)
    }

    fn scale(&self, absmax: f32) -> (f32, f32) {
        (absmax, 1.0 / divisor(absmax) * 127.0)
    }

    #[inline(always)]
    fn encode<S: Simd>(&self, s: S, v: S::V, factor: S::V) -> [u8; LANES] {
        s.to_bytes(s.mul(v, factor))
    }
}

/// 8-bit floats of `w / scale`, all in the weight's dtype. `MANTISSA` bits tell
/// the format: 3 for e4m3, 2 for e5m2.
#[derive(Debug)]
pub(crate) struct Fp8Code<const MANTISSA: u32> {
    /// The largest value of the format.
    pub(crate) top: f32,
    /// The limits of a scale.
    pub(crate) smallest: f32,
    pub(crate) largest: f32,
}

impl<T: Float, const MANTISSA: u32> RowCode<T> for Fp8Code<MANTISSA> {
    type Scale = T;

    fn scale(&self, absmax: f32) -> (T, f32) {
        let step = T::DTYPE.round_one(absmax / self.top).clamp(self.smallest, self.largest);
        (T::from_f32(step), step)
    }

    #[inline(always)]
    fn encode<S: Simd>(&self, s: S, v: S::V, step: S::V) -> [u8; LANES] {
        let q = clamp(s, T::DTYPE.round(s, s.div(v, step)), -self.top, self.top);
        let mut lanes = [0.0; LANES];
        s.store(q, &mut lanes);
        let mut bytes = [0; LANES];
        for (byte, value) in bytes.iter_mut().zip(lanes) {
            *byte = float8::<MANTISSA>(value);
        }
        bytes
    }
}

/// The nearest 8-bit float of a value within its range, ties to even.
#[inline(always)]
fn float8<const MANTISSA: u32>(value: f32) -> u8 {
    // Of 7 bits, what is not mantissa is exponent, with the usual bias.
    let bias = (1 << (6 - MANTISSA)) - 1;
    let bits = value.to_bits();
    let (sign, magnitude) = ((bits >> 24) & 0x80, bits & 0x7fff_ffff);
    // To a number whose last digit is the last of the subnormal ones, adding rounds.
    let large = (127 - bias + 1 - MANTISSA + 23) << 23;
    let subnormal = (f32::from_bits(magnitude) + f32::from_bits(large)).to_bits() - large;
    // Half a unit, less one where the kept part is even; carries do the rest.
    let odd = (magnitude >> (23 - MANTISSA)) & 1;
    let rebiased = magnitude.wrapping_sub((127 - bias) << 23);
    let normal = rebiased.wrapping_add((1 << (22 - MANTISSA)) - 1 + odd) >> (23 - MANTISSA);
    (sign | if magnitude < (127 - bias + 1) << 23 { subnormal } else { normal }) as u8
}

/// Packs a weight with rows of `columns` values.
pub(crate) fn pack_rows<C: RowCode<T>, T: Float>(
    code: &C,
    columns: usize,
    weight: &[T],
    bytes: &mut [u8],
    scales: &mut [C::Scale],
) -> Result<()> {
    let rows = runs(columns);
    let parts = weight.chunks(rows * columns).zip(bytes.chunks_mut(rows * columns)).zip(scales.chunks_mut(rows));
    run_all(parts.map(|((weight, bytes), scales)| Rows { code, columns, weight, bytes, scales }))
}

struct Rows<'a, T: Float, C: RowCode<T>> {
    code: &'a C,
    columns: usize,
    weight: &'a [T],
    bytes: &'a mut [u8],
    scales: &'a mut [C::Scale],
}

impl<T: Float, C: RowCode<T>> Kernel for Rows<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (code, columns) = (self.code, self.columns);
        let rows = self.weight.chunks_exact(columns).zip(self.bytes.chunks_exact_mut(columns));
        for ((row, bytes), scale) in rows.zip(self.scales) {
            let (sixteens, rest) = row.as_chunks();
            let rest = code.prepare(s, T::load(s, &padded(rest, T::from_f32(0.0))));
            let mut max = s.abs(rest);
            for values in sixteens {
                max = s.max(s.abs(code.prepare(s, T::load(s, values))), max);
            }
            let (kept, factor) = code.scale(largest(s, max));
            *scale = kept;
            let factor = s.splat(factor);
            let (to, to_rest) = bytes.as_chunks_mut();
            for (to, values) in to.iter_mut().zip(sixteens) {
                *to = code.encode(s, code.prepare(s, T::load(s, values)), factor);
            }
            to_rest.copy_from_slice(&code.encode(s, rest, factor)[..to_rest.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    #[test]
    fn floats_are_rounded_as_torch_rounds_them() {
        // All bf16 patterns within the range, and their neighbours.
        for (kind, top) in [(Kind::Float8e4m3fn, 448.0f32), (Kind::Float8e5m2, 57344.0)] {
            let values = (0..=u16::MAX).flat_map(|bits| {
                let bits = u32::from(bits) << 16;
                [bits, bits | 1, bits | 0x8000, bits | 0x7fff].map(f32::from_bits)
            });
            let values: Vec<f32> = values.filter(|v| v.abs() <= top).collect();
            let torch = Tensor::from_slice(&values).to_kind(kind).view_dtype(Kind::Uint8);
            let found: Vec<u8> = match kind {
                Kind::Float8e4m3fn => values.iter().map(|v| float8::<3>(*v)).collect(),
                _ => values.iter().map(|v| float8::<2>(*v)).collect(),
            };
            assert_eq!(found, Vec::<u8>::try_from(torch).unwrap(), "{kind:?}");
        }
    }
}
