//! Any layout, turned into PEFT's.

use super::detect::{detect, refuse_other_kinds};
use super::file::{AdapterFile, Found};
use super::keys::{KeyLayout, Part};
use super::resolve::{Module, resolve};
use super::settings::{ModuleSettings, exact_config};
use super::{AdapterFormat, diffusers, peft, safetensors};
use crate::error::{Error, Result};
use crate::lora::{AdapterConfig, LoraConfig, TargetModules};
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

/// Reads an adapter for a base with `layers` at these paths.
///
/// # Errors
/// [`Error::Io`]; [`Error::Corrupt`] and [`Error::Unsupported`] as
/// [`AdapterFile::detect`] has them; [`Error::Config`] for a component that
/// must be chosen; [`Error::Keys`] for keys without a module in the base.
pub(crate) fn read(file: &AdapterFile, layers: &[&str]) -> Result<ReadAdapter> {
    match file.find()? {
        Found::Peft(folder) => {
            let read = peft::read_config(&folder)?;
            let path = folder.join(peft::WEIGHTS_FILE);
            let tensors = safetensors::read(&path)?;
            if file.key_mapping.is_empty() {
                let peft::ReadConfig { config, unknown } = read;
                let (format, names) = (AdapterFormat::Peft, BTreeMap::new());
                return Ok(ReadAdapter { path, format, config, unknown, tensors, names });
            }
            let source = Source { path, format: AdapterFormat::Peft, component: String::new() };
            source.read(file, layers, tensors, Some(read.lora()?))
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
                AdapterFormat::Kohya | AdapterFormat::ComfyUi => None,
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

/// The `LoraConfig` that diffusers wrote beside the tensors of a component.
fn metadata(path: &Path, bytes: &[u8], component: &str) -> Result<Option<Given>> {
    let Some(text) = safetensors::metadata(path, bytes)?.remove(diffusers::METADATA_KEY) else { return Ok(None) };
    let fields: Map<String, Value> = serde_json::from_str(&text).map_err(|error| {
        Error::corrupt(path, format!("`{}` is not a JSON object ({error})", diffusers::METADATA_KEY))
    })?;
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
    let (mut config, unknown) = peft::config_from_fields(path, &own)?.lora()?;
    if !targets {
        config.target_modules = None;
    }
    Ok(Some((config, unknown)))
}

/// A configuration in the file, and the keys in it that we don't know.
type Given = (LoraConfig, Vec<String>);

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
        layers: &[&str],
        tensors: BTreeMap<String, Tensor>,
        given: Option<Given>,
    ) -> Result<ReadAdapter> {
        let renamed = file.key_mapping.apply(layers)?;
        let modules = resolve(&self.path, self.format, &self.component, layers, &renamed, tensors)?;
        let (config, unknown) = match given {
            None => (self.config_of_tensors(layers, &modules)?, Vec::new()),
            Some((config, unknown)) => (self.config(config, layers, &renamed, &modules)?, unknown),
        };
        let (mut tensors, mut names) = (BTreeMap::new(), BTreeMap::new());
        for (path, module) in modules {
            for (part, (key, tensor)) in module.parts {
                let Some(end) = part.peft_end() else { continue };
                names.insert(peft::key(path, end), key);
                tensors.insert(peft::key(path, end), tensor);
            }
        }
        Ok(ReadAdapter { path: self.path, format: self.format, config: config.into(), unknown, tensors, names })
    }

    /// The configuration where the file has none: ranks by shape; alphas as
    /// they stand there, else the rank, as in diffusers.
    fn config_of_tensors(&self, layers: &[&str], modules: &BTreeMap<&str, Module>) -> Result<LoraConfig> {
        let mut settings = Vec::with_capacity(modules.len());
        let (mut use_dora, mut lora_bias) = (false, false);
        for (path, module) in modules {
            let r = module.rank().unwrap_or(0);
            // sd-scripts takes 0 for the rank too.
            let lora_alpha = module.alpha()?.filter(|alpha| *alpha != 0.0).unwrap_or(r as f64);
            settings.push(ModuleSettings { name: (*path).into(), r, lora_alpha });
            use_dora |= module.parts.contains_key(&Part::Magnitude);
            lora_bias |= module.parts.contains_key(&Part::BBias);
        }
        let config = LoraConfig { use_dora, lora_bias, ..LoraConfig::default() };
        exact_config(config, layers, &settings).validate()
    }

    /// The configuration that the file has, in the base's own names.
    fn config(
        &self,
        given: LoraConfig,
        layers: &[&str],
        renamed: &[String],
        modules: &BTreeMap<&str, Module>,
    ) -> Result<LoraConfig> {
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
            settings.push(ModuleSettings { name: path.to_string(), r: found.r, lora_alpha: found.lora_alpha });
        }
        // As it was written, where it means the same here.
        if given.target_modules.is_some()
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
        given: &LoraConfig,
        layers: &[&str],
        renamed: &[String],
        modules: &BTreeMap<&str, Module>,
    ) -> Result<()> {
        let mut config = given.clone();
        // PEFT takes a whole path for the last segments of a longer one as
        // well. The writer may not have meant that: it went by the keys.
        let mut whole = BTreeSet::new();
        match &mut config.target_modules {
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
