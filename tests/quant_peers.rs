//! Quantised weights against bitsandbytes (nf4) and a reference in torch that equals quanto (int8):
//! bytes, scales and values, bit for bit. tests/python/quant_reference.py lists the weights.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use common::{assert_same, peer, python, read};
use tch::{Device, Kind, Tensor};
use tch_peft::quant::quantize;
use tch_peft::{Error, Scheme};

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

/// Packs every case and compares each tensor of the reference, and the values.
fn compare(scheme: Scheme) {
    let Some(reference) = reference() else { return };
    let mut cases = 0;
    for (name, weight) in &reference {
        let Some(case) = name.strip_suffix("/input") else { continue };
        let prefix = format!("{case}/{scheme}/");
        let expected: BTreeMap<&str, &Tensor> =
            reference.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?, tensor))).collect();
        let packed = quantize(case, weight, scheme).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(packed.scheme(), Some(scheme));
        assert_eq!(packed.sizes(), weight.size(), "{case}");
        assert_eq!(packed.kind(), weight.kind(), "{case}");

        let found: BTreeMap<String, Tensor> = packed.tensors().unwrap().into_iter().collect();
        let names: Vec<&str> = expected.keys().copied().filter(|name| *name != "value").collect();
        assert_eq!(found.keys().collect::<Vec<_>>(), names, "{case}: tensors");
        for name in names {
            assert_same(&format!("{case} {scheme}: {name}"), &found[name], expected[name]);
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
fn nf4_equals_bitsandbytes() {
    compare(Scheme::Nf4 { double_quant: false });
}

#[test]
fn nf4_with_double_quantisation_equals_bitsandbytes() {
    compare(Scheme::Nf4 { double_quant: true });
}

#[test]
fn int8_equals_the_reference() {
    compare(Scheme::Int8);
}

const SCHEMES: [Scheme; 3] = [Scheme::Int8, Scheme::Nf4 { double_quant: false }, Scheme::Nf4 { double_quant: true }];

/// A weight that is not contiguous is packed as the contiguous one.
#[test]
fn views_are_packed_by_value() {
    let _rng = common::rng();
    let wide = Tensor::randn([96, 40], (Kind::Float, Device::Cpu));
    for view in [wide.tr(), wide.narrow(1, 3, 30), wide.slice(0, 0, 96, 2)] {
        for scheme in SCHEMES {
            let [a, b] = [&view, &view.contiguous()].map(|t| quantize("w", t, scheme).unwrap());
            for ((name, a), (_, b)) in a.tensors().unwrap().iter().zip(b.tensors().unwrap()) {
                assert_same(&format!("{scheme}: {name}"), a, &b);
            }
        }
    }
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let options = (Kind::Float, Device::Cpu);
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
            Tensor::ones([4, 64], (Kind::Int64, Device::Cpu)),
            Tensor::ones([4, 64], (Kind::Double, Device::Cpu)),
        ] {
            let error = quantize("h.0.fc.weight", &weight, scheme).unwrap_err();
            assert!(matches!(&error, Error::Mismatch { name, .. } if name == "h.0.fc.weight"), "{error}");
        }
    }
}

/// A finite weight has finite values, or is refused: the mean of the scales may overflow.
#[test]
fn finite_weights_never_become_nan() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let weight = Tensor::full([4, 96], 3e38, (Kind::Float, Device::Cpu)).to_kind(kind);
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
        let weight = Tensor::randn(&sizes, (Kind::Float, Device::Cpu));
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
    let weight = Tensor::randn([50, 33], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
    let index = Tensor::from_slice(&[7i64, 0, 49, 7, 3, 4, 5]);
    for scheme in SCHEMES {
        let packed = quantize("wte.weight", &weight, scheme).unwrap();
        for kind in [Kind::BFloat16, Kind::Float] {
            let mut out = Tensor::zeros([7, 33], (kind, Device::Cpu));
            packed.unpack_index(&index, &mut out).unwrap();
            assert_same(&format!("{scheme}"), &out, &packed.dequantize(kind).unwrap().index_select(0, &index));
        }
        for bad in [-1i64, 50] {
            let mut out = Tensor::zeros([1, 33], (Kind::Float, Device::Cpu));
            let error = packed.unpack_index(&Tensor::from_slice(&[bad]), &mut out).unwrap_err();
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        }
    }
}
