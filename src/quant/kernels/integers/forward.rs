//! x · Wᵀ: rows of W by rows of x, sixty-four columns at a time.

use super::super::Float;
use super::{Integers, LIMBS, ROWS, Row, join, split};
use crate::error::Result;
use crate::ffi::compute::{Columns, for_each_columns};
use crate::ffi::simd::{BYTES, DotI8, I8Kernel, Simd, dispatch_i8};

/// Rows of x that stay in the second-level cache while they are multiplied by [`PART`] rows of W.
const BLOCK: usize = 16;
/// Rows of W that a thread takes at a time.
const PART: usize = 32;
/// Rows of W that are multiplied by a row of x at once: as many as there are registers for their sums.
const AT_ONCE: usize = 8;
/// The same by the first row of x, along which the rows of W are summed up.
const AT_FIRST: usize = 4;

/// y = x · Wᵀ, with these factors of the rows of W; answers whether x could be integers.
pub(in crate::quant::kernels) fn product<T: Float>(
    w: &Integers,
    factors: &[f32],
    x: &[T],
    y: &mut [T],
) -> Result<bool> {
    let out = w.rows();
    for (x, y) in x.chunks(ROWS * w.row).zip(y.chunks_mut(ROWS * out)) {
        let Some(x) = split(x, w.row, None)? else { return Ok(false) };
        for_each_columns(y, out, PART, |i, y| dispatch_i8(Product { w, factors, first: i * PART, x: &x, y }))?;
    }
    Ok(true)
}

struct Product<'a, T> {
    w: &'a Integers<'a>,
    factors: &'a [f32],
    /// The first row of W.
    first: usize,
    x: &'a [Row],
    y: Columns<'a, T>,
}

impl<T: Float> I8Kernel for Product<'_, T> {
    #[inline(always)]
    fn run<D: DotI8>(mut self, d: D) {
        let rows = self.y.len();
        let mut offsets = [d.zero(); PART];
        for (block, x) in self.x.chunks(BLOCK).enumerate() {
            let together = rows - rows % AT_ONCE;
            for i in (0..together).step_by(AT_ONCE) {
                self.rows::<D, AT_ONCE>(d, i, &mut offsets, block * BLOCK, x);
            }
            for i in together..rows {
                self.rows::<D, 1>(d, i, &mut offsets, block * BLOCK, x);
            }
        }
    }
}

impl<T: Float> Product<'_, T> {
    /// The products of `M` rows of W with a block of x, which begins at row `first`.
    #[inline(always)]
    fn rows<D: DotI8, const M: usize>(
        &mut self,
        d: D,
        i: usize,
        offsets: &mut [D::Sums; PART],
        first: usize,
        x: &[Row],
    ) {
        for (n, x) in x.iter().enumerate() {
            match first + n {
                0 if M == AT_ONCE => {
                    for i in (i..i + M).step_by(AT_FIRST) {
                        self.dot::<D, AT_FIRST, true>(d, i, offsets, 0, x);
                    }
                }
                0 => self.dot::<D, M, true>(d, i, offsets, 0, x),
                n => self.dot::<D, M, false>(d, i, offsets, n, x),
            }
        }
    }

    // The loops over `0..M` and the like below are unrolled into registers; iterators
    // and closures of the standard library would not be inlined for certain.

    /// The products of `M` rows of W with row `n` of x, and if that is the `FIRST`, what the 2²³ in each element of x
    /// adds to the sums of the high bytes, to be taken away.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn dot<D: DotI8, const M: usize, const FIRST: bool>(
        &mut self,
        d: D,
        i: usize,
        offsets: &mut [D::Sums; PART],
        n: usize,
        x: &Row,
    ) {
        let (s, units) = (d.simd(), self.w.row / BYTES);
        let lines = &x.lines[..units];
        let mut w = [self.w.row(self.first + i); M];
        for m in 0..M {
            w[m] = &self.w.row(self.first + i + m)[..units];
        }
        let (ones, mut all, mut sums) = (d.splat([1; 4]), [d.zero(); M], [[d.zero(); LIMBS]; M]);
        for u in 0..units {
            let mut x = [d.load(&lines[u][0].0); LIMBS];
            for k in 1..LIMBS {
                x[k] = d.load(&lines[u][k].0);
            }
            for m in 0..M {
                if FIRST {
                    // Rows are about as long as the pages of memory in which a processor looks ahead by itself.
                    s.prefetch(w[m][u].as_ptr().wrapping_add(M * self.w.row));
                }
                let w = d.load(&w[m][u]);
                if FIRST {
                    all[m] = d.dot(ones, w, all[m]);
                }
                for k in 0..LIMBS {
                    sums[m][k] = d.dot(x[k], w, sums[m][k]);
                }
            }
        }
        let (scale, y) = (x.scale.unwrap_or_default(), &mut self.y.row(n)[i..i + M]);
        for m in 0..M {
            if FIRST {
                offsets[i + m] = d.times_minus_128(all[m]);
            }
            sums[m][0] = d.add(sums[m][0], offsets[i + m]);
            y[m] = T::from_f32(s.sum(join(d, sums[m])) * scale * self.factors[self.first + i + m]);
        }
    }
}
