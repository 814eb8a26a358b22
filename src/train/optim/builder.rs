//! Settings of an optimizer, and which parameter is in which group.

use super::grouped::{GroupedOptimizer, Slot};
use super::rule::{ParameterGroup, UpdateRule, check_not_negative};
use crate::error::{Error, Result};
use crate::model::NamedParameter;
use std::collections::BTreeSet;
use std::fmt;

/// Settings of a [`GroupedOptimizer`].
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let model = LoraModel::wrap(Base::new(vs, net), config)?;
/// let optimizer = Sgd::builder().lr(0.1).momentum(0.9).weight_decay(1e-4).build(model.trainable_parameters())?;
/// assert_eq!(optimizer.learning_rate(), 0.1);
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub struct OptimizerBuilder<R> {
    pub(super) rule: R,
    default: ParameterGroup,
    groups: Vec<(Predicate, Rates)>,
}

type Predicate = Box<dyn Fn(&NamedParameter) -> bool>;

/// Those of a group, which may build on the defaults that are set later.
#[derive(Debug, Clone, Copy)]
enum Rates {
    Own(ParameterGroup),
    /// The default learning rate times this, and the default weight decay.
    Ratio(f64),
}

impl<R: fmt::Debug> fmt::Debug for OptimizerBuilder<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups: Vec<_> = self.groups.iter().map(|(_, group)| group).collect();
        f.debug_struct("OptimizerBuilder")
            .field("rule", &self.rule)
            .field("default", &self.default)
            .field("groups", &groups)
            .finish()
    }
}

impl<R: UpdateRule> OptimizerBuilder<R> {
    /// Settings to start from: a rule with its default learning rate and
    /// weight decay.
    pub fn new(rule: R, lr: f64, weight_decay: f64) -> Self {
        OptimizerBuilder { rule, default: ParameterGroup { lr, weight_decay }, groups: Vec::new() }
    }

    /// The learning rate.
    pub fn lr(mut self, lr: f64) -> Self {
        self.default.lr = lr;
        self
    }

    /// The weight decay. The optimizer says how it is applied.
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.default.weight_decay = weight_decay;
        self
    }

    /// Another learning rate and weight decay for the parameters whose names
    /// `predicate` accepts. The first group that accepts a name has it.
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
    /// let optimizer = AdamW::builder()
    ///     .lr(1e-4)
    ///     .group(|name| name.ends_with("lora_B.weight"), 1e-3, 0.0)
    ///     .build(model.trainable_parameters())?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn group(mut self, predicate: impl Fn(&str) -> bool + 'static, lr: f64, weight_decay: f64) -> Self {
        let group = Rates::Own(ParameterGroup { lr, weight_decay });
        self.groups.push((Box::new(move |parameter| predicate(&parameter.name)), group));
        self
    }

    /// LoRA+ (Hayou, Ghosh and Yu, arXiv:2402.12354): the learning rate of B
    /// matrices is `ratio` times that of A matrices; the paper advises 16.
    ///
    /// As in PEFT's `create_loraplus_optimizer`, parameters of one dimension,
    /// such as biases, belong to B. Adapters of embeddings are not treated
    /// apart: give them a group of their own before this call to do so.
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
    /// let optimizer = AdamW::builder().lr(1e-4).lora_plus(16.0).build(model.trainable_parameters())?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn lora_plus(mut self, ratio: f64) -> Self {
        let is_b = |parameter: &NamedParameter| {
            let mut parts = parameter.name.split('.');
            parts.any(|part| matches!(part, "lora_B" | "lora_embedding_B")) || parameter.tensor.dim() == 1
        };
        self.groups.push((Box::new(is_b), Rates::Ratio(ratio)));
        self
    }

    /// Makes the optimizer, with the state of one that has taken no step.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting out of range, an empty or repeated list
    /// of parameters and a group without any; [`Error::Mismatch`] for a
    /// parameter that can't be trained; libtorch's.
    pub fn build(self, parameters: Vec<NamedParameter>) -> Result<GroupedOptimizer<R>> {
        let groups = self.resolve()?;
        self.rule.check(&groups)?;
        if parameters.is_empty() {
            return Err(Error::config("parameters", "at least one", "none"));
        }
        let mut slots: Vec<Slot> = Vec::with_capacity(parameters.len());
        let mut names = BTreeSet::new();
        for parameter in parameters {
            if !names.insert(parameter.name.clone()) {
                return Err(Error::config("parameters", "each name once", format!("{} twice", parameter.name)));
            }
            let group = self.groups.iter().position(|(accepts, _)| accepts(&parameter));
            slots.push(Slot::new(&self.rule, group.map_or(0, |i| i + 1), parameter)?);
        }
        if let Some(i) = (1..groups.len()).find(|i| slots.iter().all(|slot| slot.group != *i)) {
            let found = format!("group {i}, whose predicate accepts none (or earlier groups have them)");
            return Err(Error::config("group", "parameters in each group", found));
        }
        Ok(GroupedOptimizer::new(self.rule, groups, slots))
    }

    /// The groups, the default one first.
    fn resolve(&self) -> Result<Vec<ParameterGroup>> {
        let mut groups = vec![self.default];
        for (_, rates) in &self.groups {
            groups.push(match *rates {
                Rates::Own(group) => group,
                Rates::Ratio(ratio) => {
                    check_not_negative("lora_plus", ratio)?;
                    ParameterGroup { lr: self.default.lr * ratio, ..self.default }
                }
            });
        }
        for group in &groups {
            check_not_negative("lr", group.lr)?;
            check_not_negative("weight_decay", group.weight_decay)?;
        }
        Ok(groups)
    }
}
