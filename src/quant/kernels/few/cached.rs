//! y = x · Wᵀ of as many rows as fill the registers with sums, and more.
//!
//! Values of a few rows of W wait in the first-level cache, and are multiplied by a few rows of x at a time. While
//! those are multiplied, the next ones are unpacked.

use super::{PART, add_up, by_columns};
use crate::error::Result;
use crate::ffi::simd::{Packing, Simd};
use crate::quant::kernels::arithmetic::{Arithmetic, Element, Lanes, Multiplies, Unit};
use crate::quant::kernels::{Float, Format};

/// Units of a row of W that wait: few enough that twice the rows stay in the first-level cache, beside x.
const STRIP: usize = 16;
/// Rows of W whose bytes are asked for before they are read.
const AHEAD: usize = 8;

/// y = x · Wᵀ for `N` rows, an even number, by whatever runs its parts.
pub(super) fn product_by<F: Format, E: Element<F>, X: Copy + Into<E>, T: Float, const N: usize>(
    format: &F,
    [out, inn]: [usize; 2],
    x: &[X],
    y: &mut [T],
    run: impl Fn(Cached<F, E, N>) + Sync,
) -> Result<()> {
    // Two rows side by side, unit by unit; then the next two.
    let units = inn / E::UNIT;
    let mut pairs = vec![[Unit::<E>::default(); 2]; N / 2 * units];
    for (n, x) in x.chunks_exact(inn).enumerate() {
        for (to, from) in pairs[n / 2 * units..].iter_mut().zip(x.chunks_exact(E::UNIT)) {
            to[n % 2].fill::<F, X>(from);
        }
    }
    by_columns(out, y, |row, columns| run(Cached { format, row, units, x: &pairs, columns }))
}

pub(super) struct Cached<'a, F: Format, E: Element<F>, const N: usize> {
    format: &'a F,
    /// The first row of W.
    row: usize,
    /// Units of a row.
    units: usize,
    x: &'a [[Unit<E>; 2]],
    columns: &'a mut [[f32; N]],
}

impl<F: Format, E: Element<F>, const N: usize> Multiplies<F, E> for Cached<'_, F, E, N> {
    #[inline(always)]
    fn run<A: Arithmetic<F, Element = E>>(self, a: A) {
        // As many sums as there are registers for.
        match (A::S::SUMS, N) {
            (16.., 16) => self.rows::<A, 4, 2>(a),
            _ => self.rows::<A, 2, 1>(a),
        }
    }
}

/// Values of `M` rows of W.
type Values<V, const M: usize> = [[[V; 2]; STRIP]; M];

