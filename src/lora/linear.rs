//! The adapted linear: y = x·Wᵀ + bias + s · drop(x)·Aᵀ·Bᵀ, as one node.
//!
//! Saved for the backward pass: x, u = drop(x)·Aᵀ, A, B and, with dropout, the
//! mask as one byte per element. W stays packed.

use super::{InitLoraWeights, LayerSettings, LoraConfig};
use crate::base::Adapter;
use crate::error::Result;
use crate::ffi::autograd::{self, Backward};
use crate::ffi::shared::SharedTensor;
use crate::quant::PackedWeight;
use crate::quant::linear::{Like, Rows, bias_gradient, gradient_rows, product, product_transposed};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::{Kind, Tensor};

/// What all layers of one model share.
#[derive(Debug)]
pub(crate) struct Switches {
    /// Whether dropout is live.
    pub(crate) training: AtomicBool,
    /// Whether adapters take part.
    pub(crate) enabled: AtomicBool,
}

impl Default for Switches {
    fn default() -> Self {
        Switches { training: AtomicBool::new(true), enabled: AtomicBool::new(true) }
    }
}

/// LoRA on one linear weight.
#[derive(Debug)]
pub(crate) struct LoraLinear {
    /// (r, in)
    a: SharedTensor,
    /// (out, r)
    b: SharedTensor,
    kind: Kind,
    scaling: f64,
    dropout: f64,
    switches: Arc<Switches>,
}

impl LoraLinear {
    /// New, trainable A and B beside the weight. They are f32, as PEFT's are,
    /// also on a weight of bf16 or f16.
    pub(crate) fn new(
        config: &LoraConfig,
        settings: LayerSettings,
        weight: &dyn PackedWeight,
        init: InitLoraWeights,
        switches: Arc<Switches>,
    ) -> Result<Self> {
        let kind = match weight.kind() {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        };
        let (a, b) = super::init::initial(init, weight.shape(), settings.r, (kind, weight.device()))?;
        for tensor in [&a, &b] {
            let _ = tensor.f_set_requires_grad(true)?;
        }
        let (scaling, dropout) = (settings.scaling, config.lora_dropout);
        Ok(LoraLinear { a: SharedTensor::new(a), b: SharedTensor::new(b), kind, scaling, dropout, switches })
    }

    /// A (r, in).
    pub(crate) fn a(&self) -> Tensor {
        self.a.get()
    }

    /// B (out, r).
    pub(crate) fn b(&self) -> Tensor {
        self.b.get()
    }

    /// drop(x) in the adapter's dtype, and the mask of what was kept.
    ///
    /// The mask is drawn as `torch.nn.functional.dropout` draws it on the CPU,
    /// so that a seeded step equals PEFT's.
    fn dropped(&self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let x = x.f_to_kind(self.kind)?;
        if self.dropout == 0.0 || !self.switches.training.load(Ordering::Relaxed) {
            return Ok((x, None));
        }
        let keep = x.f_empty_like()?.f_bernoulli_float_(1.0 - self.dropout)?;
        let mask = keep.f_to_kind(Kind::Bool)?;
        Ok((masked(&x, &mask, self.dropout)?, Some(mask)))
    }
}

/// x with dropped elements at zero and the others scaled by 1/(1 − p).
fn masked(x: &Tensor, mask: &Tensor, p: f64) -> Result<Tensor> {
    Ok(x.f_mul(mask)?.f_mul_scalar_(1.0 / (1.0 - p))?)
}

impl Adapter for LoraLinear {
    fn active(&self) -> bool {
        self.switches.enabled.load(Ordering::Relaxed)
    }

    fn linear(&self, frozen: &Arc<dyn PackedWeight>, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (a, b) = (self.a.get(), self.b.get());
        let rows = Rows::new(frozen.as_ref(), x)?;
        let (y, u, mask) = {
            let _no_grad = tch::no_grad_guard();
            let mut y = product(frozen.as_ref(), &rows.matrix, bias)?;
            let (dropped, mask) = self.dropped(&rows.matrix)?;
            let u = dropped.f_mm(&a.f_tr()?)?;
            add_product(&mut y, &u.f_mul_scalar(self.scaling)?, &b.f_tr()?)?;
            (rows.reshape(&y)?, u, mask)
        };
        let inputs: Vec<&Tensor> = [x, &a, &b].into_iter().chain(bias).collect();
        if autograd::needs_grad(&inputs) {
            let node = LoraNode {
                frozen: Arc::clone(frozen),
                x: Like::new(x)?,
                kind: self.kind,
                scaling: self.scaling,
                dropout: self.dropout,
                bias_kind: bias.map(|b| b.f_kind()).transpose()?,
            };
            let saved: Vec<&Tensor> = [&rows.matrix, &u, &a, &b].into_iter().chain(&mask).collect();
            autograd::record(&inputs, &saved, &y, Box::new(node))?;
        }
        Ok(y)
    }

    fn delta(&self, kind: Kind) -> Result<Tensor> {
        Ok(self.b.get().f_mm(&self.a.get())?.f_mul_scalar(self.scaling)?.f_to_kind(kind)?)
    }
}

/// y += l · r, in the wider of the dtypes, rounded once to that of y.
fn add_product(y: &mut Tensor, l: &Tensor, r: &Tensor) -> Result<()> {
    if l.f_kind()? == y.f_kind()? {
        let _ = y.f_addmm_(l, r)?;
    } else {
        let sum = l.f_mm(r)?.f_add(y)?;
        y.f_copy_(&sum)?;
    }
    Ok(())
}

struct LoraNode {
    frozen: Arc<dyn PackedWeight>,
    x: Like,
    kind: Kind,
    scaling: f64,
    dropout: f64,
    bias_kind: Option<Kind>,
}

impl Backward for LoraNode {
    /// With gu = s · dY·B:
    /// dB = s · dYᵀ·u, dA = guᵀ·drop(x), dX = dY·W + drop'(gu·A).
    fn backward(&self, grad: &Tensor, saved: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let [x, u, a, b, mask @ ..] = saved else { return Ok(Vec::new()) };
        let mask = mask.first();
        let needs = |i: usize| needed.get(i) == Some(&true);
        let grad = gradient_rows(grad, self.frozen.shape()[0])?;
        let g = grad.f_to_kind(self.kind)?.f_mul_scalar(self.scaling)?;
        let gu = if needs(0) || needs(1) { Some(g.f_mm(b)?) } else { None };

        let mut grads = vec![None, None, None];
        if let (true, Some(gu)) = (needs(0), &gu) {
            let mut dx = product_transposed(self.frozen.as_ref(), &grad.f_to_kind(x.f_kind()?)?)?;
            match mask {
                None => add_product(&mut dx, gu, a)?,
                Some(mask) => {
                    let through = masked(&gu.f_mm(a)?, mask, self.dropout)?;
                    let _ = dx.f_add_(&through.f_to_kind(dx.f_kind()?)?)?;
                }
            }
            grads[0] = Some(self.x.shaped(&dx)?);
        }
        if let (true, Some(gu)) = (needs(1), &gu) {
            let x = x.f_to_kind(self.kind)?;
            let x = mask.map_or(Ok(x.shallow_clone()), |mask| masked(&x, mask, self.dropout))?;
            grads[1] = Some(gu.f_tr()?.f_mm(&x)?);
        }
        if needs(2) {
            grads[2] = Some(g.f_tr()?.f_mm(u)?);
        }
        if let Some(kind) = self.bias_kind {
            grads.push(needs(3).then(|| bias_gradient(&grad, kind)).transpose()?);
        }
        Ok(grads)
    }
}
