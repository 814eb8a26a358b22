//! New adapters from others.

use super::LoraModel;
use super::adapter::NamedAdapter;
use crate::error::{Error, Result};
use crate::lora::{Bias, Combination, InitLoraWeights, LayerPattern, LoraConfig, Part, TargetModules, combine, rank};
use std::collections::BTreeMap;
use tch::Tensor;

impl<M> LoraModel<M> {
    /// Adds an adapter that is a weighted combination of others, on every layer
    /// that one of them adapts. It takes no part until
    /// [`LoraModel::set_adapter`] names it.
    ///
    /// Each layer of the new adapter has the scale 1, and the rank that the
    /// combination has there. DARE draws from libtorch's default generator, in
    /// the order of the layers' names, first for all A and then for all B of a
    /// layer.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor, nn};
    /// # use tch_peft::*;
    /// # tch::manual_seed(0);
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
    /// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).init_lora_weights(false).build()?;
    /// # let mut model = LoraModel::wrap(Base::new(vs, net), config.clone())?;
    /// # let x = Tensor::randn([3, 8], (Kind::Float, Device::Cpu));
    /// model.add_adapter("poet", config)?;
    /// let sources = [("default", 0.7), ("poet", 0.3)];
    /// model.add_weighted_adapter(&sources, "both", Combination::Cat)?; // exact, of rank 2 + 2
    /// let ties = Merge::Ties { density: 0.5, sign: MajoritySign::Total };
    /// model.add_weighted_adapter(&sources, "ties", Combination::Svd { merge: ties, rank: Some(2), clamp: None })?;
    /// model.set_adapter("both")?;
    /// assert_eq!(model.adapter_config("both")?.as_lora().map(LoraConfig::r), Some(4));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is taken or that the model doesn't
    /// have, for another number of weights than of names, for values out of
    /// range, for ranks that the combination can't bring together, for grouped
    /// convolutions, and for adapters with DoRA, a bias of `lora_B`,
    /// `modules_to_save`, trained biases, token rows or `target_parameters`,
    /// which have no such sum.
    pub fn add_weighted_adapter(
        &mut self,
        adapters: &[(&str, f64)],
        name: &str,
        combination: Combination,
    ) -> Result<()> {
        self.refuse_taken(name)?;
        combination.validate()?;
        let mut sources = Vec::new();
        for (source, weight) in adapters {
            let adapter = self.named(source)?;
            check_source(adapter)?;
            if !weight.is_finite() {
                return Err(Error::config("weights", "finite numbers", weight));
            }
            sources.push((adapter, *weight));
        }
        let [(first, _), ..] = sources.as_slice() else {
            return Err(Error::config("adapters", "at least one", "none"));
        };
        let tied = first.config.ensure_weight_tying();
        if let Some((other, _)) = sources.iter().find(|(other, _)| other.config.ensure_weight_tying() != tied) {
            return Err(Error::config("ensure_weight_tying", format!("{tied} in all adapters"), &other.name));
        }
        let mut parts: BTreeMap<&str, Vec<Part>> = BTreeMap::new();
        for (adapter, weight) in &sources {
            for layer in &adapter.layers {
                let scaling = layer.lora.scaling();
                let tensors: Vec<Tensor> = layer
                    .lora
                    .tensors()
                    .into_iter()
                    .map(|(_, tensor)| tensor.f_detach())
                    .collect::<std::result::Result<_, _>>()?;
                let [a, b]: [Tensor; 2] = tensors.try_into().map_err(|_| {
                    Error::config(
                        "adapters",
                        "layers with A and B alone",
                        format!("{} of {}", layer.path, adapter.name),
                    )
                })?;
                if a.size().get(1..).is_some_and(|rest| rest.len() > 1) && a.size().first() != b.size().get(1) {
                    let found = format!("{} of {}", layer.path, adapter.name);
                    return Err(Error::config("adapters", "no grouped convolution", found));
                }
                parts.entry(&layer.path).or_default().push(Part { a, b, weight: *weight, scaling });
            }
        }
        let mut ranks = Vec::new();
        let mut factors = Vec::new();
        for (path, parts) in &parts {
            ranks.push((path.to_string(), rank(path, &combination, parts)?));
            factors.push(combine(path, &combination, parts)?);
        }
        let config = config_of(first.lora_config(COMBINATION)?, &ranks)?;
        let new = NamedAdapter::build(name, &self.base, config.into(), InitLoraWeights::Default, &self.switches)?;
        let _no_grad = tch::no_grad_guard();
        for (layer, (a, b)) in new.layers.iter().zip(factors) {
            for ((_, mut tensor), value) in layer.lora.tensors().into_iter().zip([a, b]) {
                tensor.f_copy_(&value)?;
            }
        }
        self.push(new)
    }
}

const COMBINATION: &str = "a weighted combination";

/// Refuses what has no weighted sum.
fn check_source(adapter: &NamedAdapter) -> Result<()> {
    let config = adapter.lora_config(COMBINATION)?;
    let found = if config.use_dora {
        "use_dora"
    } else if config.lora_bias {
        "lora_bias"
    } else if config.bias != Bias::None {
        "bias"
    } else if !adapter.saved.is_empty() {
        "modules_to_save"
    } else if !config.target_parameters().is_empty() {
        "target_parameters"
    } else if !adapter.tokens.is_empty() {
        "trainable_token_indices"
    } else {
        return Ok(());
    };
    Err(Error::config(
        "adapters",
        "plain LoRA, of which there is a weighted sum",
        format!("{found} in {}", adapter.name),
    ))
}

/// Scale 1 and these ranks on these layers, in the rest as `first`.
fn config_of(first: &LoraConfig, ranks: &[(String, i64)]) -> Result<LoraConfig> {
    // The rank of most layers is `r`, those of others stand in the patterns.
    let mut counts: BTreeMap<i64, usize> = BTreeMap::new();
    for (_, r) in ranks {
        *counts.entry(*r).or_default() += 1;
    }
    let r = counts.into_iter().max_by_key(|(_, count)| *count).map_or(first.r, |(r, _)| r);
    let others = || ranks.iter().filter(|(_, other)| *other != r);
    let mut config = first.clone();
    (config.r, config.lora_alpha, config.use_rslora) = (r, r as f64, false);
    config.rank_pattern = LayerPattern::of_paths(others().map(|(path, r)| (path, *r)));
    config.alpha_pattern = LayerPattern::of_paths(others().map(|(path, r)| (path, *r as f64)));
    config.target_modules = Some(TargetModules::List(ranks.iter().map(|(path, _)| path.clone()).collect()));
    (config.exclude_modules, config.layers_to_transform, config.layers_pattern) = (None, None, None);
    config.init_lora_weights = InitLoraWeights::Default;
    config.validate()
}
