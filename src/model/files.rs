//! Adapters to and from PEFT's folders.

use super::adapter::{DEFAULT, Init, Layer, NamedAdapter};
use super::{LoraModel, NamedParameter};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::ffi::bytes::copy_all;
use crate::format::{
    self, AdapterFile, AdapterFormat, BaseLayer, LoadReport, Outgoing, OutgoingLayer, ReadAdapter, peft, safetensors,
    write_files,
};
use crate::lora::{InitLoraWeights, Switches};
use crate::quant::check_finite;
use rayon::prelude::*;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tch::{Kind, Tensor};

impl<M> LoraModel<M> {
    /// Loads an adapter for inference: nothing is trainable, and the mode is
    /// evaluation. It is called `default`.
    ///
    /// It is a folder written here or by HF PEFT, or a file of any
    /// [`AdapterFormat`]; [`AdapterFile`] says which part of a pipeline is
    /// meant, and what its modules are called.
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
    /// # let dir = tempfile::tempdir().unwrap();
    /// model.save_pretrained(dir.path())?;
    ///
    /// let base = model.unload()?; // or the same model in another program
    /// let model = LoraModel::from_pretrained(base, dir.path())?;
    /// assert!(model.trainable_parameters().is_empty() && !model.is_training());
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`], [`Error::Unsupported`] for features
    /// that we don't have, [`Error::Keys`] unless the file's keys are the
    /// model's, [`Error::Mismatch`] for a shape, [`Error::NotFinite`],
    /// [`Error::Config`] for a component that must be chosen; and those of
    /// [`LoraModel::wrap`].
    pub fn from_pretrained(base: impl Into<Base<M>>, file: impl Into<AdapterFile>) -> Result<Self> {
        let mut model = Self::init_lora(base, file)?;
        model.set_requires_grad(DEFAULT, false)?;
        model.switches.training.store(false, Ordering::Relaxed);
        Ok(model)
    }

    /// Warm start: a new training run from an adapter alone.
    ///
    /// Only the adapter and its configuration are taken, from a folder of PEFT
    /// (a Hugging Face `Trainer`'s checkpoint is one), of diffusers (a
    /// SimpleTuner checkpoint is one), or a file of any [`AdapterFormat`],
    /// whatever the base is quantised to. Optimizer, schedule,
    /// data order and random numbers start anew; to go on with a run, use
    /// [`Run::resume_or_start`](crate::Run::resume_or_start).
    ///
    /// ```no_run
    /// use tch_peft::{AdamW, Base, LoraModel, QuantConfig};
    ///
    /// let base = Base::torchscript("sd3.pt")?.quantize(&QuantConfig::int8().build()?)?;
    /// // A SimpleTuner checkpoint, though it was trained on another base's precision.
    /// let model = LoraModel::init_lora(base, "output/checkpoint-500")?;
    /// let optimizer = AdamW::builder().lr(1e-4).build(model.trainable_parameters())?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`LoraModel::from_pretrained`].
    pub fn init_lora(base: impl Into<Base<M>>, file: impl Into<AdapterFile>) -> Result<Self> {
        let file = file.into();
        Self::start(base.into(), |base, switches| read(DEFAULT, base, &file, switches))
    }

    /// Adds an adapter from a folder or file of any [`AdapterFormat`], for
    /// inference: it never requires gradients, unless
    /// [`LoraModel::set_requires_grad`] says so. It takes no part until
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
    /// # let dir = tempfile::tempdir().unwrap();
    /// model.save_adapter("default", dir.path(), None)?;
    /// let report = model.load_adapter(dir.path(), "copy")?;
    /// assert_eq!(report.loaded.len(), 2);
    /// let before = model.forward(&x)?;
    /// model.set_adapter("copy")?;
    /// assert!(model.forward(&x)?.equal(&before));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is taken or can't name a folder; those
    /// of [`LoraModel::from_pretrained`]. Nothing is changed then.
    pub fn load_adapter(&mut self, file: impl Into<AdapterFile>, name: &str) -> Result<LoadReport> {
        self.refuse_taken(name)?;
        let mut adapter = read(name, &self.base, &file.into(), &self.switches)?;
        adapter.trainable = false;
        let report = adapter.report.clone().unwrap_or_default();
        self.push(adapter)?;
        Ok(report)
    }

    /// Puts an adapter from a folder or file in the place of another one, under its
    /// name and as active as that was. The new one may have other targets,
    /// ranks and scales; it is for inference, as in
    /// [`LoraModel::load_adapter`]. Its scale is what its configuration says.
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
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let other = LoraConfig::builder().r(4).target_modules(["proj"]).build()?;
    /// # model.add_adapter("other", other)?;
    /// # model.save_adapter("other", dir.path(), None)?;
    /// # model.delete_adapter("other")?;
    /// // Requests go on under the name `default`, with what the folder holds now.
    /// model.hotswap_adapter(dir.path(), "default")?;
    /// assert_eq!(model.adapter_config("default")?.as_lora().map(LoraConfig::r), Some(4));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have, while adapters
    /// are merged, and if it can't be summed with the other active adapters;
    /// those of [`LoraModel::from_pretrained`]. Nothing is changed then.
    pub fn hotswap_adapter(&mut self, file: impl Into<AdapterFile>, name: &str) -> Result<LoadReport> {
        self.named(name)?;
        self.refuse_merged("hotswap_adapter")?;
        let mut new = read(name, &self.base, &file.into(), &self.switches)?;
        new.trainable = false;
        let report = new.report.clone().unwrap_or_default();
        self.swap(name, new)?;
        Ok(report)
    }

