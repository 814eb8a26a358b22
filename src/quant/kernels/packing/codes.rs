//! The nearest of sixteen values and a scale for each block: `nf4`, `fp4`.

use super::{clamp, largest, padded, run_all, runs};
use crate::error::Result;
use crate::ffi::simd::{Kernel, LANES, Simd};
use crate::quant::kernels::Float;

/// bitsandbytes' floor for the scale of a block, so that zeros divide.
pub(crate) const TINY: f32 = 1e-38;

/// A 4-bit code.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SortedCode<'a> {
    /// What `csrc/kernels/formats.cuh` calls it.
    pub(crate) name: &'static str,
    /// The fifteen midpoints between values that are neighbours, rising; then
    /// one that is not used.
    pub(crate) bounds: &'a [f32; LANES],
    /// What stands for two values in their order, the even one's place in the
    /// high half.
    pub(crate) pairs: &'a [u8; 256],
}

/// Packs values in blocks of `block`, an even number: two to a byte of `data`,
/// a scale of each block in `absmax`.
///
/// A full block is multiplied by the reciprocal of its scale, a short last one
/// divided by it: bitsandbytes' arithmetic, which fixes the bits.
pub(crate) fn pack_codes<T: Float>(
    code: SortedCode,
    block: usize,
    values: &[T],
    data: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let blocks = runs(block);
    let parts = values.chunks(blocks * block).zip(data.chunks_mut(blocks * block / 2)).zip(absmax.chunks_mut(blocks));
    run_all(parts.map(|((values, data), absmax)| Codes { code, block, values, data, absmax }))
}

struct Codes<'a, T> {
    code: SortedCode<'a>,
    block: usize,
    values: &'a [T],
    data: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl<T: Float> Kernel for Codes<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = self.values.chunks(self.block).zip(self.data.chunks_mut(self.block / 2));
        for ((values, data), absmax) in blocks.zip(self.absmax) {
            let (sixteens, rest) = values.as_chunks();
            let last = T::load(s, &padded(rest, T::from_f32(0.0)));
            let mut max = s.abs(last);
            for values in sixteens {
                max = s.max(s.abs(T::load(s, values)), max);
            }
            let max = largest(s, max);
            let floor = if max > TINY { max } else { TINY };
            let (to, to_rest) = data.split_at_mut(sixteens.len() * LANES / 2);
            let to = to.as_chunks_mut().0;
            if values.len() == self.block {
                *absmax = max;
                let factor = s.splat(1.0 / floor);
                for (to, values) in to.iter_mut().zip(sixteens) {
                    *to = self.code.encode(s, s.mul(T::load(s, values), factor));
                }
            } else {
                *absmax = floor;
                let scale = s.splat(floor);
                for (to, values) in to.iter_mut().zip(sixteens) {
                    *to = self.code.encode(s, s.div(T::load(s, values), scale));
                }
                let bytes = self.code.encode(s, s.div(last, scale));
                to_rest.copy_from_slice(&bytes[..to_rest.len()]);
            }
        }
    }
}

impl SortedCode<'_> {
    /// The codes of scaled values: as far up as there are midpoints below; a
    /// tie goes lower.
    #[inline(always)]
    fn encode<S: Simd>(&self, s: S, scaled: S::V) -> [u8; LANES / 2] {
        let places = s.count_below(clamp(s, scaled, -1.0, 1.0), self.bounds);
        let mut bytes = [0; LANES / 2];
        for (byte, pair) in bytes.iter_mut().zip(places.as_chunks::<2>().0) {
            *byte = self.pairs[usize::from(pair[0] << 4 | pair[1])];
        }
        bytes
    }
}
