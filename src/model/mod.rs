//! Floor 4: `LoraModel`, a base with adapters on it.

mod adapter;
mod adapters;
mod convert;
mod data;
mod files;
mod forward;
mod merge;
mod mixed;
mod saved;
mod status;
mod summary;
mod targets;
mod tied;
mod tokens;
mod weighted;

pub use forward::ForwardModule;
pub use merge::{MergeOptions, MergeReport, MergedLayer};
pub use mixed::{BASE_ROW, MixedBatch};
pub use status::{LayerStatus, ModelStatus};
pub use summary::Summary;

use crate::base::Base;
use crate::error::{Error, Result};
use crate::format::LoadReport;
use crate::lora::{AdapterConfig, InitLoraWeights, Switches};
use crate::quant::QuantConfig;
use adapter::{DEFAULT, NamedAdapter};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::Tensor;

/// A trainable tensor and the key under which it is saved.
#[derive(Debug)]
pub struct NamedParameter {
    /// PEFT's key: `base_model.model.h.0.q_proj.lora_A.weight`.
    pub name: String,
    /// A handle on the parameter itself.
    pub tensor: Tensor,
}

/// A base model with adapters on its weights: of LoRA and its variants, LoHa or
/// LoKr.
///
/// It starts with one adapter, called `default`, and can hold more, each with a
/// configuration of its own; those that are active are summed.
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
    /// The oldest adapter: a model always has one.
    first: NamedAdapter,
    /// The others, in the order in which they were added.
    others: Vec<NamedAdapter>,
    /// Names, in the order in which they are summed.
    active: Vec<String>,
    merged: Vec<String>,
    switches: Arc<Switches>,
    /// Whether a batch is mixed now.
    mixed: Arc<AtomicBool>,
}

impl<M> LoraModel<M> {
    /// Puts a new adapter, called `default`, on the weights that `config`
    /// targets, freezes everything else, and starts in training mode.
    ///
    /// `config` is a [`LoraConfig`](crate::LoraConfig), a
    /// [`LohaConfig`](crate::LohaConfig) or a [`LokrConfig`](crate::LokrConfig).
    /// The adapter's tensors are drawn from libtorch's default generator in the order of the
    /// weights' names; call [`tch::manual_seed`] before for repeatable values.
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_peft::{Base, LohaConfig, LoraConfig, LoraModel};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
    /// let config = LoraConfig::builder().r(2).target_modules("all-linear").build()?;
    /// let model = LoraModel::wrap(Base::new(vs, net), config)?;
    /// assert_eq!(model.layers(), ["proj"]);
    ///
    /// // A store alone, of a model that is kept elsewhere; and another kind of adapter.
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
    /// let _model = LoraModel::wrap(vs, LohaConfig::builder().r(2).target_modules(["proj"]).build()?)?;
    /// # drop(net);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NoTarget`] if nothing matches, or one entry of a list doesn't;
    /// [`Error::Unsupported`] for a feature that this version lacks;
    /// [`Error::AlreadyAdapted`]. Nothing is changed then.
    pub fn wrap(base: impl Into<Base<M>>, config: impl Into<AdapterConfig>) -> Result<Self> {
        let config = config.into();
        let init = init_of(&config);
        Self::start(base.into(), |base, switches| NamedAdapter::build(DEFAULT, base, config, init, switches))
    }

    /// A model with the first adapter that `build` makes.
    fn start(mut base: Base<M>, build: impl FnOnce(&Base<M>, &Arc<Switches>) -> Result<NamedAdapter>) -> Result<Self> {
        for weight in base.weights().iter() {
            if weight.site().is_some_and(|site| site.is_adapted()) {
                return Err(Error::AlreadyAdapted { name: weight.name.clone() });
            }
        }
        let switches = Arc::new(Switches::default());
        let mut first = build(&base, &switches)?;
        base.weights().freeze()?;
        if !first.residuals.is_empty() {
            for (site, residual) in first.residuals.drain(..) {
                site.replace_frozen(residual);
            }
            base.has_changed();
        }
        let active = vec![first.name.clone()];
        let mixed = Arc::new(AtomicBool::new(false));
        let model = LoraModel { base, first, others: Vec::new(), active, merged: Vec::new(), switches, mixed };
        model.sync()?;
        Ok(model)
    }

