//! Floor 0: the only room with `unsafe`.
//!
//! It binds the C++ shim in `csrc/`: the weight hook, the autograd node, and
//! the few things of libtorch that tch doesn't bind. What leaves this room is
//! safe: no pointers, no callbacks, errors as [`Result`].
//!
//! Two rules make the rest sound and are relied on below:
//! - a `C_tensor` of torch-sys *is* an `at::Tensor`, so a pointer from
//!   [`tch::Tensor::as_ptr`] can be read as one while the tensor is borrowed;
//! - Rust functions called from C++ never unwind ([`guard`]), and C++
//!   functions never throw (the shim turns exceptions into messages).

#![allow(unsafe_code)]

pub(crate) mod adamw;
pub(crate) mod autograd;
pub(crate) mod bytes;
pub(crate) mod compute;
pub(crate) mod context;
pub(crate) mod cuda;
pub(crate) mod generator;
pub(crate) mod hook;
pub(crate) mod mapped;
pub(crate) mod optim;
pub(crate) mod runtime;
pub(crate) mod shared;
pub(crate) mod simd;

use crate::error::{Error, Result};
use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{TchError, Tensor};
use torch_sys::C_tensor;

/// A C++ `std::string` that Rust fills with an error message.
#[repr(C)]
pub(crate) struct CppString {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn tp_free_message(text: *mut c_char);
    fn tp_set_message(error: *mut CppString, text: *const c_char, len: usize);
}

/// Turns a message of the shim (null: success) into a result.
fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim hands out a NUL-terminated string made by `strdup`,
    // which is ours until freed, once, here.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        tp_free_message(message);
        text
    };
    Err(Error::Torch(TchError::Torch(text)))
}

/// Runs Rust code that C++ called: panics and errors become the message.
fn guard<T>(error: *mut CppString, f: impl FnOnce() -> Result<T>) -> Option<T> {
    let text = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => {
            let what = panic.downcast_ref::<String>().map(String::as_str);
            let what = what.or_else(|| panic.downcast_ref::<&str>().copied());
            format!("panic in an adapted weight: {}", what.unwrap_or("(no message)"))
        }
    };
    // SAFETY: `error` is the string that C++ passed for this very call, and
    // the text is copied before it is dropped.
    unsafe { tp_set_message(error, text.as_ptr().cast(), text.len()) };
    None
}

/// The pointer that the shim reads as `at::Tensor*`.
fn raw(tensor: &Tensor) -> *mut C_tensor {
    tensor.as_ptr().cast_mut()
}

fn raw_all(tensors: &[&Tensor]) -> Vec<*mut C_tensor> {
    tensors.iter().map(|t| raw(t)).collect()
}

/// Gives the tensor's heap cell away: C++ takes its content and frees it.
fn give(tensor: Tensor) -> *mut C_tensor {
    let cell = raw(&tensor);
    std::mem::forget(tensor);
    cell
}

/// A second handle on a tensor that C++ lent for the length of a call.
///
/// # Safety
/// `cell` must be a valid `at::Tensor*`.
unsafe fn borrow(cell: *mut C_tensor) -> Tensor {
    // SAFETY: promised by the caller; the clone owns its own reference.
    unsafe { Tensor::clone_from_ptr(cell) }
}

/// Takes over a heap cell that the shim allocated with `new`.
///
/// # Safety
/// `cell` must come from `new at::Tensor` and not be used by C++ again.
unsafe fn own(cell: *mut C_tensor) -> Tensor {
    // SAFETY: promised by the caller; tch frees the cell with `delete`.
    unsafe { Tensor::from_ptr(cell) }
}

/// Boxes a Rust object for C++ to hold; [`drop_boxed`] ends it.
fn into_opaque<T>(value: T) -> *mut c_void {
    Box::into_raw(Box::new(value)).cast()
}

/// Ends an object made by [`into_opaque`] with the same `T`.
unsafe extern "C" fn drop_boxed<T>(object: *mut c_void) {
    // A panic in a destructor must not cross into C++; the object is lost
    // then, which is safe.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: C++ calls the drop function of an object once, at its end,
        // and the tables pair each object with the drop of its own type.
        drop(unsafe { Box::from_raw(object.cast::<T>()) })
    }));
}
