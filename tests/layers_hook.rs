//! The operators that consume an adapted weight, against the same operator on its dense value:
//! results, and gradients of x, the bias, A and B.

mod common;

use common::{assert_close, assert_differs, device, rng};
use tch::{Device, Kind, Tensor, nn};
use tch_peft::{Base, Error, LoraConfig, LoraModel, QuantConfig, WeightRole};

fn floats() -> (Kind, Device) {
    (Kind::Float, device())
}

/// A model of one weight, with the handle that a network would keep.
struct Adapted {
    weight: Tensor,
    model: LoraModel<()>,
}

impl Adapted {
    fn new(sizes: &[i64], role: WeightRole, quantised: bool) -> Self {
        let vs = nn::VarStore::new(device());
        let weight = (vs.root() / "layer").var("weight", sizes, nn::Init::Randn { mean: 0.0, stdev: 0.3 });
        let base = Base::from(vs).declare("layer", role);
        let base = if quantised { base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap() } else { base };
        let config = LoraConfig::builder().r(4).lora_alpha(8.0).target_modules(["layer"]).build().unwrap();
        let model = LoraModel::wrap(base, config).unwrap();
        let _no_grad = tch::no_grad_guard();
        for p in model.parameters() {
            let _ = p.tensor.shallow_clone().normal_(0.0, 0.2);
        }
        Adapted { weight, model }
    }

    /// The effective weight, by an operator that has no kernel.
    fn dense(&self) -> Tensor {
        &self.weight * 1.0
    }

    /// `f` on the adapted weight gives what it gives on the dense value.
    fn check(&self, name: &str, inputs: &[&Tensor], f: impl Fn(&Tensor) -> Tensor) {
        let adapters: Vec<Tensor> = self.model.parameters().into_iter().map(|p| p.tensor).collect();
        let all: Vec<&Tensor> = inputs.iter().copied().chain(&adapters).collect();
        let run = |weight: &Tensor| {
            let y = f(weight);
            let probe = Tensor::arange(y.numel() as i64, floats()).sin().reshape(y.size());
            let grads = Tensor::run_backward(&[(&y * &probe).sum(Kind::Float)], &all, false, false);
            (y, grads)
        };
        let (found, expected) = (run(&self.weight), run(&self.dense()));
        assert_close(name, &found.0, &expected.0, 1e-5);
        for (i, (found, expected)) in found.1.iter().zip(&expected.1).enumerate() {
            assert_differs(name, expected, &expected.zeros_like(), 0.5);
            assert_close(&format!("{name}: gradient {i}"), found, expected, 1e-5);
        }
    }
}

fn input(sizes: &[i64]) -> Tensor {
    Tensor::randn(sizes, floats()).set_requires_grad(true)
}

#[test]
fn products_with_a_transposed_weight() {
    let _rng = rng();
    for quantised in [false, true] {
        let adapted = Adapted::new(&[6, 64], WeightRole::Linear, quantised);
        let (x, cube, row, bias) = (input(&[5, 64]), input(&[2, 3, 64]), input(&[64]), input(&[6]));
        let square = input(&[5, 6]);
        adapted.check("linear", &[&cube, &bias], |w| cube.linear(w, Some(&bias)));
        adapted.check("matmul", &[&cube], |w| cube.matmul(&w.tr()));
        adapted.check("matmul of one row", &[&row], |w| row.matmul(&w.tr()));
        adapted.check("mm", &[&x], |w| x.mm(&w.tr()));
        adapted.check("transpose", &[&x], |w| x.mm(&w.transpose(-1, 0)));
        adapted.check("numpy_t", &[&x], |w| x.mm(&w.numpy_t()));
        adapted.check("twice", &[&x], |w| x.linear(&w.tr().tr(), None::<Tensor>));
        adapted.check("linear of a transpose", &[&x], |w| x.matmul(&w.tr().tr().tr()));
        adapted.check("addmm", &[&x, &bias], |w| bias.addmm(&x, &w.tr()));
        adapted.check("addmm of a matrix", &[&x, &square], |w| square.addmm(&x, &w.tr()));
        // On the left of a product, and elsewhere: the fallback.
        adapted.check("on the left", &[&x], |w| w.matmul(&x.tr()));
        adapted.check("another operator", &[], |w| w.tr().square());
    }
}

