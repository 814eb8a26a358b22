//! Floor 2: a base model, its named weights, quantising them, its fingerprint.

mod disk;
mod fingerprint;
mod mixed;
mod options;
mod report;
mod site;
mod torchscript;
mod weights;

pub use fingerprint::{Fingerprint, WeightPrint};
pub(crate) use mixed::MixedRows;
pub use options::{Progress, QuantizeOptions};
pub use report::{QuantizationReport, QuantizedWeight};
pub(crate) use site::{Adapter, Adapters, Site};
pub use torchscript::TorchScript;
pub use weights::WeightRole;
pub(crate) use weights::{Weight, Weights};

use crate::error::{Error, Result};
use crate::names::suffix_matches;
use crate::quant::QuantConfig;
use std::path::Path;
use std::sync::OnceLock;
use tch::nn;

/// A frozen base model: a module, unchanged, and the weights it runs on.
///
/// ```no_run
/// use tch::{Device, nn};
/// use tch_peft::{Base, QuantConfig};
///
/// let mut vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::seq()
///     .add(nn::linear(vs.root() / "up", 64, 256, Default::default()))
///     .add_fn(|x| x.gelu("none"))
///     .add(nn::linear(vs.root() / "down", 256, 64, Default::default()));
/// vs.load("base.safetensors")?;
///
/// let base = Base::new(vs, net).quantize(&QuantConfig::nf4().build()?)?;
/// println!("{}", base.quantization_report());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Base<M> {
    module: M,
    weights: Weights,
    report: QuantizationReport,
    /// Taken once: a base doesn't change while it is trained on.
    fingerprint: OnceLock<Fingerprint>,
}

impl<M> Base<M> {
    /// A `tch::nn` model and the store that its variables live in.
    ///
    /// The store's tensors are shared with the model's, so the model is
    /// adapted without a change in it. Every variable is frozen
    /// (`requires_grad` off) when the base is quantised or wrapped.
    pub fn new(vs: nn::VarStore, module: M) -> Self {
        let weights = Weights::of_var_store(&vs);
        Base::from_parts(module, weights)
    }

    fn from_parts(module: M, weights: Weights) -> Self {
        let report = QuantizationReport::default();
        Base { module, weights, report, fingerprint: OnceLock::new() }
    }

    /// States what a weight is for, where its name misleads.
    ///
    /// `tch::nn` keeps no types: a two-dimensional `….weight` counts as
    /// linear, unless a segment of its path says embedding (`embed…`, `emb`,
    /// `wte`, `wpe`), and one of three to five dimensions as a convolution's.
    /// `entry` is a module's path or its last segments; for
    /// [`WeightRole::Experts`] also the name of a parameter, and a module stands
    /// for all of its parameters of three dimensions.
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_peft::{Base, WeightRole};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let attention = vs.root() / "attn";
    /// let _in_out = attention.sub("c_attn").zeros("weight", &[8, 24]); // used as x.matmul(&w)
    /// let _table = vs.root().sub("positions").zeros("weight", &[16, 8]); // rows are looked up
    /// let _grouped = vs.root().sub("conv").zeros("weight", &[8, 2, 3]); // four groups of channels
    /// let base = Base::from(vs)
    ///     .declare("attn.c_attn", WeightRole::Conv1D)
    ///     .declare("positions", WeightRole::Embedding)
    ///     .declare("conv", WeightRole::Conv { groups: 4 });
    /// ```
    #[must_use]
    pub fn declare(mut self, entry: &str, role: WeightRole) -> Self {
        let experts = matches!(role, WeightRole::Experts { .. });
        for weight in self.weights.iter_mut() {
            let is_stack = experts && weight.tensor.dim() == 3;
            let path = match weight.name.rsplit_once('.') {
                Some((module, end)) if is_stack || end == "weight" => module,
                _ => continue,
            };
            if suffix_matches(path, entry) || (is_stack && suffix_matches(&weight.name, entry)) {
                weight.role = role;
            }
        }
        self
    }

