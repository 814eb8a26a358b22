//! An embedding's adapter on a table that is the output layer's weight too:
//! what `ensure_weight_tying` means.
//!
//! PEFT gives the output layer A' = Bᵀ and B' = Aᵀ of the embedding's A (r, rows)
//! and B (dim, r), in the same memory. Here it is the one adapter, which takes
//! part in both uses.

use super::layer::{LoraLayer, Switches};
use super::linear::{LowRank, adapted};
use crate::base::Adapter;
use crate::error::Result;
use crate::ffi::hook::Operator;
use crate::quant::{LinearMap, PackedWeight};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(crate) struct Tied {
    embedding: Arc<dyn LoraLayer>,
    dropout: f64,
    switches: Arc<Switches>,
}

impl Tied {
    pub(crate) fn new(embedding: Arc<dyn LoraLayer>, dropout: f64, switches: Arc<Switches>) -> Self {
        Tied { embedding, dropout, switches }
    }

    /// Of the output layer: looked up rows aren't dropped.
    fn live_dropout(&self) -> f64 {
        if self.switches.training.load(Ordering::Relaxed) { self.dropout } else { 0.0 }
    }

    /// A' and B'.
    pub(crate) fn output_factors(layer: &dyn LoraLayer) -> Result<Option<[Tensor; 2]>> {
        match layer.tensors().as_slice() {
            [(_, a), (_, b)] => Ok(Some([b.f_tr()?, a.f_tr()?])),
            _ => Ok(None),
        }
    }
}

impl Adapter for Tied {
    fn active(&self) -> bool {
        self.embedding.active()
    }

    fn addition(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        match (*operator, Tied::output_factors(self.embedding.as_ref())?) {
            (Operator::Linear { x, transposed: false, .. }, Some([a, b])) => {
                let kind = x.f_kind()?;
                let dropped = x.f_dropout(self.live_dropout(), self.live_dropout() > 0.0)?;
                let u = dropped.f_linear(&a.f_to_kind(kind)?, None::<&Tensor>)?;
                Ok(Some(u.f_linear(&b.f_to_kind(kind)?, None::<&Tensor>)?.f_mul_scalar(self.scaling())?))
            }
            _ => self.embedding.addition(weight, operator),
        }
    }

    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        match (*operator, Tied::output_factors(self.embedding.as_ref())?) {
            (Operator::Linear { x, bias, transposed: false }, Some([a, b])) => {
                let low_rank = LowRank { a, b, bias: None, scaling: self.scaling(), dropout: self.live_dropout() };
                adapted(LinearMap::new(weight, false), x, bias, &low_rank)
            }
            _ => self.embedding.apply(weight, operator),
        }
    }

    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        self.embedding.delta(weight, kind)
    }
}

impl LoraLayer for Tied {
    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        self.embedding.tensors()
    }

    fn scaling(&self) -> f64 {
        self.embedding.scaling()
    }

    fn set_scaling(&self, scaling: f64) {
        self.embedding.set_scaling(scaling);
    }
}
