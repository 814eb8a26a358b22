//! Kernels where they can be had, and libtorch's operators where not.

use super::Launcher;
use super::launch::Card;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use tch::Device;

/// What `f` answers, given the device to start kernels on. `None` where that is
/// no CUDA device; and where a kernel can't be compiled or started, which is a
/// warning: then nothing was changed, and libtorch's operators are to serve.
pub(crate) fn by_kernel<R>(device: Device, f: impl FnOnce(&dyn Launcher) -> Result<R>) -> Result<Option<R>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    match Card::get(index).and_then(|card| f(card.as_ref())) {
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