#[test]
fn products_with_a_weight_of_in_and_out() {
    let _rng = rng();
    for quantised in [false, true] {
        let adapted = Adapted::new(&[64, 6], WeightRole::Conv1D, quantised);
        let (x, bias) = (input(&[5, 64]), input(&[6]));
        adapted.check("matmul", &[&x], |w| x.matmul(w));
        adapted.check("addmm", &[&x, &bias], |w| bias.addmm(&x, w));
        adapted.check("linear of the transpose", &[&x, &bias], |w| x.linear(&w.tr(), Some(&bias)));
    }
    // Taken for (out, in), such a weight would have other factors than PEFT's.
    let adapted = Adapted::new(&[64, 6], WeightRole::Linear, false);
    let error = input(&[5, 64]).f_matmul(&adapted.weight).unwrap_err().to_string();
    assert!(error.contains("fan_in_fan_out"), "{error}");
}

#[test]
fn convolutions_in_all_their_forms() {
    let _rng = rng();
    let adapted = Adapted::new(&[6, 4, 3, 2], WeightRole::Conv { groups: 1 }, false);
    let (x, single, bias) = (input(&[2, 4, 9, 8]), input(&[4, 9, 8]), input(&[6]));
    let none = None::<Tensor>;
    adapted.check("conv2d", &[&x, &bias], |w| x.conv2d(w, Some(&bias), [2, 1], [1, 0], [1, 2], 1));
    adapted.check("without a batch", &[&single], |w| single.conv2d(w, none.as_ref(), [1, 1], [0, 0], [1, 1], 1));
    for padding in ["same", "valid"] {
        adapted.check(padding, &[&x], |w| x.conv2d_padding(w, none.as_ref(), [1, 1], padding, [2, 1], 1));
    }
    adapted.check("convolution", &[&x, &bias], |w| {
        x.convolution(w, Some(&bias), [1, 2], [1, 1], [1, 1], false, [0, 0], 1)
    });
    // Not a convolution of x with this weight: the fallback.
    let y = input(&[2, 6, 4, 4]);
    adapted.check("transposed", &[&y], |w| y.conv_transpose2d(w, none.as_ref(), [1, 1], [0, 0], [0, 0], 1, [1, 1]));

    let grouped = Adapted::new(&[6, 2, 3], WeightRole::Conv { groups: 1 }, false);
    let error = input(&[2, 4, 9]).f_conv1d(&grouped.weight, none.as_ref(), 1, 0, 1, 2).unwrap_err().to_string();
    assert!(error.contains("groups") && error.contains("Base::declare"), "{error}");
}

#[test]
fn embeddings_look_rows_up() {
    let _rng = rng();
    let adapted = Adapted::new(&[17, 8], WeightRole::Embedding, false);
    let ids = Tensor::from_slice(&[3i64, 0, 16, 3]).to_device(device()).view([2, 2]);
    adapted.check("embedding", &[], |w| Tensor::embedding(w, &ids, -1, false, false));
    adapted.check("index_select", &[], |w| w.index_select(0, &ids.flatten(0, -1)));
}

#[test]
fn a_transposed_weight_refuses_writes_and_raw_access() {
    let _rng = rng();
    let adapted = Adapted::new(&[6, 64], WeightRole::Linear, false);
    let mut transposed = adapted.weight.tr();
    assert_eq!(transposed.size(), [64, 6]);
    let error = transposed.f_zero_().unwrap_err().to_string();
    assert!(error.contains("`layer.weight`") && error.contains("would write"), "{error}");
    // It lives on its own, also after the weight's last other handle is gone.
    let expected = adapted.dense();
    let x = input(&[5, 64]);
    drop(adapted);
    assert_close("alone", &x.matmul(&transposed), &x.linear(&expected, None::<Tensor>), 1e-5);
}

#[test]
fn combinations_without_meaning_are_refused() {
    let _rng = rng();
    let wrap = |role: WeightRole, sizes: &[i64], dora: bool, r: i64| {
        let vs = nn::VarStore::new(device());
        let _weight = (vs.root() / "layer").var("weight", sizes, nn::Init::Const(0.5));
        let config = LoraConfig::builder().r(r).target_modules(["layer"]).use_dora(dora).build().unwrap();
        LoraModel::wrap(Base::from(vs).declare("layer", role), config)
    };
    let grouped = WeightRole::Conv { groups: 2 };
    let error = wrap(grouped, &[6, 2, 3], true, 4).unwrap_err();
    assert!(matches!(&error, Error::Config { field, .. } if field == "use_dora"), "{error}");
    let error = wrap(grouped, &[6, 2, 3], false, 3).unwrap_err();
    assert!(matches!(&error, Error::Config { field, .. } if field == "r"), "{error}");
    assert!(wrap(grouped, &[6, 2, 3], false, 4).is_ok());
}
