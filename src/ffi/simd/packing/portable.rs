//! Plain Rust; the definition that the others follow.

use super::super::{LANES, Portable};
use super::Packing;
use half::{bf16, f16};
use std::array::from_fn;

type V = [f32; LANES];

impl Packing<V> for Portable {
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> V {
        from.map(bf16::to_f32)
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> V {
        from.map(f16::to_f32)
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn abs(self, v: V) -> V {
        v.map(f32::abs)
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn round(self, v: V) -> V {
        v.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn to_bytes(self, v: V) -> [u8; LANES] {
        v.map(|x| x.round_ties_even() as i32 as u8)
    }

    #[inline(always)]
    fn count_below(self, v: V, bounds: &[f32; LANES]) -> [u8; LANES] {
        v.map(|x| bounds[..LANES - 1].iter().map(|bound| u8::from(x > *bound)).sum())
    }
}
