//! Floor 1: quantisation schemes, packed weights and their products.
//!
//! One file per scheme. A packed weight knows how to unpack a range of its
//! rows; `linear` builds the products and the autograd node on that, so that
//! at most one tile of a weight is dense at any time.

mod act_order;
mod affine;
mod cast;
mod codebook;
mod config;
mod convolution;
mod cpu;
mod cuda;
mod dense;
pub(crate) mod disk;
mod dynamic_map;
mod fp8;
pub(crate) mod frozen;
mod gemm;
mod gptq;
mod hqq;
mod int8;
mod kernels;
pub(crate) mod linear;
mod map;
mod mxfp4;
mod op;
mod packing;
mod parts;
mod pattern;
mod scheme;
mod stack;
mod tiles;
mod tilewise;

pub use config::{QuantConfig, QuantConfigBuilder, QuantRule, Treatment};
pub(crate) use dense::Dense;
pub(crate) use dynamic_map::dynamic_map;
pub(crate) use kernels::Float;
pub(crate) use map::LinearMap;
pub(crate) use parts::Parts;
pub(crate) use pattern::matches;
pub use scheme::{Fp8Format, Scheme};

use crate::error::{Error, Result};
use op::Op;
use std::fmt::Debug;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// The dense weight that a packed one was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// See [`PackedWeight::sizes`].
    pub sizes: Vec<i64>,
    /// See [`PackedWeight::kind`].
    pub kind: Kind,
    /// See [`PackedWeight::device`].
    pub device: Device,
}

/// A weight whose columns lie in another order than the model's; see
/// [`PackedWeight::reordered`].
#[derive(Debug)]
pub struct Reordered<'a> {
    /// The weight, with its columns as they lie.
    pub weight: &'a dyn PackedWeight,
    /// i64 (columns): the model's column at each place.
    pub columns: Tensor,
    /// i64 (columns): the place of each of the model's columns.
    pub places: Tensor,
}

/// A frozen weight in the form it is kept in memory.
///
/// Products see a matrix: (out, in) of a linear layer, (rows, dim) of an
/// embedding, (out, in / groups · kernel) of a convolution.
pub trait PackedWeight: Debug + Send + Sync {
    /// The scheme, or `None` for a dense weight.
    fn scheme(&self) -> Option<Scheme>;

    /// What it keeps of the dense weight that was packed.
    fn meta(&self) -> &Meta;

    /// The sizes of the dense weight: two of a linear layer or an embedding,
    /// (out, in / groups, kernel…) of a convolution.
    fn sizes(&self) -> &[i64] {
        &self.meta().sizes
    }

    /// The sizes of the matrix: the first one, and the product of the others.
    fn shape(&self) -> [i64; 2] {
        matrix(self.sizes())
    }

    /// The dtype of the weight that was packed, and of its values: unpacking
    /// rounds to this dtype first, whatever dtype is asked for.
    fn kind(&self) -> Kind {
        self.meta().kind
    }

    /// Where the packed bytes are.
    fn device(&self) -> Device {
        self.meta().device
    }

    /// The packed tensors by name, scales included, as they go to disk.
    ///
    /// # Errors
    /// libtorch's.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>>;

    /// [`unpack_rows`](#method.unpack_rows) by libtorch's operators: the way of
    /// every device, and the definition that kernels follow to the bit.
    ///
    /// # Errors
    /// libtorch's.
    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()>;

    /// [`unpack_index`](#method.unpack_index) by libtorch's operators, which
    /// never ask for the index on the host.
    ///
    /// # Errors
    /// libtorch's.
    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()>;

    /// The weight itself where it is kept dense, so that it need not be copied.
    fn as_dense(&self) -> Option<Tensor> {
        None
    }

    /// Whether the columns that share a scale are next to each other, as kernels
    /// need it. They are not in GPTQ files made with `act_order`.
    fn in_order(&self) -> bool {
        true
    }

    /// The weight as it lies, where its columns are [in order](Self::in_order) only in another
    /// order than the model's.
    fn reordered(&self) -> Option<Reordered<'_>> {
        None
    }

    /// Bytes that the packed tensors take.
    ///
    /// # Errors
    /// libtorch's.
    fn nbytes(&self) -> Result<usize> {
        let tensors = self.tensors()?;
        Ok(tensors.iter().map(|(_, t)| t.numel() * crate::ffi::bytes::element_size(t.kind())).sum())
    }
}

