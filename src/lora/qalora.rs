//! QALoRA (arXiv:2309.14717): LoRA on inputs pooled over groups of features.
//!
//! With g features in a group and L = in / g groups, A is (r, L) and x̃ (n, L)
//! holds L times the mean of each group:
//!
//! ```text
//! y = W·x + s · B·A·x̃
//! ```
//!
//! ΔW is the same for all features of a group, so that it can go into the
//! shifts of a weight that is quantised in such groups.

use super::factors::Factors;
use super::layer::{Factored, OutputChannels, foreign};
use crate::base::Adapter;
use crate::error::{Error, Result};
use crate::ffi::hook::Operator;
use crate::quant::{PackedWeight, Scheme};
use std::sync::Arc;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct QaLora {
    factors: Factors,
    group_size: i64,
}

/// Refuses weights that have no groups to be pooled by.
pub(super) fn check_scheme(scheme: Option<Scheme>) -> Result<()> {
    match scheme {
        Some(Scheme::Int4 { .. } | Scheme::Int2 { .. } | Scheme::Gptq { .. }) => Ok(()),
        other => {
            let found = other.map_or("true on a dense one".to_string(), |scheme| format!("true on one of {scheme}"));
            Err(Error::config("use_qalora", "false but on weights in groups: int4, int2, gptq", found))
        }
    }
}

impl QaLora {
    pub(super) fn new(factors: Factors, group_size: i64) -> Self {
        QaLora { factors, group_size }
    }

    /// What the mean of a group is multiplied by, over the size of the group.
    fn share(&self, inn: i64) -> f64 {
        (inn / self.group_size) as f64 / self.group_size as f64
    }
}

impl Adapter for QaLora {
    fn active(&self) -> bool {
        self.factors.active()
    }

    fn addition(&self, _: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        self.dropped_product(operator)
    }

    /// s · L/g · (B · A), each column for the g features of its group.
    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        let scaling = self.factors.scaling() * self.share(weight.shape()[1]);
        let groups = self.factors.b().f_mm(&self.factors.a())?.f_mul_scalar(scaling)?;
        Ok(groups.f_repeat_interleave_self_int(self.group_size, 1, None)?.f_to_kind(kind)?)
    }
}

impl Factored for QaLora {
    fn factors(&self) -> &Factors {
        &self.factors
    }

    fn transposed(&self) -> bool {
        false
    }

    fn output_channels(&self) -> OutputChannels {
        OutputChannels::Last
    }

    fn takes_part(&self, operator: &Operator) -> Result<bool> {
        match operator {
            Operator::Linear { transposed: false, .. } => Ok(true),
            Operator::Linear { transposed: true, .. } => {
                Err(Error::config("use_qalora", "layers that use their weight as x · Wᵀ", "one that uses it as x · W"))
            }
            _ => Ok(false),
        }
    }

    fn product(&self, operator: &Operator) -> Result<Tensor> {
        let Operator::Linear { x, .. } = *operator else { return Err(foreign("a linear layer")) };
        let kind = x.f_kind()?;
        let (a, b) = (self.factors.a().f_to_kind(kind)?, self.factors.b().f_to_kind(kind)?);
        let mut shape = x.size();
        let inn = shape.pop().unwrap_or(0);
        shape.extend([inn / self.group_size, self.group_size]);
        let pooled = x.f_reshape(shape.as_slice())?.f_sum_dim_intlist([-1i64].as_slice(), false, None)?;
        let v = pooled.f_linear(&a, None::<&Tensor>)?.f_mul_scalar(self.factors.scaling() * self.share(inn))?;
        Ok(v.f_linear(&b, None::<&Tensor>)?)
    }
}
