//! What `set_float32_matmul_precision` allows, in the whole program: so this is one test.

mod common;

use common::{bits, device, rng};
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::Float32MatmulPrecision::{Highest, Medium};
use tch_peft::quant::quantize;
use tch_peft::{Base, QuantConfig, Scheme, set_float32_matmul_precision};

/// Whether few rows of f32 are multiplied as bf16 where that is allowed.
fn bf16_gains() -> bool {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| processor.split_whitespace().any(|word| word == flag);
    device() == Device::Cpu && ["AuthenticAMD", "avx512_bf16", "avx512vbmi"].into_iter().all(has)
}

/// The largest error of a · b over what its terms, each off by this much of it, make at most.
fn error(found: &Tensor, [a, b]: [&Tensor; 2], of_a_term: f64) -> f64 {
    let [found, a, b] = [found, a, b].map(|t| t.detach().to_device(Device::Cpu).to_kind(Kind::Double));
    let most = a.abs().mm(&b.abs()) * of_a_term;
    ((found - a.mm(&b)).abs() / most).max().try_into().unwrap()
}

#[test]
fn products_of_f32_are_rounded_to_bf16_only_where_that_is_allowed() {
    let _rng = rng();
    let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, device()));
    let [out, inn] = [200, 512];
    for scheme in [Scheme::NF4, Scheme::NF4_DOUBLE, Scheme::INT4, Scheme::FP8, Scheme::Mxfp4, Scheme::Int8] {
        let vs = nn::VarStore::new(device());
        let layer = nn::linear(vs.root() / "layer", inn, out, nn::LinearConfig { bias: false, ..Default::default() });
        let w = quantize("layer", &layer.ws.detach(), scheme).unwrap().dequantize(Kind::Float).unwrap();
        let base = Base::new(vs, layer).quantize(&QuantConfig::builder(scheme).build().unwrap()).unwrap();
        for n in [1, 3, 16, 100] {
            let (x, g) = (random([n, inn]), random([n, out]));
            let [exact, rounded] = [Highest, Medium].map(|precision| {
                let before = set_float32_matmul_precision(precision).unwrap();
                let x = x.copy().set_requires_grad(true);
                let y = base.module().forward(&x);
                (&y * &g).sum(Kind::Float).backward();
                set_float32_matmul_precision(before).unwrap();
                [y, x.grad()]
            });
            // The rounding of sums, and of both sides to the eight bits of bf16.
            let sum = 2f64.powi(-24) * inn as f64;
            let (tr, both) = (w.tr(), 2f64.powi(-8) + 2f64.powi(-17) + sum);
            for (i, factors) in [[&x, &tr], [&g, &w]].into_iter().enumerate() {
                let what = format!("{scheme}, {n} rows, {}", ["y", "dX"][i]);
                let [exact, rounded] = [&exact[i], &rounded[i]];
                assert!(error(exact, factors, sum) <= 1.0, "{what}: not in f32");
                assert!(error(rounded, factors, both) <= 1.0, "{what}: not in bf16");
                let differ = bits(exact) != bits(rounded);
                if bf16_gains() {
                    assert!(differ, "{what}");
                } else if device() == Device::Cpu {
                    // More rows are libtorch's, and so are all where a device has no kernels.
                    assert!(!differ || n > 16, "{what}");
                }
            }
        }
    }
}
