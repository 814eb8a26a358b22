//! Weights with several names: tied embeddings.

use super::NamedParameter;
use super::adapter::NamedAdapter;
use crate::base::{Weight, WeightRole, Weights};
use crate::error::{Error, Result};
use crate::format::peft;
use crate::lora::{AdapterConfig, LoraConfig, Tied};
use std::collections::BTreeMap;
use tch::Tensor;

/// The other names of a tied weight.
pub(super) fn others<'a>(weights: &'a Weights, weight: &'a Weight) -> Vec<&'a Weight> {
    let Some(group) = weight.tied else { return Vec::new() };
    weights.iter().filter(|other| other.tied == Some(group) && other.name != weight.name).collect()
}

/// Where an adapter of a tied weight belongs: on the table.
pub(super) fn source<'a>(weights: &'a Weights, weight: &'a Weight) -> Option<&'a Weight> {
    let is_table = |weight: &&Weight| weight.role == WeightRole::Embedding;
    std::iter::once(weight).chain(others(weights, weight)).find(is_table)
}

/// The weights that a target means where tied ones stay tied: the table in the
/// place of all that share it.
pub(super) fn tie<'a>(
    weights: &'a Weights,
    config: &AdapterConfig,
    chosen: Vec<(&'a str, &'a Weight)>,
) -> Result<Vec<(&'a str, &'a Weight)>> {
    let is_tied = |weight: &Weight| weight.tied.is_some() && source(weights, weight).is_some();
    if !config.ensure_weight_tying() {
        for (path, _) in chosen.iter().filter(|(_, weight)| is_tied(weight)) {
            tracing::warn!(path, "a tied weight is adapted in one of its uses only: ensure_weight_tying is false");
        }
        return Ok(chosen);
    }
    if config.as_lora().is_some_and(LoraConfig::use_dora)
        && chosen.iter().any(|(_, weight)| weight.role == WeightRole::Embedding || is_tied(weight))
    {
        return Err(Error::config("use_dora", "false where ensure_weight_tying ties an adapter", true));
    }
    let mut tied: Vec<(&str, &Weight)> = Vec::new();
    for (path, weight) in chosen {
        let weight = if is_tied(weight) { source(weights, weight).unwrap_or(weight) } else { weight };
        let path = weight.module_path().unwrap_or(path);
        if tied.iter().all(|(_, other)| weight.tied.is_none() || other.name != weight.name) {
            tied.push((path, weight));
        }
    }
    Ok(tied)
}

impl NamedAdapter {
    /// What PEFT saves of tied layers besides [`NamedAdapter::tensors`]: the
    /// output layer's factors, and the copies under its name.
    pub(super) fn tied_tensors(&self) -> Result<Vec<NamedParameter>> {
        let mut all = Vec::new();
        for layer in self.layers.iter().filter(|layer| !layer.outputs.is_empty()) {
            let Some(factors) = Tied::output_factors(layer.lora.as_ref())? else { continue };
            for output in &layer.outputs {
                for (end, tensor) in ["lora_A.weight", "lora_B.weight"].into_iter().zip(&factors) {
                    let tensor = tensor.f_detach()?.f_contiguous()?;
                    all.push(NamedParameter { name: peft::key(output, end), tensor });
                }
            }
        }
        for saved in &self.saved {
            for output in &saved.outputs {
                let tensor = saved.copy.value().f_detach()?;
                all.push(NamedParameter { name: peft::key(output, "weight"), tensor });
            }
        }
        Ok(all)
    }

    /// Takes what is tied out of a file's tensors. The values must be those of
    /// the table: of a file that says otherwise, one of the two is wrong.
    pub(super) fn take_tied(&self, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        if !self.config.ensure_weight_tying() {
            return Ok(());
        }
        let own: Vec<String> = self.tensors().into_iter().map(|parameter| parameter.name).collect();
        let mut sources: Vec<(&str, Tensor)> = Vec::new();
        for key in &own {
            let Some(tensor) = tensors.get(key) else { continue };
            match key.rsplit('.').next() {
                Some("lora_embedding_A") => sources.push((".lora_B.weight", tensor.f_tr()?)),
                Some("lora_embedding_B") => sources.push((".lora_A.weight", tensor.f_tr()?)),
                Some("weight") => sources.push((".weight", tensor.shallow_clone())),
                _ => {}
            }
        }
        let mut twins = Vec::new();
        for (key, tensor) in tensors.iter().filter(|(key, _)| !own.contains(key)) {
            for (end, source) in &sources {
                if key.ends_with(end) && tensor.size() == source.size() && tensor.f_equal(source)? {
                    twins.push(key.clone());
                }
            }
        }
        tensors.retain(|key, _| !twins.contains(key));
        Ok(())
    }
}
