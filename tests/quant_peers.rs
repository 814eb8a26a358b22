//! Quantised weights against bitsandbytes (nf4, fp4, llm_int8), references in torch that equal quanto
//! (int8, int4, int2, fp8), and the OCP specification (mxfp4): bytes, scales and values, bit for bit. tests/python/quant_reference.py lists the weights.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use common::{assert_same, device, peer, python, read};
use tch::{Device, Kind, Tensor};
use tch_peft::quant::quantize;
use tch_peft::{Error, Fp8Format, Scheme};

/// The reference's tensors: `<case>/input` and `<case>/<scheme>/<tensor>`.
fn reference() -> Option<BTreeMap<String, Tensor>> {
    static MADE: OnceLock<Option<std::path::PathBuf>> = OnceLock::new();
    let file = MADE.get_or_init(|| {
        python()?;
        let file = common::fresh_dir("quant_peers").join("reference.safetensors");
        peer("quant_reference.py", &[file.as_os_str()]);
        Some(file)
    });
    file.as_deref().map(|file: &Path| read(file))
}

/// 8-bit floats as bytes, which is how the reference has them.
fn as_stored(tensor: &Tensor) -> Tensor {
    match tensor.kind() {
        Kind::Float8e4m3fn | Kind::Float8e5m2 => tensor.view_dtype(Kind::Uint8),
        _ => tensor.shallow_clone(),
    }
}

/// Packs every case and compares each tensor of the reference, and the values.
fn compare(scheme: Scheme) {
    let Some(reference) = reference() else { return };
    let mut cases = 0;
    for (name, weight) in &reference {
        let Some(case) = name.strip_suffix("/input") else { continue };
        let prefix = format!("{case}/{scheme}/");
        let expected: BTreeMap<&str, &Tensor> =
            reference.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?, tensor))).collect();
        let packed = match quantize(case, weight, scheme) {
            // The reference has nothing for weights too large for the scheme.
            Err(error) if expected.is_empty() => {
                assert!(matches!(error, Error::NotFinite { .. }), "{case}: {error}");
                assert!(case.starts_with("huge"), "{case} is refused: {error}");
                continue;
            }
            packed => packed.unwrap_or_else(|e| panic!("{case}: {e}")),
        };
        if expected.is_empty() {
            // A saturated scale, where the peer's overflows.
            assert!(matches!(scheme, Scheme::Fp8 { .. }) && case.starts_with("huge"), "{case}: no reference");
            continue;
        }
        assert_eq!(packed.scheme(), Some(scheme));
        assert_eq!(packed.sizes(), weight.size(), "{case}");
        assert_eq!(packed.kind(), weight.kind(), "{case}");

        let found: BTreeMap<String, Tensor> = packed.tensors().unwrap().into_iter().collect();
        let names: Vec<&str> = expected.keys().copied().filter(|name| *name != "value").collect();
        assert_eq!(found.keys().collect::<Vec<_>>(), names, "{case}: tensors");
        for name in names {
            assert_same(&format!("{case} {scheme}: {name}"), &as_stored(&found[name]), expected[name]);
        }
        let values = packed.dequantize(weight.kind()).unwrap();
        assert_same(&format!("{case} {scheme}: values"), &values, expected["value"]);
        if weight.kind() != Kind::Float {
            // Widened, they are the same values, not more exact ones.
            let wide = packed.dequantize(Kind::Float).unwrap();
            assert_same(&format!("{case} {scheme}: values as f32"), &wide, &expected["value"].to_kind(Kind::Float));
        }
        cases += 1;
    }
    assert!(cases > 40, "{cases} cases only");
    println!("{scheme}: {cases} weights equal");
}

#[test]
fn nf4_and_fp4_equal_bitsandbytes() {
    for block_size in [32, 64, 4096] {
        compare(Scheme::Nf4 { block_size, double_quant: false });
        compare(Scheme::Fp4 { block_size, double_quant: false });
    }
}

