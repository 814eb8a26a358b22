//! y = x · Wᵀ of few rows.

use super::ahead::Ahead;
use super::{SHARE, STRIP};
use crate::error::Result;
use crate::ffi::compute::{Columns, for_each_chunk, for_each_columns};
use crate::ffi::simd::{Kernel, LANES, Packing, Simd, dispatch};
use crate::quant::kernels::arithmetic::{Arithmetic, Element, Lanes, Multiplies, Unit};
use crate::quant::kernels::{Float, Format};

/// Rows of W that a thread takes at a time.
const PART: usize = 32;

/// y = x · Wᵀ for `N` rows.
pub(in crate::quant::kernels) fn product<
    F: Format,
    E: Element<F>,
    X: Copy + Sync + Into<E>,
    T: Float,
    const N: usize,
>(
    format: &F,
    shape: [usize; 2],
    x: &[X],
    y: &mut [T],
) -> Result<()> {
    product_by(format, shape, x, y, |part: Product<F, E, N>| E::run(part))
}

/// The same by whatever runs its parts.
pub(super) fn product_by<F: Format, E: Element<F>, X: Copy + Sync + Into<E>, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    x: &[X],
    y: &mut [T],
    run: impl Fn(Product<F, E, N>) + Sync,
) -> Result<()> {
    // The rows side by side, unit by unit.
    let mut units = vec![[Unit::<E>::default(); N]; inn / E::UNIT];
    let share = (SHARE / (N * E::UNIT)).max(1);
    for_each_chunk(&mut units, share, |i, units| {
        for (j, unit) in units.iter_mut().enumerate() {
            let first = (i * share + j) * E::UNIT;
            unit.iter_mut().zip(x.chunks_exact(inn)).for_each(|(to, x)| to.fill::<F, X>(&x[first..first + E::UNIT]));
        }
    })?;
    for_each_columns(y, out, PART, |i, y| {
        let mut columns = [[0f32; N]; PART];
        let columns = &mut columns[..y.len()];
        run(Product { format, row: i * PART, x: &units, columns });
        dispatch(Rounded { columns, y });
    })
}

pub(super) struct Product<'a, F: Format, E: Element<F>, const N: usize> {
    pub(super) format: &'a F,
    /// The first row of W.
    row: usize,
    pub(super) x: &'a [[Unit<E>; N]],
    columns: &'a mut [[f32; N]],
}

/// Writes the columns of sums as rows.
struct Rounded<'a, T, const N: usize> {
    columns: &'a [[f32; N]],
    y: Columns<'a, T>,
}

impl<T: Float, const N: usize> Kernel for Rounded<'_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for n in 0..N {
            let (to, to_rest) = self.y.row(n).as_chunks_mut();
            let (from, from_rest) = self.columns.as_chunks::<LANES>();
            for (to, from) in to.iter_mut().zip(from) {
                let mut sums = [0.0; LANES];
                sums.iter_mut().zip(from).for_each(|(sum, column)| *sum = column[n]);
                T::store(s, s.load(&sums), to);
            }
            to_rest.iter_mut().zip(from_rest).for_each(|(to, column)| *to = T::from_f32(column[n]));
        }
    }
}

impl<F: Format, E: Element<F>, const N: usize> Multiplies<F, E> for Product<'_, F, E, N> {
    #[inline(always)]
    fn run<A: Arithmetic<F, Element = E>>(self, a: A) {
        // Lanes are added up once, at the end of a row.
        let mut sums = [[Lanes::default(); N]; PART];
        let sums = &mut sums[..self.columns.len()];
        // Units of x that stay in the cache for all rows of W.
        let strip = (STRIP / size_of::<[Unit<E>; N]>()).max(1);
        for (i, x) in self.x.chunks(strip).enumerate() {
            match (N, A::S::SUMS) {
                // As many sums as there are registers for.
                (..=4, 16..) => self.rows::<A, 4, 0>(a, x, i * strip, sums),
                (1, _) => self.rows::<A, 2, 0>(a, x, i * strip, sums),
                (..=4, _) => self.rows::<A, 1, 0>(a, x, i * strip, sums),
                // Of values, beside x and a sum.
                (_, 16..) => self.rows::<A, 4, 2>(a, x, i * strip, sums),
                _ => self.rows::<A, 2, 1>(a, x, i * strip, sums),
            }
        }
        let s = a.simd();
        for (row, (column, sums)) in self.columns.iter_mut().zip(sums).enumerate() {
            let factor = a.factor(self.format, self.row + row);
            for n in 0..N {
                column[n] = s.sum(s.load(&sums[n].0)) * factor;
            }
        }
    }
}

impl<F: Format, E: Element<F>, const N: usize> Product<'_, F, E, N> {
    /// Adds the products with a strip of x, which begins at this unit, `M` rows of W at a time: of these, `U` units stay
    /// in registers, or else the sums.
    #[inline(always)]
    fn rows<A: Arithmetic<F, Element = E>, const M: usize, const U: usize>(
        &self,
        a: A,
        x: &[[Unit<E>; N]],
        unit: usize,
        sums: &mut [[Lanes; N]],
    ) {
        let (groups, rest) = sums.as_chunks_mut::<M>();
        let rest_row = self.row + groups.len() * M;
        for (i, group) in groups.iter_mut().enumerate() {
            self.some::<A, M, U>(a, [self.row + i * M, unit], x, group);
        }
        for (i, sums) in rest.iter_mut().enumerate() {
            self.some::<A, 1, U>(a, [rest_row + i, unit], x, std::array::from_mut(sums));
        }
    }

    /// The `M` rows of W behind those from `row` on, from this unit on.
    #[inline(always)]
    pub(super) fn ahead<const M: usize>(&self, row: usize, unit: usize) -> Ahead {
        let inn = self.x.len() * E::UNIT;
        Ahead::new(self.format, (row + M) * inn + unit * E::UNIT, inn)
    }

    /// The same of `M` rows of W, from `row` on.
    #[inline(always)]
    fn some<A: Arithmetic<F, Element = E>, const M: usize, const U: usize>(
        &self,
        a: A,
        [row, unit]: [usize; 2],
        x: &[[Unit<E>; N]],
        sums: &mut [[Lanes; N]; M],
    ) {
        if U == 0 {
            self.dot::<A, M>(a, [row, unit], x, sums);
        } else {
            self.pass::<A, M, U>(a, [row, unit], x, sums);
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
        let mut ahead = self.ahead::<M>(row, unit);
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
                // Here, where few values are in the registers.
                ahead.ask::<F, _>(s, E::UNIT, M);
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
