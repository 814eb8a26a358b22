//! Rows of W to come: a processor fetches by itself what follows in a page of
//! memory, and rows are about as long as one.

use super::super::Format;
use super::super::formats::LINE;
use crate::ffi::simd::Simd;

/// Some elements of a row, and where the same ones of the next rows are.
pub(super) struct Ahead {
    first: *const u8,
    /// Bytes of a row.
    row: usize,
    /// Units that have gone by.
    gone: usize,
}

impl Ahead {
    /// From flat element `at` on, of rows of `inn` elements.
    #[inline(always)]
    pub(super) fn new<F: Format>(format: &F, at: usize, inn: usize) -> Self {
        Ahead { first: format.address(at), row: inn * LINE / F::PER_LINE, gone: 0 }
    }

    /// Goes by a unit, of so many elements, and asks for what begins there of `rows` rows, two cache lines at a time.
    #[inline(always)]
    pub(super) fn ask<F: Format, S: Simd>(&mut self, s: S, unit: usize, rows: usize) {
        if (self.gone * unit).is_multiple_of(2 * F::PER_LINE) {
            for row in 0..rows {
                let first = self.first.wrapping_add(row * self.row + self.gone * unit / F::PER_LINE * LINE);
                s.prefetch(first);
                s.prefetch(first.wrapping_add(LINE));
            }
        }
        self.gone += 1;
    }
}
