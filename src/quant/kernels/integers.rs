//! Products with a weight of signed bytes, in integers: a byte of W goes from
//! memory into the product as it is, and sums are exact.
//!
//! A row of x becomes integers of 24 bits by a power of two of its own, each of
//! three bytes that are multiplied one after the other; so an element is off by
//! `2⁻²³` of the largest of its row at most, and not at all if it is of bf16 and
//! more than `2⁻¹⁵` of that. An f32 product takes four multiplications where
//! this one takes three.
//!
//! ```text
//! |y − x · Wᵀ| ≤ 2⁻²³ · max|x| · Σ|w| + in · 2⁻²⁴ · Σ|x · w|
//! ```
//!
//! where the second term is for the few roundings to f32, of the sums of the
//! three bytes in sixteen lanes, and of the scales. No sum depends on the number
//! of threads, or on other rows.

use super::Float;
use crate::error::Result;
use crate::ffi::compute::{Columns, for_each_chunk, for_each_columns, threads};
use crate::ffi::simd::{BYTES, DotI8, I8Kernel, LANES, Simd, dispatch_i8, multiplies_i8};

/// Rows of x or g at a time.
const ROWS: usize = 128;
/// Rows of x that stay in the second-level cache while they are multiplied by [`PART`] rows of W.
const BLOCK: usize = 16;
/// Rows of W that a thread takes at a time, for x · Wᵀ.
const PART: usize = 32;
/// Units of sixty-four columns that it takes at a time, for g · W.
const STRIP: usize = 4;
/// Rows of W between which sums lie in memory, for g · W.
const DEPTH: usize = 4 * BYTES;
/// Rows of W that an instruction takes, for g · W.
const FOUR: usize = 4;
/// Rows of W, or sixteenths of one, whose sums have room in 32 bits.
const MOST: usize = 1 << 16;
/// Rows of g below which W goes through the f32 kernels faster than side by side.
const TOO_FEW: usize = 4;
/// Bytes of an integer.
const LIMBS: usize = 3;

/// What is loaded together, in a cache line of its own.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line<T>(T);

/// Sixty-four bytes.
type Bytes = Line<[u8; BYTES]>;
const BLANK: Bytes = Line([0; BYTES]);
/// Sixteen sums.
type Lanes = Line<[i32; LANES]>;
const ZERO: Lanes = Line([0; LANES]);

/// A weight (out, in) of signed bytes, each row of which has a factor.
pub(crate) struct Integers<'a> {
    bytes: &'a [u8],
    row: usize,
}

impl<'a> Integers<'a> {
    /// A weight with rows of so many bytes, if [`multiply_integers`].
    pub(super) fn new(bytes: &'a [u8], row: usize) -> Option<Self> {
        (row > 0 && multiply_integers([bytes.len() / row, row])).then_some(Integers { bytes, row })
    }

    fn rows(&self) -> usize {
        self.bytes.len() / self.row
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &'a [[u8; BYTES]] {
        self.bytes[row * self.row..][..self.row].as_chunks().0
    }
}

/// Whether bytes of this shape can be multiplied here, by any number of rows, faster than f32.
pub(crate) fn multiply_integers([out, inn]: [usize; 2]) -> bool {
    multiplies_i8() && (1..=MOST).contains(&out) && (1..=LANES * MOST).contains(&inn) && inn.is_multiple_of(BYTES)
}

/// A row of integers q of 24 bits, for `q · scale`.
#[derive(Default)]
struct Row {
    /// Of each sixty-four, the high bytes of `q + 2²³`, the middle ones and the low ones; zeros of q behind the last.
    lines: Vec<[Bytes; LIMBS]>,
    /// Nothing if an element is infinite, or the largest is huge or tiny.
    scale: Option<f32>,
}

