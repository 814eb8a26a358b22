//! How each family of formats turns its bytes into values.
//!
//! A format is a flat weight in blocks of consecutive elements that share
//! something: a scale, or a table of the values that a code can mean. The
//! table is worth it: rounding to the weight's dtype happens once for each of
//! its 16 entries instead of for every element.

use super::{Dtype, Float, Floats, Integers};
use crate::ffi::simd::{LANES, Portable, Simd};
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// The bytes and scales of a packed weight, as slices.
///
/// Values are those of the dtype that the weight had, held as f32.
pub(crate) trait Format: Sync {
    /// What the elements of a block share, and their bytes.
    type Block<S: Simd>: Copy;

    /// Elements of a block; the last block may be short.
    fn block_len(&self) -> usize;

    /// Prepares block `index`, which must be whole.
    fn block<S: Simd>(&self, s: S, index: usize) -> Self::Block<S>;

    /// The elements `16 i .. 16 i + 16` of a block, which must be there.
    fn values<S: Simd>(&self, s: S, block: &Self::Block<S>, i: usize) -> S::V;

    /// Writes the elements of a block from `32 first` on, which must be there, rounded to `T`.
    #[inline(always)]
    fn write<S: Simd, T: Float>(&self, s: S, index: usize, first: usize, out: &mut [[T; 2 * LANES]]) {
        write_values(self, s, &self.block(s, index), first, out);
    }

    /// Elements that a cache line has, one after the other in a row.
    const PER_LINE: usize = LINE;

    /// Where the byte of a flat element is, if there is such an element.
    fn address(&self, element: usize) -> *const u8;

    /// Asks for the bytes of these flat elements of a row, and their scales, to be in the cache soon.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, elements: Range<usize>) {
        prefetch(s, self.address(elements.start), elements.len() * LINE / Self::PER_LINE);
    }

    /// The element at `at` of a block, for what is left over.
    fn value(&self, index: usize, at: usize) -> f32;

    /// Whether [`pair`](Self::pair) answers the even elements and the odd ones,
    /// not the first sixteen and the others.
    const INTERLEAVED: bool = false;

    /// The elements `32 i .. 32 i + 32` of a block, which must be there, over
    /// the [`factor`](Self::factor) of their row: what products read.
    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, block: &Self::Block<S>, i: usize) -> [S::V; 2] {
        [self.values(s, block, 2 * i), self.values(s, block, 2 * i + 1)]
    }

    /// What the sum over a row is multiplied by.
    #[inline(always)]
    fn factor(&self, _row: usize) -> f32 {
        1.0
    }

    /// The bytes, if they are integers and [`factor`](Self::factor) is all that they lack.
    fn integers(&self) -> Option<Integers<'_>> {
        None
    }
}

/// Asks for so many bytes.
#[inline(always)]
pub(super) fn prefetch<S: Simd>(s: S, first: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(LINE) {
        s.prefetch(first.wrapping_add(at));
    }
}

/// Writes elements one sixteen after the other, each rounded on its own.
#[inline(always)]
pub(super) fn write_values<F: Format + ?Sized, S: Simd, T: Float>(
    format: &F,
    s: S,
    block: &F::Block<S>,
    first: usize,
    out: &mut [[T; 2 * LANES]],
) {
    for (i, out) in (2 * first..).step_by(2).zip(out) {
        T::store_pair(s, [format.values(s, block, i), format.values(s, block, i + 1)], out);
    }
}

/// A table of f32 as one of words of `T`, if that has 16 bits: 32 elements are
/// looked up at a time, and none is rounded on its own.
#[inline(always)]
pub(super) fn as_words<S: Simd, T: Float>(s: S, table: S::V) -> Option<S::Words> {
    let mut rounded = [T::from_f32(0.0); LANES];
    T::store(s, table, &mut rounded);
    let words: &[u16] = T::words(&mut rounded)?;
    Some(s.words(words.first_chunk()?))
}

/// The words of elements to write to.
#[inline(always)]
pub(super) fn words_of<T: Float>(out: &mut [T; 2 * LANES]) -> Option<&mut [u16; 2 * LANES]> {
    T::words(out)?.first_chunk_mut()
}

/// How a byte is read as a number.
pub(crate) trait Byte: Sync {
    /// Whether it is an integer.
    const INTEGER: bool = false;
    fn widen<S: Simd>(s: S, bytes: &[u8; LANES]) -> S::V;

    /// A power of two, by which twice as many are smaller, as [`widen_over`](Self::widen_over) answers them.
    const OVER: f32 = 1.0;
    #[inline(always)]
    fn widen_over<S: Simd>(s: S, bytes: &[[u8; LANES]; 2]) -> [S::V; 2] {
        [Self::widen(s, &bytes[0]), Self::widen(s, &bytes[1])]
    }
}

/// A signed integer.
#[derive(Debug)]
pub(crate) struct I8;
/// A float with 4 exponent bits, `e4m3fn`.
#[derive(Debug)]
pub(crate) struct E4m3;
/// A float with 5 exponent bits.
#[derive(Debug)]
pub(crate) struct E5m2;

impl Byte for I8 {
    const INTEGER: bool = true;

    #[inline(always)]
    fn widen<S: Simd>(s: S, bytes: &[u8; LANES]) -> S::V {
        s.widen_i8(bytes)
    }
}

impl Byte for E4m3 {
    #[inline(always)]
    fn widen<S: Simd>(s: S, bytes: &[u8; LANES]) -> S::V {
        s.decode_e4m3(bytes)
    }

