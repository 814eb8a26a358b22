//! NEON: four registers.

use super::{Kernel, LANES, Simd};
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::array::from_fn;

/// NEON, which every 64-bit ARM processor that libtorch runs on has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon(());

type V = [float32x4_t; 4];

impl Neon {
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Neon(()))
    }

    /// `table[code]` for 16 codes below 16.
    #[inline(always)]
    fn look_up(self, table: V, codes: uint8x16_t) -> V {
        // The table is 64 bytes, so byte k of entry c is byte 4c + k.
        // SAFETY: see below.
        unsafe {
            let table = uint8x16x4_t(
                vreinterpretq_u8_f32(table[0]),
                vreinterpretq_u8_f32(table[1]),
                vreinterpretq_u8_f32(table[2]),
                vreinterpretq_u8_f32(table[3]),
            );
            let first = vshlq_n_u8::<2>(codes);
            let [b0, b1, b2, b3] = [0, 1, 2, 3].map(|k| vqtbl4q_u8(table, vaddq_u8(first, vdupq_n_u8(k))));
            let (low, high) = (vzipq_u8(b0, b1), vzipq_u8(b2, b3));
            let [a, b] = [(low.0, high.0), (low.1, high.1)]
                .map(|(low, high)| vzipq_u16(vreinterpretq_u16_u8(low), vreinterpretq_u16_u8(high)));
            [a.0, a.1, b.0, b.1].map(|words| vreinterpretq_f32_u16(words))
        }
    }

    /// The words at two times 16 codes below 16.
    #[inline(always)]
    fn look_up_words(self, [low, high]: [uint8x16_t; 2], codes: [uint8x16_t; 2], to: &mut [u16; 2 * LANES]) {
        for (i, codes) in codes.into_iter().enumerate() {
            // SAFETY: see below.
            unsafe {
                let words = vzipq_u8(vqtbl1q_u8(low, codes), vqtbl1q_u8(high, codes));
                let to = to.as_mut_ptr().add(LANES * i);
                vst1q_u16(to, vreinterpretq_u16_u8(words.0));
                vst1q_u16(to.add(LANES / 2), vreinterpretq_u16_u8(words.1));
            }
        }
    }

    /// Sixteen bytes, sign-extended to four times four lanes.
    #[inline(always)]
    fn widen(self, bytes: &[u8; LANES]) -> [int32x4_t; 4] {
        // SAFETY: see below.
        unsafe {
            let bytes = vreinterpretq_s8_u8(vld1q_u8(bytes.as_ptr()));
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)]
        }
    }
}

