//! LoRA on a table of which rows are looked up.
//!
//! With A (r, rows) and B (dim, r): y = W\[i\] + s · A\[:, i\]ᵀ · Bᵀ. Dropout has no
//! part in it, as in PEFT.

use super::factors::Factors;
use super::layer::{Factored, OutputChannels, foreign};
use crate::base::Adapter;
use crate::error::Result;
use crate::ffi::hook::Operator;
use crate::quant::PackedWeight;
use std::sync::Arc;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct LoraEmbedding {
    factors: Factors,
}

impl LoraEmbedding {
    pub(super) fn new(factors: Factors) -> Self {
        LoraEmbedding { factors }
    }
}

impl Adapter for LoraEmbedding {
    fn active(&self) -> bool {
        self.factors.active()
    }

    fn addition(&self, _: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        self.dropped_product(operator)
    }

    /// s · (B · A)ᵀ, (rows, dim).
    fn delta(&self, _: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        let product = self.factors.a().f_tr()?.f_mm(&self.factors.b().f_tr()?)?;
        Ok(product.f_mul_scalar(self.factors.scaling())?.f_to_kind(kind)?)
    }
}

impl Factored for LoraEmbedding {
    fn factors(&self) -> &Factors {
        &self.factors
    }

    fn keys(&self) -> [&'static str; 2] {
        ["lora_embedding_A", "lora_embedding_B"]
    }

    fn transposed(&self) -> bool {
        true
    }

    fn output_channels(&self) -> OutputChannels {
        OutputChannels::Last
    }

    fn takes_part(&self, operator: &Operator) -> Result<bool> {
        Ok(matches!(operator, Operator::Embedding { .. }))
    }

    fn product(&self, operator: &Operator) -> Result<Tensor> {
        let Operator::Embedding { indices, form } = *operator else { return Err(foreign("an embedding")) };
        let table = self.factors.a().f_tr()?;
        let a = Tensor::f_embedding(&table, indices, form.padding_idx, form.scale_grad_by_freq, form.sparse)?;
        Ok(a.f_matmul(&self.factors.b().f_tr()?)?.f_mul_scalar(self.factors.scaling())?)
    }
}
