//! LoRA on a convolution.
//!
//! A (r, in, kernel…) is a convolution that moves as the base's does (stride,
//! padding, dilation) over all input channels; B (out, r / groups, 1…) mixes
//! its r channels, in the base's groups.

use super::factors::Factors;
use super::layer::{Factored, OutputChannels, foreign, same_groups};
use crate::base::Adapter;
use crate::error::{Error, Result};
use crate::ffi::hook::{ConvolutionForm, Operator};
use crate::quant::PackedWeight;
use crate::quant::frozen::convolve;
use std::sync::Arc;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct LoraConv {
    factors: Factors,
    groups: i64,
}

impl LoraConv {
    pub(super) fn new(factors: Factors, groups: i64) -> Self {
        LoraConv { factors, groups }
    }
}

impl Adapter for LoraConv {
    fn active(&self) -> bool {
        self.factors.active()
    }

    fn addition(&self, _: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        self.dropped_product(operator)
    }

    /// s · B · A over the flattened kernel. With groups, A sees channels that
    /// the weight has no place for.
    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        if self.groups != 1 {
            let found = format!("{} groups", self.groups);
            return Err(Error::config("groups", "1: a grouped convolution's weight can't hold its ΔW", found));
        }
        let product = self.factors.b().f_flatten(1, -1)?.f_mm(&self.factors.a().f_flatten(1, -1)?)?;
        Ok(product.f_mul_scalar(self.factors.scaling())?.f_view(weight.sizes())?.f_to_kind(kind)?)
    }
}

impl Factored for LoraConv {
    fn factors(&self) -> &Factors {
        &self.factors
    }

    fn transposed(&self) -> bool {
        false
    }

    fn output_channels(&self) -> OutputChannels {
        OutputChannels::Second
    }

    fn takes_part(&self, operator: &Operator) -> Result<bool> {
        let Operator::Convolution { form, .. } = operator else { return Ok(false) };
        same_groups(self.groups, form.groups)
    }

    fn product(&self, operator: &Operator) -> Result<Tensor> {
        let Operator::Convolution { x, form, .. } = *operator else { return Err(foreign("a convolution")) };
        let (kind, factors) = (x.f_kind()?, &self.factors);
        let (a, b) = (factors.a().f_to_kind(kind)?, factors.b().f_to_kind(kind)?);
        let bias = factors.bias().map(|bias| bias.f_to_kind(kind)).transpose()?;
        let u = convolve(x, &a, None, &ConvolutionForm { groups: 1, ..form.clone() })?;
        let all = |n: i64| vec![n; form.stride.len()];
        let mix = ConvolutionForm { stride: all(1), padding: all(0), dilation: all(1), groups: self.groups };
        Ok(convolve(&u, &b, bias.as_ref(), &mix)?.f_mul_scalar(factors.scaling())?)
    }
}
