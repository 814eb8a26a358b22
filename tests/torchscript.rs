//! TorchScript modules, exported by python/export.py, against PEFT on the modules they came from:
//! outputs, losses and every adapter's gradient on each of the first six iterations. The JIT runs
//! another graph after its first, profiled runs, and differentiates some operators by itself.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{assert_close, assert_differs, assert_same, bits, device, read, rng};
use tch::{Device, Kind, Tensor};
use tch_peft::{AdamW, Base, Error, LoraConfig, LoraModel, Optimizer, QuantConfig, TorchScript};

/// f32, relative to the norm.
const TOLERANCE: f64 = 1e-5;
const ITERATIONS: usize = 6;
const MODELS: [&str; 2] = ["llama-tiny", "mlp-tiny"];

fn fixtures() -> Option<&'static Path> {
    common::made("torchscript", "torchscript_reference.py", &[])
}

fn load(dir: &Path, model: &str) -> Base<TorchScript> {
    Base::torchscript_on_device(dir.join(model).join("model.pt"), device()).unwrap()
}

fn loss(output: &Tensor, labels: &Tensor) -> Tensor {
    output.flatten(0, 1).cross_entropy_for_logits(&labels.flatten(0, 1))
}

/// Follows PEFT's record of a run; `lr` as in torchscript_reference.py.
fn follow(model_name: &str, run: &str, lr: f64) {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let folder = dir.join(model_name).join(run);
    let record = read(folder.join("record.safetensors"));
    let model = LoraModel::init_lora(load(dir, model_name), folder.join("adapter")).unwrap();
    let parameters = model.trainable_parameters();
    tch::manual_seed(77);
    let mut worst = 0.0f64;
    for step in 0..ITERATIONS {
        let at = |name: &str| &record[&format!("{step}.{name}")];
        let output = model.forward(at("input")).unwrap();
        assert_close(&format!("{model_name} {run}: output {step}"), &output, at("output"), TOLERANCE);
        let loss = loss(&output, at("labels"));
        assert_close(&format!("{model_name} {run}: loss {step}"), &loss, at("loss"), TOLERANCE);
        loss.backward();
        let expected = record.keys().filter(|name| name.starts_with(&format!("{step}.grad."))).count();
        assert_eq!(parameters.len(), expected);
        for p in &parameters {
            let expected = at(&format!("grad.{}", p.name));
            let found = p.tensor.grad();
            let name = format!("{model_name} {run}: iteration {step}, gradient of {}", p.name);
            assert_close(&name, &found, expected, TOLERANCE);
            worst = worst.max(common::relative_error(&name, &found, expected));
        }
        let _no_grad = tch::no_grad_guard();
        for p in &parameters {
            let mut value = p.tensor.shallow_clone();
            value -= p.tensor.grad() * lr;
            let _ = p.tensor.grad().zero_();
        }
    }
    println!("{model_name} {run}: gradients of {} tensors within {worst:.1e}", parameters.len());
}

#[test]
fn a_traced_llama_has_pefts_gradients() {
    follow("llama-tiny", "fixed", 0.0);
}

#[test]
fn a_traced_llama_descends_as_in_peft_with_inputs_of_other_sizes() {
    follow("llama-tiny", "descent", 0.1);
}

#[test]
fn a_traced_llama_with_dropout_descends_as_in_peft() {
    follow("llama-tiny", "dropout", 0.1);
}

#[test]
fn a_scripted_mlp_has_pefts_gradients() {
    follow("mlp-tiny", "fixed", 0.0);
}

#[test]
fn a_scripted_mlp_descends_as_in_peft_with_inputs_of_other_sizes() {
    follow("mlp-tiny", "descent", 0.1);
}

#[test]
fn a_scripted_mlp_with_dropout_descends_as_in_peft() {
    follow("mlp-tiny", "dropout", 0.1);
}

