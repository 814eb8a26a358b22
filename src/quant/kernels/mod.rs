//! CPU kernels over plain slices: unpacking, products (with few rows, and with
//! many of bf16 where the processor has tile registers), and [`packing`].
//!
//! A [`Format`] says how bytes become values; the kernels are written once for
//! all formats and compiled for each instruction set (`ffi::simd`). They know
//! no tensors and take no decisions: the schemes lend their slices, and
//! `linear` chooses between a product here and a tile for libtorch.
//!
//! Unpacked values are the same bits on every instruction set. Sums are in f32;
//! their order is that of the instruction set, so that products agree within
//! the rounding of an f32 sum: at most `in · 2⁻²⁴` of `Σ |x · w|`. Where a
//! processor multiplies bf16 (`arithmetic`, `many_bf16`), subnormal ones count as
//! zero; where it multiplies bytes (`integers`), x may lose `2⁻²³` of the largest
//! of its row. Scales of whole rows are multiplied with the sums, in f32.

mod arithmetic;
mod bytes_in_bf16;
mod codebook;
mod few;
mod float;
mod formats;
mod groups;
mod in_bf16;
mod integers;
mod many_bf16;
mod nibbles;
pub(crate) mod packing;
mod unpack;

pub(crate) use codebook::{Codes, Double};
pub(crate) use float::{Dtype, Float, Floats};
pub(crate) use formats::{Absmax, Bytes, E4m3, E5m2, Format, I8};
pub(crate) use groups::Groups;
pub(crate) use in_bf16::InBf16;
pub(crate) use integers::{Integers, multiply_integers};
pub(crate) use nibbles::{Powers, Zeros, power};
pub(crate) use unpack::{Tile, unpack, unpack_index};

use crate::error::Result;
use crate::ffi::simd::{Amx, Bf16Kernel, DotBf16, LANES, dispatch_bf16, multiplies_bf16, multiplies_bf16_faster};
use arithmetic::Element;
use half::bf16;
use std::borrow::Cow;

/// Rows beyond which products are for many: a caller may find it to be fewer.
const FEW: usize = 64;

/// Rows up to which tile registers gain nothing.
const TOO_FEW_FOR_TILES: usize = 8;

/// Rows of g up to which laying W side by side for integers takes longer than f32.
const TOO_FEW_FOR_INTEGERS: usize = 3;

/// Whether [`product`] and [`product_transposed`] can do a weight with rows of
/// `inn` elements, times so many rows; `may_round` says that these are f32 that may be rounded to bf16.
pub(crate) fn fits<F: InBf16, T: Float>(format: &F, inn: usize, rows: usize, may_round: bool) -> bool {
    (rows <= FEW || format.integers().is_some()) && whole_units::<F, f32>(format, inn)
        || T::DTYPE == Dtype::Bf16 && many_bf16::fits(format, inn).is_some()
        || may_round && multiplies_bf16_faster() && whole_units::<F, bf16>(format, inn)
}

/// Whether the rows of a weight are whole blocks of whole units.
fn whole_units<F: Format, E: Element<F>>(format: &F, inn: usize) -> bool {
    format.block_len().is_multiple_of(E::UNIT) && inn.is_multiple_of(format.block_len())
}

/// x or g as bf16 to be multiplied as such: if that is what they and the weight are, or what f32 may be rounded to, and
/// the processor gains by it; the unit tests take any processor that can.
fn in_bf16<'a, F: InBf16, T: Float>(format: &F, inn: usize, from: &'a [T], may_round: bool) -> Option<Cow<'a, [bf16]>> {
    let gains = if cfg!(test) { multiplies_bf16() } else { multiplies_bf16_faster() };
    if !gains || !whole_units::<F, bf16>(format, inn) {
        return None;
    }
    match T::as_bf16(from) {
        Some(from) if format.dtype() == Dtype::Bf16 => Some(Cow::Borrowed(from)),
        None if may_round => {
            let mut rounded = vec![bf16::ZERO; from.len()];
            dispatch_bf16(Round { from, to: &mut rounded });
            Some(Cow::Owned(rounded))
        }
        _ => None,
    }
}

/// Writes the nearest bf16 of each number.
struct Round<'a, T> {
    from: &'a [T],
    to: &'a mut [bf16],
}

