//! A matrix of configurations, each run in HF PEFT and here from the same weights: outputs after
//! load, in and after a few training steps, after merge and after unmerge, and files that cross in
//! both directions.
//!
//! The configurations are a deterministic choice from the table in `axes`: every combination of
//! layer, base and dtype, and every pair of values of any two axes that mean something together.
//! matrix_reference.py runs PEFT: on bitsandbytes' layers for linear layers in nf4, and for other
//! packed bases on dense layers that hold the packed values, by bitsandbytes' or optimum-quanto's
//! own packing. (bitsandbytes' 8-bit layers quantise the activations too, and there are no packed
//! convolutions and embeddings.) Where PEFT is wrong it names the defect, and what is compared with
//! is the formula.

#[path = "../common/mod.rs"]
mod common;

mod axes;
mod case;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use case::Case;
use common::{assert_same, peer, python, read, relative_error, rng};
use serde_json::Value;
use tch::{Kind, Tensor};
use tch_peft::{LoraModel, MergeOptions, TorchScript};

const STEPS: usize = 3;

/// The errors of one configuration by stage, relative to the norm.
#[derive(Default)]
struct Errors {
    stages: Vec<(&'static str, f64)>,
}

impl Errors {
    fn note(&mut self, stage: &'static str, found: &Tensor, expected: &Tensor) {
        assert_eq!(found.kind(), expected.kind(), "{stage}: dtype");
        self.stages.push((stage, relative_error(stage, found, expected)));
    }
}

fn output(model: &mut LoraModel<TorchScript>, x: &Tensor) -> Tensor {
    model.eval().unwrap();
    tch::no_grad(|| model.forward(x).unwrap())
}

/// A model with the adapter of PEFT's folder, in the adapter dtype that the configuration says: what
/// a file holds is otherwise loaded as f32.
fn load(case: &Case, folder: &str) -> LoraModel<TorchScript> {
    let folder = case.folder.join(folder);
    if !case.is("dtype", "bf16_adapters") {
        return LoraModel::init_lora(case.base(), folder).unwrap();
    }
    let model = LoraModel::wrap(case.base(), case.config()).unwrap();
    let values = read(folder.join("adapter_model.safetensors"));
    let _no_grad = tch::no_grad_guard();
    let parameters = model.parameters();
    assert_eq!(parameters.len(), values.len());
    for p in parameters {
        p.tensor.shallow_clone().copy_(&values[&p.name]);
    }
    model
}

/// Runs a configuration through every stage.
fn follow(case: &Case, peer: &Value, errors: &mut Errors) {
    let record = read(case.folder.join("record.safetensors"));
    let x = &record["0.x"];
    let mut model = load(case, "start");
    errors.note("loaded", &output(&mut model, x), &record["loaded"]);
    if case.starts_from_the_weight() {
        let mut own = LoraModel::wrap(case.base(), case.config()).unwrap();
        errors.note("initialised", &output(&mut own, x), &record["loaded"]);
        products(case, &own, errors);
    }
    train(case, &mut model, &record, errors);
    let trained = output(&mut model, x);
    errors.note("trained", &trained, &record["trained"]);
    for (what, other) in [("base", "base"), ("start", "loaded")] {
        let effect = relative_error(what, &trained, &record[other]);
        assert!(effect > case.effect(), "training changes the output of the {what} by {effect:.1e} only");
    }

    model.save_pretrained(case.folder.join("ours")).unwrap();
    let mut theirs = load(case, "trained");
    errors.note("from PEFT's file", &output(&mut theirs, x), &record["trained"]);

    match (peer["merge"].as_str().unwrap(), model.merge_adapter(&MergeOptions::new())) {
        ("refused", merged) => {
            let error = merged.expect_err("PEFT refuses to merge");
            let named = ["groups", "lora_bias"].iter().any(|field| error.to_string().contains(field));
            assert!(named, "{error}");
        }
        (kind, merged) => {
            merged.unwrap();
            let (merged, expected) = (output(&mut model, x), if kind == "same" { "merged" } else { "trained" });
            errors.note("merged", &merged, &record[expected]);
            model.unmerge_adapter().unwrap();
            let unmerged = output(&mut model, x);
            assert_same("unmerged", &unmerged, &trained);
            errors.note("unmerged", &unmerged, record.get("unmerged").unwrap_or(&record["trained"]));
        }
    }
}

/// s·B·A of an initialisation: its factors may differ from PEFT's in sign.
fn products(case: &Case, own: &LoraModel<TorchScript>, errors: &mut Errors) {
    let theirs = read(case.folder.join("start/adapter_model.safetensors"));
    let ours: BTreeMap<String, Tensor> = own.parameters().into_iter().map(|p| (p.name, p.tensor)).collect();
    for a in ours.keys().filter(|name| name.ends_with("lora_A.weight")) {
        let b = a.replace("lora_A", "lora_B");
        let [ours, theirs] =
            [&ours, &theirs].map(|set| set[&b].to_kind(Kind::Float).matmul(&set[a].to_kind(Kind::Float)));
        errors.note("initial B·A", &ours, &theirs);
    }
}

fn train(case: &Case, model: &mut LoraModel<TorchScript>, record: &BTreeMap<String, Tensor>, errors: &mut Errors) {
    model.train().unwrap();
    let parameters = model.trainable_parameters();
    let mut optimizer = case.optimizer(parameters);
    for step in 0..STEPS {
        let at = |what: &str| &record[&format!("{step}.{what}")];
        tch::manual_seed(100 + step as i64);
        let output = model.forward(at("x")).unwrap();
        errors.note("training", &output, at("output"));
        output.to_kind(Kind::Float).mse_loss(at("label"), tch::Reduction::Mean).backward();
        optimizer.step().unwrap();
        optimizer.zero_grad().unwrap();
    }
}

/// The worst error of each stage, with its configuration.
#[derive(Default)]
struct Report {
    worst: BTreeMap<(&'static str, &'static str), (f64, usize, String)>,
    failed: Vec<String>,
}

impl Report {
    fn add(&mut self, case: &Case, stage: &'static str, error: f64) {
        let kind = if case.is("dtype", "f32") { "f32" } else { "bf16" };
        let worst = self.worst.entry((kind, stage)).or_insert((-1.0, 0, String::new()));
        worst.1 += 1;
        if error > worst.0 {
            (worst.0, worst.2) = (error, case.name.clone());
        }
        // A NaN fails too.
        if error.is_nan() || error > case.tolerance() {
            self.failed.push(format!("{}: {stage} differs by {error:.2e}", case.name));
        }
    }

