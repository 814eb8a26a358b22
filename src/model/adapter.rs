//! One named adapter: the weights that it changes, and its tensors.

use super::NamedParameter;
use super::saved::{Saved, saved};
use super::targets::{Target, targets};
use super::tokens::{Tokens, tokens};
use crate::base::{Adapter, Base, Site};
use crate::error::{Error, Result};
use crate::format::{LoadReport, peft};
use crate::lora::{
    self, AdapterConfig, Built, InitLoraWeights, LayerData, LayerForm, LayerSettings, LayerSpec, LoraConfig, LoraLayer,
    Switches, Tied,
};
use crate::quant::PackedWeight;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use tch::Tensor;

/// The adapter that a model starts with, as in PEFT.
pub(super) const DEFAULT: &str = "default";

/// Parts of adapters by the weights that they are on.
pub(super) type BySite<'a> = HashMap<*const Site, (&'a Arc<Site>, Vec<Arc<dyn Adapter>>)>;

/// An adapter with its name and configuration.
#[derive(Debug)]
pub(super) struct NamedAdapter {
    pub(super) name: String,
    /// With `all-linear` resolved to paths, and patterns settled.
    pub(super) config: AdapterConfig,
    /// The modules with A and B, sorted by path.
    pub(super) layers: Vec<Layer>,
    /// Full copies: `modules_to_save` and biases.
    pub(super) saved: Vec<Saved>,
    /// Rows of tables: `trainable_token_indices`.
    pub(super) tokens: Vec<Tokens>,
    /// Whether its tensors require gradients while it is active.
    pub(super) trainable: bool,
    /// What its scales are multiplied by.
    pub(super) scale: f64,
    pub(super) report: Option<LoadReport>,
    /// What takes the place of weights that its initialisation was taken out
    /// of; empty once that is done.
    pub(super) residuals: Vec<(Arc<Site>, Arc<dyn PackedWeight>)>,
    /// Its tensors before training, where only data can take it out of the base
    /// again: then it is saved as what it learnt since.
    pub(super) initial: Option<BTreeMap<String, Tensor>>,
}

/// How A and B start, with what data said about the layers at their paths.
#[derive(Debug, Clone, Copy)]
pub(super) struct Init<'a> {
    pub(super) init: InitLoraWeights,
    pub(super) data: Option<&'a HashMap<String, Arc<LayerData>>>,
    /// The largest rank that the file has tensors for, where they come from one.
    pub(super) largest_rank: Option<i64>,
}

impl From<InitLoraWeights> for Init<'_> {
    fn from(init: InitLoraWeights) -> Self {
        Init { init, data: None, largest_rank: None }
    }
}

/// A and B on one weight.
#[derive(Debug)]
pub(super) struct Layer {
    /// The module's, or the name of a parameter that is adapted as such.
    pub(super) path: String,
    /// The path in its keys.
    pub(super) key_path: String,
    /// Paths, in keys, of layers whose adapter is tied to this one.
    pub(super) outputs: Vec<String>,
    pub(super) site: Arc<Site>,
    pub(super) lora: Arc<dyn LoraLayer>,
    /// As the configuration says.
    pub(super) settings: LayerSettings,
}

