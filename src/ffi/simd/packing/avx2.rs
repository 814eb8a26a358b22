//! AVX2 with F16C: two registers.

use super::super::{Avx2, LANES};
use super::Packing;
use half::{bf16, f16};
use std::arch::x86_64::*;

type V = [__m256; 2];

/// The low bytes of sixteen integers from -128 to 255.
#[inline(always)]
fn bytes(low: __m256i, high: __m256i) -> [u8; LANES] {
    let mut bytes = [0; LANES];
    // SAFETY: see below.
    unsafe {
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
        let words = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
        let packed = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        _mm_storeu_si128(bytes.as_mut_ptr().cast(), packed);
    }
    bytes
}

// SAFETY, for every block in this file: an `Avx2` is made by its `detect` only,
// so the instructions exist. Loads and stores go through references to arrays
// and stay within them, and don't ask for alignment.
impl Packing<V> for Avx2 {
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> V {
        // SAFETY: see above; `bf16` is a transparent `u16`.
        unsafe {
            let [low, high] = [from.as_ptr(), from.as_ptr().add(8)];
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(low.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(high.cast()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> V {
        // SAFETY: see above; `f16` is a transparent `u16`.
        unsafe {
            let [low, high] = [from.as_ptr(), from.as_ptr().add(8)];
            [_mm256_cvtph_ps(_mm_loadu_si128(low.cast())), _mm256_cvtph_ps(_mm_loadu_si128(high.cast()))]
        }
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn abs(self, v: V) -> V {
        // SAFETY: see above.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1])]
        }
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn round(self, v: V) -> V {
        // SAFETY: see above.
        unsafe {
            [
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v[0]),
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v[1]),
            ]
        }
    }

    #[inline(always)]
    fn to_bytes(self, v: V) -> [u8; LANES] {
        let [low, high] = self.round(v);
        // SAFETY: see above.
        unsafe { bytes(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high)) }
    }

    #[inline(always)]
    fn count_below(self, v: V, bounds: &[f32; LANES]) -> [u8; LANES] {
        // SAFETY: see above.
        unsafe {
            let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for bound in &bounds[..LANES - 1] {
                let bound = _mm256_set1_ps(*bound);
                // A comparison that holds is -1.
                low = _mm256_sub_epi32(low, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(v[0], bound)));
                high = _mm256_sub_epi32(high, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(v[1], bound)));
            }
            bytes(low, high)
        }
    }
}