/// Rows as integers, times the factors of their elements if there are any; nothing if they can't be.
fn split<T: Float>(rows: &[T], len: usize, factors: Option<&[f32]>) -> Result<Option<Vec<Row>>> {
    let mut to: Vec<Row> = rows.chunks_exact(len).map(|_| Row::default()).collect();
    for_each_chunk(&mut to, 1, |i, to| {
        if let [to] = to {
            dispatch_i8(Split { x: &rows[i * len..][..len], factors, to });
        }
    })?;
    Ok(to.iter().all(|row| row.scale.is_some()).then_some(to))
}

struct Split<'a, T> {
    x: &'a [T],
    factors: Option<&'a [f32]>,
    to: &'a mut Row,
}

impl<T: Float> I8Kernel for Split<'_, T> {
    #[inline(always)]
    fn run<D: DotI8>(self, d: D) {
        const BITS: i32 = 22;
        const BIAS: i32 = 127;
        let (s, units) = (d.simd(), self.x.len().div_ceil(BYTES));
        let mut values = vec![0f32; units * BYTES];
        let (x, last) = self.x.as_chunks();
        for (to, x) in values.as_chunks_mut().0.iter_mut().zip(x) {
            s.store(T::load(s, x), to);
        }
        for (to, x) in values[x.len() * LANES..].iter_mut().zip(last) {
            *to = x.to_f32();
        }
        if let Some(factors) = self.factors {
            values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
        }
        let largest = values.iter().fold(0, |largest: u32, value| largest.max(value.abs().to_bits()));
        let exponent = (largest >> 23) as i32 - BIAS;
        let power = |exponent: i32| f32::from_bits(((exponent + BIAS) as u32) << 23);
        let (steps, scale) = match (largest, exponent) {
            (0, _) => (0.0, 0.0),
            (_, -100..=100) => (power(BITS - exponent), power(exponent - BITS)),
            _ => return,
        };
        self.to.lines = vec![[BLANK; LIMBS]; units];
        for (values, lines) in values.as_chunks::<BYTES>().0.iter().zip(&mut self.to.lines) {
            for (i, values) in values.as_chunks().0.iter().enumerate() {
                let bytes = d.split(s.mul(s.load(values), s.splat(steps)));
                for (line, bytes) in lines.iter_mut().zip(bytes) {
                    line.0.as_chunks_mut().0[i] = bytes;
                }
            }
        }
        self.to.scale = Some(scale);
    }
}

/// What sixteen sums of each of the bytes mean, but for the scale.
#[inline(always)]
fn join<D: DotI8>(d: D, [high, middle, low]: [D::Sums; LIMBS]) -> <D::S as Simd>::V {
    let s = d.simd();
    let lower = s.mul_add(d.to_f32(middle), s.splat(256.0), d.to_f32(low));
    s.mul_add(d.to_f32(high), s.splat(65536.0), lower)
}

/// y = x · Wᵀ, with these factors of the rows of W; answers whether x could be integers.
pub(super) fn product<T: Float>(w: &Integers, factors: &[f32], x: &[T], y: &mut [T]) -> Result<bool> {
    let out = w.rows();
    for (x, y) in x.chunks(ROWS * w.row).zip(y.chunks_mut(ROWS * out)) {
        let Some(x) = split(x, w.row, None)? else { return Ok(false) };
        for_each_columns(y, out, PART, |i, y| dispatch_i8(Product { w, factors, first: i * PART, x: &x, y }))?;
    }
    Ok(true)
}

struct Product<'a, T> {
    w: &'a Integers<'a>,
    factors: &'a [f32],
    /// The first row of W.
    first: usize,
    x: &'a [Row],
    y: Columns<'a, T>,
}

