//! Batches in which each row has its own adapter.

use super::LoraModel;
use crate::base::{Adapter, MixedRows, Site};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The name that stands for no adapter in a mixed batch, as in PEFT.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let model = LoraModel::wrap(Base::new(vs, net), config)?;
/// let mixed = model.mixed_batch(&["default", BASE_ROW])?; // the second row without an adapter
/// let y = model.forward(&Tensor::ones([2, 8], (Kind::Float, Device::Cpu)))?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub const BASE_ROW: &str = "__base__";

/// A batch is mixed while this lives; see [`LoraModel::mixed_batch`].
#[derive(Debug)]
pub struct MixedBatch {
    sites: Vec<Arc<Site>>,
    on: Arc<AtomicBool>,
}

impl Drop for MixedBatch {
    fn drop(&mut self) {
        for site in &self.sites {
            site.set_mixed(None);
        }
        self.on.store(false, Ordering::Relaxed);
    }
}

impl<M> LoraModel<M> {
    /// Gives each row of the batches that are run until the guard is dropped
    /// its own adapter, in one pass: `names` has one entry for each row,
    /// [`BASE_ROW`] for none. The active adapters take no part meanwhile.
    ///
    /// Rows of one adapter that lie one after the other are the fastest.
    ///
    /// The batch is the first dimension of every adapted layer's input; a
    /// matrix may have batch and positions flattened into its rows. Gradients
    /// reach the adapters that require them, so a mixed batch can be trained
    /// on.
    ///
    /// ```no_run
    /// # fn run(model: tch_peft::LoraModel<tch::nn::Linear>, x: tch::Tensor) -> tch_peft::Result<()> {
    /// let mixed = model.mixed_batch(&["default", tch_peft::BASE_ROW, "poet"])?;
    /// let y = model.forward(&x)?; // x has three rows
    /// drop(mixed);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have, no name,
    /// while adapters are merged, and while another mixed batch is run. The
    /// forward pass is an error for an input that doesn't fit, and for
    /// operators that use a weight as a whole.
    #[must_use = "the batch is mixed while the guard lives"]
    pub fn mixed_batch(&self, names: &[&str]) -> Result<MixedBatch> {
        self.refuse_merged("mixed_batch")?;
        self.check_rows(names)?;
        if names.is_empty() {
            return Err(Error::config("mixed_batch", "one name for each row", "none"));
        }
        if self.mixed.swap(true, Ordering::Relaxed) {
            return Err(Error::config("mixed_batch", "one at a time", "another one"));
        }
        type Parts = Vec<(Arc<dyn Adapter>, Vec<i64>)>;
        let mut sites: HashMap<*const Site, (&Arc<Site>, Parts)> = HashMap::new();
        for adapter in self.all() {
            let rows: Vec<i64> = (0..).zip(names).filter(|(_, name)| **name == adapter.name).map(|(i, _)| i).collect();
            for (site, part) in adapter.sites() {
                let (_, parts) = sites.entry(Arc::as_ptr(site)).or_insert((site, Vec::new()));
                if !rows.is_empty() {
                    parts.push((part, rows.clone()));
                }
            }
        }
        let mut guard = MixedBatch { sites: Vec::with_capacity(sites.len()), on: Arc::clone(&self.mixed) };
        for (site, parts) in sites.into_values() {
            site.set_mixed(Some(Arc::new(MixedRows::new(names.len() as i64, parts))));
            guard.sites.push(Arc::clone(site));
        }
        Ok(guard)
    }
}
