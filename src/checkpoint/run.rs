//! A training run with its folder of checkpoints.

use super::base::BaseRecord;
use super::builder::RunBuilder;
use super::latest::{SkippedCheckpoint, newest};
use super::layout::folder;
use super::lock::Lock;
use super::restore::{Loaded, Resumed};
use super::snapshot::{Progress, Snapshot};
use super::state::Change;
use super::store::{Store, Writer};
use super::{CheckpointFiles, Parts};
use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Counts the steps of a training run and saves checkpoints into its folder.
///
/// A run that was killed, at any instant, and goes on with
/// [`Run::resume_or_start`] takes the same steps, bit by bit, as one that
/// wasn't, on the same machine with the same number of threads, provided that
/// batches come from the sampler, random numbers from libtorch's generators,
/// and everything else that changes is a part of the run or in the user state.
///
/// Gradients are saved only by a
/// [`GradientAccumulation`](crate::GradientAccumulation) that is a part of the
/// run: with one, a step may be a micro-batch. Without, count a step, which may
/// save, only after `zero_grad`.
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
/// let mut run = Run::builder(dir.path().join("run")).every(10).build()?;
/// run.resume_or_start(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
/// while run.current_step() < 20 {
///     let rows = sampler.next_batch();
///     let x = Tensor::ones([rows.len() as i64, 8], (Kind::Float, Device::Cpu));
///     model.forward(&x)?.square().mean(Kind::Float).f_backward()?;
///     optimizer.step()?;
///     optimizer.zero_grad()?;
///     run.step(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
/// }
/// assert!(dir.path().join("run/checkpoint-00000020/adapter_model.safetensors").exists());
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug)]
pub struct Run {
    settings: RunBuilder,
    step: u64,
    /// Of the weights as they are at this step.
    metric: Option<f64>,
    user: Value,
    /// There once the run has been resumed or started.
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    /// Given up when the run is dropped, or could not be started.
    lock: Arc<Lock>,
    base: BaseRecord,
    changes: Vec<Change>,
    writer: Writer,
}

/// How [`Run::resume_or_start`] began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// There was no checkpoint; nothing was changed but the learning rate's factor.
    Fresh,
    /// Everything was brought back from a checkpoint.
    Resumed {
        /// Steps taken so far.
        step: u64,
        /// The checkpoint.
        path: PathBuf,
        /// Checkpoints that could not be used.
        skipped: Vec<SkippedCheckpoint>,
        /// What is not as it was recorded and was allowed: another machine,
        /// device or number of threads, and what the run's settings let
        /// through. If there is any, the run goes on, but not bit by bit as if
        /// it had never been interrupted.
        differences: Vec<String>,
    },
}

/// What [`Run::step`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepReport {
    /// Steps taken so far.
    pub step: u64,
    /// The checkpoint that is new on disk, if there is one. In the background
    /// it is that of an earlier step.
    pub saved: Option<PathBuf>,
}

impl Run {
    /// Settings for a run whose checkpoints go into `dir`.
    pub fn builder(dir: impl AsRef<Path>) -> RunBuilder {
        RunBuilder::new(dir.as_ref().into())
    }

    pub(super) fn new(settings: RunBuilder) -> Self {
        Run { settings, step: 0, metric: None, user: Value::Null, session: None }
    }

