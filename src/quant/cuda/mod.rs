//! Which kernel serves which scheme on CUDA devices, and how it is started.
//!
//! The counterpart of `cpu`, with the same values to the bit. A kernel that can't
//! be compiled or started is a warning, and libtorch's operators serve instead.

mod few;
mod form;
pub(super) mod packing;
#[cfg(test)]
mod tests;

use super::PackedWeight;
use super::op::Op;
use crate::error::Result;
use crate::ffi::cuda::{Argument, Launch, Launcher, Program, aligned, by_kernel};
use form::{Form, type_name};
use tch::{Kind, Tensor};

/// Does what is asked of a weight on a CUDA device, and answers whether a kernel
/// could.
pub(super) fn run(weight: &dyn PackedWeight, op: Op) -> Result<bool> {
    Ok(by_kernel(weight.device(), |launcher| serve(launcher, weight, op))?.unwrap_or(false))
}

fn serve(launcher: &dyn Launcher, weight: &dyn PackedWeight, op: Op) -> Result<bool> {
    let Some(form) = Form::of(weight)? else { return Ok(false) };
    match op {
        Op::Unpack { row, columns, out } => {
            let [rows, width] = size2(out)?;
            let rectangle = Rectangle { index: None, row, rows, column: columns.start, width };
            unpack(launcher, &form, &rectangle, out)?;
        }
        Op::UnpackIndex { index, out } => {
            let [rows, width] = size2(out)?;
            unpack(launcher, &form, &Rectangle { index: Some(index), row: 0, rows, column: 0, width }, out)?;
        }
        Op::Product { x, y } => return few::product(launcher, &form, x, y),
        Op::ProductTransposed { g, dx } => return few::transposed(launcher, &form, g, dx),
    }
    Ok(true)
}

fn size2(tensor: &Tensor) -> Result<[i64; 2]> {
    let (rows, columns) = tensor.size2()?;
    Ok([rows, columns])
}

/// What is to be unpacked.
struct Rectangle<'a> {
    /// Rows that need not be neighbours, instead of those from `row` on.
    index: Option<&'a Tensor>,
    row: i64,
    rows: i64,
    column: i64,
    width: i64,
}

/// Elements that a thread of `unpack.cu` has under way, and its threads.
const UNPACK_ELEMENTS: i64 = 32;
const UNPACK_THREADS: u32 = 256;

/// A program of this form with a result or activations of dtype `kind`.
fn program(name: &'static str, source: &'static str, form: &Form, kind: Kind) -> Result<Program> {
    let macros = vec![("FORMAT", form.format), ("W", type_name(form.kind)?), ("T", type_name(kind)?)];
    Ok(Program { name, source, macros })
}

fn unpack_program(form: &Form, kind: Kind) -> Result<Program> {
    program("unpack", include_str!("../../../csrc/kernels/unpack.cu"), form, kind)
}

fn unpack(launcher: &dyn Launcher, form: &Form, rectangle: &Rectangle, out: &mut Tensor) -> Result<()> {
    let Rectangle { index, row, rows, column, width } = *rectangle;
    if rows == 0 || width == 0 {
        return Ok(());
    }
    let program = unpack_program(form, out.f_kind()?)?;
    let whole = |n: i64| n % 8 == 0;
    let units = form.units && whole(column) && whole(width) && aligned(out) && rows * width / 8 < 1 << 31;
    let per_thread = if units { UNPACK_ELEMENTS } else { 1 };
    let mut arguments = form.arguments();
    arguments.extend([
        Argument::Write(out),
        index.map_or(Argument::Absent, Argument::Read),
        Argument::Int(row),
        Argument::Int(rows),
        Argument::Int(form.rows),
        Argument::Int(column),
        Argument::Int(width),
    ]);
    launcher.launch(&Launch {
        program: &program,
        kernel: if units { "unpack_units" } else { "unpack_elements" },
        blocks: [blocks(launcher, rows * width, per_thread * i64::from(UNPACK_THREADS)), 1],
        threads: UNPACK_THREADS,
        arguments: &arguments,
    })
}

/// Blocks for so many elements, `part` each: no more than fill the device, whose
/// kernels go round.
fn blocks(launcher: &dyn Launcher, elements: i64, part: i64) -> u32 {
    let wanted = (elements + part - 1) / part;
    u32::try_from(wanted).unwrap_or(u32::MAX).clamp(1, 8 * launcher.processors())
}
