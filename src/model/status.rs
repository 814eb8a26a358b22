//! What is adapted, and how.

use super::LoraModel;
use crate::base::Site;
use crate::quant::Scheme;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tch::{Device, Kind};

/// The adapters of one weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerStatus {
    /// Name of the weight.
    pub name: String,
    /// The adapters that have a part on it.
    pub available: Vec<String>,
    /// Those that are active, in the order in which they are summed.
    pub active: Vec<String>,
    /// Those that are merged.
    pub merged: Vec<String>,
    /// Those that require gradients.
    pub requires_grad: Vec<String>,
    /// Whether adapters take part at all; see [`LoraModel::disable_adapters`].
    pub enabled: bool,
    /// How the base's weight is packed.
    pub scheme: Option<Scheme>,
    /// The dtype of the base's weight.
    pub kind: Kind,
    /// Where the base's weight is.
    pub device: Device,
}

/// The adapters of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelStatus {
    /// All adapters, the oldest first.
    pub available: Vec<String>,
    /// Those that are active, in the order in which they are summed.
    pub active: Vec<String>,
    /// Those that are merged.
    pub merged: Vec<String>,
    /// Those that require gradients.
    pub requires_grad: Vec<String>,
    /// Whether adapters take part at all.
    pub enabled: bool,
    /// Adapted weights.
    pub layers: usize,
    /// Parameters that require gradients.
    pub trainable: u64,
    /// All parameters, the base's (as if dense) and the adapters'.
    pub total: u64,
}

impl<M> LoraModel<M> {
    /// The adapters of every adapted weight, sorted by name.
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
    /// let [layer] = &model.layer_status()[..] else { panic!("one layer") };
    /// assert_eq!((layer.name.as_str(), layer.active.len(), layer.scheme), ("proj.weight", 1, None));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn layer_status(&self) -> Vec<LayerStatus> {
        let mut sites: Vec<&Arc<Site>> =
            self.all().flat_map(|a| a.sites().map(|(site, _)| site).collect::<Vec<_>>()).collect();
        sites.sort_by(|a, b| a.name().cmp(b.name()));
        sites.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let enabled = self.switches.enabled.load(Ordering::Relaxed);
        let status = |site: &Arc<Site>| {
            let on = |adapter: &super::NamedAdapter| adapter.sites().any(|(other, _)| Arc::ptr_eq(other, site));
            let available: Vec<String> = self.all().filter(|a| on(a)).map(|a| a.name.clone()).collect();
            let among = |names: &[String]| names.iter().filter(|name| available.contains(name)).cloned().collect();
            let frozen = site.frozen();
            LayerStatus {
                name: site.name().into(),
                active: among(&self.active),
                merged: among(&self.merged),
                requires_grad: among(&self.requiring_grad()),
                enabled,
                scheme: frozen.scheme(),
                kind: frozen.kind(),
                device: frozen.device(),
                available,
            }
        };
        sites.into_iter().map(status).collect()
    }

    /// The adapters of the model and what is trained of it.
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
    /// let status = model.model_status();
    /// assert_eq!((status.layers, status.active.as_slice()), (1, &["default".to_string()][..]));
    /// assert!(status.enabled && status.merged.is_empty());
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn model_status(&self) -> ModelStatus {
        let summary = self.summary();
        ModelStatus {
            available: self.all().map(|adapter| adapter.name.clone()).collect(),
            active: self.active.clone(),
            merged: self.merged.clone(),
            requires_grad: self.requiring_grad(),
            enabled: self.switches.enabled.load(Ordering::Relaxed),
            layers: self.layer_status().len(),
            trainable: summary.trainable,
            total: summary.total,
        }
    }

    fn requiring_grad(&self) -> Vec<String> {
        let requires = |adapter: &&super::NamedAdapter| adapter.tensors().iter().any(|p| p.tensor.requires_grad());
        self.all().filter(requires).map(|adapter| adapter.name.clone()).collect()
    }
}
