//! The CPU kernels: portable Rust, in parallel over as many threads as libtorch
//! uses. Temporaries are none, so that packing a model leaves no holes in the
//! heap.

use super::blocks::TINY;
use super::{BLOCK, CODE};
use crate::ffi::bytes::Plain;
use half::{bf16, f16};
use rayon::prelude::*;

const BLOCK_LEN: usize = BLOCK as usize;

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

/// Both values of each byte, so that one look-up serves two elements.
static PAIRS: [[f32; 2]; 256] = {
    let mut table = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = [CODE[byte >> 4], CODE[byte & 15]];
        byte += 1;
    }
    table
};

/// Midpoints between neighbouring codes.
static BOUNDS: [f32; 15] = {
    let mut bounds = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        bounds[i] = (CODE[i] + CODE[i + 1]) / 2.0;
        i += 1;
    }
    bounds
};

/// How many elements each thread takes, in whole blocks; everything, where
/// handing out work would cost more than it saves.
fn part(len: usize) -> usize {
    let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1);
    len.div_ceil(threads).next_multiple_of(BLOCK_LEN).max(1 << 15)
}

/// Packs values into `data` (two per byte) and `absmax` (one per block).
///
/// A full block is multiplied by the reciprocal of its scale, a short last one
/// divided by it: bitsandbytes' arithmetic, which fixes the bits.
pub(super) fn quantize<W: Float>(values: &[W], data: &mut [u8], absmax: &mut [f32]) {
    let part = part(values.len());
    values.par_chunks(part).zip(data.par_chunks_mut(part / 2)).zip(absmax.par_chunks_mut(part / BLOCK_LEN)).for_each(
        |((values, data), absmax)| {
            let blocks = values.chunks(BLOCK_LEN).zip(data.chunks_mut(BLOCK_LEN / 2)).zip(absmax);
            for ((values, data), scale) in blocks {
                *scale = quantize_block(values, data);
            }
        },
    );
}

/// Packs one block and answers its scale.
fn quantize_block<W: Float>(values: &[W], data: &mut [u8]) -> f32 {
    let mut scaled = [0f32; BLOCK_LEN];
    for (scaled, value) in scaled.iter_mut().zip(values) {
        *scaled = value.to_f32();
    }
    let absmax = scaled.iter().fold(0f32, |max, v| max.max(v.abs()));
    let floor = absmax.max(TINY as f32);
    if values.len() == BLOCK_LEN {
        let factor = 1.0 / floor;
        scaled.iter_mut().for_each(|v| *v = (*v * factor).clamp(-1.0, 1.0));
    } else {
        scaled.iter_mut().for_each(|v| *v = (*v / floor).clamp(-1.0, 1.0));
    }
    // The nearest code is the number of midpoints below; a tie goes lower.
    let mut codes = [0u8; BLOCK_LEN];
    for (code, value) in codes.iter_mut().zip(scaled) {
        *code = BOUNDS.iter().map(|bound| u8::from(value > *bound)).sum();
    }
    for (byte, pair) in data.iter_mut().zip(codes.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    if values.len() == BLOCK_LEN { absmax } else { floor }
}

/// Unpacks flat elements `start..start + out.len()`, rounding to `W` first.
pub(super) fn unpack<W: Float, T: Float>(
    data: &[u8],
    scale: &(dyn Fn(usize) -> f32 + Sync),
    start: usize,
    out: &mut [T],
) {
    let part = part(out.len());
    if part >= out.len() {
        return unpack_range::<W, T>(data, scale, start, out);
    }
    out.par_chunks_mut(part).enumerate().for_each(|(i, out)| unpack_range::<W, T>(data, scale, start + i * part, out));
}

fn unpack_range<W: Float, T: Float>(data: &[u8], scale: &(dyn Fn(usize) -> f32 + Sync), start: usize, out: &mut [T]) {
    let value = |code: f32, scale: f32| T::from_f32(W::from_f32(code * scale).to_f32());
    let mut at = start;
    let mut out = out;
    while !out.is_empty() {
        let len = (BLOCK_LEN - at % BLOCK_LEN).min(out.len());
        let (head, tail) = std::mem::take(&mut out).split_at_mut(len);
        let scale = scale(at / BLOCK_LEN);
        // Blocks have an even length, so only the ends of the range can split
        // a byte.
        let (odd, pairs) = head.split_at_mut(at % 2);
        if let [first] = odd {
            *first = value(PAIRS[data[at / 2] as usize][1], scale);
        }
        let mut chunks = pairs.chunks_exact_mut(2);
        let bytes = &data[(at + odd.len()) / 2..];
        for (pair, byte) in (&mut chunks).zip(bytes) {
            let codes = PAIRS[*byte as usize];
            pair[0] = value(codes[0], scale);
            pair[1] = value(codes[1], scale);
        }
        if let [last] = chunks.into_remainder() {
            *last = value(PAIRS[data[(at + len - 1) / 2] as usize][0], scale);
        }
        at += len;
        out = tail;
    }
}
