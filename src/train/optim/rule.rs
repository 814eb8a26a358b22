//! What tells one optimizer from another.

use crate::error::{Error, Result};
use crate::model::NamedParameter;
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

/// How a gradient changes a parameter and its state. Groups, schedules, names
/// and saving are those of [`GroupedOptimizer`](super::GroupedOptimizer).
///
/// ```
/// use serde_json::{Map, Value};
/// use tch::Tensor;
/// use tch_peft::{GroupedOptimizer, NamedParameter, OptimizerBuilder, ParameterGroup, Result, Update, UpdateRule};
///
/// /// Steps of the gradient's sign, which need no state.
/// #[derive(Debug)]
/// struct SignSgd;
///
/// impl UpdateRule for SignSgd {
///     const KIND: &'static str = "sign_sgd";
///
///     fn settings(&self) -> Map<String, Value> {
///         Map::new()
///     }
///
///     fn check(&self, _groups: &[ParameterGroup]) -> Result<()> {
///         Ok(())
///     }
///
///     fn init(&self, _parameter: &NamedParameter) -> Result<Vec<(&'static str, Tensor)>> {
///         Ok(Vec::new())
///     }
///
///     fn update(&self, batch: &mut [Update<'_>], group: ParameterGroup) -> Result<()> {
///         for Update { param, grad, .. } in batch {
///             let _ = param.f_sub_(&grad.f_sign()?.f_mul_scalar(group.lr)?)?;
///         }
///         Ok(())
///     }
/// }
///
/// fn build(parameters: Vec<NamedParameter>) -> Result<GroupedOptimizer<SignSgd>> {
///     OptimizerBuilder::new(SignSgd, 1e-3, 0.0).build(parameters)
/// }
/// ```
pub trait UpdateRule {
    /// The name under which states are saved, such as `adamw`.
    const KIND: &'static str;

    /// The settings besides the groups', as they go into a checkpoint.
    fn settings(&self) -> Map<String, Value>;

    /// Refuses settings out of range. Learning rates and weight decays are
    /// known to be finite and not negative.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    fn check(&self, groups: &[ParameterGroup]) -> Result<()>;

    /// The state of a parameter before the first step: each tensor with its
    /// name. All that changes from step to step has to be in it.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a parameter that the rule can't train;
    /// libtorch's.
    fn init(&self, parameter: &NamedParameter) -> Result<Vec<(&'static str, Tensor)>>;

    /// One step of some parameters of one group, device and dtype. Gradients
    /// are off meanwhile.
    ///
    /// # Errors
    /// libtorch's.
    fn update(&self, batch: &mut [Update<'_>], group: ParameterGroup) -> Result<()>;
}

/// One parameter in a step.
#[derive(Debug)]
pub struct Update<'a> {
    /// A handle on the parameter, to be changed in place.
    pub param: Tensor,
    /// Its gradient, contiguous; not to be changed.
    pub grad: Tensor,
    /// The tensors that [`UpdateRule::init`] made, in that order.
    pub state: &'a mut [Tensor],
}

/// What the parameters of a group have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParameterGroup {
    /// The learning rate; in a step, times the schedule's factor.
    pub lr: f64,
    /// The weight decay.
    pub weight_decay: f64,
}

/// The dtype in which a rule computes: f32, or f64 for f64 parameters.
pub(super) fn compute_kind(tensor: &Tensor) -> Result<Kind> {
    Ok(if tensor.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float })
}

/// Zeros like the parameter in the dtype in which a rule computes.
pub(super) fn zeros_like(param: &Tensor) -> Result<Tensor> {
    Ok(param.f_detach()?.f_zeros_like()?.f_to_kind(compute_kind(param)?)?)
}

/// The count of steps before the first: an i64 scalar on the CPU, so that
/// reading it never waits for another device.
pub(super) fn step_count() -> Result<Tensor> {
    Ok(Tensor::f_zeros([], (Kind::Int64, Device::Cpu))?)
}

/// Raises a count of steps and answers it.
pub(super) fn count_step(step: &mut Tensor) -> Result<i64> {
    let _ = step.f_add_scalar_(1)?;
    Ok(i64::try_from(&*step)?)
}

/// Refuses what is not in `0..1`.
pub(super) fn check_beta(field: &str, beta: f64) -> Result<()> {
    if (0.0..1.0).contains(&beta) {
        return Ok(());
    }
    Err(Error::config(field, "at least 0 and below 1", beta))
}

/// Refuses negative numbers, infinity and NaN.
pub(super) fn check_not_negative(field: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::config(field, "a finite number, at least 0", value))
}

/// An object of these fields.
pub(super) fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}
