//! Products with a packed weight, and the autograd node of a frozen linear.
//!
//! The backward pass of a frozen linear, dX = dY · W, needs the weight only.
//! The node keeps it packed and unpacks it again, tile by tile; plain autograd
//! would keep every dequantised weight alive until the backward pass.

use super::act_order::gathered;
use super::op::{self, Op};
use super::tilewise::{Cut, for_each_tile, narrow};
use super::{LinearMap, PackedWeight, cpu, gemm};
use crate::error::{Error, Result};
use crate::ffi::autograd::{self, Backward};
use crate::ffi::runtime::{autocast_kind, rounds_f32_products};
use crate::ffi::simd::multiplies_bf16_faster;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// A dense weight as the matrix that products see, if it is of their dtype:
/// another one is cast tile by tile.
fn dense_matrix(weight: &dyn PackedWeight, kind: Kind) -> Result<Option<Tensor>> {
    match weight.as_dense() {
        _ if weight.kind() != kind => Ok(None),
        Some(dense) if dense.dim() != 2 => Ok(Some(dense.f_view(weight.shape())?)),
        dense => Ok(dense),
    }
}

/// Rows up to which the kernels' own products are the faster ones: beyond, a
/// tile is unpacked once for all rows. libtorch's x·Wᵀ of 16-bit numbers wins
/// earlier, with twice the arithmetic in an instruction or more, unless the kernels
/// have that too; its g·W of so few rows doesn't.
const FEW: i64 = 16;
const FEW_OF_16_BITS: i64 = 8;
/// The same of f32 on AMD's processors with AVX-512, where products of fewer rows than oneDNN takes are MKL's,
/// which uses half of the registers' width.
const FEW_ON_AMD: i64 = gemm::ONEDNN_ROWS;
/// The same of bf16 there.
const FEW_OF_BF16_ON_AMD: i64 = 32;

/// Rows up to which the kernels multiply: g · W if `transposed`, else x · Wᵀ.
fn few(weight: &dyn PackedWeight, kind: Kind, device: Device, transposed: bool) -> i64 {
    match device {
        Device::Cpu if cpu::multiplies_many(weight, kind) => i64::MAX,
        // In bf16 with sums in f32, which none of libtorch's products has.
        Device::Cpu if kind == Kind::Float && multiplies_bf16_faster() && rounds_f32_products() => i64::MAX,
        Device::Cpu if kind == Kind::Float && multiplies_bf16_faster() => FEW_ON_AMD,
        Device::Cpu if kind == Kind::BFloat16 && multiplies_bf16_faster() => FEW_OF_BF16_ON_AMD,
        Device::Cpu if transposed => FEW,
        Device::Cpu if kind != Kind::Float && kind == gemm::product_kind(kind, device) => FEW_OF_16_BITS,
        // A card's kernels are bound by its memory up to the same number in any dtype.
        _ => FEW,
    }
}

/// x · Wᵀ (+ bias): x (n, in), result (n, out), in the dtype of x.
///
/// Sums are in f32, or f64 for such x.
pub(crate) fn product(weight: &dyn PackedWeight, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if let Some(lying) = weight.reordered() {
        return product(lying.weight, &gathered(x, &lying.columns)?, bias);
    }
    let (kind, [out, inn]) = (x.f_kind()?, weight.shape());
    let bias = bias.map(|b| b.f_to_kind(kind)).transpose()?;
    let (n, wide) = (x.size2()?.0, gemm::product_kind(kind, x.device()));
    if let Some(dense) = dense_matrix(weight, kind)?
        && n <= gemm::few_to_cast(kind, x.device(), true)
    {
        return gemm::linear(x, &dense, bias.as_ref());
    }
    let add = |mut y: Tensor| match &bias {
        Some(bias) => Ok(y.f_add_(bias)?),
        None => Ok(y),
    };
    let mut y = Tensor::f_empty([n, out], (kind, x.device()))?;
    if n <= few(weight, kind, x.device(), false) && op::run(weight, Op::Product { x: &x.f_contiguous()?, y: &mut y })? {
        return add(y);
    }
    if wide != kind {
        return Ok(product(weight, &x.f_to_kind(wide)?, bias.as_ref())?.f_to_kind(kind)?);
    }
    let unpack = |rows: &Range<i64>, tile: &mut Tensor| {
        if !op::run(weight, Op::Unpack { row: rows.start, columns: 0..inn, out: tile })? {
            weight.unpack_rows(rows.start, tile)?;
        }
        Ok(true)
    };
    for_each_tile(Cut::Rows, (kind, x.device()), [out, inn], unpack, |rows, tile| {
        gemm::multiply_into(x, &tile.f_tr()?, &mut narrow(&y, 1, rows)?)
    })?;
    add(y)
}