    fn print(&self) {
        for ((kind, stage), (error, count, name)) in &self.worst {
            println!("{kind:4}  {stage:16}  {count:4} comparisons, worst {error:.2e} ({name})");
        }
    }
}

#[test]
fn every_configuration_follows_peft() {
    let (Some(_), _rng) = (python(), rng()) else { return };
    tch::set_num_threads(1);
    let dir = common::fresh_dir("matrix");
    let rows = axes::rows();
    let uncovered: Vec<_> = axes::pairs().into_iter().filter(|p| !rows.iter().any(|r| axes::covers(r, p))).collect();
    assert!(uncovered.is_empty(), "{uncovered:?}");
    let cases: Vec<Case> = rows.into_iter().enumerate().map(|(at, row)| Case::new(&dir, at, row)).collect();
    for case in &cases {
        case.config().save_pretrained(case.folder.join("config")).unwrap();
    }
    let list = Value::from_iter(cases.iter().map(Case::to_json));
    std::fs::write(dir.join("cases.json"), list.to_string()).unwrap();
    let answers = |mode: &str, file: &str| -> Value {
        peer("matrix_reference.py", &[mode.as_ref(), dir.as_os_str()]);
        serde_json::from_slice(&std::fs::read(dir.join(file)).unwrap()).unwrap()
    };

    let peers = answers("make", "peers.json");
    let mut report = Report::default();
    let mut defects: BTreeMap<&str, usize> = BTreeMap::new();
    for case in &cases {
        let peer = &peers[&case.name];
        if let Some(error) = peer["failed"].as_str() {
            report.failed.push(format!("{}: in PEFT: {error}", case.name));
            continue;
        }
        for defect in peer["defects"].as_array().unwrap() {
            *defects.entry(defect.as_str().unwrap()).or_default() += 1;
        }
        let mut errors = Errors::default();
        let followed = catch_unwind(AssertUnwindSafe(|| follow(case, peer, &mut errors)));
        for (stage, error) in errors.stages {
            report.add(case, stage, error);
        }
        if let Err(panic) = followed {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            report.failed.push(format!("{}: {}", case.name, text.unwrap_or_default()));
        }
    }
    let checked = answers("check", "check.json");
    for case in &cases {
        let found = &checked[&case.name];
        match found["error"].as_f64() {
            Some(error) => report.add(case, "our file in PEFT", error),
            None => report.failed.push(format!("{}: our file in PEFT: {}", case.name, found["failed"])),
        }
    }
    report.print();
    for (defect, count) in defects {
        println!("{count:3} by formula: {defect}");
    }
    let on_bnb = cases.iter().filter(|case| peers[&case.name]["bitsandbytes"] == true).count();
    println!("{} configurations, {on_bnb} of them on bitsandbytes' own layers", cases.len());
    assert!(cases.len() >= 150);
    assert!(report.failed.is_empty(), "{} failures:\n{}", report.failed.len(), report.failed.join("\n"));
}
