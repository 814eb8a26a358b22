//! AdamW whose moments are kept in 8 bits.

use super::blockwise::Code;
use super::kernel::{self, Factors, Moment};
use super::rule::{
    ParameterGroup, Update, UpdateRule, check_beta, check_not_negative, count_step, object, step_count, zeros_like,
};
use super::{GroupedOptimizer, OptimizerBuilder};
use crate::error::{Error, Result};
use crate::ffi::cuda;
use crate::ffi::optim::{foreach_add, foreach_addcdiv, foreach_addcmul, foreach_mul};
use crate::model::NamedParameter;
use serde_json::{Map, Value, json};
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// AdamW with block-wise 8-bit moments (Dettmers et al., "8-bit optimizers via
/// block-wise quantization", arXiv:2110.02861), the same as bitsandbytes'
/// `AdamW8bit`: same defaults, same formats, same arithmetic.
///
/// Each moment is kept as u8 codes into a dynamic map, signed for the first and
/// unsigned for the second, with an f32 scale for each block of 256 values.
/// Parameters with fewer than `min_8bit_size` values keep f32 moments.
///
/// Values are rounded to the nearest of the map, as bitsandbytes' CUDA kernels
/// do; its CPU kernel rounds through a table and may take a neighbour. On CUDA a
/// step of a parameter is one kernel of this crate's, whose moments may differ from
/// the CPU's in the last bit of f32, and codes of those half-way between two by one.
///
/// State of each parameter: `step`, an i64 scalar; `exp_avg` and `exp_avg_sq`
/// with its shape, u8 or f32; for u8, `exp_avg_absmax` and `exp_avg_sq_absmax`.
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
/// let optimizer = AdamW8bit::builder().lr(2e-4).min_8bit_size(4096).build(model.trainable_parameters())?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub type AdamW8bit = GroupedOptimizer<AdamW8bitRule>;

/// The update of [`AdamW8bit`].
#[derive(Debug, Clone)]
pub struct AdamW8bitRule {
    beta1: f64,
    beta2: f64,
    eps: f64,
    min_8bit_size: usize,
    /// The maps on the device used last: handing them over in each step would
    /// let a device wait for its host.
    codes: Arc<Mutex<Option<Arc<Codes>>>>,
}

impl AdamW8bit {
    /// Settings to start from: lr 1e-3, betas 0.9 and 0.999, eps 1e-8, weight
    /// decay 0.01, 8 bits from 4096 values on.
    pub fn builder() -> OptimizerBuilder<AdamW8bitRule> {
        let rule = AdamW8bitRule { beta1: 0.9, beta2: 0.999, eps: 1e-8, min_8bit_size: 4096, codes: Arc::default() };
        OptimizerBuilder::new(rule, 1e-3, 1e-2)
    }
}

impl OptimizerBuilder<AdamW8bitRule> {
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

    /// How many values a parameter needs for its moments to be kept in 8 bits.
    pub fn min_8bit_size(mut self, values: usize) -> Self {
        self.rule.min_8bit_size = values;
        self
    }
}

/// The maps of both moments.
#[derive(Debug)]
struct Codes {
    signed: Code,
    unsigned: Code,
    device: Device,
}

impl AdamW8bitRule {
    fn codes(&self, device: Device) -> Result<Arc<Codes>> {
        let mut known = self.codes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(codes) = known.as_ref().filter(|codes| codes.device == device) {
            return Ok(Arc::clone(codes));
        }
        let (signed, unsigned) = (Code::dynamic(true, device)?, Code::dynamic(false, device)?);
        Ok(Arc::clone(known.insert(Arc::new(Codes { signed, unsigned, device }))))
    }

    fn update_one(&self, codes: &Codes, update: &mut Update<'_>, group: ParameterGroup) -> Result<()> {
        let step = count_step(&mut update.state[0])? as f64;
        if update.state.len() == 5 && self.step_by_kernel(codes, update, group, step)? {
            return Ok(());
        }
        self.step_by_operators(codes, update, group, step)
    }

