//! Formats of two codes in a byte, the even one of a pair in the low half:
//! MXFP4's and GPTQ's.

use super::codebook::Nibbles;
use super::formats::LINE;
use super::groups::CODES;
use super::{Dtype, Float, Format};
use crate::ffi::simd::{LANES, Simd};

/// The same bytes, their halves changed over.
#[inline(always)]
fn swapped(bytes: [u8; LANES / 2]) -> [u8; LANES / 2] {
    const LOW: u64 = 0x0f0f_0f0f_0f0f_0f0f;
    let word = u64::from_le_bytes(bytes);
    (word >> 4 & LOW | (word & LOW) << 4).to_le_bytes()
}

/// The code of element `at` of nibbles, the even one of a pair in the low half.
#[inline(always)]
fn low_first(bytes: &[u8], at: usize) -> u8 {
    bytes[at / 2] >> (4 * (at % 2)) & 15
}

/// MXFP4: e2m1 floats, and a power of two for 32 of them, which multiply to a
/// value that is rounded to the dtype. Neither bytes nor powers are shared by
/// rows, and a row is a block.
#[derive(Debug)]
pub(crate) struct Powers<'a> {
    pub(crate) bytes: &'a [u8],
    /// e8m0: 2^(byte − 127).
    pub(crate) scales: &'a [u8],
    pub(crate) code: &'a [f32; LANES],
    /// Elements of a row.
    pub(crate) row: usize,
    pub(crate) dtype: Dtype,
}

impl<'a> Powers<'a> {
    /// The bytes and powers of a row.
    #[inline(always)]
    fn parts(&self, index: usize) -> (&'a [u8], &'a [u8]) {
        let (bytes, scales) = (self.row.div_ceil(2), self.row.div_ceil(32));
        (&self.bytes[index * bytes..][..bytes], &self.scales[index * scales..][..scales])
    }
}

/// The value of an e8m0 byte that is not NaN.
#[inline(always)]
pub(crate) fn power(byte: u8) -> f32 {
    // 2^-127 is subnormal, hence not all zeros with an exponent.
    f32::from_bits(if byte == 0 { 1 << 22 } else { u32::from(byte) << 23 })
}

/// A row of bytes of two codes each, and the powers.
#[derive(Clone, Copy)]
pub(crate) struct PowersRow<'a, V> {
    table: V,
    bytes: &'a [u8],
    scales: &'a [u8],
}

impl<V: Copy> PowersRow<'_, V> {
    /// The even elements of `32 i .. 32 i + 32` and the odd ones, not rounded.
    #[inline(always)]
    pub(super) fn scaled<S: Simd<V = V>>(&self, s: S, i: usize) -> [V; 2] {
        let (bytes, scale) = (&self.bytes.as_chunks().0[i], s.splat(power(self.scales[i])));
        let (even, odd) = (s.look_up_field(self.table, bytes, 0), s.look_up_field(self.table, bytes, 4));
        [s.mul(even, scale), s.mul(odd, scale)]
    }
}

impl<'a> Format for Powers<'a> {
    type Block<S: Simd> = PowersRow<'a, S::V>;

    #[inline(always)]
    fn block_len(&self) -> usize {
        self.row
    }

    #[inline(always)]
    fn block<S: Simd>(&self, s: S, index: usize) -> PowersRow<'a, S::V> {
        let (bytes, scales) = self.parts(index);
        PowersRow { table: s.load(self.code), bytes, scales }
    }

    #[inline(always)]
    fn values<S: Simd>(&self, s: S, block: &PowersRow<'a, S::V>, i: usize) -> S::V {
        let values = s.look_up_nibbles(block.table, &swapped(block.bytes.as_chunks().0[i]));
        self.dtype.round(s, s.mul(values, s.splat(power(block.scales[i / 2]))))
    }

    const INTERLEAVED: bool = true;

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, block: &PowersRow<'a, S::V>, i: usize) -> [S::V; 2] {
        let [even, odd] = block.scaled(s, i);
        [self.dtype.round(s, even), self.dtype.round(s, odd)]
    }

    const PER_LINE: usize = 2 * LINE;

    #[inline(always)]
    fn address(&self, element: usize) -> *const u8 {
        let (row, column) = (element / self.row, element % self.row);
        self.bytes.as_ptr().wrapping_add(row * self.row.div_ceil(2) + column / 2)
    }

    fn value(&self, index: usize, at: usize) -> f32 {
        let (bytes, scales) = self.parts(index);
        self.dtype.round_one(self.code[usize::from(low_first(bytes, at))] * power(scales[at / 32]))
    }
}

/// GPTQ's 4 bits: `scale · (q − zero)`, rounded to the dtype, with a scale of
/// the dtype and a zero for each group; the even element of a pair is the low
/// nibble.
#[derive(Debug)]
pub(crate) struct Zeros<'a, W> {
    bytes: &'a [u8],
    scales: &'a [W],
    zeros: &'a [u8],
    group: usize,
}

impl<'a, W: Float> Zeros<'a, W> {
    /// Groups are of an even number of elements, so that no byte is in two.
    pub(crate) fn new(bytes: &'a [u8], scales: &'a [W], zeros: &'a [u8], group: usize) -> Self {
        Zeros { bytes, scales, zeros, group }
    }
}

impl<'a, W: Float> Format for Zeros<'a, W> {
    type Block<S: Simd> = Nibbles<'a, S::V>;

    #[inline(always)]
    fn block_len(&self) -> usize {
        self.group
    }

    #[inline(always)]
    fn block<S: Simd>(&self, s: S, index: usize) -> Nibbles<'a, S::V> {
        let steps = s.sub(s.load(&CODES), s.splat(f32::from(self.zeros[index])));
        let table = W::DTYPE.round(s, s.mul(steps, self.scales[index].splat(s)));
        Nibbles { table, bytes: &self.bytes[index * (self.group / 2)..][..self.group / 2] }
    }

    #[inline(always)]
    fn values<S: Simd>(&self, s: S, block: &Nibbles<'a, S::V>, i: usize) -> S::V {
        s.look_up_nibbles(block.table, &swapped(block.bytes.as_chunks().0[i]))
    }

    const INTERLEAVED: bool = true;

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, block: &Nibbles<'a, S::V>, i: usize) -> [S::V; 2] {
        let bytes = &block.bytes.as_chunks().0[i];
        [s.look_up_field(block.table, bytes, 0), s.look_up_field(block.table, bytes, 4)]
    }

    const PER_LINE: usize = 2 * LINE;

    #[inline(always)]
    fn address(&self, element: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(element / 2)
    }

    fn value(&self, index: usize, at: usize) -> f32 {
        let code = low_first(&self.bytes[index * (self.group / 2)..], at);
        let steps = f32::from(code) - f32::from(self.zeros[index]);
        W::DTYPE.round_one(steps * self.scales[index].to_f32())
    }
}
