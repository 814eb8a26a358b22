//! Codes of a few bits with a scale and a shift for each group: `int4`, `int2`.

use super::search::search;
use super::{clamp, largest, padded, run_all, runs, smallest};
use crate::error::Result;
use crate::ffi::simd::{Kernel, LANES, Simd};
use crate::quant::kernels::Float;

/// How groups become codes, and where those lie: with R = `byte_rows`, byte row
/// r holds group r in its lowest bits, then group r + R, and so on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupLayout {
    pub(crate) bits: u32,
    /// Values in a group.
    pub(crate) size: usize,
    pub(crate) byte_rows: usize,
    /// Whether scale and shift are searched for.
    pub(crate) search: bool,
}

/// Packs a weight of whole groups.
pub(crate) fn pack_groups<T: Float>(
    layout: GroupLayout,
    weight: &[T],
    bytes: &mut [u8],
    scales: &mut [T],
    shifts: &mut [T],
) -> Result<()> {
    let GroupLayout { size, byte_rows, .. } = layout;
    let rows = runs(size);
    let mut parts: Vec<Groups<T>> =
        bytes.chunks_mut(rows * size).map(|bytes| Groups { layout, bytes, layers: Vec::new() }).collect();
    // Those that have their codes in the same bits.
    let layers = weight.chunks(byte_rows * size).zip(scales.chunks_mut(byte_rows)).zip(shifts.chunks_mut(byte_rows));
    for ((weight, scales), shifts) in layers {
        let pieces = weight.chunks(rows * size).zip(scales.chunks_mut(rows)).zip(shifts.chunks_mut(rows));
        for (part, ((weight, scales), shifts)) in parts.iter_mut().zip(pieces) {
            part.layers.push(Layer { weight, scales, shifts });
        }
    }
    run_all(parts.into_iter())
}

/// Some rows of bytes, and what goes into them.
struct Groups<'a, T> {
    layout: GroupLayout,
    bytes: &'a mut [u8],
    layers: Vec<Layer<'a, T>>,
}

struct Layer<'a, T> {
    weight: &'a [T],
    scales: &'a mut [T],
    shifts: &'a mut [T],
}

impl<T: Float> Kernel for Groups<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let GroupLayout { bits, size, search: searched, .. } = self.layout;
        let top = ((1u32 << bits) - 1) as f32;
        // The group that is searched for, in f32.
        let mut scratch = vec![[0.0; LANES]; if searched { size.div_ceil(LANES) } else { 0 }];
        self.bytes.fill(0);
        for (layer, bit) in self.layers.into_iter().zip((0..8).step_by(bits as usize)) {
            let groups = layer.weight.chunks_exact(size).zip(self.bytes.chunks_exact_mut(size));
            for (((group, bytes), scale), shift) in groups.zip(layer.scales).zip(layer.shifts) {
                let (mut step, mut offset) = first_guess(s, group, top);
                if searched {
                    (step, offset) = search(s, group, (step, offset), top, &mut scratch);
                }
                *scale = T::from_f32(step);
                *shift = T::from_f32(offset);
                write_codes(s, group, (step, offset), top, bit, bytes);
            }
        }
    }
}

/// Scale and shift that span the values of a group, in its dtype.
#[inline(always)]
fn first_guess<S: Simd, T: Float>(s: S, group: &[T], top: f32) -> (f32, f32) {
    let (sixteens, rest) = group.as_chunks();
    let rest = T::load(s, &padded(rest, group[0]));
    let (mut low, mut high) = (rest, rest);
    for values in sixteens {
        let values = T::load(s, values);
        (low, high) = (s.min(values, low), s.max(values, high));
    }
    // Which of two zeros is found depends on the order: it is the one without a sign.
    let (low, high) = (smallest(s, low) + 0.0, largest(s, high) + 0.0);
    (T::DTYPE.round_one(T::DTYPE.round_one(high - low) / top), -low)
}

/// Ors the codes of a group into its bytes, from `bit` on.
#[inline(always)]
fn write_codes<S: Simd, T: Float>(
    s: S,
    group: &[T],
    (step, offset): (f32, f32),
    top: f32,
    bit: usize,
    bytes: &mut [u8],
) {
    // A group of equal values has scale 0 and must not be divided by it.
    let (step, offset) = (s.splat(if step == 0.0 { 1.0 } else { step }), s.splat(offset));
    let (sixteens, rest) = group.as_chunks();
    let (to, to_rest) = bytes.as_chunks_mut::<LANES>();
    for (to, values) in to.iter_mut().zip(sixteens) {
        let codes = codes::<S, T>(s, T::load(s, values), step, offset, top);
        for (byte, code) in to.iter_mut().zip(codes) {
            *byte |= code << bit;
        }
    }
    let codes = codes::<S, T>(s, T::load(s, &padded(rest, group[0])), step, offset, top);
    for (byte, code) in to_rest.iter_mut().zip(codes) {
        *byte |= code << bit;
    }
}

#[inline(always)]
fn codes<S: Simd, T: Float>(s: S, values: S::V, step: S::V, offset: S::V, top: f32) -> [u8; LANES] {
    let from_lowest = T::DTYPE.round(s, s.add(values, offset));
    let q = T::DTYPE.round(s, s.div(from_lowest, step));
    s.to_bytes(clamp(s, q, 0.0, top))
}
