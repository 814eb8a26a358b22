//! The search for scales and shifts of `quant::hqq`, one group at a time.
//!
//! Everything but the sums of a group is f32, and products are not fused with
//! sums, so that every instruction set finds the same pair.

use super::{clamp, padded};
use crate::ffi::simd::{LANES, Simd};
use crate::quant::hqq::{BETA, KAPPA, ROUNDS};
use crate::quant::kernels::Float;

/// Scale and shift, in the weight's dtype, that give a group at most the squared
/// error of those given. `w` is scratch memory for the group in f32.
#[inline(always)]
pub(super) fn search<S: Simd, T: Float>(
    s: S,
    group: &[T],
    (step, offset): (f32, f32),
    top: f32,
    w: &mut [[f32; LANES]],
) -> (f32, f32) {
    let unit = if step == 0.0 { 1.0 } else { step };
    let (sixteens, rest) = group.as_chunks();
    let [divisor, lowest] = [unit, offset].map(|x| s.splat(x));
    for (i, to) in w.iter_mut().enumerate() {
        let values = match sixteens.get(i) {
            Some(values) => T::load(s, values),
            None => T::load(s, &padded(rest, group[0])),
        };
        s.store(s.div(s.add(values, lowest), divisor), to);
    }
    // In these units the first guess has scale 1 and shift 0.
    let (mut scale, mut shift, mut beta) = (1.0, 0.0, BETA);
    let mut best = (f64::INFINITY, scale, shift);
    for _ in 0..=ROUNDS {
        let sums = Sums::of(s, w, group.len(), Guess { scale, shift, top, inverse_beta: (1.0 / beta) as f32 });
        if sums.error < best.0 {
            best = (sums.error, scale, shift);
        }
        (scale, shift) = sums.fit(group.len());
        // All values have the same code.
        if !scale.is_finite() || scale == 0.0 {
            break;
        }
        beta *= KAPPA;
    }
    let (_, scale, shift) = best;
    // Where the scale was 0, the first guess is exact.
    (T::DTYPE.round_one(step * scale), T::DTYPE.round_one(shift * unit + offset))
}

/// A pair that is tried.
#[derive(Clone, Copy)]
struct Guess {
    scale: f32,
    shift: f32,
    top: f32,
    inverse_beta: f32,
}

/// Sums over a group, of the codes q and what they should stand for, t.
struct Sums {
    q: f64,
    qq: f64,
    t: f64,
    qt: f64,
    /// Of the squared errors.
    error: f64,
}

impl Sums {
    #[inline(always)]
    fn of<S: Simd>(s: S, w: &[[f32; LANES]], len: usize, guess: Guess) -> Self {
        let [scale, shift, inverse] = [guess.scale, guess.shift, 1.0 / guess.scale].map(|x| s.splat(x));
        let mut sums = [s.splat(0.0); 5];
        for (i, w) in w.iter().enumerate() {
            // What pads the last sixteen doesn't count.
            let live = s.load(&live(len - i * LANES));
            let w = s.load(w);
            let q = clamp(s, s.round(s.mul(s.add(w, shift), inverse)), 0.0, guess.top);
            let error = s.sub(w, s.sub(s.mul(q, scale), shift));
            let mut lanes = [0.0; LANES];
            s.store(error, &mut lanes);
            for lane in &mut lanes {
                *lane = shrink(*lane, guess.inverse_beta);
            }
            let t = s.sub(w, s.load(&lanes));
            let live_q = s.mul(q, live);
            let terms = [live_q, s.mul(live_q, q), s.mul(t, live), s.mul(live_q, t), s.mul(s.mul(error, live), error)];
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum = s.add(*sum, term);
            }
        }
        let mut totals = [0.0; 5];
        for (total, sum) in totals.iter_mut().zip(sums) {
            let mut lanes = [0.0; LANES];
            s.store(sum, &mut lanes);
            for lane in lanes {
                *total += f64::from(lane);
            }
        }
        let [q, qq, t, qt, error] = totals;
        Sums { q, qq, t, qt, error }
    }

    /// Scale and shift with the least Σ (scale · q − shift − t)².
    #[inline(always)]
    fn fit(&self, len: usize) -> (f32, f32) {
        let [q, qq, t, qt] = [self.q, self.qq, self.t, self.qt].map(|sum| sum / len as f64);
        let scale = (qt - q * t) / (qq - q * q);
        (scale as f32, (scale * q - t) as f32)
    }
}

/// 1 for each of `len` lanes, 0 for the others.
#[inline(always)]
fn live(len: usize) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = if i < len { 1.0 } else { 0.0 };
    }
    lanes
}

/// Errors below this are shrunk to nothing with any β from [`BETA`] on:
/// |x|^1.3 < 1 / β.
const NOTHING: f32 = 0.125;

/// sign(x) · max(|x| − |x|^(p−1) / β, 0) for p = 0.7.
#[inline(always)]
fn shrink(x: f32, inverse_beta: f32) -> f32 {
    let size = x.abs();
    let cut = size - power(if size > NOTHING { size } else { NOTHING }) * inverse_beta;
    (if cut > 0.0 { cut } else { 0.0 }).copysign(x)
}

/// x^−0.3 within a hundred-thousandth, which is enough for a search.
#[inline(always)]
fn power(x: f32) -> f32 {
    const ONE: i32 = 1.0f32.to_bits() as i32;
    // The bits of a float are nearly its logarithm.
    let log = x.to_bits() as i32 - ONE;
    let mut y = f32::from_bits((ONE - (log >> 2) - (log >> 5) - (log >> 6) - 0x3_0000) as u32);
    // Towards the root of x³ · y^10 = 1, by the series of (1 − r)^−0.1.
    let cube = x * x * x;
    for _ in 0..3 {
        let (y2, y4) = (y * y, y * y * (y * y));
        let r = 1.0 - cube * (y4 * y4 * y2);
        y += y * r * (0.1 + 0.055 * r);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_near_enough() {
        for i in 0..100_000 {
            let x = NOTHING * 1.0002f32.powi(i % 60_000);
            let error = power(x) / x.powf(-0.3) - 1.0;
            assert!(error.abs() < 1e-5, "{x}: {error}");
        }
    }

    #[test]
    fn small_errors_are_shrunk_to_nothing() {
        let inverse_beta = 1.0 / (BETA * KAPPA.powi(ROUNDS as i32)) as f32;
        for i in 0..=100 {
            let x = NOTHING * i as f32 / 100.0;
            assert!(x.powf(1.3) < inverse_beta && shrink(x, inverse_beta) == 0.0);
        }
        for x in [0.2f32, 0.5, 3.0, 40.0] {
            let expected = x - x.powf(-0.3) * inverse_beta;
            assert!((shrink(-x, inverse_beta) + expected).abs() < 1e-4, "{x}");
        }
    }
}
