//! The state of libtorch's default random generators.

use super::{check, own, raw};
use crate::error::{Error, Result};
use std::ffi::c_char;
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn tp_generator_state(device: i32, out: *mut *mut C_tensor) -> *mut c_char;
    fn tp_set_generator_state(device: i32, state: *mut C_tensor) -> *mut c_char;
}

/// -1 for the CPU, else the CUDA device's index.
pub(super) fn device_index(device: Device) -> Result<i32> {
    match device {
        Device::Cpu => Ok(-1),
        Device::Cuda(index) => {
            i32::try_from(index).map_err(|_| Error::config("device", "a CUDA index below 2^31", index))
        }
        other => Err(Error::config("device", "Cpu or Cuda", format!("{other:?}"))),
    }
}

/// The state of the device's default generator (CPU: 5,056 bytes).
///
/// # Errors
/// A device that is neither CPU nor CUDA, or is not there.
pub fn get_state(device: Device) -> Result<Vec<u8>> {
    let index = device_index(device)?;
    let mut out = std::ptr::null_mut();
    // SAFETY: `out` is a cell of ours; on success it holds a tensor made by `new`.
    let state = unsafe {
        check(tp_generator_state(index, &mut out))?;
        own(out)
    };
    super::bytes::tensor_bytes(&state)
}

/// Sets the state of the device's default generator.
///
/// # Errors
/// A device that is not there, or a state of another kind of generator.
pub fn set_state(device: Device, state: &[u8]) -> Result<()> {
    let index = device_index(device)?;
    let state: Tensor = super::bytes::tensor_from_bytes(state, &[state.len() as i64], Kind::Uint8)?;
    // SAFETY: the state is borrowed for the call.
    check(unsafe { tp_set_generator_state(index, raw(&state)) })
}
