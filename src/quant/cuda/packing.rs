//! Packing on CUDA devices: the counterpart of `quant::packing`, with the same
//! bytes.
//!
//! Each function takes a contiguous, finite weight in the shape that its
//! namesake there takes.

use super::form::type_name;
use crate::error::Result;
use crate::ffi::cuda::{Argument, Launch, Launcher, Program};
use crate::quant::kernels::packing::GroupLayout;
use crate::quant::{Fp8Format, largest_scale, smallest_normal};
use tch::{Kind, Tensor};

/// As `pack.cu` says.
const THREADS: u32 = 256;
/// Warps of a block, each of which packs a block of values.
const WARPS: i64 = 8;

/// How kernels are compiled for a weight; the code is that of `nf4` or `fp4`.
fn program(weight: &Tensor, code: &'static str) -> Result<Program> {
    let macros = vec![("W", type_name(weight.f_kind()?)?), ("CODE", code)];
    Ok(Program { name: "pack", source: include_str!("../../../csrc/kernels/pack.cu"), macros })
}

/// Starts a kernel of the program whose blocks take `parts` parts of the work.
fn start(
    launcher: &dyn Launcher,
    program: &Program,
    kernel: &'static str,
    parts: i64,
    arguments: &[Argument],
) -> Result<()> {
    let blocks = u32::try_from(parts).unwrap_or(u32::MAX).clamp(1, 16 * launcher.processors());
    launcher.launch(&Launch { program, kernel, blocks: [blocks, 1], threads: THREADS, arguments })
}

/// Codes (rows, columns) and scales (rows, 1) of a weight (rows, columns).
fn by_rows(
    launcher: &dyn Launcher,
    weight: &Tensor,
    kernel: &'static str,
    [codes, scales]: [Kind; 2],
    [smallest, largest]: [f64; 2],
) -> Result<[Tensor; 2]> {
    let ((rows, columns), device) = (weight.size2()?, weight.device());
    let data = Tensor::f_empty([rows, columns], (codes, device))?;
    let mut scale = Tensor::f_empty([rows, 1], (scales, device))?;
    let mut bytes = data.f_view_dtype(Kind::Uint8)?;
    let arguments = [
        Argument::Read(weight),
        Argument::Write(&mut bytes),
        Argument::Write(&mut scale),
        Argument::Int(rows),
        Argument::Int(columns),
        Argument::Real(smallest),
        Argument::Real(largest),
    ];
    start(launcher, &program(weight, "Nf4")?, kernel, rows, &arguments)?;
    Ok([data, scale])
}

pub(in crate::quant) fn int8(launcher: &dyn Launcher, weight: &Tensor) -> Result<[Tensor; 2]> {
    let kind = weight.f_kind()?;
    by_rows(launcher, weight, "pack_int8", [Kind::Int8, kind], [0.0, largest_scale(kind, 127.0)])
}

pub(in crate::quant) fn llm_int8(launcher: &dyn Launcher, weight: &Tensor) -> Result<[Tensor; 2]> {
    by_rows(launcher, weight, "pack_llm_int8", [Kind::Int8, Kind::Float], [0.0, 0.0])
}

pub(in crate::quant) fn fp8(launcher: &dyn Launcher, weight: &Tensor, format: Fp8Format) -> Result<[Tensor; 2]> {
    let kind = weight.f_kind()?;
    let kernel = match format {
        Fp8Format::E4m3 => "pack_e4m3",
        Fp8Format::E5m2 => "pack_e5m2",
    };
    let limits = [smallest_normal(kind), largest_scale(kind, format.largest())];
    by_rows(launcher, weight, kernel, [format.kind(), kind], limits)
}

/// Without the search for scale and shift.
pub(in crate::quant) fn groups(launcher: &dyn Launcher, weight: &Tensor, layout: GroupLayout) -> Result<[Tensor; 3]> {
    let ((groups, size), kind, device) = (weight.size2()?, weight.f_kind()?, weight.device());
    let byte_rows = layout.byte_rows as i64;
    let mut data = Tensor::f_empty([byte_rows, size], (Kind::Uint8, device))?;
    let mut scale = Tensor::f_empty([groups, 1], (kind, device))?;
    let mut shift = Tensor::f_empty([groups, 1], (kind, device))?;
    let arguments = [
        Argument::Read(weight),
        Argument::Write(&mut data),
        Argument::Write(&mut scale),
        Argument::Write(&mut shift),
        Argument::Int(groups),
        Argument::Int(size),
        Argument::Int(byte_rows),
        Argument::Int(layout.bits.into()),
    ];
    start(launcher, &program(weight, "Nf4")?, "pack_groups", byte_rows, &arguments)?;
    Ok([data, scale, shift])
}

