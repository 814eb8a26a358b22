//! What packing a weight needs of an instruction set, beyond unpacking it.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::LANES;
use half::{bf16, f16};

/// Arithmetic on sixteen f32 in a `V`. Every method gives the same bits on
/// every instruction set, for numbers that are not NaN.
pub(crate) trait Packing<V>: Copy {
    fn load_bf16(self, from: &[bf16; LANES]) -> V;
    fn load_f16(self, from: &[f16; LANES]) -> V;

    fn add(self, a: V, b: V) -> V;
    fn div(self, a: V, b: V) -> V;
    fn abs(self, v: V) -> V;
    /// `a` where it is less than `b`, else `b`: of two zeros the second.
    fn min(self, a: V, b: V) -> V;
    /// `a` where it is greater than `b`, else `b`.
    fn max(self, a: V, b: V) -> V;
    /// The nearest integers, ties to even.
    fn round(self, v: V) -> V;
    /// The nearest integers, ties to even, as bytes: from -128 to 255.
    fn to_bytes(self, v: V) -> [u8; LANES];
    /// How many of the first fifteen `bounds`, which rise, each lane exceeds.
    fn count_below(self, v: V, bounds: &[f32; LANES]) -> [u8; LANES];
}
