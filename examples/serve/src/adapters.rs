//! The base and the adapters on it, by name.

use crate::llama::{Llama, Result};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tch_peft::{BASE_ROW, Base, LoraConfig, LoraModel};

/// The name of the base without adapters.
pub const BASE: &str = "base";

/// An adapter as it was loaded once: its name in the model. A request holds on
/// to the one that it began with.
pub type Version = Arc<str>;

pub struct Adapters {
    model: LoraModel<Llama>,
    current: BTreeMap<String, Version>,
    /// Replaced or taken away, but perhaps in use.
    retired: Vec<Version>,
    loaded: u64,
}

impl Adapters {
    pub fn new(base: Base<Llama>) -> Result<Self> {
        // A model always has an adapter. This one is of zeros on one layer, and
        // no row is ever given to it.
        let placeholder = LoraConfig::builder().r(1).target_modules(["layers.0.self_attn.q_proj"]).build()?;
        let mut model = LoraModel::wrap(base, placeholder)?;
        model.eval()?;
        Ok(Adapters { model, current: BTreeMap::new(), retired: Vec::new(), loaded: 0 })
    }

    pub fn model(&self) -> &LoraModel<Llama> {
        &self.model
    }

    /// Names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.current.keys().cloned().collect()
    }

    /// What requests of that name begin with now.
    pub fn get(&self, name: &str) -> Option<Version> {
        if name == BASE { Some(BASE_ROW.into()) } else { self.current.get(name).cloned() }
    }

    /// Loads an adapter, in the place of the one of that name if there is one.
    /// Answers whether there was. If it can't be loaded, nothing changes.
    pub fn load(&mut self, name: &str, folder: &Path) -> Result<bool> {
        let version: Version = format!("{}", self.loaded + 1).into();
        self.model.load_adapter(folder, &version)?;
        self.loaded += 1;
        let old = self.current.insert(name.into(), version);
        let swapped = old.is_some();
        self.retired.extend(old);
        Ok(swapped)
    }

    /// Takes an adapter away. Answers whether there was one.
    pub fn unload(&mut self, name: &str) -> bool {
        let old = self.current.remove(name);
        let found = old.is_some();
        self.retired.extend(old);
        found
    }

    /// Deletes the retired adapters that no request uses any more.
    pub fn sweep(&mut self) -> Result<()> {
        let (unused, used) = self.retired.drain(..).partition(|version| Arc::strong_count(version) == 1);
        self.retired = used;
        let unused: Vec<Version> = unused;
        unused.iter().try_for_each(|version| Ok(self.model.delete_adapter(version)?))
    }
}
