//! What `training_state.json` holds.

use super::Parts;
use super::snapshot::Progress;
use crate::error::Result;
use crate::train::{OptimizerState, RngState, SamplerState, Schedule};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Everything of a run that is neither a tensor nor the base's identity.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TrainingState {
    pub(super) step: u64,
    /// For people; the sampler's own state is what counts.
    epoch: u64,
    /// Examples handed out; for people likewise.
    samples: u64,
    pub(super) schedule: Schedule,
    pub(super) optimizer: OptimizerSettings,
    pub(super) sampler: SamplerState,
    pub(super) rng: RngState,
    /// The run's further parts, by name.
    pub(super) parts: BTreeMap<String, PartSettings>,
    /// What the run was allowed to go on with though it was not as recorded,
    /// the base aside.
    pub(super) allowed_changes: Vec<Change>,
    /// The caller's own value; null for none.
    pub(super) user: Value,
}

/// The part of an [`OptimizerState`] that is not tensors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OptimizerSettings {
    pub(super) kind: String,
    pub(super) hyperparameters: Value,
}

/// The part of a [`State`](crate::State) that is not tensors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PartSettings {
    pub(super) kind: String,
    pub(super) settings: Value,
    pub(super) values: Value,
}

/// Something that a run was allowed to change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Change {
    /// Steps that had been taken.
    pub(super) step: u64,
    /// `schedule` or `optimizer`.
    pub(super) what: String,
    pub(super) differences: Vec<String>,
}

impl TrainingState {
    pub(super) fn capture(
        parts: &Parts<'_>,
        optimizer: &OptimizerState,
        settings: BTreeMap<String, PartSettings>,
        progress: &Progress<'_>,
    ) -> Result<Self> {
        let OptimizerState { kind, hyperparameters, .. } = optimizer;
        Ok(TrainingState {
            step: progress.step,
            epoch: parts.sampler.epoch(),
            samples: parts.sampler.samples(),
            schedule: *parts.schedule,
            optimizer: OptimizerSettings { kind: kind.clone(), hyperparameters: hyperparameters.clone() },
            sampler: parts.sampler.state().clone(),
            rng: RngState::capture(&parts.model.devices())?,
            parts: settings,
            allowed_changes: progress.changes.to_vec(),
            user: progress.user.clone(),
        })
    }
}