#[test]
fn double_quantisation_equals_bitsandbytes() {
    compare(Scheme::NF4_DOUBLE);
    compare(Scheme::Fp4 { block_size: 64, double_quant: true });
}

#[test]
fn integers_equal_the_references() {
    compare(Scheme::Int8);
    compare(Scheme::LlmInt8);
    for group_size in [128, 32] {
        compare(Scheme::Int4 { group_size, hqq: false });
    }
    for group_size in [128, 64] {
        compare(Scheme::Int2 { group_size, hqq: false });
    }
}

#[test]
fn floats_equal_the_references() {
    compare(Scheme::FP8);
    compare(Scheme::Fp8 { format: Fp8Format::E5m2 });
    compare(Scheme::Mxfp4);
    compare(Scheme::Bf16);
    compare(Scheme::F16);
}

const SCHEMES: [Scheme; 16] = [
    Scheme::Int8,
    Scheme::LlmInt8,
    Scheme::INT4,
    Scheme::Int4 { group_size: 32, hqq: false },
    Scheme::Int4 { group_size: 64, hqq: true },
    Scheme::INT2,
    Scheme::Int2 { group_size: 128, hqq: true },
    Scheme::FP8,
    Scheme::Fp8 { format: Fp8Format::E5m2 },
    Scheme::NF4,
    Scheme::NF4_DOUBLE,
    Scheme::FP4,
    Scheme::Fp4 { block_size: 32, double_quant: true },
    Scheme::Mxfp4,
    Scheme::Bf16,
    Scheme::F16,
];

/// A weight that is not contiguous is packed as the contiguous one.
#[test]
fn views_are_packed_by_value() {
    let _rng = common::rng();
    let wide = Tensor::randn([96, 40], (Kind::Float, device()));
    for view in [wide.tr(), wide.narrow(1, 3, 30), wide.slice(0, 0, 96, 2)] {
        for scheme in SCHEMES {
            let [a, b] = [&view, &view.contiguous()].map(|t| quantize("w", t, scheme).unwrap());
            for ((name, a), (_, b)) in a.tensors().unwrap().iter().zip(b.tensors().unwrap()) {
                assert_same(&format!("{scheme}: {name}"), &as_stored(a), &as_stored(&b));
            }
        }
    }
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let options = (Kind::Float, device());
    for scheme in SCHEMES {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                let weight = Tensor::ones([4, 64], options).to_kind(kind);
                let _ = weight.get(3).get(63).fill_(value);
                let before = common::bits(&weight);
                let error = quantize("h.0.fc.weight", &weight, scheme).unwrap_err();
                assert!(matches!(&error, Error::NotFinite { name, .. } if name == "h.0.fc.weight"), "{error}");
                assert_eq!(common::bits(&weight), before);
            }
        }
        for weight in [
            Tensor::ones([64], options),
            Tensor::ones([1, 2, 3, 2, 3, 2], options),
            Tensor::ones([0, 64], options),
            Tensor::ones([4, 64], (Kind::Int64, device())),
            Tensor::ones([4, 64], (Kind::Double, device())),
        ] {
            let error = quantize("h.0.fc.weight", &weight, scheme).unwrap_err();
            assert!(matches!(&error, Error::Mismatch { name, .. } if name == "h.0.fc.weight"), "{error}");
        }
    }
}

