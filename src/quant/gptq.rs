//! `gptq`: 4-bit integers with integer zero points, as read from GPTQ and AWQ
//! files.

use super::act_order::{ActOrder, ColumnOrder};
use super::{Meta, PackedWeight, Parts, Scheme, matrix};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use std::sync::Arc;
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
fn in_order(group: &[i64], size: i64) -> bool {
    group.chunks(size as usize).zip(0..).all(|(columns, number)| columns.iter().all(|group| *group == number))
}

/// A weight of these parts. Columns whose groups are out of order (`act_order`) are laid in order where that makes
/// whole groups of them.
pub(super) fn assemble(mut parts: Parts, group_size: i64) -> Result<Arc<dyn PackedWeight>> {
    let columns = matrix(&parts.sizes)[1];
    let known = ColumnOrder::take(&mut parts, columns)?;
    let mut weight = Gptq::assemble(parts, group_size)?;
    let order = if known.is_none() && !weight.in_order { weight.sort()? } else { known };
    Ok(match order {
        Some(order) => Arc::new(ActOrder::new(weight, order)),
        None => Arc::new(weight),
    })
}

/// The codes (rows, columns) of bytes (rows, ⌈columns / 2⌉), one to a byte.
fn codes(data: &Tensor, columns: i64) -> Result<Tensor> {
    let codes = Tensor::f_stack(&[data.f_bitwise_and(15)?, data.f_bitwise_right_shift_tensor_scalar(4)?], 2)?;
    Ok(codes.f_view([data.size2()?.0, -1])?.f_narrow(1, 0, columns)?)
}

/// Two codes to a byte along rows, the even column in the low nibble.
pub(super) fn pairs(codes: &Tensor) -> Result<Tensor> {
    let (rows, columns) = codes.size2()?;
    let codes = codes.f_constant_pad_nd([0, columns % 2])?.f_contiguous()?.f_view([rows, -1, 2])?;
    let high = codes.f_select(2, 1)?.f_bitwise_left_shift_tensor_scalar(4)?;
    Ok(codes.f_select(2, 0)?.f_bitwise_or_tensor(&high)?)
}

impl Gptq {
    fn assemble(mut parts: Parts, group_size: i64) -> Result<Self> {
        let ([rows, columns], device) = (matrix(&parts.sizes), parts.device());
        if group_size < 1 {
            return Err(parts.wrong("", "a group size of at least 1", group_size.to_string()));
        }
        let groups = (columns + group_size - 1) / group_size;
        let data = parts.take("weight", Kind::Uint8, &[rows, (columns + 1) / 2])?;
        let scale = parts.take("weight.scale", parts.kind, &[rows, groups])?;
        let zero = parts.take("weight.zero", Kind::Uint8, &[rows, groups])?;
        let group = parts.take("weight.group", Kind::Int64, &[columns])?;
        let numbers = Vec::<i64>::try_from(&group.get())?;
        if let Some(found) = numbers.iter().find(|number| !(0..groups).contains(*number)) {
            return Err(parts.wrong("weight.group", format!("groups from 0 to {}", groups - 1), found.to_string()));
        }
        let in_order = in_order(&numbers, group_size);
        let (sizes, kind) = parts.finish()?;
        Ok(Gptq { data, scale, zero, group, group_size, in_order, meta: Meta { sizes, kind, device } })
    }

    /// Lays the columns in the order of their groups, if each group then has as many as it would by its place;
    /// answers which column lies where.
    fn sort(&mut self) -> Result<Option<ColumnOrder>> {
        let group = Vec::<i64>::try_from(&self.group.get())?;
        let mut columns: Vec<i64> = (0..).take(group.len()).collect();
        columns.sort_by_key(|column| group[*column as usize]);
        let sorted: Vec<i64> = columns.iter().map(|column| group[*column as usize]).collect();
        if !in_order(&sorted, self.group_size) {
            return Ok(None);
        }
        let order = ColumnOrder::new(&columns, self.meta.device)?;
        let codes = codes(&self.data.get(), columns.len() as i64)?;
        self.data = SharedTensor::new(pairs(&order.lay(&codes)?)?);
        self.group = SharedTensor::new(Tensor::from_slice(&sorted).f_to_device(self.meta.device)?);
        self.in_order = true;
        Ok(Some(order))
    }

    fn unpack(&self, out: &mut Tensor, rows: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let columns = matrix(&self.meta.sizes)[1];
        let codes = codes(&rows(&self.data.get())?, columns)?;
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
