//! What all kinds of adapters have in common, and how one is made.

use super::InitLoraWeights;
use super::conv::LoraConv;
use super::embedding::LoraEmbedding;
use super::factors::Factors;
use super::linear::LoraLinear;
use crate::base::Adapter;
use crate::error::{Error, Result};
use crate::quant::PackedWeight;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
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

/// An adapter on one weight, as a model sees it.
pub(crate) trait LoraLayer: Adapter {
    /// Its tensors with the ends of PEFT's keys, such as `lora_A.weight`.
    fn tensors(&self) -> Vec<(&'static str, Tensor)>;

    /// The factor s of ΔW.
    fn scaling(&self) -> f64;

    /// Changes the factor s, from the next forward pass on.
    fn set_scaling(&self, scaling: f64);

    /// What it adds to the layer's bias: s · b (out), if `lora_B` has a bias.
    fn bias_delta(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// The layer that a weight belongs to, hence the shapes of its adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerForm {
    /// A weight (out, in), or (in, out) where `fan_in_fan_out`.
    Linear { fan_in_fan_out: bool },
    /// A table (rows, dim).
    Embedding,
    /// A weight (out, in / groups, kernel…).
    Conv { groups: i64 },
}

/// What the adapter of one layer is made from, all patterns resolved.
#[derive(Debug, Clone)]
pub(crate) struct LayerSpec {
    pub(crate) form: LayerForm,
    pub(crate) r: i64,
    /// The factor s of ΔW.
    pub(crate) scaling: f64,
    pub(crate) dropout: f64,
    /// Whether `lora_B` has a bias.
    pub(crate) lora_bias: bool,
    pub(crate) init: InitLoraWeights,
    /// The adapter's dtype; by default f32, as PEFT's is, also on a weight of
    /// bf16 or f16.
    pub(crate) kind: Option<Kind>,
}

impl LayerSpec {
    /// A new, trainable adapter beside the weight.
    ///
    /// # Errors
    /// [`Error::Config`] for a combination that makes no sense.
    pub(crate) fn build(&self, weight: &Arc<dyn PackedWeight>, switches: &Arc<Switches>) -> Result<Arc<dyn LoraLayer>> {
        let factors = Factors::new(self, weight.as_ref(), Arc::clone(switches))?;
        Ok(match self.form {
            LayerForm::Linear { fan_in_fan_out } => Arc::new(LoraLinear::new(factors, fan_in_fan_out)),
            LayerForm::Embedding => Arc::new(LoraEmbedding::new(factors)),
            LayerForm::Conv { groups } => Arc::new(LoraConv::new(factors, groups)),
        })
    }

    /// The sizes of A and B on a weight of these sizes.
    pub(super) fn factor_sizes(&self, weight: &[i64]) -> Result<(Vec<i64>, Vec<i64>)> {
        let r = self.r;
        match (self.form, weight) {
            (LayerForm::Linear { fan_in_fan_out: false }, [out, inn]) => Ok((vec![r, *inn], vec![*out, r])),
            (LayerForm::Linear { fan_in_fan_out: true }, [inn, out]) => Ok((vec![r, *inn], vec![*out, r])),
            (LayerForm::Embedding, [rows, dim]) => Ok((vec![r, *rows], vec![*dim, r])),
            (LayerForm::Conv { groups }, [out, inn, kernel @ ..]) => {
                if r % groups != 0 {
                    return Err(Error::config("r", format!("a multiple of the convolution's {groups} groups"), r));
                }
                let mut a = vec![r, inn * groups];
                a.extend(kernel);
                let mut b = vec![*out, r / groups];
                b.extend(kernel.iter().map(|_| 1));
                Ok((a, b))
            }
            (form, sizes) => Err(Error::Mismatch {
                name: "weight to adapt".into(),
                expected: format!("one that fits {form:?}"),
                found: format!("{sizes:?}"),
            }),
        }
    }
}
