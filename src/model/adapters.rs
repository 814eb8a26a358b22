//! Adding, choosing, renaming and deleting adapters.

use super::adapter::{BySite, NamedAdapter, check_name};
use super::{BASE_ROW, LoraModel, init_of};
use crate::base::Site;
use crate::error::{Error, Result};
use crate::lora::{AdapterConfig, OneOrMany};
use std::collections::HashMap;
use std::sync::Arc;

impl<M> LoraModel<M> {
    /// All adapters, the oldest first.
    pub(super) fn all(&self) -> impl Iterator<Item = &NamedAdapter> {
        std::iter::once(&self.first).chain(&self.others)
    }

    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut NamedAdapter> {
        std::iter::once(&mut self.first).chain(&mut self.others)
    }

    /// The adapter of that name.
    pub(super) fn named(&self, name: &str) -> Result<&NamedAdapter> {
        self.all().find(|adapter| adapter.name == name).ok_or_else(|| self.unknown(name))
    }

    fn named_mut(&mut self, name: &str) -> Result<&mut NamedAdapter> {
        let unknown = self.unknown(name);
        self.all_mut().find(|adapter| adapter.name == name).ok_or(unknown)
    }

    fn unknown(&self, name: &str) -> Error {
        let expected = format!("one of {}", self.adapter_names().join(", "));
        Error::config("adapter_name", expected, name)
    }

    pub(super) fn refuse_taken(&self, name: &str) -> Result<()> {
        check_name(name)?;
        match self.all().any(|adapter| adapter.name == name) {
            true => Err(Error::config("adapter_name", "a name that no adapter of the model has", name)),
            false => Ok(()),
        }
    }

    pub(super) fn refuse_merged(&self, what: &str) -> Result<()> {
        if self.merged.is_empty() {
            return Ok(());
        }
        let found = format!("{} merged", self.merged.join(", "));
        Err(Error::config(what, "no merged adapters; call `unmerge_adapter` first", found))
    }

    /// The names of all adapters, the oldest first.
    pub fn adapter_names(&self) -> Vec<&str> {
        self.all().map(|adapter| adapter.name.as_str()).collect()
    }

    /// The names of the adapters that are summed in the forward pass, merged
    /// ones included.
    pub fn active_adapters(&self) -> Vec<&str> {
        self.active.iter().map(String::as_str).collect()
    }

    /// The configuration of an adapter.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have.
    pub fn adapter_config(&self, name: &str) -> Result<&AdapterConfig> {
        Ok(&self.named(name)?.config)
    }

    /// Adds a new adapter. It takes no part, and requires no gradients, until
    /// [`LoraModel::set_adapter`] names it.
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
    /// model.add_adapter("poet", config)?;
    /// assert_eq!(model.adapter_names(), ["default", "poet"]);
    /// assert_eq!(model.active_adapters(), ["default"]);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is taken or can't name a folder; those
    /// of [`LoraModel::wrap`]. Nothing is changed then.
    pub fn add_adapter(&mut self, name: &str, config: impl Into<AdapterConfig>) -> Result<()> {
        self.refuse_taken(name)?;
        let config = config.into();
        let init = init_of(&config);
        let adapter = NamedAdapter::build(name, &self.base, config, init, &self.switches)?;
        self.push(adapter)
    }

    /// Takes a new adapter in, inactive.
    pub(super) fn push(&mut self, adapter: NamedAdapter) -> Result<()> {
        refuse_residuals(&adapter)?;
        adapter.require_grad(false)?;
        self.others.push(adapter);
        self.sync()
    }

    /// Puts an adapter in the place of the one with its name.
    pub(super) fn swap(&mut self, name: &str, mut new: NamedAdapter) -> Result<()> {
        refuse_residuals(&new)?;
        let exchange = |model: &mut Self, new: &mut NamedAdapter| {
            if let Some(old) = model.all_mut().find(|adapter| adapter.name == name) {
                std::mem::swap(old, new);
            }
        };
        exchange(self, &mut new);
        if let Err(error) = self.check_together(&self.active) {
            exchange(self, &mut new);
            return Err(error);
        }
        // The old one may be on weights that the new one leaves alone.
        for (site, _) in new.sites() {
            site.set_active([]);
        }
        self.sync()
    }

    /// Makes these adapters, and no others, take part: one name or several,
    /// which are summed in the order given.
    ///
    /// The active ones require gradients, unless they were loaded for inference
    /// or [`LoraModel::set_requires_grad`] said otherwise; all others don't.
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
    /// model.add_adapter("poet", config)?;
    /// model.set_adapter("poet")?;
    /// let poet = model.forward(&x)?;
    /// model.set_adapter(["default", "poet"])?; // both, summed
    /// assert!(!model.forward(&x)?.allclose(&poet, 1e-5, 1e-8, false));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have or that comes
    /// twice, while adapters are merged, and for adapters of which one replaces
    /// a weight that another changes too.
    pub fn set_adapter(&mut self, names: impl Into<OneOrMany<String>>) -> Result<()> {
        self.refuse_merged("set_adapter")?;
        let names = names.into().as_slice().to_vec();
        self.check_together(&names)?;
        self.active = names;
        self.sync()
    }