    /// Does the step where a kernel can, on CUDA devices.
    fn step_by_kernel(&self, codes: &Codes, update: &mut Update<'_>, group: ParameterGroup, step: f64) -> Result<bool> {
        let Update { param, grad, state } = update;
        let [_, first, first_scales, second, second_scales] = &mut **state else { return Ok(false) };
        if !kernel::fits(param, grad)? {
            return Ok(false);
        }
        let moments = [
            Moment { code: &codes.signed, codes: first, scales: first_scales },
            Moment { code: &codes.unsigned, codes: second, scales: second_scales },
        ];
        let device = param.device();
        let factors = self.factors(group, step);
        Ok(cuda::by_kernel(device, |launcher| kernel::step(launcher, param, grad, moments, factors))?.is_some())
    }

    fn factors(&self, ParameterGroup { lr, weight_decay }: ParameterGroup, step: f64) -> Factors {
        Factors {
            betas: [self.beta1, self.beta2],
            keep: 1.0 - lr * weight_decay,
            rate: -lr / (1.0 - self.beta1.powf(step)),
            correction: (1.0 - self.beta2.powf(step)).sqrt(),
            eps: self.eps,
        }
    }

    fn step_by_operators(
        &self,
        codes: &Codes,
        update: &mut Update<'_>,
        group: ParameterGroup,
        step: f64,
    ) -> Result<()> {
        let ParameterGroup { lr, weight_decay } = group;
        let Update { param, grad, state } = update;
        let grad = grad.f_to_kind(Kind::Float)?;
        let quantized = state.len() == 5;
        let (exp_avg, exp_avg_sq) = match quantized {
            true => (codes.signed.dequantize(&state[1], &state[2])?, codes.unsigned.dequantize(&state[3], &state[4])?),
            false => (state[1].shallow_clone(), state[2].shallow_clone()),
        };
        foreach_mul(&[&exp_avg], self.beta1)?;
        foreach_add(&[&exp_avg], &[&grad], 1.0 - self.beta1)?;
        foreach_mul(&[&exp_avg_sq], self.beta2)?;
        foreach_addcmul(&[&exp_avg_sq], &[&grad], &[&grad], 1.0 - self.beta2)?;

        let (correction1, correction2) = (1.0 - self.beta1.powf(step), (1.0 - self.beta2.powf(step)).sqrt());
        let target = param.f_to_kind(Kind::Float)?;
        if weight_decay > 0.0 {
            foreach_mul(&[&target], 1.0 - lr * weight_decay)?;
        }
        // Two ways to write the same; bitsandbytes rounds differently in each.
        if quantized {
            let root = exp_avg_sq.f_sqrt()?.f_div_scalar(correction2)?.f_add_scalar(self.eps)?;
            foreach_addcdiv(&[&target], &[&exp_avg], &[&root], -lr / correction1)?;
            (state[1], state[2]) = codes.signed.quantize(&exp_avg)?;
            (state[3], state[4]) = codes.unsigned.quantize(&exp_avg_sq)?;
        } else {
            let change = exp_avg.f_div(&exp_avg_sq.f_sqrt()?.f_add_scalar(self.eps * correction2)?)?;
            foreach_add(&[&target], &[&change], -lr * correction2 / correction1)?;
        }
        // Does nothing where the cast made no copy.
        param.f_copy_(&target)?;
        Ok(())
    }
}

impl UpdateRule for AdamW8bitRule {
    const KIND: &'static str = "adamw_8bit";

    fn settings(&self) -> Map<String, Value> {
        object([
            ("betas", json!([self.beta1, self.beta2])),
            ("eps", self.eps.into()),
            ("min_8bit_size", self.min_8bit_size.into()),
        ])
    }

    fn check(&self, _: &[ParameterGroup]) -> Result<()> {
        check_beta("beta1", self.beta1)?;
        check_beta("beta2", self.beta2)?;
        check_not_negative("eps", self.eps)
    }

    fn init(&self, NamedParameter { name, tensor }: &NamedParameter) -> Result<Vec<(&'static str, Tensor)>> {
        if tensor.f_kind()? == Kind::Double {
            return Err(Error::Mismatch {
                name: name.clone(),
                expected: "f32, bf16 or f16 (`AdamW` trains f64)".into(),
                found: "f64".into(),
            });
        }
        let step = ("step", step_count()?);
        if tensor.numel() < self.min_8bit_size.max(1) {
            return Ok(vec![step, ("exp_avg", zeros_like(tensor)?), ("exp_avg_sq", zeros_like(tensor)?)]);
        }
        let codes = || tensor.f_detach()?.f_zeros_like()?.f_to_kind(Kind::Uint8);
        let scales = || Code::zero_scales(tensor.numel() as i64, tensor.device());
        Ok(vec![
            step,
            ("exp_avg", codes()?),
            ("exp_avg_absmax", scales()?),
            ("exp_avg_sq", codes()?),
            ("exp_avg_sq_absmax", scales()?),
        ])
    }

