//! `int8` and `llm_int8`: symmetric, one scale per output channel.

use super::{Meta, PackedWeight, Parts, Scheme, matrix, packing, tiles};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Kind, Tensor};

/// 1/127 as bitsandbytes writes it.
pub(super) const STEP: f64 = 7.874_015_718_698_502e-3;

#[derive(Debug)]
pub(super) struct Int8 {
    /// i8 (rows, columns).
    data: SharedTensor,
    scale: Scale,
    meta: Meta,
}

#[derive(Debug)]
enum Scale {
    /// (rows, 1), in the weight's dtype: value = q · scale.
    Step(SharedTensor),
    /// f32 (rows): value = q · absmax / 127.
    Absmax(SharedTensor),
}

impl Int8 {
    /// Packs a contiguous, finite weight. All arithmetic is in the weight's
    /// dtype, as optimum-quanto does it.
    pub(super) fn pack(weight: &Tensor) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let weight = weight.f_view(matrix(&sizes))?;
        let [data, scale] = packing::int8(&weight)?.map_or_else(|| Self::steps(&weight), Ok)?;
        Ok(Int8 {
            data: SharedTensor::new(data),
            scale: Scale::Step(SharedTensor::new(scale)),
            meta: Meta { sizes, kind, device },
        })
    }

    /// Codes, and scales (rows, 1), of a weight (rows, columns), with libtorch's
    /// operators.
    pub(super) fn steps(weight: &Tensor) -> Result<[Tensor; 2]> {
        let (kind, device, (rows, columns)) = (weight.f_kind()?, weight.device(), weight.size2()?);
        let data = Tensor::f_empty([rows, columns], (Kind::Int8, device))?;
        let scale = Tensor::f_empty([rows, 1], (kind, device))?;
        // 127 times a scale that was rounded up must not overflow.
        let largest = super::largest_scale(kind, 127.0);
        let top = super::divisor(127.0, weight)?;
        tiles::for_each(rows, columns, |start, rows| {
            let tile = weight.f_narrow(0, start, rows)?;
            let mut step = scale.f_narrow(0, start, rows)?;
            step.f_copy_(&absmax(&tile)?.f_div(&top)?.f_clamp_max_(largest)?)?;
            // A row of zeros has scale 0 and must not be divided by it.
            let divisor = step.f_where_self(&step.f_ne(0.0)?, &step.f_ones_like()?)?;
            let mut q = tile.f_div(&divisor)?.f_round_()?;
            data.f_narrow(0, start, rows)?.f_copy_(&q.f_clamp_(-128.0, 127.0)?)?;
            Ok(())
        })?;
        Ok([data, scale])
    }

    /// Packs as bitsandbytes does: the weight goes through f16, the arithmetic
    /// is f32. The weight must be finite in f16.
    pub(super) fn pack_absmax(weight: &Tensor) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let weight = weight.f_view(matrix(&sizes))?;
        let [data, scale] = packing::llm_int8(&weight)?.map_or_else(|| Self::maxima(&weight), Ok)?;
        Ok(Int8 {
            data: SharedTensor::new(data),
            scale: Scale::Absmax(SharedTensor::new(scale.f_squeeze_dim(1)?)),
            meta: Meta { sizes, kind, device },
        })
    }

    /// Codes, and f32 maxima (rows, 1), of a weight (rows, columns), with
    /// libtorch's operators.
    pub(super) fn maxima(weight: &Tensor) -> Result<[Tensor; 2]> {
        let (device, (rows, columns)) = (weight.device(), weight.size2()?);
        let data = Tensor::f_empty([rows, columns], (Kind::Int8, device))?;
        let scale = Tensor::f_empty([rows, 1], (Kind::Float, device))?;
        tiles::for_each(rows, columns, |start, rows| {
            let tile = weight.f_narrow(0, start, rows)?.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?;
            let max = absmax(&tile)?;
            scale.f_narrow(0, start, rows)?.f_copy_(&max)?;
            let divisor = max.f_where_self(&max.f_ne(0.0)?, &max.f_ones_like()?)?;
            // A number over a tensor is its reciprocal times the number in torch.
            let factor = divisor.f_reciprocal()?.f_mul_scalar_(127.0)?;
            data.f_narrow(0, start, rows)?.f_copy_(&tile.f_mul(&factor)?.f_round_()?)?;
            Ok(())
        })?;
        Ok([data, scale])
    }

    pub(super) fn assemble(mut parts: Parts) -> Result<Self> {
        let ([rows, columns], device) = (matrix(&parts.sizes), parts.device());
        let data = parts.take("weight", Kind::Int8, &[rows, columns])?;
        let scale = match parts.scheme {
            Scheme::LlmInt8 => Scale::Absmax(parts.take("SCB", Kind::Float, &[rows])?),
            _ => Scale::Step(parts.take("weight.scale", parts.kind, &[rows, 1])?),
        };
        let (sizes, kind) = parts.finish()?;
        Ok(Int8 { data, scale, meta: Meta { sizes, kind, device } })
    }

    /// Writes the values of some rows, chosen by `rows` from the data and from
    /// the scales.
    fn unpack(&self, out: &mut Tensor, rows: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let data = rows(&self.data.get())?;
        match &self.scale {
            Scale::Step(scale) => {
                let scale = rows(&scale.get())?;
                if out.f_kind()? == self.meta.kind {
                    out.f_copy_(&data)?;
                    let _ = out.f_mul_(&scale)?;
                } else {
                    // Values are rounded to the weight's dtype before any other.
                    out.f_copy_(&data.f_to_kind(self.meta.kind)?.f_mul_(&scale)?)?;
                }
            }
            Scale::Absmax(absmax) => {
                let absmax = rows(&absmax.get())?.f_unsqueeze(1)?;
                let mut values = data.f_to_kind(Kind::Float)?.f_mul_(&absmax)?.f_mul_scalar_(STEP)?;
                if self.meta.kind != Kind::Float {
                    values = values.f_to_kind(self.meta.kind)?;
                }
                out.f_copy_(&values)?;
            }
        }
        Ok(())
    }
}

/// max|w| of each row, (rows, 1).
pub(super) fn absmax(tile: &Tensor) -> Result<Tensor> {
    let (low, high) = (tile.f_amin([1], true)?, tile.f_amax([1], true)?);
    Ok(high.f_maximum(&low.f_neg()?)?.f_abs()?)
}

impl PackedWeight for Int8 {
    fn scheme(&self) -> Option<Scheme> {
        Some(match self.scale {
            Scale::Step(_) => Scheme::Int8,
            Scale::Absmax(_) => Scheme::LlmInt8,
        })
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let scale = match &self.scale {
            Scale::Step(scale) => ("weight.scale".into(), scale.get()),
            Scale::Absmax(absmax) => ("SCB".into(), absmax.get()),
        };
        Ok(vec![("weight".into(), self.data.get()), scale])
    }

    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let rows = out.size2()?.0;
        self.unpack(out, |t| Ok(t.f_narrow(0, start, rows)?))
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        self.unpack(out, |t| super::select(t, index))
    }
}
