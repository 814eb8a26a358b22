//! The hook, the node and `LoraModel`, against plain dense tensors.

mod common;

use common::device;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, Error, InitLoraWeights, LoraConfig, LoraModel, QuantConfig};

/// Tests share libtorch's default generator, and some seed it: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn floats() -> (Kind, Device) {
    (Kind::Float, device())
}

fn value(t: &Tensor) -> f64 {
    f64::try_from(t).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    value(&(a - b).norm()) / value(&b.norm()).max(1e-12)
}

fn bytes(t: &Tensor) -> Vec<u8> {
    let t = t.detach().contiguous().to_kind(Kind::Float);
    let mut out = vec![0u8; t.numel() * 4];
    t.f_copy_data_u8(&mut out, t.numel()).unwrap();
    out
}

#[derive(Debug)]
struct Net {
    up: nn::Linear,
    down: nn::Linear,
}

impl Module for Net {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.apply(&self.up).tanh().apply(&self.down)
    }
}

/// Wide enough for several tiles (1,048,576 elements each) in `up`.
fn net(seed: i64, inn: i64, hidden: i64) -> (nn::VarStore, Net) {
    tch::manual_seed(seed);
    let vs = nn::VarStore::new(device());
    let root = vs.root();
    let up = nn::linear(&root / "up", inn, hidden, Default::default());
    let down = nn::linear(&root / "down", hidden, 24, Default::default());
    (vs, Net { up, down })
}

fn config() -> LoraConfig {
    let builder = LoraConfig::builder().r(4).lora_alpha(12.0).target_modules(["up", "down"]);
    builder.init_lora_weights(InitLoraWeights::Random).build().unwrap()
}

/// The same network by the textbook formula, on dense leaves.
fn reference(weights: &[(Tensor, Tensor, Tensor, Tensor)], x: &Tensor, scaling: f64) -> Tensor {
    let layer = |x: &Tensor, (w, bias, a, b): &(Tensor, Tensor, Tensor, Tensor)| {
        x.matmul(&w.tr()) + bias + x.matmul(&a.tr()).matmul(&b.tr()) * scaling
    };
    layer(&layer(x, &weights[0]).tanh(), &weights[1])
}

#[test]
fn gradients_equal_the_dense_formula_on_the_dequantised_weight() {
    let _alone = alone();
    for scheme in ["dense", "int8", "nf4", "nf4+dq"] {
        for (inn, hidden, shape) in [(48, 40, vec![2, 5, 48]), (1500, 1600, vec![3, 1500])] {
            let (vs, module) = net(1, inn, hidden);
            let biases = (vs.variables()["up.bias"].copy(), vs.variables()["down.bias"].copy());
            let base = Base::new(vs, module);
            let base = match scheme {
                "int8" => base.quantize(&QuantConfig::int8().build().unwrap()).unwrap(),
                "nf4" => base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap(),
                "nf4+dq" => base.quantize(&QuantConfig::nf4().double_quant(true).build().unwrap()).unwrap(),
                _ => base,
            };
            let dense = [base.module().up.ws.detach(), base.module().down.ws.detach()];
            let model = LoraModel::wrap(base, config()).unwrap();
            let leaf = |t: &Tensor| t.detach().copy().set_requires_grad(true);
            let p = model.trainable_parameters();
            // Sorted by name: down.A, down.B, up.A, up.B.
            let plain = [
                (dense[0].shallow_clone(), biases.0, leaf(&p[2].tensor), leaf(&p[3].tensor)),
                (dense[1].shallow_clone(), biases.1, leaf(&p[0].tensor), leaf(&p[1].tensor)),
            ];
            let x = Tensor::randn(&shape, floats()).set_requires_grad(true);
            let x2 = leaf(&x);
            let (y, expected) = (model.forward(&x).unwrap(), reference(&plain, &x2, 3.0));
            assert!(distance(&y, &expected) < 1e-5, "{scheme} forward: {}", distance(&y, &expected));
            let g = Tensor::randn(y.size(), floats());
            (&y * &g).sum(Kind::Float).backward();
            (&expected * &g).sum(Kind::Float).backward();
            for (got, want, what) in [
                (x.grad(), x2.grad(), "dX"),
                (p[2].tensor.grad(), plain[0].2.grad(), "up dA"),
                (p[3].tensor.grad(), plain[0].3.grad(), "up dB"),
                (p[0].tensor.grad(), plain[1].2.grad(), "down dA"),
                (p[1].tensor.grad(), plain[1].3.grad(), "down dB"),
            ] {
                assert!(distance(&got, &want) < 1e-5, "{scheme} {what}: {}", distance(&got, &want));
            }
        }
    }
}