// SAFETY, for every block in this file: a `Neon` is made by `detect` only, so
// the instructions exist. Loads and stores go through references to arrays and
// stay within them.
impl Simd for Neon {
    type V = V;
    /// The lower bytes of the words, and the upper ones.
    type Words = [uint8x16_t; 2];
    const SUMS: usize = 6;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn run<K: Kernel>(s: Neon, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: see above.
        unsafe { run(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> V {
        // SAFETY: see above.
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vld1q_f32(from.as_ptr().add(4 * i)) })
    }

    #[inline(always)]
    fn store(self, v: V, to: &mut [f32; LANES]) {
        for (i, lanes) in v.into_iter().enumerate() {
            // SAFETY: see above.
            unsafe { vst1q_f32(to.as_mut_ptr().add(4 * i), lanes) }
        }
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vsubq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vmulq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        // SAFETY: see above.
        from_fn(|i| unsafe { vfmaq_f32(c[i], a[i], b[i]) })
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: see above.
        unsafe { vaddvq_f32(vaddq_f32(vaddq_f32(v[0], v[1]), vaddq_f32(v[2], v[3]))) }
    }

    #[inline(always)]
    fn round_bf16(self, v: V) -> V {
        // Half a unit, less one where the kept part is even; carries do the rest.
        // SAFETY: see above.
        v.map(|lanes| unsafe {
            let bits = vreinterpretq_u32_f32(lanes);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let up = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
            vreinterpretq_f32_u32(vandq_u32(up, vdupq_n_u32(!0xffff)))
        })
    }

    #[inline(always)]
    fn round_f16(self, v: V) -> V {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        self.load(&lanes.map(|x| f16::from_f32(x).to_f32()))
    }

    #[inline(always)]
    fn store_bf16(self, v: V, to: &mut [bf16; LANES]) {
        let v = self.round_bf16(v);
        for (i, lanes) in v.into_iter().enumerate() {
            // SAFETY: see above; `bf16` is a transparent `u16`.
            unsafe { vst1_u16(to.as_mut_ptr().add(4 * i).cast(), vshrn_n_u32::<16>(vreinterpretq_u32_f32(lanes))) }
        }
    }

    #[inline(always)]
    fn store_f16(self, v: V, to: &mut [f16; LANES]) {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        *to = lanes.map(f16::from_f32);
    }

    #[inline(always)]
    fn look_up_nibbles(self, table: V, bytes: &[u8; LANES / 2]) -> V {
        // SAFETY: see above.
        let codes = unsafe {
            let bytes = vld1_u8(bytes.as_ptr());
            let pairs = vzip_u8(vshr_n_u8::<4>(bytes), vand_u8(bytes, vdup_n_u8(15)));
            vcombine_u8(pairs.0, pairs.1)
        };
        self.look_up(table, codes)
    }

    #[inline(always)]
    fn look_up_field(self, table: V, bytes: &[u8; LANES], shift: u32) -> V {
        // SAFETY: see above.
        let codes = unsafe {
            let shifted = vshlq_u8(vld1q_u8(bytes.as_ptr()), vdupq_n_s8(-(shift as i8)));
            vandq_u8(shifted, vdupq_n_u8(15))
        };
        self.look_up(table, codes)
    }

    #[inline(always)]
    fn words(self, words: &[u16; LANES]) -> [uint8x16_t; 2] {
        let bytes = [words.map(|word| word as u8), words.map(|word| (word >> 8) as u8)];
        // SAFETY: see above.
        bytes.map(|bytes| unsafe { vld1q_u8(bytes.as_ptr()) })
    }

    #[inline(always)]
    fn look_up_nibbles_as_words(self, table: [uint8x16_t; 2], bytes: &[u8; LANES], to: &mut [u16; 2 * LANES]) {
        // SAFETY: see above.
        unsafe {
            let bytes = vld1q_u8(bytes.as_ptr());
            let pairs = vzipq_u8(vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15)));
            self.look_up_words(table, [pairs.0, pairs.1], to);
        }
    }

    #[inline(always)]
    fn look_up_field_as_words(
        self,
        table: [uint8x16_t; 2],
        bytes: &[u8; 2 * LANES],
        shift: u32,
        to: &mut [u16; 2 * LANES],
    ) {
        // SAFETY: see above.
        let codes = [0, LANES].map(|start| unsafe {
            let shifted = vshlq_u8(vld1q_u8(bytes.as_ptr().add(start)), vdupq_n_s8(-(shift as i8)));
            vandq_u8(shifted, vdupq_n_u8(15))
        });
        self.look_up_words(table, codes, to);
    }

    #[inline(always)]
    fn widen_i8(self, bytes: &[u8; LANES]) -> V {
        // SAFETY: see above.
        self.widen(bytes).map(|lanes| unsafe { vcvtq_f32_s32(lanes) })
    }

    #[inline(always)]
    fn decode_e4m3(self, bytes: &[u8; LANES]) -> V {
        // Exponent and mantissa at their places in an f32, whose bias is 120 higher.
        // SAFETY: see above.
        self.widen(bytes).map(|lanes| unsafe {
            let magnitude = vandq_s32(vshlq_n_s32::<20>(lanes), vdupq_n_s32(0x07f0_0000));
            let scaled = vmulq_n_f32(vreinterpretq_f32_s32(magnitude), f32::from_bits((127 + 120) << 23));
            let sign = vandq_s32(lanes, vdupq_n_s32(i32::MIN));
            vreinterpretq_f32_s32(vorrq_s32(vreinterpretq_s32_f32(scaled), sign))
        })
    }

    #[inline(always)]
    fn decode_e5m2(self, bytes: &[u8; LANES]) -> V {
        self.load(&bytes.map(super::portable::e5m2))
    }
}
