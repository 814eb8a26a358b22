//! The adapted linear: y = x·Wᵀ + bias + s · (drop(x)·Aᵀ·Bᵀ + b), as one node.
//!
//! The base's products run in the dtype of x, and so do those of A and B, unless
//! they are done [by hand](super::products); all of them in f32 where libtorch is
//! slow with 16 bits, and the results are rounded to the dtype of x once. Saved for the backward pass: x,
//! u = drop(x)·Aᵀ, A, B and, with dropout, the mask as one byte per element. W
//! stays packed.

use super::dropout::{add_kept, draw_mask, keep};
use super::factors::Factors;
use super::layer::{Factored, OutputChannels, foreign};
use super::products::Products;
use crate::base::Adapter;
use crate::error::{Error, Result};
use crate::ffi::autograd::{self, Backward};
use crate::ffi::hook::Operator;
use crate::quant::frozen::frozen;
use crate::quant::linear::{Like, Rows, as_matrix, bias_gradient};
use crate::quant::{LinearMap, PackedWeight};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// LoRA on one linear weight: A (r, in) and B (out, r).
#[derive(Debug)]
pub(super) struct LoraLinear {
    factors: Factors,
    fan_in_fan_out: bool,
}

impl LoraLinear {
    pub(super) fn new(factors: Factors, fan_in_fan_out: bool) -> Self {
        LoraLinear { factors, fan_in_fan_out }
    }
}

impl Adapter for LoraLinear {
    fn active(&self) -> bool {
        self.factors.active()
    }

    fn addition(&self, _: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        self.dropped_product(operator)
    }

    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        let Operator::Linear { x, bias, transposed } = *operator else { return frozen(weight, operator) };
        self.takes_part(operator)?;
        let (a, b, bias_of_b) = (self.factors.a(), self.factors.b(), self.factors.bias());
        let (scaling, dropout) = (self.factors.scaling(), self.factors.live_dropout());
        let low_rank = LowRank { a, b, bias: bias_of_b, scaling, dropout };
        adapted(LinearMap::new(weight, transposed), x, bias, &low_rank)
    }

    /// s · B · A, or its transpose where the weight is (in, out).
    fn delta(&self, _: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        let (a, b) = (self.factors.a(), self.factors.b());
        let product = if self.fan_in_fan_out { a.f_tr()?.f_mm(&b.f_tr()?)? } else { b.f_mm(&a)? };
        Ok(product.f_mul_scalar(self.factors.scaling())?.f_to_kind(kind)?)
    }
}

impl Factored for LoraLinear {
    fn factors(&self) -> &Factors {
        &self.factors
    }

    fn transposed(&self) -> bool {
        self.fan_in_fan_out
    }

    fn output_channels(&self) -> OutputChannels {
        OutputChannels::Last
    }

    fn takes_part(&self, operator: &Operator) -> Result<bool> {
        let Operator::Linear { transposed, .. } = *operator else { return Ok(false) };
        if transposed == self.fan_in_fan_out {
            return Ok(true);
        }
        let (used, found) = if transposed { ("x · W", false) } else { ("x · Wᵀ", true) };
        Err(Error::config("fan_in_fan_out", format!("{transposed} for a weight that the model uses as {used}"), found))
    }

    fn product(&self, operator: &Operator) -> Result<Tensor> {
        let Operator::Linear { x, .. } = *operator else { return Err(foreign("a linear layer")) };
        let kind = x.f_kind()?;
        let (a, b) = (self.factors.a().f_to_kind(kind)?, self.factors.b().f_to_kind(kind)?);
        let bias = self.factors.bias().map(|bias| bias.f_to_kind(kind)).transpose()?;
        let u = x.f_linear(&a, None::<&Tensor>)?;
        Ok(u.f_linear(&b, bias.as_ref())?.f_mul_scalar(self.factors.scaling())?)
    }
}

/// What an adapter adds to a linear layer.
pub(super) struct LowRank {
    /// (r, in)
    pub(super) a: Tensor,
    /// (out, r)
    pub(super) b: Tensor,
    /// (out)
    pub(super) bias: Option<Tensor>,
    /// The factor s.
    pub(super) scaling: f64,
    /// The probability of dropping an input, 0 where dropout is off.
    pub(super) dropout: f64,
}

