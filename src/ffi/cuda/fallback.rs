//! Kernels where they can be had, and libtorch's operators where not.

use super::launch::Card;
use super::{Launch, Launcher, Program};
use crate::error::{Error, Result};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use tch::Device;

/// What `f` answers, given the device to start kernels on. `None` where that is
/// no CUDA device; and where a kernel can't be compiled or started, which is a
/// warning: then nothing was changed, and libtorch's operators are to serve.
pub(crate) fn by_kernel<R>(device: Device, f: impl FnOnce(&dyn Launcher) -> Result<R>) -> Result<Option<R>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    or_operators(Card::get(index).and_then(|card| f(card.as_ref())))
}

/// The outcome, or `None` and a warning for a kernel that can't be had.
pub(crate) fn or_operators<R>(outcome: Result<R>) -> Result<Option<R>> {
    match outcome {
        Err(Error::Kernel { kernel, reason, remedy }) => {
            warn_once(kernel, &reason, &remedy);
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// Says that a kernel is missing, the first time that it is.
fn warn_once(kernel: String, reason: &str, remedy: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let first = SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(kernel.clone());
    if first {
        tracing::warn!(%kernel, reason, remedy, "libtorch's operators take the place of a CUDA kernel, and are slower");
    }
}

/// Kernels that could not be compiled or started, and why: they are not tried again.
#[derive(Debug, Default)]
pub(crate) struct Failed(Mutex<HashMap<(Program, &'static str), String>>);

impl Failed {
    /// Starts a kernel that never failed.
    pub(crate) fn or_start(
        &self,
        launch: &Launch,
        start: impl FnOnce() -> std::result::Result<(), String>,
    ) -> Result<()> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before =
            if lock().is_empty() { None } else { lock().get(&(launch.program.clone(), launch.kernel)).cloned() };
        let outcome = before.map_or_else(start, Err);
        outcome.map_err(|reason| {
            lock().insert((launch.program.clone(), launch.kernel), reason.clone());
            Error::Kernel {
                kernel: format!("{}::{}", launch.program.name, launch.kernel),
                reason,
                remedy: "check that libtorch, its NVRTC and the driver are of one CUDA version".into(),
            }
        })
    }
}
