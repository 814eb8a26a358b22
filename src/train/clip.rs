//! Limiting the size of gradients.

use crate::error::{Error, Result};
use crate::ffi::optim::foreach_clamp;
use crate::model::NamedParameter;
use tch::Tensor;

/// Scales all gradients by one factor so that their common L2 norm is at most
/// `max_norm`, and answers the norm before that.
///
/// The arithmetic is that of `torch.nn.utils.clip_grad_norm_`. Unlike there, a
/// norm that is NaN or infinite is an error and changes nothing, since scaling
/// by it would turn every gradient, and with the next step every parameter,
/// into NaN. Without any gradient the norm is 0.
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
/// # let parameters = model.trainable_parameters();
/// # model.forward(&Tensor::ones([4, 8], (Kind::Float, Device::Cpu)))?.sum(Kind::Float).f_backward()?;
/// let norm = clip_grad_norm(&parameters, 1e-3)?; // between `backward` and `step`
/// assert!(norm > 1e-3);
/// assert!(clip_grad_norm(&parameters, 1.0)? < 1.1e-3);
/// # Ok::<(), tch_peft::Error>(())
/// ```
///
/// # Errors
/// [`Error::Config`] unless `max_norm` is above 0, [`Error::NotFinite`] with
/// the parameter whose gradient is to blame, and libtorch's.
pub fn clip_grad_norm(parameters: &[NamedParameter], max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::config("max_norm", "a number above 0", max_norm));
    }
    let _no_grad = tch::no_grad_guard();
    let mut grads = Vec::new();
    for parameter in parameters {
        let grad = parameter.tensor.f_grad()?;
        if grad.defined() {
            grads.push((parameter.name.as_str(), grad));
        }
    }
    let Some(device) = grads.first().map(|(_, grad)| grad.device()) else {
        return Ok(0.0);
    };
    let norms = grads.iter().map(|(_, grad)| Ok(grad.f_norm()?.f_to_device(device)?));
    let norms = norms.collect::<Result<Vec<_>>>()?;
    let total = Tensor::f_stack(&norms, 0)?.f_norm()?;
    let value = f64::try_from(&total)?;
    if !value.is_finite() {
        return Err(not_finite(&grads, &norms)?);
    }
    let factor = (total.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(max_norm)?).f_clamp_max(1.0)?;
    for (_, grad) in &mut grads {
        let factor = factor.f_to_device(grad.device())?;
        let _ = grad.f_mul_(&factor)?;
    }
    Ok(value)
}

/// Brings each element of all gradients into `-clip_value..=clip_value`, the
/// same as `torch.nn.utils.clip_grad_value_`. NaN stays NaN.
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
/// # let parameters = model.trainable_parameters();
/// # model.forward(&Tensor::ones([4, 8], (Kind::Float, Device::Cpu)))?.sum(Kind::Float).f_backward()?;
/// clip_grad_value(&parameters, 0.01)?;
/// let largest = parameters.iter().map(|p| f64::try_from(p.tensor.grad().abs().max()).unwrap());
/// assert!(largest.fold(0.0, f64::max) <= 0.010001);
/// # Ok::<(), tch_peft::Error>(())
/// ```
///
/// # Errors
/// [`Error::Config`] unless `clip_value` is above 0, and libtorch's.
pub fn clip_grad_value(parameters: &[NamedParameter], clip_value: f64) -> Result<()> {
    if clip_value.is_nan() || clip_value <= 0.0 {
        return Err(Error::config("clip_value", "a number above 0", clip_value));
    }
    let grads = parameters.iter().map(|parameter| parameter.tensor.f_grad());
    let grads: Vec<_> = grads.filter(|grad| grad.as_ref().map_or(true, Tensor::defined)).collect::<Result<_, _>>()?;
    if grads.is_empty() { Ok(()) } else { foreach_clamp(&grads, -clip_value, clip_value) }
}

/// The error for a norm that is not finite: the first gradient that isn't
/// either, or else the sum of finite ones.
fn not_finite(grads: &[(&str, Tensor)], norms: &[Tensor]) -> Result<Error> {
    let mut name = "the norm of all gradients".to_string();
    for ((parameter, _), norm) in grads.iter().zip(norms) {
        if !f64::try_from(norm)?.is_finite() {
            name = format!("the gradient of {parameter}");
            break;
        }
    }
    let remedy = "leave this step out with `zero_grad`, or lower the learning rate".into();
    Ok(Error::NotFinite { name, remedy })
}
