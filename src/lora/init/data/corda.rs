//! CorDA (arXiv:2406.05223): a decomposition of the weight that the inputs'
//! covariance C orients.
//!
//! With W·C = U·S·Vᵀ, W = U·S·Vᵀ·C⁻¹, of which r terms become the adapter and
//! are taken out of the weight: the first ones, or the last.

use super::super::decompose::{Pair, balanced};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// PEFT's `corda_config`. Its other fields concern files, which stay as they are.
///
/// ```
/// use tch_peft::{CordaConfig, CordaMethod, InitLoraWeights, LoraConfig};
///
/// let config = LoraConfig::builder()
///     .target_modules(["q_proj"])
///     .init_lora_weights(InitLoraWeights::Corda)
///     .corda_config(CordaConfig { corda_method: CordaMethod::Kpm })
///     .build()?; // for `LoraModel::wrap_with_data`
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CordaConfig {
    /// Which terms become the adapter.
    pub corda_method: CordaMethod,
}

/// Which terms of CorDA's decomposition become the adapter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CordaMethod {
    /// The instruction-previewed mode: the first terms, to learn fast what the
    /// data is about.
    #[default]
    Ipm,
    /// The knowledge-preserved mode: the last terms, to keep what the data is
    /// about as it is.
    Kpm,
}

/// The sum of x̂ᵀ·x̂ over inputs, x̂ = x / |max x|.
#[derive(Debug, Default)]
pub(crate) struct Covariance {
    sum: Option<Tensor>,
    uses: i64,
}

impl Covariance {
    /// Adds rows (n, in).
    pub(crate) fn add(&mut self, name: &str, rows: &Tensor) -> Result<()> {
        let rows = rows.f_to_kind(Kind::Float)?;
        let scaled = rows.f_div(&rows.f_max()?.f_abs()?)?;
        let part = scaled.f_tr()?.f_mm(&scaled)?;
        crate::quant::check_finite(name, &part, "its inputs can't orient CorDA: look at the data")?;
        self.sum = Some(match self.sum.take() {
            Some(sum) => sum.f_add(&part)?,
            None => part,
        });
        self.uses += 1;
        Ok(())
    }

    /// The mean over the uses of the layer.
    pub(crate) fn mean(&self) -> Result<Option<Tensor>> {
        Ok(self.sum.as_ref().map(|sum| sum.f_div_scalar(self.uses)).transpose()?)
    }
}

/// A and B from W (out, in) and C (in, in), with s·B·A the chosen terms.
pub(in crate::lora::init) fn factors(
    w: &Tensor,
    covariance: &Tensor,
    method: CordaMethod,
    r: i64,
    s: f64,
) -> Result<Pair> {
    let covariance = covariance.f_to_kind(w.f_kind()?)?.f_to_device(w.device())?;
    let (oriented, inverse) = invertible(&covariance)?;
    let (u, singular, v) = w.f_mm(&oriented)?.f_svd(true, true)?;
    let start = match method {
        CordaMethod::Ipm => 0,
        CordaMethod::Kpm => singular.size()[0] - r,
    };
    let v = inverse.f_tr()?.f_mm(&v.f_narrow(1, start, r)?)?;
    balanced((u.f_narrow(1, start, r)?, singular.f_narrow(0, start, r)?, v), s)
}

/// C + d · mean(diag C) · I with its inverse, for the smallest of d = 0.01,
/// 0.02, 0.04, … for which the inverse is one.
fn invertible(covariance: &Tensor) -> Result<(Tensor, Tensor)> {
    let eye = Tensor::f_eye(covariance.size()[0], (covariance.f_kind()?, covariance.device()))?;
    let mean = f64::try_from(covariance.f_diagonal(0, 0, 1)?.f_mean(covariance.f_kind()?)?)?;
    let mut damp = 0.01;
    while damp < 1e6 {
        let damped = covariance.f_add(&eye.f_mul_scalar(damp * mean)?)?;
        let inverse = Tensor::f_linalg_inv(&damped)?;
        if f64::try_from(damped.f_mm(&inverse)?.f_sub(&eye)?.f_norm()?)? < 0.05 {
            return Ok((damped, inverse));
        }
        damp *= 2.0;
    }
    Err(Error::config("corda_config", "inputs with a covariance that can be inverted", "none"))
}
