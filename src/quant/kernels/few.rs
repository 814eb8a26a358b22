//! Products with few rows: values go from the packed bytes through registers
//! into the sums, and no decoded weight is written anywhere.
//!
//! For weights whose rows are whole blocks of a multiple of 16 elements. Sums
//! are in f32, in an order that depends on the shapes and the instruction set
//! only, not on the number of threads.

use super::{Float, Format};
use crate::error::Result;
use crate::ffi::compute::{for_each_chunk, threads};
use crate::ffi::simd::{Kernel, LANES, Simd, dispatch};

/// Sixteen elements.
type Lanes = [f32; LANES];

/// Weight rows that are read at a time.
const ROWS: usize = 4;
/// Weight rows that a thread takes at a time.
const PART: usize = 32;
/// Sixteens of dX that stay in the first-level cache.
const STRIP: usize = 384;

/// Whether the layout fits.
pub(super) fn fits<F: Format>(format: &F, inn: usize) -> bool {
    format.block_len().is_multiple_of(LANES) && inn.is_multiple_of(format.block_len())
}

/// y = x · Wᵀ for `N` rows.
pub(super) fn product<F: Format, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    x: &[T],
    y: &mut [T],
) -> Result<()> {
    // The rows side by side, sixteen by sixteen.
    let mut lanes = vec![[[0f32; LANES]; N]; inn / LANES];
    for (n, x) in x.chunks_exact(inn).enumerate() {
        for (to, from) in lanes.iter_mut().zip(x.as_chunks().0) {
            to[n] = from.map(T::to_f32);
        }
    }
    let mut columns = vec![[0f32; N]; out];
    for_each_chunk(&mut columns, PART, |i, columns| {
        dispatch(Product { format, row: i * PART, x: &lanes, columns });
    })?;
    for (n, y) in y.chunks_exact_mut(out).enumerate() {
        y.iter_mut().zip(&columns).for_each(|(to, from)| *to = T::from_f32(from[n]));
    }
    Ok(())
}

struct Product<'a, F, const N: usize> {
    format: &'a F,
    row: usize,
    x: &'a [[Lanes; N]],
    columns: &'a mut [[f32; N]],
}

impl<F: Format, const N: usize> Kernel for Product<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // As many sums as there are registers for.
        let mut row = self.row;
        if N <= 4 {
            let (groups, rest) = self.columns.as_chunks_mut::<ROWS>();
            for group in groups {
                dot::<S, F, N, ROWS>(s, self.format, row, self.x, group);
                row += ROWS;
            }
            for column in rest {
                dot::<S, F, N, 1>(s, self.format, row, self.x, std::array::from_mut(column));
                row += 1;
            }
        } else {
            let (pairs, rest) = self.columns.as_chunks_mut::<2>();
            for pair in pairs {
                dot::<S, F, N, 2>(s, self.format, row, self.x, pair);
                row += 2;
            }
            for column in rest {
                dot::<S, F, N, 1>(s, self.format, row, self.x, std::array::from_mut(column));
                row += 1;
            }
        }
    }
}

// The loops over `0..N` and `0..M` below are unrolled into registers; iterators
// and closures of the standard library would not be inlined for certain.

/// The products of `M` rows of W, from `row` on, with those of x.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn dot<S: Simd, F: Format, const N: usize, const M: usize>(
    s: S,
    format: &F,
    row: usize,
    x: &[[Lanes; N]],
    sums: &mut [[f32; N]; M],
) {
    let sixteens = format.block_len() / LANES;
    let blocks = x.len() / sixteens;
    let mut acc = [[s.splat(0.0); N]; M];
    for (b, x) in x.chunks_exact(sixteens).enumerate() {
        let mut block = [format.block(s, row * blocks + b); M];
        for m in 1..M {
            block[m] = format.block(s, (row + m) * blocks + b);
        }
        for (i, x) in x.iter().enumerate() {
            let mut w = [s.splat(0.0); M];
            for m in 0..M {
                w[m] = format.values(s, &block[m], i);
            }
            for n in 0..N {
                let x = s.load(&x[n]);
                for m in 0..M {
                    acc[m][n] = s.mul_add(w[m], x, acc[m][n]);
                }
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            sums[m][n] = s.sum(acc[m][n]);
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
        factors.iter_mut().zip(g).for_each(|(to, from)| to[n] = from.to_f32());
    }
    // As many strips as share evenly among the threads; each column is summed
    // by one thread from top to bottom, so that their number changes nothing.
    let (sixteens, threads) = (inn / LANES, threads());
    let strip = sixteens.div_ceil(threads * sixteens.div_ceil(threads * STRIP / N).max(1));
    let mut columns = vec![[[0f32; LANES]; N]; sixteens];
    for_each_chunk(&mut columns, strip, |i, columns| {
        dispatch(Transposed { format, inn, first: i * strip, g: &factors, columns });
    })?;
    for (n, dx) in dx.chunks_exact_mut(inn).enumerate() {
        for (to, from) in dx.as_chunks_mut::<LANES>().0.iter_mut().zip(&columns) {
            *to = from[n].map(T::from_f32);
        }
    }
    Ok(())
}

struct Transposed<'a, F, const N: usize> {
    format: &'a F,
    inn: usize,
    /// The first sixteen of the strip.
    first: usize,
    g: &'a [[f32; N]],
    columns: &'a mut [[Lanes; N]],
}

impl<F: Format, const N: usize> Kernel for Transposed<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (groups, rest) = self.g.as_chunks::<ROWS>();
        for (i, g) in groups.iter().enumerate() {
            self.accumulate::<S, ROWS>(s, i * ROWS, g);
        }
        for (i, g) in rest.iter().enumerate() {
            self.accumulate::<S, 1>(s, groups.len() * ROWS + i, std::array::from_ref(g));
        }
    }
}

impl<F: Format, const N: usize> Transposed<'_, F, N> {
    /// Adds `g · W` of `M` rows of W, from `row` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn accumulate<S: Simd, const M: usize>(&mut self, s: S, row: usize, g: &[[f32; N]; M]) {
        let sixteens = self.format.block_len() / LANES;
        let blocks = self.inn / self.format.block_len();
        let (mut b, mut i) = (self.first / sixteens, self.first % sixteens);
        let mut columns = &mut *self.columns;
        while !columns.is_empty() {
            let mut block = [self.format.block(s, row * blocks + b); M];
            for m in 1..M {
                block[m] = self.format.block(s, (row + m) * blocks + b);
            }
            let take = (sixteens - i).min(columns.len());
            let (part, rest) = columns.split_at_mut(take);
            for (k, column) in part.iter_mut().enumerate() {
                let mut w = [s.splat(0.0); M];
                for m in 0..M {
                    w[m] = self.format.values(s, &block[m], i + k);
                }
                for n in 0..N {
                    let mut sum = s.load(&column[n]);
                    for m in 0..M {
                        sum = s.mul_add(s.splat(g[m][n]), w[m], sum);
                    }
                    s.store(sum, &mut column[n]);
                }
            }
            (b, i, columns) = (b + 1, 0, rest);
        }
    }
}