    /// Goes on from the newest whole checkpoint, or starts if there is none.
    ///
    /// All files are verified and compared with the parts before anything is
    /// changed: on an error, the parts and the random generators are as before.
    /// Newer checkpoints that are torn or damaged are skipped, and listed.
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
    /// match run.resume_or_start(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))? {
    ///     Start::Fresh => println!("a new run"),
    ///     Start::Resumed { step, skipped, differences, .. } => {
    ///         println!("goes on at step {step}");
    ///         for checkpoint in skipped {
    ///             println!("{}: {}", checkpoint.path.display(), checkpoint.reason);
    ///         }
    ///         // Without any, all that follows is the same bits as if nothing had happened.
    ///         println!("not as recorded: {differences:?}");
    ///     }
    /// }
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::DifferentBase`] for another base (see
    /// [`RunBuilder::policy`]), [`Error::DifferentConfig`] naming the fields
    /// for another LoRA configuration, optimizer, schedule, sampler or list of
    /// parts, [`Error::NoCheckpoint`] if there are checkpoints and none is
    /// whole, [`Error::NewerFormat`], [`Error::RunInUse`] if another run writes
    /// into the folder, [`Error::Io`] if it can't be written to;
    /// [`Error::Config`] for a schedule with numbers out of range.
    pub fn resume_or_start(&mut self, parts: &mut Parts<'_>) -> Result<Start> {
        parts.schedule.check()?;
        let lock = match self.session.take() {
            Some(mut session) => {
                session.writer.flush()?;
                session.lock
            }
            None => Arc::new(Lock::acquire(&self.settings.dir)?),
        };
        let dir = &self.settings.dir;
        let without_optimizer = self.settings.allowed.missing_optimizer;
        let (found, skipped) = newest(dir, |path, manifest| {
            Ok((CheckpointFiles::of(path, &manifest, without_optimizer)?, manifest.step))
        })?;
        for SkippedCheckpoint { path, reason } in &skipped {
            tracing::warn!(path = %path.display(), reason, "skipped a checkpoint that is not whole");
        }
        let mut judged: std::collections::BTreeMap<_, _> = Default::default();
        let (resumed, start) = match found {
            Some((path, (files, step))) => {
                let loaded = Loaded::parse(files, step)?;
                let resumed = loaded.check(parts, self.settings.allowed)?;
                let user = loaded.state.user.clone();
                loaded.apply(parts)?;
                (self.step, self.user) = (step, user);
                judged.insert(folder(step), true);
                tracing::info!(step, path = %path.display(), "resumed");
                for difference in &resumed.differences {
                    tracing::warn!(difference, "going on with what is not as recorded");
                }
                let differences = resumed.differences.clone();
                (resumed, Start::Resumed { step, path, skipped, differences })
            }
            None if skipped.is_empty() => {
                let base = BaseRecord::new(parts.model.fingerprint()?);
                (self.step, self.user) = (0, Value::Null);
                (Resumed { base, changes: Vec::new(), differences: Vec::new() }, Start::Fresh)
            }
            None => {
                let reasons = skipped.into_iter().map(|skipped| skipped.reason).collect();
                return Err(Error::NoCheckpoint { path: dir.clone(), reasons });
            }
        };
        parts.optimizer.set_learning_rate_factor(parts.schedule.factor(self.step));
        self.metric = None;
        let store = Store {
            disk: Arc::clone(&self.settings.disk),
            dir: dir.clone(),
            retention: self.settings.retention,
            judged: Mutex::new(judged),
            _lock: Arc::clone(&lock),
        };
        let writer = Writer::new(store, self.settings.background);
        let Resumed { base, changes, .. } = resumed;
        self.session = Some(Session { lock, base, changes, writer });
        Ok(start)
    }

    /// Counts a step: sets the learning rate of the next, and saves if due.
    ///
    /// ```no_run
    /// # use tch_peft::{Error, Parts, Run};
    /// # fn run(run: &mut Run, parts: &mut Parts<'_>) -> tch_peft::Result<()> {
    /// match run.step(parts) {
    ///     Ok(report) => {
    ///         if let Some(checkpoint) = report.saved {
    ///             println!("step {}: {}", report.step, checkpoint.display());
    ///         }
    ///     }
    ///     // The disk is full: the run is sound, and tries again when the next one is due.
    ///     Err(error @ Error::NotSaved { .. }) => eprintln!("{error}"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NotSaved`] if a checkpoint could not be written. Even then the
    /// step is counted and the run is as sound as before: a caller may log it
    /// and train on; the next try is when the next checkpoint is due.
    pub fn step(&mut self, parts: &mut Parts<'_>) -> Result<StepReport> {
        self.session()?;
        self.step += 1;
        parts.optimizer.set_learning_rate_factor(parts.schedule.factor(self.step));
        let due = self.settings.every > 0 && self.step.is_multiple_of(self.settings.every);
        let saved = if due { self.take(parts) } else { self.session()?.writer.poll() };
        self.metric = None;
        Ok(StepReport { step: self.step, saved: saved? })
    }

    /// Saves a checkpoint now, replacing one of the same step, and deletes
    /// those no longer kept. It waits until the checkpoint is on disk, even if
    /// others are written in the background.
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
    /// let path = run.save(&mut parts)?; // before the program ends, say
    /// assert!(path.ends_with("checkpoint-00000000"));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NotSaved`] if it, or the one being written before it, can't be
    /// written; the checkpoints from before are as they were, and so is the
    /// run. [`Error::Config`] before [`Run::resume_or_start`].
    pub fn save(&mut self, parts: &mut Parts<'_>) -> Result<PathBuf> {
        let saved = self.take(parts);
        let flushed = self.flush();
        let path = self.settings.dir.join(folder(self.step));
        saved.and(flushed).map(|_| path)
    }

