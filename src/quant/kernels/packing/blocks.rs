//! e2m1 floats that share a power of two in blocks of 32: `mxfp4`.

use super::{largest, padded, run_all, runs};
use crate::error::Result;
use crate::ffi::simd::{Kernel, LANES, Simd};
use crate::quant::kernels::Float;

/// Values that share a scale.
const BLOCK: usize = 32;

/// Half-way magnitudes: those that belong to the code above, where the one
/// below is odd, are a little less. The others are never exceeded.
const BOUNDS: [f32; LANES] = {
    let mut bounds = [f32::INFINITY; LANES];
    let middles = [0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
    let mut code = 0;
    while code < middles.len() {
        bounds[code] = f32::from_bits(middles[code].to_bits() - code as u32 % 2);
        code += 1;
    }
    bounds
};

/// Packs a weight with rows of `columns` values, two to a byte, the even one in
/// the low half; `scales` are e8m0.
pub(crate) fn pack_blocks<T: Float>(columns: usize, weight: &[T], bytes: &mut [u8], scales: &mut [u8]) -> Result<()> {
    let (rows, width, blocks) = (runs(columns), columns.div_ceil(2), columns.div_ceil(BLOCK));
    let parts = weight.chunks(rows * columns).zip(bytes.chunks_mut(rows * width)).zip(scales.chunks_mut(rows * blocks));
    run_all(parts.map(|((weight, bytes), scales)| Blocks { columns, weight, bytes, scales }))
}

struct Blocks<'a, T> {
    columns: usize,
    weight: &'a [T],
    bytes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl<T: Float> Kernel for Blocks<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.weight.chunks_exact(self.columns).zip(self.bytes.chunks_exact_mut(self.columns.div_ceil(2)));
        for ((row, bytes), scales) in rows.zip(self.scales.chunks_exact_mut(self.columns.div_ceil(BLOCK))) {
            for ((values, bytes), scale) in row.chunks(BLOCK).zip(bytes.chunks_mut(BLOCK / 2)).zip(scales) {
                let (first, second) = values.split_at(values.len().min(LANES));
                let zero = T::from_f32(0.0);
                let first = T::load(s, &padded(first, zero));
                let second = T::load(s, &padded(second, zero));
                let max = largest(s, s.max(s.abs(first), s.abs(second)));
                // The exponent of the largest less that of 6, and not below the
                // smallest there is.
                let exponent = ((max.to_bits() >> 23) as u8).max(2) - 2;
                *scale = exponent;
                // 2^−k for 2^k, both with the bias of f32.
                let factor = s.splat(f32::from_bits((254 - u32::from(exponent)) << 23));
                let all = [encode(s, s.mul(first, factor)), encode(s, s.mul(second, factor))];
                bytes.copy_from_slice(&all.as_flattened()[..bytes.len()]);
            }
        }
    }
}

/// The codes of the nearest e2m1 floats, ties to even, two to a byte.
#[inline(always)]
fn encode<S: Simd>(s: S, scaled: S::V) -> [u8; LANES / 2] {
    let mut codes = s.count_below(s.abs(scaled), &BOUNDS);
    let mut lanes = [0.0; LANES];
    s.store(scaled, &mut lanes);
    for (code, lane) in codes.iter_mut().zip(lanes) {
        *code |= (lane.to_bits() >> 31) as u8 * 8;
    }
    let mut bytes = [0; LANES / 2];
    for (byte, pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = pair[0] | pair[1] << 4;
    }
    bytes
}
