//! From a run's parts to a checkpoint's files.

use super::Parts;
use super::base::BaseRecord;
use super::environment::Environment;
use super::layout::{self, BASE, ENVIRONMENT, OPTIMIZER, PARTS, TRAINING_STATE};
use super::state::{Change, PartSettings, TrainingState};
use crate::error::{Error, Result};
use crate::format::safetensors;
use serde::Serialize;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use tch::Tensor;

/// Everything of a run at one step, apart from what training goes on to change.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) step: u64,
    pub(super) metric: Option<f64>,
    /// Name and content of each file but the manifest.
    pub(super) files: Vec<(String, Content)>,
}

/// What a file is to hold. Tensors are copies that training doesn't change;
/// they are laid out as a file when that is written.
#[derive(Debug)]
pub(super) enum Content {
    Bytes(Vec<u8>),
    Tensors(BTreeMap<String, Tensor>),
}

impl Content {
    fn json(name: &str, value: &impl Serialize) -> Result<Self> {
        serde_json::to_vec_pretty(value).map(Content::Bytes).map_err(|error| Error::corrupt(name, error))
    }

    pub(super) fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        match self {
            Content::Bytes(bytes) => Ok(Cow::Borrowed(bytes)),
            Content::Tensors(tensors) => safetensors::serialize(tensors).map(Cow::Owned),
        }
    }
}

/// What the run itself adds to its parts.
pub(super) struct Progress<'a> {
    pub(super) step: u64,
    pub(super) metric: Option<f64>,
    pub(super) user: &'a Value,
    pub(super) base: &'a BaseRecord,
    pub(super) changes: &'a [Change],
}

impl Snapshot {
    pub(super) fn take(parts: &Parts<'_>, progress: Progress<'_>) -> Result<Self> {
        parts.check_names()?;
        let optimizer = parts.optimizer.export_state()?;
        let adapter = parts.model.adapter_files()?.into_iter();
        let mut files: Vec<_> = adapter.map(|(name, bytes)| (name, Content::Bytes(bytes))).collect();

        let mut settings = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, part) in &parts.others {
            let state = part.export_state()?;
            tensors.extend(state.tensors.into_iter().map(|(key, tensor)| (format!("{name}.{key}"), tensor)));
            let part = PartSettings { kind: state.kind, settings: state.settings, values: state.values };
            settings.insert(name.to_string(), part);
        }
        if !settings.is_empty() {
            files.push((PARTS.into(), Content::Tensors(tensors)));
        }

        let state = TrainingState::capture(parts, &optimizer, settings, &progress)?;
        let configuration = json!({
            "optimizer": {"kind": optimizer.kind, "hyperparameters": optimizer.hyperparameters},
            "schedule": parts.schedule,
        });
        let environment = Environment::capture(&parts.model.devices(), configuration)?;
        files.push((TRAINING_STATE.into(), Content::json(TRAINING_STATE, &state)?));
        files.push((BASE.into(), Content::json(BASE, progress.base)?));
        files.push((ENVIRONMENT.into(), Content::json(ENVIRONMENT, &environment)?));
        files.push((OPTIMIZER.into(), Content::Tensors(optimizer.tensors)));
        check_names(&files)?;
        Ok(Snapshot { step: progress.step, metric: progress.metric, files })
    }
}

/// A model must give the two files of an adapter, and no path, no name twice
/// and none of the checkpoint's own.
fn check_names(files: &[(String, Content)]) -> Result<()> {
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
