//! A frozen weight as a linear map of rows, in either direction.

use super::linear::{product, product_transposed};
use super::{PackedWeight, gemm, tiles};
use crate::error::Result;
use std::sync::Arc;
use tch::{Kind, Tensor};

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

    /// The dtype to multiply x (n, in) and the like of it in: its own, or f32 where that is faster.
    pub(crate) fn product_kind(&self, x: &Tensor) -> Result<Kind> {
        let (kind, device) = (x.f_kind()?, x.device());
        let dense = self.weight.kind() == kind && self.weight.as_dense().is_some();
        let stays = dense && x.size2()?.0 <= gemm::few_to_cast(kind, device, false);
        Ok(if stays { kind } else { gemm::product_kind(kind, device) })
    }

    /// ‖W‖² of what each output feature is made from, (out) in `kind`.
    pub(crate) fn row_norms_squared(&self, kind: Kind) -> Result<Tensor> {
        let (weight, [rows, columns]) = (self.weight.as_ref(), self.weight.shape());
        let norms = Tensor::f_zeros([self.out()], (kind, weight.device()))?;
        tiles::for_each(rows, columns, |start, n| {
            tiles::with_scratch(n, columns, kind, weight.device(), |tile| {
                weight.unpack_rows(start, tile)?;
                let sum = |dim: i64| tile.f_square()?.f_sum_dim_intlist([dim].as_slice(), false, None);
                if self.transposed {
                    let _ = norms.shallow_clone().f_add_(&sum(0)?)?;
                } else {
                    norms.f_narrow(0, start, n)?.f_copy_(&sum(1)?)?;
                }
                Ok(())
            })
        })?;
        Ok(norms)
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
