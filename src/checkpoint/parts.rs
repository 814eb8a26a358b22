//! What a run is made of.

use super::{CheckpointFiles, Content};
use crate::base::Fingerprint;
use crate::error::{Error, Result};
use crate::train::{Optimizer, Sampler, Schedule, Stateful};
use std::fmt;
use tch::Device;

/// What a checkpoint needs of a model.
///
/// ```
/// use std::collections::BTreeMap;
/// use tch::{Device, Tensor};
/// use tch_peft::checkpoint::{CheckpointFiles, Content};
/// use tch_peft::{Base, Checkpointable, Fingerprint, Result};
///
/// /// A model of one's own, of which one tensor is trained. (`LoraModel` is one already.)
/// struct Shifted {
///     base: Base<()>,
///     shift: Tensor,
/// }
///
/// impl Checkpointable for Shifted {
///     fn adapter_files(&self) -> Result<Vec<(String, Content)>> {
///         let tensors = BTreeMap::from([("shift".to_string(), self.shift.shallow_clone())]);
///         Ok(vec![
///             ("adapter_model.safetensors".into(), Content::Tensors(tensors)),
///             ("adapter_config.json".into(), Content::Bytes(b"{}".to_vec())),
///         ])
///     }
///
///     fn check_adapter(&self, files: &CheckpointFiles) -> Result<()> {
///         read(files).map(drop)
///     }
///
///     fn load_adapter(&mut self, files: &CheckpointFiles) -> Result<()> {
///         let found = read(files)?;
///         tch::no_grad(|| self.shift.f_copy_(&found).map(drop))?;
///         Ok(())
///     }
///
///     fn fingerprint(&self) -> Result<Fingerprint> {
///         self.base.fingerprint()
///     }
///
///     fn devices(&self) -> Vec<Device> {
///         vec![self.shift.device()]
///     }
/// }
///
/// fn read(files: &CheckpointFiles) -> Result<Tensor> {
///     let tensors = Tensor::read_safetensors(files.path("adapter_model.safetensors"))?;
///     let found = tensors.into_iter().find(|(name, _)| name == "shift").map(|(_, tensor)| tensor);
///     let missing = || tch_peft::Error::Corrupt { path: files.path("adapter_model.safetensors"), reason: "no shift".into() };
///     found.ok_or_else(missing)
/// }
/// ```
pub trait Checkpointable {
    /// Name and content of `adapter_model.safetensors` and
    /// `adapter_config.json`, and of further files if the model has any.
    /// Tensors may be the model's own: they are copied or written before
    /// training goes on.
    ///
    /// # Errors
    /// libtorch's.
    fn adapter_files(&self) -> Result<Vec<(String, Content)>>;

    /// Tells whether [`Checkpointable::load_adapter`] would accept the files.
    ///
    /// # Errors
    /// [`Error::DifferentConfig`](crate::Error::DifferentConfig) naming the
    /// fields for another LoRA configuration, and others for files that don't
    /// fit the model.
    fn check_adapter(&self, files: &CheckpointFiles) -> Result<()>;

    /// Takes the adapter's values from the files, into the very tensors that
    /// the optimizer holds. It draws no random numbers; on an error nothing
    /// has changed. Called after [`Checkpointable::check_adapter`].
    ///
    /// # Errors
    /// Those of [`Checkpointable::check_adapter`], apart from another
    /// configuration, which need not be looked for again.
    fn load_adapter(&mut self, files: &CheckpointFiles) -> Result<()>;

    /// The identity of the base. Called once when a run begins: the base must
    /// stay as it is until the run ends.
    ///
    /// # Errors
    /// libtorch's.
    fn fingerprint(&self) -> Result<Fingerprint>;

    /// The devices whose random generators training may draw from, besides the
    /// CPU's.
    fn devices(&self) -> Vec<Device>;
}

/// The parts of a run that checkpoints are made of.
///
/// The four that every run has are given to [`Parts::new`], whatever else
/// changes from step to step (an EMA, a loss scaler, a second sampler, …) is
/// added with [`Parts::with`].
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let dir = tempfile::tempdir().unwrap();
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let mut model = LoraModel::wrap(Base::new(vs, net), config)?;
/// # let mut optimizer = AdamW::builder().build(model.trainable_parameters())?;
/// # let (schedule, mut sampler) = (Schedule::constant(), Sampler::new(100, 10, 0)?);
/// let mut ema = Ema::builder().decay(0.99).build(model.trainable_parameters())?;
/// let mut noise = Generator::new(3);
/// let mut run = Run::builder(dir.path()).build()?;
/// let mut parts = Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler)
///     .with("ema", &mut ema)
///     .with("noise", &mut noise);
/// run.resume_or_start(&mut parts)?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub struct Parts<'a> {
    /// The adapted model.
    pub model: &'a mut dyn Checkpointable,
    /// The optimizer over its trainable parameters.
    pub optimizer: &'a mut dyn Optimizer,
    /// The learning rate's course.
    pub schedule: &'a Schedule,
    /// The position in the data.
    pub sampler: &'a mut Sampler,
    /// The rest, by name.
    pub(super) others: Vec<(&'a str, &'a mut dyn Stateful)>,
}

impl<'a> Parts<'a> {
    /// The parts of a plain run.
    pub fn new(
        model: &'a mut dyn Checkpointable,
        optimizer: &'a mut dyn Optimizer,
        schedule: &'a Schedule,
        sampler: &'a mut Sampler,
    ) -> Self {
        Parts { model, optimizer, schedule, sampler, others: Vec::new() }
    }

    /// Adds a part under a name of its own, made of letters, digits, `_` and
    /// `-`. A checkpoint and the run that goes on from it have parts of the
    /// same names.
    #[must_use]
    pub fn with(mut self, name: &'a str, part: &'a mut dyn Stateful) -> Self {
        self.others.push((name, part));
        self
    }

    /// Refuses a name that is not one, or not one's own.
    pub(super) fn check_names(&self) -> Result<()> {
        let is_name =
            |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
        for (i, (name, _)) in self.others.iter().enumerate() {
            if !is_name(name) {
                return Err(Error::config("parts", "names of letters, digits, `_` and `-`", format!("`{name}`")));
            }
            if self.others[..i].iter().any(|(other, _)| other == name) {
                return Err(Error::config("parts", "each name once", format!("{name} twice")));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Parts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others: Vec<_> = self.others.iter().map(|(name, _)| name).collect();
        f.debug_struct("Parts")
            .field("schedule", &self.schedule)
            .field("sampler", &self.sampler.state())
            .field("others", &others)
            .finish_non_exhaustive()
    }
}
