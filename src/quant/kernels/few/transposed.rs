//! dX = g · W of few rows.

use super::ahead::Ahead;
use super::{SHARE, STRIP};
use crate::error::Result;
use crate::ffi::compute::{for_each_chunk, for_each_columns, threads};
use crate::ffi::simd::Simd;
use crate::quant::kernels::arithmetic::{Arithmetic, Element, Multiplies};
use crate::quant::kernels::{Float, Format};

/// dX = g · W for `N` rows.
pub(in crate::quant::kernels) fn product_transposed<
    F: Format,
    E: Element<F>,
    X: Copy + Sync + Into<E>,
    T: Float,
    const N: usize,
>(
    format: &F,
    shape: [usize; 2],
    g: &[X],
    dx: &mut [T],
) -> Result<()> {
    product_transposed_by(format, shape, g, dx, |part: Transposed<F, E, N>| E::run(part))
}

/// The same by whatever runs its parts.
pub(super) fn product_transposed_by<F: Format, E: Element<F>, X: Copy + Sync + Into<E>, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    g: &[X],
    dx: &mut [T],
    run: impl Fn(Transposed<F, E, N>) + Sync,
) -> Result<()> {
    // As many rows of W as are multiplied at once; the last ones that are not there are multiplied by zero.
    let mut groups = vec![[E::Group::default(); N]; out.div_ceil(E::ROWS)];
    let share = (SHARE / (N * E::ROWS)).max(1);
    for_each_chunk(&mut groups, share, |i, groups| {
        let first = i * share * E::ROWS;
        for (n, g) in g.chunks_exact(out).enumerate() {
            for (j, g) in g[first..].iter().take(groups.len() * E::ROWS).enumerate() {
                groups[j / E::ROWS][n].as_mut()[j % E::ROWS] = E::scaled((*g).into(), format, first + j);
            }
        }
    })?;
    // As many strips as share evenly among the threads; each column is summed
    // by one thread from top to bottom, so that their number changes nothing.
    let (units, threads) = (inn / E::UNIT, threads());
    let most = (STRIP / size_of::<[E::Sums; N]>()).max(1);
    let strip = units.div_ceil(threads * units.div_ceil(threads * most).max(1));
    for_each_columns(dx, inn, strip * E::UNIT, |i, mut dx| {
        let mut columns = vec![[E::Sums::default(); N]; dx.len() / E::UNIT];
        run(Transposed { format, shape: [out, inn], first: i * strip, g: &groups, columns: &mut columns });
        for n in 0..N {
            for (to, from) in dx.row(n).chunks_exact_mut(E::UNIT).zip(&columns) {
                for (part, sums) in from[n].as_ref().iter().enumerate() {
                    sums.0.iter().enumerate().for_each(|(i, sum)| to[E::place_of_sum(part, i)] = T::from_f32(*sum));
                }
            }
        }
    })
}

pub(super) struct Transposed<'a, F: Format, E: Element<F>, const N: usize> {
    format: &'a F,
    shape: [usize; 2],
    /// The first unit of the strip.
    first: usize,
    g: &'a [[E::Group; N]],
    columns: &'a mut [[E::Sums; N]],
}

impl<F: Format, E: Element<F>, const N: usize> Multiplies<F, E> for Transposed<'_, F, E, N> {
    #[inline(always)]
    fn run<A: Arithmetic<F, Element = E>>(self, a: A) {
        if N <= 2 && A::LARGE_BLOCKS {
            self.groups::<A, 2>(a);
        } else {
            self.groups::<A, 4>(a);
        }
    }
}

impl<F: Format, E: Element<F>, const N: usize> Transposed<'_, F, E, N> {
    /// Adds `g · W`, `M` groups of rows of W at a time.
    #[inline(always)]
    fn groups<A: Arithmetic<F, Element = E>, const M: usize>(mut self, a: A) {
        let (groups, rest) = self.g.as_chunks::<M>();
        for (i, g) in groups.iter().enumerate() {
            self.accumulate::<A, M>(a, i * M * E::ROWS, g);
        }
        for (i, g) in rest.iter().enumerate() {
            self.accumulate::<A, 1>(a, (groups.len() * M + i) * E::ROWS, std::array::from_ref(g));
        }
    }

    /// Adds `g · W` of `M` groups of rows of W, from `row` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn accumulate<A: Arithmetic<F, Element = E>, const M: usize>(&mut self, a: A, row: usize, g: &[[E::Group; N]; M]) {
        let (s, [out, inn]) = (a.simd(), self.shape);
        let units = self.format.block_len() / E::UNIT;
        let blocks = inn / self.format.block_len();
        let (mut b, mut first) = (self.first / units, self.first % units);
        let mut columns = &mut *self.columns;
        let next = (row + M * E::ROWS) * inn + self.first * E::UNIT;
        let mut ahead = Ahead::new(self.format, next, inn);
        while !columns.is_empty() {
            let mut block = [a.blocks(self.format, [row, out], blocks, b); M];
            for m in 1..M {
                block[m] = a.blocks(self.format, [row + m * E::ROWS, out], blocks, b);
            }
            let (part, rest) = columns.split_at_mut((units - first).min(columns.len()));
            for (i, column) in part.iter_mut().enumerate() {
                ahead.ask::<F, _>(s, E::UNIT, M * E::ROWS);
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
