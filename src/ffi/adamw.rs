//! libtorch's fused AdamW step, which tch doesn't bind.

use super::{check, raw_all};
use crate::error::Result;
use std::ffi::c_char;
use tch::Tensor;
use torch_sys::C_tensor;

unsafe extern "C" {
    fn tp_fused_adamw(
        params: *const *mut C_tensor,
        grads: *const *mut C_tensor,
        exp_avgs: *const *mut C_tensor,
        exp_avg_sqs: *const *mut C_tensor,
        steps: *const *mut C_tensor,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut c_char;
}

/// The hyperparameters of one call of [`fused_step`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hyper {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub eps: f64,
}

/// One step of `torch.optim.AdamW(fused=True)` over a group of parameters.
///
/// All slices have the same length; each `steps[i]` is an f32 scalar that
/// holds the count of this step (the caller has raised it already).
pub(crate) fn fused_step(
    params: &[&Tensor],
    grads: &[&Tensor],
    exp_avgs: &[&Tensor],
    exp_avg_sqs: &[&Tensor],
    steps: &[&Tensor],
    hyper: Hyper,
) -> Result<()> {
    let n = params.len().min(grads.len()).min(exp_avgs.len());
    let n = n.min(exp_avg_sqs.len()).min(steps.len());
    let (params, grads) = (raw_all(params), raw_all(grads));
    let (exp_avgs, exp_avg_sqs) = (raw_all(exp_avgs), raw_all(exp_avg_sqs));
    let steps = raw_all(steps);
    // SAFETY: each array holds at least `n` tensors borrowed for the call.
    check(unsafe {
        tp_fused_adamw(
            params.as_ptr(),
            grads.as_ptr(),
            exp_avgs.as_ptr(),
            exp_avg_sqs.as_ptr(),
            steps.as_ptr(),
            n,
            hyper.lr,
            hyper.beta1,
            hyper.beta2,
            hyper.weight_decay,
            hyper.eps,
        )
    })
}
