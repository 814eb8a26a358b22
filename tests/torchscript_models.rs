//! Tiny models of `transformers` and `diffusers`, exported by python/export.py, against PEFT on the
//! modules they came from: Llama, GPT-2 (Conv1D weights), ViT, T5, a UNet (convolutions and
//! attention) and a DiT (SD3), dense, on a packed base and in bf16. Outputs with a loaded adapter,
//! every adapter's gradient on each of the first six iterations, with the model's own dropout live,
//! and files that cross in both directions.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{assert_close, assert_differs, device, peer, python, read, relative_error, rng};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, Error, LoraConfig, LoraModel, QuantConfig, TorchScript};

const ITERATIONS: usize = 6;

fn fixtures() -> Option<&'static Path> {
    common::made("torchscript_models", "models_reference.py", &["make"])
}

struct Run {
    fields: Value,
    folder: PathBuf,
    export: PathBuf,
}

impl Run {
    fn text(&self, key: &str) -> &str {
        self.fields[key].as_str().unwrap()
    }

    fn all(dir: &Path) -> Vec<Run> {
        let list: Vec<Value> = serde_json::from_slice(&std::fs::read(dir.join("runs.json")).unwrap()).unwrap();
        let run = |fields: Value| {
            let folder = |key: &str| dir.join(fields[key].as_str().unwrap());
            Run { folder: folder("name"), export: folder("model"), fields }
        };
        list.into_iter().map(run).collect()
    }

    fn tolerance(&self) -> f64 {
        match (self.text("kind"), device()) {
            ("bf16", Device::Cpu) => 2e-2,
            // PyTorch's run was on the CPU: bf16 is rounded in other places.
            ("bf16", _) => 3e-2,
            _ => 1e-5,
        }
    }

    fn base(&self) -> Base<TorchScript> {
        let module = self.export.join("model.pt");
        if self.text("kind") == "bf16" {
            return Base::torchscript_to(module, device(), Kind::BFloat16).unwrap();
        }
        let base = Base::torchscript_on_device(module, device()).unwrap();
        if self.text("kind") != "nf4" {
            return base;
        }
        let names = base.weight_names();
        // Tied to an embedding, or trained as a full copy.
        let dense = ["lm_head", "classifier"].into_iter().filter(|m| names.contains(&format!("{m}.weight")));
        let base = base.quantize(&QuantConfig::nf4().skip(dense).build().unwrap()).unwrap();
        let packed: Vec<&str> = base.quantization_report().weights().iter().map(|w| w.name.as_str()).collect();
        assert_eq!(Value::from(packed), self.fields["packed"], "{}: packed weights", self.text("name"));
        base
    }

    fn inputs<'a>(&self, record: &'a BTreeMap<String, Tensor>, step: usize) -> Vec<&'a Tensor> {
        let names = self.fields["inputs"].as_array().unwrap().iter();
        names.map(|name| &record[&format!("{step}.in.{}", name.as_str().unwrap())]).collect()
    }

    fn eval(&self, model: &mut LoraModel<TorchScript>, record: &BTreeMap<String, Tensor>) -> Tensor {
        model.eval().unwrap();
        tch::no_grad(|| model.module().forward_ts(&self.inputs(record, 0)).unwrap())
    }
}