/// By the values of the format's name in `formats.cuh`.
pub(in crate::quant) fn codes(
    launcher: &dyn Launcher,
    weight: &Tensor,
    code: &'static str,
    block: i64,
) -> Result<[Tensor; 2]> {
    let (len, device) = (weight.size1()?, weight.device());
    let blocks = (len + block - 1) / block;
    let mut data = Tensor::f_empty([(len + 1) / 2], (Kind::Uint8, device))?;
    let mut absmax = Tensor::f_empty([blocks], (Kind::Float, device))?;
    let arguments = [
        Argument::Read(weight),
        Argument::Write(&mut data),
        Argument::Write(&mut absmax),
        Argument::Int(len),
        Argument::Int(block),
    ];
    start(launcher, &program(weight, code)?, "pack_codes", (blocks + WARPS - 1) / WARPS, &arguments)?;
    Ok([data, absmax])
}

pub(in crate::quant) fn mxfp4(launcher: &dyn Launcher, weight: &Tensor) -> Result<[Tensor; 2]> {
    let ((rows, columns), device) = (weight.size2()?, weight.device());
    let blocks = (columns + 31) / 32;
    let mut data = Tensor::f_empty([rows, (columns + 1) / 2], (Kind::Uint8, device))?;
    let mut scale = Tensor::f_empty([rows, blocks], (Kind::Uint8, device))?;
    let arguments = [
        Argument::Read(weight),
        Argument::Write(&mut data),
        Argument::Write(&mut scale),
        Argument::Int(rows),
        Argument::Int(columns),
    ];
    start(launcher, &program(weight, "Nf4")?, "pack_mxfp4", (rows * blocks + WARPS - 1) / WARPS, &arguments)?;
    Ok([data, scale])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::bytes::tensor_bytes;
    use crate::ffi::cuda::emulation::Emulation;
    use crate::ffi::cuda::nvrtc::assert_compiles;
    use crate::quant::Scheme;
    use crate::quant::affine::Layout;
    use crate::quant::codebook::{FP4, NF4};
    use crate::quant::packing::{self, tests::weights};

    fn assert_same(found: &[Tensor], expected: &[Tensor], what: &str) {
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!((found.size(), found.kind()), (expected.size(), expected.kind()), "{what}");
            assert!(
                tensor_bytes(found).unwrap() == tensor_bytes(expected).unwrap(),
                "{what}: {found} instead of {expected}"
            );
        }
    }

    // The CPU's kernels, which are tested against libtorch's operators, define the bytes.
    #[test]
    fn kernels_pack_the_same_bytes_as_those_of_the_cpu() {
        let on = &Emulation;
        // Threads that wait for each other are slow to emulate.
        for weight in weights().into_iter().filter(|weight| weight.numel() < 5_000) {
            let (kind, shape) = (weight.kind(), weight.size());
            let what = |scheme: &str| format!("{scheme} of {kind:?} {shape:?}");
            let expected = packing::int8(&weight).unwrap().unwrap();
            assert_same(&int8(on, &weight).unwrap(), &expected, &what("int8"));
            let expected = packing::llm_int8(&weight).unwrap().unwrap();
            assert_same(&llm_int8(on, &weight).unwrap(), &expected, &what("llm_int8"));
            for format in [Fp8Format::E4m3, Fp8Format::E5m2] {
                let expected = packing::fp8(&weight, format).unwrap().unwrap();
                assert_same(&fp8(on, &weight, format).unwrap(), &expected, &what("fp8"));
            }
            for scheme in [Scheme::INT4, Scheme::INT2, Scheme::Int4 { group_size: 32, hqq: false }] {
                let layout = Layout::of(scheme, &shape);
                let grouped = weight.view([layout.groups, layout.size]);
                let expected = packing::groups(&grouped, layout.for_kernel(false)).unwrap().unwrap();
                let found = groups(on, &grouped, layout.for_kernel(false)).unwrap();
                assert_same(&found, &expected, &what(&scheme.to_string()));
            }
            let flat = weight.view([-1]);
            for (code, block) in [(&NF4, 64), (&FP4, 64), (&NF4, 256), (&FP4, 32)] {
                let code = code.sorted();
                let expected = packing::codes(&flat, code, block).unwrap().unwrap();
                assert_same(&codes(on, &flat, code.name, block).unwrap(), &expected, &what(code.name));
            }
            let expected = packing::mxfp4(&weight).unwrap().unwrap();
            assert_same(&mxfp4(on, &weight).unwrap(), &expected, &what("mxfp4"));
        }
    }
    #[test]
    fn programs_compile_without_warnings_or_spills() {
        for capability in [80, 90, 120] {
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                let weight = Tensor::zeros([2, 2], (kind, tch::Device::Cpu));
                for code in [&NF4, &FP4] {
                    assert_compiles(&program(&weight, code.sorted().name).unwrap(), capability);
                }
            }
        }
    }
}
