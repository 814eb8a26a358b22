//! Dense products by the faster of libtorch's two libraries.
//!
//! libtorch sends `mm` of f32 to MKL, which takes 256-bit code on processors
//! that are not Intel's and reaches less than half of what oneDNN does there;
//! with few rows it is the other way round. On Intel's both are alike. The
//! choice depends on the processor and the shape only, so that a run and its
//! resumption on one machine take the same way.

use crate::error::Result;
use crate::ffi::compute::{has_onednn, onednn_linear};
use std::sync::OnceLock;
use tch::{Device, Kind, Tensor};

/// Rows from which oneDNN is the faster one.
const ONEDNN_ROWS: i64 = 64;

/// The dtype to multiply matrices of `kind` in, and to round the result from:
/// f32 instead of 16 bits where libtorch would go through them one by one.
pub(crate) fn product_kind(kind: Kind, device: Device) -> Kind {
    static SLOW: OnceLock<bool> = OnceLock::new();
    let slow = || *SLOW.get_or_init(crate::ffi::simd::no_products_of_16_bits);
    match kind {
        Kind::BFloat16 | Kind::Half if device == Device::Cpu && slow() => Kind::Float,
        kind => kind,
    }
}

/// Whether `x · w` of these rows goes to oneDNN.
fn by_onednn(x: &Tensor) -> Result<bool> {
    static HERE: OnceLock<bool> = OnceLock::new();
    let here = || *HERE.get_or_init(|| crate::ffi::simd::wide_but_not_intel() && has_onednn());
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
