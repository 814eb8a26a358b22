//! `bf16` and `f16`: a plain cast.

use super::{Meta, PackedWeight, Parts, Scheme, matrix};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Kind, Tensor};

/// A weight kept in 16 bits. Its values are those of the cast, and count as
/// values of the dtype that it had before.
#[derive(Debug)]
pub(super) struct Cast {
    /// (rows, columns).
    data: SharedTensor,
    scheme: Scheme,
    meta: Meta,
}

/// The dtype of the cast.
fn kind_of(scheme: Scheme) -> Kind {
    if scheme == Scheme::Bf16 { Kind::BFloat16 } else { Kind::Half }
}

impl Cast {
    /// Casts a contiguous weight that is finite in that dtype.
    pub(super) fn pack(weight: &Tensor, scheme: Scheme) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let mut data = Tensor::f_empty(matrix(&sizes), (kind_of(scheme), device))?;
        data.f_copy_(&weight.f_view(matrix(&sizes))?)?;
        Ok(Cast { data: SharedTensor::new(data), scheme, meta: Meta { sizes, kind, device } })
    }

    pub(super) fn assemble(mut parts: Parts) -> Result<Self> {
        let (scheme, device) = (parts.scheme, parts.device());
        let data = parts.take("weight", kind_of(scheme), &matrix(&parts.sizes))?;
        let (sizes, kind) = parts.finish()?;
        Ok(Cast { data, scheme, meta: Meta { sizes, kind, device } })
    }
}

impl PackedWeight for Cast {
    fn scheme(&self) -> Option<Scheme> {
        Some(self.scheme)
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![("weight".into(), self.data.get())])
    }

    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let data = self.data.get().f_narrow(0, start, out.size2()?.0)?;
        out.f_copy_(&data.f_to_kind(self.meta.kind)?)?;
        Ok(())
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        out.f_copy_(&super::select(&self.data.get(), index)?.f_to_kind(self.meta.kind)?)?;
        Ok(())
    }
}
