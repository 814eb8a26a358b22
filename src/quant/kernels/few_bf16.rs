//! The products of [`few`](super::few) where weight and activations are bf16
//! and the processor multiplies these: nothing is widened, and an instruction
//! does two products in each lane.
//!
//! Sums are in f32. Subnormal bf16 count as zero.

use super::in_bf16::{InBf16, QUAD};
use super::{Dtype, Float};
use crate::error::Result;
use crate::ffi::compute::{for_each_chunk, threads};
use crate::ffi::simd::{Bf16Kernel, DotBf16, LANES, Simd, dispatch_bf16, multiplies_bf16, multiplies_bf16_faster};
use half::bf16;

/// Elements of a [`QUAD`] of x, in the format's order, in cache lines of their own.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Quad([[bf16; 2 * LANES]; 2]);

/// Sums of a [`QUAD`] of dX.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Sums([[f32; LANES]; 4]);

/// Weight rows that a thread takes at a time.
const PART: usize = 32;
/// Elements of x, all rows together, that stay in the first-level cache.
const STRIP: usize = 12288;
/// The same of dX, whose sums are f32.
const STRIP_OF_SUMS: usize = 6144;

/// Whether the layout fits, and the processor gains by it; the unit tests take
/// any that can.
pub(super) fn fits<F: InBf16>(format: &F, inn: usize) -> bool {
    let block = format.block_len();
    let fits = format.dtype() == Dtype::Bf16 && block.is_multiple_of(QUAD) && inn.is_multiple_of(block);
    fits && if cfg!(test) { multiplies_bf16() } else { multiplies_bf16_faster() }
}

/// y = x · Wᵀ for `N` rows.
pub(super) fn product<F: InBf16, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    x: &[bf16],
    y: &mut [T],
) -> Result<()> {
    // The rows side by side, quad by quad.
    let mut quads = vec![[Quad::default(); N]; inn / QUAD];
    for (n, x) in x.chunks_exact(inn).enumerate() {
        for (to, from) in quads.iter_mut().zip(x.as_chunks::<QUAD>().0) {
            to[n] = Quad(std::array::from_fn(|k| std::array::from_fn(|i| from[F::place(k, i)])));
        }
    }
    let mut columns = vec![[0f32; N]; out];
    for_each_chunk(&mut columns, PART, |i, columns| {
        dispatch_bf16(Product { format, row: i * PART, x: &quads, columns });
    })?;
    for (n, y) in y.chunks_exact_mut(out).enumerate() {
        y.iter_mut().zip(&columns).for_each(|(to, from)| *to = T::from_f32(from[n]));
    }
    Ok(())
}

struct Product<'a, F, const N: usize> {
    format: &'a F,
    row: usize,
    x: &'a [[Quad; N]],
    columns: &'a mut [[f32; N]],
}

impl<F: InBf16, const N: usize> Bf16Kernel for Product<'_, F, N> {
    #[inline(always)]
    fn run<D: DotBf16>(mut self, d: D) {
        // Whole blocks of x that stay in the cache for all rows of W.
        let block = self.format.block_len() / QUAD;
        let strip = (STRIP / N / QUAD / block).max(1) * block;
        for (i, x) in self.x.chunks(strip).enumerate() {
            // As many sums as there are registers for.
            match N {
                1..=4 => self.rows::<D, 4>(d, x, i * strip),
                _ => self.rows::<D, 2>(d, x, i * strip),
            }
        }
    }
}

impl<F: InBf16, const N: usize> Product<'_, F, N> {
    /// Adds the products with a strip of x, which begins at this quad, `M` rows of W at a time.
    #[inline(always)]
    fn rows<D: DotBf16, const M: usize>(&mut self, d: D, x: &[[Quad; N]], quad: usize) {
        let (groups, rest) = self.columns.as_chunks_mut::<M>();
        let rest_row = self.row + groups.len() * M;
        for (i, group) in groups.iter_mut().enumerate() {
            dot::<D, F, N, M>(d, self.format, [self.row + i * M, quad], self.x.len(), x, group);
        }
        for (i, column) in rest.iter_mut().enumerate() {
            dot::<D, F, N, 1>(d, self.format, [rest_row + i, quad], self.x.len(), x, std::array::from_mut(column));
        }
    }
}

// The loops over `0..N` and `0..M` below are unrolled into registers; iterators
// and closures of the standard library would not be inlined for certain.

