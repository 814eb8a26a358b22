//! Sixteen f32 lanes in whatever registers the processor has.
//!
//! Kernels are written once over [`Simd`] and compiled for each instruction
//! set; [`dispatch`] picks one as the program runs. A value of a type that
//! implements [`Simd`] is the proof that its instructions exist: only the
//! detection makes one. That is what keeps the methods safe to call.
//!
//! Every method but [`Simd::mul_add`] and [`Simd::sum`] gives the same bits on
//! every instruction set.

mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packing;
mod portable;
mod vnni;

pub(crate) use amx::{Amx, Sums, TILE, Tile};
#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use bf16::{Bf16Kernel, DotBf16, First, dispatch_bf16, multiplies_bf16, multiplies_bf16_faster};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use packing::Packing;
pub(crate) use portable::Portable;
pub(crate) use vnni::{DotI8, I8Kernel, dispatch_i8, multiplies_i8};

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// Lanes of a [`Simd::V`].
pub(crate) const LANES: usize = 16;

/// Bytes of these.
pub(crate) const BYTES: usize = 4 * LANES;

/// An instruction set, proven to be there.
pub(crate) trait Simd: Packing<<Self as Simd>::V> + Send + Sync + 'static {
    /// Sixteen f32.
    type V: Copy;
    /// Sixteen words, to look up in.
    type Words: Copy;

    /// Sums of sixteen lanes for which there are registers, beside what is multiplied.
    const SUMS: usize;

    /// Runs a kernel compiled for this instruction set.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    /// Asks for the cache line at an address that will be read soon; any will do.
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    fn splat(self, value: f32) -> Self::V;
    fn load(self, from: &[f32; LANES]) -> Self::V;
    fn store(self, v: Self::V, to: &mut [f32; LANES]);
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
    /// Stores the nearest bf16 of both.
    #[inline(always)]
    fn store_bf16_pair(self, v: [Self::V; 2], to: &mut [half::bf16; 2 * LANES]) {
        let (first, second) = to.split_at_mut(LANES);
        if let (Some(first), Some(second)) = (first.first_chunk_mut(), second.first_chunk_mut()) {
            self.store_bf16(v[0], first);
            self.store_bf16(v[1], second);
        }
    }
    /// Stores the nearest f16.
    fn store_f16(self, v: Self::V, to: &mut [half::f16; LANES]);

    /// `table[b >> 4], table[b & 15]` for each of 8 bytes.
    fn look_up_nibbles(self, table: Self::V, bytes: &[u8; LANES / 2]) -> Self::V;
    /// `table[(b >> shift) & 15]` for each of 16 bytes.
    fn look_up_field(self, table: Self::V, bytes: &[u8; LANES], shift: u32) -> Self::V;
    /// Sixteen words to look up in.
    fn words(self, words: &[u16; LANES]) -> Self::Words;
    /// As [`look_up_nibbles`](Self::look_up_nibbles), of 16 bytes and of words.
    fn look_up_nibbles_as_words(self, table: Self::Words, bytes: &[u8; LANES], to: &mut [u16; 2 * LANES]);
    /// As [`look_up_field`](Self::look_up_field), of 32 bytes and of words.
    fn look_up_field_as_words(self, table: Self::Words, bytes: &[u8; 2 * LANES], shift: u32, to: &mut [u16; 2 * LANES]);
    /// Signed bytes.
    fn widen_i8(self, bytes: &[u8; LANES]) -> Self::V;
    /// Bytes of the float with 4 exponent and 3 mantissa bits, finite values
    /// only (`e4m3fn`).
    fn decode_e4m3(self, bytes: &[u8; LANES]) -> Self::V;
    /// The same of twice as many, over 256: a power of two that a scale can take in.
    #[inline(always)]
    fn decode_e4m3_over_256(self, bytes: &[[u8; LANES]; 2]) -> [Self::V; 2] {
        let over = self.splat(1.0 / 256.0);
        [self.mul(self.decode_e4m3(&bytes[0]), over), self.mul(self.decode_e4m3(&bytes[1]), over)]
    }
    /// Bytes of the float with 5 exponent and 2 mantissa bits.
    fn decode_e5m2(self, bytes: &[u8; LANES]) -> Self::V;
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
    {
        // A virtual machine traps `cpuid`, which then takes longer than a small product.
        static FOUND: OnceLock<bool> = OnceLock::new();
        Avx2::detect().is_some()
            && *FOUND.get_or_init(|| {
                // SAFETY: every x86-64 processor has `cpuid`.
                #[allow(unused_unsafe)] // safe from Rust 1.94 on
                let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
                (leaf.ebx, leaf.edx, leaf.ecx) != (0x756e_6547, 0x4965_6e69, 0x6c65_746e)
            })
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether libtorch multiplies bf16 faster than f32: in AMX's tile registers, by AVX512-BF16 where that gains, and,
/// as far as known, on processors that are not x86.
pub(crate) fn products_of_bf16_gain() -> bool {
    cfg!(not(target_arch = "x86_64")) || Amx::detect().is_some() || multiplies_bf16_faster()
}

/// Whether libtorch has products of bf16, whatever their speed: on x86 processors without AVX-512 it
/// goes through the elements one by one.
pub(crate) fn products_of_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Avx512::detect().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    true
}

