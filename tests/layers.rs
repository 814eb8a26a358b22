//! Every kind of layer and variant against HF PEFT: outputs, gradients of the input and of every
//! adapter tensor, and a few training steps, on dense and quantised bases, in f32 and bf16.
//!
//! The bases are TorchScript exports; tests/python/layers_reference.py makes them and PEFT's record.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::{assert_close, peer, python, read, rng};
use serde_json::Value;
use tch::{Kind, Tensor};
use tch_peft::{Base, InitLoraWeights, LoraConfig, LoraModel, QuantConfig, TorchScript, WeightRole};

const STEPS: usize = 3;
/// As in layers_reference.py.
const LR: f64 = 0.05;

fn fixtures() -> Option<&'static Path> {
    static MADE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        python()?;
        let dir = common::fresh_dir("layers");
        peer("layers_reference.py", &[dir.as_os_str()]);
        Some(dir)
    });
    made.as_deref()
}

fn base(folder: &Path, case: &Value) -> Base<TorchScript> {
    let base = Base::torchscript(folder.join("model.pt")).unwrap();
    // A trace doesn't keep the number of groups.
    let base = match case["groups"].as_i64().unwrap() {
        1 => base,
        groups => base.declare("conv", WeightRole::Conv { groups }),
    };
    match case["base"].as_str().unwrap() {
        "int8" => base.quantize(&QuantConfig::int8().build().unwrap()).unwrap(),
        "nf4" => base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap(),
        _ => base,
    }
}

/// Follows PEFT's record of the case; `prefix` chooses the cases.
fn follow(prefix: &str) {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap();
    let mut followed = 0;
    for case in cases.iter().filter(|case| case["name"].as_str().unwrap().starts_with(prefix)) {
        follow_one(dir, case);
        followed += 1;
    }
    assert!(followed >= 4, "{followed} cases of {prefix}");
    println!("{prefix}: {followed} cases");
}

fn follow_one(dir: &Path, case: &Value) {
    let name = case["name"].as_str().unwrap();
    let tolerance = if case["dtype"] == "bfloat16" { 2e-2 } else { 1e-5 };
    let folder = dir.join(name);
    let record = read(folder.join("record.safetensors"));
    let mut model = LoraModel::init_lora(base(&folder, case), folder.join("adapter")).unwrap();
    follow_steps(name, &mut model, &record, tolerance);
    let close_again = |model: LoraModel<TorchScript>| {
        let found = tch::no_grad(|| model.forward(&record["0.x"]).unwrap());
        assert_close(&format!("{name}: trained"), &found, &record["trained"], tolerance);
    };
    // PEFT's file of the trained adapter, and our own, on a new base.
    close_again(LoraModel::from_pretrained(base(&folder, case), folder.join("trained")).unwrap());
    model.save_pretrained(folder.join("ours")).unwrap();
    close_again(LoraModel::from_pretrained(base(&folder, case), folder.join("ours")).unwrap());
}

fn follow_steps(name: &str, model: &mut LoraModel<TorchScript>, record: &BTreeMap<String, Tensor>, tolerance: f64) {
    for step in 0..STEPS {
        let at = |what: &str| &record[&format!("{step}.{what}")];
        let close = |what: &str, found: &Tensor| {
            assert_close(&format!("{name}, step {step}: {what}"), found, at(what), tolerance);
        };
        model.eval().unwrap();
        close("eval", &tch::no_grad(|| model.forward(at("x")).unwrap()));
        model.train().unwrap();
        tch::manual_seed(100 + step as i64);
        let x = at("x").copy();
        let x = if x.is_floating_point() { x.set_requires_grad(true) } else { x };
        let output = model.forward(&x).unwrap();
        close("output", &output);
        assert_eq!(output.kind(), at("output").kind(), "{name}: dtype of the output");
        let loss = output.to_kind(Kind::Float).mse_loss(&at("label").to_kind(Kind::Float), tch::Reduction::Mean);
        loss.backward();
        if x.is_floating_point() {
            close("x_grad", &x.grad());
        }
        let parameters = model.trainable_parameters();
        let expected = record.keys().filter(|key| key.starts_with(&format!("{step}.grad."))).count();
        assert_eq!(parameters.len(), expected, "{name}");
        let _no_grad = tch::no_grad_guard();
        for p in parameters {
            close(&format!("grad.{}", p.name), &p.tensor.grad());
            let mut value = p.tensor.shallow_clone();
            value -= p.tensor.grad() * LR;
            let _ = p.tensor.grad().zero_();
        }
    }
}

#[test]
fn convolutions_follow_peft() {
    follow("conv");
}

#[test]
fn embeddings_follow_peft() {
    follow("embedding");
}

#[test]
fn linears_follow_peft() {
    follow("linear");
}

#[test]
fn transposed_weights_follow_peft() {
    follow("gpt");
}

#[test]
fn dora_follows_peft() {
    follow("dora");
}

/// The initialisations that are taken out of the base: a new adapter starts as PEFT's does, and
/// loading one takes the same part out of the base again.
#[test]
fn initialisations_follow_peft() {
    follow("init");
    let Some(dir) = fixtures() else { return };
    for (case, init, targets, turned) in [
        ("init_pissa", InitLoraWeights::Pissa, vec!["up"], false),
        ("init_olora", InitLoraWeights::Olora, vec!["up"], false),
        ("init_pissa_gpt", InitLoraWeights::Pissa, vec!["c_fc", "c_proj"], true),
    ] {
        let folder = dir.join(format!("{case}-dense-float32"));
        let record = read(folder.join("record.safetensors"));
        let config = LoraConfig::builder().r(4).lora_alpha(8.0).target_modules(targets).fan_in_fan_out(turned);
        let config = config.init_lora_weights(init).build().unwrap();
        let base = || Base::torchscript(folder.join("model.pt")).unwrap();
        let before = base().fingerprint().unwrap();
        let mut model = LoraModel::wrap(base(), config.clone()).unwrap();
        // The base's identity is that of what is left of it, and the same for every new start.
        let after = model.base().fingerprint().unwrap();
        assert_ne!(after, before, "{case}");
        assert_eq!(LoraModel::wrap(base(), config.clone()).unwrap().base().fingerprint().unwrap(), after, "{case}");
        assert!(model.add_adapter("second", config).is_err(), "{case}: the base can't be changed twice");
        follow_steps(case, &mut model, &record, 1e-5);
    }
}
