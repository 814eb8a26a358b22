//! Any layout, turned into PEFT's.

use super::detect::{detect, refuse_other_kinds};
use super::file::{AdapterFile, Found};
use super::keys::{AdapterKind, KeyLayout, Part};
use super::parts::Module;
use super::resolve::resolve;
use super::settings::{ModuleSettings, exact_config};
use super::{AdapterFormat, diffusers, kronecker, peft, safetensors};
use crate::error::{Error, Result};
use crate::lora::{AdapterConfig, LayerSettings, LohaConfig, LoraConfig, TargetModules};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tch::Tensor;

/// An adapter as PEFT's folder would hold it.
#[derive(Debug)]
pub(crate) struct ReadAdapter {
    /// The tensors' file.
    pub(crate) path: PathBuf,
    pub(crate) format: AdapterFormat,
    pub(crate) config: AdapterConfig,
    /// Keys of the configuration that we don't know.
    pub(crate) unknown: Vec<String>,
    /// By PEFT's keys.
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// The keys in the file by PEFT's, where they differ.
    pub(crate) names: BTreeMap<String, String>,
}

/// One layer of a base.
#[derive(Debug, Clone)]
pub(crate) struct BaseLayer<'a> {
    pub(crate) path: &'a str,
    /// The sizes of its weight, if there is a model.
    pub(crate) sizes: Option<Vec<i64>>,
}

/// Reads an adapter for a base with these layers.
///
/// # Errors
/// [`Error::Io`]; [`Error::Corrupt`] and [`Error::Unsupported`] as
/// [`AdapterFile::detect`] has them; [`Error::Config`] for a component that
/// must be chosen; [`Error::Keys`] for keys without a module in the base.
pub(crate) fn read(file: &AdapterFile, layers: &[BaseLayer<'_>]) -> Result<ReadAdapter> {
    match file.find()? {
        Found::Peft(folder) => {
            let read = peft::read_config(&folder)?;
            let path = folder.join(peft::WEIGHTS_FILE);
            let tensors = safetensors::read(&path)?;
            let peft::ReadConfig { config, unknown } = read;
            if file.key_mapping.is_empty() {
                let (format, names) = (AdapterFormat::Peft, BTreeMap::new());
                return Ok(ReadAdapter { path, format, config, unknown, tensors, names });
            }
            let source = Source { path, format: AdapterFormat::Peft, component: String::new() };
            source.read(file, layers, tensors, Some((config, unknown)))
        }
        Found::File(path) => {
            let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
            let tensors = safetensors::deserialize(&path, &bytes)?;
            let keys = tensors.keys().map(String::as_str);
            let format = match file.format {
                Some(format) => {
                    refuse_other_kinds(keys.clone())?;
                    format
                }
                None => detect(&path, keys.clone())?.format,
            };
            let component = choose(&path, file.component.as_deref(), format.keys(), keys)?;
            let config = match format {
                AdapterFormat::Peft => {
                    let reason = format!("PEFT's keys without {} beside them, which has the scale", peft::CONFIG_FILE);
                    return Err(Error::corrupt(&path, reason));
                }
                AdapterFormat::Diffusers | AdapterFormat::DiffusersOld => metadata(&path, &bytes, &component)?,
                AdapterFormat::Kohya | AdapterFormat::ComfyUi | AdapterFormat::Lycoris => None,
            };
            Source { path, format, component }.read(file, layers, tensors, config)
        }
    }
}

/// The component that the caller means, as the file's keys have it, or the
/// only one.
pub(super) fn choose<'k>(
    path: &Path,
    wanted: Option<&str>,
    layout: &dyn KeyLayout,
    keys: impl Iterator<Item = &'k str>,
) -> Result<String> {
    let found: BTreeSet<&str> = keys.filter_map(|key| Some(layout.component(key)?.0)).collect();
    let found: Vec<&str> = found.into_iter().collect();
    let same = |wanted: &str| {
        // kohya's `lora_unet_` is the name of transformers as well.
        let by_prefix = || found.iter().find(|component| layout.prefix(component) == layout.prefix(wanted));
        found.iter().find(|component| **component == wanted).or_else(by_prefix).copied()
    };
    let chosen = match (wanted, found.as_slice()) {
        (Some(""), _) => Some(""),
        (Some(wanted), _) => same(wanted),
        (None, [only]) => Some(*only),
        (None, _) => None,
    };
    chosen.map(String::from).ok_or_else(|| {
        let expected = format!("one of those in {}: {}", path.display(), found.join(", "));
        Error::config("component", expected, wanted.unwrap_or("not given"))
    })
}

