//! Floor 1: quantisation schemes, packed weights and their products.
//!
//! One file per scheme. A packed weight knows how to unpack a range of its
//! rows; `linear` builds the products and the autograd node on that, so that
//! at most one tile of a weight is dense at any time.

mod config;
mod dense;
mod dynamic_map;
mod int8;
mod kernels;
pub(crate) mod linear;
mod nf4;
mod tiles;

pub use config::{QuantConfig, QuantConfigBuilder, Scheme};
pub(crate) use dense::Dense;

use crate::error::{Error, Result};
use std::fmt::Debug;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// A frozen linear weight in the form it is kept in memory.
pub trait PackedWeight: Debug + Send + Sync {
    /// The scheme, or `None` for a dense weight.
    fn scheme(&self) -> Option<Scheme>;

    /// (out features, in features).
    fn shape(&self) -> [i64; 2];

    /// The dtype of the weight that was packed, and of its values: unpacking
    /// rounds to this dtype first, whatever dtype is asked for.
    fn kind(&self) -> Kind;

    /// Where the packed bytes are.
    fn device(&self) -> Device;

    /// The packed tensors by name, scales included, as they go to disk.
    ///
    /// # Errors
    /// libtorch's.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>>;

    /// Writes the values of rows `start..start + rows` into `out`, a contiguous
    /// (rows, in) tensor of any float dtype on the same device.
    ///
    /// # Errors
    /// libtorch's.
    fn unpack_rows(&self, start: i64, out: &mut Tensor) -> Result<()>;

    /// The weight itself where it is kept dense, so that it need not be copied.
    fn as_dense(&self) -> Option<Tensor> {
        None
    }

    /// All values, as a new (out, in) tensor of dtype `kind`.
    ///
    /// # Errors
    /// libtorch's.
    fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        let mut out = Tensor::f_empty(self.shape(), (kind, self.device()))?;
        self.unpack_rows(0, &mut out)?;
        Ok(out)
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

/// Packs a linear weight: (out, in), f32, bf16 or f16, on any device.
///
/// `name` is used in errors only.
///
/// # Errors
/// [`Error::Mismatch`] for another shape or dtype, [`Error::NotFinite`] for a
/// weight with NaN or infinite values.
pub fn quantize(name: &str, weight: &Tensor, scheme: Scheme) -> Result<Arc<dyn PackedWeight>> {
    check(name, weight)?;
    pack(weight, scheme)
}

/// [`quantize`] for a weight that was checked already.
pub(crate) fn pack(weight: &Tensor, scheme: Scheme) -> Result<Arc<dyn PackedWeight>> {
    let weight = weight.f_detach()?.f_contiguous()?;
    Ok(match scheme {
        Scheme::Int8 => Arc::new(int8::Int8::pack(&weight)?),
        Scheme::Nf4 { double_quant } => Arc::new(nf4::Nf4::pack(&weight, double_quant)?),
    })
}

/// What [`quantize`] demands of a weight.
pub(crate) fn check(name: &str, weight: &Tensor) -> Result<()> {
    let (shape, kind) = (weight.size(), weight.f_kind()?);
    let float = matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half);
    if shape.len() != 2 || shape.contains(&0) || !float {
        return Err(Error::Mismatch {
            name: name.into(),
            expected: "a weight (out, in) of f32, bf16 or f16".into(),
            found: format!("{kind:?} {shape:?}"),
        });
    }
    check_finite(name, weight, "it can't be quantised: repair the base, or leave the weight out with `skip`")
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
