//! LoHa, LoKr and LyCORIS' variants of LoRA in files, both ways: files with its keys give what its formulas give,
//! and LyCORIS itself where it is installed; what is written here loads in PEFT, diffusers and LyCORIS.

mod common;

use std::path::{Path, PathBuf};

use common::{assert_close, assert_same, device, peer, read, rng};
use serde_json::Value;
use tch::{Kind, Tensor};
use tch_peft::{AdapterConfig, AdapterFile, AdapterFormat, Base, LohaConfig, LokrConfig, LoraConfig};
use tch_peft::{Error, LoraModel, QuantConfig, TorchScript};

/// f32, relative to the norm.
const TOLERANCE: f64 = 2e-5;

const FORMATS: [AdapterFormat; 5] = [
    AdapterFormat::Diffusers,
    AdapterFormat::Kohya,
    AdapterFormat::ComfyUi,
    AdapterFormat::Lycoris,
    AdapterFormat::Peft,
];

fn fixtures() -> Option<&'static Path> {
    common::made("lycoris", "lycoris_reference.py", &["make"])
}

fn base(dir: &Path) -> Base<TorchScript> {
    Base::torchscript_on_device(dir.join("model.pt"), device()).unwrap()
}

/// A folder for what Python checks: the adapter, and what the model computes with it.
fn place(dir: &Path, name: &str, output: &Tensor) -> PathBuf {
    let folder = dir.join("from_rust").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    common::write(folder.join("output.safetensors"), &[("output".into(), output.copy())]);
    folder
}

fn randomise<M>(model: &LoraModel<M>) {
    let _no_grad = tch::no_grad_guard();
    for mut p in model.trainable_parameters() {
        let _ = match p.name.contains("magnitude") {
            true => p.tensor.uniform_(0.5, 1.5),
            false => p.tensor.normal_(0.0, 0.4),
        };
    }
}

#[test]
fn files_go_both_ways() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    files_answer_by_their_formulas(dir);
    files_written_here_answer_the_same_elsewhere(dir);
    peer("lycoris_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

fn files_answer_by_their_formulas(dir: &Path) {
    let answers = read(dir.join("answers.safetensors"));
    let (x, names) = (&answers["input"], base(dir).weight_names());
    let cases: Value = serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap();
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 13, "{cases:?}");
    for case in cases {
        let (name, format) = (case["name"].as_str().unwrap(), case["format"].as_str().unwrap());
        let file = AdapterFile::new(dir.join(format!("{name}.safetensors")));
        assert_eq!(file.detect().unwrap().format.name(), format, "{name}");
        let model = LoraModel::from_pretrained(base(dir), file.clone()).unwrap();
        let output = model.forward(x).unwrap();
        assert_close(name, &output, &answers[name], TOLERANCE);
        let report = model.load_report().unwrap();
        assert!(report.loaded.len() >= model.parameters().len(), "{name}: {report}");

        // The configuration says what the shapes were: PEFT makes the same.
        model.save_pretrained(place(dir, &format!("{name}.saved"), &output).join("adapter")).unwrap();
        let again = LoraModel::from_pretrained(base(dir), dir.join(format!("from_rust/{name}.saved/adapter"))).unwrap();
        assert_same(name, &again.forward(x).unwrap(), &output);
        // And so without a model.
        if !name.contains("core") && name != "lokr_square" {
            let folder = place(dir, &format!("{name}.converted"), &output).join("adapter");
            file.convert(AdapterFormat::Peft, &folder, &names).unwrap();
            let again = LoraModel::from_pretrained(base(dir), &folder).unwrap();
            assert_same(name, &again.forward(x).unwrap(), &output);
        }
    }

    // On a quantised base the same addition is made.
    let nf4 = || base(dir).quantize(&QuantConfig::nf4().build().unwrap()).unwrap();
    let taken = LoraModel::from_pretrained(nf4(), dir.join("lokr.safetensors")).unwrap();
    let saved = LoraModel::from_pretrained(nf4(), dir.join("from_rust/lokr.saved/adapter")).unwrap();
    assert_same("nf4", &taken.forward(x).unwrap(), &saved.forward(x).unwrap());
}

