//! libtorch's fused and multi-tensor operators for optimizers, which tch
//! doesn't bind. All change their first list in place, with gradients off.

use super::{check, raw};
use crate::error::Result;
use std::borrow::Borrow;
use std::ffi::c_char;
use tch::Tensor;
use torch_sys::C_tensor;

/// Borrowed tensors; libtorch refuses lists of different lengths.
#[repr(C)]
#[derive(Clone, Copy)]
struct List {
    cells: *const *mut C_tensor,
    len: usize,
}

unsafe extern "C" {
    fn tp_foreach_mul(list: List, factor: f64) -> *mut c_char;
    fn tp_foreach_add(list: List, other: List, alpha: f64) -> *mut c_char;
    fn tp_foreach_add_scalar(list: List, value: f64) -> *mut c_char;
    fn tp_foreach_addcmul(list: List, a: List, b: List, value: f64) -> *mut c_char;
    fn tp_foreach_addcdiv(list: List, a: List, b: List, value: f64) -> *mut c_char;
    fn tp_foreach_clamp(list: List, least: f64, most: f64) -> *mut c_char;
    fn tp_unscale(grads: List, found_inf: *mut C_tensor, inverse_scale: *mut C_tensor) -> *mut c_char;
    fn tp_fused_sgd(
        params: List,
        grads: List,
        buffers: List,
        weight_decay: f64,
        momentum: f64,
        lr: f64,
        dampening: f64,
        nesterov: bool,
        is_first_step: bool,
    ) -> *mut c_char;
}

/// Hands `N` lists to `f`; they are alive while it runs.
fn with_lists<const N: usize>(lists: [Vec<*mut C_tensor>; N], f: impl FnOnce([List; N]) -> *mut c_char) -> Result<()> {
    check(f(lists.each_ref().map(|cells| List { cells: cells.as_ptr(), len: cells.len() })))
}

fn cells(tensors: &[impl Borrow<Tensor>]) -> Vec<*mut C_tensor> {
    tensors.iter().map(|tensor| raw(tensor.borrow())).collect()
}

/// `x *= factor` for each.
pub(crate) fn foreach_mul(tensors: &[impl Borrow<Tensor>], factor: f64) -> Result<()> {
    // SAFETY: the list holds as many borrowed tensors as it states.
    with_lists([cells(tensors)], |[list]| unsafe { tp_foreach_mul(list, factor) })
}

/// `x += alpha * y` for each pair.
pub(crate) fn foreach_add(tensors: &[impl Borrow<Tensor>], other: &[impl Borrow<Tensor>], alpha: f64) -> Result<()> {
    // SAFETY: as above.
    with_lists([cells(tensors), cells(other)], |[list, other]| unsafe { tp_foreach_add(list, other, alpha) })
}

/// `x += value` for each.
pub(crate) fn foreach_add_scalar(tensors: &[impl Borrow<Tensor>], value: f64) -> Result<()> {
    // SAFETY: as above.
    with_lists([cells(tensors)], |[list]| unsafe { tp_foreach_add_scalar(list, value) })
}

/// `x += value * a * b` for each.
pub(crate) fn foreach_addcmul(tensors: &[&Tensor], a: &[&Tensor], b: &[&Tensor], value: f64) -> Result<()> {
    // SAFETY: as above.
    with_lists([cells(tensors), cells(a), cells(b)], |[list, a, b]| unsafe { tp_foreach_addcmul(list, a, b, value) })
}

/// `x += value * a / b` for each.
pub(crate) fn foreach_addcdiv(tensors: &[&Tensor], a: &[&Tensor], b: &[&Tensor], value: f64) -> Result<()> {
    // SAFETY: as above.
    with_lists([cells(tensors), cells(a), cells(b)], |[list, a, b]| unsafe { tp_foreach_addcdiv(list, a, b, value) })
}

/// Brings each value into `least..=most`.
pub(crate) fn foreach_clamp(tensors: &[impl Borrow<Tensor>], least: f64, most: f64) -> Result<()> {
    // SAFETY: as above.
    with_lists([cells(tensors)], |[list]| unsafe { tp_foreach_clamp(list, least, most) })
}

/// Multiplies gradients of one device by the f32 scalar `inverse_scale`; sets
/// the f32 scalar `found_inf` to 1 if one of them is NaN or infinite.
pub(crate) fn unscale(grads: &[impl Borrow<Tensor>], found_inf: &Tensor, inverse_scale: &Tensor) -> Result<()> {
    // SAFETY: as above; both scalars are borrowed too.
    with_lists([cells(grads)], |[grads]| unsafe { tp_unscale(grads, raw(found_inf), raw(inverse_scale)) })
}

/// The hyperparameters of one call of [`fused_sgd`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct SgdHyper {
    pub weight_decay: f64,
    pub momentum: f64,
    pub lr: f64,
    pub dampening: f64,
    pub nesterov: bool,
    pub is_first_step: bool,
}

/// One step of `torch.optim.SGD(fused=True)` over at least one parameter, all of
/// one device; without momentum there are no buffers.
pub(crate) fn fused_sgd(params: &[&Tensor], grads: &[&Tensor], buffers: &[&Tensor], hyper: SgdHyper) -> Result<()> {
    let SgdHyper { weight_decay, momentum, lr, dampening, nesterov, is_first_step } = hyper;
    // SAFETY: as above.
    with_lists([cells(params), cells(grads), cells(buffers)], |[params, grads, buffers]| unsafe {
        tp_fused_sgd(params, grads, buffers, weight_decay, momentum, lr, dampening, nesterov, is_first_step)
    })
}