/// A finite weight has finite values, or is refused, however large or small it is.
#[test]
fn finite_weights_never_become_nan() {
    let _rng = common::rng();
    let noise = Tensor::rand([40, 96], (Kind::Float, device())) - 0.5;
    for (kind, scale) in [
        (Kind::Float, 3.4e38),
        (Kind::Float, 1e38),
        (Kind::Float, 1e-38),
        (Kind::Float, 1e-44),
        (Kind::BFloat16, 3.38e38),
        (Kind::BFloat16, 1e-40),
        (Kind::Half, 65504.0),
        (Kind::Half, 20000.0),
        (Kind::Half, 1e-3),
        (Kind::Half, 1e-7),
    ] {
        let weight = Tensor::cat(&[&noise * 2.0, Tensor::ones([2, 96], (Kind::Float, device()))], 0) * scale;
        let weight = Tensor::cat(&[weight, Tensor::zeros([2, 96], (Kind::Float, device()))], 0).to_kind(kind);
        for scheme in SCHEMES {
            match quantize("w", &weight, scheme) {
                Ok(packed) => {
                    let finite = packed.dequantize(kind).unwrap().isfinite().all();
                    assert!(i64::try_from(finite).unwrap() == 1, "{scheme} {kind:?}: values that are not finite");
                }
                Err(error) => assert!(matches!(error, Error::NotFinite { .. }), "{error}"),
            }
        }
    }
}

/// A convolution's weight is packed as the matrix (out, in · kernel) is, and has its own sizes back.
#[test]
fn convolutions_are_packed_as_matrices() {
    let _rng = common::rng();
    for sizes in [vec![6, 4, 3], vec![6, 4, 3, 5], vec![4, 3, 2, 3, 2]] {
        let weight = Tensor::randn(&sizes, (Kind::Float, device()));
        for scheme in SCHEMES {
            let packed = quantize("conv.weight", &weight, scheme).unwrap();
            let matrix = quantize("conv.weight", &weight.flatten(1, -1), scheme).unwrap();
            assert_eq!(packed.sizes(), sizes);
            assert_eq!(packed.shape(), [sizes[0], sizes[1..].iter().product()]);
            let values = packed.dequantize(Kind::Float).unwrap();
            assert_same(
                &format!("{scheme} {sizes:?}"),
                &values.flatten(1, -1),
                &matrix.dequantize(Kind::Float).unwrap(),
            );
            assert_eq!(values.size(), sizes);
        }
    }
}

/// Rows by index, as an embedding asks for them: in any order, more than once.
#[test]
fn indexed_rows_are_those_of_the_whole() {
    let _rng = common::rng();
    let weight = Tensor::randn([50, 33], (Kind::Float, device())).to_kind(Kind::BFloat16);
    let index = Tensor::from_slice(&[7i64, 0, 49, 7, 3, 4, 5]).to_device(device());
    for scheme in SCHEMES {
        let packed = quantize("wte.weight", &weight, scheme).unwrap();
        for kind in [Kind::BFloat16, Kind::Float] {
            let mut out = Tensor::zeros([7, 33], (kind, device()));
            packed.unpack_index(&index, &mut out).unwrap();
            assert_same(&format!("{scheme}"), &out, &packed.dequantize(kind).unwrap().index_select(0, &index));
        }
        for bad in [-1i64, 50] {
            let mut out = Tensor::zeros([1, 33], (Kind::Float, device()));
            let index = Tensor::from_slice(&[bad]).to_device(device());
            // A GPU isn't waited for to be told; libtorch's operators would end the program there.
            if device() == Device::Cpu {
                assert!(packed.unpack_index(&index, &mut out).is_err());
            }
        }
    }
}

