//! y = x · Wᵀ of few rows.

use super::STRIP;
use crate::error::Result;
use crate::ffi::compute::for_each_chunk;
use crate::ffi::simd::{Packing, Simd};
use crate::quant::kernels::arithmetic::{Arithmetic, Element, Lanes, Multiplies, Unit};
use crate::quant::kernels::{Float, Format};

/// Weight rows that a thread takes at a time.
const PART: usize = 32;
/// Units of W whose values wait in the cache: as many as a strip has of eight rows.
const CACHED: usize = STRIP / (8 * size_of::<Unit<f32>>());
/// Rows of W whose bytes are asked for before they are read, where a strip takes long.
const AHEAD: usize = 4;

/// y = x · Wᵀ for `N` rows.
pub(in crate::quant::kernels) fn product<F: Format, E: Element<F>, X: Copy + Into<E>, T: Float, const N: usize>(
    format: &F,
    shape: [usize; 2],
    x: &[X],
    y: &mut [T],
) -> Result<()> {
    product_by(format, shape, x, y, |part: Product<F, E, N>| E::run(part))
}

/// The same by whatever runs its parts.
pub(super) fn product_by<F: Format, E: Element<F>, X: Copy + Into<E>, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    x: &[X],
    y: &mut [T],
    run: impl Fn(Product<F, E, N>) + Sync,
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
        run(Product { format, row: i * PART, x: &units, columns });
    })?;
    for (n, y) in y.chunks_exact_mut(out).enumerate() {
        y.iter_mut().zip(&columns).for_each(|(to, from)| *to = T::from_f32(from[n]));
    }
    Ok(())
}

pub(super) struct Product<'a, F: Format, E: Element<F>, const N: usize> {
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
            match (N, A::S::SUMS) {
                (1..=4, 16..) => self.rows::<A, 4>(a, x, i * strip, sums),
                (8, 16..) => self.rows::<A, 2>(a, x, i * strip, sums),
                (_, 16..) => self.rows::<A, 1>(a, x, i * strip, sums),
                (1, _) => self.rows::<A, 2>(a, x, i * strip, sums),
                (2..=4, _) => self.rows::<A, 1>(a, x, i * strip, sums),
                _ => self.rows_by_cache(a, x, i * strip, sums),
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
        let second = if 2 * M * N < A::S::SUMS { 1 } else { 0 };
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

    /// As [`rows`](Self::rows), where the sums of all rows of x are too many for the registers: values of two rows
    /// of W wait in the cache, for two rows of x at a time.
    #[inline(always)]
    fn rows_by_cache<A: Arithmetic<F, Element = E>>(
        &self,
        a: A,
        x: &[[Unit<E>; N]],
        unit: usize,
        sums: &mut [[Lanes; N]],
    ) {
        let zero = a.load(&E::ZERO);
        let (groups, rest) = sums.as_chunks_mut();
        let rest_row = self.row + groups.len() * 2;
        let mut values = [[[zero; 2]; 2]; CACHED];
        for (i, group) in groups.iter_mut().enumerate() {
            self.dot_by_cache(a, [self.row + i * 2, unit], x, &mut values[..x.len()], group);
        }
        let mut values = [[[zero; 2]; 1]; CACHED];
        for (i, sums) in rest.iter_mut().enumerate() {
            self.dot_by_cache(a, [rest_row + i, unit], x, &mut values[..x.len()], std::array::from_mut(sums));
        }
    }

    /// As [`dot`](Self::dot), through `values`, one for each unit of x.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn dot_by_cache<A: Arithmetic<F, Element = E>, const M: usize>(
        &self,
        a: A,
        [row, unit]: [usize; 2],
        x: &[[Unit<E>; N]],
        values: &mut [[[A::V; 2]; M]],
        sums: &mut [[Lanes; N]; M],
    ) {
        let s = a.simd();
        let units = self.format.block_len() / E::UNIT;
        let blocks = self.x.len() / units;
        for m in 0..M {
            let ahead = ((row + AHEAD + m) * self.x.len() + unit) * E::UNIT;
            self.format.prefetch(s, ahead..ahead + x.len() * E::UNIT);
            let (mut b, mut first, mut rest) = (unit / units, unit % units, &mut *values);
            while !rest.is_empty() {
                let block = a.block(self.format, (row + m) * blocks + b);
                let (part, after) = rest.split_at_mut((units - first).min(rest.len()));
                for (i, values) in part.iter_mut().enumerate() {
                    values[m] = a.values(self.format, &block, first + i);
                }
                (b, first, rest) = (b + 1, 0, after);
            }
        }
        for n in (0..N).step_by(2) {
            let mut acc = [[s.splat(0.0); 2]; M];
            for (w, x) in values.iter().zip(x) {
                for k in 0..2 {
                    let x = [a.load(&x[n].0[k]), a.load(&x[n + 1].0[k])];
                    for m in 0..M {
                        acc[m][0] = a.multiply_add(w[m][k], x[0], acc[m][0]);
                        acc[m][1] = a.multiply_add(w[m][k], x[1], acc[m][1]);
                    }
                }
            }
            for m in 0..M {
                for (sum, acc) in sums[m][n..n + 2].iter_mut().zip(acc[m]) {
                    s.store(s.add(s.load(&sum.0), acc), &mut sum.0);
                }
            }
        }
    }
}
