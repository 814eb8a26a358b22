//! The weights that a configuration means, and the keys of their adapters.
//!
//! PEFT wraps modules, and what lies in a wrapper has `base_layer` in its key.
//! Two kinds of targets have their A and B on a module that has more in it:
//!
//! - a parameter that is targeted by its name wraps its module, once for each
//!   such parameter, the first one innermost;
//! - an attention (`torch.nn.MultiheadAttention`) has the A and B of its fused
//!   `in_proj_weight`, and those of `out_proj` inside.

use super::tied;
use crate::base::{Base, Weight, WeightRole};
use crate::error::{Error, Result};
use crate::format::peft;
use crate::lora::{self, AdapterConfig, LayerForm, LayerSettings, LoraConfig, TargetModules};
use crate::names;
use std::collections::{BTreeMap, HashSet};

/// A weight to adapt.
#[derive(Debug)]
pub(super) struct Target<'a> {
    /// The module's path, or the name of a parameter that is targeted as such.
    pub(super) path: String,
    /// The path in its keys.
    pub(super) key_path: String,
    pub(super) weight: &'a Weight,
    pub(super) form: LayerForm,
    pub(super) settings: LayerSettings,
    pub(super) dropout: f64,
    /// Paths, in keys, of the layers whose adapter is tied to this one.
    pub(super) outputs: Vec<String>,
}

/// What a configuration means.
#[derive(Debug)]
pub(super) struct Targets<'a> {
    pub(super) all: Vec<Target<'a>>,
    /// The modules that `target_modules` means, in order.
    pub(super) modules: Vec<String>,
    pub(super) wrapped: Wrapped,
}

impl Targets<'_> {
    /// What the patterns for ranks and scales were matched with.
    pub(super) fn names(&self) -> Vec<String> {
        let parameters = self.all.iter().filter(|target| matches!(target.form, LayerForm::Parameter { .. }));
        self.modules.iter().chain(parameters.map(|target| &target.path)).cloned().collect()
    }
}

/// How often each module is wrapped around something other than itself.
#[derive(Debug, Default)]
pub(super) struct Wrapped(BTreeMap<String, usize>);

const WRAPPER: &str = ".base_layer";

impl Wrapped {
    /// The key of a tensor of the module at `path`.
    pub(super) fn key(&self, path: &str, end: &str) -> String {
        peft::key(&self.inside(path), end)
    }

    pub(super) fn contains(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }

    /// The path with all wrappers on the way.
    fn inside(&self, path: &str) -> String {
        let (mut plain, mut nested) = (String::new(), String::new());
        for segment in path.split('.') {
            for part in [&mut plain, &mut nested] {
                if !part.is_empty() {
                    part.push('.');
                }
                part.push_str(segment);
            }
            nested.push_str(&WRAPPER.repeat(self.0.get(&plain).copied().unwrap_or(0)));
        }
        nested
    }

    /// The path of the wrapper that has only this many others within it.
    fn at(&self, module: &str, within: usize) -> String {
        let inside = self.inside(module);
        inside[..inside.len() - (within + 1) * WRAPPER.len()].to_string()
    }

    /// The wrapped module that `path` is, or lies in.
    fn around(&self, path: &str) -> Option<&str> {
        let holds = |module: &&String| path == module.as_str() || path.starts_with(&format!("{module}."));
        self.0.keys().find(holds).map(String::as_str)
    }
}

