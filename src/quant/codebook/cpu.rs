//! The CPU kernels: portable Rust, in parallel over as many threads as libtorch
//! uses. Temporaries are none, so that packing a model leaves no holes in the
//! heap.

use super::blocks::TINY;
use super::code::Code;
use crate::ffi::bytes::Plain;
use half::{bf16, f16};
use rayon::prelude::*;

/// Values whose codes are sought together: the shortest block.
const CHUNK: usize = 32;

/// A float type that the kernels read and write.
pub(super) trait Float: Plain {
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

macro_rules! float {
    ($($t:ty: $from:expr, $to:expr);*) => { $(impl Float for $t {
        #[inline(always)]
        fn from_f32(value: f32) -> Self { $from(value) }
        #[inline(always)]
        fn to_f32(self) -> f32 { $to(self) }
    })* };
}
float!(f32: |v| v, |v| v; bf16: bf16::from_f32, bf16::to_f32; f16: f16::from_f32, f16::to_f32);

/// How many elements each thread takes, in whole blocks; everything, where
/// handing out work would cost more than it saves.
fn part(len: usize, block: usize) -> usize {
    let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1);
    len.div_ceil(threads).max(1 << 15).next_multiple_of(block)
}

/// Packs values into `data` (two per byte) and `absmax` (one per block).
///
/// A full block is multiplied by the reciprocal of its scale, a short last one
/// divided by it: bitsandbytes' arithmetic, which fixes the bits.
pub(super) fn quantize<W: Float>(code: &Code, block: usize, values: &[W], data: &mut [u8], absmax: &mut [f32]) {
    let part = part(values.len(), block);
    values.par_chunks(part).zip(data.par_chunks_mut(part / 2)).zip(absmax.par_chunks_mut(part / block)).for_each(
        |((values, data), absmax)| {
            let blocks = values.chunks(block).zip(data.chunks_mut(block / 2)).zip(absmax);
            for ((values, data), scale) in blocks {
                *scale = quantize_block(code, block, values, data);
            }
        },
    );
}

/// Packs one block and answers its scale.
fn quantize_block<W: Float>(code: &Code, block: usize, values: &[W], data: &mut [u8]) -> f32 {
    let absmax = values.iter().fold(0f32, |max, v| max.max(v.to_f32().abs()));
    let (full, floor) = (values.len() == block, absmax.max(TINY as f32));
    let factor = 1.0 / floor;
    for (values, data) in values.chunks(CHUNK).zip(data.chunks_mut(CHUNK / 2)) {
        let mut scaled = [0f32; CHUNK];
        for (scaled, value) in scaled.iter_mut().zip(values) {
            *scaled = value.to_f32();
        }
        if full {
            scaled.iter_mut().for_each(|v| *v = (*v * factor).clamp(-1.0, 1.0));
        } else {
            scaled.iter_mut().for_each(|v| *v = (*v / floor).clamp(-1.0, 1.0));
        }
        // The nearest value is as far up as there are midpoints below; a tie
        // goes lower.
        let mut places = [0u8; CHUNK];
        for (place, value) in places.iter_mut().zip(scaled) {
            *place = code.bounds.iter().map(|bound| u8::from(value > *bound)).sum();
        }
        let codes = places.map(|place| code.order[usize::from(place & 15)]);
        for (byte, pair) in data.iter_mut().zip(codes.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
    }
    if full { absmax } else { floor }
}

/// Unpacks flat elements `start..start + out.len()`, rounding to `W` first.
pub(super) fn unpack<W: Float, T: Float>(packed: &Packed, start: usize, out: &mut [T]) {
    let part = part(out.len(), packed.block);
    if part >= out.len() {
        return packed.unpack::<W, T>(start, out);
    }
    out.par_chunks_mut(part).enumerate().for_each(|(i, out)| packed.unpack::<W, T>(start + i * part, out));
}

/// What the kernel reads.
pub(super) struct Packed<'a> {
    pub(super) code: &'static Code,
    /// Values in a block.
    pub(super) block: usize,
    /// Two codes per byte.
    pub(super) data: &'a [u8],
    /// The scale of a block.
    pub(super) scale: &'a (dyn Fn(usize) -> f32 + Sync),
}

impl Packed<'_> {
    fn unpack<W: Float, T: Float>(&self, start: usize, out: &mut [T]) {
        let value = |code: f32, scale: f32| T::from_f32(W::from_f32(code * scale).to_f32());
        let (data, table) = (self.data, &self.code.pairs);
        let mut at = start;
        let mut out = out;
        while !out.is_empty() {
            let len = (self.block - at % self.block).min(out.len());
            let (head, tail) = std::mem::take(&mut out).split_at_mut(len);
            let scale = (self.scale)(at / self.block);
            // Blocks have an even length, so only the ends of the range can split
            // a byte.
            let (odd, pairs) = head.split_at_mut(at % 2);
            if let [first] = odd {
                *first = value(table[data[at / 2] as usize][1], scale);
            }
            let mut chunks = pairs.chunks_exact_mut(2);
            let bytes = &data[(at + odd.len()) / 2..];
            for (pair, byte) in (&mut chunks).zip(bytes) {
                let codes = table[*byte as usize];
                pair[0] = value(codes[0], scale);
                pair[1] = value(codes[1], scale);
            }
            if let [last] = chunks.into_remainder() {
                *last = value(table[data[(at + len - 1) / 2] as usize][0], scale);
            }
            at += len;
            out = tail;
        }
    }
}
