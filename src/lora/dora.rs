//! DoRA (arXiv:2402.09353): W' = (m / n) · (W + ΔW), where n is the norm of
//! each output row of W + ΔW, and m is trained.
//!
//! n is taken without the product B · A, of which only r×r and out×r parts are
//! needed. With Δ = s · B · A, row by row:
//!
//! ```text
//! n² = ‖W‖² + 2s · ⟨W·Aᵀ, B⟩ + s² · ⟨B·(A·Aᵀ), B⟩
//! ```
//!
//! ‖W‖² is taken once per weight, as it is frozen. As in the paper (section 4.3)
//! no gradient flows through n.

use super::layer::{Factored, LoraLayer, OutputChannels};
use crate::base::Adapter;
use crate::error::Result;
use crate::ffi::autograd::{self, Backward};
use crate::ffi::bytes::{read, write};
use crate::ffi::compute::{add_product, for_each_chunk};
use crate::ffi::hook::Operator;
use crate::ffi::shared::SharedTensor;
use crate::ffi::simd::{Kernel, Simd, dispatch};
use crate::quant::frozen::frozen;
use crate::quant::linear::Like;
use crate::quant::{LinearMap, PackedWeight};
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// DoRA over the LoRA of any kind of layer.
#[derive(Debug)]
pub(super) struct Dora<L> {
    inner: L,
    /// m, in the shape that PEFT saves.
    magnitude: SharedTensor,
    norm: Norm,
}

/// The norm n, and the part of it that doesn't change.
#[derive(Debug, Default)]
struct Norm {
    /// ‖W‖² (out) of the weight it was taken of.
    base: Mutex<Option<(Arc<dyn PackedWeight>, SharedTensor)>>,
}

impl Norm {
    fn base_squared(&self, weight: &Arc<dyn PackedWeight>, map: &LinearMap, kind: Kind) -> Result<Tensor> {
        let mut known = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, norm)) = known.as_ref().filter(|(of, _)| Arc::ptr_eq(of, weight)) {
            return Ok(norm.get());
        }
        let norm = map.row_norms_squared(kind)?;
        *known = Some((Arc::clone(weight), SharedTensor::new(norm.shallow_clone())));
        Ok(norm)
    }

    /// n (out), without gradient; in f32 where A and B are narrower, since the
    /// three terms may nearly cancel.
    fn of(&self, inner: &impl Factored, weight: &Arc<dyn PackedWeight>) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let (factors, map) = (inner.factors(), LinearMap::new(weight, inner.transposed()));
        let wide = |factor: Tensor| -> Result<Tensor> {
            let kind = if factor.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
            Ok(factor.f_flatten(1, -1)?.f_to_kind(kind)?)
        };
        let (a, b, s) = (wide(factors.a())?, wide(factors.b())?, factors.scaling());
        let base = self.base_squared(weight, &map, a.f_kind()?)?;
        // (2s·W·Aᵀ + s²·B·A·Aᵀ)ᵀ, (r, out).
        let gram = a.f_mm(&a.f_tr()?)?;
        let mut inner = map.apply(&a, None)?;
        add_product(&mut inner, &gram, &b.f_tr()?, 2.0 * s, s * s)?;
        root(&base, &inner, &b)
    }
}

/// √(base + Σ inner[i, ·] · b[·, i]), the sums over i: base (out), inner
/// (r, out), b (out, r).
fn root(base: &Tensor, inner: &Tensor, b: &Tensor) -> Result<Tensor> {
    let small = [base, inner, b].iter().all(|t| t.kind() == Kind::Float && t.device() == Device::Cpu);
    if !(small && inner.is_contiguous() && b.is_contiguous()) {
        let sum = inner.f_mul(&b.f_tr()?)?.f_sum_dim_intlist([0i64].as_slice(), false, None)?;
        return Ok(sum.f_add(base)?.f_clamp_min_(0.0)?.f_sqrt_()?);
    }
    // Five operators on so little would cost more than all products.
    let (mut norms, r) = (base.f_empty_like()?, b.size2()?.1 as usize);
    let rows = |norms: &mut [f32], base: &[f32], inner: &[f32], b: &[f32]| {
        for (at, (norm, row)) in norms.iter_mut().zip(b.chunks_exact(r)).enumerate() {
            let column = inner.iter().skip(at).step_by(base.len());
            let sum = base[at] + row.iter().zip(column).map(|(b, inner)| b * inner).sum::<f32>();
            // NaN stays NaN.
            *norm = if sum < 0.0 { 0.0 } else { sum.sqrt() };
        }
    };
    read(base, |base| read(inner, |inner| read(b, |b| write(&mut norms, |norms| rows(norms, base, inner, b)))))????;
    Ok(norms)
}

