//! Products with few rows, straight from the packed bytes: `few.cu` and
//! `few_transposed.cu`.

use super::form::Form;
use super::size2;
use crate::error::Result;
use crate::ffi::cuda::{Argument, Launch, Launcher, Program, aligned};
use tch::{Kind, Tensor};

/// Rows that the kernels take.
pub(super) const ROWS: i64 = 16;
/// Compute capability from which tensor cores multiply both kinds of 16 bits.
const TENSOR_CAPABILITY: u32 = 80;

/// The direction of a product.
#[derive(Debug, Clone, Copy)]
pub(super) enum Direction {
    /// y = x · Wᵀ
    Forward,
    /// dX = dY · W
    Transposed,
}

/// The program for activations of dtype `kind`, and whether it has the kernels for tensor cores.
pub(super) fn program(form: &Form, kind: Kind, capability: u32, direction: Direction) -> Result<(Program, bool)> {
    let (name, source) = match direction {
        Direction::Forward => ("few", include_str!("../../../csrc/kernels/few.cu")),
        Direction::Transposed => ("few_transposed", include_str!("../../../csrc/kernels/few_transposed.cu")),
    };
    let mut program = super::program(name, source, form, kind)?;
    let tensor_cores = kind == form.kind && kind != Kind::Float && capability >= TENSOR_CAPABILITY;
    if tensor_cores {
        program.macros.push(("TENSOR_CORES", "1"));
    }
    Ok((program, tensor_cores))
}

/// How many parts of this size there are.
fn parts(total: i64, part: i64) -> i64 {
    (total + part - 1) / part
}

fn blocks(count: i64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Rows of W that a block of tensor cores takes, and its threads.
const TENSOR_ROWS: i64 = 32;
const TENSOR_THREADS: u32 = 512;
/// Rows of W and of x that a block of the other kernel takes, and its threads.
const PLAIN_ROWS: [i64; 2] = [8, 8];
const PLAIN_THREADS: u32 = 256;

/// y = x · Wᵀ: x (n, in), y (n, out) of the same dtype.
pub(super) fn product(launcher: &dyn Launcher, form: &Form, x: &Tensor, y: &mut Tensor) -> Result<bool> {
    let ([n, _], kind) = (size2(x)?, x.f_kind()?);
    if !form.units || n > ROWS || !aligned(x) {
        return Ok(false);
    }
    if n == 0 {
        return Ok(true);
    }
    let (program, tensor_cores) = program(form, kind, launcher.capability(), Direction::Forward)?;
    let mut arguments = form.arguments();
    arguments.extend([Argument::Read(x), Argument::Write(y), Argument::Int(n), Argument::Int(form.rows)]);
    let of = |total, part| blocks(parts(total, part));
    let (kernel, blocks, threads) = if tensor_cores && form.chunks() {
        let kernel = if n <= 8 { "product_of_8" } else { "product_of_16" };
        (kernel, [of(form.rows, TENSOR_ROWS), 1], TENSOR_THREADS)
    } else {
        ("product_by_rows", [of(form.rows, PLAIN_ROWS[0]), of(n, PLAIN_ROWS[1])], PLAIN_THREADS)
    };
    launcher.launch(&Launch { program: &program, kernel, blocks, threads, arguments: &arguments })?;
    Ok(true)
}

/// Blocks that fill any card, whatever the card, so that sums don't depend on it;
/// and the rows of W that all warps of a block take at a time.
const TRANSPOSED_BLOCKS: i64 = 256;
const TRANSPOSED_ROWS: i64 = 128;
/// Threads of a block, and rows of dY that it takes without tensor cores.
const TRANSPOSED_THREADS: u32 = 256;
const TRANSPOSED_PLAIN: i64 = 8;

/// dX = g · W: g (n, out), dx (n, in) of the same dtype.
pub(super) fn transposed(launcher: &dyn Launcher, form: &Form, g: &Tensor, dx: &mut Tensor) -> Result<bool> {
    let ([n, _], kind) = (size2(g)?, g.f_kind()?);
    if !form.units || n > ROWS || !aligned(g) {
        return Ok(false);
    }
    if n == 0 {
        return Ok(true);
    }
    let (program, tensor_cores) = program(form, kind, launcher.capability(), Direction::Transposed)?;
    let (kernel, columns, groups) = match form.half_chunk() {
        Some(chunk) if tensor_cores => (if n <= 8 { "transposed_of_8" } else { "transposed_of_16" }, 8 * chunk, 1),
        _ => ("transposed_by_rows", i64::from(TRANSPOSED_THREADS), parts(n, TRANSPOSED_PLAIN)),
    };
    let tiles = parts(form.inn, columns);
    let wanted = (TRANSPOSED_BLOCKS / tiles).max(1);
    let part = parts(parts(form.rows, wanted), TRANSPOSED_ROWS) * TRANSPOSED_ROWS;
    let count = parts(form.rows, part);
    let mut sums = Tensor::f_empty([count, n, form.inn], (Kind::Float, g.device()))?;
    let mut arguments = form.arguments();
    arguments.extend([
        Argument::Read(g),
        Argument::Write(&mut sums),
        Argument::Int(n),
        Argument::Int(form.rows),
        Argument::Int(part),
    ]);
    launcher.launch(&Launch {
        program: &program,
        kernel,
        blocks: [blocks(tiles), blocks(count * groups)],
        threads: TRANSPOSED_THREADS,
        arguments: &arguments,
    })?;
    let total = n * form.inn;
    launcher.launch(&Launch {
        program: &program,
        kernel: "add_parts",
        blocks: [super::blocks(launcher, total, i64::from(TRANSPOSED_THREADS)), 1],
        threads: TRANSPOSED_THREADS,
        arguments: &[Argument::Read(&sums), Argument::Write(dx), Argument::Int(count), Argument::Int(total)],
    })?;
    Ok(true)
}
