//! What is asked of the kernels, and which device's kernels answer.

use super::{PackedWeight, cpu, cuda};
use crate::error::Result;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Tensors are contiguous and on the weight's device.
pub(super) enum Op<'a> {
    /// Writes the values of `columns` from row `row` on into `out` (rows, columns).
    Unpack { row: i64, columns: Range<i64>, out: &'a mut Tensor },
    /// Writes the values of the rows that `index`, i64 (n), lists into `out`
    /// (n, columns). On the CPU the weight must have all of them; on CUDA, where
    /// nobody waits for the device to tell, NaN is written for others.
    UnpackIndex { index: &'a Tensor, out: &'a mut Tensor },
    /// y = x · Wᵀ: x (n, in), y (n, out) of the same dtype.
    Product { x: &'a Tensor, y: &'a mut Tensor },
    /// dX = g · W: g (n, out), dx (n, in) of the same dtype.
    ProductTransposed { g: &'a Tensor, dx: &'a mut Tensor },
}

impl Op<'_> {
    /// The dtype of tiles or activations.
    pub(super) fn kind(&self) -> Result<Kind> {
        Ok(match self {
            Op::Unpack { out, .. } | Op::UnpackIndex { out, .. } => out.f_kind()?,
            Op::Product { x, .. } => x.f_kind()?,
            Op::ProductTransposed { g, .. } => g.f_kind()?,
        })
    }
}

/// Does what is asked, and answers whether a kernel could.
pub(super) fn run(weight: &dyn PackedWeight, op: Op) -> Result<bool> {
    if !matches!(op.kind()?, Kind::Float | Kind::BFloat16 | Kind::Half) {
        return Ok(false);
    }
    match weight.device() {
        Device::Cpu => cpu::run(weight, op),
        Device::Cuda(_) => cuda::run(weight, op),
        _ => Ok(false),
    }
}
