//! Dropout: which inputs are kept, and keeping them.
//!
//! On the CPU the mask is drawn from libtorch's own generator by the numbers
//! that `torch.nn.functional.dropout` would draw, so that a seeded step equals
//! PEFT's; but 624 of them at a time, where libtorch draws one by one. Each
//! element takes 64 bits of the Mersenne Twister (Matsumoto and Nishimura,
//! doi:10.1145/272991.272995), and is kept if their lower 53, as a fraction,
//! are below the share to keep.

use crate::error::Result;
use crate::ffi::bytes::{read, write};
use crate::ffi::compute::for_each_chunk;
use crate::ffi::generator::{Engine, WORDS, with_cpu_engine};
use crate::ffi::simd::{Kernel, Simd, dispatch};
use crate::quant::Float;
use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

/// Elements that a thread takes at a time.
const PART: usize = 1 << 15;

/// One byte per element of x: 1 where it is kept, with probability 1 - p.
pub(super) fn draw_mask(x: &Tensor, p: f64) -> Result<Tensor> {
    let mut mask = Tensor::f_empty(x.size(), (Kind::Uint8, x.device()))?;
    if x.device() != Device::Cpu {
        return Ok(mask.f_bernoulli_float_(1.0 - p)?);
    }
    if mask.numel() > 0 {
        write::<u8, _>(&mut mask, |keep| with_cpu_engine(|engine| dispatch(Draw { engine, keep, share: 1.0 - p })))??;
    }
    Ok(mask)
}

/// x where the mask is 1, else 0.
pub(super) fn keep(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let x = x.f_contiguous()?;
    match (x.device(), x.f_kind()?) {
        (Device::Cpu, Kind::Float) => keep_as::<f32>(&x, mask),
        (Device::Cpu, Kind::BFloat16) => keep_as::<bf16>(&x, mask),
        (Device::Cpu, Kind::Half) => keep_as::<f16>(&x, mask),
        _ => Ok(x.f_mul(mask)?),
    }
}

fn keep_as<T: Float>(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mut kept = Tensor::f_empty(x.size(), (T::KIND, Device::Cpu))?;
    each(x, mask, &mut kept, |x: T, keep, to: &mut T| *to = if keep { x } else { T::from_f32(0.0) })?;
    Ok(kept)
}

/// Adds t, where the mask is 1, to dx, which the caller made and has not shared.
pub(super) fn add_kept(dx: &mut Tensor, t: &Tensor, mask: &Tensor) -> Result<()> {
    match (dx.device(), dx.f_kind()?) {
        (Device::Cpu, Kind::Float) => add_kept_as::<f32>(dx, t, mask),
        (Device::Cpu, Kind::BFloat16) => add_kept_as::<bf16>(dx, t, mask),
        (Device::Cpu, Kind::Half) => add_kept_as::<f16>(dx, t, mask),
        _ => {
            let _ = dx.f_add_(&t.f_mul(mask)?)?;
            Ok(())
        }
    }
}

fn add_kept_as<T: Float>(dx: &mut Tensor, t: &Tensor, mask: &Tensor) -> Result<()> {
    each(t, mask, dx, |t: T, keep, dx: &mut T| {
        let kept = if keep { t.to_f32() } else { 0.0 };
        *dx = T::from_f32(dx.to_f32() + kept);
    })
}

/// Calls `f` with each element of `from`, whether it is kept, and the one of `to`.
fn each<T: Float, F>(from: &Tensor, mask: &Tensor, to: &mut Tensor, f: F) -> Result<()>
where
    F: Fn(T, bool, &mut T) + Copy + Sync,
{
    read(from, |from: &[T]| {
        read(mask, |mask: &[u8]| {
            write(to, |to: &mut [T]| {
                for_each_chunk(to, PART, |i, to| {
                    let part = i * PART..i * PART + to.len();
                    dispatch(Each { from: &from[part.clone()], mask: &mask[part], to, f });
                })
            })
        })
    })???
}

struct Each<'a, T, F> {
    from: &'a [T],
    mask: &'a [u8],
    to: &'a mut [T],
    f: F,
}

impl<T: Float, F: Fn(T, bool, &mut T)> Kernel for Each<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((to, from), keep) in self.to.iter_mut().zip(self.from).zip(self.mask) {
            (self.f)(*from, *keep != 0, to);
        }
    }
}

struct Draw<'a> {
    engine: Engine<'a>,
    keep: &'a mut [u8],
    share: f64,
}

impl Kernel for Draw<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        /// Elements at a time, whose numbers fit in the first-level cache.
        const PART: usize = 1024;
        const BITS: u32 = 53;
        let Draw { mut engine, keep, share } = self;
        // A fraction is below the share if its numerator is below this one.
        let limit = (share * (1u64 << BITS) as f64).ceil() as u64;
        let mut numbers = [0; 2 * PART];
        for keep in keep.chunks_mut(PART) {
            let numbers = &mut numbers[..2 * keep.len()];
            fill(&mut engine, numbers);
            for (keep, [high, low]) in keep.iter_mut().zip(numbers.as_chunks::<2>().0) {
                let bits = u64::from(*high) << 32 | u64::from(*low);
                *keep = u8::from(bits & ((1 << BITS) - 1) < limit);
            }
        }
    }
}

/// The next numbers.
#[inline(always)]
fn fill(engine: &mut Engine<'_>, mut numbers: &mut [u32]) {
    while !numbers.is_empty() {
        if *engine.used >= WORDS {
            twist(engine.words);
            *engine.used = 0;
        }
        let words = &engine.words[*engine.used..];
        let (now, rest) = numbers.split_at_mut(words.len().min(numbers.len()));
        for (number, word) in now.iter_mut().zip(words) {
            let mut y = *word;
            y ^= y >> 11;
            y ^= y << 7 & 0x9d2c_5680;
            y ^= y << 15 & 0xefc6_0000;
            *number = y ^ y >> 18;
        }
        *engine.used += now.len();
        numbers = rest;
    }
}

/// The next 624 words. Each is made of three others, the farthest of which is
/// 227 words back where it is new: so many are made at a time.
#[inline(always)]
fn twist(words: &mut [u32; WORDS]) {
    const STEP: usize = WORDS - 397;
    let old = *words;
    let (first, rest) = words.split_at_mut(STEP);
    let (second, third) = rest.split_at_mut(STEP);
    mix(first, &old[397..], &old);
    mix(second, first, &old[STEP..]);
    let last = third.len() - 1;
    mix(&mut third[..last], second, &old[2 * STEP..]);
    mix(&mut third[last..], &second[last..], &[old[WORDS - 1], first[0]]);
}

/// Each of `new` from the one of `far` and from two neighbours of `near`.
#[inline(always)]
fn mix(new: &mut [u32], far: &[u32], near: &[u32]) {
    for ((new, far), pair) in new.iter_mut().zip(far).zip(near.windows(2)) {
        let y = pair[0] & 0x8000_0000 | pair[1] & 0x7fff_ffff;
        *new = far ^ y >> 1 ^ (0u32.wrapping_sub(pair[1] & 1) & 0x9908_b0df);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_elements_are_kept() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
            let x = Tensor::randn([70, 999], (Kind::Float, Device::Cpu)).to_kind(kind);
            let mask = draw_mask(&x, 0.3).unwrap();
            assert_eq!(keep(&x, &mask).unwrap(), &x * &mask);
            let mut sum = x.ones_like();
            add_kept(&mut sum, &x, &mask).unwrap();
            assert_eq!(sum, x.ones_like() + &x * &mask);
        }
    }
}