/// Adds to `sums` the products of `M` rows of W (of `width` quads) with those
/// of x; `row` and `quad` are where W's part begins.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn dot<D: DotBf16, F: InBf16, const N: usize, const M: usize>(
    d: D,
    format: &F,
    [row, quad]: [usize; 2],
    width: usize,
    x: &[[Quad; N]],
    sums: &mut [[f32; N]; M],
) {
    let s = d.simd();
    let quads = format.block_len() / QUAD;
    let (blocks, first) = (width / quads, quad / quads);
    // Two chains of sums, so that one addition need not wait for another.
    let mut acc = [[[s.splat(0.0); 2]; N]; M];
    for (b, x) in x.chunks_exact(quads).enumerate() {
        let mut block = [format.block_in_bf16(d, row * blocks + first + b); M];
        for m in 1..M {
            block[m] = format.block_in_bf16(d, (row + m) * blocks + first + b);
        }
        for (i, x) in x.iter().enumerate() {
            let mut w = [format.quad(d, &block[0], i); M];
            for m in 1..M {
                w[m] = format.quad(d, &block[m], i);
            }
            for n in 0..N {
                let x = [d.load(&x[n].0[0]), d.load(&x[n].0[1])];
                for m in 0..M {
                    let second = if M * N < 8 { 1 } else { 0 };
                    acc[m][n][0] = d.dot(w[m][0], x[0], acc[m][n][0]);
                    acc[m][n][second] = d.dot(w[m][1], x[1], acc[m][n][second]);
                }
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            sums[m][n] += s.sum(acc[m][n][0]) + s.sum(acc[m][n][1]);
        }
    }
}

/// dX = g · W for `N` rows.
pub(super) fn product_transposed<F: InBf16, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    g: &[bf16],
    dx: &mut [T],
) -> Result<()> {
    // Two rows of W at a time; the last one alone is multiplied by zero the second time.
    let mut pairs = vec![[[bf16::ZERO; 2]; N]; out.div_ceil(2)];
    for (n, g) in g.chunks_exact(out).enumerate() {
        for (row, g) in g.iter().enumerate() {
            pairs[row / 2][n][row % 2] = *g;
        }
    }
    // As many strips as share evenly among the threads; each column is summed
    // by one thread from top to bottom, so that their number changes nothing.
    let (quads, threads) = (inn / QUAD, threads());
    let strip = quads.div_ceil(threads * quads.div_ceil(threads * (STRIP_OF_SUMS / N / QUAD)).max(1));
    let mut columns = vec![[Sums::default(); N]; quads];
    for_each_chunk(&mut columns, strip, |i, columns| {
        dispatch_bf16(Transposed { format, shape: [out, inn], first: i * strip, g: &pairs, columns });
    })?;
    for (n, dx) in dx.chunks_exact_mut(inn).enumerate() {
        for (to, from) in dx.as_chunks_mut::<QUAD>().0.iter_mut().zip(&columns) {
            for (half, sums) in from[n].0.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    // The order of `interleave`.
                    let i = 8 * (j / 4) + 4 * (half % 2) + j % 4;
                    to[F::place(half / 2, i)] = T::from_f32(*sum);
                }
            }
        }
    }
    Ok(())
}

struct Transposed<'a, F, const N: usize> {
    format: &'a F,
    shape: [usize; 2],
    /// The first quad of the strip.
    first: usize,
    g: &'a [[[bf16; 2]; N]],
    columns: &'a mut [[Sums; N]],
}

impl<F: InBf16, const N: usize> Bf16Kernel for Transposed<'_, F, N> {
    #[inline(always)]
    fn run<D: DotBf16>(mut self, d: D) {
        let (groups, rest) = self.g.as_chunks::<4>();
        for (i, g) in groups.iter().enumerate() {
            self.accumulate::<D, 4>(d, i * 8, g);
        }
        for (i, g) in rest.iter().enumerate() {
            self.accumulate::<D, 1>(d, groups.len() * 8 + i * 2, std::array::from_ref(g));
        }
    }
}

impl<F: InBf16, const N: usize> Transposed<'_, F, N> {
    /// Adds `g · W` of `M` pairs of rows of W, from `row` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn accumulate<D: DotBf16, const M: usize>(&mut self, d: D, row: usize, g: &[[[bf16; 2]; N]; M]) {
        let (s, [out, inn]) = (d.simd(), self.shape);
        let quads = self.format.block_len() / QUAD;
        let blocks = inn / self.format.block_len();
        let (mut b, mut i) = (self.first / quads, self.first % quads);
        let mut columns = &mut *self.columns;
        while !columns.is_empty() {
            let mut block = [[self.format.block_in_bf16(d, row * blocks + b); 2]; M];
            for m in 0..M {
                for second in 0..2 {
                    let row = (row + 2 * m + second).min(out - 1);
                    block[m][second] = self.format.block_in_bf16(d, row * blocks + b);
                }
            }
            let take = (quads - i).min(columns.len());
            let (part, rest) = columns.split_at_mut(take);
            for (j, column) in part.iter_mut().enumerate() {
                let mut w = [[[d.splat([bf16::ZERO; 2]); 2]; 2]; M];
                for m in 0..M {
                    let rows = [self.format.quad(d, &block[m][0], i + j), self.format.quad(d, &block[m][1], i + j)];
                    for k in 0..2 {
                        w[m][k] = d.interleave(rows[0][k], rows[1][k]);
                    }
                }
                for n in 0..N {
                    for half in 0..4 {
                        let mut sum = s.load(&column[n].0[half]);
                        for m in 0..M {
                            sum = d.dot(w[m][half / 2][half % 2], d.splat(g[m][n]), sum);
                        }
                        s.store(sum, &mut column[n].0[half]);
                    }
                }
            }
            (b, i, columns) = (b + 1, 0, rest);
        }
    }
}
