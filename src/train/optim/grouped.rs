//! Parameters by name and group, with their states.

use super::rule::{ParameterGroup, Update, UpdateRule};
use crate::error::{Error, Result};
use crate::ffi::bytes::copy_all;
use crate::model::NamedParameter;
use crate::train::compare::same_config;
use crate::train::state::{Expected, owned, same_kind, same_names, same_shapes};
use crate::train::{Optimizer, OptimizerState};
use serde_json::{Map, Value, json};
use tch::{COptimizer, Device, Kind, Tensor};

/// An optimizer over named parameters in groups; `R` is how it updates them.
///
/// The parameters are updated in place; the optimizer holds handles to them.
#[derive(Debug)]
pub struct GroupedOptimizer<R> {
    rule: R,
    groups: Vec<ParameterGroup>,
    factor: f64,
    slots: Vec<Slot>,
}

/// One parameter with its state.
#[derive(Debug)]
pub(super) struct Slot {
    name: String,
    pub(super) group: usize,
    param: Tensor,
    labels: Vec<&'static str>,
    state: Vec<Tensor>,
}

impl Slot {
    pub(super) fn new(rule: &impl UpdateRule, group: usize, parameter: NamedParameter) -> Result<Slot> {
        let param = &parameter.tensor;
        let kind = param.f_kind()?;
        let float = matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half);
        if !(float && param.requires_grad() && param.f_is_leaf()? && param.is_contiguous()) {
            return Err(Error::Mismatch {
                name: parameter.name,
                expected: "a contiguous float leaf that requires a gradient".into(),
                found: format!(
                    "{kind:?}, requires_grad {}, is_leaf {}, contiguous {}",
                    param.requires_grad(),
                    param.f_is_leaf()?,
                    param.is_contiguous()
                ),
            });
        }
        let (labels, state) = rule.init(&parameter)?.into_iter().unzip();
        Ok(Slot { name: parameter.name, group, param: parameter.tensor, labels, state })
    }

    /// The names under which the state is saved.
    fn keys(&self) -> impl Iterator<Item = String> {
        self.labels.iter().map(|label| format!("{}.{label}", self.name))
    }

    /// What is saved: each name with the tensor.
    fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.keys().zip(&self.state)
    }
}

impl<R: UpdateRule> GroupedOptimizer<R> {
    pub(super) fn new(rule: R, groups: Vec<ParameterGroup>, slots: Vec<Slot>) -> Self {
        GroupedOptimizer { rule, groups, factor: 1.0, slots }
    }

    /// The settings as they go into a checkpoint.
    fn hyperparameters(&self) -> Value {
        let group = |g: &ParameterGroup| json!({"lr": g.lr, "weight_decay": g.weight_decay});
        let groups: Vec<_> = self.groups.iter().map(group).collect();
        // Which parameters the predicates chose; those of the first group go without saying.
        let chosen = self.slots.iter().filter(|slot| slot.group > 0);
        let members: Map<_, _> = chosen.map(|slot| (slot.name.clone(), slot.group.into())).collect();
        let mut settings = self.rule.settings();
        settings.insert("groups".into(), groups.into());
        settings.insert("members".into(), members.into());
        settings.into()
    }

    fn expected(&self) -> Expected<'_> {
        self.slots.iter().flat_map(Slot::tensors).collect()
    }
}

impl<R: UpdateRule> Optimizer for GroupedOptimizer<R> {
    fn step(&mut self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        // One call takes tensors of one group, device and dtype.
        let mut batches: Vec<((usize, Device, Kind), Vec<Update<'_>>)> = Vec::new();
        for slot in &mut self.slots {
            let grad = slot.param.f_grad()?;
            if !grad.defined() {
                continue;
            }
            let key = (slot.group, slot.param.device(), slot.param.f_kind()?);
            let param = slot.param.shallow_clone();
            let update = Update { param, grad: grad.f_contiguous()?, state: &mut slot.state };
            match batches.iter_mut().find(|(k, _)| *k == key) {
                Some((_, batch)) => batch.push(update),
                None => batches.push((key, vec![update])),
            }
        }
        for ((group, ..), mut batch) in batches {
            let ParameterGroup { lr, weight_decay } = self.groups[group];
            self.rule.update(&mut batch, ParameterGroup { lr: lr * self.factor, weight_decay })?;
        }
        Ok(())
    }

    fn zero_grad(&mut self) -> Result<()> {
        // tch's own `zero_grad` fills with zeros: a parameter that the next
        // step doesn't use would still move by its momentum, but not after a
        // resume, where it has no gradient. libtorch's optimizers remove the
        // gradient; one is made for the call since it can't be kept in a
        // `Send` type.
        let mut remover = COptimizer::sgd(0.0, 0.0, 0.0, 0.0, false)?;
        for slot in &self.slots {
            remover.add_parameters(&slot.param, 0)?;
        }
        Ok(remover.zero_grad()?)
    }

    fn learning_rate(&self) -> f64 {
        self.groups[0].lr * self.factor
    }

    fn set_learning_rate_factor(&mut self, factor: f64) {
        self.factor = factor;
    }

    fn export_state(&self) -> Result<OptimizerState> {
        let lent = self.lend_state()?;
        Ok(OptimizerState { tensors: owned(lent.tensors)?, ..lent })
    }

    fn lend_state(&self) -> Result<OptimizerState> {
        let tensors = self.expected().into_iter().map(|(name, tensor)| (name, tensor.shallow_clone())).collect();
        Ok(OptimizerState { kind: R::KIND.into(), hyperparameters: self.hyperparameters(), tensors })
    }

    fn check_state(&self, state: &OptimizerState) -> Result<()> {
        same_kind("optimizer", &state.kind, R::KIND)?;
        let expected = self.expected();
        same_names("optimizer", &expected, &state.tensors)?;
        same_config("optimizer", &state.hyperparameters, &self.hyperparameters())?;
        same_shapes(&expected, &state.tensors)
    }

    fn import_state(&mut self, state: OptimizerState) -> Result<()> {
        self.check_state(&state)?;
        // In place, which needs no memory that a device may lack: after the
        // check there is nothing left to fail.
        let expected = self.expected().into_iter();
        copy_all(expected.map(|(name, to)| (to.shallow_clone(), state.tensors[&name].shallow_clone())).collect())
    }
}