impl dyn PackedWeight + '_ {
    /// Writes the values of rows `start..start + rows` into `out`, a contiguous
    /// (rows, columns) tensor of any float dtype on the same device.
    ///
    /// # Errors
    /// libtorch's.
    pub fn unpack_rows(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let columns = 0..self.shape()[1];
        if !op::run(self, Op::Unpack { row: start, columns, out })? {
            self.rows_by_operators(start, out)?;
        }
        Ok(())
    }

    /// Writes the values of the rows that `index` lists into `out`, a
    /// contiguous (n, columns) tensor of any float dtype on the same device.
    /// `index` is i64 (n); rows may come in any order and more than once. On CUDA,
    /// where that is not known without waiting for the device, a row that the
    /// weight doesn't have comes out as NaN.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a row that the weight doesn't have, on the CPU;
    /// libtorch's.
    pub fn unpack_index(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        if self.device() == Device::Cpu {
            check_index(&Vec::<i64>::try_from(index)?, self.shape()[0])?;
        }
        if !op::run(self, Op::UnpackIndex { index: &index.f_contiguous()?, out })? {
            self.index_by_operators(index, out)?;
        }
        Ok(())
    }

    /// All values, as a new tensor of the dense sizes and of dtype `kind`.
    ///
    /// # Errors
    /// libtorch's.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        let mut out = Tensor::f_empty(self.shape(), (kind, self.device()))?;
        self.unpack_rows(0, &mut out)?;
        Ok(out.f_view(self.sizes())?)
    }
}

/// The matrix that a weight of these sizes is.
fn matrix(sizes: &[i64]) -> [i64; 2] {
    match sizes {
        [] => [1, 1],
        [rows, rest @ ..] => [*rows, rest.iter().product()],
    }
}

/// Whether a weight of `rows` rows has all of these.
fn check_index(index: &[i64], rows: i64) -> Result<()> {
    match index.iter().find(|row| !(0..rows).contains(*row)) {
        None => Ok(()),
        Some(row) => Err(Error::Mismatch {
            name: "index into a packed weight".into(),
            expected: format!("rows from 0 to {}", rows - 1),
            found: row.to_string(),
        }),
    }
}

/// Packs the weight of a linear layer (out, in), of an embedding (rows, dim) or
/// of a convolution (out, in / groups, kernel…; up to five dimensions), in f32,
/// bf16 or f16, on any device.
///
/// `name` is used in errors only.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_peft::Scheme;
/// use tch_peft::quant::quantize;
///
/// let weight = Tensor::randn([64, 256], (Kind::Float, Device::Cpu));
/// let packed = quantize("weight", &weight, Scheme::NF4)?;
/// let error = (packed.dequantize(Kind::Float)? - &weight).norm() / weight.norm();
/// assert!(f64::try_from(error).unwrap() < 0.1);
/// assert!(packed.nbytes()? < 64 * 256 * 5 / 8 + 1);
/// # Ok::<(), tch_peft::Error>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] for another shape or dtype, [`Error::NotFinite`] for a
/// weight with NaN or infinite values, or with values so large that they would
/// become infinite in this scheme; [`Error::Config`] for a scheme that is only
/// read from files, or a size in it that is out of range.
pub fn quantize(name: &str, weight: &Tensor, scheme: Scheme) -> Result<Arc<dyn PackedWeight>> {
    check(name, weight, scheme.validate()?)?;
    pack(weight, scheme)
}

/// [`quantize`] for a weight that was checked already.
pub(crate) fn pack(weight: &Tensor, scheme: Scheme) -> Result<Arc<dyn PackedWeight>> {
    let weight = &weight.f_detach()?.f_contiguous()?;
    Ok(match scheme {
        Scheme::Int8 => Arc::new(int8::Int8::pack(weight)?),
        Scheme::LlmInt8 => Arc::new(int8::Int8::pack_absmax(weight)?),
        Scheme::Int4 { .. } | Scheme::Int2 { .. } => Arc::new(affine::Affine::pack(weight, scheme)?),
        Scheme::Fp8 { format } => Arc::new(fp8::Fp8::pack(weight, format)?),
        Scheme::Nf4 { .. } | Scheme::Fp4 { .. } => Arc::new(codebook::Codebook::pack(weight, scheme)?),
        Scheme::Mxfp4 => Arc::new(mxfp4::Mxfp4::pack(weight)?),
        Scheme::Bf16 | Scheme::F16 => Arc::new(cast::Cast::pack(weight, scheme)?),
        Scheme::Gptq { .. } => return Err(scheme::only_read(scheme)),
    })
}

/// [`pack`] on another device than the weight's, to which the result returns.
pub(crate) fn pack_on(
    name: &str,
    weight: &Tensor,
    scheme: Scheme,
    device: Option<Device>,
) -> Result<Arc<dyn PackedWeight>> {
    let home = weight.device();
    match device {
        Some(device) if device != home => {
            let there = pack(&weight.f_to_device(device)?, scheme)?;
            Parts::of(name, there.as_ref(), home)?.map_or(Ok(there), assemble)
        }
        _ => pack(weight, scheme),
    }
}

