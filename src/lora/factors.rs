//! The two factors of ΔW = s · B · A and what goes with them.

use super::init::Start;
use super::layer::{LayerSpec, Switches};
use crate::error::Result;
use crate::ffi::hook::Operator;
use crate::ffi::shared::SharedTensor;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tch::Tensor;

/// A and B, trainable, in whatever shapes the layer has them.
#[derive(Debug)]
pub(super) struct Factors {
    a: SharedTensor,
    b: SharedTensor,
    bias: Option<SharedTensor>,
    /// The bits of an f64.
    scaling: AtomicU64,
    dropout: f64,
    switches: Arc<Switches>,
}

impl Factors {
    pub(super) fn new(start: Start, spec: &LayerSpec, switches: Arc<Switches>) -> Result<Self> {
        let trainable =
            |tensor: Tensor| -> Result<SharedTensor> { Ok(SharedTensor::new(tensor.f_set_requires_grad(true)?)) };
        Ok(Factors {
            a: trainable(start.a)?,
            b: trainable(start.b)?,
            bias: start.bias.map(trainable).transpose()?,
            scaling: AtomicU64::new(spec.scaling.to_bits()),
            dropout: spec.dropout,
            switches,
        })
    }

    pub(super) fn a(&self) -> Tensor {
        self.a.get()
    }

    pub(super) fn b(&self) -> Tensor {
        self.b.get()
    }

    /// The bias of `lora_B` (out).
    pub(super) fn bias(&self) -> Option<Tensor> {
        self.bias.as_ref().map(SharedTensor::get)
    }

    pub(super) fn bias_delta(&self) -> Result<Option<Tensor>> {
        Ok(self.bias().map(|bias| bias.f_mul_scalar(self.scaling())).transpose()?)
    }

    pub(super) fn scaling(&self) -> f64 {
        f64::from_bits(self.scaling.load(Ordering::Relaxed))
    }

    pub(super) fn set_scaling(&self, scaling: f64) {
        self.scaling.store(scaling.to_bits(), Ordering::Relaxed);
    }

    pub(super) fn active(&self) -> bool {
        self.switches.enabled.load(Ordering::Relaxed)
    }

    /// The probability of dropping an input, 0 where dropout is off.
    pub(super) fn live_dropout(&self) -> f64 {
        if self.switches.training.load(Ordering::Relaxed) { self.dropout } else { 0.0 }
    }

    /// Whether dropout is live and has a part in the operator: indices can't
    /// be dropped.
    pub(super) fn drops(&self, operator: &Operator) -> bool {
        self.live_dropout() > 0.0 && !matches!(operator, Operator::Embedding { .. })
    }

    /// x with elements dropped, where that is live: drawn as PEFT draws them.
    pub(super) fn dropped(&self, operator: &Operator) -> Result<Option<Tensor>> {
        let drop = || operator.input().f_dropout(self.live_dropout(), true);
        Ok(self.drops(operator).then(drop).transpose()?)
    }

    /// The tensors with PEFT's key ends, the factors in the layer's own names.
    pub(super) fn tensors(&self, a: &'static str, b: &'static str) -> Vec<(&'static str, Tensor)> {
        let mut tensors = vec![(a, self.a()), (b, self.b())];
        tensors.extend(self.bias().map(|bias| ("lora_B.bias", bias)));
        tensors
    }
}