    const OVER: f32 = 256.0;

    #[inline(always)]
    fn widen_over<S: Simd>(s: S, bytes: &[[u8; LANES]; 2]) -> [S::V; 2] {
        s.decode_e4m3_over_256(bytes)
    }
}

impl Byte for E5m2 {
    #[inline(always)]
    fn widen<S: Simd>(s: S, bytes: &[u8; LANES]) -> S::V {
        s.decode_e5m2(bytes)
    }
}

/// A byte for each element and a scale of the weight's dtype for each row:
/// `q · scale`, rounded to the dtype.
#[derive(Debug)]
pub(crate) struct Bytes<'a, B> {
    bytes: &'a [u8],
    pub(super) scales: Floats<'a>,
    pub(super) dtype: Dtype,
    row: usize,
    read: PhantomData<fn() -> B>,
}

impl<'a, B: Byte> Bytes<'a, B> {
    /// `row` is the number of elements in a row.
    pub(crate) fn new(bytes: &'a [u8], scales: Floats<'a>, row: usize) -> Self {
        Bytes { bytes, scales, dtype: scales.dtype(), row, read: PhantomData }
    }
}

/// A scale, and bytes of one number each.
#[derive(Clone, Copy)]
pub(crate) struct Scaled<'a, V> {
    pub(super) scale: V,
    pub(super) bytes: &'a [[u8; LANES]],
}

impl<'a, B: Byte> Format for Bytes<'a, B> {
    type Block<S: Simd> = Scaled<'a, S::V>;

    #[inline(always)]
    fn block_len(&self) -> usize {
        self.row
    }

    #[inline(always)]
    fn block<S: Simd>(&self, s: S, index: usize) -> Scaled<'a, S::V> {
        let start = index * self.row;
        let bytes = self.bytes[start..start + self.row].as_chunks().0;
        Scaled { scale: s.splat(self.scales.at(index)), bytes }
    }

    #[inline(always)]
    fn values<S: Simd>(&self, s: S, block: &Scaled<'a, S::V>, i: usize) -> S::V {
        self.dtype.round(s, s.mul(B::widen(s, &block.bytes[i]), block.scale))
    }

    #[inline(always)]
    fn write<S: Simd, T: Float>(&self, s: S, index: usize, first: usize, out: &mut [[T; 2 * LANES]]) {
        let block = self.block(s, index);
        let dtype = self.dtype.before::<T>();
        for (bytes, out) in block.bytes.as_chunks().0[first..].iter().zip(out) {
            let [a, b]: &[_; 2] = bytes;
            let values = [s.mul(B::widen(s, a), block.scale), s.mul(B::widen(s, b), block.scale)];
            T::store_pair(s, [dtype.round(s, values[0]), dtype.round(s, values[1])], out);
        }
    }

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, block: &Scaled<'a, S::V>, i: usize) -> [S::V; 2] {
        B::widen_over(s, &block.bytes.as_chunks().0[i])
    }

    #[inline(always)]
    fn factor(&self, row: usize) -> f32 {
        self.scales.at(row) * B::OVER
    }

    fn integers(&self) -> Option<Integers<'a>> {
        if B::INTEGER { Integers::new(self.bytes, self.row) } else { None }
    }

    #[inline(always)]
    fn address(&self, element: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(element)
    }

    fn value(&self, index: usize, at: usize) -> f32 {
        let number = B::widen(Portable, &[self.bytes[index * self.row + at]; LANES])[0];
        self.dtype.round_one(number * self.scales.at(index))
    }
}

/// bitsandbytes' 8 bits: `q · absmax · step` with an f32 maximum for each row,
/// rounded to the dtype.
#[derive(Debug)]
pub(crate) struct Absmax<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) scales: &'a [f32],
    /// 1 / 127.
    pub(crate) step: f32,
    pub(crate) row: usize,
    pub(crate) dtype: Dtype,
}

impl<'a> Format for Absmax<'a> {
    type Block<S: Simd> = Scaled<'a, S::V>;

    #[inline(always)]
    fn block_len(&self) -> usize {
        self.row
    }

    #[inline(always)]
    fn block<S: Simd>(&self, s: S, index: usize) -> Scaled<'a, S::V> {
        let bytes = self.bytes[index * self.row..][..self.row].as_chunks().0;
        Scaled { scale: s.splat(self.scales[index]), bytes }
    }

    #[inline(always)]
    fn values<S: Simd>(&self, s: S, block: &Scaled<'a, S::V>, i: usize) -> S::V {
        let scaled = s.mul(s.widen_i8(&block.bytes[i]), block.scale);
        self.dtype.round(s, s.mul(scaled, s.splat(self.step)))
    }

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, block: &Scaled<'a, S::V>, i: usize) -> [S::V; 2] {
        [s.widen_i8(&block.bytes[2 * i]), s.widen_i8(&block.bytes[2 * i + 1])]
    }

    #[inline(always)]
    fn factor(&self, row: usize) -> f32 {
        self.scales[row] * self.step
    }

    fn integers(&self) -> Option<Integers<'a>> {
        Integers::new(self.bytes, self.row)
    }

    #[inline(always)]
    fn address(&self, element: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(element)
    }

    fn value(&self, index: usize, at: usize) -> f32 {
        let number = f32::from(self.bytes[index * self.row + at] as i8);
        self.dtype.round_one(number * self.scales[index] * self.step)
    }
}