/// g · W: g (n, out), result (n, in), in the dtype of g.
///
/// Sums are in f32, or f64 for such g.
pub(crate) fn product_transposed(weight: &dyn PackedWeight, g: &Tensor) -> Result<Tensor> {
    if let Some(lying) = weight.reordered() {
        return gathered(&product_transposed(lying.weight, g)?, &lying.places);
    }
    let (kind, [out, inn]) = (g.f_kind()?, weight.shape());
    let wide = gemm::product_kind(kind, g.device());
    let n = g.size2()?.0;
    if let Some(dense) = dense_matrix(weight, kind)?
        && n <= gemm::few_to_cast(kind, g.device(), false)
    {
        return gemm::multiply(g, &dense);
    }
    let mut dx = Tensor::f_empty([n, inn], (kind, g.device()))?;
    if n <= few(weight, kind, g.device(), true)
        && op::run(weight, Op::ProductTransposed { g: &g.f_contiguous()?, dx: &mut dx })?
    {
        return Ok(dx);
    }
    if wide != kind {
        return Ok(product_transposed(weight, &g.f_to_kind(wide)?)?.f_to_kind(kind)?);
    }
    // A range of columns is summed up in one product. Where only rows can be
    // unpacked, the sums of all tiles are added up in f32.
    let unpack = |columns: &Range<i64>, tile: &mut Tensor| {
        op::run(weight, Op::Unpack { row: 0, columns: columns.clone(), out: tile })
    };
    if for_each_tile(Cut::Columns, (kind, g.device()), [out, inn], unpack, |columns, tile| {
        gemm::multiply_into(g, tile, &mut narrow(&dx, 1, columns)?)
    })? {
        return Ok(dx);
    }
    let sum_kind = if kind == Kind::Double { kind } else { Kind::Float };
    let mut sum = Tensor::f_zeros([n, inn], (sum_kind, g.device()))?;
    let unpack = |rows: &Range<i64>, tile: &mut Tensor| {
        weight.unpack_rows(rows.start, tile)?;
        Ok(true)
    };
    for_each_tile(Cut::Rows, (kind, g.device()), [out, inn], unpack, |rows, tile| {
        let g = narrow(g, 1, rows)?;
        let _ = if kind == sum_kind { sum.f_addmm_(&g, tile)? } else { sum.f_add_(&g.f_mm(tile)?)? };
        Ok(())
    })?;
    Ok(sum.f_to_kind(kind)?)
}

/// The input of a linear as a matrix, and how to give results its shape.
pub(crate) struct Rows {
    /// (n, in), in the dtype to compute in: autocast's where that is on.
    pub(crate) matrix: Tensor,
    shape: Vec<i64>,
}

impl Rows {
    /// Checks that x has `inn` features.
    pub(crate) fn new(inn: i64, x: &Tensor) -> Result<Self> {
        Rows::in_kind(inn, x, autocast_kind(x.device()).unwrap_or(x.f_kind()?))
    }

    /// The same, to compute in this dtype.
    pub(crate) fn in_kind(inn: i64, x: &Tensor, kind: Kind) -> Result<Self> {
        let shape = x.size();
        if shape.last() != Some(&inn) {
            return Err(Error::Mismatch {
                name: "input of an adapted linear".into(),
                expected: format!("(…, {inn})"),
                found: format!("{shape:?}"),
            });
        }
        let _no_grad = tch::no_grad_guard();
        Ok(Rows { matrix: as_matrix(x, inn)?.f_to_kind(kind)?, shape })
    }

