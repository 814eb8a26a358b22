//! `modules_to_save` and `bias`: the weights of which an adapter trains a copy.

use super::targets::Wrapped;
use super::tied;
use crate::base::{Base, Site};
use crate::error::{Error, Result};
use crate::lora::{AdapterConfig, Bias, Replacement, Switches, Use};
use crate::names;
use std::collections::HashSet;
use std::sync::Arc;

/// A full copy of one weight.
#[derive(Debug)]
pub(super) struct Saved {
    /// Its key in a file.
    pub(super) key: String,
    /// Paths of modules whose weight is tied to it.
    pub(super) outputs: Vec<String>,
    pub(super) site: Arc<Site>,
    pub(super) copy: Arc<Replacement>,
}

/// Copies of the weights that `modules_to_save` and `bias` mean; `targets` are
/// the adapted modules.
pub(super) fn saved<M>(
    base: &Base<M>,
    config: &AdapterConfig,
    targets: &HashSet<&str>,
    wrapped: &Wrapped,
    switches: &Arc<Switches>,
) -> Result<Vec<Saved>> {
    let (entries, bias) = (config.selection().modules_to_save, config.bias());
    if entries.is_empty() && bias == Bias::None {
        return Ok(Vec::new());
    }
    let module = |name: &str| name.rsplit_once('.').map_or(String::new(), |(module, _)| module.to_string());
    let mut used = HashSet::new();
    let mut saved = Vec::new();
    for weight in base.weights().iter() {
        let path = module(&weight.name);
        let entry = entries.iter().find(|entry| names::is_within(&path, entry));
        let end = weight.name.rsplit('.').next().unwrap_or_default();
        let (targeted, is_wrapped) = (targets.contains(path.as_str()), wrapped.contains(&path));
        let key = match (entry, bias) {
            (Some(entry), _) => {
                used.insert(entry);
                wrapped.key(&path, end)
            }
            (None, Bias::All | Bias::LoraOnly) if end == "bias" && targeted && !is_wrapped => {
                wrapped.key(&path, "base_layer.bias")
            }
            (None, Bias::LoraOnly) if end == "bias" && is_wrapped => wrapped.key(&path, end),
            (None, Bias::All) if end == "bias" => wrapped.key(&path, end),
            _ => continue,
        };
        if !weight.tensor.is_floating_point() || end.starts_with("running_") {
            let found = format!("{}, which training writes into", weight.name);
            return Err(Error::config("modules_to_save", "modules without running statistics", found));
        }
        let tied = tied::others(base.weights(), weight);
        let (weight, key, part) = match tied::source(base.weights(), weight) {
            Some(source) if !tied.is_empty() && entry.is_some() && config.ensure_weight_tying() => {
                (source, wrapped.key(source.module_path().unwrap_or_default(), "weight"), Use::All)
            }
            Some(source) if !tied.is_empty() => {
                tracing::warn!(weight = weight.name, "a tied weight is trained in one of its uses only");
                (weight, key, if source.name == weight.name { Use::Lookups } else { Use::Products })
            }
            _ => (weight, key, Use::All),
        };
        if part == Use::All && saved.iter().any(|other: &Saved| other.key == key) {
            continue;
        }
        let outputs = match part {
            Use::All if !tied.is_empty() => tied::others(base.weights(), weight),
            _ => Vec::new(),
        };
        let outputs = outputs.iter().filter_map(|other| Some(other.module_path()?.to_string())).collect();
        let site = weight.site_or_attach()?;
        let copy = Arc::new(Replacement::new(site.frozen().as_ref(), part, config.dtype(), Arc::clone(switches))?);
        saved.push(Saved { key, outputs, site, copy });
    }
    // PEFT adds entries by the task that a model need not have.
    match entries.iter().find(|entry| !used.contains(entry)) {
        Some(entry) if used.is_empty() => {
            let paths: Vec<String> = base.weights().iter().map(|weight| module(&weight.name)).collect();
            let near = names::near(entry, paths.iter().map(String::as_str));
            Err(Error::NoTarget { target: entry.clone(), near })
        }
        Some(entry) => {
            tracing::warn!(entry, "modules_to_save names a module that the base doesn't have");
            Ok(saved)
        }
        None => Ok(saved),
    }
}