/// Weights, buffers and constants are where and in the dtype that was asked for: a step is refused nothing for mixing
/// devices, waits for none (the stand-in for a GPU counts that, see device.rs), and learns.
#[test]
fn a_module_trains_where_it_was_loaded() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let waits = || if device() == Device::Cpu { 0 } else { tch::utils::version_cudart() };
    for name in MODELS {
        let record = read(dir.join(name).join("fixed/record.safetensors"));
        for kind in [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16] {
            let what = format!("{name} {kind:?}");
            let base = Base::torchscript_to(dir.join(name).join("model.pt"), device(), kind).unwrap();
            let config = LoraConfig::builder().r(4).target_modules("all-linear").build().unwrap();
            let model = LoraModel::wrap(base, config).unwrap();
            let mut optimizer = AdamW::builder().lr(1e-2).build(model.trainable_parameters()).unwrap();
            let [input, labels] = ["0.input", "0.labels"].map(|name| record[name].shallow_clone());
            let input = if input.is_floating_point() { input.to_kind(kind) } else { input };
            let (mut losses, mut before) = (Vec::new(), 0);
            for step in 0..8 {
                // What is made once, such as the optimizer's state, is there after the first step.
                if step == 1 {
                    before = waits();
                }
                let output = model.forward(&input).unwrap();
                assert_eq!((output.kind(), output.device()), (kind, device()), "{what}");
                let loss = loss(&output.to_kind(Kind::Float), &labels);
                loss.backward();
                optimizer.step().unwrap();
                optimizer.zero_grad().unwrap();
                losses.push(loss.detach());
            }
            assert_eq!(waits() - before, 0, "{what}: waits");
            for p in model.trainable_parameters() {
                assert_eq!(p.tensor.device(), device(), "{what}: {}", p.name);
            }
            let [first, last] = [&losses[0], &losses[7]].map(|loss| f64::try_from(loss).unwrap());
            assert!(last < first - 1e-2, "{what}: the loss went from {first} to {last}");
        }
    }
}

/// Names, shapes and example of the export, and that the module answers as the one in PyTorch.
#[test]
fn an_export_is_what_its_record_says() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for name in MODELS {
        let folder = dir.join(name);
        let record: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.join("export.json")).unwrap()).unwrap();
        let base = load(dir, name);
        let names = base.weight_names();
        let parameters = record["parameters"].as_array().unwrap();
        for parameter in parameters {
            assert!(names.iter().any(|n| n == parameter), "{name}: {parameter} is not among {names:?}");
        }
        if name == "llama-tiny" {
            assert!(names.iter().any(|n| n == "model.layers.0.self_attn.q_proj.weight"), "{names:?}");
        }
        let example = read(folder.join("example.safetensors"));
        let input = example.iter().find(|(name, _)| *name != "output").unwrap().1;
        assert_close(name, &base.module().forward(input).unwrap(), &example["output"], TOLERANCE);
    }
}

/// Six iterations from one start: outputs, and the gradients of every adapter.
fn iterate(model: &LoraModel<TorchScript>, record: &BTreeMap<String, Tensor>) -> Vec<(String, Tensor)> {
    let mut all = Vec::new();
    for step in 0..ITERATIONS {
        let output = model.forward(&record[&format!("{step}.input")]).unwrap();
        loss(&output, &record[&format!("{step}.labels")]).backward();
        all.push((format!("output {step}"), output.detach()));
        for p in model.trainable_parameters() {
            all.push((format!("gradient {step} of {}", p.name), p.tensor.grad().copy()));
            let _ = p.tensor.grad().zero_();
        }
    }
    all
}

#[test]
fn quantising_before_and_after_wrapping_is_the_same() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for name in MODELS {
        let folder = dir.join(name).join("fixed");
        let record = read(folder.join("record.safetensors"));
        let dense = LoraModel::init_lora(load(dir, name), folder.join("adapter")).unwrap();
        let dense = iterate(&dense, &record);
        let skip = if name == "llama-tiny" { "lm_head" } else { "head" };
        for config in [
            QuantConfig::int8().build().unwrap(),
            QuantConfig::nf4().build().unwrap(),
            QuantConfig::nf4().double_quant(true).skip([skip]).build().unwrap(),
        ] {
            let scheme = config.scheme();
            let base = load(dir, name).quantize(&config).unwrap();
            let before = LoraModel::init_lora(base, folder.join("adapter")).unwrap();
            let mut after = LoraModel::init_lora(load(dir, name), folder.join("adapter")).unwrap();
            after.quantize(&config).unwrap();
            let fingerprints = [&before, &after].map(|model| model.base().fingerprint().unwrap());
            assert_eq!(fingerprints[0], fingerprints[1], "{name} {scheme}");

            let (before, after) = (iterate(&before, &record), iterate(&after, &record));
            for ((what, a), (_, b)) in before.iter().zip(&after) {
                assert_same(&format!("{name} {scheme}: {what}"), b, a);
            }
            assert_differs(&format!("{name} {scheme}"), &before[0].1, &dense[0].1, 1e-4);
            // Every iteration on the same input and values gives the same bits.
            let per_step = before.len() / ITERATIONS;
            for (i, (what, tensor)) in before.iter().enumerate().skip(per_step) {
                assert_same(&format!("{name} {scheme}: {what}"), tensor, &before[i % per_step].1);
            }
        }
    }
}