/// The error of each scheme on gaussian and heavy-tailed weights is that of the peers (the search
/// for scale and shift has a smaller one): relative, in the Frobenius norm.
#[test]
fn errors_are_those_of_the_peers() {
    let _rng = common::rng();
    tch::manual_seed(5);
    let options = (Kind::Float, device());
    let gaussian = Tensor::randn([512, 1024], options);
    // Student's t with 5 degrees of freedom.
    let squares = Tensor::randn([512, 1024, 5], options).square().mean_dim([2i64].as_slice(), false, Kind::Float);
    let heavy = Tensor::randn([512, 1024], options) / squares.sqrt();
    let hqq = |group_size| Scheme::Int4 { group_size, hqq: true };
    for (scheme, limits) in [
        (Scheme::NF4, [0.0920, 0.1047]),
        (Scheme::FP4, [0.1219, 0.1543]),
        (Scheme::INT4, [0.0998, 0.1324]),
        (hqq(128), [0.0966, 0.1279]),
        (hqq(64), [0.0858, 0.1050]),
        (Scheme::Int8, [0.0087, 0.0199]),
        (Scheme::FP8, [0.0265, 0.0262]),
    ] {
        for (weight, limit) in [&gaussian, &heavy].into_iter().zip(limits) {
            let values = quantize("w", weight, scheme).unwrap().dequantize(Kind::Float).unwrap();
            let error = common::relative_error("w", &values, weight);
            println!("{scheme}: {error:.4}, peer {limit}");
            // The tails of another sample differ.
            assert!(error < limit * 1.05, "{scheme}: {error:.4}, peer {limit}");
        }
    }
    for (plain, searched) in [(Scheme::INT4, hqq(128)), (Scheme::INT2, Scheme::Int2 { group_size: 128, hqq: true })] {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            for scale in [1.0, 1e-3, 100.0] {
                let weight = (&heavy * scale).to_kind(kind);
                let [plain, searched] = [plain, searched].map(|scheme| {
                    let values = quantize("w", &weight, scheme).unwrap().dequantize(Kind::Float).unwrap();
                    common::relative_error("w", &values, &weight)
                });
                assert!(searched < plain * 0.95, "{kind:?} {scale}: {searched} with the search, {plain} without");
            }
        }
    }
}

/// The largest error of a value, as a share of the largest magnitude in the weight: half the widest
/// gap between codes, and a little for rounded scales and dtypes.
fn bound(scheme: Scheme) -> f64 {
    0.02 + match scheme {
        Scheme::Int8 | Scheme::LlmInt8 => 0.5 / 127.0,
        Scheme::Int4 { .. } => 1.0 / 15.0,
        Scheme::Int2 { .. } => 1.0 / 3.0,
        Scheme::Fp8 { format: Fp8Format::E4m3 } => 1.0 / 16.0,
        Scheme::Fp8 { .. } => 1.0 / 8.0,
        Scheme::Nf4 { double_quant, .. } | Scheme::Fp4 { double_quant, .. } => {
            if double_quant {
                0.25
            } else {
                1.0 / 6.0
            }
        }
        // What is nearly 8 saturates at 6.
        Scheme::Mxfp4 => 0.25,
        _ => 0.0,
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..Default::default()
    })]

    /// Packed and unpacked, every value is near what it was; and any range of rows, in any dtype, is
    /// that part of the whole.
    #[test]
    fn unpacking_undoes_packing(
        scheme in proptest::sample::select(SCHEMES.to_vec()),
        kind in proptest::sample::select(vec![Kind::Float, Kind::BFloat16, Kind::Half]),
        rows in 1..40i64,
        columns in 1..200i64,
        first in proptest::prelude::any::<proptest::sample::Index>(),
        exponent in -3..3i32,
    ) {
        let _rng = common::rng();
        let weight = Tensor::randn([rows, columns], (Kind::Float, device())) * 10f64.powi(exponent);
        let weight = weight.to_kind(kind);
        let packed = quantize("w", &weight, scheme).unwrap();
        let values = packed.dequantize(Kind::Float).unwrap();
        let largest = f64::try_from(weight.abs().max()).unwrap();
        let error = f64::try_from((&values - weight.to_kind(Kind::Float)).abs().max()).unwrap();
        if !matches!(scheme, Scheme::Int4 { hqq: true, .. } | Scheme::Int2 { hqq: true, .. }) {
            proptest::prop_assert!(error <= bound(scheme) * largest, "{}: {} of {}", scheme, error, largest);
        }
        let first = first.index(rows as usize) as i64;
        let mut part = Tensor::zeros([rows - first, columns], (Kind::Float, device()));
        packed.unpack_rows(first, &mut part).unwrap();
        assert_same(&format!("{scheme}"), &part, &values.narrow(0, first, rows - first));
    }
}
