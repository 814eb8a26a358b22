//! The state of libtorch's default random generators.

use super::{check, own, raw};
use crate::error::{Error, Result};
use std::ffi::{c_char, c_void};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn tp_generator_state(device: i32, out: *mut *mut C_tensor) -> *mut c_char;
    fn tp_set_generator_state(device: i32, state: *mut C_tensor) -> *mut c_char;
    fn tp_with_cpu_engine(
        context: *mut c_void,
        call: unsafe extern "C" fn(*mut c_void, *mut u32, *mut usize),
    ) -> *mut c_char;
}

/// Words of the state of a Mersenne Twister.
pub(crate) const WORDS: usize = 624;

/// The state of a Mersenne Twister (MT19937).
#[derive(Debug)]
pub(crate) struct Engine<'a> {
    pub(crate) words: &'a mut [u32; WORDS],
    /// How many of the words have been drawn; at least one after any draw.
    pub(crate) used: &'a mut usize,
}

/// Lends the engine of the CPU's default generator to `draw`, which draws from
/// it at least once and must not panic. No other thread draws meanwhile.
pub(crate) fn with_cpu_engine<F: FnOnce(Engine<'_>)>(draw: F) -> Result<()> {
    unsafe extern "C" fn call<F: FnOnce(Engine<'_>)>(context: *mut c_void, words: *mut u32, used: *mut usize) {
        // SAFETY: the context is the cell lent below, of this type, and the
        // shim lends `WORDS` words and one count for the length of this call.
        let (draw, engine) = unsafe {
            let engine = Engine { words: &mut *words.cast(), used: &mut *used };
            ((*context.cast::<Option<F>>()).take(), engine)
        };
        if let Some(draw) = draw {
            draw(engine);
        }
    }
    let mut draw = Some(draw);
    // SAFETY: the cell outlives the call, which calls back once, and the
    // function fits its type. A panic there would abort the process.
    check(unsafe { tp_with_cpu_engine((&raw mut draw).cast(), call::<F>) })
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
