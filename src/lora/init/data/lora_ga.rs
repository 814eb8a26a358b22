//! LoRA-GA (arXiv:2407.05000): A and B from the singular vectors of the
//! weight's gradient, so that the first step is the one that full training
//! would take. s·B·A is taken out of the weight.

use super::super::decompose::{Pair, randomised, spectral_norm};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// PEFT's `lora_ga_config`.
///
/// ```
/// use tch_peft::{InitLoraWeights, LoraConfig, LoraGaConfig, LoraGaScale};
///
/// let config = LoraConfig::builder()
///     .target_modules(["q_proj"])
///     .init_lora_weights(InitLoraWeights::LoraGa)
///     .lora_ga_config(LoraGaConfig { scale: LoraGaScale::GdScale, ..LoraGaConfig::default() })
///     .build()?; // for `LoraModel::wrap_with_data`
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraGaConfig {
    /// Which singular vectors A and B take.
    pub direction: LoraGaDirection,
    /// How A and B are scaled.
    pub scale: LoraGaScale,
    /// γ of the `stable` scale.
    pub stable_gamma: f64,
}

impl Default for LoraGaConfig {
    fn default() -> Self {
        LoraGaConfig { direction: LoraGaDirection::ArB2r, scale: LoraGaScale::Stable, stable_gamma: 16.0 }
    }
}

/// Which of the first 2r singular vectors of the gradient A and B take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoraGaDirection {
    /// A the odd ones, B the even ones.
    ArBr,
    /// A the last r, B the first r.
    A2rBr,
    /// A the first r, B the last r.
    #[default]
    ArB2r,
    /// The same r for both, drawn from libtorch's default generator.
    #[serde(rename = "random")]
    Random,
}

/// How LoRA-GA's A and B are scaled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraGaScale {
    /// B · out^¼ / √γ.
    #[default]
    Stable,
    /// B · σ₁(W) / S_B, the first singular value that B took.
    WeightSvd,
    /// A / s and B / s.
    GdScale,
    /// As they are.
    Unit,
}

/// A (r, in) and B (out, r) from W and its gradient, both (out, in).
pub(in crate::lora::init) fn factors(
    w: &Tensor,
    gradient: &Tensor,
    config: LoraGaConfig,
    r: i64,
    s: f64,
) -> Result<Pair> {
    let smaller = w.size().into_iter().min().unwrap_or(0);
    if 2 * r > smaller {
        return Err(Error::config("r", format!("at most {} for \"lora_ga\" on this layer", smaller / 2), r));
    }
    let gradient = gradient.f_to_kind(w.f_kind()?)?.f_to_device(w.device())?;
    let (u, singular, v) = randomised(&gradient, smaller.min(4 * r), 4)?;
    let list = |numbers: Vec<i64>| -> Result<Tensor> { Ok(Tensor::f_from_slice(&numbers)?.f_to_device(w.device())?) };
    let (of_a, of_b) = match config.direction {
        LoraGaDirection::ArBr => (list((0..r).map(|i| 2 * i + 1).collect())?, list((0..r).map(|i| 2 * i).collect())?),
        LoraGaDirection::A2rBr => (list((r..2 * r).collect())?, list((0..r).collect())?),
        LoraGaDirection::ArB2r => (list((0..r).collect())?, list((r..2 * r).collect())?),
        LoraGaDirection::Random => {
            let drawn = Tensor::f_randperm(2 * r, (Kind::Int64, w.device()))?.f_narrow(0, 0, r)?;
            (drawn.shallow_clone(), drawn)
        }
    };
    let mut a = v.f_index_select(1, &of_a)?.f_tr()?.f_contiguous()?;
    let taken = singular.f_index_select(0, &of_b)?;
    let mut b = u.f_index_select(1, &of_b)?.f_mul(&taken)?;
    match config.scale {
        LoraGaScale::Stable => {
            b = b.f_mul_scalar((w.size()[0] as f64).powf(0.25) / config.stable_gamma.sqrt())?;
        }
        LoraGaScale::WeightSvd => {
            let first = f64::try_from(taken.f_get(0)?)?;
            if first > 0.0 {
                b = b.f_mul_scalar(spectral_norm(w)? / first)?;
            }
        }
        LoraGaScale::GdScale => (a, b) = (a.f_div_scalar(s)?, b.f_div_scalar(s)?),
        LoraGaScale::Unit => {}
    }
    Ok((a, b))
}
