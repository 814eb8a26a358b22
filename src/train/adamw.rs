//! Adam with decoupled weight decay.

use crate::error::{Error, Result};
use crate::ffi::adamw::{Hyper, fused_step};
use crate::model::NamedParameter;
use crate::train::compare::same_config;
use crate::train::state::{copies, same_kind, same_names, same_shapes};
use crate::train::{Optimizer, OptimizerState};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;
use tch::{COptimizer, Device, Kind, Tensor};

/// The name under which states are saved.
const KIND: &str = "adamw";

/// Adam with decoupled weight decay (Loshchilov and Hutter, "Decoupled weight
/// decay regularization", 2019), the same as `torch.optim.AdamW(fused=True)`:
/// same defaults, same arithmetic, bit by bit.
///
/// The parameters are updated in place; the optimizer holds handles to them.
#[derive(Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    eps: f64,
    groups: Vec<Group>,
    factor: f64,
    slots: Vec<Slot>,
}

#[derive(Debug, Clone, Copy)]
struct Group {
    lr: f64,
    weight_decay: f64,
}

/// One parameter with its moments.
#[derive(Debug)]
struct Slot {
    name: String,
    group: usize,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// Steps taken; an f32 scalar on the parameter's device, as libtorch wants it.
    step: Tensor,
}

/// Settings of an [`AdamW`], with torch's defaults.
pub struct AdamWBuilder {
    beta1: f64,
    beta2: f64,
    eps: f64,
    default: Group,
    groups: Vec<(Predicate, Group)>,
}

type Predicate = Box<dyn Fn(&str) -> bool>;

impl fmt::Debug for AdamWBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups: Vec<_> = self.groups.iter().map(|(_, group)| group).collect();
        f.debug_struct("AdamWBuilder")
            .field("betas", &(self.beta1, self.beta2))
            .field("eps", &self.eps)
            .field("default", &self.default)
            .field("groups", &groups)
            .finish()
    }
}

impl AdamW {
    /// Settings to start from: lr 1e-3, betas 0.9 and 0.999, eps 1e-8, weight
    /// decay 0.01.
    pub fn builder() -> AdamWBuilder {
        let default = Group { lr: 1e-3, weight_decay: 1e-2 };
        AdamWBuilder { beta1: 0.9, beta2: 0.999, eps: 1e-8, default, groups: Vec::new() }
    }

    /// The settings as they go into a checkpoint.
    fn hyperparameters(&self) -> Value {
        let group = |g: &Group| json!({"lr": g.lr, "weight_decay": g.weight_decay});
        let groups: Vec<_> = self.groups.iter().map(group).collect();
        // Which parameters the predicates chose; those of the first group go without saying.
        let chosen = self.slots.iter().filter(|slot| slot.group > 0);
        let members: Map<_, _> = chosen.map(|slot| (slot.name.clone(), slot.group.into())).collect();
        json!({"betas": [self.beta1, self.beta2], "eps": self.eps, "groups": groups, "members": members})
    }
}

impl AdamWBuilder {
    /// The learning rate.
    pub fn lr(mut self, lr: f64) -> Self {
        self.default.lr = lr;
        self
    }

    /// The decay rates of the first and the second moment, each in `0..1`.
    pub fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.beta1, self.beta2) = (beta1, beta2);
        self
    }

    /// Added to the root of the second moment.
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// The weight decay; each step multiplies a parameter by `1 - lr * weight_decay`.
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.default.weight_decay = weight_decay;
        self
    }

    /// Another learning rate and weight decay for the parameters whose names
    /// `predicate` accepts. The first group that accepts a name has it.
    pub fn group(mut self, predicate: impl Fn(&str) -> bool + 'static, lr: f64, weight_decay: f64) -> Self {
        self.groups.push((Box::new(predicate), Group { lr, weight_decay }));
        self
    }

    /// Makes the optimizer, with moments of 0.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting out of range, an empty or repeated list
    /// of parameters and a group without any; [`Error::Mismatch`] for a
    /// parameter that can't be trained; libtorch's.
    pub fn build(self, parameters: Vec<NamedParameter>) -> Result<AdamW> {
        self.check()?;
        if parameters.is_empty() {
            return Err(Error::config("parameters", "at least one", "none"));
        }
        let mut slots: Vec<Slot> = Vec::with_capacity(parameters.len());
        let mut by_name = BTreeMap::new();
        for NamedParameter { name, tensor } in parameters {
            if by_name.insert(name.clone(), ()).is_some() {
                return Err(Error::config("parameters", "each name once", format!("{name} twice")));
            }
            let group = self.groups.iter().position(|(accepts, _)| accepts(&name));
            slots.push(Slot::new(name, group.map_or(0, |i| i + 1), tensor)?);
        }
        if let Some(i) = (1..=self.groups.len()).find(|i| slots.iter().all(|slot| slot.group != *i)) {
            let found = format!("group {i}, whose predicate accepts none (or earlier groups have them)");
            return Err(Error::config("group", "parameters in each group", found));
        }
        let AdamWBuilder { beta1, beta2, eps, default, groups } = self;
        let groups = [default].into_iter().chain(groups.into_iter().map(|(_, group)| group)).collect();
        Ok(AdamW { beta1, beta2, eps, groups, factor: 1.0, slots })
    }

    fn check(&self) -> Result<()> {
        let not_negative = |field: &str, value: f64| match value.is_finite() && value >= 0.0 {
            true => Ok(()),
            false => Err(Error::config(field, "a finite number, at least 0", value)),
        };
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::config(field, "at least 0 and below 1", beta));
            }
        }
        not_negative("eps", self.eps)?;
        for group in [&self.default].into_iter().chain(self.groups.iter().map(|(_, group)| group)) {
            not_negative("lr", group.lr)?;
            not_negative("weight_decay", group.weight_decay)?;
        }
        Ok(())
    }
}

