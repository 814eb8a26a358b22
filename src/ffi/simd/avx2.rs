//! AVX2 with FMA and F16C: two registers.

use super::{Kernel, LANES, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// The instructions that every x86-64 processor since Haswell has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

type V = [__m256; 2];

/// The same for both halves. A closure given to `map` would not be inlined for
/// certain, and then be compiled without the instruction set.
macro_rules! both {
    ($pair:expr, |$half:ident| $body:expr) => {{
        let [low, high] = $pair;
        let low = {
            let $half = low;
            $body
        };
        let $half = high;
        [low, $body]
    }};
}

impl Avx2 {
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("fma");
        found.then_some(Avx2(()))
    }

    /// `table[index & 15]`.
    #[inline(always)]
    fn look_up(self, [low, high]: V, index: __m256i) -> __m256 {
        // SAFETY: see below.
        unsafe {
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
            let (low, high) = (_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index));
            _mm256_blendv_ps(low, high, upper)
        }
    }

    /// The words at the lower four bits of each byte.
    #[inline(always)]
    fn look_up_words(self, [low, high]: [__m256i; 2], index: __m256i, to: &mut [u16; 2 * LANES]) {
        // SAFETY: see below.
        unsafe {
            let index = _mm256_and_si256(index, _mm256_set1_epi8(15));
            let (low, high) = (_mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index));
            let (a, b) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
            let to = to.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(to, _mm256_permute2x128_si256::<0x20>(a, b));
            _mm256_storeu_si256(to.add(1), _mm256_permute2x128_si256::<0x31>(a, b));
        }
    }

    /// The two halves of 16 bytes.
    #[inline(always)]
    fn halves(self, bytes: &[u8; LANES]) -> [__m128i; 2] {
        // SAFETY: see below.
        unsafe { [_mm_loadl_epi64(bytes.as_ptr().cast()), _mm_loadl_epi64(bytes.as_ptr().add(8).cast())] }
    }

    /// `decode_e4m3`, over 256.
    #[inline(always)]
    fn e4m3_over_256(self, bytes: &[u8; LANES]) -> V {
        // See `portable::e4m3`.
        // SAFETY: see below.
        both!(self.halves(bytes), |half| unsafe {
            let words = _mm_cvtepu8_epi16(half);
            let sign = _mm_slli_epi16::<8>(_mm_and_si128(words, _mm_set1_epi16(0x80)));
            let rest = _mm_slli_epi16::<7>(_mm_and_si128(words, _mm_set1_epi16(0x7f)));
            _mm256_cvtph_ps(_mm_or_si128(sign, rest))
        })
    }
}

