//! A convolution with a packed weight, of which one tile is dense at a time.
//!
//! Forward, a tile is a range of output channels, which are rows of the weight.
//! Backward it is a range of input channels, columns of the weight, so that
//! each element of dX is the result of one product; where only rows can be
//! unpacked, the parts of dX are added up in f32.

use super::frozen::convolve;
use super::op::{self, Op};
use super::tilewise::narrow;
use super::{PackedWeight, tiles};
use crate::error::{Error, Result};
use crate::ffi::hook::ConvolutionForm;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Some output channels, all of one group or those of whole groups.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slice {
    rows: Range<i64>,
    /// The input channels that they see.
    channels: Range<i64>,
    groups: i64,
}

/// Cuts a weight (out, in / groups · kernel), whose groups see `seen` input
/// channels each, into slices of at most one tile (or one row).
fn slices([out, inn]: [i64; 2], seen: i64, groups: i64, device: Device) -> Vec<Slice> {
    let (limit, of_group) = (tiles::rows(device, inn), (out / groups).max(1));
    let mut slices = Vec::new();
    let mut row = 0;
    while row < out {
        let group = row / of_group;
        let (whole, rows) = match limit / of_group {
            0 => (1, limit.min((group + 1) * of_group - row)),
            fit => (fit.min(groups - group), fit.min(groups - group) * of_group),
        };
        slices.push(Slice { rows: row..row + rows, channels: group * seen..(group + whole) * seen, groups: whole });
        row += rows;
    }
    slices
}

/// A tile (rows, columns) as (rows, columns / kernel, kernel…).
fn as_kernels(tile: &Tensor, sizes: &[i64]) -> Result<Tensor> {
    let mut shape = vec![tile.size2()?.0, -1];
    shape.extend_from_slice(sizes.get(2..).unwrap_or_default());
    Ok(tile.f_view(shape.as_slice())?)
}

/// A dense weight, if it is of the products' dtype: another one is cast tile by
/// tile.
fn dense(weight: &dyn PackedWeight, kind: Kind) -> Option<Tensor> {
    weight.as_dense().filter(|_| weight.kind() == kind)
}

/// x (n, in, size…) with a weight (out, in / groups, kernel…), in the dtype of x.
pub(super) fn apply(
    weight: &dyn PackedWeight,
    x: &Tensor,
    bias: Option<&Tensor>,
    form: &ConvolutionForm,
) -> Result<Tensor> {
    let kind = x.f_kind()?;
    if let Some(dense) = dense(weight, kind) {
        return convolve(x, &dense, bias, form);
    }
    let ([out, inn], seen) = (weight.shape(), x.size().get(1).copied().unwrap_or_default() / form.groups);
    let slices = slices([out, inn], seen, form.groups, x.device());
    let mut y: Option<Tensor> = None;
    for slice in &slices {
        let form = ConvolutionForm { groups: slice.groups, ..form.clone() };
        let bias = bias.map(|bias| narrow(bias, 0, &slice.rows)).transpose()?;
        let part = tiles::with_scratch(slice.rows.end - slice.rows.start, inn, kind, x.device(), |tile| {
            weight.unpack_rows(slice.rows.start, tile)?;
            convolve(&narrow(x, 1, &slice.channels)?, &as_kernels(tile, weight.sizes())?, bias.as_ref(), &form)
        })?;
        if slices.len() == 1 {
            return Ok(part);
        }
        let y = match &mut y {
            Some(y) => y,
            none => none.insert(Tensor::f_empty(with_channels(&part.size(), out), (kind, x.device()))?),
        };
        narrow(y, 1, &slice.rows)?.f_copy_(&part)?;
    }
    y.ok_or_else(|| Error::config("groups", "a weight of at least one output channel", out))
}

/// The sizes (n, channels, size…) with so many channels.
fn with_channels(sizes: &[i64], channels: i64) -> Vec<i64> {
    let mut sizes = sizes.to_vec();
    if let Some(size) = sizes.get_mut(1) {
        *size = channels;
    }
    sizes
}

/// dX of sizes (n, in, size…) for dY (n, out, size…), in the dtype of dY.
pub(super) fn input_gradient(
    weight: &dyn PackedWeight,
    grad: &Tensor,
    sizes: &[i64],
    form: &ConvolutionForm,
) -> Result<Tensor> {
    let (kind, device, [out, inn]) = (grad.f_kind()?, grad.device(), weight.shape());
    if let Some(dense) = dense(weight, kind) {
        return adjoint(grad, &dense, sizes, form);
    }
    let seen = sizes.get(1).copied().unwrap_or_default() / form.groups;
    let slices = slices([out, inn], seen, form.groups, device);
    let part = |slice: &Slice, tile: &Tensor| {
        let form = ConvolutionForm { groups: slice.groups, ..form.clone() };
        let (grad, tile) = (narrow(grad, 1, &slice.rows)?, as_kernels(tile, weight.sizes())?);
        adjoint(&grad, &tile, &with_channels(sizes, slice.channels.end - slice.channels.start), &form)
    };
    let of_rows = |slice: &Slice| {
        tiles::with_scratch(slice.rows.end - slice.rows.start, inn, kind, device, |tile| {
            weight.unpack_rows(slice.rows.start, tile)?;
            part(slice, tile)
        })
    };
    let dx = Tensor::f_empty(sizes, (kind, device))?;
    let of_group = out / form.groups;
    if slices.iter().all(|slice| slice.rows.end - slice.rows.start == slice.groups * of_group) {
        // No two see the same input channels.
        for slice in &slices {
            narrow(&dx, 1, &slice.channels)?.f_copy_(&of_rows(slice)?)?;
        }
        return Ok(dx);
    }
    let kernel = inn / seen.max(1);
    let mut unpacked = true;
    for group in 0..form.groups {
        let rows = group * of_group..(group + 1) * of_group;
        tiles::for_each_of(tiles::rows(device, of_group * kernel), seen, |start, count| {
            if !unpacked {
                return Ok(());
            }
            let channels = group * seen + start..group * seen + start + count;
            let slice = Slice { rows: rows.clone(), channels, groups: 1 };
            tiles::with_scratch(of_group, count * kernel, kind, device, |tile| {
                let columns = start * kernel..(start + count) * kernel;
                unpacked = op::run(weight, Op::Unpack { row: rows.start, columns, out: tile })?;
                if unpacked {
                    narrow(&dx, 1, &slice.channels)?.f_copy_(&part(&slice, tile)?)?;
                }
                Ok(())
            })
        })?;
    }
    if unpacked {
        return Ok(dx);
    }
    let sum_kind = if kind == Kind::Double { kind } else { Kind::Float };
    let sum = Tensor::f_zeros(sizes, (sum_kind, device))?;
    for slice in &slices {
        let _ = narrow(&sum, 1, &slice.channels)?.f_add_(&of_rows(slice)?)?;
    }
    Ok(sum.f_to_kind(kind)?)
}

