//! AVX-512: one register.

use super::super::{Avx512, LANES};
use super::Packing;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// The low bytes of sixteen integers.
#[inline(always)]
fn bytes(integers: __m512i) -> [u8; LANES] {
    let mut bytes = [0; LANES];
    // SAFETY: see below.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(integers)) };
    bytes
}

// SAFETY, for every block in this file: an `Avx512` is made by its `detect`
// only, so the instructions exist. Loads and stores go through references to
// arrays of the size that they touch, and don't ask for alignment.
impl Packing<__m512> for Avx512 {
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> __m512 {
        // SAFETY: see above; `bf16` is a transparent `u16`.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> __m512 {
        // SAFETY: see above; `f16` is a transparent `u16`.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn abs(self, v: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_abs_ps(v) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }

    #[inline(always)]
    fn to_bytes(self, v: __m512) -> [u8; LANES] {
        // SAFETY: see above.
        bytes(unsafe { _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) })
    }

    #[inline(always)]
    fn count_below(self, v: __m512, bounds: &[f32; LANES]) -> [u8; LANES] {
        // A binary search in each lane.
        // SAFETY: see above.
        bytes(unsafe {
            let bounds = _mm512_loadu_ps(bounds.as_ptr());
            let mut count = _mm512_setzero_si512();
            for step in [8, 4, 2, 1] {
                let next = _mm512_add_epi32(count, _mm512_set1_epi32(step - 1));
                let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(v, _mm512_permutexvar_ps(next, bounds));
                count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(step));
            }
            count
        })
    }
}
