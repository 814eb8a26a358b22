//! Sixteen f32 lanes in whatever registers the processor has.
//!
//! Kernels are written once over [`Simd`] and compiled for each instruction
//! set; [`dispatch`] picks one as the program runs. A value of a type that
//! implements [`Simd`] is the proof that its instructions exist: only the
//! detection makes one. That is what keeps the methods safe to call.
//!
//! Every method but [`Simd::mul_add`] and [`Simd::sum`] gives the same bits on
//! every instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

/// Lanes of a [`Simd::V`].
pub(crate) const LANES: usize = 16;

/// An instruction set, proven to be there.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type V: Copy;

    /// Whether there are registers for sixteen sums and what they need.
    const WIDE: bool;

    /// Runs a kernel compiled for this instruction set.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, value: f32) -> Self::V;
    fn load(self, from: &[f32; LANES]) -> Self::V;
    fn store(self, v: Self::V, to: &mut [f32; LANES]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the processor can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of the lanes, in an order of this instruction set's own.
    fn sum(self, v: Self::V) -> f32;

    /// The nearest bf16, ties to even; no NaN.
    fn round_bf16(self, v: Self::V) -> Self::V;
    /// The nearest f16, ties to even.
    fn round_f16(self, v: Self::V) -> Self::V;
    /// Stores the nearest bf16.
    fn store_bf16(self, v: Self::V, to: &mut [half::bf16; LANES]);
    /// Stores the nearest f16.
    fn store_f16(self, v: Self::V, to: &mut [half::f16; LANES]);

    /// `table[b >> 4], table[b & 15]` for each of 8 bytes.
    fn look_up_nibbles(self, table: Self::V, bytes: &[u8; LANES / 2]) -> Self::V;
    /// `table[(b >> shift) & 15]` for each of 16 bytes.
    fn look_up_field(self, table: Self::V, bytes: &[u8; LANES], shift: u32) -> Self::V;
    /// Signed bytes.
    fn from_i8(self, bytes: &[u8; LANES]) -> Self::V;
    /// Bytes of the float with 4 exponent and 3 mantissa bits, finite values
    /// only (`e4m3fn`).
    fn from_e4m3(self, bytes: &[u8; LANES]) -> Self::V;
    /// Bytes of the float with 5 exponent and 2 mantissa bits.
    fn from_e5m2(self, bytes: &[u8; LANES]) -> Self::V;
}

/// A computation that is compiled for each instruction set.
///
/// Implementations mark `run`, and all it calls, `#[inline(always)]`: code that
/// is not inlined is compiled without the instruction set.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs a kernel on the best instruction set of this processor.
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(s) = Avx512::detect() {
            return s.vectorize(kernel);
        }
        if let Some(s) = Avx2::detect() {
            return s.vectorize(kernel);
        }
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(s) = Neon::detect() {
        return s.vectorize(kernel);
    }
    Portable.vectorize(kernel)
}

/// Whether this is an x86 processor with AVX2 or more that is not Intel's.
pub(crate) fn wide_but_not_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    if Avx2::detect().is_some() {
        // SAFETY: every x86-64 processor has `cpuid`.
        #[allow(unused_unsafe)] // safe from Rust 1.94 on
        let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
        return (leaf.ebx, leaf.edx, leaf.ecx) != (0x756e_6547, 0x4965_6e69, 0x6c65_746e);
    }
    false
}