/// The base's product and the adapter's, as one node.
pub(super) fn adapted(map: LinearMap, x: &Tensor, bias: Option<&Tensor>, low_rank: &LowRank) -> Result<Tensor> {
    let LowRank { a, b, bias: b_bias, scaling, dropout: p } = low_rank;
    let (scaling, p) = (*scaling, *p);
    let rows = Rows::new(map.inn(), x)?;
    let products = if p == 0.0 { Products::of(&rows.matrix, a, b)? } else { Products::Libtorch };
    let kind = products.kind(&map, &rows.matrix)?;
    let (y, u, mask) = {
        let _no_grad = tch::no_grad_guard();
        let x = &rows.matrix.f_to_kind(kind)?;
        // One sum, so that y is rounded once less.
        let b_bias = b_bias.as_ref().map(|b_bias| b_bias.f_mul_scalar(scaling)).transpose()?;
        let both = bias.zip(b_bias.as_ref()).map(|(bias, b_bias)| bias.f_add(b_bias)).transpose()?;
        let mut y = map.apply(x, both.as_ref().or(b_bias.as_ref()).or(bias))?;
        let mask = if p == 0.0 { None } else { Some(draw_mask(x, p)?) };
        let dropped = mask.as_ref().map_or(Ok(x.shallow_clone()), |mask| keep(x, mask))?;
        let u = products.down(&dropped, a)?;
        products.add_up(&mut y, &u, b, scaling / (1.0 - p))?;
        (rows.reshape(&y.f_to_kind(rows.matrix.f_kind()?)?)?, u, mask)
    };
    let biases: Vec<&Tensor> = bias.into_iter().chain(b_bias).collect();
    let inputs: Vec<&Tensor> = [x, a, b].into_iter().chain(biases.iter().copied()).collect();
    if autograd::needs_grad(&inputs) {
        let node = LoraNode {
            map,
            products,
            x: Like::new(x)?,
            kind: a.f_kind()?,
            scaling: scaling / (1.0 - p),
            bias: bias.map(|b| b.f_kind()).transpose()?.map(|kind| (kind, 1.0)),
            b_bias: b_bias.as_ref().map(|b| b.f_kind()).transpose()?.map(|kind| (kind, scaling)),
        };
        let saved: Vec<&Tensor> = [&rows.matrix, &u, a, b].into_iter().chain(&mask).collect();
        autograd::record(&inputs, &saved, &y, Box::new(node))?;
    }
    Ok(y)
}

struct LoraNode {
    map: LinearMap,
    products: Products,
    x: Like,
    /// The dtype of A and B.
    kind: Kind,
    /// s, over the share of inputs that dropout keeps.
    scaling: f64,
    /// The dtype and the factor of each bias, the layer's and B's.
    bias: Option<(Kind, f64)>,
    b_bias: Option<(Kind, f64)>,
}

impl Backward for LoraNode {
    /// With w = dY·B:
    /// dB = s · dYᵀ·u, dA = s · wᵀ·drop(x), dX = dY·W + s · drop'(w·A).
    fn backward(&self, grad: &Tensor, saved: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let [x, u, a, b, mask @ ..] = saved else { return Ok(Vec::new()) };
        let mask = mask.first();
        let needs = |i: usize| needed.get(i) == Some(&true);
        let kind = self.products.kind(&self.map, x)?;
        let x = &x.f_to_kind(kind)?;
        let grad = as_matrix(grad, self.map.out())?.f_to_kind(kind)?;

        let (products, s) = (self.products, self.scaling);
        let mut grads = vec![None, None, None];
        if needs(0) || needs(1) {
            let w = products.up_transposed(&grad, b)?;
            if needs(0) {
                let mut dx = self.map.adjoint(&grad)?;
                match mask {
                    None => products.add_down_transposed(&mut dx, &w, a, s)?,
                    Some(mask) => add_kept(&mut dx, &products.scaled(&w.f_tr()?, &a.f_to_kind(kind)?, s)?, mask)?,
                }
                grads[0] = Some(self.x.shaped(&dx)?);
            }
            if needs(1) {
                let kept = mask.map_or(Ok(x.shallow_clone()), |mask| keep(x, mask))?;
                grads[1] = Some(products.scaled(&w, &kept, s)?.f_to_kind(self.kind)?);
            }
        }
        if needs(2) {
            grads[2] = Some(products.scaled(&grad, u, s)?.f_to_kind(self.kind)?);
        }
        for (kind, factor) in self.bias.iter().chain(&self.b_bias) {
            let wanted = needs(grads.len());
            let sum = |grad: &Tensor| -> Result<Tensor> { Ok(bias_gradient(grad, *kind)?.f_mul_scalar_(*factor)?) };
            grads.push(wanted.then(|| sum(&grad)).transpose()?);
        }
        Ok(grads)
    }
}