/// The weights that the configuration means, modules before parameters.
pub(super) fn targets<'a, M>(base: &'a Base<M>, config: &AdapterConfig) -> Result<Targets<'a>> {
    let candidates = candidates(base, config);
    let paths: Vec<&str> = candidates.iter().map(|(path, _)| *path).collect();
    let modules = lora::resolve(&config.selection(), &paths)?;
    let wanted: HashSet<&str> = modules.iter().map(String::as_str).collect();
    let chosen: Vec<_> = candidates.into_iter().filter(|(path, _)| wanted.contains(path)).collect();
    let chosen = tied::tie(base.weights(), config, chosen)?;
    let parameters = parameters(base, config, &wanted)?;

    let mut wrapped = Wrapped::default();
    for (path, _) in chosen.iter().filter(|(_, weight)| is_fused(weight)) {
        wrapped.0.insert(path.to_string(), 1);
    }
    for (module, weights) in &parameters {
        wrapped.0.insert(module.to_string(), weights.len());
    }
    check_saved(base, config, &parameters)?;

    let dropout = config.as_lora().map_or(0.0, LoraConfig::lora_dropout);
    let settings = config.layer_settings(chosen.iter().map(|(path, _)| *path));
    let mut all = Vec::with_capacity(chosen.len());
    for ((path, weight), settings) in chosen.iter().zip(settings) {
        let mut push = |path: &str, key_path: String, weight: &'a Weight, dropout: f64| {
            let form = layer_form(config, weight.role);
            let tied = if config.ensure_weight_tying() { tied::others(base.weights(), weight) } else { Vec::new() };
            let outputs = tied.iter().filter_map(|other| Some(wrapped.inside(other.module_path()?))).collect();
            all.push(Target { path: path.into(), key_path, weight, form, settings, dropout, outputs });
        };
        if is_fused(weight) {
            let output = output_of(base, config, path)?;
            push(path, wrapped.at(path, 0), weight, 0.0);
            push(&format!("{path}.out_proj"), wrapped.inside(&format!("{path}.out_proj")), output, 0.0);
        } else if !path.strip_suffix(".out_proj").is_some_and(|attention| wrapped.contains(attention)) {
            push(path, wrapped.inside(path), weight, dropout);
        }
    }
    for (module, weights) in parameters {
        let settings = config.layer_settings(weights.iter().map(|weight| weight.name.as_str()));
        for ((within, weight), settings) in weights.into_iter().enumerate().zip(settings) {
            let form =
                LayerForm::Parameter { is_transposed: weight.role == WeightRole::Experts { is_transposed: true } };
            let (path, key_path) = (weight.name.clone(), wrapped.at(module, within));
            all.push(Target { path, key_path, weight, form, settings, dropout, outputs: Vec::new() });
        }
    }
    Ok(Targets { all, modules, wrapped })
}

/// The modules that `target_modules` chooses among, with their weights.
fn candidates<'a, M>(base: &'a Base<M>, config: &AdapterConfig) -> Vec<(&'a str, &'a Weight)> {
    // `all-linear` means linear layers; a name may mean any kind.
    if config.selection().target_modules == Some(&TargetModules::AllLinear) {
        return base.weights().linears().collect();
    }
    let is_stack = |weight: &Weight| matches!(weight.role, WeightRole::Experts { .. });
    let layers = base.weights().layers().filter(|(_, weight)| !is_stack(weight));
    // Those of an attention with several dimensions stand for it, to be refused.
    let fused = base.weights().iter().filter_map(|weight| {
        let path = weight.name.strip_suffix(FUSED).or_else(|| weight.name.strip_suffix(SEPARATE))?;
        (!path.is_empty() && weight.tensor.dim() == 2).then_some((path, weight))
    });
    layers.chain(fused).collect()
}

/// The weight of an attention's queries, keys and values (3 · dim, dim).
const FUSED: &str = ".in_proj_weight";
/// The first of its weights where those are of different dimensions.
const SEPARATE: &str = ".q_proj_weight";

fn is_fused(weight: &Weight) -> bool {
    weight.name.ends_with(FUSED) || weight.name.ends_with(SEPARATE)
}

/// The output layer of an attention, which is adapted with it.
fn output_of<'a, M>(base: &'a Base<M>, config: &AdapterConfig, path: &str) -> Result<&'a Weight> {
    let refused = |field, expected: &str| Err(Error::config(field, expected, format!("the attention {path}")));
    let Some(config) = config.as_lora() else {
        return refused("target_modules", "LoRA where an attention is adapted as a whole");
    };
    for (field, on) in [("use_dora", config.use_dora), ("lora_bias", config.lora_bias)] {
        if on {
            return refused(field, "false where an attention is adapted as a whole");
        }
    }
    if base.weights().iter().any(|weight| weight.name.strip_suffix(SEPARATE) == Some(path)) {
        return refused("target_modules", "an attention whose queries, keys and values have one dimension");
    }
    if config.lora_dropout > 0.0 {
        tracing::warn!(path, "lora_dropout has no part in an attention that is adapted as a whole, as in PEFT");
    }
    let name = format!("{path}.out_proj.weight");
    match base.weights().iter().find(|weight| weight.name == name) {
        Some(output) => Ok(output),
        None => refused("target_modules", "an attention with an out_proj"),
    }
}