/// Puts a packed weight together from its tensors, whose dtypes, shapes and
/// values are checked.
pub(crate) fn assemble(parts: Parts) -> Result<Arc<dyn PackedWeight>> {
    let scheme = parts.scheme;
    check_form(&parts.name, &parts.sizes, parts.kind)?;
    Ok(match scheme {
        Scheme::Int8 | Scheme::LlmInt8 => Arc::new(int8::Int8::assemble(parts)?),
        Scheme::Int4 { .. } | Scheme::Int2 { .. } => Arc::new(affine::Affine::assemble(parts)?),
        Scheme::Fp8 { format } => Arc::new(fp8::Fp8::assemble(parts, format)?),
        Scheme::Nf4 { .. } | Scheme::Fp4 { .. } => Arc::new(codebook::Codebook::assemble(parts)?),
        Scheme::Mxfp4 => Arc::new(mxfp4::Mxfp4::assemble(parts)?),
        Scheme::Bf16 | Scheme::F16 => Arc::new(cast::Cast::assemble(parts)?),
        Scheme::Gptq { group_size } => gptq::assemble(parts, group_size)?,
    })
}

/// The shapes and dtypes that weights can be packed from.
fn check_form(name: &str, sizes: &[i64], kind: Kind) -> Result<()> {
    let float = matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half);
    if (2..=5).contains(&sizes.len()) && sizes.iter().all(|&size| size > 0) && float {
        return Ok(());
    }
    Err(Error::Mismatch {
        name: name.into(),
        expected: "a weight of two to five dimensions, none of them 0, of f32, bf16 or f16".into(),
        found: format!("{kind:?} {sizes:?}"),
    })
}

/// What [`quantize`] demands of a weight.
pub(crate) fn check(name: &str, weight: &Tensor, scheme: Scheme) -> Result<()> {
    let kind = weight.f_kind()?;
    check_form(name, &weight.size(), kind)?;
    // NaN is neither above nor below the limit, and comes through as NaN.
    let (low, high) = weight.f_detach()?.f_aminmax(None, false)?;
    let (low, high) = (f64::try_from(low)?, f64::try_from(high)?);
    let remedy = "it can't be quantised: repair the base, or leave the weight out with `skip`";
    if !low.is_finite() || !high.is_finite() {
        return Err(Error::NotFinite { name: name.into(), remedy: remedy.into() });
    }
    let limit = limit(scheme, kind);
    if high.max(-low) > limit {
        let remedy = format!(
            "that is what {scheme} would make of it, which takes values up to {limit:e}: \
             choose another scheme for it, or leave the weight out with `skip`"
        );
        return Err(Error::NotFinite { name: name.into(), remedy });
    }
    Ok(())
}

/// The largest magnitude whose packed value is sure to be finite.
fn limit(scheme: Scheme, kind: Kind) -> f64 {
    match scheme {
        Scheme::LlmInt8 | Scheme::F16 => largest(Kind::Half).min(largest(kind)),
        Scheme::Bf16 if kind == Kind::Half => 65280.0, // the next bf16 is infinite in f16
        Scheme::Bf16 => largest(Kind::BFloat16),
        // A range of values, or a sum of scales, must have room.
        Scheme::Int4 { .. } | Scheme::Int2 { .. } => largest(kind) / 4.0,
        Scheme::Nf4 { double_quant: true, .. } | Scheme::Fp4 { double_quant: true, .. } => largest(kind) / 4.0,
        _ => largest(kind),
    }
}

/// The largest finite value of a float dtype of weights.
fn largest(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => half::bf16::MAX.to_f64(),
        Kind::Half => half::f16::MAX.to_f64(),
        _ => f32::MAX.into(),
    }
}

/// The smallest normal value of a float dtype of weights.
fn smallest_normal(kind: Kind) -> f64 {
    match kind {
        Kind::Half => half::f16::MIN_POSITIVE.to_f64(),
        _ => f32::MIN_POSITIVE.into(),
    }
}

/// A number to divide tensors like this one by. On CUDA, division by a plain number multiplies by its reciprocal, which
/// is another value.
fn divisor(number: f64, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_full([1], number, (like.f_kind()?, like.device()))?)
}

/// The largest value of the dtype whose product with `code` is finite.
fn largest_scale(kind: Kind, code: f64) -> f64 {
    let scale = largest(kind) / code;
    // Cut off what the dtype's mantissa has no room for.
    let bits = match kind {
        Kind::BFloat16 => 7,
        Kind::Half => 10,
        _ => 23,
    };
    f64::from_bits(scale.to_bits() & !((1 << (52 - bits)) - 1))
}

/// Rows of a tensor by an index (n) that may hold anything.
fn select(tensor: &Tensor, index: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_index_select(0, index)?)
}

/// Refuses NaN and infinite values.
pub(crate) fn check_finite(name: &str, tensor: &Tensor, remedy: &str) -> Result<()> {
    // One pass without a temporary: a sum is finite only if every value is,
    // and an overflowing sum is told apart by looking again.
    let finite = |t: Tensor| -> Result<bool> { Ok(f64::try_from(t)?.is_finite()) };
    let sum = tensor.f_detach()?.f_sum(Kind::Float)?;
    if finite(sum)? || i64::try_from(tensor.f_isfinite()?.f_all()?)? == 1 {
        return Ok(());
    }
    Err(Error::NotFinite { name: name.into(), remedy: remedy.into() })
}
