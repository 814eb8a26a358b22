//! Following PEFT's record of a case of tests/python/layers_reference.py.

use super::{assert_close, assert_same, device, read};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, LoraModel, MergeOptions, QuantConfig, TorchScript, WeightRole};

const STEPS: usize = 3;
/// As in layers_reference.py.
const LR: f64 = 0.05;

/// The cases whose names start with one of the prefixes, in an empty folder of this name.
pub fn make(folder: &str, prefixes: &[&str]) -> Option<PathBuf> {
    super::python()?;
    let dir = super::fresh_dir(folder);
    let args: Vec<_> =
        ["make".as_ref(), dir.as_os_str()].into_iter().chain(prefixes.iter().map(|p| p.as_ref())).collect();
    super::peer("layers_reference.py", &args);
    Some(dir)
}

pub fn base(folder: &Path, case: &Value) -> Base<TorchScript> {
    let base = Base::torchscript_on_device(folder.join("model.pt"), device()).unwrap();
    // A trace doesn't keep the number of groups, nor a module's attributes.
    let base = match case["groups"].as_i64().unwrap() {
        1 => base,
        groups => base.declare("conv", WeightRole::Conv { groups }),
    };
    let base = match case["is_transposed"].as_bool().unwrap() {
        true => base.declare("experts", WeightRole::Experts { is_transposed: true }),
        false => base,
    };
    match case["base"].as_str().unwrap() {
        "int8" => base.quantize(&QuantConfig::int8().build().unwrap()).unwrap(),
        "nf4" => base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap(),
        _ => base,
    }
}

pub fn cases(dir: &Path) -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap()
}

/// Follows PEFT's record of the cases that start with `prefix`.
pub fn follow(dir: &Path, prefix: &str) {
    let mut followed = 0;
    for case in cases(dir).iter().filter(|case| case["name"].as_str().unwrap().starts_with(prefix)) {
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
    // Elsewhere than on the CPU another generator draws the masks of dropout: PEFT's trained adapter is taken.
    let follows = device() == Device::Cpu || !name.contains("dropout");
    let start = folder.join(if follows { "adapter" } else { "trained" });
    let mut model = LoraModel::init_lora(base(&folder, case), start).unwrap();
    if follows {
        follow_steps(name, &mut model, &record, tolerance);
    }
    let close_again = |model: LoraModel<TorchScript>| {
        let found = tch::no_grad(|| model.forward(&record["0.x"]).unwrap());
        assert_close(&format!("{name}: trained"), &found, &record["trained"], tolerance);
    };
    // PEFT's file of the trained adapter, and our own, on a new base.
    close_again(LoraModel::from_pretrained(base(&folder, case), folder.join("trained")).unwrap());
    model.save_pretrained(folder.join("ours")).unwrap();
    close_again(LoraModel::from_pretrained(base(&folder, case), folder.join("ours")).unwrap());
    if let Some(merged) = record.get("merged") {
        merge(name, model, &record["0.x"], merged, tolerance);
    }
}

/// Merging answers as PEFT does, and unmerging brings back every bit.
fn merge(name: &str, mut model: LoraModel<TorchScript>, x: &Tensor, expected: &Tensor, tolerance: f64) {
    model.eval().unwrap();
    let _no_grad = tch::no_grad_guard();
    let before = model.forward(x).unwrap();
    let print = model.base().fingerprint().unwrap();
    let report = model.merge_adapter(&MergeOptions::new()).unwrap();
    assert!(report.worst().unwrap().error < 1e-1, "{name}: {report}");
    assert_close(&format!("{name}: merged"), &model.forward(x).unwrap(), expected, tolerance);
    model.unmerge_adapter().unwrap();
    assert_eq!(model.base().fingerprint().unwrap(), print, "{name}");
    assert_same(&format!("{name}: unmerged"), &model.forward(x).unwrap(), &before);
    let (base, _) = model.merge_and_unload(&MergeOptions::new()).unwrap();
    assert_close(&format!("{name}: unloaded"), &base.module().forward(x).unwrap(), expected, tolerance);
}

/// PEFT loads what `follow` has saved, and answers the same.
pub fn check(dir: &Path) {
    super::peer("layers_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

pub fn follow_steps(name: &str, model: &mut LoraModel<TorchScript>, record: &BTreeMap<String, Tensor>, tolerance: f64) {
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
            // A dropped layer leaves none.
            let grad = p.tensor.grad();
            let mut grad = if grad.defined() { grad } else { p.tensor.zeros_like() };
            close(&format!("grad.{}", p.name), &grad);
            let mut value = p.tensor.shallow_clone();
            value -= &grad * LR;
            let _ = grad.zero_();
        }
    }
}
