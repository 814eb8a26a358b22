//! A weight that is kept as it is.

use super::{PackedWeight, Scheme};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Device, Kind, Tensor};

/// A dense weight behind the same face as the packed ones, so that adapters
/// need not tell them apart.
#[derive(Debug)]
pub(crate) struct Dense {
    weight: SharedTensor,
    shape: [i64; 2],
    kind: Kind,
    device: Device,
}

impl Dense {
    /// Takes a contiguous (out, in) tensor that doesn't require gradients.
    pub(crate) fn new(weight: Tensor) -> Result<Self> {
        let (shape, kind, device) = (weight.size2()?, weight.f_kind()?, weight.device());
        Ok(Dense { weight: SharedTensor::new(weight), shape: shape.into(), kind, device })
    }
}

impl PackedWeight for Dense {
    fn scheme(&self) -> Option<Scheme> {
        None
    }

    fn shape(&self) -> [i64; 2] {
        self.shape
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn device(&self) -> Device {
        self.device
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![("weight".into(), self.weight.get())])
    }

    fn unpack_rows(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let rows = out.size2()?.0;
        out.f_copy_(&self.weight.get().f_narrow(0, start, rows)?)?;
        Ok(())
    }

    fn as_dense(&self) -> Option<Tensor> {
        Some(self.weight.get())
    }
}
