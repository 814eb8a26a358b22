//! Floor 5: checkpoints that are written as a whole, verified when read, and
//! bring a run back bit by bit.
//!
//! A run's folder holds `checkpoint-00000400` and so on, each with
//!
//! | file | content |
//! |---|---|
//! | `adapter_model.safetensors`, `adapter_config.json` | the adapter; HF PEFT loads the folder as it is |
//! | `optimizer.safetensors` | the optimizer's tensors by parameter name |
//! | `parts.safetensors` | the tensors of the run's further parts, if it has any |
//! | `training_state.json` | step, schedule, optimizer settings, sampler, random generators, the caller's own value |
//! | `base.json` | name, shape, dtype, scheme and hash of each weight of the base |
//! | `environment.json` | versions, machine, threads, settings |
//! | `manifest.json` | size and blake3 of each other file; written last |
//!
//! Which one is the newest is found by reading them ([`latest`]), and never
//! stored.

mod base;
mod builder;
mod content;
mod environment;
mod files;
mod fs;
mod latest;
mod layout;
mod lock;
mod manifest;
mod model;
mod parts;
mod restore;
mod retention;
mod run;
mod snapshot;
mod state;
mod store;
mod write;

pub use base::ResumePolicy;
pub use builder::RunBuilder;
pub use content::Content;
pub use files::CheckpointFiles;
pub use fs::{FileSystem, OsFileSystem, SyncWrite};
pub use latest::{Latest, SkippedCheckpoint, latest};
pub use manifest::{FileEntry, Manifest, verify};
pub use parts::{Checkpointable, Parts};
pub use retention::Best;
pub use run::{Run, Start, StepReport};