    fn update(&self, batch: &mut [Update<'_>], group: ParameterGroup) -> Result<()> {
        let codes = self.codes(batch[0].param.device())?;
        batch.iter_mut().try_for_each(|update| self.update_one(&codes, update, group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::cuda::Program;
    use crate::ffi::cuda::emulation::Emulation;
    use crate::ffi::cuda::nvrtc::assert_compiles;

    /// The kernel's steps beside those of libtorch's operators, from the same values: parameters within
    /// the rounding of a few f32 operations (and that of their dtype), codes at most one apart.
    #[test]
    fn the_kernel_steps_as_the_operators_do() {
        let rule = AdamW8bit::builder().betas(0.9, 0.99).rule;
        let group = ParameterGroup { lr: 1e-2, weight_decay: 0.1 };
        let codes = rule.codes(Device::Cpu).unwrap();
        for (count, kind) in [(4096, Kind::Float), (5000, Kind::Float), (300, Kind::BFloat16), (1023, Kind::Half)] {
            let make = |tensor: &Tensor| {
                let parameter = NamedParameter { name: "p".into(), tensor: tensor.copy() };
                let rule = AdamW8bit::builder().min_8bit_size(1).rule;
                rule.init(&parameter).unwrap().into_iter().map(|(_, tensor)| tensor).collect::<Vec<_>>()
            };
            let start = Tensor::randn([count], (Kind::Float, Device::Cpu)).to_kind(kind);
            let mut here = (start.copy(), make(&start));
            for step in 1..4 {
                let grad = (Tensor::randn([count], (Kind::Float, Device::Cpu)) * 0.1).to_kind(kind);
                let _ = grad.narrow(0, 0, 256).fill_(0.0);
                // Both from the same state: a code that was rounded the other way would make more differ.
                let mut there = (here.0.copy(), here.1.iter().map(Tensor::copy).collect::<Vec<_>>());
                let mut update = Update { param: here.0.shallow_clone(), grad: grad.copy(), state: &mut here.1 };
                rule.step_by_operators(&codes, &mut update, group, f64::from(step)).unwrap();
                let [_, first, first_scales, second, second_scales] = &mut there.1[..] else { panic!() };
                let moments = [
                    Moment { code: &codes.signed, codes: first, scales: first_scales },
                    Moment { code: &codes.unsigned, codes: second, scales: second_scales },
                ];
                let factors = rule.factors(group, f64::from(step));
                kernel::step(&Emulation, &mut there.0, &grad, moments, factors).unwrap();
                let what = format!("{count} of {kind:?}, step {step}");
                let largest = |found: &Tensor, expected: &Tensor| {
                    let wide = |t: &Tensor| t.to_kind(Kind::Double);
                    f64::try_from((wide(found) - wide(expected)).abs().max()).unwrap()
                };
                let bound = if kind == Kind::Float { 2e-6 } else { 2e-2 };
                assert!(largest(&there.0, &here.0) < bound, "{what}: {}", largest(&there.0, &here.0));
                for codes in [1, 3] {
                    assert!(largest(&there.1[codes], &here.1[codes]) <= 1.0, "{what}");
                    let differ = there.1[codes].ne_tensor(&here.1[codes]).sum(Kind::Int64);
                    assert!(i64::try_from(differ).unwrap() <= count / 500 + 1, "{what}");
                    assert!(largest(&there.1[codes + 1], &here.1[codes + 1]) < 1e-7, "{what}");
                }
            }
        }
    }

    #[test]
    fn the_kernel_compiles() {
        for capability in [80, 90, 120] {
            for dtype in ["f32", "bf16", "f16"] {
                let source = include_str!("../../../csrc/kernels/adamw8bit.cu");
                assert_compiles(&Program { name: "adamw8bit", source, macros: vec![("T", dtype)] }, capability);
            }
        }
    }
}