impl<L: Factored> Dora<L> {
    /// m starts at the norm of W + ΔW, so that the model starts as LoRA's.
    pub(super) fn new(inner: L, weight: &Arc<dyn PackedWeight>) -> Result<Self> {
        let norm = Norm::default();
        let mut magnitude = norm.of(&inner, weight)?.f_to_kind(inner.factors().a().f_kind()?)?;
        if matches!(inner.output_channels(), OutputChannels::Second) {
            magnitude = inner.output_channels().broadcast(&magnitude, weight.sizes().len())?;
        }
        let magnitude = SharedTensor::new(magnitude.f_set_requires_grad(true)?);
        Ok(Dora { inner, magnitude, norm })
    }

    /// m / n (out), with the gradient of m.
    fn gain(&self, weight: &Arc<dyn PackedWeight>) -> Result<Tensor> {
        Ok(self.magnitude.get().f_flatten(0, -1)?.f_div(&self.norm.of(&self.inner, weight)?)?)
    }
}

/// (m / n) · z + bias as one node: m in the shape that PEFT saves, n and the
/// bias (out). Taken in the wider of the dtypes, rounded to that of z.
fn rescale(
    z: &Tensor,
    magnitude: &Tensor,
    norm: &Tensor,
    bias: Option<&Tensor>,
    channels: OutputChannels,
) -> Result<Tensor> {
    let (dims, kind) = (z.dim(), z.f_kind()?);
    let (y, gain) = {
        let _no_grad = tch::no_grad_guard();
        let gain = channels.broadcast(&magnitude.f_flatten(0, -1)?.f_div(norm)?, dims)?;
        let y = match bias {
            None => z.f_mul(&gain)?,
            Some(bias) => {
                let wide = gain.f_kind()?;
                let bias = channels.broadcast(&bias.f_to_kind(wide)?, dims)?;
                bias.f_addcmul(&z.f_to_kind(wide)?, &gain)?
            }
        };
        (y.f_to_kind(kind)?, gain)
    };
    let inputs: Vec<&Tensor> = [z, magnitude].into_iter().chain(bias).collect();
    if autograd::needs_grad(&inputs) {
        let others = (0..dims as i64).filter(|dim| *dim != channels.dim(dims)).collect();
        let bias = bias.map(|bias| bias.f_kind()).transpose()?;
        let node = Rescaled { others, magnitude: Like::new(magnitude)?, bias };
        autograd::record(&inputs, &[z, &gain, norm], &y, Box::new(node))?;
    }
    Ok(y)
}

/// Σ a · b over all rows, (columns), of matrices of f32 on the CPU: without a
/// product of their size.
fn column_sums(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    /// Columns that a thread takes at a time.
    const PART: usize = 256;
    let plain = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu && t.is_contiguous();
    let [_, columns] = a.size()[..] else { return Ok(None) };
    if !(plain(a) && plain(b)) {
        return Ok(None);
    }
    let mut sums = Tensor::f_zeros([columns], (Kind::Float, Device::Cpu))?;
    let columns = columns as usize;
    read(a, |a| {
        read(b, |b| {
            write(&mut sums, |sums| {
                for_each_chunk(sums, PART, |i, sums| dispatch(ColumnSums { a, b, columns, first: i * PART, sums }))
            })
        })
    })????;
    Ok(Some(sums))
}

struct ColumnSums<'a> {
    a: &'a [f32],
    b: &'a [f32],
    columns: usize,
    first: usize,
    sums: &'a mut [f32],
}