/// The same of f16, which asks for AVX512-FP16 on x86.
pub(crate) fn products_of_f16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Avx512::detect().is_some() && is_x86_feature_detected!("avx512fp16");
    #[cfg(not(target_arch = "x86_64"))]
    true
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use half::{bf16, f16};
    use tch::{Kind, Tensor};

    /// Runs a kernel on every instruction set of this processor; the first is
    /// the portable one.
    pub(crate) fn on_all<K: Kernel + Copy>(kernel: K) -> Vec<K::Output> {
        let mut outputs = vec![Portable.vectorize(kernel)];
        #[cfg(target_arch = "x86_64")]
        {
            outputs.extend(Avx2::detect().map(|s| s.vectorize(kernel)));
            outputs.extend(Avx512::detect().map(|s| s.vectorize(kernel)));
        }
        #[cfg(target_arch = "aarch64")]
        outputs.extend(Neon::detect().map(|s| s.vectorize(kernel)));
        outputs
    }

    /// The bits of what every exact method makes of some bytes and values.
    #[derive(Clone, Copy)]
    struct Exact<'a> {
        bytes: &'a [u8; LANES],
        values: &'a [f32; LANES],
    }

    impl Kernel for Exact<'_> {
        type Output = Vec<Vec<u32>>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let (v, bytes) = (s.load(self.values), self.bytes);
            let half: &[u8; LANES / 2] = bytes.first_chunk().unwrap();
            let mut results = Vec::new();
            let mut keep = |v: S::V| {
                let mut lanes = [0.0; LANES];
                s.store(v, &mut lanes);
                results.push(lanes.map(f32::to_bits).to_vec());
            };
            keep(s.splat(self.values[3]));
            keep(s.sub(v, s.splat(1.5)));
            keep(s.mul(v, v));
            keep(s.round_bf16(v));
            keep(s.round_f16(v));
            keep(s.add(v, s.splat(1.5)));
            keep(s.div(v, s.splat(-0.3)));
            keep(s.abs(v));
            let reversed = s.load(&std::array::from_fn(|i| self.values[LANES - 1 - i]));
            keep(s.min(v, reversed));
            keep(s.max(v, reversed));
            keep(s.min(s.splat(0.0), s.splat(-0.0)));
            keep(s.max(s.splat(0.0), s.splat(-0.0)));
            let small = s.max(s.min(s.mul(v, s.splat(0.5)), s.splat(255.0)), s.splat(-128.0));
            let halves = s.load(&std::array::from_fn(|i| f32::from(bytes[i]) / 2.0 - 60.0));
            keep(s.round(small));
            keep(s.round(halves));
            keep(s.load_bf16(&self.values.map(bf16::from_f32)));
            keep(s.load_f16(&self.values.map(f16::from_f32)));
            keep(s.look_up_nibbles(v, half));
            for shift in [0, 2, 4, 6] {
                keep(s.look_up_field(v, bytes, shift));
            }
            let words = s.words(&self.values.map(|v| (v.to_bits() >> 16) as u16));
            let mut wide = [[0; 2 * LANES]; 6];
            s.look_up_nibbles_as_words(words, bytes, &mut wide[0]);
            let twice: [u8; 2 * LANES] = std::array::from_fn(|i| bytes[i % LANES] ^ (i / LANES) as u8);
            for (to, shift) in wide[1..5].iter_mut().zip([0, 2, 4, 6]) {
                s.look_up_field_as_words(words, &twice, shift, to);
            }
            let mut pair = [bf16::ZERO; 2 * LANES];
            s.store_bf16_pair([v, s.mul(v, v)], &mut pair);
            wide[5] = pair.map(bf16::to_bits);
            keep(s.widen_i8(bytes));
            keep(s.decode_e4m3(bytes));
            let reversed = std::array::from_fn(|i| bytes[LANES - 1 - i]);
            let [first, second] = s.decode_e4m3_over_256(&[*bytes, reversed]);
            keep(first);
            keep(second);
            keep(s.decode_e5m2(bytes));
            let (mut b, mut f) = ([bf16::ZERO; LANES], [f16::ZERO; LANES]);
            s.store_bf16(v, &mut b);
            s.store_f16(v, &mut f);
            let bounds = std::array::from_fn(|i| i as f32 * 8.5 - 60.0);
            for bytes in [s.to_bytes(small), s.to_bytes(halves), s.count_below(halves, &bounds)] {
                results.push(bytes.map(u32::from).to_vec());
            }
            results.extend(wide.map(|words| words.map(u32::from).to_vec()));
            results.push(b.map(|b| u32::from(b.to_bits())).to_vec());
            results.push(f.map(|f| u32::from(f.to_bits())).to_vec());
            results
        }
    }

    /// A sum of products.
    #[derive(Clone, Copy)]
    struct Sum<'a>(&'a [f32; LANES]);

    impl Kernel for Sum<'_> {
        type Output = f32;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            let v = s.load(self.0);
            s.sum(s.mul_add(v, v, v))
        }
    }

    #[test]
    fn instruction_sets_agree() {
        let mut bits = 1u32;
        for round in 0..4096u32 {
            // Every byte; values of all magnitudes, half-way cases included.
            let bytes = std::array::from_fn(|i| (round as u8).wrapping_mul(16).wrapping_add(i as u8));
            // Finite 8-bit floats only: NaN has more than one pattern.
            let bytes = bytes.map(|b: u8| if b & 0x7c == 0x7c { 0 } else { b });
            let values: [f32; LANES] = std::array::from_fn(|i| {
                bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let value = f32::from_bits(if i % 2 == 0 { bits } else { bits & 0xffff_8000 });
                if value.abs() < 1e37 { value } else { i as f32 }
            });
            let outputs = on_all(Exact { bytes: &bytes, values: &values });
            for output in &outputs[1..] {
                assert_eq!(*output, outputs[0], "{bytes:?} {values:?}");
            }
            let values = values.map(|v| v.abs() % 8.0);
            let sums = on_all(Sum(&values));
            for sum in &sums[1..] {
                assert!((sum - sums[0]).abs() <= sums[0] * 32.0 * f32::EPSILON, "{sums:?}");
            }
        }
    }

    #[test]
    fn bytes_are_read_as_torch_reads_them() {
        let bytes: Vec<u8> = (0..=255).collect();
        let all = Tensor::from_slice(&bytes);
        for (kind, read) in [(Kind::Float8e4m3fn, portable::e4m3 as fn(u8) -> f32), (Kind::Float8e5m2, portable::e5m2)]
        {
            let expected = Vec::<f32>::try_from(all.view_dtype(kind).to_kind(Kind::Float)).unwrap();
            for (byte, expected) in (0..=255).zip(expected) {
                assert!(expected.is_nan() || read(byte).to_bits() == expected.to_bits(), "{byte}: {expected}");
            }
        }
    }
}