    /// A result (n, features) as (…, features).
    pub(crate) fn reshape(&self, y: &Tensor) -> Result<Tensor> {
        if self.shape.len() == 2 {
            return Ok(y.shallow_clone());
        }
        let mut shape = self.shape.clone();
        if let (Some(last), Some(features)) = (shape.last_mut(), y.size().last()) {
            *last = *features;
        }
        Ok(y.f_view(shape.as_slice())?)
    }
}

/// A tensor (…, features) as (n, features).
pub(crate) fn as_matrix(x: &Tensor, features: i64) -> Result<Tensor> {
    // Even a view that changes nothing costs as much as a small product.
    if x.dim() == 2 { Ok(x.shallow_clone()) } else { Ok(x.f_reshape([-1, features])?) }
}

/// `linear` with a frozen weight: gradients reach x and the bias.
pub(crate) fn frozen_linear(map: &LinearMap, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let rows = Rows::new(map.inn(), x)?;
    let y = {
        let _no_grad = tch::no_grad_guard();
        rows.reshape(&map.apply(&rows.matrix, bias)?)?
    };
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(bias).collect();
    if autograd::needs_grad(&inputs) {
        let bias_kind = bias.map(|b| b.f_kind()).transpose()?;
        let node = FrozenLinear { map: map.clone(), x: Like::new(x)?, bias_kind };
        autograd::record(&inputs, &[], &y, Box::new(node))?;
    }
    Ok(y)
}

/// The shape and dtype that a gradient must have.
#[derive(Debug)]
pub(crate) struct Like {
    shape: Vec<i64>,
    kind: Kind,
}

impl Like {
    pub(crate) fn new(tensor: &Tensor) -> Result<Self> {
        Ok(Like { shape: tensor.size(), kind: tensor.f_kind()? })
    }

    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// The gradient in that shape and dtype.
    pub(crate) fn shaped(&self, grad: &Tensor) -> Result<Tensor> {
        let grad = grad.f_to_kind(self.kind)?;
        if grad.dim() == self.shape.len() { Ok(grad) } else { Ok(grad.f_view(self.shape.as_slice())?) }
    }
}

/// The gradient of a bias: the sum over rows.
pub(crate) fn bias_gradient(grad: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(grad.f_sum_dim_intlist([0i64].as_slice(), false, kind)?)
}

struct FrozenLinear {
    map: LinearMap,
    x: Like,
    bias_kind: Option<Kind>,
}

impl Backward for FrozenLinear {
    fn backward(&self, grad: &Tensor, _: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let grad = as_matrix(grad, self.map.out())?;
        let mut grads = Vec::with_capacity(needed.len());
        let dx = if needed.first() == Some(&true) { Some(self.x.shaped(&self.map.adjoint(&grad)?)?) } else { None };
        grads.push(dx);
        if let Some(kind) = self.bias_kind {
            let wanted = needed.get(1) == Some(&true);
            grads.push(wanted.then(|| bias_gradient(&grad, kind)).transpose()?);
        }
        Ok(grads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Dense;
    use crate::quant::cpu::tests::{Values, packed, weight};
    use std::sync::Arc;

    // Around all numbers of rows from which another way is taken, on any processor.
    #[test]
    fn every_number_of_rows_multiplies() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let shape = [66, 512];
            let dense: Arc<dyn PackedWeight> = Arc::new(Dense::new(weight(shape, kind)).unwrap());
            for weight in packed(shape, kind).into_iter().chain([dense]) {
                let values = Values::new(weight.as_ref());
                for n in [1, 2, 3, 8, 9, 16, 17, 32, 33, 64] {
                    let what = format!("{:?} of {kind:?}, {n} rows", weight.scheme());
                    let random = |columns| Tensor::randn([n, columns], (Kind::Float, Device::Cpu)).to_kind(kind);
                    let (x, g) = (random(shape[1]), random(shape[0]));
                    values.multiplied(&product(weight.as_ref(), &x, None).unwrap(), &x, false, &what);
                    values.multiplied(&product_transposed(weight.as_ref(), &g).unwrap(), &g, true, &what);
                }
            }
        }
    }
}
