//! NEON: four registers.

use super::super::{LANES, Neon, Simd};
use super::Packing;
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::array::from_fn;

type V = [float32x4_t; 4];

/// The low bytes of sixteen integers.
#[inline(always)]
fn bytes(v: [uint32x4_t; 4]) -> [u8; LANES] {
    let mut bytes = [0; LANES];
    // SAFETY: see below.
    unsafe {
        let low = vcombine_u16(vmovn_u32(v[0]), vmovn_u32(v[1]));
        let high = vcombine_u16(vmovn_u32(v[2]), vmovn_u32(v[3]));
        vst1q_u8(bytes.as_mut_ptr(), vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
    }
    bytes
}

// SAFETY, for every block in this file: a `Neon` is made by its `detect` only,
// so the instructions exist. Loads and stores go through references to arrays
// and stay within them.
impl Packing<V> for Neon {
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> V {
        // SAFETY: see above; `bf16` is a transparent `u16`.
        from_fn(|i| unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.as_ptr().add(4 * i).cast()))) })
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> V {
        self.load(&from.map(f16::to_f32))
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vaddq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vdivq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn abs(self, v: V) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vabsq_f32(v[i]) })
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        // The instruction for it has an order of its own for zeros.
        // SAFETY: see above.
        from_fn(|i| unsafe { vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]) })
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]) })
    }

    #[inline(always)]
    fn round(self, v: V) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vrndnq_f32(v[i]) })
    }

    #[inline(always)]
    fn to_bytes(self, v: V) -> [u8; LANES] {
        // SAFETY: see above.
        bytes(from_fn(|i| unsafe { vreinterpretq_u32_s32(vcvtnq_s32_f32(v[i])) }))
    }

    #[inline(always)]
    fn count_below(self, v: V, bounds: &[f32; LANES]) -> [u8; LANES] {
        // A comparison that holds is -1.
        // SAFETY: see above.
        bytes(from_fn(|i| unsafe {
            let mut count = vdupq_n_u32(0);
            for bound in &bounds[..LANES - 1] {
                count = vsubq_u32(count, vcgtq_f32(v[i], vdupq_n_f32(*bound)));
            }
            count
        }))
    }
}
