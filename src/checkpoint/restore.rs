//! From a checkpoint's files to a run's parts: all of them, or none.

use super::base::{BaseRecord, ResumePolicy};
use super::environment::Environment;
use super::layout::{BASE, ENVIRONMENT, OPTIMIZER, PARTS, TRAINING_STATE};
use super::state::{Change, TrainingState};
use super::{CheckpointFiles, Parts};
use crate::error::{Error, Result};
use crate::train::compare::{differences, same_config};
use crate::train::{OptimizerState, RngState, SamplerState, State};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What a run may go on with though it is not as recorded.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Allowed {
    pub(super) base: ResumePolicy,
    pub(super) schedule: bool,
    pub(super) missing_optimizer: bool,
}

/// A checkpoint, read and parsed.
pub(super) struct Loaded {
    files: CheckpointFiles,
    pub(super) state: TrainingState,
    /// None if its file is missing.
    optimizer: Option<OptimizerState>,
    /// One for each of the state's.
    parts: BTreeMap<String, State>,
    base: BaseRecord,
    environment: Environment,
}

/// What the run goes on with.
pub(super) struct Resumed {
    pub(super) base: BaseRecord,
    pub(super) changes: Vec<Change>,
    /// What is not as recorded, one line each.
    pub(super) differences: Vec<String>,
}

impl Loaded {
    pub(super) fn parse(files: CheckpointFiles, step: u64) -> Result<Self> {
        let state: TrainingState = from_json(&files, TRAINING_STATE)?;
        if state.step != step {
            let reason = format!("step {}, but the manifest says {step}", state.step);
            return Err(Error::corrupt(files.path(TRAINING_STATE), reason));
        }
        let optimizer = match files.has(OPTIMIZER) {
            false => None,
            true => Some(OptimizerState {
                kind: state.optimizer.kind.clone(),
                hyperparameters: state.optimizer.hyperparameters.clone(),
                tensors: files.tensors(OPTIMIZER)?,
            }),
        };
        let base = from_json(&files, BASE)?;
        let environment = from_json(&files, ENVIRONMENT)?;
        let parts = parts(&files, &state)?;
        Ok(Loaded { files, state, optimizer, parts, base, environment })
    }

    /// Compares everything with the parts, and changes nothing.
    pub(super) fn check(&self, parts: &Parts<'_>, allowed: Allowed) -> Result<Resumed> {
        let step = self.state.step;
        let (base, mut lines) = self.base.clone().resume(parts.model.fingerprint()?, step, allowed.base)?;
        let mut changes = self.state.allowed_changes.clone();
        parts.model.check_adapter(&self.files)?;
        match &self.optimizer {
            Some(optimizer) => parts.optimizer.check_state(optimizer)?,
            None => {
                let difference = format!("{OPTIMIZER}: missing; the optimizer starts anew");
                changes.push(Change { step, what: "optimizer".into(), differences: vec![difference] });
            }
        }
        let (recorded, given) = (json!(self.state.schedule), json!(parts.schedule));
        if !allowed.schedule {
            same_config("schedule", &recorded, &given)?;
        } else if recorded != given {
            let differences = differences(&recorded, &given);
            changes.push(Change { step, what: "schedule".into(), differences });
        }
        parts.sampler.check_state(&self.state.sampler)?;
        self.check_parts(parts)?;
        let devices = parts.model.devices();
        let rng = self.state.rng.on(&devices);
        rng.check(&rng.devices())?;

        let new = &changes[self.state.allowed_changes.len()..];
        lines.extend(new.iter().flat_map(|change| change.differences.clone()));
        lines.extend(self.environment.differences(&Environment::capture(&devices, Value::Null)?));
        Ok(Resumed { base, changes, differences: lines })
    }

    fn check_parts(&self, parts: &Parts<'_>) -> Result<()> {
        parts.check_names()?;
        let mut differences = Vec::new();
        let mut recorded: BTreeMap<_, _> = self.parts.iter().collect();
        for (name, part) in &parts.others {
            match recorded.remove(&name.to_string()) {
                Some(state) => part.check_state(state)?,
                None => differences.push(format!("{name}: given, but not recorded")),
            }
        }
        differences.extend(recorded.keys().map(|name| format!("{name}: recorded, but not given")));
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::DifferentConfig { what: "list of parts".into(), differences })
    }

    /// Brings everything back. On an error nothing has changed.
    pub(super) fn apply(self, parts: &mut Parts<'_>) -> Result<()> {
        let before = Before::of(parts)?;
        self.load(parts).inspect_err(|_| before.put_back(parts))
    }

    fn load(self, parts: &mut Parts<'_>) -> Result<()> {
        let Loaded { files, state, optimizer, parts: mut states, .. } = self;
        parts.model.load_adapter(&files)?;
        for (name, part) in &mut parts.others {
            if let Some(state) = states.remove(*name) {
                part.import_state(state)?;
            }
        }
        parts.sampler.set_state(&state.sampler)?;
        state.rng.on(&parts.model.devices()).restore()?;
        // Last, since it takes all or nothing by itself: the largest part need
        // not be copied to be put back.
        optimizer.map_or(Ok(()), |optimizer| parts.optimizer.import_state(optimizer))
    }
}

/// The parts as they were, but for the optimizer.
struct Before {
    adapter: CheckpointFiles,
    others: Vec<State>,
    sampler: SamplerState,
    rng: RngState,
}

impl Before {
    fn of(parts: &Parts<'_>) -> Result<Self> {
        let mut adapter = Vec::new();
        for (name, content) in parts.model.adapter_files()? {
            adapter.push((name, content.gather(None)?));
        }
        Ok(Before {
            adapter: CheckpointFiles::in_memory(Path::new("memory"), adapter),
            others: parts.others.iter().map(|(_, part)| part.export_state()).collect::<Result<_>>()?,
            sampler: parts.sampler.state().clone(),
            rng: RngState::capture(&parts.model.devices())?,
        })
    }

    fn put_back(self, parts: &mut Parts<'_>) {
        let mut results = vec![parts.model.load_adapter(&self.adapter)];
        let others = parts.others.iter_mut().zip(self.others);
        results.extend(others.map(|((_, part), state)| part.import_state(state)));
        results.push(parts.sampler.set_state(&self.sampler));
        results.push(self.rng.restore());
        for error in results.into_iter().filter_map(Result::err) {
            tracing::error!(%error, "a part could not be put back after a failed resume: make it anew");
        }
    }
}

/// The states of the further parts; their tensors are `<part>.<name>`.
fn parts(files: &CheckpointFiles, state: &TrainingState) -> Result<BTreeMap<String, State>> {
    let mut parts: BTreeMap<String, State> = BTreeMap::new();
    for (name, part) in &state.parts {
        let (kind, settings, values) = (part.kind.clone(), part.settings.clone(), part.values.clone());
        parts.insert(name.clone(), State { kind, settings, values, tensors: BTreeMap::new() });
    }
    if !parts.is_empty() {
        for (key, tensor) in files.tensors(PARTS)? {
            let split = key.split_once('.');
            let part = split.and_then(|(part, name)| Some((parts.get_mut(part)?, name)));
            let unknown = || Error::corrupt(files.path(PARTS), format!("{key} belongs to no part"));
            let (part, name) = part.ok_or_else(unknown)?;
            part.tensors.insert(name.into(), tensor);
        }
    }
    Ok(parts)
}

fn from_json<T: DeserializeOwned>(files: &CheckpointFiles, name: &str) -> Result<T> {
    serde_json::from_slice(files.get(name)?).map_err(|error| Error::corrupt(files.path(name), error))
}
