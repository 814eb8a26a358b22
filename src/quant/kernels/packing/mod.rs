//! Packing on the CPU, over plain slices.
//!
//! The same arithmetic, step by step, as that of libtorch's operators in the
//! schemes' files, but in one pass and without temporaries; the bits are the
//! same on every instruction set, those of the search included.

mod blocks;
mod codes;
mod groups;
mod rows;
mod search;

pub(crate) use blocks::pack_blocks;
pub(crate) use codes::{SortedCode, pack_codes};
pub(crate) use groups::{GroupLayout, pack_groups};
pub(crate) use rows::{Fp8Code, Int8Code, LlmInt8Code, RowCode, pack_rows};

use crate::error::Result;
use crate::ffi::compute::for_each_chunk;
use crate::ffi::simd::{Kernel, LANES, Simd, dispatch};

/// Elements that a thread takes at a time: enough to be worth its while.
const PART: usize = 1 << 15;

/// Runs each kernel once, on libtorch's threads.
fn run_all<K: Kernel<Output = ()> + Send>(kernels: impl Iterator<Item = K>) -> Result<()> {
    let mut kernels: Vec<Option<K>> = kernels.map(Some).collect();
    for_each_chunk(&mut kernels, 1, |_, kernels| kernels.iter_mut().filter_map(Option::take).for_each(dispatch))
}

/// How many runs of `len` elements make a part.
fn runs(len: usize) -> usize {
    (PART / len.max(1)).max(1)
}

/// Fewer than sixteen values, and copies of `filler` after them.
#[inline(always)]
fn padded<T: Copy>(values: &[T], filler: T) -> [T; LANES] {
    let mut all = [filler; LANES];
    all[..values.len()].copy_from_slice(values);
    all
}

/// The largest lane.
#[inline(always)]
fn largest<S: Simd>(s: S, v: S::V) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(v, &mut lanes);
    let mut max = lanes[0];
    for lane in lanes {
        max = if lane > max { lane } else { max };
    }
    max
}

/// The smallest lane.
#[inline(always)]
fn smallest<S: Simd>(s: S, v: S::V) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(v, &mut lanes);
    let mut min = lanes[0];
    for lane in lanes {
        min = if lane < min { lane } else { min };
    }
    min
}

/// The lanes within limits.
#[inline(always)]
fn clamp<S: Simd>(s: S, v: S::V, low: f32, high: f32) -> S::V {
    s.min(s.max(v, s.splat(low)), s.splat(high))
}