    /// States that files may lack a tensor, which then stays as the module made
    /// it: for [`Base::load_quantized`] and [`Base::load_and_quantize`].
    ///
    /// Meant for buffers that a module computes by itself and that PyTorch
    /// leaves out of files (`persistent=False`), such as masks and tables of
    /// angles. `entry` is the tensor's name or its last segments. A weight that
    /// is to be packed must be there all the same.
    ///
    /// ```no_run
    /// # use tch_peft::{Base, QuantConfig};
    /// let base = Base::torchscript("model.pt")?
    ///     .allow_missing("rotary_emb.inv_freq")?
    ///     .allow_missing("rotary_emb.original_inv_freq")?;
    /// let base = base.load_and_quantize("model.safetensors", &QuantConfig::nf4().build()?)?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for an entry that names none of
    /// the base's tensors.
    pub fn allow_missing(mut self, entry: &str) -> Result<Self> {
        let mut found = false;
        for weight in self.weights.iter_mut().filter(|weight| suffix_matches(&weight.name, entry)) {
            (weight.optional, found) = (true, true);
        }
        match found {
            true => Ok(self),
            false => {
                Err(Error::config("allow_missing", "a tensor of the base, or the last segments of its name", entry))
            }
        }
    }

    /// Packs the weights that `config` chooses, one at a time; the dense storage
    /// of each is freed before the next is read, so the peak is one dense weight
    /// over the result. Biases and norms stay, and embeddings and convolutions
    /// unless `config` asks for them.
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_peft::{Base, QuantConfig};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let net = nn::linear(vs.root() / "proj", 256, 256, Default::default());
    /// let base = Base::new(vs, net).quantize(&QuantConfig::int8().build()?)?;
    /// let report = base.quantization_report();
    /// assert!(report.bytes_after() < report.bytes_before() * 3 / 10);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NoTarget`](crate::Error::NoTarget) for a pattern that matches
    /// nothing or a base without weights to quantise,
    /// [`Error::AlreadyQuantized`](crate::Error::AlreadyQuantized),
    /// [`Error::NotFinite`](crate::Error::NotFinite). All are found before the
    /// first weight is touched.
    pub fn quantize(self, config: &QuantConfig) -> Result<Self> {
        self.quantize_with(config, QuantizeOptions::new())
    }

    /// [`Base::quantize`] on a device of one's choice, and with progress.
    ///
    /// ```no_run
    /// use tch::Device;
    /// use tch_peft::{Base, QuantConfig, QuantizeOptions};
    ///
    /// let options = QuantizeOptions::new()
    ///     .device(Device::cuda_if_available())
    ///     .progress(|p| eprintln!("{}/{} {}", p.done, p.total, p.weight.name));
    /// let base = Base::torchscript("model.pt")?.quantize_with(&QuantConfig::nf4().build()?, options)?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Base::quantize`].
    pub fn quantize_with(mut self, config: &QuantConfig, mut options: QuantizeOptions<'_>) -> Result<Self> {
        self.report = self.weights.quantize(config, &mut options)?;
        self.fingerprint = OnceLock::new();
        Ok(self)
    }

    /// [`Base::quantize`] for a base that is wrapped already.
    pub(crate) fn quantize_in_place(&mut self, config: &QuantConfig) -> Result<()> {
        self.report = self.weights.quantize(config, &mut QuantizeOptions::new())?;
        self.has_changed();
        Ok(())
    }

    /// Takes notice that weights were replaced: those of which `still` is false
    /// are no longer quantised.
    pub(crate) fn note_changes(&mut self, still: impl Fn(&str) -> bool) {
        self.report.retain(still);
        self.fingerprint = OnceLock::new();
    }

    /// Weights were replaced: the identity must be taken anew.
    pub(crate) fn has_changed(&mut self) {
        self.fingerprint = OnceLock::new();
    }

