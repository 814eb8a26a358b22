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
//! of threads.

mod forward;
mod transposed;

pub(super) use forward::product;
pub(super) use transposed::product_transposed;

use super::Float;
use crate::error::Result;
use crate::ffi::compute::for_each_chunk;
use crate::ffi::simd::{BYTES, DotI8, I8Kernel, LANES, Simd, dispatch_i8, multiplies_i8};

/// Rows of x or g at a time.
const ROWS: usize = 128;
/// Rows of W, or sixteenths of one, whose sums have room in 32 bits.
const MOST: usize = 1 << 16;
/// Bytes of an integer.
const LIMBS: usize = 3;

/// What is loaded together, in a cache line of its own.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line<T>(T);

/// Sixty-four bytes.
type Bytes = Line<[u8; BYTES]>;
const BLANK: Bytes = Line([0; BYTES]);

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