impl Slot {
    fn new(name: String, group: usize, param: Tensor) -> Result<Slot> {
        let kind = param.f_kind()?;
        let float = matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half);
        if !(float && param.requires_grad() && param.f_is_leaf()? && param.is_contiguous()) {
            return Err(Error::Mismatch {
                name,
                expected: "a contiguous float leaf that requires a gradient".into(),
                found: format!(
                    "{kind:?}, requires_grad {}, is_leaf {}, contiguous {}",
                    param.requires_grad(),
                    param.f_is_leaf()?,
                    param.is_contiguous()
                ),
            });
        }
        let zeros = || param.f_detach()?.f_zeros_like();
        let step = Tensor::f_zeros([], (Kind::Float, param.device()))?;
        let (exp_avg, exp_avg_sq) = (zeros()?, zeros()?);
        Ok(Slot { name, group, exp_avg, exp_avg_sq, step, param })
    }

    /// What is saved: each name with the tensor.
    fn tensors(&self) -> [(String, &Tensor); 3] {
        [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq), ("step", &self.step)]
            .map(|(what, tensor)| (format!("{}.{what}", self.name), tensor))
    }
}

impl Optimizer for AdamW {
    fn step(&mut self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        // One call takes tensors of one group, device and dtype.
        type Batch<'a> = Vec<(&'a mut Slot, Tensor)>;
        let mut batches: Vec<((usize, Device, Kind), Batch)> = Vec::new();
        for slot in &mut self.slots {
            let grad = slot.param.f_grad()?;
            if !grad.defined() {
                continue;
            }
            let key = (slot.group, slot.param.device(), slot.param.f_kind()?);
            let entry = (slot, grad.f_contiguous()?);
            match batches.iter_mut().find(|(k, _)| *k == key) {
                Some((_, batch)) => batch.push(entry),
                None => batches.push((key, vec![entry])),
            }
        }
        for ((group, ..), mut batch) in batches {
            for (slot, _) in &mut batch {
                let _ = slot.step.f_add_scalar_(1.0)?;
            }
            let Group { lr, weight_decay } = self.groups[group];
            let (beta1, beta2, eps) = (self.beta1, self.beta2, self.eps);
            fused_step(
                &batch.iter().map(|(slot, _)| &slot.param).collect::<Vec<_>>(),
                &batch.iter().map(|(_, grad)| grad).collect::<Vec<_>>(),
                &batch.iter().map(|(slot, _)| &slot.exp_avg).collect::<Vec<_>>(),
                &batch.iter().map(|(slot, _)| &slot.exp_avg_sq).collect::<Vec<_>>(),
                &batch.iter().map(|(slot, _)| &slot.step).collect::<Vec<_>>(),
                Hyper { lr: lr * self.factor, beta1, beta2, weight_decay, eps },
            )?;
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
        let mut tensors = BTreeMap::new();
        for (name, tensor) in self.slots.iter().flat_map(Slot::tensors) {
            tensors.insert(name, tensor.f_detach_copy()?);
        }
        Ok(OptimizerState { kind: KIND.into(), hyperparameters: self.hyperparameters(), tensors })
    }

    fn check_state(&self, state: &OptimizerState) -> Result<()> {
        same_kind("optimizer", &state.kind, KIND)?;
        let expected = self.slots.iter().flat_map(Slot::tensors).collect();
        same_names("optimizer", &expected, &state.tensors)?;
        same_config("optimizer", &state.hyperparameters, &self.hyperparameters())?;
        same_shapes(&expected, &state.tensors)
    }

    fn import_state(&mut self, state: OptimizerState) -> Result<()> {
        self.check_state(&state)?;
        let mut copies = copies(&self.slots.iter().flat_map(Slot::tensors).collect(), &state.tensors)?;
        for slot in &mut self.slots {
            let names = slot.tensors().map(|(name, _)| name);
            for (tensor, name) in [&mut slot.exp_avg, &mut slot.exp_avg_sq, &mut slot.step].into_iter().zip(names) {
                if let Some(copy) = copies.remove(&name) {
                    *tensor = copy;
                }
            }
        }
        Ok(())
    }
}
