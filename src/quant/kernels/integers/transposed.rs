//! dX = g · W: four rows of W lie side by side, as an instruction takes them.

use super::super::Float;
use super::{BLANK, Bytes, Integers, LIMBS, Line, ROWS, Row, join, split};
use crate::error::Result;
use crate::ffi::compute::{Columns, for_each_columns, threads};
use crate::ffi::simd::{BYTES, DotI8, I8Kernel, LANES, Simd, dispatch_i8};

/// Units of sixty-four columns that a thread takes at a time.
const STRIP: usize = 8;
/// Rows of W between which sums lie in memory.
const DEPTH: usize = 4 * BYTES;
/// Rows of W that an instruction takes.
const FOUR: usize = 4;
/// Rows of W whose bytes are asked for ahead: each is in another page of memory.
const AHEAD: usize = 2 * FOUR;

/// Sixteen sums.
type Lanes = Line<[i32; LANES]>;
const ZERO: Lanes = Line([0; LANES]);

/// dX = g · W, with these factors of the rows of W; answers whether g, by these, could be integers.
pub(in crate::quant::kernels) fn product_transposed<T: Float>(
    w: &Integers,
    factors: &[f32],
    g: &[T],
    dx: &mut [T],
) -> Result<bool> {
    let (out, units, threads) = (w.rows(), w.row / BYTES, threads());
    let strip = units.div_ceil(threads * units.div_ceil(threads * STRIP));
    for (g, dx) in g.chunks(ROWS * out).zip(dx.chunks_mut(ROWS * w.row)) {
        let Some(g) = split(g, out, Some(factors))? else { return Ok(false) };
        for_each_columns(dx, w.row, strip * BYTES, |i, dx| {
            dispatch_i8(Transposed { w, first: i * strip, g: &g, dx });
        })?;
    }
    Ok(true)
}

struct Transposed<'a, T> {
    w: &'a Integers<'a>,
    /// The first unit of the strip.
    first: usize,
    g: &'a [Row],
    dx: Columns<'a, T>,
}

/// `DEPTH` rows of sixty-four columns, four by four side by side, in the order of [`DotI8::interleave`].
type Block = [[Bytes; FOUR]; DEPTH / FOUR];
/// The sums of these columns.
type Sums = [[Lanes; LIMBS]; FOUR];

impl<T: Float> I8Kernel for Transposed<'_, T> {
    #[inline(always)]
    fn run<D: DotI8>(mut self, d: D) {
        let (units, rows) = (self.dx.len() / BYTES, self.g.len());
        let mut blocks = vec![[[BLANK; FOUR]; DEPTH / FOUR]; units];
        let mut sums = vec![[[ZERO; LIMBS]; FOUR]; units * rows];
        let mut offsets = vec![[ZERO; FOUR]; units];
        for start in (0..self.w.rows()).step_by(DEPTH) {
            let fours = self.interleave(d, start, &mut blocks);
            for ((block, sums), offsets) in blocks.iter().zip(sums.chunks_exact_mut(rows)).zip(&mut offsets) {
                let block = &block[..fours];
                add_up(d, block, offsets);
                let ((g4, g1), (s4, s1)) = (self.g.as_chunks::<4>(), sums.as_chunks_mut::<4>());
                for (g, sums) in g4.iter().zip(s4) {
                    accumulate(d, block, g, start / BYTES, sums);
                }
                for (g, sums) in g1.iter().zip(s1) {
                    accumulate(d, block, std::array::from_ref(g), start / BYTES, std::array::from_mut(sums));
                }
            }
        }
        self.finish(d, &sums, &offsets);
    }
}

