//! DoRA (arXiv:2402.09353): W' = (m / n) · (W + ΔW), where n is the norm of
//! each output row of W + ΔW, and m is trained.
//!
//! n is taken without the product B · A, of which only r×r and out×r parts are
//! needed. With Δ = s · B · A, row by row:
//!
//! ```text
//! n² = ‖W‖² + 2s · ⟨W·Aᵀ, B⟩ + s² · ⟨B·(A·Aᵀ), B⟩
//! ```
//!
//! ‖W‖² is taken once per weight, as it is frozen. As in the paper (section 4.3)
//! no gradient flows through n.

use super::layer::{Factored, LoraLayer, OutputChannels};
use crate::base::Adapter;
use crate::error::Result;
use crate::ffi::hook::Operator;
use crate::ffi::shared::SharedTensor;
use crate::quant::frozen::frozen;
use crate::quant::{LinearMap, PackedWeight};
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Kind, Tensor};

/// DoRA over the LoRA of any kind of layer.
#[derive(Debug)]
pub(super) struct Dora<L> {
    inner: L,
    /// m, in the shape that PEFT saves.
    magnitude: SharedTensor,
    norm: Norm,
}

/// The norm n, and the part of it that doesn't change.
#[derive(Debug, Default)]
struct Norm {
    /// ‖W‖² (out) of the weight it was taken of.
    base: Mutex<Option<(Arc<dyn PackedWeight>, SharedTensor)>>,
}

impl Norm {
    fn base_squared(&self, weight: &Arc<dyn PackedWeight>, map: &LinearMap, kind: Kind) -> Result<Tensor> {
        let mut known = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, norm)) = known.as_ref().filter(|(of, _)| Arc::ptr_eq(of, weight)) {
            return Ok(norm.get());
        }
        let norm = map.row_norms_squared(kind)?;
        *known = Some((Arc::clone(weight), SharedTensor::new(norm.shallow_clone())));
        Ok(norm)
    }

    /// n (out), without gradient.
    fn of(&self, inner: &impl Factored, weight: &Arc<dyn PackedWeight>) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let (factors, map) = (inner.factors(), LinearMap::new(weight, inner.transposed()));
        let (a, b, s) = (factors.a().f_flatten(1, -1)?, factors.b().f_flatten(1, -1)?, factors.scaling());
        let base = self.base_squared(weight, &map, a.f_kind()?)?;
        // 2s·W·Aᵀ + s²·B·A·Aᵀ, (out, r).
        let gram = a.f_mm(&a.f_tr()?)?.f_mul_scalar_(s * s)?;
        let inner = map.apply(&a.f_mul_scalar(2.0 * s)?, None)?.f_tr()?.f_addmm(&b, &gram)?;
        let mut squared = inner.f_mul(&b)?.f_sum_dim_intlist([1i64].as_slice(), false, None)?.f_add_(&base)?;
        Ok(squared.f_clamp_min_(0.0)?.f_sqrt_()?)
    }
}

impl<L: Factored> Dora<L> {
    /// m starts at the norm of W + ΔW, so that the model starts as LoRA's.
    pub(super) fn new(inner: L, weight: &Arc<dyn PackedWeight>) -> Result<Self> {
        let norm = Norm::default();
        let mut magnitude = norm.of(&inner, weight)?;
        if matches!(inner.output_channels(), OutputChannels::Second) {
            magnitude = inner.output_channels().broadcast(&magnitude, weight.sizes().len())?;
        }
        let magnitude = SharedTensor::new(magnitude.f_set_requires_grad(true)?);
        Ok(Dora { inner, magnitude, norm })
    }

    /// m / n (out), with the gradient of m.
    fn gain(&self, weight: &Arc<dyn PackedWeight>) -> Result<Tensor> {
        Ok(self.magnitude.get().f_flatten(0, -1)?.f_div(&self.norm.of(&self.inner, weight)?)?)
    }
}

impl<L: Factored> Adapter for Dora<L> {
    fn active(&self) -> bool {
        self.inner.active()
    }

    /// (m/n − 1) · W·x + (m/n) · s · B·A·x, both of the dropped x; the base's
    /// bias is not scaled.
    fn addition(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        if !self.inner.takes_part(operator)? {
            return Ok(None);
        }
        let dropped = self.inner.factors().dropped(operator)?;
        let operator = match &dropped {
            Some(x) => operator.with_input(x).without_bias(),
            None => operator.without_bias(),
        };
        let base = frozen(weight, &operator)?;
        let delta = self.inner.product(&operator)?;
        let gain = self.inner.output_channels().broadcast(&self.gain(weight)?, base.dim())?;
        Ok(Some(base.f_add(&delta)?.f_mul(&gain)?.f_sub(&base)?))
    }

    /// Without dropout (m/n) · (W·x + s · B·A·x) + bias: one adapted operator.
    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        if !self.inner.takes_part(operator)? {
            return frozen(weight, operator);
        }
        if self.inner.factors().drops(operator) {
            let base = frozen(weight, operator)?;
            let kind = base.f_kind()?;
            return match self.addition(weight, operator)? {
                Some(addition) => Ok(base.f_add(&addition)?.f_to_kind(kind)?),
                None => Ok(base),
            };
        }
        let sum = self.inner.apply(weight, &operator.without_bias())?;
        let (kind, gain, channels) = (sum.f_kind()?, self.gain(weight)?, self.inner.output_channels());
        let gain_kind = gain.f_kind()?;
        let gain = channels.broadcast(&gain, sum.dim())?;
        let y = match operator.bias() {
            None => sum.f_mul(&gain)?,
            Some(bias) => {
                let bias = channels.broadcast(&bias.f_to_kind(gain_kind)?, sum.dim())?;
                bias.f_addcmul(&sum.f_to_kind(gain_kind)?, &gain)?
            }
        };
        Ok(y.f_to_kind(kind)?)
    }

    /// (m/n) · (W + ΔW) − W, taken in the adapter's dtype.
    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        let wide = self.inner.factors().a().f_kind()?;
        let base = match weight.as_dense() {
            Some(dense) => dense.f_to_kind(wide)?,
            None => weight.dequantize(wide)?,
        };
        let mut gain = self.gain(weight)?;
        if !self.inner.transposed() {
            let mut shape = vec![1; base.dim()];
            shape[0] = gain.size1()?;
            gain = gain.f_view(shape.as_slice())?;
        }
        Ok(base.f_add(&self.inner.delta(weight, wide)?)?.f_mul(&gain)?.f_sub(&base)?.f_to_kind(kind)?)
    }
}

impl<L: Factored> LoraLayer for Dora<L> {
    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        let mut tensors = self.inner.tensors();
        tensors.push(("lora_magnitude_vector", self.magnitude.get()));
        tensors
    }

    fn scaling(&self) -> f64 {
        self.inner.scaling()
    }

    fn set_scaling(&self, scaling: f64) {
        self.inner.set_scaling(scaling);
    }
}
