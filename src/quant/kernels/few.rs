//! Products with few rows: values go from the packed bytes through registers
//! into the sums, and no decoded weight is written anywhere.
//!
//! For weights whose rows are whole blocks of a multiple of a unit's elements.
//! Sums are in f32, in an order that depends on the shapes and the instruction
//! set only, not on the number of threads.

use super::arithmetic::{Arithmetic, Element, Lanes, Multiplies, Unit};
use super::{Float, Format};
use crate::error::Result;
use crate::ffi::compute::{for_each_chunk, threads};
use crate::ffi::simd::{Packing, Simd};

/// Weight rows that a thread takes at a time.
const PART: usize = 32;
/// Bytes of x or of dX, all rows together, that stay in the first-level cache.
const STRIP: usize = 24 << 10;

/// y = x · Wᵀ for `N` rows.
pub(super) fn product<F: Format, E: Element<F>, X: Copy + Into<E>, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    x: &[X],
    y: &mut [T],
) -> Result<()> {
    // The rows side by side, unit by unit.
    let mut units = vec![[Unit::<E>::default(); N]; inn / E::UNIT];
    for (n, x) in x.chunks_exact(inn).enumerate() {
        for (to, from) in units.iter_mut().zip(x.chunks_exact(E::UNIT)) {
            for (k, part) in to[n].0.iter_mut().enumerate() {
                part.as_mut().iter_mut().enumerate().for_each(|(i, to)| *to = from[E::place(k, i)].into());
            }
        }
    }
    let mut columns = vec![[0f32; N]; out];
    for_each_chunk(&mut columns, PART, |i, columns| {
        E::run(Product { format, row: i * PART, x: &units, columns });
    })?;
    for (n, y) in y.chunks_exact_mut(out).enumerate() {
        y.iter_mut().zip(&columns).for_each(|(to, from)| *to = T::from_f32(from[n]));
    }
    Ok(())
}

struct Product<'a, F: Format, E: Element<F>, const N: usize> {
    format: &'a F,
    /// The first row of W.
    row: usize,
    x: &'a [[Unit<E>; N]],
    columns: &'a mut [[f32; N]],
}

impl<F: Format, E: Element<F>, const N: usize> Multiplies<F, E> for Product<'_, F, E, N> {
    #[inline(always)]
    fn run<A: Arithmetic<F, Element = E>>(self, a: A) {
        let s = a.simd();
        // Lanes are added up once, at the end of a row.
        let mut sums = [[Lanes::default(); N]; PART];
        let sums = &mut sums[..self.columns.len()];
        // Units of x that stay in the cache for all rows of W.
        let strip = (STRIP / size_of::<[Unit<E>; N]>()).max(1);
        for (i, x) in self.x.chunks(strip).enumerate() {
            // As many sums as there are registers for.
            match N {
                1..=4 => self.rows::<A, 4>(a, x, i * strip, sums),
                8 => self.rows::<A, 2>(a, x, i * strip, sums),
                _ => self.rows::<A, 1>(a, x, i * strip, sums),
            }
        }
        for (row, (column, sums)) in self.columns.iter_mut().zip(sums).enumerate() {
            let factor = a.factor(self.format, self.row + row);
            for n in 0..N {
                column[n] = s.sum(s.load(&sums[n].0)) * factor;
            }
        }
    }
}

impl<F: Format, E: Element<F>, const N: usize> Product<'_, F, E, N> {
    /// Adds the products with a strip of x, which begins at this unit, `M` rows of W at a time.
    #[inline(always)]
    fn rows<A: Arithmetic<F, Element = E>, const M: usize>(
        &self,
        a: A,
        x: &[[Unit<E>; N]],
        unit: usize,
        sums: &mut [[Lanes; N]],
    ) {
        let (groups, rest) = sums.as_chunks_mut::<M>();
        let rest_row = self.row + groups.len() * M;
        for (i, group) in groups.iter_mut().enumerate() {
            self.dot::<A, M>(a, [self.row + i * M, unit], x, group);
        }
        for (i, sums) in rest.iter_mut().enumerate() {
            self.dot::<A, 1>(a, [rest_row + i, unit], x, std::array::from_mut(sums));
        }
    }

    // The loops over `0..N` and `0..M` below are unrolled into registers; iterators
    // and closures of the standard library would not be inlined for certain.

    /// Adds to `sums` the products of `M` rows of W with x; `row` and `unit` are
    /// where W's part begins.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn dot<A: Arithmetic<F, Element = E>, const M: usize>(
        &self,
        a: A,
        [row, unit]: [usize; 2],
        mut x: &[[Unit<E>; N]],
        sums: &mut [[Lanes; N]; M],
    ) {
        let s = a.simd();
        let units = self.format.block_len() / E::UNIT;
        let blocks = self.x.len() / units;
        let (mut b, mut first) = (unit / units, unit % units);
        // Two chains of sums where these are few, so that one addition need not wait for another.
        let second = if M * N < 8 { 1 } else { 0 };
        let mut acc = [[[s.splat(0.0); 2]; N]; M];
        for m in 0..M {
            for n in 0..N {
                acc[m][n][0] = s.load(&sums[m][n].0);
            }
        }
        while !x.is_empty() {
            let mut block = [a.block(self.format, row * blocks + b); M];
            for m in 1..M {
                block[m] = a.block(self.format, (row + m) * blocks + b);
            }
            let (part, rest) = x.split_at((units - first).min(x.len()));
            for (i, x) in part.iter().enumerate() {
                let mut w = [a.values(self.format, &block[0], first + i); M];
                for m in 1..M {
                    w[m] = a.values(self.format, &block[m], first + i);
                }
                for n in 0..N {
                    let x = [a.load(&x[n].0[0]), a.load(&x[n].0[1])];
                    for m in 0..M {
                        acc[m][n][0] = a.multiply_add(w[m][0], x[0], acc[m][n][0]);
                        acc[m][n][second] = a.multiply_add(w[m][1], x[1], acc[m][n][second]);
                    }
                }
            }
            (b, first, x) = (b + 1, 0, rest);
        }
        for m in 0..M {
            for n in 0..N {
                let sum = if second == 1 { s.add(acc[m][n][0], acc[m][n][1]) } else { acc[m][n][0] };
                s.store(sum, &mut sums[m][n].0);
            }
        }
    }
}

