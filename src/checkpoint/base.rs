//! The identity of the base that a run trains on.

use crate::base::Fingerprint;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// What a run does about a base other than the recorded one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResumePolicy {
    /// It is an error.
    #[default]
    Strict,
    /// The run goes on with the base it was given. Each following checkpoint's
    /// `base.json` says at which step and in which weights the base changed.
    AllowDifferentBase,
}

/// What `base.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct BaseRecord {
    #[serde(flatten)]
    fingerprint: Fingerprint,
    /// The changes of base that [`ResumePolicy::AllowDifferentBase`] let through.
    allowed_changes: Vec<AllowedChange>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct AllowedChange {
    step: u64,
    differences: Vec<String>,
}

impl BaseRecord {
    pub(super) fn new(fingerprint: Fingerprint) -> Self {
        BaseRecord { fingerprint, allowed_changes: Vec::new() }
    }

    /// The record to go on with over the base that is there now, and what is
    /// different about it.
    pub(super) fn resume(self, now: Fingerprint, step: u64, policy: ResumePolicy) -> Result<(Self, Vec<String>)> {
        let differences = self.fingerprint.differences(&now);
        let mut allowed_changes = self.allowed_changes;
        if !differences.is_empty() {
            if policy == ResumePolicy::Strict {
                return Err(Error::DifferentBase { differences });
            }
            allowed_changes.push(AllowedChange { step, differences: differences.clone() });
        }
        Ok((BaseRecord { fingerprint: now, allowed_changes }, differences))
    }
}
