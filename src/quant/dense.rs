//! A weight that is kept as it is.

use super::{Meta, PackedWeight, Scheme};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::Tensor;

/// A dense weight behind the same face as the packed ones, so that adapters
/// need not tell them apart.
#[derive(Debug)]
pub(crate) struct Dense {
    weight: SharedTensor,
    meta: Meta,
}

impl Dense {
    /// Takes a contiguous tensor that doesn't require gradients.
    pub(crate) fn new(weight: Tensor) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        Ok(Dense { weight: SharedTensor::new(weight), meta: Meta { sizes, kind, device } })
    }
}

impl PackedWeight for Dense {
    fn scheme(&self) -> Option<Scheme> {
        None
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![("weight".into(), self.weight.get())])
    }

    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let rows = out.size2()?.0;
        out.f_copy_(&self.weight.get().f_view(self.shape())?.f_narrow(0, start, rows)?)?;
        Ok(())
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        out.f_copy_(&self.weight.get().f_view(self.shape())?.f_index_select(0, index)?)?;
        Ok(())
    }

    fn as_dense(&self) -> Option<Tensor> {
        Some(self.weight.get())
    }
}