impl NamedAdapter {
    /// A new adapter beside the base, in which nothing takes part yet.
    pub(super) fn build<'a, M>(
        name: &str,
        base: &Base<M>,
        mut config: AdapterConfig,
        init: impl Into<Init<'a>>,
        switches: &Arc<Switches>,
    ) -> Result<Self> {
        check_name(name)?;
        config.check_supported()?;
        let init = init.into();
        let targets = targets(base, &config)?;
        let names = targets.names();
        let mut taken = HashSet::new();
        let mut residuals = Vec::new();
        let mut layers: Vec<Layer> = Vec::with_capacity(targets.all.len());
        for target in targets.all {
            // LoKr's factors grow with the weight only.
            let LayerSettings { r, .. } = target.settings;
            if let Some(most) = init.largest_rank.filter(|most| r > *most)
                && !matches!(config, AdapterConfig::Lokr(_))
            {
                let expected = format!("at most {most}, the largest size in the file");
                return Err(Error::config("r", expected, format!("{r} for {}", target.path)));
            }
            let site = target.weight.site_or_attach()?;
            // A tied weight may have one adapter for each of its uses.
            let form_of_use = target.form == LayerForm::Embedding;
            if !taken.insert((Arc::as_ptr(&site), form_of_use)) {
                let first = layers.iter().find(|layer| Arc::ptr_eq(&layer.site, &site));
                let first = first.map_or("", |layer| &layer.path);
                let found = format!("{} and {first}, which share one weight", target.path);
                return Err(Error::config("target_modules", "one name of a tied weight", found));
            }
            let Built { layer, residual } = layer(&config, &target, init, &site.frozen(), switches)?;
            let Target { path, key_path, form, settings, dropout, outputs, .. } = target;
            residuals.extend(residual.map(|residual| (Arc::clone(&site), residual)));
            let layer = match form {
                LayerForm::Embedding if config.ensure_weight_tying() => {
                    Arc::new(Tied::new(layer, dropout, Arc::clone(switches))) as Arc<dyn LoraLayer>
                }
                _ => layer,
            };
            layers.push(Layer { path, key_path, outputs, site, lora: layer, settings });
        }
        let modules: HashSet<&str> =
            targets.modules.iter().map(String::as_str).chain(layers.iter().map(|layer| layer.path.as_str())).collect();
        let saved = saved(base, &config, &modules, &targets.wrapped, switches)?;
        for (i, copy) in saved.iter().enumerate() {
            let layer = layers.iter().any(|layer| Arc::ptr_eq(&layer.site, &copy.site));
            let twice = saved.iter().take(i).any(|other| Arc::ptr_eq(&other.site, &copy.site) && other.key == copy.key);
            if layer || twice {
                let found = format!("{}, which is tied to another", copy.site.name());
                return Err(Error::config("modules_to_save", "one name of a tied weight", found));
            }
        }
        let tokens = config.as_lora().map_or(Ok(Vec::new()), |config| tokens(base, config, switches))?;
        for table in &tokens {
            let sites = layers.iter().map(|layer| &layer.site).chain(saved.iter().map(|saved| &saved.site));
            if sites.into_iter().any(|site| Arc::ptr_eq(site, &table.site)) {
                let expected = "tables that the same adapter doesn't change otherwise, as in PEFT";
                return Err(Error::config("trainable_token_indices", expected, &table.path));
            }
        }
        config.settle(&names, targets.modules);
        let name = name.to_string();
        let report = None;
        let (trainable, scale, initial) = (true, 1.0, None);
        Ok(NamedAdapter { name, config, layers, saved, tokens, trainable, scale, report, residuals, initial })
    }

    /// Every weight that it changes, with what changes it.
    pub(super) fn sites(&self) -> impl Iterator<Item = (&Arc<Site>, Arc<dyn Adapter>)> {
        let layers = self.layers.iter().map(|layer| (&layer.site, Arc::clone(&layer.lora) as Arc<dyn Adapter>));
        let saved = self.saved.iter().map(|saved| (&saved.site, Arc::clone(&saved.copy) as _));
        layers.chain(saved).chain(self.tokens.iter().map(|table| (&table.site, Arc::clone(&table.value) as _)))
    }

    /// Its tensors by their keys in a file, sorted.
    pub(super) fn tensors(&self) -> Vec<NamedParameter> {
        let layers = self.layers.iter().flat_map(|layer| {
            let tensors = layer.lora.tensors().into_iter();
            tensors.map(|(end, tensor)| NamedParameter { name: peft::key(&layer.key_path, end), tensor })
        });
        let saved =
            self.saved.iter().map(|saved| NamedParameter { name: saved.key.clone(), tensor: saved.copy.value() });
        let tokens = self.tokens.iter().map(|table| NamedParameter {
            name: peft::key(&table.path, "token_adapter.trainable_tokens_delta"),
            tensor: table.value.value(),
        });
        let mut all: Vec<_> = layers.chain(saved).chain(tokens).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Its tensors by names that no other adapter of the model has: those in a
    /// file, and for another adapter than `default` its name before the last
    /// part, as in PEFT.
    pub(super) fn parameters(&self) -> Vec<NamedParameter> {
        let mut all = self.tensors();
        if self.name != DEFAULT {
            for parameter in &mut all {
                parameter.name = match parameter.name.rsplit_once('.') {
                    Some((head, end)) if names_adapter(end) => format!("{head}.{end}.{}", self.name),
                    Some((head, end)) => format!("{head}.{}.{end}", self.name),
                    None => format!("{}.{}", parameter.name, self.name),
                };
            }
        }
        all
    }

    /// Whether its tensors require gradients.
    pub(super) fn require_grad(&self, on: bool) -> Result<()> {
        for parameter in self.tensors() {
            let _ = parameter.tensor.f_set_requires_grad(on)?;
        }
        Ok(())
    }

    /// Keeps a copy of its tensors, if they were taken out of the base.
    pub(super) fn keep_initial(&mut self) -> Result<()> {
        if self.residuals.is_empty() {
            return Ok(());
        }
        let copy = |p: NamedParameter| {
            let mut copy = p.tensor.f_detach()?.f_empty_like()?;
            copy.f_copy_(&p.tensor.f_detach()?)?;
            Ok((p.name, copy))
        };
        self.initial = Some(self.tensors().into_iter().map(copy).collect::<Result<_>>()?);
        Ok(())
    }

    /// Its configuration, for what only LoRA has.
    pub(super) fn lora_config(&self, what: &str) -> Result<&LoraConfig> {
        let other = || Error::config("peft_type", format!("LORA for {what}"), self.config.peft_type());
        self.config.as_lora().ok_or_else(other)
    }

    /// Multiplies the scales that the configuration gives.
    pub(super) fn set_scale(&mut self, scale: f64) {
        self.scale = scale;
        for layer in &self.layers {
            layer.lora.set_scaling(layer.settings.scaling * scale);
        }
    }
}

