//! Settings of a run.

use super::base::ResumePolicy;
use super::fs::{FileSystem, OsFileSystem};
use super::restore::Allowed;
use super::retention::{Best, Retention};
use super::run::Run;
use crate::error::{Error, Result};
use std::path::PathBuf;
use std::sync::Arc;

/// Settings of a [`Run`].
///
/// ```
/// use tch_peft::{Best, Run};
///
/// let run = Run::builder("runs/a")
///     .every(100) // save after every 100 steps,
///     .background(true) // while training goes on,
///     .keep(3) // keep the newest three,
///     .keep_every(1000) // each thousandth,
///     .keep_best(2, Best::Lowest) // and the best two
///     .build()?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct RunBuilder {
    pub(super) dir: PathBuf,
    pub(super) every: u64,
    pub(super) background: bool,
    pub(super) retention: Retention,
    pub(super) allowed: Allowed,
    pub(super) disk: Arc<dyn FileSystem>,
}

impl RunBuilder {
    pub(super) fn new(dir: PathBuf) -> Self {
        RunBuilder {
            dir,
            every: 0,
            background: false,
            retention: Retention::default(),
            allowed: Allowed::default(),
            disk: Arc::new(OsFileSystem),
        }
    }

    /// Saves after every so many steps; 0, the default, saves only when
    /// [`Run::save`] is called.
    pub fn every(mut self, steps: u64) -> Self {
        self.every = steps;
        self
    }

    /// Writes checkpoints on a thread, off by default: training stops only
    /// while the state is copied, and costs memory of the checkpoint's size,
    /// which is kept from one save to the next.
    ///
    /// What is saved, and the training, are the same either way. An error
    /// comes with the next [`Run::step`] or [`Run::save`], or with
    /// [`Run::flush`]; if the process is killed in between, the checkpoint
    /// isn't there. If the next is due while one is being written, training
    /// waits; dropping the run waits too.
    pub fn background(mut self, on: bool) -> Self {
        self.background = on;
        self
    }

    /// Keeps the newest so many checkpoints, 2 by default; 0 keeps all.
    ///
    /// Damaged checkpoints, and those of later steps than the one just saved,
    /// are never deleted and don't count.
    pub fn keep(mut self, checkpoints: usize) -> Self {
        self.retention.newest = checkpoints;
        self
    }

    /// Keeps the checkpoints whose step is a multiple of this as well; 0, the
    /// default, keeps none for it.
    pub fn keep_every(mut self, steps: u64) -> Self {
        self.retention.every = steps;
        self
    }

    /// Keeps the best so many as well, by the metric that [`Run::set_metric`]
    /// gave them. Of equal ones the newest are kept.
    pub fn keep_best(mut self, checkpoints: usize, best: Best) -> Self {
        self.retention.best = Some((checkpoints, best));
        self
    }

    /// What to do about a base other than the recorded one; by default it is
    /// an error.
    pub fn policy(mut self, policy: ResumePolicy) -> Self {
        self.allowed.base = policy;
        self
    }

    /// Whether to go on with a schedule other than the recorded one, such as a
    /// longer one; by default it is an error. The learning rate is that of the
    /// given schedule from the next step on. Each following checkpoint's
    /// `training_state.json` says at which step it changed.
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
    /// let mut run = Run::builder(dir.path()).build()?;
    /// let mut parts = Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler);
    /// run.resume_or_start(&mut parts)?;
    /// run.save(&mut parts)?;
    /// # drop(run);
    ///
    /// let longer = Schedule::cosine(0, 5000);
    /// let mut parts = Parts::new(&mut model, &mut optimizer, &longer, &mut sampler);
    /// assert!(Run::builder(dir.path()).build()?.resume_or_start(&mut parts).is_err());
    /// let mut run = Run::builder(dir.path()).allow_schedule_change(true).build()?;
    /// run.resume_or_start(&mut parts)?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn allow_schedule_change(mut self, on: bool) -> Self {
        self.allowed.schedule = on;
        self
    }

    /// Whether to go on from a checkpoint whose only fault is that
    /// `optimizer.safetensors` is missing; by default it doesn't count as
    /// whole. The optimizer is left as it was given, all else is brought back.
    /// Each following checkpoint's `training_state.json` says so.
    ///
    /// ```no_run
    /// # use tch_peft::{Parts, Run};
    /// # fn run(parts: &mut Parts<'_>) -> tch_peft::Result<()> {
    /// // The checkpoint came without `optimizer.safetensors`, to save the way.
    /// let mut run = Run::builder("runs/a").allow_missing_optimizer(true).build()?;
    /// run.resume_or_start(parts)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn allow_missing_optimizer(mut self, on: bool) -> Self {
        self.allowed.missing_optimizer = on;
        self
    }

    /// The file system that checkpoints are written through, by default
    /// [`OsFileSystem`]. They are found and read, and the folder is made and
    /// locked, by the operating system's all the same.
    pub fn file_system(mut self, disk: Arc<dyn FileSystem>) -> Self {
        self.disk = disk;
        self
    }

    /// Makes the run. The folder is not touched yet.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty path.
    pub fn build(self) -> Result<Run> {
        if self.dir.as_os_str().is_empty() {
            return Err(Error::config("dir", "a folder", "an empty path"));
        }
        Ok(Run::new(self))
    }
}
