//! Floor 4: `LoraModel`, a base with adapters on it.

mod files;
mod forward;
mod summary;

pub use forward::ForwardModule;
pub use summary::Summary;

use crate::base::{Base, Site, WeightRole};
use crate::error::{Error, Result};
use crate::format::{LoadReport, peft};
use crate::lora::{
    self, InitLoraWeights, LayerForm, LayerSettings, LayerSpec, LoraConfig, LoraLayer, Switches, TargetModules,
};
use crate::quant::QuantConfig;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tch::Tensor;

/// A trainable tensor and the key under which it is saved.
#[derive(Debug)]
pub struct NamedParameter {
    /// PEFT's key: `base_model.model.h.0.q_proj.lora_A.weight`.
    pub name: String,
    /// A handle on the parameter itself.
    pub tensor: Tensor,
}

/// A base model with LoRA adapters on its linear weights.
///
/// The adapters ride on the weights, so the module computes adapted results
/// wherever it is called from: through [`LoraModel::forward`], through
/// [`LoraModel::module`], or by a caller who kept a handle on the network.
///
/// ```no_run
/// use tch::{Device, Kind, Tensor, nn};
/// use tch_peft::{Base, LoraConfig, LoraModel};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root() / "proj", 64, 64, Default::default());
/// let config = LoraConfig::builder().r(8).target_modules(["proj"]).build()?;
/// let model = LoraModel::wrap(Base::new(vs, net), config)?;
///
/// let x = Tensor::randn([4, 64], (Kind::Float, Device::Cpu));
/// model.forward(&x)?.mean(Kind::Float).backward();
/// model.save_pretrained("adapter")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LoraModel<M> {
    base: Base<M>,
    config: LoraConfig,
    layers: Vec<Layer>,
    switches: Arc<Switches>,
    report: Option<LoadReport>,
}

/// One adapted linear.
#[derive(Debug)]
pub(crate) struct Layer {
    path: String,
    site: Arc<Site>,
    lora: Arc<dyn LoraLayer>,
}

impl Layer {
    /// The adapter's tensors with their keys.
    fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.lora.tensors().into_iter().map(|(end, tensor)| (peft::key(&self.path, end), tensor))
    }
}

impl<M> LoraModel<M> {
    /// Puts new adapters on the linear weights that `config` targets, freezes
    /// everything else, and starts in training mode.
    ///
    /// A and B are drawn from libtorch's default generator in the order of the
    /// weights' names; call [`tch::manual_seed`] before for repeatable values.
    ///
    /// # Errors
    /// [`Error::NoTarget`] if nothing matches, or one entry of a list doesn't;
    /// [`Error::AlreadyAdapted`]. Nothing is changed then.
    pub fn wrap(base: impl Into<Base<M>>, config: LoraConfig) -> Result<Self> {
        let init = config.init_lora_weights;
        Self::attach(base.into(), config, init)
    }

    /// Builds every adapter first and attaches them last, so that a failure
    /// leaves the base as it was.
    fn attach(base: Base<M>, mut config: LoraConfig, init: InitLoraWeights) -> Result<Self> {
        config.check_supported()?;
        // `all-linear` means linear layers; a name may mean any kind.
        let candidates: Vec<_> = match config.target_modules {
            Some(TargetModules::AllLinear) => base.weights().linears().collect(),
            _ => base.weights().layers().collect(),
        };
        let paths: Vec<&str> = candidates.iter().map(|(path, _)| *path).collect();
        let targets = lora::resolve(&config, &paths)?;
        let chosen: Vec<_> = candidates.iter().filter(|(path, _)| targets.iter().any(|t| t == path)).collect();
        for (_, weight) in &chosen {
            if weight.site().is_some_and(|site| site.adapter().is_some()) {
                return Err(Error::AlreadyAdapted { name: weight.name.clone() });
            }
        }
        let switches = Arc::new(Switches::default());
        let settings = config.layer_settings(chosen.iter().map(|(path, _)| *path));
        let mut layers: Vec<Layer> = Vec::with_capacity(chosen.len());
        for ((path, weight), settings) in chosen.iter().zip(settings) {
            let site = weight.site_or_attach()?;
            if let Some(first) = layers.iter().find(|layer| Arc::ptr_eq(&layer.site, &site)) {
                let found = format!("{path} and {}, which share one weight", first.path);
                return Err(Error::config("target_modules", "one name of a tied weight", found));
            }
            let lora = layer_spec(&config, settings, init, weight.role).build(&site.frozen(), &switches)?;
            layers.push(Layer { path: path.to_string(), site, lora });
        }
        base.weights().freeze()?;
        for layer in &layers {
            layer.site.set_adapter(Some(Arc::clone(&layer.lora) as _));
        }
        // PEFT writes what `all-linear` meant, as a list of paths.
        config.settle(&targets);
        if config.target_modules == Some(TargetModules::AllLinear) {
            config.target_modules = Some(TargetModules::List(targets));
        }
        Ok(LoraModel { base, config, layers, switches, report: None })
    }

