//! Merging adapters into the weights, and taking them off.

use super::LoraModel;
use super::adapter::{BySite, NamedAdapter};
use super::tied;
use crate::base::{Adapter, Adapters, Base, Site};
use crate::error::{Error, Result};
use crate::ffi::hook;
use crate::lora::OneOrMany;
use crate::quant::{self, Dense, PackedWeight, Scheme, check_finite};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// What is merged, and what the result is.
///
/// ```
/// use tch::Kind;
/// use tch_peft::MergeOptions;
///
/// let options = MergeOptions::new().adapters(["default", "poet"]).dtype(Kind::BFloat16);
/// ```
#[derive(Debug, Clone, Default)]
pub struct MergeOptions {
    adapters: Option<Vec<String>>,
    dtype: Option<Kind>,
    requantize: bool,
}

impl MergeOptions {
    /// Merges the active adapters into dense weights of the dtype that they
    /// had before they were packed.
    pub fn new() -> Self {
        MergeOptions::default()
    }

    /// Merges these adapters instead of the active ones.
    #[must_use]
    pub fn adapters(mut self, names: impl Into<OneOrMany<String>>) -> Self {
        self.adapters = Some(names.into().as_slice().to_vec());
        self
    }

    /// The dtype of the result, for [`LoraModel::merge_and_unload`].
    #[must_use]
    pub fn dtype(mut self, kind: Kind) -> Self {
        self.dtype = Some(kind);
        self
    }

    /// Packs the results of quantised weights again, as they were packed. That
    /// loses part of what the adapters add: see [`MergeReport`].
    #[must_use]
    pub fn requantize(mut self, on: bool) -> Self {
        self.requantize = on;
        self
    }
}

/// One merged weight.
#[derive(Debug, Clone, PartialEq)]
pub struct MergedLayer {
    /// Name of the weight.
    pub name: String,
    /// How the result is packed.
    pub scheme: Option<Scheme>,
    /// ‖W' − (W + ΔW)‖ / ‖ΔW‖: the share of what the adapters add that
    /// rounding or packing lost. 0 where they add nothing.
    pub error: f64,
}

/// What merging did; displays as a table.
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
/// model.quantize(&QuantConfig::int8().build()?)?;
/// let report = model.merge_adapter(&MergeOptions::new().requantize(true))?;
/// println!("{report}");
/// let worst = report.worst().map_or(0.0, |layer| layer.error);
/// if worst > 0.3 {
///     model.unmerge_adapter()?; // too much of the adapter would be lost
/// }
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MergeReport {
    /// The merged weights, sorted by name.
    pub layers: Vec<MergedLayer>,
}

impl MergeReport {
    /// The layer with the largest error.
    pub fn worst(&self) -> Option<&MergedLayer> {
        self.layers.iter().max_by(|a, b| a.error.total_cmp(&b.error))
    }
}

impl fmt::Display for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.layers.iter().map(|layer| layer.name.len()).max().unwrap_or(0).max(6);
        write!(f, "{:width$}  {:7}  {:>9}", "weight", "scheme", "error")?;
        for MergedLayer { name, scheme, error } in &self.layers {
            let scheme = scheme.map_or("dense".to_string(), |scheme| scheme.to_string());
            write!(f, "\n{name:width$}  {scheme:7}  {error:>9.2e}")?;
        }
        Ok(())
    }
}

/// A weight with adapters merged into it, not yet in use.
struct Merged {
    site: Arc<Site>,
    weight: Arc<dyn PackedWeight>,
    adapters: Adapters,
    report: MergedLayer,
}

impl<M> LoraModel<M> {
    /// Merges adapters into the weights, so that the forward pass costs what
    /// the base's does. The frozen weights are kept beside the merged ones, and
    /// [`LoraModel::unmerge_adapter`] takes them again as they were.
    ///
    /// W' = W + Σ ΔW is summed in f32 and rounded once.
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
    /// let before = model.forward(&x)?;
    /// model.merge_adapter(&MergeOptions::new())?;
    /// assert!(model.forward(&x)?.allclose(&before, 1e-5, 1e-6, false));
    /// model.unmerge_adapter()?;
    /// assert!(model.forward(&x)?.equal(&before));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have, for adapters
    /// that are merged already or not active, for another dtype than the
    /// base's, for a bias of `lora_B` on a layer without a bias, and for an
    /// adapter of one use of a tied weight;
    /// [`Error::NotFinite`]. Nothing is changed then.
    pub fn merge_adapter(&mut self, options: &MergeOptions) -> Result<MergeReport> {
        let names = self.to_merge(options)?;
        let inactive = names.iter().find(|name| !self.active.contains(name));
        if let Some(name) = inactive {
            return Err(Error::config("adapter_name", "active adapters; call `set_adapter` before", name));
        }
        if let Some(kind) = options.dtype {
            let expected = "the base's while the model is wrapped; `merge_and_unload` changes it";
            return Err(Error::config("dtype", expected, format!("{kind:?}")));
        }
        let all: Vec<String> = self.merged.iter().cloned().chain(names).collect();
        let merged = self.merged_weights(&all, options)?;
        self.merged = all;
        let mut report = MergeReport::default();
        for Merged { site, weight, adapters, report: layer } in merged {
            site.set_merged(Some((weight, adapters)));
            report.layers.push(layer);
        }
        self.sync()?;
        Ok(report)
    }