impl Kernel for ColumnSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let ColumnSums { a, b, columns, first, sums } = self;
        let part = first..first + sums.len();
        for (a, b) in a.chunks_exact(columns).zip(b.chunks_exact(columns)) {
            for ((sum, a), b) in sums.iter_mut().zip(&a[part.clone()]).zip(&b[part.clone()]) {
                *sum += a * b;
            }
        }
    }
}

struct Rescaled {
    /// The dimensions that don't count output features.
    others: Vec<i64>,
    magnitude: Like,
    bias: Option<Kind>,
}

impl Backward for Rescaled {
    /// dz = (m / n) · dY, dm = Σ dY·z / n.
    fn backward(&self, grad: &Tensor, saved: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let [z, gain, norm] = saved else { return Ok(Vec::new()) };
        let needs = |i: usize| needed.get(i) == Some(&true);
        let sum = |t: &Tensor, kind: Kind| t.f_sum_dim_intlist(self.others.as_slice(), false, kind);
        let mut grads = vec![None, None];
        if needs(0) {
            grads[0] = Some(grad.f_mul(gain)?.f_to_kind(z.f_kind()?)?);
        }
        if needs(1) {
            let wide = norm.f_kind()?;
            let mut sums = match column_sums(grad, z)? {
                Some(sums) => sums,
                None => sum(&grad.f_to_kind(wide)?.f_mul(z)?, wide)?,
            };
            grads[1] = Some(self.magnitude.shaped(&sums.f_div_(norm)?)?);
        }
        if let Some(kind) = self.bias {
            grads.push(needs(2).then(|| sum(grad, kind)).transpose()?);
        }
        Ok(grads)
    }
}

impl<L: Factored> Adapter for Dora<L> {
    fn active(&self) -> bool {
        self.inner.active()
    }

    /// (m/n − 1) · W·x + (m/n) · s · B·A·x, both of the dropped x; the base's
    /// bias is not scaled.
    fn addition(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        if !self.inner.takes_part(operator)? {
            return Ok(None);
        }
        let dropped = self.inner.factors().dropped(operator)?;
        let operator = match &dropped {
            Some(x) => operator.with_input(x).without_bias(),
            None => operator.without_bias(),
        };
        let base = frozen(weight, &operator)?;
        let delta = self.inner.product(&operator)?;
        let gain = self.inner.output_channels().broadcast(&self.gain(weight)?, base.dim())?;
        Ok(Some(base.f_add(&delta)?.f_mul(&gain)?.f_sub(&base)?))
    }

    /// Without dropout (m/n) · (W·x + s · B·A·x) + bias: one adapted operator.
    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        if !self.inner.takes_part(operator)? {
            return frozen(weight, operator);
        }
        if self.inner.factors().drops(operator) {
            let base = frozen(weight, operator)?;
            let kind = base.f_kind()?;
            return match self.addition(weight, operator)? {
                Some(addition) => Ok(base.f_add(&addition)?.f_to_kind(kind)?),
                None => Ok(base),
            };
        }
        let sum = self.inner.apply(weight, &operator.without_bias())?;
        let norm = self.norm.of(&self.inner, weight)?;
        rescale(&sum, &self.magnitude.get(), &norm, operator.bias(), self.inner.output_channels())
    }

    /// (m/n) · (W + ΔW) − W, taken in the adapter's dtype.
    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        let wide = self.inner.factors().a().f_kind()?;
        let base = match weight.as_dense() {
            Some(dense) => dense.f_to_kind(wide)?,
            None => weight.dequantize(wide)?,
        };
        let mut gain = self.gain(weight)?;
        if !self.inner.transposed() {
            let mut shape = vec![1; base.dim()];
            shape[0] = gain.size1()?;
            gain = gain.f_view(shape.as_slice())?;
        }
        Ok(base.f_add(&self.inner.delta(weight, wide)?)?.f_mul(&gain)?.f_sub(&base)?.f_to_kind(kind)?)
    }
}

impl<L: Factored> LoraLayer for Dora<L> {
    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        let mut tensors = self.inner.tensors();
        tensors.push(("lora_magnitude_vector", self.magnitude.get()));
        tensors
    }

    fn scaling(&self) -> f64 {
        self.inner.scaling()
    }

    fn set_scaling(&self, scaling: f64) {
        self.inner.set_scaling(scaling);
    }
}