/// dX = g · W for `N` rows.
pub(super) fn product_transposed<F: Format, E: Element<F>, X: Copy + Into<E>, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    g: &[X],
    dx: &mut [T],
) -> Result<()> {
    // As many rows of W as are multiplied at once; the last ones that are not there are multiplied by zero.
    let mut groups = vec![[E::Group::default(); N]; out.div_ceil(E::ROWS)];
    for (n, g) in g.chunks_exact(out).enumerate() {
        for (row, g) in g.iter().enumerate() {
            groups[row / E::ROWS][n].as_mut()[row % E::ROWS] = E::scaled((*g).into(), format, row);
        }
    }
    // As many strips as share evenly among the threads; each column is summed
    // by one thread from top to bottom, so that their number changes nothing.
    let (units, threads) = (inn / E::UNIT, threads());
    let most = (STRIP / size_of::<[E::Sums; N]>()).max(1);
    let strip = units.div_ceil(threads * units.div_ceil(threads * most).max(1));
    let mut columns = vec![[E::Sums::default(); N]; units];
    for_each_chunk(&mut columns, strip, |i, columns| {
        E::run(Transposed { format, shape: [out, inn], first: i * strip, g: &groups, columns });
    })?;
    for (n, dx) in dx.chunks_exact_mut(inn).enumerate() {
        for (to, from) in dx.chunks_exact_mut(E::UNIT).zip(&columns) {
            for (part, sums) in from[n].as_ref().iter().enumerate() {
                sums.0.iter().enumerate().for_each(|(i, sum)| to[E::place_of_sum(part, i)] = T::from_f32(*sum));
            }
        }
    }
    Ok(())
}

struct Transposed<'a, F: Format, E: Element<F>, const N: usize> {
    format: &'a F,
    shape: [usize; 2],
    /// The first unit of the strip.
    first: usize,
    g: &'a [[E::Group; N]],
    columns: &'a mut [[E::Sums; N]],
}

impl<F: Format, E: Element<F>, const N: usize> Multiplies<F, E> for Transposed<'_, F, E, N> {
    #[inline(always)]
    fn run<A: Arithmetic<F, Element = E>>(mut self, a: A) {
        let (groups, rest) = self.g.as_chunks::<4>();
        for (i, g) in groups.iter().enumerate() {
            self.accumulate::<A, 4>(a, i * 4 * E::ROWS, g);
        }
        for (i, g) in rest.iter().enumerate() {
            self.accumulate::<A, 1>(a, (groups.len() * 4 + i) * E::ROWS, std::array::from_ref(g));
        }
    }
}

impl<F: Format, E: Element<F>, const N: usize> Transposed<'_, F, E, N> {
    /// Adds `g · W` of `M` groups of rows of W, from `row` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn accumulate<A: Arithmetic<F, Element = E>, const M: usize>(&mut self, a: A, row: usize, g: &[[E::Group; N]; M]) {
        let (s, [out, inn]) = (a.simd(), self.shape);
        let units = self.format.block_len() / E::UNIT;
        let blocks = inn / self.format.block_len();
        let (mut b, mut first) = (self.first / units, self.first % units);
        let mut columns = &mut *self.columns;
        while !columns.is_empty() {
            let mut block = [a.blocks(self.format, [row, out], blocks, b); M];
            for m in 1..M {
                block[m] = a.blocks(self.format, [row + m * E::ROWS, out], blocks, b);
            }
            let (part, rest) = columns.split_at_mut((units - first).min(columns.len()));
            for (i, column) in part.iter_mut().enumerate() {
                let mut w = [a.rows(self.format, &block[0], first + i); M];
                for m in 1..M {
                    w[m] = a.rows(self.format, &block[m], first + i);
                }
                for n in 0..N {
                    for (k, sum) in column[n].as_mut().iter_mut().enumerate() {
                        let mut v = s.load(&sum.0);
                        for m in 0..M {
                            v = a.multiply_add(w[m].as_ref()[k], a.splat(g[m][n]), v);
                        }
                        s.store(v, &mut sum.0);
                    }
                }
            }
            (b, first, columns) = (b + 1, 0, rest);
        }
    }
}
