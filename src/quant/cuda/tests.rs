//! The CUDA kernels without a card: their source runs on the CPU, and compiles
//! for the architectures that it is meant for.

use super::*;
use crate::ffi::cuda::emulation::Emulation;
use crate::ffi::cuda::nvrtc::{Nvrtc, assert_compiles};
use crate::ffi::cuda::{Failed, or_operators};
use crate::quant::Scheme;
use crate::quant::cpu::tests::{packed, same, unpacks_the_same_bits};
use rayon::prelude::*;
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// Asserts that `found` is a · b but for the rounding of f32 sums, and of the result.
fn assert_product(found: &Tensor, a: &Tensor, b: &Tensor, what: &str) {
    let (a, terms) = (a.to_kind(Kind::Double), a.size()[1] as f64);
    let (expected, magnitude) = (a.mm(b), a.abs().mm(&b.abs()));
    let result = match found.kind() {
        Kind::Float => 0.0,
        Kind::Half => 0.5f64.powi(11),
        _ => 0.5f64.powi(8),
    };
    let bound = magnitude * (terms * 0.5f64.powi(24)) + expected.abs() * result + 1e-7;
    let within = (found.to_kind(Kind::Double) - expected).abs().le_tensor(&bound).all();
    assert!(i64::try_from(within).unwrap() == 1, "{what}");
}

/// Fewer and more rows than a product takes at a time.
const ROWS: [i64; 4] = [1, 7, 9, 16];

/// Both directions of a product with every scheme, in these shapes.
fn few_rows_multiply(shapes: &[([i64; 2], Kind)], rows: &[i64]) {
    for &(shape, kind) in shapes {
        let [out, inn] = shape;
        for packed in packed(shape, kind) {
            let scheme = packed.scheme().unwrap();
            let dense = packed.dequantize(Kind::Float).unwrap().to_kind(Kind::Double);
            for &n in rows {
                for x_kind in HashSet::from([Kind::Float, Kind::BFloat16, kind]) {
                    let what = format!("{scheme} {kind:?} {shape:?}, {n} rows of {x_kind:?}");
                    let random = |columns| Tensor::randn([n, columns], (Kind::Float, Device::Cpu)).to_kind(x_kind);
                    let none = |columns| Tensor::full([n, columns], f64::NAN, (x_kind, Device::Cpu));
                    let (x, g, mut y, mut dx) = (random(inn), random(out), none(out), none(inn));
                    let served = [
                        serve(&Emulation, packed.as_ref(), Op::Product { x: &x, y: &mut y }).unwrap(),
                        serve(&Emulation, packed.as_ref(), Op::ProductTransposed { g: &g, dx: &mut dx }).unwrap(),
                    ];
                    if served == [false; 2] {
                        // Blocks of no whole units.
                        assert!(
                            [40, 72].contains(&inn) && matches!(scheme, Scheme::Gptq { .. } | Scheme::Nf4 { .. }),
                            "{what}"
                        );
                        continue;
                    }
                    assert_eq!(served, [true; 2], "{what}");
                    assert_product(&y, &x, &dense.tr(), &what);
                    assert_product(&dx, &g, &dense, &format!("{what}, transposed"));
                }
            }
        }
    }
}

// Rows that are whole steps of the tensor cores, one and several for each warp, and others; and more or
// fewer rows than fill a block.
#[test]
fn few_rows_multiply_by_short_weights() {
    let shapes = [
        ([70, 256], Kind::BFloat16),
        ([5, 512], Kind::Half),
        ([33, 72], Kind::BFloat16),
        ([12, 40], Kind::Half),
        ([70, 256], Kind::Float),
    ];
    few_rows_multiply(&shapes, &ROWS);
}

#[test]
fn few_rows_multiply_by_long_rows() {
    few_rows_multiply(&[([33, 4224], Kind::BFloat16)], &ROWS);
}

// Parts whose sums are added up, the last one shorter.
#[test]
fn few_rows_multiply_by_many_rows() {
    few_rows_multiply(&[([389, 128], Kind::BFloat16), ([300, 24], Kind::Float)], &[3, 16]);
}

