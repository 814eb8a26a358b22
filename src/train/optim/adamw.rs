//! Adam with decoupled weight decay.

use super::rule::{ParameterGroup, Update, UpdateRule, check_beta, check_not_negative, object};
use super::{GroupedOptimizer, OptimizerBuilder};
use crate::error::Result;
use crate::ffi::adamw::{Hyper, fused_step};
use crate::ffi::optim::foreach_add_scalar;
use crate::model::NamedParameter;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

/// Adam with decoupled weight decay (Loshchilov and Hutter, "Decoupled weight
/// decay regularization", 2019), the same as `torch.optim.AdamW(fused=True)`:
/// same defaults, same arithmetic, bit by bit.
///
/// State of each parameter: `exp_avg` and `exp_avg_sq` with the parameter's
/// shape and dtype, and `step`, an f32 scalar.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let dir = tempfile::tempdir().unwrap();
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let mut model = LoraModel::wrap(Base::new(vs, net), config)?;
/// # let mut optimizer = AdamW::builder().build(model.trainable_parameters())?;
/// # let (schedule, mut sampler) = (Schedule::constant(), Sampler::new(100, 10, 0)?);
/// let mut optimizer = AdamW::builder()
///     .lr(2e-4)
///     .betas(0.9, 0.95)
///     .weight_decay(0.0)
///     .build(model.trainable_parameters())?;
/// model.forward(&Tensor::ones([4, 8], (Kind::Float, Device::Cpu)))?.sum(Kind::Float).f_backward()?;
/// optimizer.step()?;
/// optimizer.zero_grad()?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub type AdamW = GroupedOptimizer<AdamWRule>;

/// Settings of an [`AdamW`], with torch's defaults.
pub type AdamWBuilder = OptimizerBuilder<AdamWRule>;

/// The update of [`AdamW`].
#[derive(Debug, Clone)]
pub struct AdamWRule {
    beta1: f64,
    beta2: f64,
    eps: f64,
}

impl AdamW {
    /// Settings to start from: lr 1e-3, betas 0.9 and 0.999, eps 1e-8, weight
    /// decay 0.01, by which each step multiplies a parameter by
    /// `1 - lr * weight_decay`.
    pub fn builder() -> AdamWBuilder {
        OptimizerBuilder::new(AdamWRule { beta1: 0.9, beta2: 0.999, eps: 1e-8 }, 1e-3, 1e-2)
    }
}

impl AdamWBuilder {
    /// The decay rates of the first and the second moment, each in `0..1`.
    pub fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.rule.beta1, self.rule.beta2) = (beta1, beta2);
        self
    }

    /// Added to the root of the second moment.
    pub fn eps(mut self, eps: f64) -> Self {
        self.rule.eps = eps;
        self
    }
}

impl UpdateRule for AdamWRule {
    const KIND: &'static str = "adamw";

    fn settings(&self) -> Map<String, Value> {
        object([("betas", json!([self.beta1, self.beta2])), ("eps", self.eps.into())])
    }

    fn check(&self, _: &[ParameterGroup]) -> Result<()> {
        check_beta("beta1", self.beta1)?;
        check_beta("beta2", self.beta2)?;
        check_not_negative("eps", self.eps)
    }

    fn init(&self, NamedParameter { tensor, .. }: &NamedParameter) -> Result<Vec<(&'static str, Tensor)>> {
        let zeros = || tensor.f_detach()?.f_zeros_like();
        // On the parameter's device and of this dtype, as the fused step wants it.
        let step = Tensor::f_zeros([], (Kind::Float, tensor.device()))?;
        Ok(vec![("exp_avg", zeros()?), ("exp_avg_sq", zeros()?), ("step", step)])
    }

    fn update(&self, batch: &mut [Update<'_>], ParameterGroup { lr, weight_decay }: ParameterGroup) -> Result<()> {
        let steps: Vec<_> = batch.iter().map(|update| &update.state[2]).collect();
        foreach_add_scalar(&steps, 1.0)?;
        let AdamWRule { beta1, beta2, eps } = *self;
        fused_step(
            &batch.iter().map(|update| &update.param).collect::<Vec<_>>(),
            &batch.iter().map(|update| &update.grad).collect::<Vec<_>>(),
            &batch.iter().map(|update| &update.state[0]).collect::<Vec<_>>(),
            &batch.iter().map(|update| &update.state[1]).collect::<Vec<_>>(),
            &steps,
            Hyper { lr, beta1, beta2, weight_decay, eps },
        )
    }
}
