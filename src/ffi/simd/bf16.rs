//! Products of bf16 with sums in f32, where the processor has them.
//!
//! Kernels over [`DotBf16`] read weights and activations as bf16, which a
//! weight of that dtype is exactly. Subnormal bf16 (below 1.2e-38) count as
//! zero.

#[cfg(target_arch = "x86_64")]
use super::Avx512;
use super::{LANES, Simd, wide_but_not_intel};
use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Which code of two in a byte is the even element's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum First {
    High,
    Low,
}

/// An instruction set with products of bf16, proven to be there.
pub(crate) trait DotBf16: Copy + Send + Sync + 'static {
    /// Its f32.
    type S: Simd;
    /// Thirty-two bf16.
    type P: Copy;
    /// A bf16 for each number of seven bits.
    type Table: Copy;

    fn simd(self) -> Self::S;
    fn load(self, from: &[bf16; 2 * LANES]) -> Self::P;
    fn store(self, p: Self::P, to: &mut [bf16; 2 * LANES]);
    /// The same two numbers sixteen times.
    fn splat(self, pair: [bf16; 2]) -> Self::P;
    /// `c[i] + a[2 i] · b[2 i] + a[2 i + 1] · b[2 i + 1]`.
    fn dot(self, a: Self::P, b: Self::P, c: <Self::S as Simd>::V) -> <Self::S as Simd>::V;
    /// The nearest bf16 of the first sixteen and the others.
    fn pack(self, v: [<Self::S as Simd>::V; 2]) -> Self::P;
    /// The table for [`look_up_nibbles`](Self::look_up_nibbles) and
    /// [`look_up_field`](Self::look_up_field): the nearest bf16 of sixteen values.
    fn table(self, v: <Self::S as Simd>::V) -> Self::P;
    /// The elements that 32 bytes of two codes each mean, element
    /// `4 (i % 16) + 2 k + i / 16` in place `i` of answer `k`.
    fn look_up_nibbles(self, table: Self::P, bytes: &[u8; 2 * LANES], first: First) -> [Self::P; 2];
    /// `table[(b >> shift) & 15]` for each of 32 bytes.
    fn look_up_field(self, table: Self::P, bytes: &[u8; 2 * LANES], shift: u32) -> Self::P;
    /// The table for [`look_up_floats`](Self::look_up_floats) and
    /// [`look_up_integers`](Self::look_up_integers): the nearest bf16 of 128 values, which are not negative.
    fn table_of_128(self, values: [<Self::S as Simd>::V; 8]) -> Self::Table;
    /// `±table[b & 127]` for each of 64 bytes, of which the upper bit is the sign: that of byte
    /// `16 (i / 8) + 8 k + i % 8` in place `i` of answer `k`.
    fn look_up_floats(self, table: Self::Table, bytes: &[u8; 4 * LANES]) -> [Self::P; 2];
    /// The same of signed integers: `±table[|b| & 127]`, and 0 for 0.
    fn look_up_integers(self, table: Self::Table, bytes: &[u8; 4 * LANES]) -> [Self::P; 2];
    /// Pairs `a[i], b[i]`: place `j` of answer `k` holds that of
    /// `i = 8 (j / 4) + 4 k + j % 4`.
    fn interleave(self, a: Self::P, b: Self::P) -> [Self::P; 2];
    /// The elements at these places of the two, the second one's from 32 on.
    fn shuffle(self, from: [Self::P; 2], places: &[u16; 2 * LANES]) -> Self::P;
    /// Sixteen rows of sixteen values as columns.
    fn transpose(self, rows: &[[f32; LANES]; LANES]) -> [<Self::S as Simd>::V; LANES];
    /// The same of pairs of bf16.
    fn transpose_pairs(self, rows: &[Self::P; LANES]) -> [Self::P; LANES];
}

/// A computation that is compiled for such an instruction set; see
/// [`Kernel`](super::Kernel).
pub(crate) trait Bf16Kernel {
    fn run<D: DotBf16>(self, d: D);
}

/// Whether this processor multiplies bf16.
pub(crate) fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Avx512Bf16::detect().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether it does so faster than f32. Intel's don't, which have AMX for that:
/// a core of a Xeon with AMX does 41 products of bf16 in a nanosecond, and 85 of
/// f32.
pub(crate) fn multiplies_bf16_faster() -> bool {
    multiplies_bf16() && wide_but_not_intel()
}