    /// Waits until nothing is being written in the background, and answers
    /// the checkpoint that this has saved.
    ///
    /// ```no_run
    /// # use tch_peft::{Parts, Run};
    /// # fn run(parts: &mut Parts<'_>) -> tch_peft::Result<()> {
    /// let mut run = Run::builder("runs/a").every(100).background(true).build()?;
    /// run.resume_or_start(parts)?;
    /// // … training …
    /// if let Some(path) = run.flush()? {
    ///     println!("on disk: {}", path.display());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NotSaved`] if it could not be written.
    pub fn flush(&mut self) -> Result<Option<PathBuf>> {
        self.session()?.writer.flush()
    }

    fn take(&mut self, parts: &Parts<'_>) -> Result<Option<PathBuf>> {
        let (step, metric) = (self.step, self.metric);
        let missing = Self::not_started;
        let Session { base, changes, writer, .. } = self.session.as_mut().ok_or_else(missing)?;
        let snapshot = Snapshot::take(parts, Progress { step, metric, user: &self.user, base, changes })?;
        writer.write(snapshot)
    }

    /// Steps taken since the start of the run.
    pub fn current_step(&self) -> u64 {
        self.step
    }

    /// How good the weights are as they are now, for
    /// [`RunBuilder::keep_best`]. It goes into the checkpoint that the next
    /// [`Run::step`], or a [`Run::save`] before it, makes of these weights,
    /// and counts no longer after that step.
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
    /// let mut run = Run::builder(dir.path()).every(1).keep(1).keep_best(1, Best::Lowest).build()?;
    /// let mut parts = Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler);
    /// run.resume_or_start(&mut parts)?;
    /// for held_out_loss in [2.5, 1.5, 2.0, 2.2] {
    ///     run.set_metric(held_out_loss)?;
    ///     run.step(&mut parts)?;
    /// }
    /// // The best one and the newest one.
    /// assert!(dir.path().join("checkpoint-00000002").exists() && dir.path().join("checkpoint-00000004").exists());
    /// assert!(!dir.path().join("checkpoint-00000003").exists());
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a value that is not finite.
    pub fn set_metric(&mut self, value: f64) -> Result<()> {
        if !value.is_finite() {
            return Err(Error::config("metric", "a finite number", value));
        }
        self.metric = Some(value);
        Ok(())
    }

    /// Sets the caller's own value, which goes into each checkpoint from now on.
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
    /// run.set_user_state(&("wikitext".to_string(), 1234u64))?;
    /// run.save(&mut parts)?;
    /// # drop(run);
    ///
    /// let mut run = Run::builder(dir.path()).build()?;
    /// run.resume_or_start(&mut parts)?;
    /// assert_eq!(run.user_state::<(String, u64)>()?, Some(("wikitext".into(), 1234)));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a value that would not come back from JSON, such
    /// as an infinite number: now, rather than when it is wanted.
    pub fn set_user_state<T: Serialize + DeserializeOwned>(&mut self, value: &T) -> Result<()> {
        let value = serde_json::to_value(value).map_err(user_state::<T>)?;
        read_user_state::<T>(&value)?;
        self.user = value;
        Ok(())
    }

    /// The caller's own value, if one was set or came with the checkpoint.
    ///
    /// # Errors
    /// [`Error::Config`] for a value of another type.
    pub fn user_state<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        if self.user.is_null() { Ok(None) } else { read_user_state(&self.user).map(Some) }
    }

    fn session(&mut self) -> Result<&mut Session> {
        self.session.as_mut().ok_or_else(Self::not_started)
    }

    fn not_started() -> Error {
        Error::config("run", "`resume_or_start` first", "a run not yet started")
    }
}

fn read_user_state<T: DeserializeOwned>(value: &Value) -> Result<T> {
    T::deserialize(value).map_err(user_state::<T>)
}

fn user_state<T>(error: serde_json::Error) -> Error {
    Error::config("user_state", format!("a value of {} that JSON can hold", std::any::type_name::<T>()), error)
}
