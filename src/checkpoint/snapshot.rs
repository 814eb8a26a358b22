//! From a run's parts to a checkpoint's files.

use super::base::BaseRecord;
use super::environment::Environment;
use super::layout::{self, BASE, ENVIRONMENT, OPTIMIZER, PARTS, TRAINING_STATE};
use super::state::{Change, PartSettings, TrainingState};
use super::{Content, Parts};
use crate::error::{Error, Result};
use crate::ffi::bytes::Buffer;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Everything of a run at one step. The tensors are the run's own: it is
/// written, or copied, before training goes on.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) step: u64,
    pub(super) metric: Option<f64>,
    /// Name and content of each file but the manifest.
    files: Vec<(String, Content)>,
}

/// A copy of a [`Snapshot`], which training doesn't change.
#[derive(Debug)]
pub(super) struct Copied {
    step: u64,
    metric: Option<f64>,
    files: Vec<(String, Buffer)>,
}

/// What is done with the name and the pieces of a file.
type ForFile<'a> = dyn FnMut(&str, &[&[u8]]) -> Result<()> + 'a;

/// What is to be written, whoever holds it.
pub(super) trait Files {
    fn step(&self) -> u64;
    fn metric(&self) -> Option<f64>;
    /// Calls `f` with the name and the pieces of each file, in turn.
    fn each(&self, f: &mut ForFile<'_>) -> Result<()>;
}

impl Files for Snapshot {
    fn step(&self) -> u64 {
        self.step
    }

    fn metric(&self) -> Option<f64> {
        self.metric
    }

    fn each(&self, f: &mut ForFile<'_>) -> Result<()> {
        self.files.iter().try_for_each(|(name, content)| f(name, &content.lay_out()?.pieces()))
    }
}

impl Files for Copied {
    fn step(&self) -> u64 {
        self.step
    }

    fn metric(&self) -> Option<f64> {
        self.metric
    }

    fn each(&self, f: &mut ForFile<'_>) -> Result<()> {
        self.files.iter().try_for_each(|(name, bytes)| f(name, &[bytes.as_slice()]))
    }
}

/// Memory of an earlier copy, by the file's name.
pub(super) type Spare = BTreeMap<String, Buffer>;

impl Copied {
    /// The memory, to be used again.
    pub(super) fn into_spare(self) -> Spare {
        self.files.into_iter().collect()
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
    pub(super) fn copied(&self, mut spare: Spare) -> Result<Copied> {
        let mut files = Vec::with_capacity(self.files.len());
        for (name, content) in &self.files {
            files.push((name.clone(), content.gather(spare.remove(name))?));
        }
        Ok(Copied { step: self.step, metric: self.metric, files })
    }

    pub(super) fn take(parts: &Parts<'_>, progress: Progress<'_>) -> Result<Self> {
        parts.check_names()?;
        let optimizer = parts.optimizer.lend_state()?;
        let mut files = parts.model.adapter_files()?;

        let mut settings = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, part) in &parts.others {
            let state = part.lend_state()?;
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
        files.push((TRAINING_STATE.into(), json_file(TRAINING_STATE, &state)?));
        files.push((BASE.into(), json_file(BASE, progress.base)?));
        files.push((ENVIRONMENT.into(), json_file(ENVIRONMENT, &environment)?));
        files.push((OPTIMIZER.into(), Content::Tensors(optimizer.tensors)));
        check_names(&files)?;
        Ok(Snapshot { step: progress.step, metric: progress.metric, files })
    }
}

fn json_file(name: &str, value: &impl Serialize) -> Result<Content> {
    serde_json::to_vec_pretty(value).map(Content::Bytes).map_err(|error| Error::corrupt(name, error))
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
