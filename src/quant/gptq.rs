//! `gptq`: 4-bit integers with integer zero points, as read from GPTQ and AWQ
//! files.

use super::{Meta, PackedWeight, Parts, Scheme, matrix};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Kind, Tensor};

/// value = scale · (q − zero), rounded once to the weight's dtype.
#[derive(Debug)]
pub(super) struct Gptq {
    /// u8 (rows, ⌈columns / 2⌉), column 2i in the low nibble of byte i.
    data: SharedTensor,
    /// (rows, groups), in the weight's dtype.
    scale: SharedTensor,
    /// u8 (rows, groups).
    zero: SharedTensor,
    /// i64 (columns): the group of each column.
    group: SharedTensor,
    group_size: i64,
    in_order: bool,
    meta: Meta,
}

/// Whether each column is in the group that it would be in by its place.
fn in_order(group: &Tensor, size: i64) -> Result<bool> {
    let group = Vec::<i64>::try_from(group)?;
    Ok(group.chunks(size as usize).zip(0..).all(|(columns, number)| columns.iter().all(|group| *group == number)))
}

impl Gptq {
    pub(super) fn assemble(mut parts: Parts, group_size: i64) -> Result<Self> {
        let ([rows, columns], device) = (matrix(&parts.sizes), parts.device());
        if group_size < 1 {
            return Err(parts.wrong("", "a group size of at least 1", group_size.to_string()));
        }
        let groups = (columns + group_size - 1) / group_size;
        let data = parts.take("weight", Kind::Uint8, &[rows, (columns + 1) / 2])?;
        let scale = parts.take("weight.scale", parts.kind, &[rows, groups])?;
        let zero = parts.take("weight.zero", Kind::Uint8, &[rows, groups])?;
        let group = parts.take("weight.group", Kind::Int64, &[columns])?;
        let (low, high) = group.get().f_aminmax(None, false)?;
        let (low, high) = (i64::try_from(low)?, i64::try_from(high)?);
        if low < 0 || high >= groups {
            let expected = format!("groups from 0 to {}", groups - 1);
            return Err(parts.wrong("weight.group", expected, format!("{low} to {high}")));
        }
        let in_order = in_order(&group.get(), group_size)?;
        let (sizes, kind) = parts.finish()?;
        Ok(Gptq { data, scale, zero, group, group_size, in_order, meta: Meta { sizes, kind, device } })
    }

    fn unpack(&self, out: &mut Tensor, rows: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let columns = matrix(&self.meta.sizes)[1];
        let data = rows(&self.data.get())?;
        let n = data.size2()?.0;
        let codes = Tensor::f_stack(&[data.f_bitwise_and(15)?, data.f_bitwise_right_shift_tensor_scalar(4)?], 2)?;
        let codes = codes.f_view([n, -1])?.f_narrow(1, 0, columns)?;
        let group = self.group.get();
        let of_columns = |t: &SharedTensor| -> Result<Tensor> { Ok(rows(&t.get())?.f_index_select(1, &group)?) };
        let (scale, zero) = (of_columns(&self.scale)?, of_columns(&self.zero)?);
        // Differences up to 16 are exact in every dtype.
        let steps = codes.f_to_kind(self.meta.kind)?.f_sub_(&zero.f_to_kind(self.meta.kind)?)?;
        out.f_copy_(&steps.f_mul(&scale)?)?;
        Ok(())
    }
}

impl PackedWeight for Gptq {
    fn scheme(&self) -> Option<Scheme> {
        Some(Scheme::Gptq { group_size: self.group_size })
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![
            ("weight".into(), self.data.get()),
            ("weight.scale".into(), self.scale.get()),
            ("weight.zero".into(), self.zero.get()),
            ("weight.group".into(), self.group.get()),
        ])
    }

    fn in_order(&self) -> bool {
        self.in_order
    }

    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let rows = out.size2()?.0;
        self.unpack(out, |t| Ok(t.f_narrow(0, start, rows)?))
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        self.unpack(out, |t| super::select(t, index))
    }
}
