//! What takes an adapter's place while data runs through the base.

use crate::base::Adapter;
use crate::error::Result;
use crate::ffi::autograd::{self, Backward};
use crate::ffi::hook::Operator;
use crate::ffi::shared::SharedTensor;
use crate::quant::PackedWeight;
use crate::quant::frozen::frozen;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Kind, Tensor};

/// Keeps the inputs of a linear weight, or sums up the weight's gradient.
#[derive(Debug)]
pub(crate) struct Observer {
    on: AtomicBool,
    gradient: bool,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Inputs (…, in) since they were last taken.
    inputs: Vec<Tensor>,
    /// Σ dYᵀ·X (out, in), over so many uses of the weight.
    gradient: Option<Tensor>,
    uses: i64,
}

impl Observer {
    /// Of inputs.
    pub(crate) fn of_inputs() -> Self {
        Observer { on: AtomicBool::new(true), gradient: false, seen: Arc::default() }
    }

    /// Of the weight's gradient, which frozen weights don't have otherwise.
    pub(crate) fn of_gradient() -> Self {
        Observer { gradient: true, ..Observer::of_inputs() }
    }

    /// Whether it looks at what comes.
    pub(crate) fn set_on(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    /// The inputs since the last time, each (…, in).
    pub(crate) fn take_inputs(&self) -> Vec<Tensor> {
        std::mem::take(&mut lock(&self.seen).inputs)
    }

    /// The mean gradient (out, in) over the uses of the weight, if any reached it.
    pub(crate) fn mean_gradient(&self) -> Result<Option<Tensor>> {
        let seen = lock(&self.seen);
        Ok(seen.gradient.as_ref().map(|sum| sum.f_div_scalar(seen.uses)).transpose()?)
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Adapter for Observer {
    fn active(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    fn addition(&self, _: &Arc<dyn PackedWeight>, _: &Operator) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        let y = frozen(weight, operator)?;
        let Operator::Linear { x, .. } = *operator else { return Ok(y) };
        if !self.gradient {
            lock(&self.seen).inputs.push(x.f_detach()?);
            return Ok(y);
        }
        // The weight is frozen: a leaf of its own makes the gradient come here.
        let anchor = Tensor::f_zeros([0], (Kind::Float, y.device()))?.f_set_requires_grad(true)?;
        if !autograd::needs_grad(&[&anchor]) {
            return Ok(y);
        }
        let mut same = y.f_detach()?.f_empty_like()?;
        tch::no_grad(|| same.f_copy_(&y))?;
        let probe = Probe { seen: Arc::clone(&self.seen), x: SharedTensor::new(x.f_detach()?) };
        autograd::record(&[&y, &anchor], &[], &same, Box::new(probe))?;
        Ok(same)
    }

    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_zeros(weight.sizes(), (kind, weight.device()))?)
    }
}

/// Passes a gradient on, and adds what the weight's would be.
struct Probe {
    seen: Arc<Mutex<Seen>>,
    x: SharedTensor,
}

impl Backward for Probe {
    fn backward(&self, grad: &Tensor, _: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let rows = |t: &Tensor| -> Result<Tensor> {
            let last = t.size().last().copied().unwrap_or(1);
            Ok(t.f_reshape([-1, last])?.f_to_kind(Kind::Float)?)
        };
        let part = rows(grad)?.f_tr()?.f_mm(&rows(&self.x.get())?)?;
        let mut seen = lock(&self.seen);
        seen.uses += 1;
        seen.gradient = Some(match seen.gradient.take() {
            Some(sum) => sum.f_add(&part)?,
            None => part,
        });
        Ok(vec![(needed.first() == Some(&true)).then(|| grad.shallow_clone()), None])
    }
}