/// The transposed convolution of dY with a dense weight. Where the stride
/// doesn't divide the input, the rest is its output padding.
fn adjoint(grad: &Tensor, weight: &Tensor, sizes: &[i64], form: &ConvolutionForm) -> Result<Tensor> {
    let ConvolutionForm { stride, padding, dilation, groups } = form;
    let (size, kernel, out) = (&sizes[2..], &weight.size()[2..], &grad.size()[2..]);
    let rest: Vec<i64> = (0..stride.len())
        .map(|i| size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 - (out[i] - 1) * stride[i])
        .collect();
    let dx = Tensor::f_convolution(
        grad,
        weight,
        None::<&Tensor>,
        stride.as_slice(),
        padding.as_slice(),
        dilation.as_slice(),
        true,
        rest.as_slice(),
        *groups,
    )?;
    Ok(dx.f_contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Dense, PackedWeight, Scheme, quantize};

    fn random(sizes: &[i64]) -> Tensor {
        Tensor::randn(sizes, (Kind::Float, Device::Cpu))
    }

    fn form(dims: usize, groups: i64) -> ConvolutionForm {
        ConvolutionForm { stride: vec![2; dims], padding: vec![1; dims], dilation: vec![1; dims], groups }
    }

    fn assert_near(found: &Tensor, expected: &Tensor, bound: f64, what: &str) {
        assert_eq!(found.size(), expected.size(), "{what}");
        let [found, expected] = [found, expected].map(|t| t.to_kind(Kind::Double));
        let error = f64::try_from((found - &expected).norm() / expected.norm()).unwrap();
        assert!(error < bound, "{what}: {error}");
    }

    // Weights of more than one tile, in one group, in many small ones, and in
    // two large ones; and one with a scheme that has no kernel.
    #[test]
    fn tiles_convolve_as_the_whole_weight_does() {
        for (sizes, groups, scheme) in [
            (vec![300, 400, 3, 3], 1, Scheme::NF4),
            (vec![300, 4000, 1], 1, Scheme::INT4),
            (vec![1200, 100, 3, 3], 12, Scheme::Int8),
            (vec![600, 400, 3, 3], 2, Scheme::LlmInt8),
            (vec![600, 400, 3, 3], 2, Scheme::Bf16),
            (vec![30, 20, 3, 3, 3], 5, Scheme::FP8),
        ] {
            let dims = sizes.len() - 2;
            let (form, weight) = (form(dims, groups), random(&sizes));
            let packed = quantize("conv.weight", &weight, scheme).unwrap();
            let x = random(&[&[2, sizes[1] * groups], vec![6; dims].as_slice()].concat());
            let bias = random(&[sizes[0]]);
            for (kind, bound) in [(Kind::Float, 1e-5), (Kind::BFloat16, 5e-3)] {
                let what = format!("{sizes:?} {groups} {scheme} {kind:?}");
                let dense = packed.dequantize(kind).unwrap();
                let dense: Box<dyn PackedWeight> = Box::new(Dense::new(dense).unwrap());
                let (x, bias) = (x.to_kind(kind), bias.to_kind(kind));
                let y = apply(packed.as_ref(), &x, Some(&bias), &form).unwrap();
                assert_near(&y, &apply(dense.as_ref(), &x, Some(&bias), &form).unwrap(), bound, &what);
                let dx = input_gradient(packed.as_ref(), &y, &x.size(), &form).unwrap();
                assert_near(&dx, &input_gradient(dense.as_ref(), &y, &x.size(), &form).unwrap(), bound, &what);
            }
        }
    }

    #[test]
    fn slices_cover_a_weight_once() {
        for ([out, inn], seen, groups) in
            [([7, 1 << 19], 10, 1), ([64, 1 << 18], 4, 4), ([64, 1 << 14], 4, 16), ([6, 1 << 21], 3, 2), ([5, 5], 5, 1)]
        {
            let (mut row, of_group) = (0, out / groups);
            for slice in slices([out, inn], seen, groups, Device::Cpu) {
                let rows = slice.rows.end - slice.rows.start;
                assert_eq!(slice.rows.start, row);
                assert!(rows == 1 || rows * inn <= 1 << 20);
                assert_eq!(slice.channels, row / of_group * seen..(row / of_group + slice.groups) * seen);
                assert!(if slice.groups == 1 { rows <= of_group } else { rows == slice.groups * of_group });
                row += rows;
            }
            assert_eq!(row, out);
        }
    }
}
