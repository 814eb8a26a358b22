//! `int8`: symmetric, one scale per output channel.

use super::{PackedWeight, Scheme};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Device, Kind, Tensor};

#[derive(Debug)]
pub(super) struct Int8 {
    /// i8 (rows, columns).
    data: SharedTensor,
    /// (rows, 1), in the weight's dtype.
    scale: SharedTensor,
    sizes: Vec<i64>,
    kind: Kind,
    device: Device,
}

impl Int8 {
    /// Packs a contiguous, finite weight. All arithmetic is in the weight's
    /// dtype, as optimum-quanto does it.
    pub(super) fn pack(weight: &Tensor) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let [out, inn] = super::matrix(&sizes);
        let weight = weight.f_view([out, inn])?;
        let data = Tensor::f_empty([out, inn], (Kind::Int8, device))?;
        let scale = Tensor::f_empty([out, 1], (kind, device))?;
        super::tiles::for_each(out, inn, |start, rows| {
            let tile = weight.f_narrow(0, start, rows)?;
            let mut step = scale.f_narrow(0, start, rows)?;
            step.f_copy_(&tile.f_abs()?.f_amax([1], true)?.f_div_scalar(127.0)?)?;
            // A row of zeros has scale 0 and must not be divided by it.
            let divisor = step.f_where_self(&step.f_ne(0.0)?, &step.f_ones_like()?)?;
            let mut q = tile.f_div(&divisor)?.f_round_()?;
            data.f_narrow(0, start, rows)?.f_copy_(&q.f_clamp_(-128.0, 127.0)?)?;
            Ok(())
        })?;
        Ok(Int8 { data: SharedTensor::new(data), scale: SharedTensor::new(scale), sizes, kind, device })
    }
}

impl PackedWeight for Int8 {
    fn scheme(&self) -> Option<Scheme> {
        Some(Scheme::Int8)
    }

    fn sizes(&self) -> &[i64] {
        &self.sizes
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn device(&self) -> Device {
        self.device
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![("weight".into(), self.data.get()), ("weight.scale".into(), self.scale.get())])
    }

    fn unpack_rows(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let rows = out.size2()?.0;
        let data = self.data.get().f_narrow(0, start, rows)?;
        let scale = self.scale.get().f_narrow(0, start, rows)?;
        if out.f_kind()? == self.kind {
            out.f_copy_(&data)?;
            let _ = out.f_mul_(&scale)?;
        } else {
            // Values are rounded to the weight's dtype before any other.
            out.f_copy_(&data.f_to_kind(self.kind)?.f_mul_(&scale)?)?;
        }
        Ok(())
    }
}
