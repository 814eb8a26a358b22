//! What a formula of ΔW is, and what one starts from.

use crate::error::Result;
use std::fmt::Debug;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// How ΔW comes from an adapter's tensors.
pub(super) trait Formula: Debug + Send + Sync {
    /// s · ΔW in the weight's sizes and the tensors' dtype, by autograd's own
    /// operators.
    fn weight(&self, tensors: &[Tensor], s: f64) -> Result<Tensor>;

    /// Whether [`Formula::product`] of a linear weight does without ΔW.
    fn does_without_weight(&self) -> bool {
        false
    }

    /// s · x · ΔWᵀ of a linear weight: x (n, in), in the dtype of x.
    fn product(&self, x: &Tensor, tensors: &[Tensor], s: f64) -> Result<Tensor> {
        Ok(x.f_linear(&self.weight(tensors, s)?.f_to_kind(x.f_kind()?)?, None::<&Tensor>)?)
    }
}

/// LoHa or LoKr, as a configuration says.
pub(crate) trait Method {
    /// The formula, and the tensors that it starts from, drawn in PEFT's order.
    fn start(&self, place: &Place) -> Result<Start>;

    /// Whether rows that rank dropout keeps are scaled up.
    fn rescale(&self) -> bool;
}

/// A formula and its tensors by PEFT's names.
#[derive(Debug)]
pub(crate) struct Start {
    pub(super) formula: Arc<dyn Formula>,
    pub(super) tensors: Vec<(&'static str, Tensor)>,
}

/// The weight that an adapter is made for.
#[derive(Debug, Clone)]
pub(crate) struct Place<'a> {
    /// (out, in) of a linear layer, (out, in / groups, kernel…) of a
    /// convolution over one or two dimensions.
    pub(super) sizes: &'a [i64],
    pub(super) r: i64,
    /// The sizes of LoKr's left factor, if they are given.
    pub(super) w1: Option<[i64; 2]>,
    /// Whether the kernel is decomposed too.
    pub(super) effective: bool,
    pub(super) options: (Kind, Device),
}

impl Place<'_> {
    pub(super) fn kernel(&self) -> &[i64] {
        self.sizes.get(2..).unwrap_or_default()
    }

    /// A tensor at zero, or drawn from the device's default generator.
    pub(super) fn start(&self, sizes: &[i64], zero: bool) -> Result<Tensor> {
        let mut tensor = Tensor::f_zeros(sizes, self.options)?;
        if !zero {
            crate::lora::init::kaiming(&mut tensor)?;
        }
        Ok(tensor)
    }

    /// The core of a decomposed kernel: PEFT gives it two dimensions always.
    pub(super) fn core(&self) -> [i64; 4] {
        let kernel = self.kernel();
        [self.r, self.r, kernel.first().copied().unwrap_or(1), kernel.get(1).copied().unwrap_or(1)]
    }
}

/// Σᵢⱼ t\[i, j, …\] · a\[i, p\] · b\[j, q\], (p, q, …): a Tucker decomposition of a
/// kernel (FedPara, arXiv:2108.06098, proposition 3).
pub(super) fn tucker(t: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_einsum("ijkl,ip,jq->pqkl", &[t, a, b], None::<i64>)?)
}
