//! What `training_state.json` holds.

use super::Parts;
use crate::error::Result;
use crate::train::{OptimizerState, RngState, SamplerState, Schedule};
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

impl TrainingState {
    pub(super) fn capture(parts: &Parts<'_>, optimizer: &OptimizerState, step: u64, user: Value) -> Result<Self> {
        let OptimizerState { kind, hyperparameters, .. } = optimizer;
        Ok(TrainingState {
            step,
            epoch: parts.sampler.epoch(),
            samples: parts.sampler.samples(),
            schedule: *parts.schedule,
            optimizer: OptimizerSettings { kind: kind.clone(), hyperparameters: hyperparameters.clone() },
            sampler: parts.sampler.state().clone(),
            rng: RngState::capture(&parts.model.devices())?,
            user,
        })
    }
}