impl<F: Format, E: Element<F>, const N: usize> Cached<'_, F, E, N> {
    /// All products, `M` rows of W by `P` pairs of rows of x at a time.
    #[inline(always)]
    fn rows<A: Arithmetic<F, Element = E>, const M: usize, const P: usize>(self, a: A) {
        // In each pass over pairs of x, one row of the next ones is unpacked.
        assert!(N.is_multiple_of(2 * P) && N / (2 * P) >= M, "{N} rows of x by {P} pairs, {M} of W");
        let rows = self.columns.len();
        let groups = rows.div_ceil(M);
        // Where row `m` of a group of W starts in a strip. The rows that are not there are the last one again.
        let place = |task: usize, m: usize| {
            let (strip, group) = (task / groups, task % groups);
            [self.row + (group * M + m).min(rows - 1), strip * STRIP]
        };
        let tasks = self.units.div_ceil(STRIP) * groups;

        // Lanes are added up once, at the end of a row.
        let mut sums = [[Lanes::default(); N]; PART];
        let mut buffers: [Values<A::V, M>; 2] = [[[[a.load(&E::ZERO); 2]; STRIP]; M]; 2];
        let [now, next] = &mut buffers;
        let (mut now, mut next) = (now, next);
        for (m, to) in now.iter_mut().enumerate() {
            self.unpack(a, place(0, m), to).finish(&self, a);
        }
        for task in 0..tasks {
            let [row, start] = place(task, 0);
            for pass in 0..N / (2 * P) {
                let mut following = match next.get_mut(pass) {
                    Some(to) if task + 1 < tasks => Some(self.unpack(a, place(task + 1, pass), to)),
                    _ => None,
                };
                // Among the products where there are registers for both.
                if A::S::SUMS < 16
                    && let Some(unpack) = following.take()
                {
                    unpack.finish(&self, a);
                }
                self.multiply::<A, M, P>(a, start, now, 2 * P * pass, &mut sums[row - self.row..rows], following);
            }
            (now, next) = (next, now);
        }
        add_up(a, self.format, self.row, &sums, self.columns);
    }

    // The loops over `0..M`, `0..P` and the like below are unrolled into registers; iterators
    // and closures of the standard library would not be inlined for certain.

    /// Adds to `sums` the products of `M` rows of W, from unit `start` on, with those of x from `n` on, and unpacks
    /// what follows, unit by unit.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn multiply<A: Arithmetic<F, Element = E>, const M: usize, const P: usize>(
        &self,
        a: A,
        start: usize,
        values: &Values<A::V, M>,
        n: usize,
        sums: &mut [[Lanes; N]],
        mut following: Option<Unpack<A::Block, A::V>>,
    ) {
        let s = a.simd();
        let len = (self.units - start).min(STRIP);
        let mut x = [&self.x[..len]; P];
        for p in 0..P {
            x[p] = &self.x[(n / 2 + p) * self.units + start..][..len];
        }
        let mut acc = [[[s.splat(0.0); 2]; P]; M];
        for u in 0..len {
            // First of all, as its registers are free again before the others are loaded.
            if let Some(unpack) = &mut following {
                unpack.unit(self, a, u);
            }
            for k in 0..2 {
                let mut xs = [[a.load(&E::ZERO); 2]; P];
                for p in 0..P {
                    xs[p] = [a.load(&x[p][u][0].0[k]), a.load(&x[p][u][1].0[k])];
                }
                for m in 0..M {
                    let w = values[m][u][k];
                    for p in 0..P {
                        for j in 0..2 {
                            acc[m][p][j] = a.multiply_add(w, xs[p][j], acc[m][p][j]);
                        }
                    }
                }
            }
        }
        for m in 0..M.min(sums.len()) {
            for p in 0..P {
                for j in 0..2 {
                    let sum = &mut sums[m][n + 2 * p + j].0;
                    s.store(s.add(s.load(sum), acc[m][p][j]), sum);
                }
            }
        }
    }

    /// What unpacks a row of W from a unit on; asks for the bytes of a later one.
    #[inline(always)]
    fn unpack<'t, A: Arithmetic<F, Element = E>>(
        &self,
        a: A,
        [row, start]: [usize; 2],
        to: &'t mut [[A::V; 2]; STRIP],
    ) -> Unpack<'t, A::Block, A::V> {
        let ahead = ((row + AHEAD) * self.units + start) * E::UNIT;
        self.format.prefetch(a.simd(), ahead..ahead + STRIP * E::UNIT);
        let units = self.format.block_len() / E::UNIT;
        let index = row * (self.units / units) + start / units;
        let to = &mut to[..(self.units - start).min(STRIP)];
        Unpack { block: a.block(self.format, index), index, next: start % units, to }
    }
}

/// A strip of a row of W that is being unpacked.
struct Unpack<'t, B, V> {
    block: B,
    index: usize,
    /// The next unit of the block.
    next: usize,
    to: &'t mut [[V; 2]],
}

impl<B: Copy, V: Copy> Unpack<'_, B, V> {
    /// Unpacks unit `u`, if there is one; it may be of the next block.
    #[inline(always)]
    fn unit<F: Format, E: Element<F>, A: Arithmetic<F, Element = E, Block = B, V = V>, const N: usize>(
        &mut self,
        of: &Cached<F, E, N>,
        a: A,
        u: usize,
    ) {
        let Some(to) = self.to.get_mut(u) else { return };
        if self.next == of.format.block_len() / E::UNIT {
            self.index += 1;
            self.block = a.block(of.format, self.index);
            self.next = 0;
        }
        *to = a.values(of.format, &self.block, self.next);
        self.next += 1;
    }

    /// Unpacks all units.
    #[inline(always)]
    fn finish<F: Format, E: Element<F>, A: Arithmetic<F, Element = E, Block = B, V = V>, const N: usize>(
        mut self,
        of: &Cached<F, E, N>,
        a: A,
    ) {
        for u in 0..self.to.len() {
            self.unit(of, a, u);
        }
    }
}