/// Follows PEFT's record of a run; answers the worst error of a gradient.
fn follow(run: &Run) -> f64 {
    let (name, tolerance) = (run.text("name"), run.tolerance());
    let record = read(run.folder.join("record.safetensors"));
    let mut model = LoraModel::init_lora(run.base(), run.folder.join("start")).unwrap();
    assert_close(&format!("{name}: loaded"), &run.eval(&mut model, &record), &record["loaded"], tolerance);
    assert_differs(&format!("{name}: the adapter"), &record["loaded"], &record["base"], 5.0 * tolerance);

    model.train().unwrap();
    let parameters = model.trainable_parameters();
    let mut worst = 0.0f64;
    for step in 0..ITERATIONS {
        let at = |what: &str| &record[&format!("{step}.{what}")];
        // The model's dropout draws as in PyTorch.
        tch::manual_seed(70 + step as i64);
        let output = model.module().forward_ts(&run.inputs(&record, step)).unwrap();
        assert_close(&format!("{name}, iteration {step}: output"), &output, at("output"), tolerance);
        output.to_kind(Kind::Float).mse_loss(at("label"), tch::Reduction::Mean).backward();
        let expected = record.keys().filter(|key| key.starts_with(&format!("{step}.grad."))).count();
        assert_eq!(parameters.len(), expected, "{name}");
        let lr = run.fields["lr"].as_f64().unwrap();
        let _no_grad = tch::no_grad_guard();
        for p in &parameters {
            let what = format!("{name}, iteration {step}: gradient of {}", p.name);
            let (found, expected) = (p.tensor.grad(), at(&format!("grad.{}", p.name)));
            let difference = relative_error(&what, &found, expected);
            let error = match record.get(&format!("{step}.exact.{}", p.name)) {
                None => difference,
                // As near to the gradient in f32 as PEFT is, within a factor: of the adapter PEFT keeps
                // the products in f32, here they are bf16 too.
                Some(exact) => {
                    let theirs = relative_error(&what, expected, exact);
                    relative_error(&what, &found, exact) - 3.0 * theirs
                }
            };
            assert!(error <= tolerance, "{what} differs by {error:.1e}");
            worst = worst.max(difference);
            let mut value = p.tensor.shallow_clone();
            value -= p.tensor.grad() * lr;
            let _ = p.tensor.grad().zero_();
        }
    }
    assert_close(&format!("{name}: trained"), &run.eval(&mut model, &record), &record["trained"], tolerance);
    if run.text("kind") != "bf16" {
        assert_differs(&format!("{name}: training"), &record["trained"], &record["loaded"], 1e-2);
    }
    model.save_pretrained(run.folder.join("ours")).unwrap();
    let mut theirs = LoraModel::from_pretrained(run.base(), run.folder.join("trained")).unwrap();
    assert_close(&format!("{name}: PEFT's file"), &run.eval(&mut theirs, &record), &record["trained"], tolerance);
    worst
}

#[test]
fn every_model_trains_as_in_peft_and_exchanges_adapters() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    tch::set_num_threads(1);
    let runs = Run::all(dir);
    assert_eq!(runs.len(), 18);
    for run in &runs {
        let worst = follow(run);
        println!("{}: gradients within {worst:.1e}", run.text("name"));
    }
    peer("models_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

/// The example, the names, and which sizes are free.
#[test]
fn every_export_is_what_its_record_says() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for run in Run::all(dir).into_iter().filter(|run| run.text("kind") == "dense") {
        let record: Value = serde_json::from_slice(&std::fs::read(run.export.join("export.json")).unwrap()).unwrap();
        let name = run.text("name");
        let mut model = LoraModel::init_lora(
            Base::torchscript_on_device(run.export.join("model.pt"), device()).unwrap(),
            run.folder.join("start"),
        )
        .unwrap();
        model.eval().unwrap();
        let names = model.base().weight_names();
        for parameter in record["parameters"].as_array().unwrap() {
            assert!(names.iter().any(|n| n == parameter), "{name}: {parameter} is not among {names:?}");
        }
        let example = read(run.export.join("example.safetensors"));
        let inputs = record["inputs"].as_array().unwrap().iter().map(|input| &example[input["name"].as_str().unwrap()]);
        let inputs: Vec<&Tensor> = inputs.collect();
        let off = model.disable_adapters();
        let output = model.module().forward_ts(&inputs).unwrap();
        drop(off);
        assert_close(name, &output, &example["output"], run.tolerance());
        let free: &[&str] = if run.text("model") == "vit-tiny" { &["batch"] } else { &["batch", "length"] };
        assert_eq!(record["free"], Value::from(free.to_vec()), "{name}");
    }
}

