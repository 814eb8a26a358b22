//! What a frozen weight answers to the operators that consume weights.

use super::linear::{Like, frozen_linear};
use super::stack::OfStack;
use super::{Dense, LinearMap, PackedWeight};
use crate::error::Result;
use crate::ffi::autograd::{self, Backward};
use crate::ffi::hook::{ConvolutionForm, Operator};
use crate::ffi::runtime::autocast_kind;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// The operator with the frozen weight alone: gradients reach x and the bias.
pub(crate) fn frozen(weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
    match *operator {
        Operator::Linear { x, bias, transposed } => frozen_linear(&LinearMap::new(weight, transposed), x, bias),
        Operator::Matrix { x, bias, index, transposed } => {
            frozen_linear(&LinearMap::new(&matrix(weight, index)?, transposed), x, bias)
        }
        Operator::Stack { x, transposed } => match weight.as_dense() {
            Some(stack) => on_dense(&stack, operator),
            None => {
                let one = |i| frozen_linear(&LinearMap::new(&matrix(weight, i)?, transposed), &x.f_select(0, i)?, None);
                let all = (0..weight.shape()[0]).map(one).collect::<Result<Vec<_>>>()?;
                Ok(Tensor::f_stack(&all, 0)?)
            }
        },
        Operator::Embedding { indices, .. } => rows(weight.as_ref(), indices),
        Operator::Convolution { x, bias, form } => convolution(weight, x, bias, form),
    }
}

/// The operator with a dense weight, by autograd's own formulas.
pub(crate) fn on_dense(weight: &Tensor, operator: &Operator) -> Result<Tensor> {
    let linear = |x: &Tensor, weight: Tensor, bias: Option<&Tensor>, transposed: bool| -> Result<Tensor> {
        let weight = if transposed { weight.f_tr()? } else { weight };
        Ok(x.f_linear(&weight, bias)?)
    };
    match *operator {
        Operator::Linear { x, bias, transposed } => linear(x, weight.shallow_clone(), bias, transposed),
        Operator::Matrix { x, bias, index, transposed } => linear(x, weight.f_select(0, index)?, bias, transposed),
        Operator::Stack { x, transposed: true } => Ok(x.f_bmm(weight)?),
        Operator::Stack { x, transposed: false } => Ok(x.f_bmm(&weight.f_transpose(1, 2)?)?),
        Operator::Embedding { indices, form } => {
            Ok(Tensor::f_embedding(weight, indices, form.padding_idx, form.scale_grad_by_freq, form.sparse)?)
        }
        Operator::Convolution { x, bias, form } => convolve(x, weight, bias, form),
    }
}

/// One matrix of a stack (n, rows, columns); of a packed one it stays packed.
pub(crate) fn matrix(stack: &Arc<dyn PackedWeight>, index: i64) -> Result<Arc<dyn PackedWeight>> {
    Ok(match stack.as_dense() {
        Some(dense) => Arc::new(Dense::new(dense.f_select(0, index)?)?),
        None => Arc::new(OfStack::new(stack, index)),
    })
}

/// The rows at `indices`, in the weight's dtype: only these are unpacked.
fn rows(weight: &dyn PackedWeight, indices: &Tensor) -> Result<Tensor> {
    if let Some(table) = weight.as_dense() {
        return Ok(Tensor::f_embedding(&table, indices, -1, false, false)?);
    }
    let mut shape = indices.size();
    shape.push(weight.shape()[1]);
    let index = indices.f_to_kind(Kind::Int64)?.f_reshape([-1])?;
    let mut out = Tensor::f_empty([index.size1()?, weight.shape()[1]], (weight.kind(), weight.device()))?;
    weight.unpack_index(&index, &mut out)?;
    Ok(out.f_view(shape.as_slice())?)
}

fn convolution(
    weight: &Arc<dyn PackedWeight>,
    x: &Tensor,
    bias: Option<&Tensor>,
    form: &ConvolutionForm,
) -> Result<Tensor> {
    let kind = autocast_kind(x.device()).unwrap_or(x.f_kind()?);
    let y = {
        let _no_grad = tch::no_grad_guard();
        let bias = bias.map(|b| b.f_to_kind(kind)).transpose()?;
        super::convolution::apply(weight.as_ref(), &x.f_to_kind(kind)?, bias.as_ref(), form)?
    };
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(bias).collect();
    if autograd::needs_grad(&inputs) {
        let bias_kind = bias.map(|b| b.f_kind()).transpose()?;
        let node = FrozenConvolution { weight: Arc::clone(weight), x: Like::new(x)?, bias_kind, form: form.clone() };
        autograd::record(&inputs, &[], &y, Box::new(node))?;
    }
    Ok(y)
}

/// x (n, in, size…) with a dense weight (out, in / groups, kernel…).
pub(crate) fn convolve(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, form: &ConvolutionForm) -> Result<Tensor> {
    let no_output_padding = vec![0; form.stride.len()];
    Ok(Tensor::f_convolution(
        x,
        weight,
        bias,
        form.stride.as_slice(),
        form.padding.as_slice(),
        form.dilation.as_slice(),
        false,
        no_output_padding.as_slice(),
        form.groups,
    )?)
}

struct FrozenConvolution {
    weight: Arc<dyn PackedWeight>,
    x: Like,
    bias_kind: Option<Kind>,
    form: ConvolutionForm,
}

impl FrozenConvolution {
    fn input_gradient(&self, grad: &Tensor) -> Result<Tensor> {
        self.x.shaped(&super::convolution::input_gradient(self.weight.as_ref(), grad, self.x.shape(), &self.form)?)
    }
}

impl Backward for FrozenConvolution {
    fn backward(&self, grad: &Tensor, _: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let needs = |i: usize| needed.get(i) == Some(&true);
        let mut grads = vec![needs(0).then(|| self.input_gradient(grad)).transpose()?];
        if let Some(kind) = self.bias_kind {
            let others: Vec<i64> = (0..grad.dim() as i64).filter(|dim| *dim != 1).collect();
            grads.push(needs(1).then(|| grad.f_sum_dim_intlist(others.as_slice(), false, kind)).transpose()?);
        }
        Ok(grads)
    }
}