#[test]
fn a_frozen_linear_without_adapter_passes_gradients_to_its_input_and_bias() {
    let _alone = alone();
    let (vs, module) = net(2, 48, 40);
    let base = Base::new(vs, module).quantize(&QuantConfig::nf4().build().unwrap()).unwrap();
    let w = base.module().up.ws.detach();
    let bias = base.module().up.bs.as_ref().unwrap().set_requires_grad(true);
    let x = Tensor::randn([7, 48], floats()).set_requires_grad(true);
    let y = base.module().up.forward(&x);
    let g = Tensor::randn(y.size(), floats());
    (&y * &g).sum(Kind::Float).backward();
    assert!(distance(&x.grad(), &g.matmul(&w)) < 1e-6);
    assert!(distance(&bias.grad(), &g.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)) < 1e-6);
}

#[test]
fn quantise_then_wrap_equals_wrap_then_quantise() {
    let _alone = alone();
    for quant in [QuantConfig::int8(), QuantConfig::nf4().double_quant(true)] {
        let quant = quant.build().unwrap();
        let (vs, module) = net(3, 48, 40);
        tch::manual_seed(9);
        let first = LoraModel::wrap(Base::new(vs, module).quantize(&quant).unwrap(), config()).unwrap();
        let (vs, module) = net(3, 48, 40);
        tch::manual_seed(9);
        let mut second = LoraModel::wrap(Base::new(vs, module), config()).unwrap();
        second.quantize(&quant).unwrap();
        let x = Tensor::randn([4, 48], floats());
        let (y1, y2) = (first.forward(&x).unwrap(), second.forward(&x).unwrap());
        assert_eq!(bytes(&y1), bytes(&y2));
        y1.square().mean(Kind::Float).backward();
        y2.square().mean(Kind::Float).backward();
        for (a, b) in first.trainable_parameters().iter().zip(second.trainable_parameters()) {
            assert_eq!(bytes(&a.tensor.grad()), bytes(&b.tensor.grad()), "{}", a.name);
        }
        assert_eq!(first.base().fingerprint().unwrap(), second.base().fingerprint().unwrap());
    }
}

#[test]
fn other_operators_see_the_effective_weight_and_gradients_pass_through() {
    let _alone = alone();
    let (vs, module) = net(4, 48, 40);
    let model = LoraModel::wrap(Base::new(vs, module), config()).unwrap();
    let w = &model.module().up.ws;
    let x = Tensor::randn([6, 48], floats());
    let through_linear = x.linear(w, None::<&Tensor>);
    let through_matmul = x.matmul(&w.tr());
    assert!(distance(&through_matmul, &through_linear) < 1e-5);
    assert!(distance(&Tensor::cat(&[w, w], 0).norm(), &(w.norm() * 2f64.sqrt())) < 1e-6);
    let p = model.trainable_parameters();
    let g = Tensor::randn([6, 40], floats());
    (&through_linear * &g).sum(Kind::Float).backward();
    let (da, mut b) = (p[2].tensor.grad().copy(), p[2].tensor.grad());
    let _ = b.zero_();
    (&through_matmul * &g).sum(Kind::Float).backward();
    assert!(distance(&p[2].tensor.grad(), &da) < 1e-5);
}

