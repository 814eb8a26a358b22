//! An operator with ΔW as an autograd node that keeps x and the adapter's
//! small tensors only: the backward pass forms ΔW again.

use super::formula::Formula;
use crate::error::Result;
use crate::ffi::autograd::{self, Backward};
use crate::ffi::context::{self, AutocastMode, GradMode};
use crate::ffi::hook::{ConvolutionForm, Operator};
use crate::ffi::runtime::autocast_kind;
use crate::lora::layer::foreign;
use crate::quant::frozen::convolve;
use crate::quant::linear::{Like, Rows, as_matrix};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// s · ΔW applied to the operator's x, without a bias, in the dtype of x or
/// autocast's.
pub(super) fn product(
    formula: &Arc<dyn Formula>,
    sizes: &[i64],
    operator: &Operator,
    tensors: &[Tensor],
    s: f64,
) -> Result<Tensor> {
    let (x, form) = match *operator {
        Operator::Linear { x, .. } => (x, None),
        Operator::Convolution { x, form, .. } => (x, Some(form.clone())),
        _ => return Err(foreign("a linear layer or a convolution")),
    };
    let node = Node { formula: Arc::clone(formula), s, x: Like::new(x)?, form };
    let kind = autocast_kind(x.device()).unwrap_or(x.f_kind()?);
    let (kept, y) = {
        let _no_grad = tch::no_grad_guard();
        let _autocast = AutocastMode::new(x.device(), None)?;
        match &node.form {
            None => {
                let rows = Rows::in_kind(sizes[1], x, kind)?;
                let y = formula.product(&rows.matrix, tensors, s)?;
                (rows.matrix.shallow_clone(), rows.reshape(&y)?)
            }
            Some(form) => {
                let x = x.f_detach()?.f_to_kind(kind)?;
                let y = convolve(&x, &formula.weight(tensors, s)?.f_to_kind(kind)?, None, form)?;
                (x, y)
            }
        }
    };
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(tensors).collect();
    if autograd::needs_grad(&inputs) {
        let saved: Vec<&Tensor> = std::iter::once(&kept).chain(tensors).collect();
        autograd::record(&inputs, &saved, &y, Box::new(node))?;
    }
    Ok(y)
}

struct Node {
    formula: Arc<dyn Formula>,
    s: f64,
    x: Like,
    /// Of a convolution.
    form: Option<ConvolutionForm>,
}

impl Backward for Node {
    fn backward(&self, grad: &Tensor, saved: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let [x, tensors @ ..] = saved else { return Ok(Vec::new()) };
        let kind = x.f_kind()?;
        let grads = match &self.form {
            None => {
                let out = grad.size().last().copied().unwrap_or(1);
                let grad = as_matrix(grad, out)?.f_to_kind(kind)?;
                if self.formula.does_without_weight() {
                    gradients(saved, &grad, |v| self.formula.product(&v[0], &v[1..], self.s))?
                } else {
                    self.through_weight(tensors, kind, |weight| Ok([grad.f_mm(weight)?, grad.f_tr()?.f_mm(x)?]))?
                }
            }
            Some(form) => {
                let grad = grad.f_to_kind(kind)?;
                self.through_weight(tensors, kind, |weight| {
                    let both = gradients(&[x.shallow_clone(), weight.shallow_clone()], &grad, |v| {
                        convolve(&v[0], &v[1], None, form)
                    })?;
                    Ok([both[0].shallow_clone(), both[1].shallow_clone()])
                })?
            }
        };
        let mut grads: Vec<Option<Tensor>> =
            grads.into_iter().zip(needed).map(|(grad, needed)| needed.then_some(grad)).collect();
        if let Some(Some(dx)) = grads.first_mut() {
            *dx = self.x.shaped(&dx.f_contiguous()?)?;
        }
        Ok(grads)
    }
}

impl Node {
    /// The gradients of x and of the tensors, where `both` answers those of x
    /// and of the weight, given the weight.
    fn through_weight(
        &self,
        tensors: &[Tensor],
        kind: Kind,
        both: impl FnOnce(&Tensor) -> Result<[Tensor; 2]>,
    ) -> Result<Vec<Tensor>> {
        let leaves = leaves(tensors)?;
        let weight = {
            let _grad = GradMode::on();
            self.formula.weight(&leaves, self.s)?.f_to_kind(kind)?
        };
        let [dx, dw] = both(&weight.f_detach()?)?;
        context::backward(&weight, &dw)?;
        let mut grads = vec![dx];
        for leaf in &leaves {
            grads.push(leaf.f_grad()?);
        }
        Ok(grads)
    }
}

/// The gradients of the inputs of `f`, given that of its result.
fn gradients(inputs: &[Tensor], grad: &Tensor, f: impl FnOnce(&[Tensor]) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let leaves = leaves(inputs)?;
    let output = {
        let _grad = GradMode::on();
        f(&leaves)?
    };
    context::backward(&output, grad)?;
    leaves.iter().map(|leaf| Ok(leaf.f_grad()?)).collect()
}

/// Handles of their own, in which a backward pass leaves the gradients.
fn leaves(tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    tensors.iter().map(|tensor| Ok(tensor.f_detach()?.f_set_requires_grad(true)?)).collect()
}
