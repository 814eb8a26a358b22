//! Products with few rows, straight from the packed bytes: `few.cu`.

use super::form::Form;
use super::size2;
use crate::error::Result;
use crate::ffi::cuda::{Argument, Launch, Launcher, Program, aligned};
use tch::{Kind, Tensor};

/// Rows that the kernels take.
pub(super) const ROWS: i64 = 16;
/// Rows of W that a block of tensor cores takes, and its threads.
const TENSOR_ROWS: i64 = 32;
const TENSOR_THREADS: u32 = 512;
/// Compute capability from which tensor cores multiply both kinds of 16 bits.
const TENSOR_CAPABILITY: u32 = 80;
/// Rows of W and of x that a block of the other kernel takes, and its threads.
const PLAIN_ROWS: [i64; 2] = [8, 8];
const PLAIN_THREADS: u32 = 256;

/// The program for x and y of dtype `kind`, and whether it has the kernels for tensor cores.
pub(super) fn program(form: &Form, kind: Kind, capability: u32) -> Result<(Program, bool)> {
    let mut program = super::program("few", include_str!("../../../csrc/kernels/few.cu"), form, kind)?;
    let tensor_cores = kind == form.kind && kind != Kind::Float && capability >= TENSOR_CAPABILITY;
    if tensor_cores {
        program.macros.push(("TENSOR_CORES", "1"));
    }
    Ok((program, tensor_cores))
}

/// y = x · Wᵀ: x (n, in), y (n, out) of the same dtype.
pub(super) fn product(launcher: &dyn Launcher, form: &Form, x: &Tensor, y: &mut Tensor) -> Result<bool> {
    let ([n, _], kind) = (size2(x)?, x.f_kind()?);
    if !form.units || n > ROWS || !aligned(x) {
        return Ok(false);
    }
    if n == 0 {
        return Ok(true);
    }
    let (program, tensor_cores) = program(form, kind, launcher.capability())?;
    let mut arguments = form.arguments();
    arguments.extend([Argument::Read(x), Argument::Write(y), Argument::Int(n), Argument::Int(form.rows)]);
    let of = |total: i64, part: i64| u32::try_from((total + part - 1) / part).unwrap_or(u32::MAX);
    let (kernel, blocks, threads) = if tensor_cores && form.chunks() {
        let kernel = if n <= 8 { "product_of_8" } else { "product_of_16" };
        (kernel, [of(form.rows, TENSOR_ROWS), 1], TENSOR_THREADS)
    } else {
        ("product_by_rows", [of(form.rows, PLAIN_ROWS[0]), of(n, PLAIN_ROWS[1])], PLAIN_THREADS)
    };
    launcher.launch(&Launch { program: &program, kernel, blocks, threads, arguments: &arguments })?;
    Ok(true)
}
