//! Memory of training in bf16; one test alone in its binary, since others would be counted too.

use std::fs;
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, LoraConfig, LoraModel};

/// A value of `/proc/self/status`, in MB.
fn status(field: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1024.0 / 1e6
}

/// A chain of linear layers in bf16, adapted by A and B of f32.
fn chain(layers: i64, width: i64) -> LoraModel<Vec<nn::Linear>> {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let no_bias = nn::LinearConfig { bias: false, ..Default::default() };
    let net: Vec<_> = (0..layers).map(|i| nn::linear(vs.root() / "h" / i, width, width, no_bias)).collect();
    vs.bfloat16();
    let config = LoraConfig::builder().r(2).target_modules("all-linear").init_lora_weights(false).build().unwrap();
    LoraModel::wrap(Base::new(vs, net), config).unwrap()
}

/// The loss, and how much the memory has grown by the forward pass.
fn forward(model: &LoraModel<Vec<nn::Linear>>, x: &Tensor) -> (Tensor, f64) {
    let before = status("VmRSS");
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let y = model.module().iter().fold(x.shallow_clone(), |x, layer| layer.forward(&x));
    assert_eq!(y.kind(), Kind::BFloat16);
    let grown = status("VmRSS") - before;
    (y.sum(Kind::Float), grown)
}

/// PEFT keeps a copy in f32 of what each layer is given, twice as large as the bf16 values.
#[test]
fn activations_and_frozen_weights_stay_in_bf16() {
    // Many rows of few features: memory is that of activations.
    let (layers, width, rows) = (8, 64, 1 << 17);
    let model = chain(layers, width);
    let x = Tensor::ones([rows, width], (Kind::BFloat16, Device::Cpu));
    let _ = forward(&model, &x.narrow(0, 0, 1024));
    let (loss, grown) = forward(&model, &x);
    let values = (layers * rows * width * 2) as f64 / 1e6;
    // Each layer's result is the next one's input; x · Aᵀ is small beside it.
    assert!(grown > 0.8 * values && grown < 1.5 * values, "{grown:.0} MB for {values:.0} MB of activations");
    loss.backward();
    assert!(model.trainable_parameters().iter().all(|p| p.tensor.grad().kind() == Kind::Float));
    drop((loss, x, model));

    // Few rows of many features: memory is that of weights.
    let width = 6144;
    let model = chain(1, width);
    let x = Tensor::ones([4, width], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
    let before = status("VmRSS");
    let (loss, _) = forward(&model, &x);
    loss.backward();
    let (peak, in_f32) = (status("VmHWM") - before, (width * width * 4) as f64 / 1e6);
    assert!(peak < 0.4 * in_f32, "{peak:.0} MB, where the weight in f32 has {in_f32:.0} MB");
    assert_eq!(model.layer_status()[0].kind, Kind::BFloat16);
}
