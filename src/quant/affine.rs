//! `int4` and `int2`: integers with a scale and a float shift per group, bytes
//! as in optimum-quanto.
//!
//! A group is `size` consecutive values of a row. Of `n` groups, one a row of
//! the matrix (n, size), the codes of group `r` fill the low bits of byte row
//! `r`; those of group `r + R`, the next bits; and so on, where
//! R = ⌈n / codes per byte⌉.

use super::kernels::packing::GroupLayout;
use super::{Meta, PackedWeight, Parts, Scheme, hqq, matrix, packing, tiles};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct Affine {
    /// u8 (R, group size).
    data: SharedTensor,
    /// (groups, 1), in the weight's dtype.
    scale: SharedTensor,
    /// (groups, 1), in the weight's dtype.
    shift: SharedTensor,
    layout: Layout,
    scheme: Scheme,
    meta: Meta,
}

/// Where codes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) bits: i64,
    /// Values in a group.
    pub(crate) size: i64,
    /// Groups of the weight.
    pub(crate) groups: i64,
    /// Rows of bytes, R.
    pub(crate) byte_rows: i64,
}

/// Part of a range of groups whose codes lie in the same bits of their bytes.
struct Piece {
    /// The first group, counted from that of the range.
    first: i64,
    byte_row: i64,
    groups: i64,
    bit: i64,
}

/// quanto's rule for the groups of a row: as asked, or the next smaller
/// multiple of 32 that divides the row, or the whole row.
fn group_size(columns: i64, wanted: i64) -> i64 {
    if columns <= wanted || wanted < 1 {
        return columns;
    }
    let mut size = wanted;
    while columns % size != 0 && size > 32 {
        size -= 32;
    }
    if columns % size == 0 { size } else { columns }
}

impl Layout {
    /// That of a weight of these sizes, packed as `int2`, or else as `int4`.
    pub(crate) fn of(scheme: Scheme, sizes: &[i64]) -> Self {
        let (bits, wanted) = match scheme {
            Scheme::Int2 { group_size, .. } => (2, group_size),
            Scheme::Int4 { group_size, .. } => (4, group_size),
            _ => (4, 128),
        };
        let [rows, columns] = matrix(sizes);
        let size = group_size(columns, wanted);
        let groups = rows * (columns / size);
        let codes = 8 / bits;
        Layout { bits, size, groups, byte_rows: (groups + codes - 1) / codes }
    }

    /// The largest code.
    fn top(self) -> i64 {
        (1 << self.bits) - 1
    }

    pub(super) fn for_kernel(self, search: bool) -> GroupLayout {
        GroupLayout { bits: self.bits as u32, size: self.size as usize, byte_rows: self.byte_rows as usize, search }
    }

    /// The pieces of `groups` groups from `start` on.
    fn pieces(self, start: i64, groups: i64) -> impl Iterator<Item = Piece> {
        (0..8 / self.bits).filter_map(move |part| {
            let first = start.max(part * self.byte_rows);
            let end = (start + groups).min((part + 1) * self.byte_rows);
            let byte_row = first - part * self.byte_rows;
            (first < end).then(|| Piece { first: first - start, byte_row, groups: end - first, bit: part * self.bits })
        })
    }
}

impl Affine {
    /// Packs a contiguous, finite weight, all arithmetic in its dtype; the
    /// search is in f32.
    pub(super) fn pack(weight: &Tensor, scheme: Scheme) -> Result<Self> {
        let (sizes, kind, device) = (weight.size(), weight.f_kind()?, weight.device());
        let layout = Layout::of(scheme, &sizes);
        let weight = weight.f_view([layout.groups, layout.size])?;
        let search = matches!(scheme, Scheme::Int4 { hqq: true, .. } | Scheme::Int2 { hqq: true, .. });
        let packed = packing::groups(&weight, layout.for_kernel(search))?;
        let packed = packed.map_or_else(|| Self::pack_by_operators(&weight, layout, search), Ok)?;
        let [data, scale, shift] = packed.map(SharedTensor::new);
        Ok(Affine { data, scale, shift, layout, scheme, meta: Meta { sizes, kind, device } })
    }

    /// Bytes, scales and shifts of a weight (groups, size), with libtorch's
    /// operators.
    pub(super) fn pack_by_operators(weight: &Tensor, layout: Layout, search: bool) -> Result<[Tensor; 3]> {
        let (kind, device) = (weight.f_kind()?, weight.device());
        let Layout { size, groups, byte_rows, .. } = layout;
        let data = Tensor::f_zeros([byte_rows, size], (Kind::Uint8, device))?;
        let [scale, shift] =
            [Tensor::f_empty([groups, 1], (kind, device))?, Tensor::f_empty([groups, 1], (kind, device))?];
        let top = super::divisor(layout.top() as f64, weight)?;
        tiles::for_each(groups, size, |start, count| {
            let tile = weight.f_narrow(0, start, count)?;
            // Which of two zeros is found depends on the order: it is the one without a sign.
            let (low, high) = (tile.f_amin([1], true)?.f_add_scalar(0.0)?, tile.f_amax([1], true)?.f_add_scalar(0.0)?);
            let mut step = high.f_sub(&low)?.f_div(&top)?;
            let mut offset = low.f_neg()?;
            if search {
                (step, offset) = hqq::search(&tile, &step, &offset, layout.top())?;
            }
            // A group of equal values has scale 0 and must not be divided by it.
            let divisor = step.f_where_self(&step.f_ne(0.0)?, &step.f_ones_like()?)?;
            let q = tile.f_add(&offset)?.f_div_(&divisor)?.f_round_()?.f_clamp_(0, layout.top())?;
            let codes = q.f_to_kind(Kind::Uint8)?;
            scale.f_narrow(0, start, count)?.f_copy_(&step)?;
            shift.f_narrow(0, start, count)?.f_copy_(&offset)?;
            for piece in layout.pieces(start, count) {
                let codes = codes.f_narrow(0, piece.first, piece.groups)?;
                let mut bytes = data.f_narrow(0, piece.byte_row, piece.groups)?;
                let _ = bytes.f_bitwise_or_tensor_(&codes.f_bitwise_left_shift_tensor_scalar(piece.bit)?)?;
            }
            Ok(())
        })?;
        Ok([data, scale, shift])
    }

