//! Dense products by the faster of libtorch's two libraries.
//!
//! libtorch sends `mm` of f32 to MKL, which takes 256-bit code on processors
//! that are not Intel's and reaches less than half of what oneDNN does there;
//! with few rows it is the other way round. On Intel's both are alike. The
//! choice depends on the processor and the shape only, so that a run and its
//! resumption on one machine take the same way.
//!
//! Of 16-bit numbers libtorch's products are faster than those of f32 on some
//! processors, slower on others, and hundreds of times slower where it goes
//! through the elements one by one.

use crate::error::Result;
use crate::ffi::compute::{has_onednn, onednn_linear};
use crate::ffi::simd;
use std::sync::OnceLock;
use tch::{Device, Kind, Tensor};

/// Rows from which oneDNN is the faster one.
pub(crate) const ONEDNN_ROWS: i64 = 64;

/// The dtype to multiply matrices of `kind` in, and to round the result from:
/// f32 instead of 16 bits where that is faster.
pub(crate) fn product_kind(kind: Kind, device: Device) -> Kind {
    match of_16_bits(kind, device) {
        Of16Bits::Faster => kind,
        Of16Bits::Slower | Of16Bits::Loops => Kind::Float,
    }
}

/// Rows up to which x · w of a dense w that is not to be cast stays in 16 bits
/// although [`product_kind`] is f32: with fewer, casting w takes longer than it
/// gains. `transposed` says whether w lies in memory as wᵀ.
pub(crate) fn few_to_cast(kind: Kind, device: Device, transposed: bool) -> i64 {
    match of_16_bits(kind, device) {
        Of16Bits::Faster => i64::MAX,
        Of16Bits::Slower => 32,
        Of16Bits::Loops => 2 * i64::from(transposed),
    }
}

/// How libtorch's products of 16-bit numbers compare to those of f32.
#[derive(Clone, Copy)]
enum Of16Bits {
    Faster,
    /// The instructions are there, and slower.
    Slower,
    /// It goes through the elements one by one.
    Loops,
}

fn of_16_bits(kind: Kind, device: Device) -> Of16Bits {
    static HERE: OnceLock<[Of16Bits; 2]> = OnceLock::new();
    let here = || {
        *HERE.get_or_init(|| {
            let bf16 = match simd::products_of_bf16() {
                _ if simd::products_of_bf16_gain() => Of16Bits::Faster,
                true => Of16Bits::Slower,
                false => Of16Bits::Loops,
            };
            [bf16, if simd::products_of_f16() { Of16Bits::Faster } else { Of16Bits::Loops }]
        })
    };
    match kind {
        Kind::BFloat16 if device == Device::Cpu => here()[0],
        Kind::Half if device == Device::Cpu => here()[1],
        _ => Of16Bits::Faster,
    }
}

/// Whether `x · w` of these rows goes to oneDNN.
fn by_onednn(x: &Tensor) -> Result<bool> {
    static HERE: OnceLock<bool> = OnceLock::new();
    let here = || *HERE.get_or_init(|| simd::wide_but_not_intel() && has_onednn());
    Ok(x.f_kind()? == Kind::Float && x.device() == Device::Cpu && x.size2()?.0 >= ONEDNN_ROWS && here())
}

/// x · w: x (n, k), w (k, m) of the same dtype, written into `out` (n, m).
pub(crate) fn multiply_into(x: &Tensor, w: &Tensor, out: &mut Tensor) -> Result<()> {
    if by_onednn(x)? {
        out.f_copy_(&onednn_linear(x, &w.f_tr()?)?)?;
    } else {
        let _ = x.f_mm_out(out, w)?;
    }
    Ok(())
}

/// x · w: x (n, k), w (k, m) of the same dtype; a new (n, m).
pub(crate) fn multiply(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if by_onednn(x)? { onednn_linear(x, &w.f_tr()?) } else { Ok(x.f_mm(w)?) }
}

/// x · wᵀ (+ bias): x (n, k), w (m, k), bias (m) of the same dtype; a new (n, m).
pub(crate) fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !by_onednn(x)? {
        return Ok(x.f_linear(w, bias)?);
    }
    let mut y = onednn_linear(x, w)?;
    if let Some(bias) = bias {
        let _ = y.f_add_(bias)?;
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_multiply() {
        for rows in [1, 16, ONEDNN_ROWS, 100] {
            let [x, w] = [[rows, 48], [48, 40]].map(|shape| Tensor::randn(shape, (Kind::Float, Device::Cpu)));
            let expected = x.to_kind(Kind::Double).mm(&w.to_kind(Kind::Double));
            // As a column range of a wider matrix, the way tiles write.
            let wide = Tensor::zeros([rows, 50], (Kind::Float, Device::Cpu));
            multiply_into(&x, &w, &mut wide.narrow(1, 5, 40)).unwrap();
            for found in [wide.narrow(1, 5, 40), multiply(&x, &w).unwrap()] {
                let error = (found.to_kind(Kind::Double) - &expected).abs().max();
                assert!(f64::try_from(error).unwrap() < 1e-4);
            }
        }
    }
}
