//! Packing by kernels: on the CPU weights are lent to them as slices, on CUDA
//! `cuda::packing` starts them.
//!
//! Each function takes a contiguous, finite weight, and answers `None` where no
//! kernel can serve it.

use super::kernels::Float;
use super::kernels::packing::{self, Fp8Code, GroupLayout, Int8Code, LlmInt8Code, RowCode, SortedCode};
use super::{Fp8Format, cuda, largest_scale, smallest_normal};
use crate::error::Result;
use crate::ffi::bytes::{Plain, read, write};
use crate::ffi::cuda::by_kernel;
use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

/// Calls a function for the dtype of a weight on the CPU, or that of
/// `cuda::packing` with this name.
macro_rules! by_dtype {
    ($weight:expr, $function:ident($($argument:expr),*), $on_cuda:ident($($given:expr),*)) => {
        match $weight.f_kind()? {
            _ if $weight.device() != Device::Cpu => {
                by_kernel($weight.device(), |launcher| cuda::packing::$on_cuda(launcher, $weight, $($given),*))
            }
            Kind::Float => $function::<f32>($weight, $($argument),*).map(Some),
            Kind::BFloat16 => $function::<bf16>($weight, $($argument),*).map(Some),
            Kind::Half => $function::<f16>($weight, $($argument),*).map(Some),
            _ => Ok(None),
        }
    };
}

fn empty(shape: &[i64], kind: Kind) -> Result<Tensor> {
    Ok(Tensor::f_empty(shape, (kind, Device::Cpu))?)
}

/// Codes (rows, columns) and scales (rows, 1) of a weight (rows, columns).
fn by_rows<T: Float, C: RowCode<T>>(weight: &Tensor, code: &C, kind: Kind) -> Result<[Tensor; 2]>
where
    C::Scale: Float,
{
    let (rows, columns) = weight.size2()?;
    let (data, mut scale) = (empty(&[rows, columns], kind)?, empty(&[rows, 1], C::Scale::KIND)?);
    let mut bytes = data.f_view_dtype(Kind::Uint8)?;
    read::<T, _>(weight, |weight| {
        write::<u8, _>(&mut bytes, |bytes| {
            write::<C::Scale, _>(&mut scale, |scale| packing::pack_rows(code, columns as usize, weight, bytes, scale))
        })
    })????;
    Ok([data, scale])
}

/// i8 codes (rows, columns), and scales (rows, 1) in the weight's dtype.
pub(super) fn int8(weight: &Tensor) -> Result<Option<[Tensor; 2]>> {
    fn of<T: Float>(weight: &Tensor) -> Result<[Tensor; 2]> {
        let largest = largest_scale(T::KIND, 127.0) as f32;
        by_rows::<T, _>(weight, &Int8Code { largest }, Kind::Int8)
    }
    by_dtype!(weight, of(), int8())
}

/// i8 codes (rows, columns), and f32 maxima (rows, 1).
pub(super) fn llm_int8(weight: &Tensor) -> Result<Option<[Tensor; 2]>> {
    fn of<T: Float>(weight: &Tensor) -> Result<[Tensor; 2]> {
        by_rows::<T, _>(weight, &LlmInt8Code, Kind::Int8)
    }
    by_dtype!(weight, of(), llm_int8())
}

/// 8-bit floats (rows, columns), and scales (rows, 1) in the weight's dtype.
pub(super) fn fp8(weight: &Tensor, format: Fp8Format) -> Result<Option<[Tensor; 2]>> {
    fn of<T: Float>(weight: &Tensor, format: Fp8Format) -> Result<[Tensor; 2]> {
        let (top, kind) = (format.largest(), format.kind());
        let [smallest, largest] = [smallest_normal(T::KIND), largest_scale(T::KIND, top)].map(|limit| limit as f32);
        let top = top as f32;
        match format {
            Fp8Format::E4m3 => by_rows::<T, _>(weight, &Fp8Code::<3> { top, smallest, largest }, kind),
            Fp8Format::E5m2 => by_rows::<T, _>(weight, &Fp8Code::<2> { top, smallest, largest }, kind),
        }
    }
    by_dtype!(weight, of(format), fp8(format))
}

