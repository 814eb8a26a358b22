//! How each family of formats answers its values as bf16, for processors that
//! multiply these: exact for a weight of that dtype.

use super::codebook::{Nibbles, Scales};
use super::groups::Fields;
use super::nibbles::PowersRow;
use super::{Codes, Dtype, Float, Format, Groups, Powers, Zeros};
use crate::ffi::simd::{DotBf16, First, LANES, Simd};

/// Elements that [`InBf16::quad`] answers.
pub(super) const QUAD: usize = 4 * LANES;

/// Sixteen f32 beside an instruction set's bf16.
pub(super) type V<D> = <<D as DotBf16>::S as Simd>::V;

/// A [`Format`] whose values can be read as bf16.
pub(crate) trait InBf16: Format {
    /// What the elements of a block share, and their bytes.
    type BlockOf<D: DotBf16>: Copy;

    /// Whether a few blocks of these fill the registers.
    const LARGE_BLOCKS: bool = false;

    /// The dtype of the weight: what is answered are its values if it is bf16.
    fn dtype(&self) -> Dtype;

    /// Prepares block `index`.
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> Self::BlockOf<D>;

    /// Prepares block `index`, over the [`factor_in_bf16`](Self::factor_in_bf16) of its row, for x · Wᵀ.
    #[inline(always)]
    fn block_over_factor<D: DotBf16>(&self, d: D, index: usize) -> Self::BlockOf<D> {
        self.block_in_bf16(d, index)
    }

    /// What the sum over a row is multiplied by then.
    #[inline(always)]
    fn factor_in_bf16(&self, _row: usize) -> f32 {
        1.0
    }

    /// The elements `64 i .. 64 i + 64` of a block, which must be there, in the order of [`place`](Self::place).
    fn quad<D: DotBf16>(&self, d: D, block: &Self::BlockOf<D>, i: usize) -> [D::P; 2];

    /// The same from flat element `at` on, of a block of which nothing else is read soon.
    #[inline(always)]
    fn quad_alone<D: DotBf16>(&self, d: D, at: usize) -> [D::P; 2] {
        let block = self.block_in_bf16(d, at / self.block_len());
        self.quad(d, &block, at % self.block_len() / QUAD)
    }

    /// Which of the 64 elements lane `i` of answer `k` holds.
    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        2 * LANES * k + i
    }
}

/// The order of [`DotBf16::look_up_nibbles`].
#[inline(always)]
fn place_of_nibbles(k: usize, i: usize) -> usize {
    4 * (i % LANES) + 2 * k + i / LANES
}

/// Thirty-two bytes of two codes each.
#[inline(always)]
fn look_up<D: DotBf16>(d: D, block: &Nibbles<D::P>, i: usize, first: First) -> [D::P; 2] {
    d.look_up_nibbles(block.table, &block.bytes.as_chunks().0[i], first)
}

impl<'a, Sc: Scales, W: Float> InBf16 for Codes<'a, Sc, W> {
    type BlockOf<D: DotBf16> = Nibbles<'a, D::P>;

    fn dtype(&self) -> Dtype {
        W::DTYPE
    }

    #[inline(always)]
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> Nibbles<'a, D::P> {
        // Not rounded to the dtype, which the table does.
        let block = self.nibbles(d.simd(), index, Dtype::F32);
        Nibbles { table: d.table(block.table), bytes: block.bytes }
    }

    #[inline(always)]
    fn quad<D: DotBf16>(&self, d: D, block: &Nibbles<'a, D::P>, i: usize) -> [D::P; 2] {
        look_up(d, block, i, First::High)
    }

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        place_of_nibbles(k, i)
    }
}

impl<'a, W: Float> InBf16 for Zeros<'a, W> {
    type BlockOf<D: DotBf16> = Nibbles<'a, D::P>;

    fn dtype(&self) -> Dtype {
        W::DTYPE
    }

    #[inline(always)]
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> Nibbles<'a, D::P> {
        let block = self.block(d.simd(), index);
        Nibbles { table: d.table(block.table), bytes: block.bytes }
    }

    #[inline(always)]
    fn quad<D: DotBf16>(&self, d: D, block: &Nibbles<'a, D::P>, i: usize) -> [D::P; 2] {
        look_up(d, block, i, First::Low)
    }

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        place_of_nibbles(k, i)
    }
}

impl<'a, W: Float> InBf16 for Groups<'a, W> {
    type BlockOf<D: DotBf16> = Fields<'a, D::P>;
    const LARGE_BLOCKS: bool = true;

    fn dtype(&self) -> Dtype {
        W::DTYPE
    }

    #[inline(always)]
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> Fields<'a, D::P> {
        // Not rounded to the dtype, which the table does.
        let block = self.fields(d.simd(), index, Dtype::F32);
        Fields { table: d.table(block.table), bytes: block.bytes, shift: block.shift }
    }

    #[inline(always)]
    fn quad<D: DotBf16>(&self, d: D, block: &Fields<'a, D::P>, i: usize) -> [D::P; 2] {
        let bytes = block.bytes.as_flattened().as_chunks().0;
        let (a, b) = (&bytes[2 * i], &bytes[2 * i + 1]);
        [d.look_up_field(block.table, a, block.shift), d.look_up_field(block.table, b, block.shift)]
    }
}

impl<'a> InBf16 for Powers<'a> {
    type BlockOf<D: DotBf16> = PowersRow<'a, V<D>>;

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    #[inline(always)]
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> PowersRow<'a, V<D>> {
        self.block(d.simd(), index)
    }

    #[inline(always)]
    fn quad<D: DotBf16>(&self, d: D, block: &PowersRow<'a, V<D>>, i: usize) -> [D::P; 2] {
        let s = d.simd();
        [d.pack(block.scaled(s, 2 * i)), d.pack(block.scaled(s, 2 * i + 1))]
    }

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        2 * LANES * k + 2 * (i % LANES) + i / LANES
    }
}