/// Runs a kernel where [`multiplies_bf16`]; nothing elsewhere.
pub(crate) fn dispatch_bf16<K: Bf16Kernel>(_kernel: K) {
    #[cfg(target_arch = "x86_64")]
    if let Some(d) = Avx512Bf16::detect() {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,f16c,fma")]
        fn run<K: Bf16Kernel>(d: Avx512Bf16, kernel: K) {
            kernel.run(d);
        }
        // SAFETY: `detect` has found the instructions.
        unsafe { run(d, _kernel) }
    }
}

/// AVX-512 with BF16 and VBMI: Intel's since Sapphire Rapids, AMD's since Zen 4.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Avx512Bf16(Avx512);

#[cfg(target_arch = "x86_64")]
impl Avx512Bf16 {
    fn detect() -> Option<Self> {
        let there = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vbmi");
        Avx512::detect().filter(|_| there).map(Avx512Bf16)
    }
}

/// The lower bytes of 128 bf16, and the upper ones.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Halves {
    low: [__m512i; 2],
    high: [__m512i; 2],
}

/// 64 places of bytes, two apart.
#[cfg(target_arch = "x86_64")]
const fn every_other(first: u8) -> [u8; 64] {
    let (mut places, mut i) = ([0; 64], 0);
    while i < 64 {
        places[i] = 2 * i as u8 + first;
        i += 1;
    }
    places
}

/// The same bits as products read them.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn bh(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of any value.
    unsafe { std::mem::transmute(bits) }
}

// SAFETY, for every block below: an `Avx512Bf16` is made by `detect` only, so
// the instructions exist. Loads go through references to arrays of the size
// that they touch, and don't ask for alignment; `bf16` is a transparent `u16`.
#[cfg(target_arch = "x86_64")]
impl DotBf16 for Avx512Bf16 {
    type S = Avx512;
    type P = __m512i;
    type Table = Halves;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn load(self, from: &[bf16; 2 * LANES]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, p: __m512i, to: &mut [bf16; 2 * LANES]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), p) }
    }

    #[inline(always)]
    fn splat(self, [a, b]: [bf16; 2]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(i32::from(a.to_bits()) | i32::from(b.to_bits()) << 16) }
    }

    #[inline(always)]
    fn dot(self, a: __m512i, b: __m512i, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_dpbf16_ps(c, bh(a), bh(b)) }
    }

    #[inline(always)]
    fn pack(self, [low, high]: [__m512; 2]) -> __m512i {
        // SAFETY: see above; both are 64 bytes of any value.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
    }

    #[inline(always)]
    fn table(self, v: __m512) -> __m512i {
        self.pack([v, v])
    }

    #[inline(always)]
    fn look_up_nibbles(self, table: __m512i, bytes: &[u8; 2 * LANES], first: First) -> [__m512i; 2] {
        // A word has four codes. A look-up ignores all but five bits, and the
        // fifth changes nothing, as the table is there twice.
        // SAFETY: see above.
        unsafe {
            let words = _mm512_broadcast_i64x4(_mm256_loadu_si256(bytes.as_ptr().cast()));
            let shifts = |lower, upper| _mm512_inserti64x4::<1>(_mm512_set1_epi16(lower), _mm256_set1_epi16(upper));
            let shifts = match first {
                First::High => [shifts(4, 0), shifts(12, 8)],
                First::Low => [shifts(0, 4), shifts(8, 12)],
            };
            shifts.map(|by| _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, by), table))
        }
    }

    #[inline(always)]
    fn look_up_field(self, table: __m512i, bytes: &[u8; 2 * LANES], shift: u32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes.as_ptr().cast()));
            let codes = _mm512_srlv_epi16(words, _mm512_set1_epi16((shift & 15) as i16));
            _mm512_permutexvar_epi16(codes, table)
        }
    }

    #[inline(always)]
    fn table_of_128(self, [a, b, c, d, e, f, g, h]: [__m512; 8]) -> Halves {
        const LOW: [u8; 64] = every_other(0);
        const HIGH: [u8; 64] = every_other(1);
        let [p, q, r, t] = [self.pack([a, b]), self.pack([c, d]), self.pack([e, f]), self.pack([g, h])];
        // SAFETY: see above.
        unsafe {
            let (low, high) = (_mm512_loadu_si512(LOW.as_ptr().cast()), _mm512_loadu_si512(HIGH.as_ptr().cast()));
            Halves {
                low: [_mm512_permutex2var_epi8(p, low, q), _mm512_permutex2var_epi8(r, low, t)],
                high: [_mm512_permutex2var_epi8(p, high, q), _mm512_permutex2var_epi8(r, high, t)],
            }
        }
    }

    #[inline(always)]
    fn look_up_floats(self, table: Halves, bytes: &[u8; 4 * LANES]) -> [__m512i; 2] {
        // SAFETY: see above.
        unsafe {
            let codes = _mm512_loadu_si512(bytes.as_ptr().cast());
            look_up(table, __mmask64::MAX, codes, codes)
        }
    }

    #[inline(always)]
    fn look_up_integers(self, table: Halves, bytes: &[u8; 4 * LANES]) -> [__m512i; 2] {
        // SAFETY: see above.
        unsafe {
            let codes = _mm512_loadu_si512(bytes.as_ptr().cast());
            look_up(table, _mm512_test_epi8_mask(codes, codes), _mm512_abs_epi8(codes), codes)
        }
    }

    #[inline(always)]
    fn interleave(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        // SAFETY: see above.
        unsafe { [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)] }
    }

    #[inline(always)]
    fn shuffle(self, [a, b]: [__m512i; 2], places: &[u16; 2 * LANES]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_permutex2var_epi16(a, _mm512_loadu_si512(places.as_ptr().cast()), b) }
    }

    #[inline(always)]
    fn transpose(self, rows: &[[f32; LANES]; LANES]) -> [__m512; LANES] {
        let mut values = [self.0.splat(0.0); LANES];
        for i in 0..LANES {
            values[i] = self.0.load(&rows[i]);
        }
        transpose(&values)
    }

    #[inline(always)]
    fn transpose_pairs(self, rows: &[__m512i; LANES]) -> [__m512i; LANES] {
        // SAFETY: all are 64 bytes of any value.
        unsafe { std::mem::transmute(transpose(&std::mem::transmute::<[__m512i; LANES], [__m512; LANES]>(*rows))) }
    }
}