    /// Whether `tensors` are those of the model's one adapter.
    pub(crate) fn check_tensors(&self, path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut own: BTreeMap<String, Tensor> =
            tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        self.only()?.take_tied(&mut own)?;
        let parameters = self.only()?.tensors();
        check_tensors(&parameters, path, &own)?;
        for NamedParameter { name, tensor } in parameters {
            let Some(found) = tensors.get(&name) else { continue };
            if found.f_kind()? != tensor.f_kind()? {
                let [expected, found] = [tensor.f_kind()?, found.f_kind()?].map(|kind| format!("{kind:?}"));
                return Err(Error::Mismatch { name, expected, found });
            }
        }
        Ok(())
    }

    /// Loads the tensors of the model's one adapter in place, all or none. That
    /// their values are finite is known.
    pub(crate) fn load_tensors(&self, path: &Path, mut tensors: BTreeMap<String, Tensor>) -> Result<()> {
        self.only()?.take_tied(&mut tensors)?;
        let parameters = self.only()?.tensors();
        check_shapes(&parameters, path, &tensors)?;
        fill(&parameters, tensors)
    }

    /// The adapter, if there is no other.
    fn only(&self) -> Result<&NamedAdapter> {
        if self.others.is_empty() {
            return Ok(&self.first);
        }
        let expected = "a model with one adapter; checkpoints hold no more";
        Err(Error::config("adapters", expected, self.adapter_names().join(", ")))
    }

    /// Writes `adapter_model.safetensors` and `adapter_config.json` of every
    /// adapter, which HF PEFT loads: of `default` into the folder, of others
    /// into a folder of their name in it, as PEFT does. Each file appears whole
    /// or not at all.
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
    /// # let dir = tempfile::tempdir().unwrap();
    /// model.save_pretrained(dir.path())?;
    /// for file in ["adapter_config.json", "adapter_model.safetensors"] {
    ///     assert!(dir.path().join(file).exists());
    /// }
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`] for a folder that can't be made or written to.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        for adapter in self.all() {
            let folder = match adapter.name.as_str() {
                DEFAULT => folder.as_ref().to_path_buf(),
                name => folder.as_ref().join(name),
            };
            write_files(&folder, &adapter.files(None)?)?;
        }
        Ok(())
    }

    /// Writes one adapter into the folder itself; in another dtype than it is
    /// trained in, if one is given.
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
    /// # let dir = tempfile::tempdir().unwrap();
    /// // Half the size; A and B stay f32 in memory.
    /// model.save_adapter("default", dir.path(), Some(Kind::BFloat16))?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have;
    /// [`Error::Io`].
    pub fn save_adapter(&self, name: &str, folder: impl AsRef<Path>, dtype: Option<Kind>) -> Result<()> {
        write_files(folder.as_ref(), &self.named(name)?.files(dtype)?)
    }

    /// Writes one adapter in another program's layout: into the file, if the
    /// path ends in `.safetensors`, else into the folder.
    ///
    /// The scale stays exact. Where the layout keeps no alpha it is multiplied
    /// into B, in f32; docs/formats.md says how each does it.
    ///
    /// ```no_run
    /// # fn run(model: tch_peft::LoraModel<tch::nn::Linear>) -> tch_peft::Result<()> {
    /// use tch_peft::{AdapterFile, AdapterFormat};
    /// let file = AdapterFile::new("out").component("transformer");
    /// model.save_as("default", AdapterFormat::Diffusers, file)?;
    /// model.save_as("default", AdapterFormat::ComfyUi, "comfy.safetensors")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have, a missing
    /// component, a key mapping that can't be turned back, and modules whose
    /// names would mean others too; [`Error::Unsupported`] for what the layout
    /// can't hold; [`Error::Io`].
    pub fn save_as(&self, name: &str, format: AdapterFormat, file: impl Into<AdapterFile>) -> Result<()> {
        let adapter = self.named(name)?;
        let tensors = |layer: &Layer| -> Result<Vec<_>> {
            layer.lora.tensors().into_iter().map(|(end, tensor)| Ok((end, tensor.f_detach()?))).collect()
        };
        let layers = adapter
            .layers
            .iter()
            .map(|layer| Ok(OutgoingLayer { path: &layer.path, settings: layer.settings, tensors: tensors(layer)? }));
        let adapter = Outgoing {
            config: &adapter.config,
            layers: layers.collect::<Result<_>>()?,
            base: self.base.weights().layers().map(|(path, _)| path).collect(),
        };
        format::write(&file.into(), format, &adapter)
    }

