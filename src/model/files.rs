//! Adapters to and from PEFT's folders.

use super::{LoraModel, NamedParameter};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::format::{LoadReport, peft, safetensors, write_files};
use crate::quant::check_finite;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use tch::Tensor;

impl<M> LoraModel<M> {
    /// Loads an adapter, written here or by HF PEFT, for inference: nothing is
    /// trainable, and the mode is evaluation.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`], [`Error::Unsupported`] for features
    /// that we don't have, [`Error::Keys`] unless the file's keys are the
    /// model's, [`Error::Mismatch`] for a shape, [`Error::NotFinite`]; and
    /// those of [`LoraModel::wrap`].
    pub fn from_pretrained(base: impl Into<Base<M>>, folder: impl AsRef<Path>) -> Result<Self> {
        let model = Self::load(base.into(), folder.as_ref())?;
        for parameter in model.parameters() {
            let _ = parameter.tensor.f_set_requires_grad(false)?;
        }
        model.switches.training.store(false, Ordering::Relaxed);
        Ok(model)
    }

    /// Warm start: a new training run from an adapter alone.
    ///
    /// Only the adapter and its configuration are taken. Optimizer, schedule,
    /// data order and random numbers start anew; to go on with a run, use
    /// [`Run::resume_or_start`](crate::Run::resume_or_start).
    ///
    /// # Errors
    /// As [`LoraModel::from_pretrained`].
    pub fn init_lora(base: impl Into<Base<M>>, folder: impl AsRef<Path>) -> Result<Self> {
        Self::load(base.into(), folder.as_ref())
    }

    fn load(base: Base<M>, folder: &Path) -> Result<Self> {
        let read = peft::read_config(folder)?;
        let path = folder.join(peft::WEIGHTS_FILE);
        let mut tensors = safetensors::read(&path)?;
        let base_copies = take_base_copies(&base, &mut tensors)?;
        // The values are loaded over the initial ones: any will do, and PEFT's
        // `false` alone would cost a second draw.
        let mut model = Self::attach(base, read.config, crate::lora::InitLoraWeights::Default)?;
        let mut report = model.load_tensors(&path, tensors).inspect_err(|_| model.remove_adapters())?;
        report.base_copies = base_copies;
        report.unknown_config_keys = read.unknown;
        if !report.unknown_config_keys.is_empty() {
            let keys = report.unknown_config_keys.join(", ");
            tracing::warn!(folder = %folder.display(), keys, "adapter_config.json has keys that this version doesn't know; they are kept");
        }
        model.report = Some(report);
        Ok(model)
    }

    /// Takes the adapters off again, after a failure.
    fn remove_adapters(&self) {
        for layer in &self.layers {
            layer.site.set_adapter(None);
        }
    }

    /// Whether `tensors` are this model's A and B, in name, shape and sanity.
    pub(crate) fn check_tensors(&self, path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let parameters = self.parameters();
        let missing: Vec<String> =
            parameters.iter().filter(|p| !tensors.contains_key(&p.name)).map(|p| p.name.clone()).collect();
        let unexpected: Vec<String> =
            tensors.keys().filter(|key| !parameters.iter().any(|p| p.name == **key)).cloned().collect();
        if !missing.is_empty() || !unexpected.is_empty() {
            return Err(Error::Keys { path: path.into(), missing, unexpected });
        }
        for p in &parameters {
            let Some(found) = tensors.get(&p.name) else { continue };
            if found.size() != p.tensor.size() || !found.is_floating_point() {
                return Err(Error::Mismatch {
                    name: p.name.clone(),
                    expected: format!("floats {:?}", p.tensor.size()),
                    found: format!("{:?} {:?}", found.f_kind()?, found.size()),
                });
            }
            check_finite(&p.name, found, "the adapter is broken: use an earlier one")?;
        }
        Ok(())
    }

    /// Loads A and B in place, all or none.
    pub(crate) fn load_tensors(&self, path: &Path, mut tensors: BTreeMap<String, Tensor>) -> Result<LoadReport> {
        self.check_tensors(path, &tensors)?;
        let loaded = tensors.keys().cloned().collect();
        let _no_grad = tch::no_grad_guard();
        for NamedParameter { name, mut tensor } in self.parameters() {
            if let Some(found) = tensors.remove(&name) {
                tensor.f_copy_(&found)?;
            }
        }
        Ok(LoadReport { loaded, ..LoadReport::default() })
    }

    /// Writes `adapter_model.safetensors` and `adapter_config.json`, which HF
    /// PEFT loads. Each file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] for a folder that can't be made or written to.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        write_files(folder.as_ref(), &self.adapter_bytes()?)
    }

    /// The adapter's files as they go to disk.
    pub(crate) fn adapter_bytes(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut config = self.config.clone();
        config.other.insert("inference_mode".into(), true.into());
        let tensors = self.parameters().into_iter().map(|p| (p.name, p.tensor)).collect();
        Ok(vec![
            (peft::WEIGHTS_FILE.to_string(), safetensors::serialize(&tensors)?),
            (peft::CONFIG_FILE.to_string(), peft::config_to_json(&config)?),
        ])
    }
}

/// Takes the copies of base weights out of an adapter's tensors, and answers
/// their keys. A copy that isn't the base's own weight means another base.
fn take_base_copies<M>(base: &Base<M>, tensors: &mut BTreeMap<String, Tensor>) -> Result<Vec<String>> {
    let mut keys = Vec::new();
    for weight in base.weights().iter() {
        let Some(path) = weight.module_path() else { continue };
        let own = |key: &&String| peft::base_copy_path(key) == Some(path);
        let Some(key) = tensors.keys().find(own).cloned() else { continue };
        let Some(copy) = tensors.remove(&key) else { continue };
        let wrong = |found: String| Error::Mismatch {
            name: key.clone(),
            expected: format!("the base's {} {:?}", weight.name, weight.tensor.size()),
            found,
        };
        if copy.size() != weight.tensor.size() {
            return Err(wrong(format!("{:?}", copy.size())));
        }
        // What was quantised can't be compared with what it was made from.
        let dense = match weight.site() {
            Some(site) => site.frozen().as_dense(),
            None => Some(weight.tensor.shallow_clone()),
        };
        if let Some(dense) = dense
            && !dense.f_equal(&copy.f_to_device(dense.device())?.f_to_kind(dense.f_kind()?)?)?
        {
            return Err(wrong("other values: the adapter was trained on another base".into()));
        }
        keys.push(key);
    }
    Ok(keys)
}