    /// Takes the frozen weights again, bit by bit as they were. The adapters
    /// are active as before. Does nothing where nothing is merged.
    ///
    /// # Errors
    /// libtorch's.
    pub fn unmerge_adapter(&mut self) -> Result<()> {
        for weight in self.base.weights().iter() {
            if let Some(site) = weight.site() {
                site.set_merged(None);
            }
        }
        self.merged.clear();
        self.sync()
    }

    /// Merges adapters into the weights for good, and gives the base back.
    ///
    /// By default every merged weight is a plain, dense tensor, in the dtype
    /// that it had before it was packed, or in the one asked for. Quantised
    /// weights that no adapter changes stay quantised.
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
    /// let before = model.forward(&x)?;
    /// let (base, _report) = model.merge_and_unload(&MergeOptions::new())?;
    /// // A plain network again.
    /// assert!(nn::Module::forward(base.module(), &x).allclose(&before, 1e-5, 1e-6, false));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`LoraModel::merge_adapter`], but adapters need not be active;
    /// [`Error::Config`] for a dtype together with packing again.
    pub fn merge_and_unload(self, options: &MergeOptions) -> Result<(Base<M>, MergeReport)> {
        if let Some(kind) = options.dtype.filter(|_| options.requantize) {
            let expected = "none where the result is packed again";
            return Err(Error::config("dtype", expected, format!("{kind:?}")));
        }
        // The merged state of the weights is computed anew.
        let names = match &options.adapters {
            None => self.active.clone(),
            Some(_) => self.to_merge(options)?,
        };
        self.refuse_mixed()?;
        let merged = self.merged_weights(&names, options)?;
        let mut report = MergeReport::default();
        for Merged { site, weight, report: layer, .. } in merged {
            site.replace_frozen(weight);
            report.layers.push(layer);
        }
        Ok((self.take_off()?, report))
    }

    /// Gives the base back as it was, without adapters.
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
    /// let base = model.unload()?;
    /// let again = LoraModel::wrap(base, config)?; // it may be wrapped anew
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// libtorch's.
    pub fn unload(self) -> Result<Base<M>> {
        self.refuse_mixed()?;
        self.take_off()
    }

    fn refuse_mixed(&self) -> Result<()> {
        match self.mixed.load(std::sync::atomic::Ordering::Relaxed) {
            true => Err(Error::config("mixed_batch", "none while adapters are taken off", "one")),
            false => Ok(()),
        }
    }

    /// Dense weights become plain tensors; packed ones keep their sites.
    fn take_off(mut self) -> Result<Base<M>> {
        self.active.clear();
        self.unmerge_adapter()?;
        let mut dense_now = HashSet::new();
        for weight in self.base.weights().iter() {
            let Some(site) = weight.site() else { continue };
            if let Some(dense) = site.frozen().as_dense() {
                hook::release(&weight.tensor, &dense)?;
                dense_now.insert(weight.name.clone());
            }
        }
        self.base.note_changes(|name| !dense_now.contains(name));
        Ok(self.base)
    }

    /// The names to merge, none of them merged already.
    fn to_merge(&self, options: &MergeOptions) -> Result<Vec<String>> {
        let names: Vec<String> = match &options.adapters {
            Some(names) => names.clone(),
            None => self.active.iter().filter(|name| !self.merged.contains(name)).cloned().collect(),
        };
        for name in &names {
            self.named(name)?;
            if self.merged.contains(name) {
                return Err(Error::config("adapter_name", "an adapter that is not merged", name));
            }
        }
        if names.is_empty() {
            return Err(Error::config("adapter_name", "at least one active adapter that is not merged", "none"));
        }
        Ok(names)
    }

    /// W' of every weight that the named adapters change, sorted by name.
    fn merged_weights(&self, names: &[String], options: &MergeOptions) -> Result<Vec<Merged>> {
        let mut sites = BySite::new();
        let mut merged = Vec::new();
        for name in names {
            let adapter = self.named(name)?;
            self.refuse_untied(adapter)?;
            for (site, part) in adapter.sites() {
                sites.entry(Arc::as_ptr(site)).or_insert((site, Vec::new())).1.push(part);
            }
        }
        let mut biases = self.bias_sums(names)?;
        for (at, (site, parts)) in sites {
            merged.push(merge(site, parts, biases.remove(&at), options)?);
        }
        for bias in biases.into_values() {
            let site = Arc::clone(&bias.site);
            merged.push(merge(&site, Vec::new(), Some(bias), &MergeOptions::new())?);
        }
        merged.sort_by(|a, b| a.report.name.cmp(&b.report.name));
        Ok(merged)
    }

