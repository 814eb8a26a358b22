//! Plain Rust, for every processor; the definition that the others follow.

use super::{Kernel, LANES, Simd};
use half::{bf16, f16};
use std::array::from_fn;

/// No instruction set beyond the target's own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; LANES];

/// The value of an `e4m3fn` byte.
///
/// Exponent and mantissa go to their places in an f16, whose bias is 8 higher;
/// the product mends that, subnormal numbers included.
#[inline(always)]
pub(super) fn e4m3(byte: u8) -> f32 {
    let (sign, rest) = (u16::from(byte & 0x80) << 8, u16::from(byte & 0x7f) << 7);
    f16::from_bits(sign | rest).to_f32() * 256.0
}

/// The value of an `e5m2` byte: the upper half of an f16.
#[inline(always)]
pub(super) fn e5m2(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
}

impl Simd for Portable {
    type V = V;
    type Words = [u16; LANES];
    const SUMS: usize = 2;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> V {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &V) -> V {
        *from
    }

    #[inline(always)]
    fn store(self, v: V, to: &mut V) {
        *to = v;
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        v.iter().sum()
    }

    #[inline(always)]
    fn round_bf16(self, v: V) -> V {
        v.map(|x| bf16::from_f32(x).to_f32())
    }

    #[inline(always)]
    fn round_f16(self, v: V) -> V {
        v.map(|x| f16::from_f32(x).to_f32())
    }

    #[inline(always)]
    fn store_bf16(self, v: V, to: &mut [bf16; LANES]) {
        *to = v.map(bf16::from_f32);
    }

    #[inline(always)]
    fn store_f16(self, v: V, to: &mut [f16; LANES]) {
        *to = v.map(f16::from_f32);
    }

    #[inline(always)]
    fn look_up_nibbles(self, table: V, bytes: &[u8; LANES / 2]) -> V {
        from_fn(|i| table[usize::from(bytes[i / 2] >> (4 - 4 * (i % 2)) & 15)])
    }

    #[inline(always)]
    fn look_up_field(self, table: V, bytes: &[u8; LANES], shift: u32) -> V {
        bytes.map(|byte| table[usize::from(byte >> shift & 15)])
    }

    #[inline(always)]
    fn words(self, words: &[u16; LANES]) -> [u16; LANES] {
        *words
    }

    #[inline(always)]
    fn look_up_nibbles_as_words(self, table: [u16; LANES], bytes: &[u8; LANES], to: &mut [u16; 2 * LANES]) {
        *to = from_fn(|i| table[usize::from(bytes[i / 2] >> (4 - 4 * (i % 2)) & 15)]);
    }

    #[inline(always)]
    fn look_up_field_as_words(
        self,
        table: [u16; LANES],
        bytes: &[u8; 2 * LANES],
        shift: u32,
        to: &mut [u16; 2 * LANES],
    ) {
        *to = bytes.map(|byte| table[usize::from(byte >> shift & 15)]);
    }

    #[inline(always)]
    fn widen_i8(self, bytes: &[u8; LANES]) -> V {
        bytes.map(|byte| f32::from(byte as i8))
    }

    #[inline(always)]
    fn decode_e4m3(self, bytes: &[u8; LANES]) -> V {
        bytes.map(e4m3)
    }

    #[inline(always)]
    fn decode_e5m2(self, bytes: &[u8; LANES]) -> V {
        bytes.map(e5m2)
    }
}
