//! What runs around a piece of a graph: modes of the thread, a nested backward
//! pass, and gradients set by hand.

use super::{check, generator::device_index, raw};
use crate::error::{Error, Result};
use std::ffi::c_char;
use std::marker::PhantomData;
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

/// As in the shim; a kind below 0 leaves the dtype as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RawAutocast {
    enabled: bool,
    kind: i32,
}

unsafe extern "C" {
    fn tp_set_autocast(device: i32, to: RawAutocast) -> RawAutocast;
    fn tp_autocast_enter();
    fn tp_autocast_leave();
    fn tp_set_autocast_cache(on: bool) -> bool;
    fn tp_backward(output: *mut C_tensor, grad: *mut C_tensor) -> *mut c_char;
    fn tp_set_grad(parameter: *mut C_tensor, grad: *mut C_tensor) -> *mut c_char;
}

/// Sets autocast of one type of device on this thread, while it lives.
#[derive(Debug)]
pub(crate) struct AutocastMode {
    device: i32,
    before: RawAutocast,
    /// The setting is the thread's, so the guard must not leave it.
    _not_send: PhantomData<*const ()>,
}

impl AutocastMode {
    /// Off without a dtype.
    pub(crate) fn new(device: Device, kind: Option<Kind>) -> Result<Self> {
        let device = device_index(device)?;
        let to = match kind {
            None => RawAutocast { enabled: false, kind: -1 },
            Some(Kind::Half) => RawAutocast { enabled: true, kind: 5 },
            Some(Kind::BFloat16) => RawAutocast { enabled: true, kind: 15 },
            Some(other) => return Err(Error::config("kind", "BFloat16 or Half", format!("{other:?}"))),
        };
        // SAFETY: both set thread-local values.
        let before = unsafe {
            tp_autocast_enter();
            tp_set_autocast(device, to)
        };
        Ok(AutocastMode { device, before, _not_send: PhantomData })
    }
}

impl Drop for AutocastMode {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe {
            tp_set_autocast(self.device, self.before);
            tp_autocast_leave();
        }
    }
}

/// Keeps autocast from keeping cast weights on this thread, while it lives.
///
/// A weight that is cast with gradients off would be kept without its history.
pub(crate) struct NoAutocastCache {
    before: bool,
    _not_send: PhantomData<*const ()>,
}

impl NoAutocastCache {
    pub(crate) fn new() -> Self {
        // SAFETY: sets a thread-local value.
        NoAutocastCache { before: unsafe { tp_set_autocast_cache(false) }, _not_send: PhantomData }
    }
}

impl Drop for NoAutocastCache {
    fn drop(&mut self) {
        // SAFETY: sets a thread-local value.
        unsafe { tp_set_autocast_cache(self.before) };
    }
}

/// Turns gradients on, on this thread, while it lives.
pub(crate) struct GradMode {
    before: bool,
    _not_send: PhantomData<*const ()>,
}

impl GradMode {
    pub(crate) fn on() -> Self {
        // SAFETY: sets a thread-local value and answers the one before.
        GradMode { before: unsafe { torch_sys::at_grad_set_enabled(1) } != 0, _not_send: PhantomData }
    }
}

impl Drop for GradMode {
    fn drop(&mut self) {
        // SAFETY: sets a thread-local value.
        unsafe { torch_sys::at_grad_set_enabled(i32::from(self.before)) };
    }
}

/// Adds the gradients of `output`, given its own, to all leaves it came from.
/// May be called within a backward pass.
pub(crate) fn backward(output: &Tensor, grad: &Tensor) -> Result<()> {
    // SAFETY: both are borrowed for the call.
    check(unsafe { tp_backward(raw(output), raw(grad)) })
}

/// Makes `grad`, of the parameter's shape, dtype and device, its gradient.
pub(crate) fn set_grad(parameter: &Tensor, grad: Option<&Tensor>) -> Result<()> {
    // SAFETY: both are borrowed for the call; null stands for none.
    check(unsafe { tp_set_grad(raw(parameter), grad.map_or(std::ptr::null_mut(), raw)) })
}