    /// Writes the base, packed as it is: `model.safetensors`, or shards of up to
    /// 5 GB, with `model.safetensors.index.json`, which records each packed
    /// weight's scheme. Adapters are not written.
    ///
    /// The layouts are those of the Python libraries: bitsandbytes' for `nf4`,
    /// `fp4` and `llm_int8`, optimum-quanto's, with its `quantization_map.json`,
    /// for `int8`, `int4`, `int2` and `fp8`. A folder with the model's
    /// `config.json` in it loads in `transformers`.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// # use tch_peft::{Base, QuantConfig};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root() / "proj", 64, 64, Default::default());
    /// let base = Base::new(vs, net).quantize(&QuantConfig::nf4().build()?)?;
    /// base.save_quantized(dir.path())?;
    /// assert!(dir.path().join("model.safetensors").exists());
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io); [`Error::Config`](crate::Error::Config)
    /// for a folder that holds another model, or a dtype that safetensors
    /// doesn't have.
    pub fn save_quantized(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_quantized_sharded(folder, disk::SHARD_BYTES)
    }

    /// As [`Base::save_quantized`], in shards of at most `shard_bytes`, or of
    /// one tensor that is larger.
    ///
    /// # Errors
    /// As [`Base::save_quantized`].
    pub fn save_quantized_sharded(&self, folder: impl AsRef<Path>, shard_bytes: usize) -> Result<()> {
        disk::save(&self.weights, folder.as_ref(), shard_bytes)
    }

    /// Loads the weights of a quantised model over those of the module, packed
    /// as they are in the files: from a folder that
    /// [`save_quantized`](Base::save_quantized) wrote, or that bitsandbytes
    /// (through `transformers`), optimum-quanto, GPTQ or AWQ did, or from one
    /// safetensors file.
    ///
    /// Files are mapped into memory and each weight is read once, and the dense
    /// weight that it replaces is freed before the next is read. Weights that
    /// the files hold dense are copied, to the module's dtype; they may be
    /// places, as in [`Base::load_and_quantize`]. A packed weight
    /// keeps the dtype that the file says; bitsandbytes' 8-bit layout has none,
    /// and takes the module's.
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_peft::{Base, QuantConfig};
    ///
    /// let net = || {
    ///     let vs = nn::VarStore::new(Device::Cpu);
    ///     let net = nn::linear(vs.root() / "proj", 64, 64, Default::default());
    ///     Base::new(vs, net)
    /// };
    /// # let dir = tempfile::tempdir().unwrap();
    /// let base = net().quantize(&QuantConfig::nf4().build()?)?;
    /// base.save_quantized(dir.path())?;
    /// let again = net().load_quantized(dir.path())?;
    /// assert_eq!(again.fingerprint()?, base.fingerprint()?);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Keys`](crate::Error::Keys) unless the files have all of the
    /// module's weights, but those of [`Base::allow_missing`], and no others; [`Error::Mismatch`](crate::Error::Mismatch)
    /// for a shape or dtype, and for values that the module ties but the files
    /// have twice and differently; [`Error::NotFinite`](crate::Error::NotFinite),
    /// [`Error::Corrupt`](crate::Error::Corrupt), [`Error::Io`](crate::Error::Io);
    /// [`Error::AlreadyQuantized`](crate::Error::AlreadyQuantized) and
    /// [`Error::AlreadyAdapted`](crate::Error::AlreadyAdapted). The module's
    /// weights are undefined afterwards.
    pub fn load_quantized(mut self, path: impl AsRef<Path>) -> Result<Self> {
        self.report = disk::load(&self.weights, path.as_ref(), None, &mut QuantizeOptions::new())?;
        self.has_changed();
        Ok(self)
    }

    /// Loads a model's dense weights, and packs those that `config` chooses as
    /// they are read: the same base as the weights loaded and then quantised,
    /// but the dense model is never in memory.
    ///
    /// The path is a folder with `model.safetensors`, or with shards and their
    /// index as `transformers` writes them, or one file. To hold no memory for
    /// weights that are yet to come, a module is made of places: one element,
    /// expanded to the weight's sizes.
    ///
    /// ```no_run
    /// use tch::{Device, Kind, Tensor, nn};
    /// use tch_peft::{Base, QuantConfig};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let place = Tensor::zeros([1], (Kind::BFloat16, vs.device())).expand([4096, 1024], false);
    /// let net = nn::Linear { ws: (vs.root() / "up").add("weight", place, true), bs: None };
    ///
    /// let config = QuantConfig::nf4().build()?;
    /// let base = Base::new(vs, net).load_and_quantize("model", &config)?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Base::load_quantized`]; [`Error::NoTarget`](crate::Error::NoTarget)
    /// as [`Base::quantize`]; [`Error::AlreadyQuantized`](crate::Error::AlreadyQuantized)
    /// also for a weight to pack that the files hold packed. The module's weights
    /// are undefined afterwards.
    pub fn load_and_quantize(self, path: impl AsRef<Path>, config: &QuantConfig) -> Result<Self> {
        self.load_and_quantize_with(path, config, QuantizeOptions::new())
    }

    /// [`Base::load_and_quantize`] on a device of one's choice, and with progress.
    ///
    /// ```no_run
    /// # use tch::{Device, nn};
    /// use tch_peft::{Base, QuantConfig, QuantizeOptions};
    ///
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root() / "proj", 64, 64, Default::default());
    /// let options = QuantizeOptions::new().progress(|p| eprintln!("{}/{}", p.done, p.total));
    /// let base = Base::new(vs, net).load_and_quantize_with("model", &QuantConfig::nf4().build()?, options)?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Base::load_and_quantize`].
    pub fn load_and_quantize_with(
        mut self,
        path: impl AsRef<Path>,
        config: &QuantConfig,
        mut options: QuantizeOptions<'_>,
    ) -> Result<Self> {
        self.report = disk::load(&self.weights, path.as_ref(), Some(config), &mut options)?;
        self.has_changed();
        Ok(self)
    }

    /// What was quantised, with bytes before and after.
    pub fn quantization_report(&self) -> &QuantizationReport {
        &self.report
    }

    /// The module, for a forward pass of its own signature.
    pub fn module(&self) -> &M {
        &self.module
    }

    pub(crate) fn module_mut(&mut self) -> &mut M {
        &mut self.module
    }

    /// Names of all weights (parameters and buffers), sorted.
    pub fn weight_names(&self) -> Vec<String> {
        self.weights.iter().map(|w| w.name.clone()).collect()
    }

    /// The paths of the modules whose weights can be adapted or quantised: what
    /// `target_modules` and [`QuantConfigBuilder::skip`](crate::QuantConfigBuilder::skip)
    /// are matched against.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let net = nn::linear(vs.root() / "up", 4, 8, Default::default());
    /// assert_eq!(tch_peft::Base::new(vs, net).layer_names(), ["up"]);
    /// ```
    pub fn layer_names(&self) -> Vec<String> {
        self.weights.layers().map(|(path, _)| path.to_string()).collect()
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Every weight's name, shape, dtype, scheme and a hash of its bytes as
    /// they are kept in memory. Adapters don't count. Taken at the first call.
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_peft::{Base, QuantConfig};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let net = nn::linear(vs.root() / "proj", 64, 64, Default::default());
    /// let base = Base::new(vs, net);
    /// let dense = base.fingerprint()?;
    /// let packed = base.quantize(&QuantConfig::nf4().build()?)?.fingerprint()?;
    /// assert!(dense.differences(&packed)[0].starts_with("proj.weight: "));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// libtorch's, when reading a tensor fails.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let fingerprint = Fingerprint::of(&self.weights)?;
        Ok(self.fingerprint.get_or_init(|| fingerprint).clone())
    }
}

impl<M> From<(nn::VarStore, M)> for Base<M> {
    fn from((vs, module): (nn::VarStore, M)) -> Self {
        Base::new(vs, module)
    }
}

/// A store alone: the caller keeps the model that runs on it.
impl From<nn::VarStore> for Base<()> {
    fn from(vs: nn::VarStore) -> Self {
        Base::new(vs, ())
    }
}
