//! Stochastic gradient descent with momentum.

use super::rule::{ParameterGroup, Update, UpdateRule, check_not_negative, count_step, object, step_count};
use super::{GroupedOptimizer, OptimizerBuilder};
use crate::error::{Error, Result};
use crate::ffi::optim::{SgdHyper, foreach_add, fused_sgd};
use crate::model::NamedParameter;
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

/// Stochastic gradient descent, the same as `torch.optim.SGD`, bit by bit:
/// with `fused=True` for f32 and f64, and with the default for bf16 and f16,
/// where libtorch 2.11's fused step on the CPU loses the momentum. With g the
/// gradient and p the parameter:
///
/// ```text
/// g = g + weight_decay * p
/// b = g in the first step, else momentum * b + (1 - dampening) * g
/// p = p - lr * (g + momentum * b  if nesterov, else b)
/// ```
///
/// State of each parameter: `step`, an i64 scalar, and, with momentum,
/// `momentum_buffer` with the parameter's shape and dtype.
pub type Sgd = GroupedOptimizer<SgdRule>;

/// The update of [`Sgd`].
#[derive(Debug, Clone)]
pub struct SgdRule {
    momentum: f64,
    dampening: f64,
    nesterov: bool,
}

impl Sgd {
    /// Settings to start from: lr 1e-3, no momentum, no weight decay.
    pub fn builder() -> OptimizerBuilder<SgdRule> {
        OptimizerBuilder::new(SgdRule { momentum: 0.0, dampening: 0.0, nesterov: false }, 1e-3, 0.0)
    }
}

impl OptimizerBuilder<SgdRule> {
    /// How much of the momentum stays from one step to the next; 0 for none.
    pub fn momentum(mut self, momentum: f64) -> Self {
        self.rule.momentum = momentum;
        self
    }

    /// How much of the gradient the momentum leaves out.
    pub fn dampening(mut self, dampening: f64) -> Self {
        self.rule.dampening = dampening;
        self
    }

    /// Nesterov's momentum, which needs a momentum and no dampening.
    pub fn nesterov(mut self, on: bool) -> Self {
        self.rule.nesterov = on;
        self
    }
}

impl UpdateRule for SgdRule {
    const KIND: &'static str = "sgd";

    fn settings(&self) -> Map<String, Value> {
        let SgdRule { momentum, dampening, nesterov } = *self;
        object([("momentum", momentum.into()), ("dampening", dampening.into()), ("nesterov", nesterov.into())])
    }

    fn check(&self, _: &[ParameterGroup]) -> Result<()> {
        check_not_negative("momentum", self.momentum)?;
        if !self.dampening.is_finite() {
            return Err(Error::config("dampening", "a finite number", self.dampening));
        }
        if self.nesterov && (self.momentum == 0.0 || self.dampening != 0.0) {
            let found = format!("true with momentum {} and dampening {}", self.momentum, self.dampening);
            return Err(Error::config("nesterov", "a momentum above 0 and dampening 0 with it", found));
        }
        Ok(())
    }

    fn init(&self, parameter: &NamedParameter) -> Result<Vec<(&'static str, Tensor)>> {
        let mut state = vec![("step", step_count()?)];
        if self.momentum > 0.0 {
            state.push(("momentum_buffer", parameter.tensor.f_detach()?.f_zeros_like()?));
        }
        Ok(state)
    }

    fn update(&self, batch: &mut [Update<'_>], ParameterGroup { lr, weight_decay }: ParameterGroup) -> Result<()> {
        let SgdRule { momentum, dampening, nesterov } = *self;
        // The first step of a parameter is another; one call is for either.
        let mut first = Vec::new();
        let mut later = Vec::new();
        for update in batch {
            let step = count_step(&mut update.state[0])?;
            (if step == 1 { &mut first } else { &mut later }).push(update);
        }
        for (is_first_step, batch) in [(true, first), (false, later)] {
            let hyper = SgdHyper { weight_decay, momentum, lr, dampening, nesterov, is_first_step };
            let params: Vec<_> = batch.iter().map(|update| &update.param).collect();
            let grads: Vec<_> = batch.iter().map(|update| &update.grad).collect();
            let buffers: Vec<_> = batch.iter().flat_map(|update| &update.state[1..]).collect();
            match params.first().map(|param| param.f_kind()).transpose()? {
                None => {}
                Some(Kind::Float | Kind::Double) => fused_sgd(&params, &grads, &buffers, hyper)?,
                Some(_) => plain_sgd(&params, &grads, &buffers, hyper)?,
            }
        }
        Ok(())
    }
}

/// The step in the order of torch's own, rounding after each operation.
fn plain_sgd(params: &[&Tensor], grads: &[&Tensor], buffers: &[&Tensor], hyper: SgdHyper) -> Result<()> {
    let SgdHyper { weight_decay, momentum, lr, dampening, nesterov, is_first_step } = hyper;
    let grads = grads.iter().map(|grad| grad.f_detach_copy()).collect::<Result<Vec<_>, _>>()?;
    if weight_decay != 0.0 {
        foreach_add(&grads, params, weight_decay)?;
    }
    if buffers.is_empty() {
        return foreach_add(params, &grads, -lr);
    }
    if is_first_step {
        for (buffer, grad) in buffers.iter().zip(&grads) {
            buffer.shallow_clone().f_copy_(grad)?;
        }
    } else {
        // Times an f64 scalar tensor: a plain scalar would be rounded to the
        // buffer's dtype first.
        let momentum = Tensor::f_from_slice(&[momentum])?.f_squeeze()?;
        for buffer in buffers {
            let _ = buffer.shallow_clone().f_mul_(&momentum)?;
        }
        foreach_add(buffers, &grads, 1.0 - dampening)?;
    }
    if nesterov {
        foreach_add(&grads, buffers, momentum)?;
        return foreach_add(params, &grads, -lr);
    }
    foreach_add(params, buffers, -lr)
}
