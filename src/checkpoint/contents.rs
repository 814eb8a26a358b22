//! From a run's parts to a checkpoint's files, and back.

use super::Parts;
use super::base::BaseRecord;
use super::environment::Environment;
use super::layout::{self, BASE, ENVIRONMENT, OPTIMIZER, TRAINING_STATE};
use super::state::TrainingState;
use crate::error::{Error, Result};
use crate::format::safetensors;
use crate::train::OptimizerState;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Name and content of each file but the manifest.
pub(super) fn collect(parts: &Parts<'_>, base: &BaseRecord, step: u64, user: Value) -> Result<Vec<(String, Vec<u8>)>> {
    let optimizer = parts.optimizer.export_state()?;
    let state = TrainingState::capture(parts, &optimizer, step, user)?;
    let configuration = json!({
        "optimizer": {"kind": optimizer.kind, "hyperparameters": optimizer.hyperparameters},
        "schedule": parts.schedule,
    });
    let environment = Environment::capture(&parts.model.devices(), configuration)?;
    let tensors = safetensors::serialize(&optimizer.tensors)?;

    let mut files = parts.model.adapter_files()?;
    files.push((OPTIMIZER.into(), tensors));
    files.push((TRAINING_STATE.into(), to_json(TRAINING_STATE, &state)?));
    files.push((BASE.into(), to_json(BASE, base)?));
    files.push((ENVIRONMENT.into(), to_json(ENVIRONMENT, &environment)?));
    check_names(&files)?;
    Ok(files)
}

/// A checkpoint's files, read.
pub(super) struct Loaded {
    pub(super) state: TrainingState,
    pub(super) optimizer: OptimizerState,
    pub(super) base: BaseRecord,
    pub(super) environment: Environment,
}

impl Loaded {
    /// Reads a verified checkpoint; the adapter's files are the model's to read.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let state: TrainingState = from_json(&dir.join(TRAINING_STATE))?;
        let tensors = safetensors::read(&dir.join(OPTIMIZER))?;
        let kind = state.optimizer.kind.clone();
        let hyperparameters = state.optimizer.hyperparameters.clone();
        Ok(Loaded {
            optimizer: OptimizerState { kind, hyperparameters, tensors },
            state,
            base: from_json(&dir.join(BASE))?,
            environment: from_json(&dir.join(ENVIRONMENT))?,
        })
    }
}

/// A model must give the two files of an adapter, and no path, no name twice
/// and none of the checkpoint's own.
fn check_names(files: &[(String, Vec<u8>)]) -> Result<()> {
    let bad = |found: String| Err(Error::config("adapter_files", "the files of an adapter", found));
    let mut names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    names.push(layout::MANIFEST);
    names.sort_unstable();
    if let Some(name) = names.iter().find(|name| !layout::is_plain(name)) {
        return bad(format!("`{name}`"));
    }
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return bad(format!("{} twice", pair[0]));
    }
    match layout::REQUIRED.iter().find(|name| !names.contains(name)) {
        Some(name) => bad(format!("no {name}")),
        None => Ok(()),
    }
}

fn to_json(name: &str, value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|error| Error::corrupt(name, error))
}

fn from_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|error| Error::corrupt(path, error))
}