impl<T: Float> I8Kernel for Product<'_, T> {
    #[inline(always)]
    fn run<D: DotI8>(mut self, d: D) {
        let rows = self.y.len();
        let mut offsets = [d.zero(); PART];
        for (i, offset) in offsets.iter_mut().enumerate().take(rows) {
            *offset = offset_of(d, self.w.row(self.first + i));
        }
        for (block, x) in self.x.chunks(BLOCK).enumerate() {
            let mut i = 0;
            while i + 4 <= rows {
                self.rows::<D, 4>(d, i, &offsets, block * BLOCK, x);
                i += 4;
            }
            while i < rows {
                self.rows::<D, 1>(d, i, &offsets, block * BLOCK, x);
                i += 1;
            }
        }
    }
}

/// What the 2²³ in each element of x adds to the sums of the high bytes, to be taken away.
#[inline(always)]
fn offset_of<D: DotI8>(d: D, w: &[[u8; BYTES]]) -> D::Sums {
    let (ones, mut sums) = (d.splat([1; 4]), [d.zero(); 2]);
    let (pairs, last) = w.as_chunks::<2>();
    for [a, b] in pairs {
        sums = [d.dot(ones, d.load(a), sums[0]), d.dot(ones, d.load(b), sums[1])];
    }
    for w in last {
        sums[0] = d.dot(ones, d.load(w), sums[0]);
    }
    d.times_minus_128(d.add(sums[0], sums[1]))
}

// The loops over `0..M`, `0..N` and the like below are unrolled into registers; iterators
// and closures of the standard library would not be inlined for certain.

impl<T: Float> Product<'_, T> {
    /// The products of `M` rows of W with a block of x, which begins at row `n`.
    #[inline(always)]
    fn rows<D: DotI8, const M: usize>(&mut self, d: D, i: usize, offsets: &[D::Sums; PART], n: usize, x: &[Row]) {
        let (pairs, last) = x.as_chunks::<2>();
        for (pair, x) in pairs.iter().enumerate() {
            self.dot::<D, M, 2>(d, i, offsets, n + 2 * pair, x);
        }
        for one in last {
            self.dot::<D, M, 1>(d, i, offsets, n + x.len() - 1, std::array::from_ref(one));
        }
    }

    /// The products of `M` rows of W with `N` of x.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn dot<D: DotI8, const M: usize, const N: usize>(
        &mut self,
        d: D,
        i: usize,
        offsets: &[D::Sums; PART],
        first: usize,
        x: &[Row; N],
    ) {
        let (s, units) = (d.simd(), self.w.row / BYTES);
        let mut w = [self.w.row(self.first + i); M];
        let mut lines = [&x[0].lines[..units]; N];
        let mut sums = [[[d.zero(); LIMBS]; N]; M];
        for m in 0..M {
            w[m] = &self.w.row(self.first + i + m)[..units];
            for n in 0..N {
                lines[n] = &x[n].lines[..units];
                sums[m][n][0] = offsets[i + m];
            }
        }
        for u in 0..units {
            let mut values = [d.load(&w[0][u]); M];
            for m in 1..M {
                values[m] = d.load(&w[m][u]);
            }
            for n in 0..N {
                for k in 0..LIMBS {
                    let x = d.load(&lines[n][u][k].0);
                    for m in 0..M {
                        sums[m][n][k] = d.dot(x, values[m], sums[m][n][k]);
                    }
                }
            }
        }
        for n in 0..N {
            let scale = x[n].scale.unwrap_or_default();
            let y = &mut self.y.row(first + n)[i..i + M];
            for m in 0..M {
                y[m] = T::from_f32(s.sum(join(d, sums[m][n])) * scale * self.factors[self.first + i + m]);
            }
        }
    }
}

/// dX = g · W, with these factors of the rows of W; answers whether it did: if g, by these, could be integers, and has some rows.
pub(super) fn product_transposed<T: Float>(w: &Integers, factors: &[f32], g: &[T], dx: &mut [T]) -> Result<bool> {
    let (out, units, threads) = (w.rows(), w.row / BYTES, threads());
    if g.len() < TOO_FEW * out {
        return Ok(false);
    }
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
