//! Floor 5: checkpoints that are written as a whole, verified when read, and
//! bring a run back bit by bit.
//!
//! A run's folder holds `checkpoint-00000400` and so on, each with
//!
//! | file | content |
//! |---|---|
//! | `adapter_model.safetensors`, `adapter_config.json` | the adapter; HF PEFT loads the folder as it is |
//! | `optimizer.safetensors` | the optimizer's tensors by parameter name |
//! | `training_state.json` | step, schedule, optimizer settings, sampler, random generators, the caller's own value |
//! | `base.json` | name, shape, dtype, scheme and hash of each weight of the base |
//! | `environment.json` | versions, machine, threads, settings |
//! | `manifest.json` | size and blake3 of each other file; written last |
//!
//! Which one is the newest is found by reading them ([`latest`]), and never
//! stored.

mod base;
mod contents;
mod environment;
mod latest;
mod layout;
mod lock;
mod manifest;
mod model;
mod rotate;
mod run;
mod state;
mod write;

pub use base::ResumePolicy;
pub use latest::{Latest, SkippedCheckpoint, latest};
pub use manifest::{FileEntry, Manifest, verify};
pub use run::{Run, RunBuilder, Start, StepReport};

use crate::base::Fingerprint;
use crate::error::Result;
use crate::train::{Optimizer, Sampler, Schedule};
use std::fmt;
use std::path::Path;
use tch::Device;

/// What a checkpoint needs of a model.
pub trait Checkpointable {
    /// Name and content of `adapter_model.safetensors` and
    /// `adapter_config.json`, and of further files if the model has any.
    ///
    /// # Errors
    /// libtorch's.
    fn adapter_files(&self) -> Result<Vec<(String, Vec<u8>)>>;

    /// Tells whether [`Checkpointable::load_adapter`] would accept the files.
    ///
    /// # Errors
    /// [`Error::DifferentConfig`](crate::Error::DifferentConfig) naming the
    /// fields for another LoRA configuration, and others for files that don't
    /// fit the model.
    fn check_adapter(&self, dir: &Path) -> Result<()>;

    /// Reads the adapter's values from the files in `dir`, into the very
    /// tensors that the optimizer holds. It draws no random numbers; on an
    /// error nothing has changed.
    ///
    /// # Errors
    /// Those of [`Checkpointable::check_adapter`].
    fn load_adapter(&mut self, dir: &Path) -> Result<()>;

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
pub struct Parts<'a> {
    /// The adapted model.
    pub model: &'a mut dyn Checkpointable,
    /// The optimizer over its trainable parameters.
    pub optimizer: &'a mut dyn Optimizer,
    /// The learning rate's course.
    pub schedule: &'a Schedule,
    /// The position in the data.
    pub sampler: &'a mut Sampler,
}

impl fmt::Debug for Parts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("schedule", &self.schedule)
            .field("sampler", &self.sampler.state())
            .finish_non_exhaustive()
    }
}
