//! Second moments in the form of two vectors.

use super::rule::{
    ParameterGroup, Update, UpdateRule, check_beta, check_not_negative, compute_kind, count_step, object, step_count,
    zeros_like,
};
use super::{GroupedOptimizer, OptimizerBuilder};
use crate::error::{Error, Result};
use crate::ffi::optim::{foreach_add, foreach_mul};
use crate::model::NamedParameter;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

/// Adafactor (Shazeer and Stern, arXiv:1804.04235), the same as transformers'
/// `Adafactor`: same defaults, same arithmetic. (`torch.optim.Adafactor` is
/// another variant.)
///
/// By default the step size is relative: `min(1e-2, 1 / sqrt(step))` times the
/// root mean square of the parameter. To use a learning rate of one's own, set
/// `relative_step(false)`; for fine-tuning also `scale_parameter(false)`.
///
/// State of each parameter: `step`, an i64 scalar; `exp_avg_sq_row` and
/// `exp_avg_sq_col`, without the last and the last but one dimension, or
/// `exp_avg_sq` for parameters of one dimension; `exp_avg` if `beta1` is set.
/// All are f32 (f64 for f64).
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
/// let optimizer = Adafactor::builder()
///     .lr(1e-4)
///     .relative_step(false)
///     .scale_parameter(false)
///     .build(model.trainable_parameters())?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub type Adafactor = GroupedOptimizer<AdafactorRule>;

/// The update of [`Adafactor`].
#[derive(Debug, Clone)]
pub struct AdafactorRule {
    eps: (f64, f64),
    clip_threshold: f64,
    decay_rate: f64,
    beta1: Option<f64>,
    scale_parameter: bool,
    relative_step: bool,
    warmup_init: bool,
}

impl Adafactor {
    /// Settings to start from: eps 1e-30 and 1e-3, clip threshold 1, decay rate
    /// -0.8, no first moment, no weight decay, relative steps scaled by the
    /// parameter.
    pub fn builder() -> OptimizerBuilder<AdafactorRule> {
        let rule = AdafactorRule {
            eps: (1e-30, 1e-3),
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
        };
        OptimizerBuilder::new(rule, 1.0, 0.0)
    }
}

impl OptimizerBuilder<AdafactorRule> {
    /// Added to the squared gradient; and the least scale of a parameter.
    pub fn eps(mut self, eps1: f64, eps2: f64) -> Self {
        self.rule.eps = (eps1, eps2);
        self
    }

    /// The largest root mean square of an update before the learning rate.
    pub fn clip_threshold(mut self, threshold: f64) -> Self {
        self.rule.clip_threshold = threshold;
        self
    }

    /// The exponent c of the second moment's decay rate `1 - step^c`, below 0.
    pub fn decay_rate(mut self, exponent: f64) -> Self {
        self.rule.decay_rate = exponent;
        self
    }

    /// Keeps a first moment with this decay rate, in `0..1`.
    pub fn beta1(mut self, beta1: f64) -> Self {
        self.rule.beta1 = Some(beta1);
        self
    }

    /// Whether the learning rate is multiplied by the root mean square of the
    /// parameter.
    pub fn scale_parameter(mut self, on: bool) -> Self {
        self.rule.scale_parameter = on;
        self
    }

    /// Whether the step size comes from the count of steps. The learning rate
    /// must be 1 then; a schedule's factor still multiplies it.
    pub fn relative_step(mut self, on: bool) -> Self {
        self.rule.relative_step = on;
        self
    }

    /// Whether relative steps begin at 1e-6 and grow with the count of steps.
    pub fn warmup_init(mut self, on: bool) -> Self {
        self.rule.warmup_init = on;
        self
    }
}

impl AdafactorRule {
    /// The learning rate of a step, as a scalar where it depends on the parameter.
    fn step_size(&self, param: &Tensor, lr: f64, step: i64) -> Result<Tensor> {
        let lr = if self.relative_step {
            let least = if self.warmup_init { 1e-6 * step as f64 } else { 1e-2 };
            lr * least.min(1.0 / (step as f64).sqrt())
        } else {
            lr
        };
        if self.scale_parameter {
            return Ok(root_mean_square(param)?.f_clamp_min(self.eps.1)?.f_mul_scalar(lr)?);
        }
        Ok(Tensor::f_from_slice(&[lr])?.f_squeeze()?)
    }