/// Programs of every scheme's format: unpacking to and multiplying with each dtype.
fn programs() -> Vec<Program> {
    let mut programs: Vec<Program> = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for packed in packed([4, 128], kind) {
            let form = Form::of(packed.as_ref()).unwrap().unwrap();
            for other in [Kind::Float, Kind::BFloat16, Kind::Half] {
                let unpack = unpack_program(&form, other).unwrap();
                let few = [few::Direction::Forward, few::Direction::Transposed];
                programs.push(unpack);
                programs.extend(few.map(|direction| few::program(&form, other, 80, direction).unwrap().0));
            }
        }
    }
    let mut seen = HashSet::new();
    programs.retain(|program| seen.insert(program.clone()));
    programs
}

// No card or driver is needed to compile. Every program for one architecture,
// and those of the commonest dtypes for the others.
#[test]
fn programs_compile_without_warnings_or_spills() {
    let programs = programs();
    assert!(programs.len() > 225, "{}", programs.len());
    programs.par_iter().for_each(|program| {
        let common = program.macros.contains(&("W", "bf16")) && program.macros.contains(&("T", "bf16"));
        for capability in [80, 90, 120] {
            if capability == 80 || common {
                assert_compiles(program, capability);
            }
        }
    });
    // A mistake is told.
    let mut wrong = programs[0].clone();
    wrong.macros.retain(|(name, _)| *name != "FORMAT");
    if let Ok(nvrtc) = Nvrtc::get() {
        let reason = nvrtc.compile(&wrong, "sm_80", &[]).unwrap_err();
        assert!(reason.contains("FORMAT"), "{reason}");
    }
}

/// Why a launch fails.
type Why = fn(&Launch) -> String;

/// A device on which no kernel can be had.
struct Broken {
    why: Why,
    failed: Failed,
    tried: AtomicUsize,
}

impl Launcher for Broken {
    fn launch(&self, launch: &Launch) -> Result<()> {
        self.failed.or_start(launch, || {
            self.tried.fetch_add(1, Ordering::Relaxed);
            Err((self.why)(launch))
        })
    }

    fn capability(&self) -> u32 {
        80
    }

    fn processors(&self) -> u32 {
        1
    }
}

/// What NVRTC says of the program without its format.
fn not_compiled(launch: &Launch) -> String {
    let mut wrong = launch.program.clone();
    wrong.macros.retain(|(name, _)| *name != "FORMAT");
    match Nvrtc::get() {
        Ok(nvrtc) => nvrtc.compile(&wrong, "sm_80", &[]).unwrap_err(),
        Err(_) => "NVRTC could not compile it, if there were one".into(),
    }
}

#[test]
fn operators_serve_where_a_kernel_fails_which_is_tried_and_told_once() {
    let not_started = |_: &Launch| "cuLaunchKernel failed with status 701".to_string();
    // Different kernels, as each is told once in a process.
    let cases: [([i64; 2], &str, Why, &str); 2] = [
        ([6, 256], "unpack::unpack_units", not_compiled, "could not compile"),
        ([5, 37], "unpack::unpack_elements", not_started, "status 701"),
    ];
    for (shape, kernel, why, told) in cases {
        let broken = Broken { why, failed: Failed::default(), tried: AtomicUsize::new(0) };
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = tracing_subscriber::fmt().with_ansi(false).with_writer(Mutex::new(file.reopen().unwrap())).finish();
        let packed = packed(shape, Kind::Float).swap_remove(0);
        let expected = packed.dequantize(Kind::Float).unwrap();
        tracing::subscriber::with_default(log, || {
            for _ in 0..3 {
                let mut out = Tensor::full(shape, f64::NAN, (Kind::Float, Device::Cpu));
                let op = Op::Unpack { row: 0, columns: 0..shape[1], out: &mut out };
                assert_eq!(or_operators(serve(&broken, packed.as_ref(), op)).unwrap(), None, "{kernel}");
                assert_eq!(i64::try_from(out.isnan().all()).unwrap(), 1, "{kernel}: something was written");
                packed.rows_by_operators(0, &mut out).unwrap();
                same(&out, &expected, kernel);
            }
        });
        assert_eq!(broken.tried.into_inner(), 1, "{kernel}");
        let log = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(log.matches("WARN").count(), 1, "{log}");
        assert!(log.contains(kernel) && log.contains(told), "{log}");
    }
}