// SAFETY, for every block in this file: an `Avx2` is made by `detect` only, so
// the instructions exist. Loads and stores go through references to arrays and
// stay within them, and don't ask for alignment.
impl Simd for Avx2 {
    type V = V;
    /// The lower bytes of the words, and the upper ones, in each half.
    type Words = [__m256i; 2];
    const SUMS: usize = 6;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,f16c,fma")]
        fn run<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: see above.
        unsafe { run(self, kernel) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: every x86-64 processor has it, no address is wrong, and it touches nothing that can be seen.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(self, v: V, to: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: see above.
        unsafe {
            let eight = _mm256_add_ps(v[0], v[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn round_bf16(self, v: V) -> V {
        // See `Avx512::round_bf16`.
        // SAFETY: see above.
        both!(v, |half| unsafe {
            let bits = _mm256_castps_si256(half);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
            _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(!0xffff)))
        })
    }

    #[inline(always)]
    fn round_f16(self, v: V) -> V {
        // SAFETY: see above.
        both!(v, |half| unsafe { _mm256_cvtph_ps(_mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(half)) })
    }

    #[inline(always)]
    fn store_bf16(self, v: V, to: &mut [bf16; LANES]) {
        let [low, high] = self.round_bf16(v);
        // SAFETY: see above; `bf16` is a transparent `u16`.
        unsafe {
            let (low, high) = (_mm256_castps_si256(low), _mm256_castps_si256(high));
            let (low, high) = (_mm256_srli_epi32::<16>(low), _mm256_srli_epi32::<16>(high));
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), packed);
        }
    }

    #[inline(always)]
    fn store_f16(self, v: V, to: &mut [f16; LANES]) {
        // SAFETY: see above; `f16` is a transparent `u16`.
        unsafe {
            for (i, half) in v.into_iter().enumerate() {
                let half = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(half);
                _mm_storeu_si128(to.as_mut_ptr().add(8 * i).cast(), half);
            }
        }
    }

    #[inline(always)]
    fn look_up_nibbles(self, table: V, bytes: &[u8; LANES / 2]) -> V {
        let (low, high) = (&bytes[..4], &bytes[4..]);
        // Each lane shifts its nibble to the bottom.
        // SAFETY: see above.
        both!([low, high], |b| unsafe {
            let word = _mm256_set1_epi32(i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            let shifts = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
            self.look_up(table, _mm256_srlv_epi32(word, shifts))
        })
    }

    #[inline(always)]
    fn look_up_field(self, table: V, bytes: &[u8; LANES], shift: u32) -> V {
        // SAFETY: see above.
        both!(self.halves(bytes), |half| unsafe {
            let codes = _mm256_srl_epi32(_mm256_cvtepu8_epi32(half), _mm_cvtsi32_si128(shift as i32));
            self.look_up(table, codes)
        })
    }

    #[inline(always)]
    fn words(self, words: &[u16; LANES]) -> [__m256i; 2] {
        let bytes = [words.map(|word| word as u8), words.map(|word| (word >> 8) as u8)];
        // SAFETY: see above.
        bytes.map(|bytes| unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())) })
    }

    #[inline(always)]
    fn look_up_nibbles_as_words(self, table: [__m256i; 2], bytes: &[u8; LANES], to: &mut [u16; 2 * LANES]) {
        // SAFETY: see above.
        unsafe {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes.as_ptr().cast()));
            // The even element, from the high half, comes first.
            let codes = _mm256_or_si256(_mm256_srli_epi16::<4>(words), _mm256_slli_epi16::<8>(words));
            self.look_up_words(table, codes, to);
        }
    }

    #[inline(always)]
    fn look_up_field_as_words(
        self,
        table: [__m256i; 2],
        bytes: &[u8; 2 * LANES],
        shift: u32,
        to: &mut [u16; 2 * LANES],
    ) {
        // SAFETY: see above.
        unsafe {
            let bytes = _mm256_loadu_si256(bytes.as_ptr().cast());
            let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
            // Without the bits of the byte above.
            let own = _mm256_set1_epi8((0xff >> (shift & 7)) as i8);
            self.look_up_words(table, _mm256_and_si256(shifted, own), to);
        }
    }

    #[inline(always)]
    fn widen_i8(self, bytes: &[u8; LANES]) -> V {
        // SAFETY: see above.
        both!(self.halves(bytes), |half| unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half)) })
    }

    #[inline(always)]
    fn decode_e4m3(self, bytes: &[u8; LANES]) -> V {
        let times = self.splat(256.0);
        self.mul(self.e4m3_over_256(bytes), times)
    }

    #[inline(always)]
    fn decode_e4m3_over_256(self, bytes: &[[u8; LANES]; 2]) -> [V; 2] {
        [self.e4m3_over_256(&bytes[0]), self.e4m3_over_256(&bytes[1])]
    }

    #[inline(always)]
    fn decode_e5m2(self, bytes: &[u8; LANES]) -> V {
        // SAFETY: see above.
        both!(self.halves(bytes), |half| unsafe { _mm256_cvtph_ps(_mm_slli_epi16::<8>(_mm_cvtepu8_epi16(half))) })
    }
}