    fn check_together(&self, names: &[String]) -> Result<()> {
        let mut changed: HashMap<*const Site, &str> = HashMap::new();
        let mut rows: Vec<(*const Site, i64)> = Vec::new();
        for (i, name) in names.iter().enumerate() {
            if names.iter().take(i).any(|earlier| earlier == name) {
                return Err(Error::config("adapter_name", "each name once", format!("{name} twice")));
            }
            let adapter = self.named(name)?;
            for table in &adapter.tokens {
                for row in &table.rows {
                    let place = (Arc::as_ptr(&table.site), *row);
                    if rows.contains(&place) {
                        let found = format!("row {row} of {} in two adapters", table.path);
                        return Err(Error::config(
                            "trainable_token_indices",
                            "other rows in each active adapter",
                            found,
                        ));
                    }
                    rows.push(place);
                }
            }
            for (site, part) in adapter.sites() {
                let other = changed.insert(Arc::as_ptr(site), name).filter(|other| *other != name);
                let replaced = self.all().any(|a| a.saved.iter().any(|saved| Arc::ptr_eq(&saved.site, site)));
                if let Some(other) = other.filter(|_| replaced || part.replacement().is_some()) {
                    let found = format!("{other} and {name}, of which one replaces {}", site.name());
                    return Err(Error::config("adapter_name", "adapters that can be summed", found));
                }
            }
        }
        Ok(())
    }

    /// Whether the adapter's tensors require gradients, now and whenever it is
    /// active.
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
    /// model.set_requires_grad("default", false)?;
    /// assert!(model.trainable_parameters().is_empty());
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have; libtorch's.
    pub fn set_requires_grad(&mut self, name: &str, on: bool) -> Result<()> {
        self.named_mut(name)?.trainable = on;
        self.sync()
    }

    /// Multiplies the scale s of every layer of an adapter, from the next
    /// forward pass on; 1 is what its configuration says, 0 turns it off. It is
    /// not saved.
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
    /// model.set_adapter_scale("default", 0.0)?;
    /// let off = model.forward(&x)?;
    /// let _guard = model.disable_adapters();
    /// assert!(model.forward(&x)?.allclose(&off, 1e-6, 1e-7, false));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have, an infinite
    /// scale, and an adapter that is merged.
    pub fn set_adapter_scale(&mut self, name: &str, scale: f64) -> Result<()> {
        if !scale.is_finite() {
            return Err(Error::config("adapter_scale", "a finite number", scale));
        }
        self.refuse_merged("set_adapter_scale")?;
        self.named_mut(name)?.set_scale(scale);
        Ok(())
    }

    /// What [`LoraModel::set_adapter_scale`] set, 1 by default.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have.
    pub fn adapter_scale(&self, name: &str) -> Result<f64> {
        Ok(self.named(name)?.scale)
    }

    /// Gives an adapter another name.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have, and for a new
    /// name that is taken or can't name a folder.
    pub fn rename_adapter(&mut self, old: &str, new: &str) -> Result<()> {
        self.named(old)?;
        self.refuse_taken(new)?;
        self.named_mut(old)?.name = new.into();
        for name in self.active.iter_mut().chain(&mut self.merged).filter(|name| *name == old) {
            *name = new.into();
        }
        Ok(())
    }

    /// Deletes an adapter. If it was active, the other active ones stay so, and
    /// no other becomes it.
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
    /// model.add_adapter("poet", config)?;
    /// model.delete_adapter("default")?;
    /// assert_eq!(model.adapter_names(), ["poet"]);
    /// assert!(model.active_adapters().is_empty());
    /// model.set_adapter("poet")?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have, while adapters
    /// are merged, and for the last adapter, which [`LoraModel::unload`] takes
    /// off.
    pub fn delete_adapter(&mut self, name: &str) -> Result<()> {
        self.named(name)?;
        self.refuse_merged("delete_adapter")?;
        if self.others.is_empty() {
            let expected = "an adapter beside others; `unload` takes off the last one";
            return Err(Error::config("adapter_name", expected, name));
        }
        // No site may keep what is deleted.
        self.active.retain(|active| active != name);
        self.sync()?;
        if self.first.name == name {
            self.first = self.others.remove(0);
        } else {
            self.others.retain(|adapter| adapter.name != name);
        }
        Ok(())
    }

    /// Tells every site which adapters take part, and every tensor whether it
    /// requires gradients.
    pub(super) fn sync(&self) -> Result<()> {
        let mut sites = BySite::new();
        for (site, _) in self.all().flat_map(NamedAdapter::sites) {
            sites.entry(Arc::as_ptr(site)).or_insert((site, Vec::new()));
        }
        for name in self.active.iter().filter(|name| !self.merged.contains(name)) {
            for (site, part) in self.named(name)?.sites() {
                sites.entry(Arc::as_ptr(site)).or_insert((site, Vec::new())).1.push(part);
            }
        }
        for (site, parts) in sites.into_values() {
            site.set_active(parts);
        }
        for adapter in self.all() {
            adapter.require_grad(adapter.trainable && self.active.contains(&adapter.name))?;
        }
        Ok(())
    }

    /// Names of adapters, one for each row; [`BASE_ROW`] for none.
    pub(super) fn check_rows(&self, names: &[&str]) -> Result<()> {
        names.iter().filter(|name| **name != BASE_ROW).try_for_each(|name| self.named(name).map(|_| ()))
    }
}

/// An initialisation that changes the base would change the other adapters
/// with it, or change the base twice.
fn refuse_residuals(adapter: &NamedAdapter) -> Result<()> {
    if adapter.residuals.is_empty() {
        return Ok(());
    }
    let found = format!("{:?}", init_of(&adapter.config).name().unwrap_or_default());
    let expected = "one that leaves the base as it is, for an adapter that isn't a model's first";
    Err(Error::config("init_lora_weights", expected, found))
}
