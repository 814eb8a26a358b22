//! The step of `AdamW8bit` as one kernel, on CUDA devices.

use super::blockwise::Code;
use crate::error::Result;
use crate::ffi::cuda::{Argument, Launch, Launcher, Program};
use tch::{Kind, Tensor};

/// As `adamw8bit.cu` says.
const THREADS: u32 = 256;

/// A moment in 8 bits, to be changed in place.
#[derive(Debug)]
pub(super) struct Moment<'a> {
    pub(super) code: &'a Code,
    pub(super) codes: &'a mut Tensor,
    pub(super) scales: &'a mut Tensor,
}

/// The factors of one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Factors {
    pub(super) betas: [f64; 2],
    /// What the parameter is multiplied by first.
    pub(super) keep: f64,
    /// -lr over the correction of the first moment.
    pub(super) rate: f64,
    /// The root of the correction of the second moment.
    pub(super) correction: f64,
    pub(super) eps: f64,
}

/// Whether the kernel can take this parameter.
pub(super) fn fits(param: &Tensor, grad: &Tensor) -> Result<bool> {
    let kind = param.f_kind()?;
    let float = matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half);
    Ok(float && grad.f_kind()? == kind && grad.is_contiguous() && param.is_contiguous())
}

/// One step of one parameter, of a float dtype and with a gradient of that.
pub(super) fn step(
    launcher: &dyn Launcher,
    param: &mut Tensor,
    grad: &Tensor,
    [first, second]: [Moment; 2],
    factors: Factors,
) -> Result<()> {
    let dtype = match param.f_kind()? {
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "f32",
    };
    let source = include_str!("../../../csrc/kernels/adamw8bit.cu");
    let program = Program { name: "adamw8bit", source, macros: vec![("T", dtype)] };
    let (count, [beta1, beta2]) = (param.numel() as i64, factors.betas);
    let tables = [first.code, second.code].map(|code| [code.values(), code.midpoints()]);
    let [[first_values, first_middles], [second_values, second_middles]] = &tables;
    let arguments = [
        Argument::Write(param),
        Argument::Read(grad),
        Argument::Write(first.codes),
        Argument::Write(first.scales),
        Argument::Write(second.codes),
        Argument::Write(second.scales),
        Argument::Read(first_values),
        Argument::Read(first_middles),
        Argument::Read(second_values),
        Argument::Read(second_middles),
        Argument::Int(count),
        Argument::Real(beta1),
        Argument::Real(1.0 - beta1),
        Argument::Real(beta2),
        Argument::Real(1.0 - beta2),
        Argument::Real(factors.keep),
        Argument::Real(factors.rate),
        Argument::Real(factors.correction),
        Argument::Real(factors.eps),
    ];
    let blocks = (count + i64::from(THREADS) - 1) / i64::from(THREADS);
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).clamp(1, 8 * launcher.processors());
    launcher.launch(&Launch {
        program: &program,
        kernel: "adamw8bit",
        blocks: [blocks, 1],
        threads: THREADS,
        arguments: &arguments,
    })
}