/// Names become folders when adapters are saved, and parts of keys.
pub(super) fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| !c.is_control() && !['.', '/', '\\', ':'].contains(&c);
    if name.is_empty() || name == super::BASE_ROW || !name.chars().all(plain) {
        let expected = format!("a name without dots and slashes, other than {}", super::BASE_ROW);
        return Err(Error::config("adapter_name", expected, format!("{name:?}")));
    }
    Ok(())
}

/// Whether the last part of a key is the adapter's own, and not that of a
/// tensor in a module of its own.
fn names_adapter(end: &str) -> bool {
    ["lora_", "hada_", "lokr_"].iter().any(|prefix| end.starts_with(prefix))
}

/// The adapter of a target's weight, and what its start leaves of the weight.
fn layer(
    config: &AdapterConfig,
    target: &Target,
    init: Init,
    weight: &Arc<dyn PackedWeight>,
    switches: &Arc<Switches>,
) -> Result<Built> {
    let Target { path, form, settings, dropout, .. } = target;
    let layer = match config {
        AdapterConfig::Lora(config) => {
            let spec = LayerSpec { dropout: *dropout, ..layer_spec(config, *settings, init, *form, path)? };
            return spec.build(weight, switches);
        }
        AdapterConfig::Loha(config) => lora::lycoris_layer(config, *settings, *form, path, weight, switches)?,
        AdapterConfig::Lokr(config) => lora::lycoris_layer(config, *settings, *form, path, weight, switches)?,
    };
    Ok(Built { layer, residual: None })
}

/// What the LoRA of a weight of this form is made from.
fn layer_spec(
    config: &LoraConfig,
    settings: LayerSettings,
    init: Init,
    form: LayerForm,
    path: &str,
) -> Result<LayerSpec> {
    if config.lora_bias && form == LayerForm::Embedding {
        return Err(Error::config("lora_bias", "false where an embedding is adapted", format!("true for {path}")));
    }
    Ok(LayerSpec {
        form,
        r: settings.r,
        scaling: settings.scaling,
        dropout: config.lora_dropout,
        lora_bias: config.lora_bias,
        use_dora: config.use_dora,
        qalora: config.use_qalora().then(|| config.qalora_group_size()),
        init: init.init,
        loftq: config.loftq_config()?,
        data: init.data.and_then(|data| data.get(path)).cloned(),
        kind: config.dtype,
    })
}
