//! A frozen weight as a linear map of rows, in either direction.

use super::PackedWeight;
use super::linear::{product, product_transposed};
use crate::error::Result;
use std::sync::Arc;
use tch::Tensor;

/// x · Wᵀ, or x · W for a weight that is used as (in, out).
#[derive(Debug, Clone)]
pub(crate) struct LinearMap {
    weight: Arc<dyn PackedWeight>,
    transposed: bool,
}

impl LinearMap {
    pub(crate) fn new(weight: &Arc<dyn PackedWeight>, transposed: bool) -> Self {
        LinearMap { weight: Arc::clone(weight), transposed }
    }

    /// Features of x.
    pub(crate) fn inn(&self) -> i64 {
        self.weight.shape()[usize::from(!self.transposed)]
    }

    /// Features of the result.
    pub(crate) fn out(&self) -> i64 {
        self.weight.shape()[usize::from(self.transposed)]
    }

    /// x (n, in) to (n, out), plus the bias (out), in the dtype of x.
    pub(crate) fn apply(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if !self.transposed {
            return product(self.weight.as_ref(), x, bias);
        }
        let mut y = product_transposed(self.weight.as_ref(), x)?;
        if let Some(bias) = bias {
            let _ = y.f_add_(&bias.f_to_kind(y.f_kind()?)?)?;
        }
        Ok(y)
    }

    /// The adjoint: g (n, out) to (n, in), in the dtype of g.
    pub(crate) fn adjoint(&self, g: &Tensor) -> Result<Tensor> {
        if self.transposed {
            product(self.weight.as_ref(), g, None)
        } else {
            product_transposed(self.weight.as_ref(), g)
        }
    }
}
