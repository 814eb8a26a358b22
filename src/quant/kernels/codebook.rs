//! bitsandbytes' 4-bit formats: a code book, and a scale for each block, which
//! may be quantised itself.

use super::formats::{LINE, as_words, prefetch, words_of, write_values};
use super::{Dtype, Float, Format};
use crate::ffi::simd::{LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// The scales of [`Codes`], one for each block.
pub(crate) trait Scales: Sync {
    fn at(&self, block: usize) -> f32;
    /// Asks for those of these blocks.
    fn prefetch<S: Simd>(&self, s: S, blocks: Range<usize>);
}

impl Scales for &[f32] {
    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, blocks: Range<usize>) {
        prefetch(s, self.as_ptr().wrapping_add(blocks.start).cast(), size_of::<f32>() * blocks.len());
    }

    #[inline(always)]
    fn at(&self, block: usize) -> f32 {
        self[block]
    }
}

/// Scales that are quantised themselves:
/// `map[codes[b]] · nested[b / NESTED_BLOCK] + offset`.
#[derive(Debug)]
pub(crate) struct Double<'a> {
    pub(crate) codes: &'a [u8],
    pub(crate) map: &'a [f32; 256],
    pub(crate) nested: &'a [f32],
    pub(crate) offset: f32,
}

impl Double<'_> {
    /// Scales of a block of their own.
    pub(crate) const NESTED_BLOCK: usize = 256;
}

impl Scales for Double<'_> {
    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, blocks: Range<usize>) {
        prefetch(s, self.codes.as_ptr().wrapping_add(blocks.start), blocks.len());
    }

    #[inline(always)]
    fn at(&self, block: usize) -> f32 {
        self.map[usize::from(self.codes[block])] * self.nested[block / Self::NESTED_BLOCK] + self.offset
    }
}

/// bitsandbytes' 4 bits: `code[q] · scale` with an f32 scale for each block,
/// rounded to the dtype; the even element of a pair is the high nibble.
#[derive(Debug)]
pub(crate) struct Codes<'a, Sc, W> {
    bytes: &'a [u8],
    scales: Sc,
    code: &'a [f32; LANES],
    block: usize,
    weight: PhantomData<fn() -> W>,
}

impl<'a, Sc, W> Codes<'a, Sc, W> {
    /// Blocks are of an even number of elements, so that no byte is in two.
    pub(crate) fn new(bytes: &'a [u8], scales: Sc, code: &'a [f32; LANES], block: usize) -> Self {
        Codes { bytes, scales, code, block, weight: PhantomData }
    }
}

/// A table of values, and bytes of two codes each.
#[derive(Clone, Copy)]
pub(crate) struct Nibbles<'a, V> {
    pub(super) table: V,
    pub(super) bytes: &'a [u8],
}

impl<'a, Sc: Scales, W: Float> Codes<'a, Sc, W> {
    /// What the codes of a block mean, rounded to a dtype.
    #[inline(always)]
    fn table<S: Simd>(&self, s: S, index: usize, dtype: Dtype) -> S::V {
        dtype.round(s, s.mul(s.load(self.code), s.splat(self.scales.at(index))))
    }

    /// A whole block with what its codes mean rounded to a dtype.
    #[inline(always)]
    pub(super) fn nibbles<S: Simd>(&self, s: S, index: usize, dtype: Dtype) -> Nibbles<'a, S::V> {
        let bytes = &self.bytes[index * (self.block / 2)..][..self.block / 2];
        Nibbles { table: self.table(s, index, dtype), bytes }
    }
}

impl<'a, Sc: Scales, W: Float> Format for Codes<'a, Sc, W> {
    type Block<S: Simd> = Nibbles<'a, S::V>;

    #[inline(always)]
    fn block_len(&self) -> usize {
        self.block
    }

    #[inline(always)]
    fn block<S: Simd>(&self, s: S, index: usize) -> Nibbles<'a, S::V> {
        self.nibbles(s, index, W::DTYPE)
    }

    #[inline(always)]
    fn values<S: Simd>(&self, s: S, block: &Nibbles<'a, S::V>, i: usize) -> S::V {
        s.look_up_nibbles(block.table, &block.bytes.as_chunks().0[i])
    }

    #[inline(always)]
    fn write<S: Simd, T: Float>(&self, s: S, index: usize, first: usize, out: &mut [[T; 2 * LANES]]) {
        // The last block may be short.
        let start = index * (self.block / 2);
        let bytes = &self.bytes[start..(start + self.block / 2).min(self.bytes.len())];
        let block = Nibbles { table: self.table(s, index, W::DTYPE.before::<T>()), bytes };
        let Some(words) = as_words::<S, T>(s, block.table) else { return write_values(self, s, &block, first, out) };
        for (bytes, out) in block.bytes.as_chunks().0[first..].iter().zip(out) {
            if let Some(out) = words_of(out) {
                s.look_up_nibbles_as_words(words, bytes, out);
            }
        }
    }

    const INTERLEAVED: bool = true;

    // A byte is widened once for both of its codes.
    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, block: &Nibbles<'a, S::V>, i: usize) -> [S::V; 2] {
        let bytes = &block.bytes.as_chunks().0[i];
        [s.look_up_field(block.table, bytes, 4), s.look_up_field(block.table, bytes, 0)]
    }

    const PER_LINE: usize = 2 * LINE;

    #[inline(always)]
    fn address(&self, element: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(element / 2)
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, elements: Range<usize>) {
        prefetch(s, self.address(elements.start), elements.len() / 2);
        self.scales.prefetch(s, elements.start / self.block..elements.end / self.block);
    }

    fn value(&self, index: usize, at: usize) -> f32 {
        let byte = self.bytes[(index * self.block + at) / 2];
        let code = if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
        W::DTYPE.round_one(self.code[usize::from(code)] * self.scales.at(index))
    }
}
