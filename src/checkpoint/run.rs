//! A training run with its folder of checkpoints.

use super::Parts;
use super::base::{BaseRecord, ResumePolicy};
use super::contents::{Loaded, collect};
use super::environment::Environment;
use super::latest::{SkippedCheckpoint, latest};
use super::lock::Lock;
use super::manifest::Manifest;
use super::rotate::rotate;
use super::write::commit;
use crate::error::{Error, Result};
use crate::train::RngState;
use crate::train::compare::same_config;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Counts the steps of a training run and saves checkpoints into its folder.
///
/// A run that was killed, at any instant, and goes on with
/// [`Run::resume_or_start`] takes the same steps, bit by bit, as one that
/// wasn't, on the same machine with the same number of threads, provided that
/// batches come from the sampler, random numbers from libtorch's generators,
/// and everything else that changes is in the user state.
///
/// Gradients are not saved: count a step, which may save, only after
/// `zero_grad`.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    every: u64,
    keep: usize,
    policy: ResumePolicy,
    step: u64,
    user: Value,
    /// There once the run has been resumed or started.
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    /// Given up when the run is dropped, or could not be started.
    lock: Arc<Lock>,
    base: BaseRecord,
}

/// Settings of a [`Run`].
#[derive(Debug, Clone)]
pub struct RunBuilder {
    dir: PathBuf,
    every: u64,
    keep: usize,
    policy: ResumePolicy,
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
    },
}

/// What [`Run::step`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepReport {
    /// Steps taken so far.
    pub step: u64,
    /// The checkpoint, if one was due.
    pub saved: Option<PathBuf>,
}

impl RunBuilder {
    /// Saves after every so many steps; 0, the default, saves only when
    /// [`Run::save`] is called.
    pub fn every(mut self, steps: u64) -> Self {
        self.every = steps;
        self
    }

    /// Keeps the newest so many checkpoints, 2 by default; 0 keeps all.
    pub fn keep(mut self, checkpoints: usize) -> Self {
        self.keep = checkpoints;
        self
    }

    /// What to do about a base other than the recorded one; by default it is
    /// an error.
    pub fn policy(mut self, policy: ResumePolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Makes the run. The folder is not touched yet.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty path.
    pub fn build(self) -> Result<Run> {
        let RunBuilder { dir, every, keep, policy } = self;
        if dir.as_os_str().is_empty() {
            return Err(Error::config("dir", "a folder", "an empty path"));
        }
        Ok(Run { dir, every, keep, policy, step: 0, user: Value::Null, session: None })
    }
}

impl Run {
    /// Settings for a run whose checkpoints go into `dir`.
    pub fn builder(dir: impl AsRef<Path>) -> RunBuilder {
        let policy = ResumePolicy::default();
        RunBuilder { dir: dir.as_ref().into(), every: 0, keep: 2, policy }
    }

    /// Goes on from the newest whole checkpoint, or starts if there is none.
    ///
    /// All files are verified and compared with the parts before anything is
    /// changed: on an error, the parts and the random generators are as before.
    /// Newer checkpoints that are torn or damaged are skipped, and listed.
    ///
    /// # Errors
    /// [`Error::DifferentBase`] for another base (see [`ResumePolicy`]),
    /// [`Error::DifferentConfig`] naming the fields for another LoRA
    /// configuration, optimizer, schedule or sampler and for other devices,
    /// [`Error::NoCheckpoint`] if there are checkpoints and none is whole,
    /// [`Error::NewerFormat`], [`Error::RunInUse`] if another run writes into
    /// the folder, [`Error::Io`] if it can't be written to.
    pub fn resume_or_start(&mut self, parts: &mut Parts<'_>) -> Result<Start> {
        let lock = match &self.session {
            Some(session) => Arc::clone(&session.lock),
            None => Arc::new(Lock::acquire(&self.dir)?),
        };
        let latest = latest(&self.dir)?;
        for SkippedCheckpoint { path, reason } in &latest.skipped {
            tracing::warn!(path = %path.display(), reason, "skipped a checkpoint that is not whole");
        }
        let (base, start) = match latest.found {
            Some((path, manifest)) => {
                let base = self.resume(parts, &path, &manifest)?;
                tracing::info!(step = self.step, path = %path.display(), "resumed");
                (base, Start::Resumed { step: self.step, path, skipped: latest.skipped })
            }
            None if latest.skipped.is_empty() => {
                let base = BaseRecord::new(parts.model.fingerprint()?);
                (self.step, self.user) = (0, Value::Null);
                (base, Start::Fresh)
            }
            None => {
                let reasons = latest.skipped.into_iter().map(|skipped| skipped.reason).collect();
                return Err(Error::NoCheckpoint { path: self.dir.clone(), reasons });
            }
        };
        parts.optimizer.set_learning_rate_factor(parts.schedule.factor(self.step));
        self.session = Some(Session { lock, base });
        Ok(start)
    }

