//! The float types that the kernels read and write.

use crate::ffi::bytes::Plain;
use crate::ffi::simd::{LANES, Simd};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A dtype of tiles and activations.
pub(crate) trait Float: Plain + Into<f32> {
    const DTYPE: Dtype;
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    /// This number in every lane.
    fn splat<S: Simd>(self, s: S) -> S::V;
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::V;
    /// Stores the nearest values of this type.
    fn store<S: Simd>(s: S, v: S::V, to: &mut [Self; LANES]);
    /// The same for twice as many.
    fn store_pair<S: Simd>(s: S, v: [S::V; 2], to: &mut [Self; 2 * LANES]);
    /// The bits, of types of 16.
    fn words(values: &mut [Self]) -> Option<&mut [u16]>;
    /// The same values, of bf16.
    fn as_bf16(values: &[Self]) -> Option<&[bf16]>;
    /// The same, to write to.
    fn as_bf16_mut(values: &mut [Self]) -> Option<&mut [bf16]>;
}

macro_rules! float {
    ($($t:ty: $dtype:ident, $from:expr, $to:expr, $splat:expr, $load:ident, $store:ident, $pair:expr, $words:expr, $bf16:expr, $bf16_mut:expr);*) => { $(impl Float for $t {
        const DTYPE: Dtype = Dtype::$dtype;

        #[inline(always)]
        fn from_f32(value: f32) -> Self {
            $from(value)
        }

        #[inline(always)]
        fn to_f32(self) -> f32 {
            $to(self)
        }

        #[inline(always)]
        fn splat<S: Simd>(self, s: S) -> S::V {
            $splat(s, self)
        }

        #[inline(always)]
        fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::V {
            s.$load(from)
        }

        #[inline(always)]
        fn store<S: Simd>(s: S, v: S::V, to: &mut [Self; LANES]) {
            s.$store(v, to);
        }

        #[inline(always)]
        fn store_pair<S: Simd>(s: S, v: [S::V; 2], to: &mut [Self; 2 * LANES]) {
            $pair(s, v, to);
        }

        #[inline(always)]
        fn words(values: &mut [Self]) -> Option<&mut [u16]> {
            $words(values)
        }

        #[inline(always)]
        fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
            $bf16(values)
        }

        #[inline(always)]
        fn as_bf16_mut(values: &mut [Self]) -> Option<&mut [bf16]> {
            $bf16_mut(values)
        }
    })* };
}
float! {
    f32: F32, |v| v, |v| v, Simd::splat, load, store, store_both, |_| None, |_| None, |_| None;
    bf16: Bf16, bf16::from_f32, widened, splat_bf16, load_bf16, store_bf16, Simd::store_bf16_pair, |values| Some(HalfFloatSliceExt::reinterpret_cast_mut(values)), Some, Some;
    f16: F16, f16::from_f32, f16::to_f32, splat_f16, load_f16, store_f16, store_both, |values| Some(HalfFloatSliceExt::reinterpret_cast_mut(values)), |_| None, |_| None
}

#[inline(always)]
fn store_both<S: Simd, T: Float>(s: S, v: [S::V; 2], to: &mut [T; 2 * LANES]) {
    for (v, to) in v.into_iter().zip(to.as_chunks_mut().0) {
        T::store(s, v, to);
    }
}

/// The same number. `bf16::to_f32` takes several times as long, to quiet NaN that signal.
#[inline(always)]
fn widened(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

#[inline(always)]
fn splat_bf16<S: Simd>(s: S, value: bf16) -> S::V {
    s.splat(widened(value))
}

/// By the processor's instruction, where `f16::to_f32` would ask first whether there is one.
#[inline(always)]
fn splat_f16<S: Simd>(s: S, value: f16) -> S::V {
    s.load_f16(&[value; LANES])
}

/// The dtype of a weight, which its values are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    /// The dtype to round to before values are rounded to `T`: none, as f32,
    /// where that is this one.
    #[inline(always)]
    pub(super) fn before<T: Float>(self) -> Dtype {
        if T::DTYPE == self { Dtype::F32 } else { self }
    }

    /// The nearest values of this dtype.
    #[inline(always)]
    pub(super) fn round<S: Simd>(self, s: S, v: S::V) -> S::V {
        match self {
            Dtype::F32 => v,
            Dtype::Bf16 => s.round_bf16(v),
            Dtype::F16 => s.round_f16(v),
        }
    }

    #[inline(always)]
    pub(super) fn round_one(self, value: f32) -> f32 {
        match self {
            Dtype::F32 => value,
            Dtype::Bf16 => bf16::from_f32(value).to_f32(),
            Dtype::F16 => f16::from_f32(value).to_f32(),
        }
    }
}

/// Scales or shifts in the dtype of their weight.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl Floats<'_> {
    pub(super) fn dtype(&self) -> Dtype {
        match self {
            Floats::F32(_) => Dtype::F32,
            Floats::Bf16(_) => Dtype::Bf16,
            Floats::F16(_) => Dtype::F16,
        }
    }

    #[inline(always)]
    pub(super) fn at(&self, i: usize) -> f32 {
        match self {
            Floats::F32(v) => v[i],
            Floats::Bf16(v) => v[i].to_f32(),
            Floats::F16(v) => v[i].to_f32(),
        }
    }
}
