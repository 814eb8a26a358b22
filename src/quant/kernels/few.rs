//! Products with few rows: values go from the packed bytes through registers
//! into the sums, and no decoded weight is written anywhere.
//!
//! For weights whose rows are whole blocks of a multiple of 32 elements. Sums
//! are in f32, in an order that depends on the shapes and the instruction set
//! only, not on the number of threads.

use super::{Float, Format};
use crate::error::Result;
use crate::ffi::compute::{for_each_chunk, threads};
use crate::ffi::simd::{Kernel, LANES, Simd, dispatch};

/// Thirty-two elements, as [`Format::pair`] answers them, in cache lines of their own.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Pair([[f32; LANES]; 2]);
const PAIR: usize = 2 * LANES;

/// Weight rows that a thread takes at a time.
const PART: usize = 32;
/// Elements of x or of dX, all rows together, that stay in the first-level cache.
const STRIP: usize = 6144;

/// Whether the layout fits.
pub(super) fn fits<F: Format>(format: &F, inn: usize) -> bool {
    format.block_len().is_multiple_of(PAIR) && inn.is_multiple_of(format.block_len())
}

/// The elements of a row in the order of the format's pairs.
fn split<F: Format, T: Float>(row: &[T; PAIR]) -> Pair {
    Pair(std::array::from_fn(|half| std::array::from_fn(|i| row[at::<F>(half, i)].to_f32())))
}

/// Where element `i` of one half of a pair is in the row.
#[inline(always)]
fn at<F: Format>(half: usize, i: usize) -> usize {
    if F::INTERLEAVED { 2 * i + half } else { LANES * half + i }
}

/// y = x · Wᵀ for `N` rows.
pub(super) fn product<F: Format, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    x: &[T],
    y: &mut [T],
) -> Result<()> {
    // The rows side by side, pair by pair.
    let mut pairs = vec![[Pair::default(); N]; inn / PAIR];
    for (n, x) in x.chunks_exact(inn).enumerate() {
        for (to, from) in pairs.iter_mut().zip(x.as_chunks().0) {
            to[n] = split::<F, T>(from);
        }
    }
    let mut columns = vec![[0f32; N]; out];
    for_each_chunk(&mut columns, PART, |i, columns| {
        dispatch(Product { format, row: i * PART, x: &pairs, columns });
    })?;
    for (n, y) in y.chunks_exact_mut(out).enumerate() {
        y.iter_mut().zip(&columns).for_each(|(to, from)| *to = T::from_f32(from[n]));
    }
    Ok(())
}

struct Product<'a, F, const N: usize> {
    format: &'a F,
    row: usize,
    x: &'a [[Pair; N]],
    columns: &'a mut [[f32; N]],
}

impl<F: Format, const N: usize> Kernel for Product<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        // Whole blocks of x that stay in the cache for all rows of W.
        let block = self.format.block_len() / PAIR;
        let strip = (STRIP / N / PAIR / block).max(1) * block;
        for (i, x) in self.x.chunks(strip).enumerate() {
            // As many sums as there are registers for.
            match N {
                1..=4 => self.rows::<S, 4>(s, x, i * strip),
                _ => self.rows::<S, 2>(s, x, i * strip),
            }
        }
    }
}

impl<F: Format, const N: usize> Product<'_, F, N> {
    /// Adds the products with a strip of x, which begins at this pair, `M` rows of W at a time.
    #[inline(always)]
    fn rows<S: Simd, const M: usize>(&mut self, s: S, x: &[[Pair; N]], pair: usize) {
        let (groups, rest) = self.columns.as_chunks_mut::<M>();
        let rest_row = self.row + groups.len() * M;
        for (i, group) in groups.iter_mut().enumerate() {
            dot::<S, F, N, M>(s, self.format, [self.row + i * M, pair], self.x.len(), x, group);
        }
        for (i, column) in rest.iter_mut().enumerate() {
            dot::<S, F, N, 1>(s, self.format, [rest_row + i, pair], self.x.len(), x, std::array::from_mut(column));
        }
    }
}

// The loops over `0..N` and `0..M` below are unrolled into registers; iterators
// and closures of the standard library would not be inlined for certain.

