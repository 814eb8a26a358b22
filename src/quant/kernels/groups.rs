//! optimum-quanto's formats of a few bits.

use super::formats::{as_words, words_of, write_values};
use super::{Dtype, Float, Format};
use crate::ffi::simd::{LANES, Simd};

/// What four bits can mean as an integer.
pub(super) const CODES: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

/// optimum-quanto's 4 and 2 bits: `scale · q − shift` in the weight's dtype for
/// each group, the rows of the grouped matrix packed one part over the other.
///
/// With R = ⌈groups · bits / 8⌉, byte row r holds group r in its lowest bits,
/// then group r + R, and so on.
#[derive(Debug)]
pub(crate) struct Groups<'a, W> {
    bytes: &'a [u8],
    /// The scale and the shift of each.
    scales: &'a [W],
    shifts: &'a [W],
    group: usize,
    bits: usize,
    /// What four bits can mean as an integer.
    codes: &'static [f32; LANES],
    /// R.
    packed_rows: usize,
}

impl<'a, W: Float> Groups<'a, W> {
    /// `bits` is 4 or 2.
    pub(crate) fn new(bytes: &'a [u8], scales: &'a [W], shifts: &'a [W], group: usize, bits: usize) -> Self {
        // Of two bits, the upper ones of four are another group's.
        const TWO: [f32; LANES] = [0., 1., 2., 3., 0., 1., 2., 3., 0., 1., 2., 3., 0., 1., 2., 3.];
        let packed_rows = scales.len().div_ceil(8 / bits);
        let codes = if bits == 4 { &CODES } else { &TWO };
        Groups { bytes, scales, shifts, group, bits, codes, packed_rows }
    }

    /// Where the bytes of a group start, and how far up its bits are.
    #[inline(always)]
    fn place(&self, index: usize) -> (usize, u32) {
        // Four parts at most: a division would take longer.
        let (mut row, mut shift) = (index, 0);
        while row >= self.packed_rows {
            row -= self.packed_rows;
            shift += self.bits as u32;
        }
        (row * self.group, shift)
    }

    /// A group with what its codes mean, the last step of it rounded to this dtype.
    #[inline(always)]
    pub(super) fn fields<S: Simd>(&self, s: S, index: usize, dtype: Dtype) -> Fields<'a, S::V> {
        let (start, shift) = self.place(index);
        let bytes = self.bytes[start..start + self.group].as_chunks().0;
        Fields { table: self.table(s, index, dtype), bytes, shift }
    }

    /// The 16 values that codes can mean.
    #[inline(always)]
    fn table<S: Simd>(&self, s: S, index: usize, dtype: Dtype) -> S::V {
        let scaled = W::DTYPE.round(s, s.mul(s.load(self.codes), self.scales[index].splat(s)));
        dtype.round(s, s.sub(scaled, self.shifts[index].splat(s)))
    }
}

/// A table of values, and bytes with a code at `shift` in each.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a, V> {
    pub(super) table: V,
    pub(super) bytes: &'a [[u8; LANES]],
    pub(super) shift: u32,
}

impl<'a, W: Float> Format for Groups<'a, W> {
    type Block<S: Simd> = Fields<'a, S::V>;

    #[inline(always)]
    fn block_len(&self) -> usize {
        self.group
    }

    #[inline(always)]
    fn block<S: Simd>(&self, s: S, index: usize) -> Fields<'a, S::V> {
        self.fields(s, index, W::DTYPE)
    }

    #[inline(always)]
    fn values<S: Simd>(&self, s: S, block: &Fields<'a, S::V>, i: usize) -> S::V {
        s.look_up_field(block.table, &block.bytes[i], block.shift)
    }

    #[inline(always)]
    fn write<S: Simd, T: Float>(&self, s: S, index: usize, first: usize, out: &mut [[T; 2 * LANES]]) {
        let block = self.block(s, index);
        let Some(words) = as_words::<S, T>(s, block.table) else { return write_values(self, s, &block, first, out) };
        for (bytes, out) in block.bytes.as_flattened().as_chunks().0[first..].iter().zip(out) {
            if let Some(out) = words_of(out) {
                s.look_up_field_as_words(words, bytes, block.shift, out);
            }
        }
    }

    #[inline(always)]
    fn address(&self, element: usize) -> *const u8 {
        let start = self.place(element / self.group).0 + element % self.group;
        self.bytes.as_ptr().wrapping_add(start)
    }

    fn value(&self, index: usize, at: usize) -> f32 {
        let (start, shift) = self.place(index);
        let code = self.bytes[start + at] >> shift & ((1 << self.bits) - 1);
        let scaled = W::DTYPE.round_one(f32::from(code) * self.scales[index].to_f32());
        W::DTYPE.round_one(scaled - self.shifts[index].to_f32())
    }
}