    /// Quantises the base under the adapters, as [`Base::quantize`] does
    /// before; the model that results is the same.
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
    /// model.quantize(&QuantConfig::nf4().build()?)?;
    /// assert_eq!(model.layer_status()[0].scheme, Some(Scheme::NF4));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Base::quantize`]; [`Error::Config`] while an adapter is merged.
    pub fn quantize(&mut self, config: &QuantConfig) -> Result<()> {
        self.refuse_merged("quantize")?;
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

    /// The configuration of the first adapter, with `all-linear` resolved to
    /// paths; of another, see [`LoraModel::adapter_config`].
    pub fn config(&self) -> &AdapterConfig {
        &self.first.config
    }

    /// The paths of the adapted layers of the first adapter, sorted; then the
    /// names of the parameters that are adapted as such.
    pub fn layers(&self) -> Vec<&str> {
        self.first.layers.iter().map(|layer| layer.path.as_str()).collect()
    }

    /// The tensors of all adapters, sorted by name within each: A (r, in) and B
    /// (out, r) of every layer that LoRA adapts, and full copies.
    pub fn parameters(&self) -> Vec<NamedParameter> {
        self.all().flat_map(NamedAdapter::parameters).collect()
    }

    /// Those of [`LoraModel::parameters`] that require gradients; what an
    /// optimizer takes. Empty after [`LoraModel::from_pretrained`].
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
    /// let names: Vec<String> = model.trainable_parameters().into_iter().map(|p| p.name).collect();
    /// assert_eq!(names, ["base_model.model.proj.lora_A.weight", "base_model.model.proj.lora_B.weight"]);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
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
    /// let adapted = model.forward(&x)?;
    /// let plain = {
    ///     let _off = model.disable_adapters();
    ///     model.forward(&x)?
    /// };
    /// assert!(!plain.allclose(&adapted, 1e-5, 1e-8, false));
    /// assert!(model.forward(&x)?.equal(&adapted));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    #[must_use = "the adapters are on again once the guard is dropped"]
    pub fn disable_adapters(&self) -> DisabledAdapters {
        let before = self.switches.enabled.swap(false, Ordering::Relaxed);
        DisabledAdapters { switches: Arc::clone(&self.switches), before }
    }

    /// What came of loading the first adapter, if it was loaded.
    ///
    /// ```no_run
    /// # fn run(base: tch_peft::Base<tch::nn::Linear>) -> tch_peft::Result<()> {
    /// let model = tch_peft::LoraModel::from_pretrained(base, "adapter")?;
    /// if let Some(report) = model.load_report() {
    ///     println!("{} tensors; unknown fields: {:?}", report.loaded.len(), report.unknown_config_keys);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn load_report(&self) -> Option<&LoadReport> {
        self.first.report.as_ref()
    }

    /// Trainable and total parameters.
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
    /// let summary = model.summary();
    /// assert_eq!((summary.trainable, summary.total), (2 * 2 * 8, 2 * 2 * 8 + 8 * 8 + 8));
    /// println!("{summary}");
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn summary(&self) -> Summary {
        let count = |tensors: &mut dyn Iterator<Item = Tensor>| tensors.map(|t| t.numel() as u64).sum::<u64>();
        let trainable = count(&mut self.trainable_parameters().into_iter().map(|p| p.tensor));
        let adapters = count(&mut self.parameters().into_iter().map(|p| p.tensor));
        let base: u64 = self.base.weights().iter().map(|w| w.tensor.numel() as u64).sum();
        Summary { trainable, total: base + adapters }
    }
}

/// How LoRA's A and B start; other kinds of adapters have a start of their own.
fn init_of(config: &AdapterConfig) -> InitLoraWeights {
    config.as_lora().map_or(InitLoraWeights::Default, |config| config.init_lora_weights)
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