/// Adds to `sums` the products of `M` rows of W (of `width` pairs) with those
/// of x; `row` and `pair` are where W's part begins.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn dot<S: Simd, F: Format, const N: usize, const M: usize>(
    s: S,
    format: &F,
    [row, pair]: [usize; 2],
    width: usize,
    x: &[[Pair; N]],
    sums: &mut [[f32; N]; M],
) {
    let pairs = format.block_len() / PAIR;
    let (blocks, first) = (width / pairs, pair / pairs);
    // Two chains of sums, so that one addition need not wait for another.
    let mut acc = [[[s.splat(0.0); 2]; N]; M];
    for (b, x) in x.chunks_exact(pairs).enumerate() {
        let mut block = [format.block(s, row * blocks + first + b); M];
        for m in 1..M {
            block[m] = format.block(s, (row + m) * blocks + first + b);
        }
        for (i, x) in x.iter().enumerate() {
            let mut w = [[s.splat(0.0); 2]; M];
            for m in 0..M {
                w[m] = format.pair(s, &block[m], i);
            }
            for n in 0..N {
                let x = [s.load(&x[n].0[0]), s.load(&x[n].0[1])];
                for m in 0..M {
                    let second = if M * N < 8 { 1 } else { 0 };
                    acc[m][n][0] = s.mul_add(w[m][0], x[0], acc[m][n][0]);
                    acc[m][n][second] = s.mul_add(w[m][1], x[1], acc[m][n][second]);
                }
            }
        }
    }
    for m in 0..M {
        let factor = format.factor(row + m);
        for n in 0..N {
            sums[m][n] += (s.sum(acc[m][n][0]) + s.sum(acc[m][n][1])) * factor;
        }
    }
}

/// dX = g · W for `N` rows.
pub(super) fn product_transposed<F: Format, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    g: &[T],
    dx: &mut [T],
) -> Result<()> {
    let mut factors = vec![[0f32; N]; out];
    for (n, g) in g.chunks_exact(out).enumerate() {
        factors.iter_mut().zip(g).enumerate().for_each(|(row, (to, from))| to[n] = from.to_f32() * format.factor(row));
    }
    // As many strips as share evenly among the threads; each column is summed
    // by one thread from top to bottom, so that their number changes nothing.
    let (pairs, threads) = (inn / PAIR, threads());
    let strip = pairs.div_ceil(threads * pairs.div_ceil(threads * (STRIP / N / PAIR)).max(1));
    let mut columns = vec![[Pair::default(); N]; pairs];
    for_each_chunk(&mut columns, strip, |i, columns| {
        dispatch(Transposed { format, inn, first: i * strip, g: &factors, columns });
    })?;
    for (n, dx) in dx.chunks_exact_mut(inn).enumerate() {
        for (to, from) in dx.as_chunks_mut::<PAIR>().0.iter_mut().zip(&columns) {
            for half in 0..2 {
                (0..LANES).for_each(|i| to[at::<F>(half, i)] = T::from_f32(from[n].0[half][i]));
            }
        }
    }
    Ok(())
}

struct Transposed<'a, F, const N: usize> {
    format: &'a F,
    inn: usize,
    /// The first pair of the strip.
    first: usize,
    g: &'a [[f32; N]],
    columns: &'a mut [[Pair; N]],
}

impl<F: Format, const N: usize> Kernel for Transposed<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (groups, rest) = self.g.as_chunks::<4>();
        for (i, g) in groups.iter().enumerate() {
            self.accumulate::<S, 4>(s, i * 4, g);
        }
        for (i, g) in rest.iter().enumerate() {
            self.accumulate::<S, 1>(s, groups.len() * 4 + i, std::array::from_ref(g));
        }
    }
}

impl<F: Format, const N: usize> Transposed<'_, F, N> {
    /// Adds `g · W` of `M` rows of W, from `row` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn accumulate<S: Simd, const M: usize>(&mut self, s: S, row: usize, g: &[[f32; N]; M]) {
        let pairs = self.format.block_len() / PAIR;
        let blocks = self.inn / self.format.block_len();
        let (mut b, mut i) = (self.first / pairs, self.first % pairs);
        let mut columns = &mut *self.columns;
        while !columns.is_empty() {
            let mut block = [self.format.block(s, row * blocks + b); M];
            for m in 1..M {
                block[m] = self.format.block(s, (row + m) * blocks + b);
            }
            let take = (pairs - i).min(columns.len());
            let (part, rest) = columns.split_at_mut(take);
            for (k, column) in part.iter_mut().enumerate() {
                let mut w = [[s.splat(0.0); 2]; M];
                for m in 0..M {
                    w[m] = self.format.pair(s, &block[m], i + k);
                }
                for n in 0..N {
                    for half in 0..2 {
                        let mut sum = s.load(&column[n].0[half]);
                        for m in 0..M {
                            sum = s.mul_add(s.splat(g[m][n]), w[m][half], sum);
                        }
                        s.store(sum, &mut column[n].0[half]);
                    }
                }
            }
            (b, i, columns) = (b + 1, 0, rest);
        }
    }
}
