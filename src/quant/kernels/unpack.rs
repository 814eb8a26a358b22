//! Unpacking into a tile.

use super::{Float, Format};
use crate::error::Result;
use crate::ffi::compute;
use crate::ffi::simd::{Kernel, LANES, Simd, dispatch};
use std::ops::Range;

/// Elements that a thread takes at a time: enough to be worth its while.
const PART: usize = 1 << 14;

/// Rows whose bytes are asked for before they are read, where rows are apart.
const AHEAD: usize = 8;

/// A rectangle of a weight (rows of `inn` elements).
#[derive(Debug, Clone)]
pub(crate) struct Tile {
    pub(crate) inn: usize,
    pub(crate) row: usize,
    pub(crate) columns: Range<usize>,
}

/// Writes the values of a tile into `out`, row by row.
pub(crate) fn unpack<F: Format, T: Float>(format: &F, tile: &Tile, out: &mut [T]) -> Result<()> {
    // Whole rows are one run of elements; columns are a run for each row.
    let width = tile.columns.len();
    let first = tile.row * tile.inn + tile.columns.start;
    if width == tile.inn {
        let part = PART.next_multiple_of(format.block_len());
        return compute::for_each_chunk(out, part, |i, out| {
            dispatch(Unpack { format, start: first + i * part, stride: 0, width: out.len(), out });
        });
    }
    let rows = (PART / width.max(1)).max(1);
    compute::for_each_chunk(out, rows * width, |i, out| {
        dispatch(Unpack { format, start: first + i * rows * tile.inn, stride: tile.inn, width, out });
    })
}

/// Writes the values of the rows (of `inn` elements) that `index` lists into
/// `out`; the weight has all of them.
pub(crate) fn unpack_index<F: Format, T: Float>(format: &F, inn: usize, index: &[i64], out: &mut [T]) -> Result<()> {
    let rows = (PART / inn.max(1)).max(1);
    compute::for_each_chunk(out, rows * inn, |i, out| {
        for (row, out) in index[i * rows..].iter().zip(out.chunks_mut(inn)) {
            dispatch(Unpack { format, start: *row as usize * inn, stride: 0, width: inn, out });
        }
    })
}

/// Runs of `width` elements, `stride` apart, from `start` on.
struct Unpack<'a, F, T> {
    format: &'a F,
    start: usize,
    stride: usize,
    width: usize,
    out: &'a mut [T],
}

impl<F: Format, T: Float> Kernel for Unpack<'_, F, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, run) in self.out.chunks_mut(self.width.max(1)).enumerate() {
            let start = self.start + i * self.stride;
            // One run after the other the processor fetches by itself.
            if self.stride > 0 {
                let ahead = start + AHEAD * self.stride;
                self.format.prefetch(s, ahead..ahead + self.width);
            }
            unpack_run(s, self.format, start, run);
        }
    }
}

/// Flat elements from `start` on.
#[inline(always)]
pub(super) fn unpack_run<S: Simd, F: Format, T: Float>(s: S, format: &F, start: usize, mut out: &mut [T]) {
    let len = format.block_len();
    let (mut index, mut at) = (start / len, start % len);
    while !out.is_empty() {
        let take = (len - at).min(out.len());
        let (mut part, rest) = out.split_at_mut(take);
        // Up to the next whole 32, then by 32, then what is left.
        let head = (at.next_multiple_of(2 * LANES) - at).min(part.len());
        for value in part.split_off_mut(..head).unwrap_or_default() {
            *value = T::from_f32(format.value(index, at));
            at += 1;
        }
        let (pairs, tail) = part.as_chunks_mut();
        if !pairs.is_empty() {
            format.write(s, index, at / (2 * LANES), pairs);
            at += pairs.len() * 2 * LANES;
        }
        for value in tail {
            *value = T::from_f32(format.value(index, at));
            at += 1;
        }
        (index, at, out) = (index + 1, 0, rest);
    }
}
