//! Products of bytes with sums in integers, where the processor has them
//! (AVX512-VNNI: Intel's since Cascade Lake, AMD's since Zen 4).

#[cfg(target_arch = "x86_64")]
use super::Avx512;
use super::{BYTES, LANES, Simd};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// An instruction set with products of bytes, proven to be there.
pub(crate) trait DotI8: Copy + Send + Sync + 'static {
    /// Its f32.
    type S: Simd;
    /// Sixty-four bytes.
    type Bytes: Copy;
    /// Sixteen integers of 32 bits.
    type Sums: Copy;

    fn simd(self) -> Self::S;
    fn load(self, from: &[u8; BYTES]) -> Self::Bytes;
    fn store(self, bytes: Self::Bytes, to: &mut [u8; BYTES]);
    /// The same four bytes sixteen times.
    fn splat(self, bytes: [u8; 4]) -> Self::Bytes;
    fn zero(self) -> Self::Sums;
    fn load_sums(self, from: &[i32; LANES]) -> Self::Sums;
    fn store_sums(self, sums: Self::Sums, to: &mut [i32; LANES]);
    /// `c[i] + Σ u[4 i + k] · w[4 i + k]` over `k < 4`, with `u` unsigned and `w` signed.
    fn dot(self, u: Self::Bytes, w: Self::Bytes, c: Self::Sums) -> Self::Sums;
    fn add(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// `-128 · sums`.
    fn times_minus_128(self, sums: Self::Sums) -> Self::Sums;
    /// The high, middle and low bytes of `2²³` plus the nearest integers, ties to even, which are less than `2²³`
    /// or become it less one.
    fn split(self, v: <Self::S as Simd>::V) -> [[u8; LANES]; 3];
    /// The nearest f32.
    fn to_f32(self, sums: Self::Sums) -> <Self::S as Simd>::V;
    /// Four rows as columns of four bytes: place `4 i + k` of answer `j` holds that of row `k` and column
    /// `16 (i / 4) + 4 j + i % 4`.
    fn interleave(self, rows: [Self::Bytes; 4]) -> [Self::Bytes; 4];
}

/// A computation that is compiled for such an instruction set; see
/// [`Kernel`](super::Kernel).
pub(crate) trait I8Kernel {
    fn run<D: DotI8>(self, d: D);
}

/// Whether this processor multiplies bytes.
pub(crate) fn multiplies_i8() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Avx512Vnni::detect().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Runs a kernel where [`multiplies_i8`]; nothing elsewhere.
pub(crate) fn dispatch_i8<K: I8Kernel>(_kernel: K) {
    #[cfg(target_arch = "x86_64")]
    if let Some(d) = Avx512Vnni::detect() {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
        fn run<K: I8Kernel>(d: Avx512Vnni, kernel: K) {
            kernel.run(d);
        }
        // SAFETY: `detect` has found the instructions.
        unsafe { run(d, _kernel) }
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Avx512Vnni(Avx512);

#[cfg(target_arch = "x86_64")]
impl Avx512Vnni {
    fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| is_x86_feature_detected!("avx512vnni")).map(Avx512Vnni)
    }
}

// SAFETY, for every block below: an `Avx512Vnni` is made by `detect` only, so
// the instructions exist. Loads and stores go through references to arrays of
// the size that they touch, and don't ask for alignment.
#[cfg(target_arch = "x86_64")]
impl DotI8 for Avx512Vnni {
    type S = Avx512;
    type Bytes = __m512i;
    type Sums = __m512i;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn load(self, from: &[u8; BYTES]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, bytes: __m512i, to: &mut [u8; BYTES]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), bytes) }
    }

    #[inline(always)]
    fn splat(self, bytes: [u8; 4]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(i32::from_le_bytes(bytes)) }
    }

    #[inline(always)]
    fn zero(self) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn load_sums(self, from: &[i32; LANES]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_sums(self, sums: __m512i, to: &mut [i32; LANES]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), sums) }
    }

    #[inline(always)]
    fn dot(self, u: __m512i, w: __m512i, c: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(c, u, w) }
    }

    #[inline(always)]
    fn add(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn times_minus_128(self, sums: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<7>(sums)) }
    }

    #[inline(always)]
    fn split(self, v: __m512) -> [[u8; LANES]; 3] {
        let mut bytes = [[0; LANES]; 3];
        // SAFETY: see above.
        unsafe {
            let q = _mm512_min_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(0x7f_ffff));
            let q = _mm512_add_epi32(q, _mm512_set1_epi32(0x80_0000));
            let parts = [_mm512_srli_epi32::<16>(q), _mm512_srli_epi32::<8>(q), q];
            for (to, part) in bytes.iter_mut().zip(parts) {
                _mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(part));
            }
        }
        bytes
    }

    #[inline(always)]
    fn to_f32(self, sums: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }

    #[inline(always)]
    fn interleave(self, [a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
        // SAFETY: see above.
        unsafe {
            let (low, high) = (
                [_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)],
                [_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)],
            );
            [
                _mm512_unpacklo_epi16(low[0], low[1]),
                _mm512_unpackhi_epi16(low[0], low[1]),
                _mm512_unpacklo_epi16(high[0], high[1]),
                _mm512_unpackhi_epi16(high[0], high[1]),
            ]
        }
    }
}
