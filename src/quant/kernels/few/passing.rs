//! x · Wᵀ of eight rows and more: sums are too many for the registers, so values of W stay in these, and sums pass
//! through them, as in [`transposed`](super::transposed).

use super::forward::Product;
use crate::ffi::simd::Simd;
use crate::quant::kernels::Format;
use crate::quant::kernels::arithmetic::{Arithmetic, Element, Lanes, Unit};

/// `U` units of `M` rows of W.
type Values<V, const M: usize, const U: usize> = [[[V; 2]; U]; M];

impl<F: Format, E: Element<F>, const N: usize> Product<'_, F, E, N> {
    // The loops over `0..N`, `0..M` and `0..U` below are unrolled into registers; iterators
    // and closures of the standard library would not be inlined for certain.

    /// Adds to `sums` the products of `M` rows of W with x, `U` units at a time; `row` and `unit` are where W's part
    /// begins.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    pub(super) fn pass<A: Arithmetic<F, Element = E>, const M: usize, const U: usize>(
        &self,
        a: A,
        [row, unit]: [usize; 2],
        mut x: &[[Unit<E>; N]],
        sums: &mut [[Lanes; N]; M],
    ) {
        let units = self.format.block_len() / E::UNIT;
        let blocks = self.x.len() / units;
        let (mut b, mut first) = (unit / units, unit % units);
        let mut w = [[[a.load(&E::ZERO); 2]; U]; M];
        let (s, mut ahead) = (a.simd(), self.ahead::<M>(row, unit));
        if units == 1 {
            let (groups, rest) = x.as_chunks::<U>();
            for x in groups {
                for u in 0..U {
                    ahead.ask::<F, _>(s, E::UNIT, M);
                    for m in 0..M {
                        w[m][u] = a.values(self.format, &a.block(self.format, (row + m) * blocks + b), 0);
                    }
                    b += 1;
                }
                add(a, &w, x, sums);
            }
            x = rest;
        }
        while !x.is_empty() {
            let mut block = [a.block(self.format, row * blocks + b); M];
            for m in 1..M {
                block[m] = a.block(self.format, (row + m) * blocks + b);
            }
            let (part, rest) = x.split_at((units - first).min(x.len()));
            let (groups, last) = part.as_chunks::<U>();
            for (i, x) in groups.iter().enumerate() {
                for _ in 0..U {
                    ahead.ask::<F, _>(s, E::UNIT, M);
                }
                for m in 0..M {
                    for u in 0..U {
                        w[m][u] = a.values(self.format, &block[m], first + i * U + u);
                    }
                }
                add(a, &w, x, sums);
            }
            for (i, x) in last.iter().enumerate() {
                ahead.ask::<F, _>(s, E::UNIT, M);
                let mut w = [[[a.load(&E::ZERO); 2]; 1]; M];
                for m in 0..M {
                    w[m][0] = a.values(self.format, &block[m], first + groups.len() * U + i);
                }
                add(a, &w, std::array::from_ref(x), sums);
            }
            (b, first, x) = (b + 1, 0, rest);
        }
    }
}

/// Adds to `sums` the products of values of W with units of x.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn add<F: Format, A: Arithmetic<F>, const N: usize, const M: usize, const U: usize>(
    a: A,
    w: &Values<A::V, M, U>,
    x: &[[Unit<A::Element>; N]; U],
    sums: &mut [[Lanes; N]; M],
) {
    let s = a.simd();
    for n in 0..N {
        let mut xs = [[a.load(&x[0][n].0[0]); 2]; U];
        for u in 0..U {
            xs[u] = [a.load(&x[u][n].0[0]), a.load(&x[u][n].0[1])];
        }
        for m in 0..M {
            let mut sum = s.load(&sums[m][n].0);
            for u in 0..U {
                for k in 0..2 {
                    sum = a.multiply_add(w[m][u][k], xs[u][k], sum);
                }
            }
            s.store(sum, &mut sums[m][n].0);
        }
    }
}