/// u8 (byte rows, size), scales and shifts (groups, 1), of a weight (groups,
/// size).
pub(super) fn groups(weight: &Tensor, layout: GroupLayout) -> Result<Option<[Tensor; 3]>> {
    fn of<T: Float>(weight: &Tensor, layout: GroupLayout) -> Result<[Tensor; 3]> {
        let (groups, size) = weight.size2()?;
        let mut data = empty(&[layout.byte_rows as i64, size], Kind::Uint8)?;
        let (mut scale, mut shift) = (empty(&[groups, 1], T::KIND)?, empty(&[groups, 1], T::KIND)?);
        read::<T, _>(weight, |weight| {
            write::<u8, _>(&mut data, |data| {
                write::<T, _>(&mut scale, |scale| {
                    write::<T, _>(&mut shift, |shift| packing::pack_groups(layout, weight, data, scale, shift))
                })
            })
        })?????;
        Ok([data, scale, shift])
    }
    if layout.search && weight.device() != Device::Cpu {
        return Ok(None);
    }
    by_dtype!(weight, of(layout), groups(layout))
}

/// u8 (⌈n / 2⌉) and f32 scales (blocks), of a flat weight (n).
pub(super) fn codes(weight: &Tensor, code: SortedCode, block: i64) -> Result<Option<[Tensor; 2]>> {
    fn of<T: Float>(weight: &Tensor, code: SortedCode, block: i64) -> Result<[Tensor; 2]> {
        let len = weight.size1()?;
        let mut data = empty(&[(len + 1) / 2], Kind::Uint8)?;
        let mut absmax = empty(&[(len + block - 1) / block], Kind::Float)?;
        read::<T, _>(weight, |weight| {
            write::<u8, _>(&mut data, |data| {
                write::<f32, _>(&mut absmax, |absmax| packing::pack_codes(code, block as usize, weight, data, absmax))
            })
        })????;
        Ok([data, absmax])
    }
    let name = code.name;
    by_dtype!(weight, of(code, block), codes(name, block))
}

/// u8 (rows, ⌈columns / 2⌉) and e8m0 scales (rows, ⌈columns / 32⌉), of a weight
/// (rows, columns).
pub(super) fn mxfp4(weight: &Tensor) -> Result<Option<[Tensor; 2]>> {
    fn of<T: Float>(weight: &Tensor) -> Result<[Tensor; 2]> {
        let (rows, columns) = weight.size2()?;
        let mut data = empty(&[rows, (columns + 1) / 2], Kind::Uint8)?;
        let mut scale = empty(&[rows, (columns + 31) / 32], Kind::Uint8)?;
        read::<T, _>(weight, |weight| {
            write::<u8, _>(&mut data, |data| {
                write::<u8, _>(&mut scale, |scale| packing::pack_blocks(columns as usize, weight, data, scale))
            })
        })????;
        Ok([data, scale])
    }
    by_dtype!(weight, of(), mxfp4())
}

#[cfg(test)]
pub(in crate::quant) mod tests {
    use super::*;
    use crate::ffi::bytes::tensor_bytes;
    use crate::quant::Scheme;
    use crate::quant::affine::{Affine, Layout};
    use crate::quant::fp8::Fp8;
    use crate::quant::int8::Int8;
    use crate::quant::mxfp4::Mxfp4;

    /// Values of all sizes, zeros and outliers, in rows of their own too.
    pub(in crate::quant) fn weights() -> Vec<Tensor> {
        let mut weights = Vec::new();
        for (shape, kind) in [
            ([1i64, 1], Kind::Float),
            ([3, 7], Kind::Half),
            ([5, 37], Kind::Float),
            ([9, 192], Kind::BFloat16),
            ([33, 130], Kind::Half),
            ([70, 1027], Kind::BFloat16),
            ([500, 384], Kind::Float),
        ] {
            let values = Tensor::randn(shape, (Kind::Float, Device::Cpu));
            let values = values.f_mul(&values.f_gt(-1.0).unwrap()).unwrap().f_pow_tensor_scalar(3.0).unwrap();
            if shape[0] > 2 {
                let _ = values.get(0).fill_(-0.0);
                let _ = values.get(1).fill_(-0.3);
                // Zeros of both signs, and nothing below.
                let signs = Tensor::from_slice(&[-0.0f32, 1.0, 0.0]).repeat([shape[1]]).narrow(0, 0, shape[1]);
                let _ = values.get(2).abs_().f_mul_(&signs).unwrap();
            }
            // Finite in f16 too, as weights are.
            weights.extend([1.0, 1e-6, 1e3].map(|scale| (&values * scale).clamp(-6e4, 6e4).to_kind(kind)));
        }
        weights
    }