    pub(super) fn assemble(mut parts: Parts) -> Result<Self> {
        let (scheme, device) = (parts.scheme, parts.device());
        let layout = Layout::of(scheme, &parts.sizes);
        let data = parts.take("weight", Kind::Uint8, &[layout.byte_rows, layout.size])?;
        let scale = parts.take("weight.scale", parts.kind, &[layout.groups, 1])?;
        let shift = parts.take("weight.shift", parts.kind, &[layout.groups, 1])?;
        let (sizes, kind) = parts.finish()?;
        Ok(Affine { data, scale, shift, layout, scheme, meta: Meta { sizes, kind, device } })
    }

    /// Writes `groups` groups from `start` on into a (groups, size) tensor of
    /// the weight's dtype.
    fn unpack_groups(&self, start: i64, groups: i64, out: &Tensor) -> Result<()> {
        for piece in self.layout.pieces(start, groups) {
            let bytes = self.data.get().f_narrow(0, piece.byte_row, piece.groups)?;
            let codes = bytes.f_bitwise_right_shift_tensor_scalar(piece.bit)?.f_bitwise_and(self.layout.top())?;
            out.f_narrow(0, piece.first, piece.groups)?.f_copy_(&codes)?;
        }
        let [scale, shift] = [&self.scale, &self.shift].map(SharedTensor::get);
        let mut values = out.shallow_clone();
        let _ = values.f_mul_(&scale.f_narrow(0, start, groups)?)?.f_sub_(&shift.f_narrow(0, start, groups)?)?;
        Ok(())
    }
}

impl PackedWeight for Affine {
    fn scheme(&self) -> Option<Scheme> {
        Some(self.scheme)
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![
            ("weight".into(), self.data.get()),
            ("weight.scale".into(), self.scale.get()),
            ("weight.shift".into(), self.shift.get()),
        ])
    }

    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let (rows, columns) = out.size2()?;
        let of_row = columns / self.layout.size;
        let shape = [rows * of_row, self.layout.size];
        if out.f_kind()? == self.meta.kind {
            return self.unpack_groups(start * of_row, rows * of_row, &out.f_view(shape)?);
        }
        // Values are rounded to the weight's dtype before any other.
        let values = Tensor::f_empty(shape, (self.meta.kind, self.meta.device))?;
        self.unpack_groups(start * of_row, rows * of_row, &values)?;
        out.f_copy_(&values.f_view([rows, columns])?)?;
        Ok(())
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        let Layout { bits, size, byte_rows, .. } = self.layout;
        let of_row = self.shape()[1] / size;
        let first = index.f_mul_scalar(of_row)?.f_unsqueeze(1)?;
        let groups = first.f_add(&Tensor::f_arange(of_row, (Kind::Int64, self.meta.device))?)?.f_view([-1])?;
        let bytes = self.data.get().f_index_select(0, &groups.f_remainder(byte_rows)?)?;
        let bit = groups.f_divide_scalar_mode(byte_rows, "floor")?.f_mul_scalar(bits)?;
        let codes = bytes.f_bitwise_right_shift(&bit.f_to_kind(Kind::Uint8)?.f_unsqueeze(1)?)?;
        let codes = codes.f_bitwise_and(self.layout.top())?.f_to_kind(self.meta.kind)?;
        let [scale, shift] = [&self.scale, &self.shift].map(|t| super::select(&t.get(), &groups));
        let values = codes.f_mul(&scale?)?.f_sub_(&shift?)?;
        out.f_copy_(&values.f_view(out.size().as_slice())?)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_follow_quantos_rule() {
        let found = [96, 128, 144, 160, 192, 224, 256, 320, 352, 384].map(|columns| group_size(columns, 128));
        assert_eq!(found, [96, 128, 144, 32, 96, 32, 128, 64, 32, 128]);
        assert_eq!(group_size(96, 64), 32);
        assert_eq!(group_size(100, 32), 100);
    }

    #[test]
    fn pieces_cover_a_range_once() {
        for (bits, groups) in [(4, 1), (4, 7), (4, 8), (2, 3), (2, 9), (2, 16)] {
            let codes = 8 / bits;
            let layout = Layout { bits, size: 1, groups, byte_rows: (groups + codes - 1) / codes };
            for start in 0..groups {
                for count in 1..=groups - start {
                    let mut seen = vec![false; count as usize];
                    for piece in layout.pieces(start, count) {
                        for i in 0..piece.groups {
                            let group = start + piece.first + i;
                            assert_eq!(piece.byte_row + i + piece.bit / bits * layout.byte_rows, group);
                            assert!(!std::mem::replace(&mut seen[(piece.first + i) as usize], true));
                        }
                    }
                    assert!(seen.into_iter().all(|seen| seen));
                }
            }
        }
    }
}
