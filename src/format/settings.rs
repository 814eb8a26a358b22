//! Configurations that mean given modules and no others.

use crate::lora::{AdapterConfig, LayerPattern, TargetModules};
use std::collections::HashSet;

/// Rank and alpha of one module.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ModuleSettings {
    /// Its path, in the names that the configuration is for.
    pub(super) name: String,
    pub(super) r: i64,
    pub(super) lora_alpha: f64,
    /// The sizes of LoKr's W₁, where `decompose_factor` doesn't give them.
    pub(super) w1: Option<[i64; 2]>,
}

/// `config` with targets, ranks and alphas of these modules, for a model that
/// has `layers`. The most common rank and alpha become `r` and `lora_alpha`,
/// the others go by patterns.
pub(super) fn exact_config(
    config: impl Into<AdapterConfig>,
    layers: &[&str],
    modules: &[ModuleSettings],
) -> AdapterConfig {
    let mut config = config.into();
    let exact = |name: &str| format!("^{}", regex::escape(name));
    if let AdapterConfig::Lokr(config) = &mut config {
        let sizes = modules.iter().filter_map(|module| Some((exact(&module.name), module.w1?)));
        config.method.w1_pattern = LayerPattern::new(sizes);
    }
    let placed = config.placed_mut();
    *placed.r = most_common(modules.iter().map(|module| module.r)).unwrap_or(*placed.r);
    *placed.alpha = most_common(modules.iter().map(|module| module.lora_alpha)).unwrap_or(*placed.alpha);
    let ranks = modules.iter().filter(|module| module.r != *placed.r);
    *placed.rank_pattern = LayerPattern::new(ranks.map(|module| (exact(&module.name), module.r)));
    let alphas = modules.iter().filter(|module| module.lora_alpha != *placed.alpha);
    *placed.alpha_pattern = LayerPattern::new(alphas.map(|module| (exact(&module.name), module.lora_alpha)));

    *placed.target_modules = Some(target(layers, modules));
    *placed.exclude_modules = None;
    *placed.layers_to_transform = None;
    *placed.layers_pattern = None;
    config
}

/// A list of paths; an expression where PEFT would take one of them for the
/// last segments of another.
fn target(layers: &[&str], modules: &[ModuleSettings]) -> TargetModules {
    let names: HashSet<&str> = modules.iter().map(|module| module.name.as_str()).collect();
    // A path that ends in another one: `block.proj_out` beside `proj_out`.
    let ends_in_one = |layer: &&&str| {
        layer.match_indices('.').any(|(dot, _)| layer.get(dot + 1..).is_some_and(|end| names.contains(end)))
    };
    let ambiguous = layers.iter().filter(|layer| !names.contains(**layer)).any(|layer| ends_in_one(&layer));
    let sorted = modules.iter().map(|module| module.name.as_str());
    match ambiguous {
        false => TargetModules::List(sorted.map(String::from).collect()),
        true => TargetModules::Regex(sorted.map(regex::escape).collect::<Vec<_>>().join("|")),
    }
}

/// The value that comes most often; of several such, the largest.
fn most_common<T: Copy + PartialOrd>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut values: Vec<T> = values.collect();
    values.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    let runs = values.chunk_by(|a, b| a == b);
    runs.max_by_key(|run| run.len()).and_then(|run| run.first().copied())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::LoraConfig;

    fn module(name: &str, r: i64, lora_alpha: f64) -> ModuleSettings {
        ModuleSettings { name: name.into(), r, lora_alpha, w1: None }
    }

    #[test]
    fn the_configuration_means_the_modules_and_no_others() {
        let layers = ["b.0.proj_out", "b.0.q", "b.1.q", "proj_out"];
        let modules = [module("b.0.q", 4, 2.0), module("b.1.q", 4, 8.0), module("proj_out", 2, 8.0)];
        let config = exact_config(LoraConfig::default(), &layers, &modules);
        assert_eq!(config.matched(layers).unwrap(), ["b.0.q", "b.1.q", "proj_out"]);
        let found = config.layer_settings(["b.0.q", "b.1.q", "proj_out"]);
        assert_eq!(found.iter().map(|s| (s.r, s.lora_alpha)).collect::<Vec<_>>(), [(4, 2.0), (4, 8.0), (2, 8.0)]);
        assert!(matches!(config.as_lora().unwrap().target_modules, Some(TargetModules::Regex(_))));
        let config = exact_config(LoraConfig::default(), &layers, &modules[..2]);
        assert!(matches!(config.as_lora().unwrap().target_modules, Some(TargetModules::List(_))));
    }

    #[test]
    fn patterns_hold_what_is_rare() {
        let modules = [module("a", 4, 1.5), module("b", 2, 1.5), module("c", 2, 3.0)];
        let config = exact_config(LoraConfig::default(), &["a", "b", "c"], &modules);
        let config = config.as_lora().unwrap();
        assert_eq!((config.r, config.lora_alpha), (2, 1.5));
        assert_eq!(config.rank_pattern.entries().collect::<Vec<_>>(), [("^a", 4)]);
        assert_eq!(config.alpha_pattern.entries().collect::<Vec<_>>(), [("^c", 3.0)]);
    }
}