/// On a quantised base, the results are those of a dense base with the quantised values.
#[test]
fn a_quantised_base_computes_with_its_values() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for name in MODELS {
        let folder = dir.join(name).join("fixed");
        let record = read(folder.join("record.safetensors"));
        for config in [QuantConfig::int8(), QuantConfig::nf4(), QuantConfig::nf4().double_quant(true)] {
            let config = config.build().unwrap();
            let scheme = config.scheme();
            let quantised = load(dir, name).quantize(&config).unwrap();
            let chosen: Vec<String> =
                quantised.quantization_report().weights().iter().map(|w| w.name.clone()).collect();
            assert!(chosen.len() >= 10 && !chosen.iter().any(|n| n.contains("embed")), "{chosen:?}");

            // The same values in the dense module, written by libtorch's own means.
            let path = dir.join(name).join(format!("values_{scheme}.pt"));
            let module = tch::CModule::load(dir.join(name).join("model.pt")).unwrap();
            {
                let _no_grad = tch::no_grad_guard();
                for (name, mut tensor) in module.named_parameters().unwrap() {
                    if chosen.contains(&name) {
                        let packed = tch_peft::quant::quantize(&name, &tensor, scheme).unwrap();
                        tensor.copy_(&packed.dequantize(Kind::Float).unwrap());
                    }
                }
            }
            module.save(&path).unwrap();
            let dense = Base::torchscript_on_device(&path, device()).unwrap();

            let [quantised, dense] = [quantised, dense]
                .map(|base| iterate(&LoraModel::init_lora(base, folder.join("adapter")).unwrap(), &record));
            for ((what, found), (_, expected)) in quantised.iter().zip(&dense) {
                assert_close(&format!("{name} {scheme}: {what}"), found, expected, TOLERANCE);
            }
        }
    }
}

#[test]
fn a_frozen_module_is_refused_by_name() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let path = dir.join("frozen.pt");
    let error = Base::torchscript_on_device(&path, device()).unwrap_err();
    assert!(matches!(&error, Error::NoParameters { path: found } if *found == path), "{error}");
    assert!(error.to_string().contains("frozen.pt") && error.to_string().contains("torch.jit.freeze"), "{error}");
}

#[test]
fn a_file_that_is_no_module_is_an_error() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    assert!(matches!(Base::torchscript_on_device(dir.join("missing.pt"), device()), Err(Error::Io { .. })));
    let whole = std::fs::read(dir.join("mlp-tiny/model.pt")).unwrap();
    for (name, bytes) in [("cut.pt", &whole[..whole.len() / 2]), ("text.pt", b"no module"), ("empty.pt", b"")] {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        assert!(Base::torchscript_on_device(&path, device()).is_err(), "{name}");
    }
}

/// The class of a TorchScript module tells an embedding from a linear weight, whatever it is called.
#[test]
fn all_linear_leaves_embeddings_out() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let config = LoraConfig::builder().target_modules("all-linear").build().unwrap();
    let model = LoraModel::wrap(load(dir, "llama-tiny"), config).unwrap();
    assert!(model.layers().iter().all(|path| path.ends_with("_proj")), "{:?}", model.layers());
    let config = LoraConfig::builder().target_modules(["embed_tokens"]).build().unwrap();
    let model = LoraModel::wrap(load(dir, "llama-tiny"), config).unwrap();
    let names: Vec<String> = model.parameters().into_iter().map(|p| p.name).collect();
    let key = |end: &str| format!("base_model.model.model.embed_tokens.lora_embedding_{end}");
    assert_eq!(names, [key("A"), key("B")]);
}

/// Training leaves every weight of the base as it was, and no gradient on it.
#[test]
fn the_base_stays_frozen() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for name in MODELS {
        let folder = dir.join(name).join("fixed");
        let record = read(folder.join("record.safetensors"));
        let base = load(dir, name);
        let before = base.fingerprint().unwrap();
        let model = LoraModel::init_lora(base, folder.join("adapter")).unwrap();
        iterate(&model, &record);
        let saved = dir.join(name).join("frozen_base");
        model.save_pretrained(&saved).unwrap();
        let again = LoraModel::from_pretrained(load(dir, name), &saved).unwrap();
        assert_eq!(again.base().fingerprint().unwrap(), before);
        let input = &record["0.input"];
        let off = model.disable_adapters();
        let plain = load(dir, name).module().forward(input).unwrap();
        assert_close(name, &model.forward(input).unwrap(), &plain, 1e-6);
        drop(off);
        assert_eq!(bits(&model.forward(input).unwrap()), bits(&again.forward(input).unwrap()), "{name}");
    }
}