    fn update_one(&self, update: &mut Update<'_>, lr: f64, weight_decay: f64) -> Result<()> {
        let kind = compute_kind(&update.param)?;
        let (grad, mut param) = (update.grad.f_to_kind(kind)?, update.param.f_to_kind(kind)?);
        let [step, moments @ ..] = &mut *update.state else { return Ok(()) };
        let step = count_step(step)?;
        let lr = self.step_size(&param, lr, step)?;
        let beta2 = 1.0 - (step as f64).powf(self.decay_rate);

        let squares = grad.f_square()?.f_add_scalar(self.eps.0)?;
        let factors = if grad.dim() >= 2 {
            let [row, column] =
                [squares.f_mean_dim(-1, false, None::<Kind>)?, squares.f_mean_dim(-2, false, None::<Kind>)?];
            foreach_mul(&moments[..2], beta2)?;
            foreach_add(&moments[..2], &[row, column], 1.0 - beta2)?;
            let mean = moments[0].f_mean_dim(-1, true, None::<Kind>)?;
            let row = moments[0].f_div(&mean)?.f_rsqrt()?.f_unsqueeze(-1)?;
            row.f_mul(&moments[1].f_unsqueeze(-2)?.f_rsqrt()?)?
        } else {
            foreach_mul(&moments[..1], beta2)?;
            foreach_add(&moments[..1], &[squares], 1.0 - beta2)?;
            moments[0].f_rsqrt()?
        };
        let mut change = factors.f_mul(&grad)?;
        let excess = root_mean_square(&change)?.f_div_scalar(self.clip_threshold)?.f_clamp_min(1.0)?;
        let _ = change.f_div_(&excess)?.f_mul_(&lr)?;
        if let (Some(beta1), Some(exp_avg)) = (self.beta1, moments.last()) {
            foreach_mul(&[exp_avg], beta1)?;
            foreach_add(&[exp_avg], &[&change], 1.0 - beta1)?;
            change = exp_avg.shallow_clone();
        }
        if weight_decay != 0.0 {
            let rate = lr.f_mul_scalar(-weight_decay)?;
            match rate.device() {
                Device::Cpu => foreach_add(&[&param], &[&param], f64::try_from(&rate)?)?,
                // Reading it would wait for the device.
                _ => drop(param.f_addcmul_(&param.shallow_clone(), &rate)?),
            }
        }
        let _ = param.f_sub_(&change)?;
        // Does nothing where the cast made no copy.
        update.param.f_copy_(&param)?;
        Ok(())
    }
}

fn root_mean_square(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_norm()?.f_div_scalar((tensor.numel() as f64).sqrt())?)
}

impl UpdateRule for AdafactorRule {
    const KIND: &'static str = "adafactor";

    fn settings(&self) -> Map<String, Value> {
        object([
            ("eps", json!([self.eps.0, self.eps.1])),
            ("clip_threshold", self.clip_threshold.into()),
            ("decay_rate", self.decay_rate.into()),
            ("beta1", json!(self.beta1)),
            ("scale_parameter", self.scale_parameter.into()),
            ("relative_step", self.relative_step.into()),
            ("warmup_init", self.warmup_init.into()),
        ])
    }

    fn check(&self, groups: &[ParameterGroup]) -> Result<()> {
        check_not_negative("eps1", self.eps.0)?;
        check_not_negative("eps2", self.eps.1)?;
        if self.clip_threshold.is_nan() || self.clip_threshold <= 0.0 {
            return Err(Error::config("clip_threshold", "a number above 0", self.clip_threshold));
        }
        if !self.decay_rate.is_finite() || self.decay_rate >= 0.0 {
            return Err(Error::config("decay_rate", "a finite number below 0", self.decay_rate));
        }
        if let Some(beta1) = self.beta1 {
            check_beta("beta1", beta1)?;
        }
        if self.warmup_init && !self.relative_step {
            return Err(Error::config("warmup_init", "relative_step with it", "true without"));
        }
        match groups.iter().find(|group| self.relative_step && group.lr != 1.0) {
            Some(group) => Err(Error::config("lr", "1, or relative_step(false) with it", group.lr)),
            None => Ok(()),
        }
    }

    fn init(&self, NamedParameter { tensor, .. }: &NamedParameter) -> Result<Vec<(&'static str, Tensor)>> {
        let options = (compute_kind(tensor)?, tensor.device());
        let mut state = vec![("step", step_count()?)];
        match tensor.size().as_slice() {
            [outer @ .., rows, columns] => {
                let [row, column] = [[outer, &[*rows]].concat(), [outer, &[*columns]].concat()];
                state.push(("exp_avg_sq_row", Tensor::f_zeros(row, options)?));
                state.push(("exp_avg_sq_col", Tensor::f_zeros(column, options)?));
            }
            _ => state.push(("exp_avg_sq", zeros_like(tensor)?)),
        }
        if self.beta1.is_some() {
            state.push(("exp_avg", zeros_like(tensor)?));
        }
        Ok(state)
    }

    fn update(&self, batch: &mut [Update<'_>], ParameterGroup { lr, weight_decay }: ParameterGroup) -> Result<()> {
        batch.iter_mut().try_for_each(|update| self.update_one(update, lr, weight_decay))
    }
}