/// The configuration that diffusers wrote beside the tensors of a component.
fn metadata(path: &Path, bytes: &[u8], component: &str) -> Result<Option<Given>> {
    let Some(fields) = diffusers::recorded(path, bytes)? else { return Ok(None) };
    let prefix = if component.is_empty() { String::new() } else { format!("{component}.") };
    let own = fields.into_iter().filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?.to_string(), value)));
    let mut own: Map<String, Value> = own.collect();
    if own.is_empty() {
        return Ok(None);
    }
    own.entry("peft_type").or_insert(json!("LORA"));
    // The keys tell the modules; a target is there to be compared with them.
    let targets = own.get("target_modules").is_some_and(|modules| !modules.is_null());
    if !targets {
        own.insert("target_modules".into(), json!("all-linear"));
    }
    let peft::ReadConfig { mut config, unknown } = peft::config_from_fields(path, &own)?;
    if !targets {
        *config.placed_mut().target_modules = None;
    }
    Ok(Some((config, unknown)))
}

/// A configuration in the file, and the keys in it that we don't know.
type Given = (AdapterConfig, Vec<String>);

/// A file of which the layout and the component are known.
struct Source {
    path: PathBuf,
    format: AdapterFormat,
    component: String,
}

impl Source {
    fn read(
        self,
        file: &AdapterFile,
        layers: &[BaseLayer<'_>],
        tensors: BTreeMap<String, Tensor>,
        given: Option<Given>,
    ) -> Result<ReadAdapter> {
        let paths: Vec<&str> = layers.iter().map(|layer| layer.path).collect();
        let renamed = file.key_mapping.apply(&paths)?;
        let found = resolve(&self.path, self.format, &self.component, &paths, &renamed, tensors)?;
        let mut modules = BTreeMap::new();
        for (path, module) in found {
            modules.insert(path, module.into_peft()?);
        }
        let kind = self.kind(&modules)?;
        let (config, unknown) = match given {
            None => (self.config_of_tensors(kind, layers, &paths, &modules)?, Vec::new()),
            Some((config, unknown)) => {
                let recorded = match config {
                    AdapterConfig::Lora(_) => AdapterKind::Lora,
                    AdapterConfig::Loha(_) => AdapterKind::Loha,
                    AdapterConfig::Lokr(_) => AdapterKind::Lokr,
                };
                if recorded != kind {
                    let of = config.peft_type();
                    let reason = format!("the configuration in the file is of {of}, and its tensors are of {kind}");
                    return Err(Error::corrupt(&self.path, reason));
                }
                (self.config(config, &paths, &renamed, &modules)?, unknown)
            }
        };
        let (mut tensors, mut names) = (BTreeMap::new(), BTreeMap::new());
        for (path, module) in modules {
            for (part, (key, tensor)) in module.parts {
                let Some(end) = part.peft_end() else { continue };
                names.insert(peft::key(path, end), key);
                tensors.insert(peft::key(path, end), tensor);
            }
        }
        Ok(ReadAdapter { path: self.path, format: self.format, config, unknown, tensors, names })
    }

    /// What all modules are.
    fn kind(&self, modules: &BTreeMap<&str, Module>) -> Result<AdapterKind> {
        let mut kinds = modules.values().filter_map(|module| Some((module.kind()?, &module.name)));
        let (kind, first) = kinds.next().ok_or_else(|| Error::corrupt(&self.path, "no adapter of a module"))?;
        match kinds.find(|(other, _)| *other != kind) {
            None => Ok(kind),
            Some((other, name)) => {
                let several = format!("{kind} of {first} beside {other} of {name} in one adapter");
                Err(Error::Unsupported { fields: vec![several] })
            }
        }
    }

    /// The configuration where the file has none: ranks by shape; alphas as
    /// they stand there, else the rank, as in diffusers.
    fn config_of_tensors(
        &self,
        kind: AdapterKind,
        layers: &[BaseLayer<'_>],
        paths: &[&str],
        modules: &BTreeMap<&str, Module>,
    ) -> Result<AdapterConfig> {
        if kind == AdapterKind::Lokr {
            let own = layers.iter().filter_map(|layer| Some((layer, modules.get(layer.path)?)));
            let (config, settings) = kronecker::config(&own.collect::<Vec<_>>())?;
            return exact_config(config, paths, &settings).validate();
        }
        let mut settings = Vec::with_capacity(modules.len());
        for (path, module) in modules {
            let r = module.rank().unwrap_or(0);
            let lora_alpha = module.alpha()?.unwrap_or(r as f64);
            settings.push(ModuleSettings { name: (*path).into(), r, lora_alpha, w1: None });
        }
        let has = |part| modules.values().any(|module| module.parts.contains_key(&part));
        let config: AdapterConfig = if kind == AdapterKind::Loha {
            LohaConfig { use_effective_conv2d: has(Part::HadaT1), ..LohaConfig::default() }.into()
        } else {
            let (use_dora, lora_bias) = (has(Part::Magnitude), has(Part::BBias));
            LoraConfig { use_dora, lora_bias, ..LoraConfig::default() }.into()
        };
        exact_config(config, paths, &settings).validate()
    }

    /// The configuration that the file has, in the base's own names.
    fn config(
        &self,
        given: AdapterConfig,
        layers: &[&str],
        renamed: &[String],
        modules: &BTreeMap<&str, Module>,
    ) -> Result<AdapterConfig> {
        self.check_complete(&given, layers, renamed, modules)?;
        let paths: Vec<&str> = modules.keys().copied().collect();
        let in_file = given.layer_settings(modules.values().map(|module| module.name.as_str()));
        let mut settings = Vec::with_capacity(modules.len());
        for ((path, module), found) in modules.iter().zip(&in_file) {
            let wrong = |field: &str, is: &dyn std::fmt::Display, key: &str, found: &dyn std::fmt::Display| {
                let reason =
                    format!("the configuration in the file has {field} = {is} for {path}, and {key} has {found}");
                Error::corrupt(&self.path, reason)
            };
            if let Some((key, r)) = module.rank_and_key().filter(|(_, r)| *r != found.r) {
                return Err(wrong("r", &found.r, key, &r));
            }
            let alpha = module.alpha()?.filter(|alpha| *alpha as f32 != found.lora_alpha as f32);
            if let (Some(alpha), Some((key, _))) = (alpha, module.parts.get(&Part::Alpha)) {
                return Err(wrong("lora_alpha", &found.lora_alpha, key, &alpha));
            }
            let &LayerSettings { r, lora_alpha, w1, .. } = found;
            settings.push(ModuleSettings { name: path.to_string(), r, lora_alpha, w1 });
        }
        // As it was written, where it means the same here.
        if given.selection().target_modules.is_some()
            && given.matched(layers.iter().copied())? == paths
            && given.layer_settings(paths) == in_file
        {
            return Ok(given);
        }
        exact_config(given, layers, &settings).validate()
    }

    /// Whether all modules that the configuration targets are in the file.
    fn check_complete(
        &self,
        given: &AdapterConfig,
        layers: &[&str],
        renamed: &[String],
        modules: &BTreeMap<&str, Module>,
    ) -> Result<()> {
        let mut config = given.clone();
        // PEFT takes a whole path for the last segments of a longer one as
        // well. The writer may not have meant that: it went by the keys.
        let mut whole = BTreeSet::new();
        match config.placed_mut().target_modules {
            None => return Ok(()),
            Some(TargetModules::List(list)) => {
                let (paths, ends) = std::mem::take(list).into_iter().partition(|entry| renamed.contains(entry));
                (whole, *list) = (BTreeSet::<String>::from_iter::<Vec<String>>(paths), ends);
            }
            Some(_) => {}
        }
        let matched: BTreeSet<&str> = config.matched(renamed.iter().map(String::as_str))?.into_iter().collect();
        let wanted = layers.iter().zip(renamed).filter(|(path, name)| {
            (matched.contains(name.as_str()) || whole.contains(*name)) && !modules.contains_key(*path)
        });
        let missing: Vec<String> = wanted.map(|(_, name)| format!("those of {name}")).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::Keys { path: self.path.clone(), missing, unexpected: vec![] })
    }
}