    fn resume(&mut self, parts: &mut Parts<'_>, dir: &Path, manifest: &Manifest) -> Result<BaseRecord> {
        let Loaded { state, optimizer, base, environment } = Loaded::read(dir)?;
        if state.step != manifest.step {
            let reason = format!("step {}, but the manifest says {}", state.step, manifest.step);
            return Err(Error::corrupt(dir, reason));
        }
        let devices = parts.model.devices();
        let base = base.resume(parts.model.fingerprint()?, state.step, self.policy)?;
        parts.model.check_adapter(dir)?;
        parts.optimizer.check_state(&optimizer)?;
        same_config("schedule", &json!(state.schedule), &json!(parts.schedule))?;
        parts.sampler.check_state(&state.sampler)?;
        state.rng.check(&devices)?;
        let now = Environment::capture(&devices, Value::Null)?;
        for difference in environment.differences(&now) {
            tracing::warn!(difference, "not the recorded environment: results may differ in the last bits");
        }

        // Up to here nothing was changed. The generators are set first, since
        // they can go back, and last, in case loading has drawn from them.
        let before = RngState::capture(&devices)?;
        let loaded = state.rng.restore().and_then(|()| parts.model.load_adapter(dir));
        if let Err(error) = loaded.and_then(|()| parts.optimizer.import_state(optimizer)) {
            before.restore()?;
            return Err(error);
        }
        state.rng.restore()?;
        parts.sampler.set_state(&state.sampler)?;
        (self.step, self.user) = (state.step, state.user);
        Ok(base)
    }

    /// Counts a step: sets the learning rate of the next, and saves if due.
    ///
    /// # Errors
    /// Those of [`Run::save`]. The step is counted even then, so that training
    /// can go on; the next try is when the next checkpoint is due.
    pub fn step(&mut self, parts: &mut Parts<'_>) -> Result<StepReport> {
        self.session()?;
        self.step += 1;
        parts.optimizer.set_learning_rate_factor(parts.schedule.factor(self.step));
        let due = self.every > 0 && self.step.is_multiple_of(self.every);
        let saved = if due { Some(self.save(parts)?) } else { None };
        Ok(StepReport { step: self.step, saved })
    }

    /// Saves a checkpoint now, replacing one of the same step, and deletes
    /// those no longer kept.
    ///
    /// # Errors
    /// [`Error::Io`] if it can't be written; the checkpoints from before are as
    /// they were, and so is the run. [`Error::Config`] before
    /// [`Run::resume_or_start`].
    pub fn save(&mut self, parts: &mut Parts<'_>) -> Result<PathBuf> {
        let files = collect(parts, &self.session()?.base, self.step, self.user.clone())?;
        let path = commit(&self.dir, self.step, &files)?;
        tracing::info!(step = self.step, path = %path.display(), "saved a checkpoint");
        // The checkpoint is safe; old ones that stay are no reason to stop.
        if let Err(error) = rotate(&self.dir, self.step, self.keep) {
            tracing::warn!(%error, "old checkpoints could not be deleted");
        }
        Ok(path)
    }

    /// Steps taken since the start of the run.
    pub fn current_step(&self) -> u64 {
        self.step
    }

    /// Sets the caller's own value, which goes into each checkpoint from now on.
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

    fn session(&self) -> Result<&Session> {
        let missing = || Error::config("run", "`resume_or_start` first", "a run not yet started");
        self.session.as_ref().ok_or_else(missing)
    }
}

fn read_user_state<T: DeserializeOwned>(value: &Value) -> Result<T> {
    T::deserialize(value).map_err(user_state::<T>)
}

fn user_state<T>(error: serde_json::Error) -> Error {
    Error::config("user_state", format!("a value of {} that JSON can hold", std::any::type_name::<T>()), error)
}