#[test]
fn writes_and_raw_access_are_refused_and_change_nothing() {
    let _alone = alone();
    let (vs, module) = net(5, 48, 40);
    let model = LoraModel::wrap(Base::new(vs, module), config()).unwrap();
    let mut w = model.module().up.ws.shallow_clone();
    let before = bytes(&w);
    let other = Tensor::zeros([40, 48], floats());
    let refused = |result: Result<String, tch::TchError>| {
        let text = result.expect_err("must be refused").to_string();
        assert!(text.contains("up.weight") && text.contains("adapted"), "{text}");
    };
    let _no_grad = tch::no_grad_guard();
    refused(w.f_zero_().map(|t| format!("{t:?}")));
    refused(w.f_add_(&other).map(|t| format!("{t:?}")));
    refused(w.f_set_data(&other).map(|()| String::new()));
    refused(w.f_resize_([2, 2]).map(|t| format!("{t:?}")));
    let copied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| w.copy_(&other)));
    assert!(copied.is_err(), "tch's copy_ has no other way to report");
    // From a GPU, tch copies through an operator.
    if device() == Device::Cpu {
        let text = w.f_copy_data_u8(&mut vec![0; 40 * 48 * 4], 40 * 48).unwrap_err().to_string();
        assert!(text.contains("up.weight"), "{text}");
    }
    let mut plain = Tensor::zeros([40, 48], floats());
    assert!(plain.f_set_data(&w).is_err(), "a plain tensor must not take the site over");
    plain.f_copy_(&w).unwrap();
    assert_eq!(bytes(&plain), before);
    assert_eq!(bytes(&w), before);
}

#[test]
fn a_guard_turns_adapters_off_and_restores_what_was() {
    let _alone = alone();
    let (vs, module) = net(6, 48, 40);
    let x = Tensor::randn([3, 48], floats());
    let plain = module.forward(&x);
    let model = LoraModel::wrap(Base::new(vs, module), config()).unwrap();
    let adapted = model.forward(&x).unwrap();
    assert!(distance(&adapted, &plain) > 1e-3);
    {
        let _outer = model.disable_adapters();
        {
            let _inner = model.disable_adapters();
        }
        assert_eq!(bytes(&model.forward(&x).unwrap()), bytes(&plain));
    }
    assert_eq!(bytes(&model.forward(&x).unwrap()), bytes(&adapted));
}

#[test]
fn dropout_is_live_in_training_only_and_its_gradient_uses_the_same_mask() {
    let _alone = alone();
    let (vs, module) = net(7, 48, 40);
    let builder = LoraConfig::builder().r(4).lora_dropout(0.5).target_modules(["up"]);
    let config = builder.init_lora_weights(false).build().unwrap();
    let mut model = LoraModel::wrap(Base::new(vs, module), config).unwrap();
    let x = Tensor::randn([64, 48], floats()).set_requires_grad(true);
    let up = |model: &LoraModel<Net>| model.module().up.forward(&x);
    assert_ne!(bytes(&up(&model)), bytes(&up(&model)));
    // Linear in x for a fixed mask: y(x) - bias = <dy/dx, x> for each output.
    tch::manual_seed(1);
    let y = up(&model) - model.module().up.bs.as_ref().unwrap();
    let g = Tensor::randn(y.size(), floats());
    let inner = (&y * &g).sum(Kind::Float);
    inner.backward();
    let through = (x.grad() * &x).sum(Kind::Float);
    assert!((value(&inner) - value(&through)).abs() < 1e-3 * value(&inner).abs().max(1.0));
    model.eval().unwrap();
    assert_eq!(bytes(&up(&model)), bytes(&up(&model)));
}