    fn assert_same(found: &[Tensor], expected: &[Tensor], what: &str) {
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!((found.size(), found.kind()), (expected.size(), expected.kind()), "{what}");
            assert!(tensor_bytes(found).unwrap() == tensor_bytes(expected).unwrap(), "{what}: {found} {expected}");
        }
    }

    // libtorch's operators are a second implementation of the same definitions.
    #[test]
    fn kernels_pack_as_the_operators_do() {
        for weight in weights() {
            let what = format!("{:?} {:?}", weight.size(), weight.kind());
            let case = |name: &str| format!("{name} {what}");
            assert_same(&int8(&weight).unwrap().unwrap(), &Int8::steps(&weight).unwrap(), &case("int8"));
            assert_same(&llm_int8(&weight).unwrap().unwrap(), &Int8::maxima(&weight).unwrap(), &case("llm_int8"));
            for format in [Fp8Format::E4m3, Fp8Format::E5m2] {
                let expected = Fp8::pack_by_operators(&weight, format).unwrap();
                assert_same(&fp8(&weight, format).unwrap().unwrap(), &expected, &case("fp8"));
            }
            assert_same(&mxfp4(&weight).unwrap().unwrap(), &Mxfp4::pack_by_operators(&weight).unwrap(), &case("mxfp4"));
            for group_size in [128, 32] {
                for scheme in [Scheme::Int4 { group_size, hqq: false }, Scheme::Int2 { group_size, hqq: false }] {
                    let layout = Layout::of(scheme, &weight.size());
                    let weight = weight.view([layout.groups, layout.size]);
                    let found = groups(&weight, layout.for_kernel(false)).unwrap().unwrap();
                    assert_same(&found, &Affine::pack_by_operators(&weight, layout, false).unwrap(), &case("groups"));
                }
            }
        }
    }

    // The sums of the search are taken in another order, so that now and then
    // another pair is found, which is as good.
    #[test]
    fn kernels_search_as_well_as_the_operators_do() {
        for (shape, kind) in [([64, 1024], Kind::Float), ([64, 1024], Kind::BFloat16), ([40, 330], Kind::Half)] {
            let weight = Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            let weight = weight.f_pow_tensor_scalar(3.0).unwrap();
            for scheme in [Scheme::Int4 { group_size: 128, hqq: true }, Scheme::Int2 { group_size: 128, hqq: true }] {
                let layout = Layout::of(scheme, &shape);
                let grouped = weight.view([layout.groups, layout.size]);
                let error = |[data, scale, shift]: [Tensor; 3]| {
                    let bits: i64 = layout.bits;
                    let codes = Tensor::cat(
                        &(0..8 / bits)
                            .map(|part| {
                                data.bitwise_right_shift_tensor_scalar(part * bits).bitwise_and((1 << bits) - 1)
                            })
                            .collect::<Vec<_>>(),
                        0,
                    );
                    let wide = |t: &Tensor| t.to_kind(Kind::Double);
                    let values = wide(&scale) * wide(&codes.narrow(0, 0, layout.groups)) - wide(&shift);
                    f64::try_from((values - wide(&grouped)).square().sum(Kind::Double)).unwrap()
                };
                let found = error(groups(&grouped, layout.for_kernel(true)).unwrap().unwrap());
                let expected = error(Affine::pack_by_operators(&grouped, layout, true).unwrap());
                assert!((found / expected - 1.0).abs() < 2e-3, "{scheme} {kind:?}: {found} and {expected}");
            }
        }
    }
}
