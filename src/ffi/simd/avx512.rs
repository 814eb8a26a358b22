//! AVX-512: one register.

use super::{Kernel, LANES, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// AVX-512 with the extensions that every processor since Skylake-X has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("fma");
        found.then_some(Avx512(()))
    }
}

// SAFETY, for every block below: an `Avx512` is made by `detect` only, so the
// instructions exist. Loads and stores go through references to arrays of the
// size that they touch, and don't ask for alignment.
impl Simd for Avx512 {
    type V = __m512;
    /// Twice over, for look-ups by five bits.
    type Words = __m512i;
    const SUMS: usize = 16;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")]
        fn run<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: see above.
        unsafe { run(self, kernel) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: see above; no address is wrong.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(v) }
    }

    #[inline(always)]
    fn round_bf16(self, v: __m512) -> __m512 {
        // Half a unit, less one where the kept part is even; carries do the rest.
        // SAFETY: see above.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
            _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(!0xffff)))
        }
    }

    #[inline(always)]
    fn round_f16(self, v: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v)) }
    }

    #[inline(always)]
    fn store_bf16(self, v: __m512, to: &mut [bf16; LANES]) {
        let rounded = self.round_bf16(v);
        // SAFETY: see above; `bf16` is a transparent `u16`.
        unsafe {
            let high = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_castps_si512(rounded)));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), high);
        }
    }

    #[inline(always)]
    fn store_f16(self, v: __m512, to: &mut [f16; LANES]) {
        // SAFETY: see above; `f16` is a transparent `u16`.
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), half);
        }
    }

    #[inline(always)]
    fn look_up_nibbles(self, table: __m512, bytes: &[u8; LANES / 2]) -> __m512 {
        let (low, high) = (&bytes[..4], &bytes[4..]);
        let word = |b: &[u8]| i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        // Each lane shifts its nibble to the bottom; the look-up ignores the
        // bits above it.
        // SAFETY: see above.
        unsafe {
            let words = _mm512_mask_set1_epi32(_mm512_set1_epi32(word(low)), 0xff00, word(high));
            let shifts = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
            _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), table)
        }
    }

    #[inline(always)]
    fn look_up_field(self, table: __m512, bytes: &[u8; LANES], shift: u32) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            let codes = _mm512_srlv_epi32(lanes, _mm512_set1_epi32((shift & 31) as i32));
            _mm512_permutexvar_ps(codes, table)
        }
    }

    #[inline(always)]
    fn words(self, words: &[u16; LANES]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(words.as_ptr().cast())) }
    }

    #[inline(always)]
    fn look_up_nibbles_as_words(self, table: __m512i, bytes: &[u8; LANES], to: &mut [u16; 2 * LANES]) {
        // The upper word of a lane holds the whole byte: the look-up ignores all
        // but five bits, and the fifth changes nothing.
        // SAFETY: see above.
        unsafe {
            let lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            let codes = _mm512_or_si512(_mm512_srli_epi32::<4>(lanes), _mm512_slli_epi32::<16>(lanes));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_permutexvar_epi16(codes, table));
        }
    }

    #[inline(always)]
    fn look_up_field_as_words(self, table: __m512i, bytes: &[u8; 2 * LANES], shift: u32, to: &mut [u16; 2 * LANES]) {
        // SAFETY: see above.
        unsafe {
            let words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes.as_ptr().cast()));
            let codes = _mm512_srlv_epi16(words, _mm512_set1_epi16((shift & 15) as i16));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_permutexvar_epi16(codes, table));
        }
    }

    #[inline(always)]
    fn store_bf16_pair(self, v: [__m512; 2], to: &mut [bf16; 2 * LANES]) {
        const ODD: [i16; 2 * LANES] = {
            let mut odd = [1; 2 * LANES];
            let mut i = 1;
            while i < odd.len() {
                odd[i] = odd[i - 1] + 2;
                i += 1;
            }
            odd
        };
        // The upper halves of both at once.
        // SAFETY: see above; `bf16` is a transparent `u16`.
        unsafe {
            let a = _mm512_castps_si512(self.round_bf16(v[0]));
            let b = _mm512_castps_si512(self.round_bf16(v[1]));
            let places = _mm512_loadu_si512(ODD.as_ptr().cast());
            _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_permutex2var_epi16(a, places, b));
        }
    }

    #[inline(always)]
    fn widen_i8(self, bytes: &[u8; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn decode_e4m3(self, bytes: &[u8; LANES]) -> __m512 {
        // See `portable::e4m3`.
        // SAFETY: see above.
        unsafe {
            let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(bytes.as_ptr().cast())));
            // The sign is in the two upper bits.
            let half = _mm256_and_si256(words, _mm256_set1_epi16(!0x4000));
            _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0))
        }
    }

    #[inline(always)]
    fn decode_e4m3_over_256(self, bytes: &[[u8; LANES]; 2]) -> [__m512; 2] {
        // SAFETY: see above.
        unsafe {
            let words = _mm512_slli_epi16::<7>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(bytes.as_ptr().cast())));
            let halves = _mm512_and_si512(words, _mm512_set1_epi16(!0x4000));
            [_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves))]
        }
    }

    #[inline(always)]
    fn decode_e5m2(self, bytes: &[u8; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes.as_ptr().cast()));
            _mm512_cvtph_ps(_mm256_slli_epi16::<8>(words))
        }
    }
}
