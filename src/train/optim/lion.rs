//! Steps of the sign of an interpolated momentum.

use super::rule::{ParameterGroup, Update, UpdateRule, check_beta, object, zeros_like};
use super::{GroupedOptimizer, OptimizerBuilder};
use crate::error::Result;
use crate::ffi::optim::{foreach_add, foreach_mul};
use crate::model::NamedParameter;
use serde_json::{Map, Value, json};
use tch::Tensor;

/// Lion (Chen et al., "Symbolic discovery of optimization algorithms",
/// arXiv:2302.06675, algorithm 2), in the arithmetic of bitsandbytes' 32-bit
/// `Lion`. With g the gradient, m the momentum and p the parameter:
///
/// ```text
/// p = p * (1 - lr * weight_decay)
/// p = p - lr * sign(beta1 * m + (1 - beta1) * g)
/// m = beta2 * m + (1 - beta2) * g
/// ```
///
/// State of each parameter: `exp_avg` with its shape, f32 (f64 for f64).
pub type Lion = GroupedOptimizer<LionRule>;

/// The update of [`Lion`].
#[derive(Debug, Clone)]
pub struct LionRule {
    beta1: f64,
    beta2: f64,
}

impl Lion {
    /// Settings to start from: lr 1e-4, betas 0.9 and 0.99, no weight decay.
    /// The paper advises a learning rate 3 to 10 times below AdamW's and a
    /// weight decay 3 to 10 times above.
    pub fn builder() -> OptimizerBuilder<LionRule> {
        OptimizerBuilder::new(LionRule { beta1: 0.9, beta2: 0.99 }, 1e-4, 0.0)
    }
}

impl OptimizerBuilder<LionRule> {
    /// The share of the momentum in a step, and the momentum's decay rate,
    /// each in `0..1`.
    pub fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.rule.beta1, self.rule.beta2) = (beta1, beta2);
        self
    }
}

impl UpdateRule for LionRule {
    const KIND: &'static str = "lion";

    fn settings(&self) -> Map<String, Value> {
        object([("betas", json!([self.beta1, self.beta2]))])
    }

    fn check(&self, _: &[ParameterGroup]) -> Result<()> {
        check_beta("beta1", self.beta1)?;
        check_beta("beta2", self.beta2)
    }

    fn init(&self, parameter: &NamedParameter) -> Result<Vec<(&'static str, Tensor)>> {
        Ok(vec![("exp_avg", zeros_like(&parameter.tensor)?)])
    }

    fn update(&self, batch: &mut [Update<'_>], ParameterGroup { lr, weight_decay }: ParameterGroup) -> Result<()> {
        let kind = batch[0].state[0].f_kind()?;
        let cast = |tensor: &Tensor| tensor.f_to_kind(kind);
        let grads = batch.iter().map(|update| cast(&update.grad)).collect::<Result<Vec<_>, _>>()?;
        let params = batch.iter().map(|update| cast(&update.param)).collect::<Result<Vec<_>, _>>()?;
        let steps = batch.iter().map(|update| update.state[0].f_mul_scalar(self.beta1));
        let mut steps = steps.collect::<Result<Vec<_>, _>>()?;
        let momenta: Vec<_> = batch.iter().map(|update| &update.state[0]).collect();

        if weight_decay > 0.0 {
            foreach_mul(&params, 1.0 - lr * weight_decay)?;
        }
        foreach_add(&steps, &grads, 1.0 - self.beta1)?;
        for step in &mut steps {
            let _ = step.f_sign_()?;
        }
        foreach_add(&params, &steps, -lr)?;
        foreach_mul(&momenta, self.beta2)?;
        foreach_add(&momenta, &grads, 1.0 - self.beta2)?;
        for (update, param) in batch.iter_mut().zip(&params) {
            // Does nothing where the cast made no copy.
            update.param.f_copy_(param)?;
        }
        Ok(())
    }
}