/// What the adapter of a module with this role is like.
fn layer_form(config: &AdapterConfig, role: WeightRole) -> LayerForm {
    let fan_in_fan_out = config.as_lora().is_some_and(LoraConfig::fan_in_fan_out);
    match role {
        WeightRole::Embedding => LayerForm::Embedding,
        WeightRole::Conv { groups } => LayerForm::Conv { groups },
        // As in PEFT, a module's class decides where it is known.
        WeightRole::Conv1D => LayerForm::Linear { fan_in_fan_out: true },
        WeightRole::Linear => LayerForm::Linear { fan_in_fan_out },
        // An attention's.
        WeightRole::Experts { .. } | WeightRole::Other => LayerForm::Linear { fan_in_fan_out: false },
    }
}

/// What `target_parameters` means, by module and in the order of their making.
fn parameters<'a, M>(
    base: &'a Base<M>,
    config: &AdapterConfig,
    modules: &HashSet<&str>,
) -> Result<BTreeMap<&'a str, Vec<&'a Weight>>> {
    let names: Vec<&str> = base.weights().iter().map(|weight| weight.name.as_str()).collect();
    let meant: HashSet<String> = lora::resolve_parameters(&config.selection(), &names)?.into_iter().collect();
    if config.as_lora().is_some_and(LoraConfig::fan_in_fan_out) && !meant.is_empty() {
        return Err(Error::config("fan_in_fan_out", "false with target_parameters", true));
    }
    let mut by_module: BTreeMap<&str, Vec<&Weight>> = BTreeMap::new();
    for weight in base.weights().iter().filter(|weight| meant.contains(&weight.name)) {
        let Some((module, _)) = weight.name.rsplit_once('.') else { continue };
        if modules.contains(module) {
            let found = format!("{}, whose module target_modules means too", weight.name);
            return Err(Error::config("target_parameters", "parameters of modules that aren't adapted as such", found));
        }
        if !matches!(weight.tensor.dim(), 2 | 3) || !weight.tensor.is_floating_point() {
            let found = format!("{} {:?}", weight.name, weight.tensor.size());
            return Err(Error::config("target_parameters", "floats of two or three dimensions", found));
        }
        by_module.entry(module).or_default().push(weight);
    }
    for weights in by_module.values_mut() {
        weights.sort_by_key(|weight| weight.place);
    }
    Ok(by_module)
}

/// What is trained as a whole must not lie in the wrapper of a parameter: PEFT
/// can't hold it.
fn check_saved<M>(base: &Base<M>, config: &AdapterConfig, parameters: &BTreeMap<&str, Vec<&Weight>>) -> Result<()> {
    let wrapped = Wrapped(parameters.keys().map(|module| (module.to_string(), 1)).collect());
    for weight in base.weights().iter() {
        let path = weight.name.rsplit_once('.').map_or("", |(module, _)| module);
        if let Some(entry) = config.selection().modules_to_save.iter().find(|entry| names::is_within(path, entry))
            && let Some(module) = wrapped.around(path)
        {
            let found = format!("{entry}, in {module}");
            return Err(Error::config("modules_to_save", "no module of which a parameter is targeted", found));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_through_the_wrappers() {
        let wrapped = Wrapped([("h.0.experts".to_string(), 2), ("h.0".to_string(), 1)].into());
        let key = |path| wrapped.key(path, "x");
        assert_eq!(key("h.0"), "base_model.model.h.0.base_layer.x");
        assert_eq!(key("h.0.experts.router"), "base_model.model.h.0.base_layer.experts.base_layer.base_layer.router.x");
        assert_eq!(key("h.1.experts"), "base_model.model.h.1.experts.x");
        assert_eq!(wrapped.at("h.0.experts", 0), "h.0.base_layer.experts.base_layer");
        assert_eq!(wrapped.at("h.0.experts", 1), "h.0.base_layer.experts");
        assert_eq!(wrapped.around("h.0.experts.router"), Some("h.0"));
        assert_eq!(wrapped.around("h.01"), None);
    }
}