    /// The model's one adapter as it goes to disk: its own tensors by their
    /// keys, and `adapter_config.json`.
    pub(crate) fn adapter_contents(&self) -> Result<(BTreeMap<String, Tensor>, Vec<u8>)> {
        self.only()?.contents(None)
    }
}

impl NamedAdapter {
    fn files(&self, dtype: Option<Kind>) -> Result<Vec<(String, Vec<u8>)>> {
        let (tensors, config) = match &self.initial {
            None => self.contents(dtype)?,
            Some(initial) => {
                let (tensors, config) = self.as_lora(initial)?;
                let cast =
                    |(name, tensor): (String, Tensor)| Ok((name, tensor.f_to_kind(dtype.unwrap_or(tensor.kind()))?));
                (tensors.into_iter().map(cast).collect::<Result<_>>()?, peft::config_to_json(&config)?)
            }
        };
        Ok(vec![
            (peft::WEIGHTS_FILE.to_string(), safetensors::serialize(&tensors)?),
            (peft::CONFIG_FILE.to_string(), config),
        ])
    }

    /// Its tensors, not copied where they are of the dtype, and its configuration.
    fn contents(&self, dtype: Option<Kind>) -> Result<(BTreeMap<String, Tensor>, Vec<u8>)> {
        let mut config = self.config.clone();
        config.other_mut().insert("inference_mode".into(), true.into());
        let mut tensors = BTreeMap::new();
        for NamedParameter { name, tensor } in self.tensors().into_iter().chain(self.tied_tensors()?) {
            let kind = dtype.unwrap_or(tensor.f_kind()?);
            tensors.insert(name, tensor.f_detach()?.f_to_kind(kind)?);
        }
        Ok((tensors, peft::config_to_json(&config)?))
    }
}

/// The adapter in a file or folder, beside the base.
fn read<M>(name: &str, base: &Base<M>, file: &AdapterFile, switches: &Arc<Switches>) -> Result<NamedAdapter> {
    let sized = |(path, weight): (_, &crate::base::Weight)| BaseLayer { path, sizes: Some(weight.tensor.size()) };
    let layers: Vec<BaseLayer<'_>> = base.weights().layers().map(sized).collect();
    let ReadAdapter { path, format, config, unknown, mut tensors, names } = format::read(file, &layers)?;
    config.check_supported()?;
    let base_copies = take_base_copies(base, &mut tensors)?;
    // The values are loaded over the initial ones: any will do, and PEFT's
    // `false` alone would cost a second draw. But what an initialisation took
    // out of the base must be taken out again.
    let init = Some(super::init_of(&config)).filter(|init| init.changes_base()).unwrap_or(InitLoraWeights::Default);
    // No memory is taken for ranks that the file can't have.
    let largest_rank = tensors.values().flat_map(Tensor::size).max().or(Some(0));
    let init = Init { init, data: None, largest_rank };
    let mut adapter = NamedAdapter::build(name, base, config, init, switches)?;
    adapter.take_tied(&mut tensors)?;
    let parameters = adapter.tensors();
    check_tensors(&parameters, &path, &tensors)?;
    let loaded = tensors.keys().map(|key| names.get(key).unwrap_or(key).clone()).collect();
    fill(&parameters, tensors)?;
    if !unknown.is_empty() {
        let keys = unknown.join(", ");
        tracing::warn!(file = %path.display(), keys, "the adapter's configuration has keys that this version doesn't know; they are kept");
    }
    let mut report = LoadReport { format, loaded, base_copies, unknown_config_keys: unknown, ..LoadReport::default() };
    report.loaded.sort();
    report.loaded.dedup();
    adapter.report = Some(report);
    Ok(adapter)
}

/// Whether `tensors` are these parameters, in name, shape and sanity.
pub(super) fn check_tensors(
    parameters: &[NamedParameter],
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<()> {
    check_shapes(parameters, path, tensors)?;
    let broken = "the adapter is broken: use an earlier one";
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name, tensor.shallow_clone())).collect();
    tensors.into_par_iter().try_for_each(|(name, tensor)| check_finite(name, &tensor, broken))
}

fn check_shapes(parameters: &[NamedParameter], path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let names: HashSet<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
    let missing: Vec<String> =
        parameters.iter().filter(|p| !tensors.contains_key(&p.name)).map(|p| p.name.clone()).collect();
    let unexpected: Vec<String> = tensors.keys().filter(|key| !names.contains(key.as_str())).cloned().collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(Error::Keys { path: path.into(), missing, unexpected });
    }
    for p in parameters {
        let Some(found) = tensors.get(&p.name) else { continue };
        if found.size() != p.tensor.size() || !found.is_floating_point() {
            return Err(Error::Mismatch {
                name: p.name.clone(),
                expected: format!("floats {:?}", p.tensor.size()),
                found: format!("{:?} {:?}", found.f_kind()?, found.size()),
            });
        }
    }
    Ok(())
}

/// Copies checked tensors over the parameters.
fn fill(parameters: &[NamedParameter], mut tensors: BTreeMap<String, Tensor>) -> Result<()> {
    let pair = |p: &NamedParameter| Some((p.tensor.shallow_clone(), tensors.remove(&p.name)?));
    copy_all(parameters.iter().filter_map(pair).collect())
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
