//! `fp8`: 8-bit floats, one scale per output channel.

use super::{Fp8Format, Meta, PackedWeight, Parts, Scheme, matrix, packing, tiles};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct Fp8 {
    /// 8-bit floats (rows, columns).
    data: SharedTensor,
    /// (rows, 1), in the weight's dtype.
    scale: SharedTensor,
    format: Fp8Format,
    meta: Meta,
}

impl Fp8Format {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Fp8Format::E4m3 => Kind::Float8e4m3fn,
            Fp8Format::E5m2 => Kind::Float8e5m2,
        }
    }

    /// Its largest finite value.
    pub(super) fn largest(self) -> f64 {
        match self {
            Fp8Format::E4m3 => 448.0,
            Fp8Format::E5m2 => 57344.0,
        }
    }
}

impl Fp8 {
    /// Packs a contiguous, finite weight, all arithmetic in its dtype.
    ///
    /// The scale is kept in the normal range of the dtype: divided by a
    /// subnormal one, or by the zero of a row of zeros, values would lose their
    /// digits or turn into NaN. An 8-bit float has the range to make up for it.
    pub(super) fn pack(weight: &Tensor, format: Fp8Format) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let weight = weight.f_view(matrix(&sizes))?;
        let [data, scale] =
            packing::fp8(&weight, format)?.map_or_else(|| Self::pack_by_operators(&weight, format), Ok)?;
        Ok(Fp8 {
            data: SharedTensor::new(data),
            scale: SharedTensor::new(scale),
            format,
            meta: Meta { sizes, kind, device },
        })
    }

    /// Codes, and scales (rows, 1), of a weight (rows, columns), with libtorch's
    /// operators.
    pub(super) fn pack_by_operators(weight: &Tensor, format: Fp8Format) -> Result<[Tensor; 2]> {
        let (kind, device, (rows, columns)) = (weight.f_kind()?, weight.device(), weight.size2()?);
        let data = Tensor::f_empty([rows, columns], (format.kind(), device))?;
        let scale = Tensor::f_empty([rows, 1], (kind, device))?;
        let (smallest, largest) = (super::smallest_normal(kind), super::largest_scale(kind, format.largest()));
        let top = super::divisor(format.largest(), weight)?;
        tiles::for_each(rows, columns, |start, rows| {
            let tile = weight.f_narrow(0, start, rows)?;
            let max = super::int8::absmax(&tile)?;
            let step = max.f_div(&top)?.f_clamp_(smallest, largest)?;
            scale.f_narrow(0, start, rows)?.f_copy_(&step)?;
            let mut q = tile.f_div(&step)?;
            let q = q.f_clamp_(-format.largest(), format.largest())?;
            data.f_narrow(0, start, rows)?.f_copy_(&q)?;
            Ok(())
        })?;
        Ok([data, scale])
    }

    pub(super) fn assemble(mut parts: Parts, format: Fp8Format) -> Result<Self> {
        let ([rows, columns], device) = (matrix(&parts.sizes), parts.device());
        let data = parts.take("weight", format.kind(), &[rows, columns])?;
        // The bits of e4m3 and e5m2 from which on a value isn't finite.
        let (first, bits) = match format {
            Fp8Format::E4m3 => (127, data.get()),
            Fp8Format::E5m2 => (124, data.get()),
        };
        let magnitude = bits.f_view_dtype(Kind::Uint8)?.f_bitwise_and(127)?.f_max()?;
        if i64::try_from(magnitude)? >= first {
            return Err(parts.wrong("weight", "finite values", "NaN or infinite ones"));
        }
        let scale = parts.take("weight.scale", parts.kind, &[rows, 1])?;
        let (sizes, kind) = parts.finish()?;
        Ok(Fp8 { data, scale, format, meta: Meta { sizes, kind, device } })
    }

    fn unpack(&self, out: &mut Tensor, rows: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        // Not every operator knows 8-bit floats: rows are chosen by their bits.
        let data = rows(&self.data.get().f_view_dtype(Kind::Uint8)?)?.f_view_dtype(self.format.kind())?;
        let scale = rows(&self.scale.get())?;
        if out.f_kind()? == self.meta.kind {
            out.f_copy_(&data)?;
            let _ = out.f_mul_(&scale)?;
        } else {
            out.f_copy_(&data.f_to_kind(self.meta.kind)?.f_mul_(&scale)?)?;
        }
        Ok(())
    }
}

impl PackedWeight for Fp8 {
    fn scheme(&self) -> Option<Scheme> {
        Some(Scheme::Fp8 { format: self.format })
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![("weight".into(), self.data.get()), ("weight.scale".into(), self.scale.get())])
    }

    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let rows = out.size2()?.0;
        self.unpack(out, |t| Ok(t.f_narrow(0, start, rows)?))
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        self.unpack(out, |t| super::select(t, index))
    }
}
