//! The identity of the base that a run trains on.

use crate::base::Fingerprint;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// What a run does about a base other than the recorded one.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let dir = tempfile::tempdir().unwrap();
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let mut model = LoraModel::wrap(Base::new(vs, net), config)?;
/// # let mut optimizer = AdamW::builder().build(model.trainable_parameters())?;
/// # let (schedule, mut sampler) = (Schedule::constant(), Sampler::new(100, 10, 0)?);
/// # let mut run = Run::builder(dir.path()).build()?;
/// # let mut parts = Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler);
/// # run.resume_or_start(&mut parts)?;
/// # run.save(&mut parts)?;
/// # drop(run);
/// model.quantize(&QuantConfig::int8().build()?)?; // the run was begun on the dense base
/// let mut parts = Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler);
/// let error = Run::builder(dir.path()).build()?.resume_or_start(&mut parts).unwrap_err();
/// assert!(matches!(error, Error::DifferentBase { .. }));
///
/// let mut run = Run::builder(dir.path()).policy(ResumePolicy::AllowDifferentBase).build()?;
/// let start = run.resume_or_start(&mut parts)?;
/// assert!(matches!(start, Start::Resumed { differences, .. } if differences[0].starts_with("proj.weight")));
/// # Ok::<(), tch_peft::Error>(())
/// ```
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