    /// A weight with several names has one value: what changes one of its uses
    /// only can't be merged into it.
    fn refuse_untied(&self, adapter: &NamedAdapter) -> Result<()> {
        if adapter.config.ensure_weight_tying() {
            return Ok(());
        }
        let layers = adapter.layers.iter().map(|layer| &layer.site);
        let changed: HashSet<_> =
            layers.chain(adapter.saved.iter().map(|saved| &saved.site)).map(Arc::as_ptr).collect();
        let tied = self
            .base
            .weights()
            .iter()
            .filter(|weight| weight.tied.is_some() && tied::source(self.base.weights(), weight).is_some());
        match tied.into_iter().find(|weight| weight.site().is_some_and(|site| changed.contains(&Arc::as_ptr(&site)))) {
            Some(weight) => {
                let expected = "true where an adapter of a tied weight is merged, else it would change its other uses";
                Err(Error::config("ensure_weight_tying", expected, format!("false for {}", weight.name)))
            }
            None => Ok(()),
        }
    }

    /// What the biases of `lora_B` add to those of the base: Σ s · b_B.
    fn bias_sums(&self, names: &[String]) -> Result<HashMap<*const Site, BiasSum>> {
        let mut sums: HashMap<*const Site, BiasSum> = HashMap::new();
        let _no_grad = tch::no_grad_guard();
        for name in names {
            for layer in &self.named(name)?.layers {
                let Some(delta) = layer.lora.bias_delta()? else { continue };
                let name = format!("{}.bias", layer.path);
                let Some(bias) = self.base.weights().iter().find(|weight| weight.name == name) else {
                    let expected = "a bias in every layer that is merged with a bias of lora_B";
                    return Err(Error::config("lora_bias", expected, format!("none in {}", layer.path)));
                };
                let site = bias.site_or_attach()?;
                let adapter = Arc::clone(&layer.lora) as Arc<dyn Adapter>;
                match sums.get_mut(&Arc::as_ptr(&site)) {
                    Some(sum) => {
                        sum.delta = sum.delta.f_add(&delta)?;
                        sum.adapters.push(adapter);
                    }
                    None => drop(sums.insert(Arc::as_ptr(&site), BiasSum { site, delta, adapters: vec![adapter] })),
                }
            }
        }
        Ok(sums)
    }
}

/// What adapters of a layer's weight add to its bias.
struct BiasSum {
    site: Arc<Site>,
    delta: Tensor,
    adapters: Vec<Arc<dyn Adapter>>,
}

/// All values of a weight, dense.
fn values(weight: &dyn PackedWeight, kind: Kind) -> Result<Tensor> {
    match weight.as_dense() {
        Some(dense) => Ok(dense.f_to_kind(kind)?),
        None => weight.dequantize(kind),
    }
}

/// W' = W + Σ ΔW, each ΔW on the frozen weight, and what `bias` adds.
fn merge(
    site: &Arc<Site>,
    mut adapters: Vec<Arc<dyn Adapter>>,
    bias: Option<BiasSum>,
    options: &MergeOptions,
) -> Result<Merged> {
    let _no_grad = tch::no_grad_guard();
    let frozen = site.frozen();
    let wide = if frozen.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let base = values(frozen.as_ref(), wide)?;
    let mut delta = base.f_zeros_like()?;
    for adapter in &adapters {
        delta = delta.f_add(&adapter.delta(&frozen, wide)?)?;
    }
    if let Some(bias) = bias {
        delta = delta.f_add(&bias.delta)?.f_to_kind(wide)?;
        adapters.extend(bias.adapters);
    }
    let scheme = frozen.scheme().filter(|_| options.requantize);
    let kind = options.dtype.unwrap_or(frozen.kind());
    finish(site, base, delta, adapters.into(), scheme, kind)
}

/// Rounds or packs W + ΔW, and measures what that lost.
fn finish(
    site: &Arc<Site>,
    base: Tensor,
    delta: Tensor,
    adapters: Adapters,
    scheme: Option<Scheme>,
    kind: Kind,
) -> Result<Merged> {
    let exact = base.f_add(&delta)?;
    check_finite(site.name(), &exact, "the adapter is broken: use an earlier one")?;
    let weight: Arc<dyn PackedWeight> = match scheme {
        Some(scheme) => quant::pack(&exact.f_to_kind(site.frozen().kind())?, scheme)?,
        None => Arc::new(Dense::new(exact.f_to_kind(kind)?.f_contiguous()?)?),
    };
    let wide = exact.f_kind()?;
    let result = values(weight.as_ref(), wide)?;
    let norm = |t: &Tensor| -> Result<f64> { Ok(f64::try_from(t.f_norm()?)?) };
    let (lost, added) = (norm(&result.f_sub(&exact)?)?, norm(&delta)?);
    let error = if lost == 0.0 || added == 0.0 { 0.0 } else { lost / added };
    let report = MergedLayer { name: site.name().into(), scheme, error };
    Ok(Merged { site: Arc::clone(site), weight, adapters, report })
}
