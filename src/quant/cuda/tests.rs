//! The CUDA kernels without a card: their source runs on the CPU, and compiles
//! for the architectures that it is meant for.

use super::*;
use crate::ffi::cuda::emulation::Emulation;
use crate::ffi::cuda::nvrtc::{Nvrtc, assert_compiles};
use crate::quant::Scheme;
use crate::quant::cpu::tests::{packed, unpacks_the_same_bits};
use tch::Device;

// The CPU's kernels, which are tested against libtorch's operators, define the values.
#[test]
fn kernels_unpack_the_same_bits_as_those_of_the_cpu() {
    let by_cpu = |packed: &dyn PackedWeight, kind| packed.dequantize(kind).unwrap();
    unpacks_the_same_bits(by_cpu, |packed, op| serve(&Emulation, packed, op));
}

#[test]
fn rows_that_a_weight_does_not_have_come_out_as_nan() {
    for shape in [[6, 256], [5, 37]] {
        let packed = packed(shape, Kind::Float).swap_remove(0);
        let mut out = Tensor::zeros([3, shape[1]], (Kind::Float, Device::Cpu));
        let op = Op::UnpackIndex { index: &Tensor::from_slice(&[-1, 2, shape[0]]), out: &mut out };
        assert!(serve(&Emulation, packed.as_ref(), op).unwrap());
        let rows = Vec::<bool>::try_from(out.isnan().all_dim(1, false)).unwrap();
        assert_eq!(
            (rows, i64::try_from(out.isnan().sum(Kind::Int64)).unwrap()),
            (vec![true, false, true], 2 * shape[1])
        );
    }
}

#[test]
fn few_rows_multiply() {
    // Rows that are whole steps of the tensor cores, one and several for each
    // warp, and others; and more or fewer rows than fill a block.
    let shapes = [
        ([70, 256], Kind::BFloat16),
        ([33, 4224], Kind::BFloat16),
        ([5, 512], Kind::Half),
        ([33, 72], Kind::BFloat16),
        ([70, 256], Kind::Float),
    ];
    for (shape, kind) in shapes {
        let [out, inn] = shape;
        for packed in packed(shape, kind) {
            let scheme = packed.scheme().unwrap();
            let dense = packed.dequantize(Kind::Float).unwrap().to_kind(Kind::Double);
            for n in [1, 2, 7, 8, 9, 16] {
                for x_kind in [Kind::Float, Kind::BFloat16, kind] {
                    let what = format!("{scheme} {kind:?} {shape:?}, {n} rows of {x_kind:?}");
                    let x = Tensor::randn([n, inn], (Kind::Float, Device::Cpu)).to_kind(x_kind);
                    let mut y = Tensor::full([n, out], f64::NAN, (x_kind, Device::Cpu));
                    let op = Op::Product { x: &x, y: &mut y };
                    if !serve(&Emulation, packed.as_ref(), op).unwrap() {
                        // Blocks of no whole units.
                        assert!(shape[1] == 72 && matches!(scheme, Scheme::Gptq { .. } | Scheme::Nf4 { .. }), "{what}");
                        continue;
                    }
                    let x = x.to_kind(Kind::Double);
                    let (expected, magnitude) = (x.mm(&dense.tr()), x.abs().mm(&dense.tr().abs()));
                    // The rounding of f32 sums, and of the result.
                    let result = match x_kind {
                        Kind::Float => 0.0,
                        Kind::Half => 0.5f64.powi(11),
                        _ => 0.5f64.powi(8),
                    };
                    let bound = magnitude * (inn as f64 * 0.5f64.powi(24)) + expected.abs() * result + 1e-7;
                    let within = (y.to_kind(Kind::Double) - expected).abs().le_tensor(&bound).all();
                    assert!(i64::try_from(within).unwrap() == 1, "{what}");
                }
            }
        }
    }
}

/// Programs of every scheme's format: unpacking to and multiplying with each dtype.
fn programs() -> Vec<Program> {
    let mut programs: Vec<Program> = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for packed in packed([4, 128], kind) {
            let form = Form::of(packed.as_ref()).unwrap().unwrap();
            for other in [Kind::Float, Kind::BFloat16, Kind::Half] {
                let unpack = unpack_program(&form, other).unwrap();
                programs.extend([unpack, few::program(&form, other, 80).unwrap().0]);
            }
        }
    }
    let mut seen = std::collections::HashSet::new();
    programs.retain(|program| seen.insert(program.clone()));
    programs
}

// No card or driver is needed to compile. Every program for one architecture,
// and those of the commonest dtypes for the others.
#[test]
fn programs_compile_without_warnings_or_spills() {
    let programs = programs();
    assert!(programs.len() > 150, "{}", programs.len());
    for program in &programs {
        let common = program.macros.contains(&("W", "bf16")) && program.macros.contains(&("T", "bf16"));
        for capability in [80, 90, 120] {
            if capability == 80 || common {
                assert_compiles(program, capability);
            }
        }
    }
    // A mistake is told.
    let mut wrong = programs[0].clone();
    wrong.macros.retain(|(name, _)| *name != "FORMAT");
    if let Ok(nvrtc) = Nvrtc::get() {
        let reason = nvrtc.compile(&wrong, "sm_80", &[]).unwrap_err();
        assert!(reason.contains("FORMAT"), "{reason}");
    }
}