/// What PyTorch's module answers in that dtype, from one file. A constant that were left in another
/// dtype would show in f64, or be refused.
#[test]
fn every_export_runs_in_every_dtype() {
    if python().is_none() {
        return;
    }
    let _rng = rng();
    tch::set_num_threads(1);
    let dir = common::fresh_dir("torchscript_dtypes");
    peer("models_reference.py", &["dtypes".as_ref(), dir.as_os_str()]);
    let mut models = 0;
    for folder in std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(answers) = Tensor::read_safetensors(folder.join("answers.safetensors")) else { continue };
        let answers: BTreeMap<String, Tensor> = answers.into_iter().collect();
        let record: Value = serde_json::from_slice(&std::fs::read(folder.join("export.json")).unwrap()).unwrap();
        for (dtype, kind, tolerance) in [
            ("float32", Kind::Float, 1e-6),
            ("float64", Kind::Double, 1e-13),
            ("float16", Kind::Half, 2e-3),
            ("bfloat16", Kind::BFloat16, 1e-2),
        ] {
            let base = Base::torchscript_to(folder.join("model.pt"), device(), kind).unwrap();
            let mut model =
                LoraModel::wrap(base, LoraConfig::builder().target_modules("all-linear").build().unwrap()).unwrap();
            model.eval().unwrap();
            let inputs = record["inputs"].as_array().unwrap().iter();
            let inputs: Vec<_> = inputs
                .map(|input| &answers[&format!("torch.{dtype}.in.{}", input["name"].as_str().unwrap())])
                .map(|input| input.to_device(device()))
                .collect();
            let output = tch::no_grad(|| model.module().forward_ts(&inputs).unwrap());
            let expected = &answers[&format!("torch.{dtype}.output")];
            let what = format!("{}: {dtype}", folder.display());
            assert_eq!(output.kind(), expected.kind(), "{what}");
            // PyTorch's answer is the CPU's: elsewhere 16 bits are rounded in other places, and functions that a
            // model asks f32 for, whatever its dtype, differ by their last bit.
            let tolerance = match (device(), kind) {
                (Device::Cpu, _) => tolerance,
                (_, Kind::Half | Kind::BFloat16) => 2.0 * tolerance,
                _ => 1e-6,
            };
            assert_close(&what, &output, expected, tolerance);
        }
        models += 1;
    }
    assert_eq!(models, 12);
    let bound = dir.join("bound/model.pt");
    assert!(matches!(Base::torchscript_to(bound, device(), Kind::Int64), Err(Error::Config { .. })));
}

/// Folders of `transformers` and `diffusers` through the command line.
#[test]
fn folders_of_pretrained_models_are_exported() {
    if python().is_none() {
        return;
    }
    let _rng = rng();
    let dir = common::fresh_dir("torchscript_folders");
    peer("models_reference.py", &["folders".as_ref(), dir.as_os_str()]);
    for name in ["llama", "gpt2", "vit", "t5", "unet", "sd3"] {
        let folder = dir.join(format!("{name}-tiny"));
        let record: Value = serde_json::from_slice(&std::fs::read(folder.join("export.json")).unwrap()).unwrap();
        let example = read(folder.join("example.safetensors"));
        let inputs = record["inputs"].as_array().unwrap().iter().map(|input| &example[input["name"].as_str().unwrap()]);
        let inputs: Vec<&Tensor> = inputs.collect();
        let config = LoraConfig::builder().target_modules("all-linear").build().unwrap();
        let mut model =
            LoraModel::wrap(Base::torchscript_on_device(folder.join("model.pt"), device()).unwrap(), config).unwrap();
        let train = model.module().forward_ts(&inputs).unwrap();
        model.eval().unwrap();
        let eval = model.module().forward_ts(&inputs).unwrap();
        assert_close(name, &eval, &example["output"], 1e-5);
        // Those without dropout answer the same in both modes.
        let drops = ["gpt2", "vit", "t5"].contains(&name);
        assert_eq!(relative_error(name, &train, &eval) > 1e-3, drops, "{name}: dropout");
        if name == "llama" {
            loads_from_its_folder(&folder.join("model.pt"), &dir.join("saved/llama-tiny"));
        }
    }
}

/// Weights from the files that the model was exported from, which lack what it computes by itself.
fn loads_from_its_folder(module: &Path, saved: &Path) {
    let (base, config) = (|| Base::torchscript(module).unwrap(), QuantConfig::int8().build().unwrap());
    let error = base().load_and_quantize(saved, &config).unwrap_err();
    assert!(
        matches!(&error, Error::Keys { missing, .. } if missing.iter().all(|name| name.ends_with("inv_freq"))),
        "{error}"
    );
    let tables = ["rotary_emb.inv_freq", "rotary_emb.original_inv_freq"];
    let lacking = tables.iter().fold(base(), |base, table| base.allow_missing(table).unwrap());
    let loaded = lacking.load_and_quantize(saved, &config).unwrap();
    let packed = base().quantize(&config).unwrap();
    assert_eq!(loaded.fingerprint().unwrap(), packed.fingerprint().unwrap());
}
