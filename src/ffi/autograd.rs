//! An autograd node whose backward is Rust code.

use super::{CppString, check, drop_boxed, give, guard, into_opaque, raw, raw_all};
use crate::error::Result;
use std::ffi::{c_char, c_void};
use tch::Tensor;
use torch_sys::C_tensor;

/// The backward pass of one node.
///
/// It runs on autograd's threads, with gradients off; an error or a panic
/// surfaces from `backward()`.
pub(crate) trait Backward: Send + Sync {
    /// The gradients of the inputs, given that of the output.
    ///
    /// `saved` are the tensors handed to [`record`]; `needed[i]` tells whether
    /// input `i` wants its gradient. Answers one entry per input.
    fn backward(&self, grad: &Tensor, saved: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>>;
}

type BackwardCall = unsafe extern "C" fn(
    *mut c_void,
    *mut C_tensor,
    *const *mut C_tensor,
    usize,
    *const bool,
    *mut *mut C_tensor,
    usize,
    *mut CppString,
) -> bool;

#[repr(C)]
struct NodeCalls {
    backward: BackwardCall,
    drop: unsafe extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    fn tp_needs_grad(inputs: *const *mut C_tensor, n: usize) -> bool;
    fn tp_record(
        inputs: *const *mut C_tensor,
        n_inputs: usize,
        saved: *const *mut C_tensor,
        n_saved: usize,
        output: *mut C_tensor,
        calls: *const NodeCalls,
        node: *mut c_void,
    ) -> *mut c_char;
}

static CALLS: NodeCalls = NodeCalls { backward: call_backward, drop: drop_boxed::<Box<dyn Backward>> };

#[allow(clippy::too_many_arguments)] // mirrors the C declaration
unsafe extern "C" fn call_backward(
    node: *mut c_void,
    grad: *mut C_tensor,
    saved: *const *mut C_tensor,
    n_saved: usize,
    needed: *const bool,
    grads: *mut *mut C_tensor,
    n_inputs: usize,
    error: *mut CppString,
) -> bool {
    let result = guard(error, || {
        // SAFETY: C++ passes back the node that `record` gave it and arrays of
        // the lengths it states, all alive for the length of this call.
        let (node, grad, saved, needed) = unsafe {
            let saved = (0..n_saved).map(|i| super::borrow(*saved.add(i))).collect::<Vec<_>>();
            let needed = (0..n_inputs).map(|i| *needed.add(i)).collect::<Vec<_>>();
            (&*node.cast::<Box<dyn Backward>>(), super::borrow(grad), saved, needed)
        };
        node.backward(&grad, &saved, &needed)
    });
    let Some(result) = result else { return false };
    for (i, grad) in result.into_iter().take(n_inputs).enumerate() {
        if let Some(grad) = grad {
            // SAFETY: `grads` has `n_inputs` cells, each null so far.
            unsafe { *grads.add(i) = give(grad) };
        }
    }
    true
}

/// Whether gradients are on and one of the inputs wants its own.
pub(crate) fn needs_grad(inputs: &[&Tensor]) -> bool {
    let inputs = raw_all(inputs);
    // SAFETY: the array holds that many borrowed tensors.
    unsafe { tp_needs_grad(inputs.as_ptr(), inputs.len()) }
}

/// Makes `output`, a fresh tensor computed with gradients off, the result of
/// a node over `inputs`.
///
/// `saved` is kept for the backward pass with libtorch's own checks against
/// changes in place, and freed as the backward pass is done.
pub(crate) fn record(inputs: &[&Tensor], saved: &[&Tensor], output: &Tensor, node: Box<dyn Backward>) -> Result<()> {
    let (inputs, saved) = (raw_all(inputs), raw_all(saved));
    // SAFETY: the arrays hold as many borrowed tensors as stated; the table is
    // static and fits the boxed node, which the shim owns from here on.
    check(unsafe {
        tp_record(inputs.as_ptr(), inputs.len(), saved.as_ptr(), saved.len(), raw(output), &CALLS, into_opaque(node))
    })
}