/// Numbers of a table with signs, for the bytes of a mask and 0 for the others, of the first eight of each sixteen and
/// of their others. A look-up ignores the upper bit.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn look_up(Halves { low, high }: Halves, mask: __mmask64, codes: __m512i, signs: __m512i) -> [__m512i; 2] {
    // SAFETY: called where an `Avx512Bf16` is.
    unsafe {
        let low = _mm512_maskz_permutex2var_epi8(mask, low[0], codes, low[1]);
        let high = _mm512_maskz_permutex2var_epi8(mask, high[0], codes, high[1]);
        const FIRST_OR_BOTH_OTHERS: i32 = 0xf8;
        let high = _mm512_ternarylogic_epi32::<FIRST_OR_BOTH_OTHERS>(high, signs, _mm512_set1_epi8(i8::MIN));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
}

/// Sixteen rows as columns: within 128 bits first, then these.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose(rows: &[__m512; LANES]) -> [__m512; LANES] {
    // SAFETY: called where an `Avx512Bf16` is.
    unsafe {
        let zero = _mm512_setzero_ps();
        let (mut pairs, mut fours, mut columns) = ([zero; LANES], [zero; LANES], [zero; LANES]);
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        for i in 0..4 {
            for half in 0..2 {
                let a = _mm512_castps_pd(pairs[4 * i + half]);
                let b = _mm512_castps_pd(pairs[4 * i + half + 2]);
                fours[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        // Of each four, 128 bits `l` hold column `4 l + c` of four rows.
        const EVEN: i32 = 0x88;
        const ODD: i32 = 0xdd;
        for c in 0..4 {
            let (a, b) = ([fours[c], fours[4 + c]], [fours[8 + c], fours[12 + c]]);
            let even = [_mm512_shuffle_f32x4::<EVEN>(a[0], a[1]), _mm512_shuffle_f32x4::<EVEN>(b[0], b[1])];
            let odd = [_mm512_shuffle_f32x4::<ODD>(a[0], a[1]), _mm512_shuffle_f32x4::<ODD>(b[0], b[1])];
            columns[c] = _mm512_shuffle_f32x4::<EVEN>(even[0], even[1]);
            columns[4 + c] = _mm512_shuffle_f32x4::<EVEN>(odd[0], odd[1]);
            columns[8 + c] = _mm512_shuffle_f32x4::<ODD>(even[0], even[1]);
            columns[12 + c] = _mm512_shuffle_f32x4::<ODD>(odd[0], odd[1]);
        }
        columns
    }
}