#[test]
fn backward_keeps_torchs_own_checks() {
    let _alone = alone();
    let (vs, module) = net(8, 48, 40);
    let model = LoraModel::wrap(Base::new(vs, module), config()).unwrap();
    let x = Tensor::randn([3, 48], floats());
    // A parameter changed in place between forward and backward.
    let loss = model.forward(&x).unwrap().square().mean(Kind::Float);
    let mut b = model.trainable_parameters().remove(1).tensor;
    tch::no_grad(|| {
        let _ = b.g_add_scalar_(1.0);
    });
    let text = loss.f_backward().unwrap_err().to_string();
    assert!(text.contains("modified by an inplace operation"), "{text}");
    // Twice without keeping the graph.
    let loss = model.forward(&x).unwrap().square().mean(Kind::Float);
    loss.backward();
    let text = loss.f_backward().unwrap_err().to_string();
    assert!(text.contains("second time"), "{text}");
    // Second derivatives.
    let loss = model.forward(&x).unwrap().square().mean(Kind::Float);
    let text = Tensor::f_run_backward(&[&loss], &[&b], true, true).unwrap_err().to_string();
    assert!(text.contains("differentiated twice"), "{text}");
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let _alone = alone();
    let (vs, module) = net(11, 48, 40);
    let model = LoraModel::wrap(Base::new(vs, module), config()).unwrap();
    let text = model.module().up.ws.f_linear(&Tensor::zeros([2, 2], floats()), None::<&Tensor>);
    assert!(text.is_err());
    let x = Tensor::zeros([2, 47], floats());
    let text = x.f_linear(&model.module().up.ws, None::<&Tensor>).unwrap_err().to_string();
    assert!(text.contains("(…, 48)") && text.contains("[2, 47]"), "{text}");
    let empty = Tensor::zeros([0, 48], floats());
    assert_eq!(model.forward(&empty).unwrap().size(), [0, 24]);
    let vector = Tensor::zeros([48], floats());
    assert_eq!(model.forward(&vector).unwrap().size(), [24]);
}

#[test]
fn bf16_bases_train_f32_adapters() {
    let _alone = alone();
    for quantised in [false, true] {
        let (mut vs, module) = net(12, 64, 48);
        vs.bfloat16();
        let mut base = Base::new(vs, module);
        if quantised {
            base = base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap();
        }
        let w = [base.module().up.ws.detach(), base.module().down.ws.detach()];
        assert_eq!(w[0].kind(), Kind::BFloat16);
        let model = LoraModel::wrap(base, config()).unwrap();
        let p = model.trainable_parameters();
        assert!(p.iter().all(|p| p.tensor.kind() == Kind::Float));
        let x = Tensor::randn([5, 64], floats()).to_kind(Kind::BFloat16);
        let y = model.forward(&x).unwrap();
        assert_eq!(y.kind(), Kind::BFloat16);
        y.square().mean(Kind::Float).backward();
        let up = |a: &Tensor, b: &Tensor| {
            let x = x.to_kind(Kind::Float);
            let bias = model.module().up.bs.as_ref().unwrap().to_kind(Kind::Float);
            x.matmul(&w[0].to_kind(Kind::Float).tr()) + bias + x.matmul(&a.tr()).matmul(&b.tr()) * 3.0
        };
        let got = model.module().up.forward(&x).to_kind(Kind::Float);
        assert!(distance(&got, &up(&p[2].tensor, &p[3].tensor)) < 1e-2);
        assert!(p.iter().all(|p| p.tensor.grad().kind() == Kind::Float && value(&p.tensor.grad().norm()) > 0.0));
    }
}

#[test]
fn tied_weights_are_packed_once_and_adapted_under_one_name() {
    let _alone = alone();
    let vs = nn::VarStore::new(device());
    let root = vs.root();
    let a = nn::linear(&root / "a", 16, 16, nn::LinearConfig { bias: false, ..Default::default() });
    let tied = (&root / "b").add("weight", a.ws.shallow_clone(), true);
    drop(root);
    let base = Base::new(vs, a).quantize(&QuantConfig::int8().build().unwrap()).unwrap();
    assert_eq!(base.quantization_report().weights().len(), 1);
    let both = LoraConfig::builder().target_modules(["a", "b"]).build().unwrap();
    let error = LoraModel::wrap(base, both).unwrap_err();
    assert!(matches!(&error, Error::Config { field, .. } if field == "target_modules"), "{error}");
    drop(tied);
}
