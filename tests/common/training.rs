//! What the tests of training state share.

use super::{device, fresh_dir, peer, python};
use serde_json::Value;
use std::path::Path;
use tch::{Kind, Tensor};
use tch_peft::NamedParameter;

/// What a script in `tests/python` answers to each case, a function with its
/// arguments; one process for all, since starting one takes its time.
pub fn references(script: &str, cases: &[&str]) -> Option<Value> {
    python()?;
    let stem = Path::new(script).file_stem().unwrap().to_str().unwrap();
    let out = fresh_dir(&format!("{stem}-{}", cases[0].replace(' ', "-"))).join("out.json");
    peer(script, &[&[out.to_str().unwrap()], cases].concat());
    Some(serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap())
}

/// A tensor from a list of f32 bit patterns.
pub fn tensor(value: &Value, shape: &Value, kind: Kind) -> Tensor {
    let values: Vec<f32> =
        value.as_array().unwrap().iter().map(|bits| f32::from_bits(bits.as_i64().unwrap() as u32)).collect();
    let shape: Vec<i64> = shape.as_array().unwrap().iter().map(|d| d.as_i64().unwrap()).collect();
    Tensor::from_slice(&values).to_device(device()).view(shape.as_slice()).to_kind(kind)
}

/// An f64 from its bit pattern.
pub fn float(value: &Value) -> f64 {
    f64::from_bits(value.as_i64().unwrap() as u64)
}

pub fn parameter(name: &str, tensor: Tensor) -> NamedParameter {
    NamedParameter { name: name.into(), tensor: tensor.set_requires_grad(true) }
}

pub fn handles(parameters: &[NamedParameter]) -> Vec<NamedParameter> {
    parameters.iter().map(|p| NamedParameter { name: p.name.clone(), tensor: p.tensor.shallow_clone() }).collect()
}

/// The same values in tensors of their own.
pub fn copies(parameters: &[NamedParameter]) -> Vec<NamedParameter> {
    parameters.iter().map(|p| parameter(&p.name, p.tensor.detach().copy())).collect()
}

/// Gives the parameter exactly this gradient.
pub fn set_grad(parameter: &Tensor, grad: &Tensor) {
    (parameter * grad).sum(parameter.kind()).backward();
}