fn files_written_here_answer_the_same_elsewhere(dir: &Path) {
    let x = &read(dir.join("answers.safetensors"))["input"];
    let all = ["conv_in", "point", "to_q", "ff"];
    let lokr = || LokrConfig::builder().target_modules(["point", "to_q", "ff"]);
    let cases: [(&str, AdapterConfig); 8] = [
        ("loha", LohaConfig::builder().r(3).alpha(1.5).target_modules(all).build().unwrap().into()),
        (
            "loha_core",
            LohaConfig::builder()
                .r(2)
                .alpha(3.0)
                .use_effective_conv2d(true)
                .target_modules(all)
                .build()
                .unwrap()
                .into(),
        ),
        ("lokr", lokr().r(2).alpha(3.0).decompose_factor(4).build().unwrap().into()),
        ("lokr_both", lokr().r(1).alpha(0.3).decompose_both(true).build().unwrap().into()),
        (
            "lokr_core",
            lokr()
                .target_modules(all)
                .r(1)
                .alpha(5.0)
                .use_effective_conv2d(true)
                .decompose_factor(2)
                .build()
                .unwrap()
                .into(),
        ),
        // Whole factors of which the scale isn't one.
        ("lokr_whole", lokr().target_modules(all).r(64).alpha(20.0).build().unwrap().into()),
        ("lokr_sizes", lokr().r(1).w1_pattern([("to_q", [12, 2]), ("ff", [5, 9])]).build().unwrap().into()),
        ("dora", LoraConfig::builder().r(2).lora_alpha(3.0).use_dora(true).target_modules(all).build().unwrap().into()),
    ];
    for (name, config) in cases {
        tch::manual_seed(6);
        let mut model = LoraModel::wrap(base(dir), config.clone()).unwrap();
        randomise(&model);
        model.eval().unwrap();
        let output = model.forward(x).unwrap();
        for format in FORMATS {
            let label = format!("{name}.{}", format.name().to_lowercase());
            let to = dir.join("scratch").join(&label);
            let path = if format == AdapterFormat::Peft { to.join("adapter") } else { to.join("lora.safetensors") };
            let file = AdapterFile::new(&path).component("transformer");
            let refused = match name {
                "dora" => matches!(format, AdapterFormat::Kohya | AdapterFormat::ComfyUi),
                _ => name.starts_with("loha") && format == AdapterFormat::Diffusers,
            };
            if refused {
                let error = model.save_as("default", format, file).unwrap_err();
                assert!(matches!(error, Error::Unsupported { .. }), "{label}: {error}");
                continue;
            }
            model.save_as("default", format, file).unwrap();
            let again = LoraModel::from_pretrained(base(dir), &path).unwrap();
            assert_eq!(again.load_report().unwrap().format, format, "{label}");
            // Of whole factors the scale is in W1, rounded once.
            let folded = name == "lokr_whole" && !matches!(format, AdapterFormat::Peft | AdapterFormat::Diffusers);
            assert_close(&label, &again.forward(x).unwrap(), &output, if folded { 1e-6 } else { 1e-12 });
            if !folded {
                let [found, expected] = [&again, &model].map(|m| m.config().layer_settings(m.layers()));
                assert_eq!(found.len(), expected.len(), "{label}");
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found.scaling, expected.scaling, "{label}");
                }
            }
            // What diffusers and PEFT don't know stays here.
            if name == "lokr_sizes" && format == AdapterFormat::Diffusers {
                continue;
            }
            std::fs::rename(&path, place(dir, &label, &output).join(path.file_name().unwrap())).unwrap();
        }
        // It goes on training as what it is.
        let again =
            LoraModel::init_lora(base(dir), dir.join(format!("from_rust/{name}.lycoris/lora.safetensors"))).unwrap();
        assert_eq!(again.config().peft_type(), config.peft_type());
        again.forward(x).unwrap().square().mean(Kind::Float).backward();
        for p in again.trainable_parameters() {
            assert!(f64::try_from(p.tensor.grad().norm()).unwrap() > 0.0, "{name}: {}", p.name);
        }
    }
}
