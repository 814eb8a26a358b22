//! Rows of W to come: a processor fetches by itself what follows in a page of
//! memory, and rows are about as long as one.

use super::super::Format;
use super::super::formats::LINE;
use crate::ffi::simd::Simd;

/// Some elements of a row, and where the same ones of the next rows are.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    first: *const u8,
    /// Bytes of a row.
    row: usize,
}

impl Ahead {
    /// From flat element `at` on, of rows of `inn` elements.
    #[inline(always)]
    pub(super) fn new<F: Format>(format: &F, at: usize, inn: usize) -> Self {
        Ahead { first: format.address(at), row: inn * LINE / F::PER_LINE }
    }

    /// Asks for what `rows` rows have from unit `i` on, of so many elements, at every second cache line.
    #[inline(always)]
    pub(super) fn ask<F: Format, S: Simd>(&self, s: S, unit: usize, i: usize, rows: usize) {
        if (i * unit).is_multiple_of(2 * F::PER_LINE) {
            for row in 0..rows {
                let first = self.first.wrapping_add(row * self.row + i * unit / F::PER_LINE * LINE);
                s.prefetch(first);
                s.prefetch(first.wrapping_add(LINE));
            }
        }
    }
}