impl<T: Float> Transposed<'_, T> {
    /// Lays rows of W, from `start` on, side by side; answers how many fours of them.
    #[inline(always)]
    fn interleave<D: DotI8>(&self, d: D, start: usize, blocks: &mut [Block]) -> usize {
        let out = self.w.rows();
        let fours = (out - start).min(DEPTH).div_ceil(FOUR);
        for four in 0..fours {
            // Rows that are not there are multiplied by a zero of g, which the offsets see as well.
            let row = |k: usize| &self.w.row((start + FOUR * four + k).min(out - 1))[self.first..][..blocks.len()];
            let rows = [row(0), row(1), row(2), row(3)];
            for (u, block) in blocks.iter_mut().enumerate() {
                for row in rows {
                    d.simd().prefetch(row[u].as_ptr().wrapping_add(AHEAD * self.w.row));
                }
                let bytes = [d.load(&rows[0][u]), d.load(&rows[1][u]), d.load(&rows[2][u]), d.load(&rows[3][u])];
                for (to, bytes) in block[four].iter_mut().zip(d.interleave(bytes)) {
                    d.store(bytes, &mut to.0);
                }
            }
        }
        fours
    }

    /// Writes the sums.
    #[inline(always)]
    fn finish<D: DotI8>(&mut self, d: D, sums: &[Sums], offsets: &[[Lanes; FOUR]]) {
        let s = d.simd();
        for (u, (sums, offsets)) in sums.chunks_exact(self.g.len()).zip(offsets).enumerate() {
            for (n, sums) in sums.iter().enumerate() {
                let scale = s.splat(self.g[n].scale.unwrap_or_default());
                let mut values = [[0.0; LANES]; FOUR];
                for j in 0..FOUR {
                    let [high, middle, low] = sums[j].map(|sums| d.load_sums(&sums.0));
                    let high = d.add(high, d.times_minus_128(d.load_sums(&offsets[j].0)));
                    s.store(s.mul(join(d, [high, middle, low]), scale), &mut values[j]);
                }
                let to = self.dx.row(n)[u * BYTES..][..BYTES].as_chunks_mut().0;
                for (i, to) in to.iter_mut().enumerate() {
                    // The order of `interleave`.
                    let mut columns = [0.0; LANES];
                    for (to, values) in columns.as_chunks_mut::<4>().0.iter_mut().zip(&values) {
                        *to = values.as_chunks().0[i];
                    }
                    T::store(s, s.load(&columns), to);
                }
            }
        }
    }
}

/// Adds up the columns of a block.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn add_up<D: DotI8>(d: D, block: &[[Bytes; FOUR]], offsets: &mut [Lanes; FOUR]) {
    let ones = d.splat([1; 4]);
    let mut sums = [d.zero(); FOUR];
    for j in 0..FOUR {
        sums[j] = d.load_sums(&offsets[j].0);
    }
    for w in block {
        for j in 0..FOUR {
            sums[j] = d.dot(ones, d.load(&w[j].0), sums[j]);
        }
    }
    for j in 0..FOUR {
        d.store_sums(sums[j], &mut offsets[j].0);
    }
}

/// Adds to the sums of `N` rows of g their products with a block, the first rows of which `line` of g belongs to.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn accumulate<D: DotI8, const N: usize>(
    d: D,
    block: &[[Bytes; FOUR]],
    g: &[Row; N],
    line: usize,
    sums: &mut [Sums; N],
) {
    // As many sums as there are registers for.
    for j in (0..FOUR).step_by(2) {
        let mut acc = [[[d.zero(); LIMBS]; 2]; N];
        for n in 0..N {
            for k in 0..LIMBS {
                for h in 0..2 {
                    acc[n][h][k] = d.load_sums(&sums[n][j + h][k].0);
                }
            }
        }
        for (i, block) in block.chunks(BYTES / FOUR).enumerate() {
            let mut fours = [[&[[0; FOUR]][..]; LIMBS]; N];
            for n in 0..N {
                for k in 0..LIMBS {
                    fours[n][k] = &g[n].lines[line + i][k].0.as_chunks().0[..block.len()];
                }
            }
            for (four, w) in block.iter().enumerate() {
                let w = [d.load(&w[j].0), d.load(&w[j + 1].0)];
                for n in 0..N {
                    for k in 0..LIMBS {
                        let g = d.splat(fours[n][k][four]);
                        for h in 0..2 {
                            acc[n][h][k] = d.dot(g, w[h], acc[n][h][k]);
                        }
                    }
                }
            }
        }
        for n in 0..N {
            for k in 0..LIMBS {
                for h in 0..2 {
                    d.store_sums(acc[n][h][k], &mut sums[n][j + h][k].0);
                }
            }
        }
    }
}
