//! From one layout to another, without a model.

use super::file::{AdapterFile, Found};
use super::keys::{Part, parse, parse_in};
use super::read::choose;
use super::write::{Outgoing, OutgoingLayer, write};
use super::{AdapterFormat, BaseLayer, diffusers, peft, read, safetensors};
use crate::error::{Error, Result};
use crate::lora::{AdapterConfig, TargetModules};
use crate::names::module_path;
use crate::quant::check_finite;
use std::collections::{BTreeMap, BTreeSet};
use tch::Tensor;

impl AdapterFile {
    /// Writes the adapter in another layout, as [`LoraModel::save_as`] does,
    /// without a model.
    ///
    /// `weights` are the names of the base's weights, such as
    /// [`Base::weight_names`] answers. Without any, the adapter's own keys tell
    /// the modules, which kohya's layout and attention processors can't.
    ///
    /// ```no_run
    /// use tch_peft::{AdapterFile, AdapterFormat};
    /// let to = AdapterFile::new("comfyui.safetensors");
    /// AdapterFile::new("simpletuner/checkpoint-500").convert(AdapterFormat::ComfyUi, to, &[])?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`LoraModel::from_pretrained`] and [`LoraModel::save_as`], but
    /// for what only the base's weights can tell; [`Error::Config`] where the
    /// base's names are needed.
    ///
    /// [`LoraModel::save_as`]: crate::LoraModel::save_as
    /// [`LoraModel::from_pretrained`]: crate::LoraModel::from_pretrained
    /// [`Base::weight_names`]: crate::Base::weight_names
    pub fn convert(&self, format: AdapterFormat, to: impl Into<AdapterFile>, weights: &[String]) -> Result<()> {
        let own;
        let base: Vec<&str> = if weights.is_empty() {
            own = self.own_modules()?;
            own.iter().map(String::as_str).collect()
        } else {
            weights.iter().filter_map(|name| module_path(name)).collect()
        };
        let layers: Vec<BaseLayer<'_>> = base.iter().map(|path| BaseLayer { path, sizes: None }).collect();
        let adapter = read(self, &layers)?;
        let mut config = adapter.config;
        config.check_supported()?;
        let modules = by_module(&adapter.path, &adapter.tensors)?;
        if weights.is_empty() {
            as_expression(&mut config, &modules);
        }
        let settings = config.layer_settings(modules.keys().copied());
        let mut layers = Vec::with_capacity(modules.len());
        for ((path, tensors), settings) in modules.into_iter().zip(settings) {
            for (end, tensor) in &tensors {
                let r = tensor.size().first().copied();
                let tells = ["lora_A.weight", "lora_embedding_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"];
                if tells.contains(end) && r != Some(settings.r) {
                    let (name, expected) = (peft::key(path, end), format!("rank {}", settings.r));
                    return Err(Error::Mismatch { name, expected, found: format!("{:?}", tensor.size()) });
                }
                check_finite(&peft::key(path, end), tensor, "the adapter is broken: use an earlier one")?;
            }
            layers.push(OutgoingLayer { path, settings, tensors });
        }
        write(&to.into(), format, &Outgoing { config: &config, layers, base })
    }

    /// The modules' paths by the adapter's own keys.
    fn own_modules(&self) -> Result<Vec<String>> {
        let (path, format) = match self.find()? {
            Found::Peft(folder) => (folder.join(peft::WEIGHTS_FILE), AdapterFormat::Peft),
            Found::File(path) => {
                let told = self.format.map_or_else(|| self.detect().map(|found| found.format), Ok)?;
                (path, told)
            }
        };
        let keys = safetensors::names(&path)?;
        let of_processor = |key: &String| diffusers::PROCESSOR_ENDS.iter().any(|(end, _)| key.ends_with(end));
        let flat = matches!(format, AdapterFormat::Kohya | AdapterFormat::Lycoris);
        let expected = if flat || keys.iter().any(of_processor) {
            format!("the names of the base's weights, which the keys in {} don't tell", path.display())
        } else if !self.key_mapping.is_empty() {
            "the names of the base's weights, for the key mapping".into()
        } else {
            let component = choose(&path, self.component.as_deref(), format.keys(), keys.iter().map(String::as_str))?;
            let own = keys.iter().filter_map(|key| Some(parse_in(format.keys(), key, &component)?.name.to_string()));
            return Ok(own.collect::<BTreeSet<String>>().into_iter().collect());
        };
        Err(Error::config("weights", expected, "none"))
    }
}

/// The tensors of each module with the ends of PEFT's keys.
fn by_module<'t>(
    path: &std::path::Path,
    tensors: &'t BTreeMap<String, Tensor>,
) -> Result<BTreeMap<&'t str, Vec<(&'static str, Tensor)>>> {
    let mut modules: BTreeMap<&str, Vec<(&'static str, Tensor)>> = BTreeMap::new();
    let mut unexpected = Vec::new();
    for (key, tensor) in tensors {
        let parsed = parse(&peft::Keys, key);
        match parsed.and_then(|parsed| Some((parsed.name, Part::peft_end(parsed.part)?))) {
            Some((module, end)) => modules.entry(module).or_default().push((end, tensor.shallow_clone())),
            None => unexpected.push(key.clone()),
        }
    }
    if unexpected.is_empty() {
        return Ok(modules);
    }
    Err(Error::Keys { path: path.into(), missing: vec![], unexpected })
}

/// A list of all paths becomes an expression: PEFT takes an entry of a list
/// for the end of a longer path as well, and which there are isn't known.
fn as_expression<T>(config: &mut AdapterConfig, modules: &BTreeMap<&str, T>) {
    let target = config.placed_mut().target_modules;
    if let Some(TargetModules::List(list)) = &target
        && list.iter().all(|entry| modules.contains_key(entry.as_str()))
    {
        let paths: Vec<String> = modules.keys().map(|path| regex::escape(path)).collect();
        *target = Some(TargetModules::Regex(paths.join("|")));
    }
}