    /// Quantises the base under the adapters, as [`Base::quantize`] does
    /// before; the model that results is the same.
    ///
    /// # Errors
    /// As [`Base::quantize`].
    pub fn quantize(&mut self, config: &QuantConfig) -> Result<()> {
        self.base.quantize_in_place(config)
    }

    /// The base.
    pub fn base(&self) -> &Base<M> {
        &self.base
    }

    /// Gives the base back, with its adapters still on the weights.
    pub fn into_base(self) -> Base<M> {
        self.base
    }

    /// The module, for a forward pass of its own signature.
    pub fn module(&self) -> &M {
        self.base.module()
    }

    /// The configuration, with `all-linear` resolved to paths.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The paths of the adapted layers, sorted.
    pub fn layers(&self) -> Vec<&str> {
        self.layers.iter().map(|layer| layer.path.as_str()).collect()
    }

    /// A (r, in) and B (out, r) of every adapted layer, sorted by name.
    pub fn parameters(&self) -> Vec<NamedParameter> {
        let mut all: Vec<_> = self.layers.iter().flat_map(Layer::tensors).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all.into_iter().map(|(name, tensor)| NamedParameter { name, tensor }).collect()
    }

    /// Those of [`LoraModel::parameters`] that require gradients; what an
    /// optimizer takes. Empty after [`LoraModel::from_pretrained`].
    pub fn trainable_parameters(&self) -> Vec<NamedParameter> {
        self.parameters().into_iter().filter(|p| p.tensor.requires_grad()).collect()
    }

    /// Whether dropout is live.
    pub fn is_training(&self) -> bool {
        self.switches.training.load(Ordering::Relaxed)
    }

    /// Turns the adapters off until the guard is dropped, which restores what
    /// was before. The model computes the base's results meanwhile, in every
    /// thread.
    #[must_use = "the adapters are on again once the guard is dropped"]
    pub fn disable_adapters(&self) -> DisabledAdapters {
        let before = self.switches.enabled.swap(false, Ordering::Relaxed);
        DisabledAdapters { switches: Arc::clone(&self.switches), before }
    }

    /// What came of loading the adapter, if it was loaded.
    pub fn load_report(&self) -> Option<&LoadReport> {
        self.report.as_ref()
    }

    /// Trainable and total parameters.
    pub fn summary(&self) -> Summary {
        let count = |tensors: &mut dyn Iterator<Item = Tensor>| tensors.map(|t| t.numel() as u64).sum::<u64>();
        let trainable = count(&mut self.trainable_parameters().into_iter().map(|p| p.tensor));
        let adapters = count(&mut self.parameters().into_iter().map(|p| p.tensor));
        let base: u64 = self.base.weights().iter().map(|w| w.tensor.numel() as u64).sum();
        Summary { trainable, total: base + adapters }
    }
}

/// What the adapter of a weight with this role is made from. As in PEFT, a
/// module's class decides on `fan_in_fan_out` where it is known.
fn layer_spec(config: &LoraConfig, settings: LayerSettings, init: InitLoraWeights, role: WeightRole) -> LayerSpec {
    let form = match role {
        WeightRole::Embedding => LayerForm::Embedding,
        WeightRole::Conv { groups } => LayerForm::Conv { groups },
        WeightRole::Conv1D => LayerForm::Linear { fan_in_fan_out: true },
        WeightRole::Linear | WeightRole::Other => LayerForm::Linear { fan_in_fan_out: config.fan_in_fan_out },
    };
    LayerSpec {
        form,
        r: settings.r,
        scaling: settings.scaling,
        dropout: config.lora_dropout,
        lora_bias: config.lora_bias,
        use_dora: config.use_dora,
        init,
        kind: None,
    }
}

/// Adapters stay off while this lives; see [`LoraModel::disable_adapters`].
#[derive(Debug)]
pub struct DisabledAdapters {
    switches: Arc<Switches>,
    before: bool,
}

impl Drop for DisabledAdapters {
    fn drop(&mut self) {
        self.switches.enabled.store(self.before, Ordering::Relaxed);
    }
}