impl<T: Float> Bf16Kernel for Round<'_, T> {
    #[inline(always)]
    fn run<D: DotBf16>(self, d: D) {
        let s = d.simd();
        let ((from, rest), (to, to_rest)) = (self.from.as_chunks::<{ 2 * LANES }>(), self.to.as_chunks_mut());
        for (to, from) in to.iter_mut().zip(from) {
            let from = from.as_chunks().0;
            d.store(d.pack([T::load(s, &from[0]), T::load(s, &from[1])]), to);
        }
        to_rest.iter_mut().zip(rest).for_each(|(to, from)| *to = bf16::from_f32(from.to_f32()));
    }
}

/// Whether the kernels do better than libtorch with any number of rows of this dtype.
pub(crate) fn multiply_many(dtype: Dtype) -> bool {
    dtype == Dtype::Bf16 && Amx::detect().is_some()
}

/// The factors of all rows.
fn factors<F: Format>(format: &F, rows: usize) -> Vec<f32> {
    (0..rows).map(|row| format.factor(row)).collect()
}

/// Calls a kernel for 16, 8, 4, 2 or 1 rows at a time.
macro_rules! by_rows {
    ($kernel:ident::<$element:ty, $x:ty>, $format:expr, $shape:expr, $from:expr, $width:expr, $to:expr, $to_width:expr) => {{
        let (mut from, mut to) = ($from, $to);
        while !from.is_empty() {
            let rows = match from.len() / $width {
                0..2 => 1,
                2..4 => 2,
                4..8 => 4,
                8..16 => 8,
                _ => 16,
            };
            let (x, from_rest) = from.split_at(rows * $width);
            let (y, to_rest) = to.split_at_mut(rows * $to_width);
            match rows {
                1 => few::$kernel::<F, $element, $x, T, 1>($format, $shape, x, y)?,
                2 => few::$kernel::<F, $element, $x, T, 2>($format, $shape, x, y)?,
                4 => few::$kernel::<F, $element, $x, T, 4>($format, $shape, x, y)?,
                8 => few::$kernel::<F, $element, $x, T, 8>($format, $shape, x, y)?,
                _ => few::$kernel::<F, $element, $x, T, 16>($format, $shape, x, y)?,
            }
            (from, to) = (from_rest, to_rest);
        }
        Ok(())
    }};
}

/// y = x · Wᵀ: x (n, in), y (n, out), row-major, of a weight that [`fits`]. `may_round` says that x is f32, and that
/// both sides may be rounded to bf16 where that gains.
pub(crate) fn product<F: InBf16, T: Float>(
    format: &F,
    shape: [usize; 2],
    x: &[T],
    y: &mut [T],
    may_round: bool,
) -> Result<()> {
    if let (Some(x), Some(y), Some(amx)) = (T::as_bf16(x), T::as_bf16_mut(y), many_bf16::fits(format, shape[1]))
        && x.len() > TOO_FEW_FOR_TILES * shape[1]
    {
        return many_bf16::product(amx, format, shape, x, y);
    }
    if let Some(x) = in_bf16(format, shape[1], x, may_round) {
        return by_rows!(product::<bf16, bf16>, format, shape, &x[..], shape[1], y, shape[0]);
    }
    if let Some(w) = format.integers()
        && integers::product(&w, &factors(format, shape[0]), x, y)?
    {
        return Ok(());
    }
    by_rows!(product::<f32, T>, format, shape, x, shape[1], y, shape[0])
}

/// dX = g · W: g (n, out), dx (n, in), row-major, of a weight that [`fits`]. `may_round` is as in [`product`].
pub(crate) fn product_transposed<F: InBf16, T: Float>(
    format: &F,
    shape: [usize; 2],
    g: &[T],
    dx: &mut [T],
    may_round: bool,
) -> Result<()> {
    if let (Some(g), Some(dx), Some(amx)) = (T::as_bf16(g), T::as_bf16_mut(dx), many_bf16::fits(format, shape[1]))
        && g.len() > TOO_FEW_FOR_TILES * shape[0]
    {
        return many_bf16::product_transposed(amx, format, shape, g, dx);
    }
    if let Some(g) = in_bf16(format, shape[1], g, may_round) {
        return by_rows!(product_transposed::<bf16, bf16>, format, shape, &g[..], shape[0], dx, shape[1]);
    }
    if g.len() > TOO_FEW_FOR_INTEGERS * shape[0]
        && let Some(w) = format.integers()
        && integers::product_transposed(&w, &factors(format, shape[0]), g, dx)?
    {
        return Ok(());
    }
    by_rows!(product_transposed::<f32, T>, format, shape, g, shape[0], dx, shape[1])
}
