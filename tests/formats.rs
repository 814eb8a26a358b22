//! Adapters in other programs' layouts, both ways, against the programs: files that diffusers wrote (of a UNet, a
//! diffusion transformer and a text encoder, exported to TorchScript) give what they give there, also on a quantised
//! base, and files written here load there.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{assert_close, assert_differs, assert_same, device, peer, read, rng};
use tch::{Kind, Tensor};
use tch_peft::{
    AdapterFile, AdapterFormat, Base, Error, KeyMapping, LoraConfig, LoraConfigBuilder, LoraModel, QuantConfig,
    TorchScript,
};

/// f32, relative to the norm.
const TOLERANCE: f64 = 1e-5;

fn fixtures() -> Option<&'static Path> {
    common::made("formats", "formats_reference.py", &["make"])
}

/// A module and the inputs that it is tried on.
struct Model<'a> {
    dir: &'a Path,
    name: &'static str,
    answers: BTreeMap<String, Tensor>,
}

impl<'a> Model<'a> {
    fn new(dir: &'a Path, name: &'static str) -> Self {
        Model { dir, name, answers: read(dir.join("answers.safetensors")) }
    }

    fn base(&self) -> Base<TorchScript> {
        Base::torchscript_on_device(self.dir.join(self.name).join("model.pt"), device()).unwrap()
    }

    fn run(&self, model: &LoraModel<TorchScript>) -> Tensor {
        let inputs: Vec<&Tensor> =
            (0..6).filter_map(|i| self.answers.get(&format!("{}.input.{i}", self.name))).collect();
        model.module().forward_ts(&inputs).unwrap()
    }

    /// What diffusers answered in this case.
    fn expected(&self, case: &str) -> &Tensor {
        &self.answers[&format!("{case}.{}", self.name)]
    }

    fn plain(&self) -> &Tensor {
        &self.answers[self.name]
    }

    fn component(&self) -> &'static str {
        match self.name {
            "dit" => "transformer",
            "clip" => "text_encoder",
            other => other,
        }
    }

    /// An adapter with random factors, in evaluation mode.
    fn adapted(&self, base: Base<TorchScript>, config: LoraConfigBuilder) -> LoraModel<TorchScript> {
        tch::manual_seed(5);
        let mut model = LoraModel::wrap(base, config.build().unwrap()).unwrap();
        randomise(&model);
        model.eval().unwrap();
        model
    }
}

fn randomise<M>(model: &LoraModel<M>) {
    let _no_grad = tch::no_grad_guard();
    for mut p in model.trainable_parameters() {
        let _ = p.tensor.normal_(0.0, 0.2);
    }
}

/// The transformer whose modules all lie in a module `net`, and what they are called in files.
fn wrapped(dir: &Path) -> (Base<TorchScript>, KeyMapping) {
    let mapping = KeyMapping::builder().pattern(r"net\.(.+)", "$1").build().unwrap();
    (Base::torchscript_on_device(dir.join("wrapped/model.pt"), device()).unwrap(), mapping)
}

#[test]
fn files_of_diffusers_answer_as_in_diffusers() {
    use AdapterFormat::{ComfyUi, Diffusers, DiffusersOld, Kohya, Peft};
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let cases: [(&str, &str, AdapterFormat, &[&str]); 17] = [
        ("metadata", "metadata", Diffusers, &["dit"]),
        ("simpletuner", "metadata", Diffusers, &["dit"]),
        ("peft", "peft", Peft, &["dit"]),
        ("rslora", "rslora", Diffusers, &["dit"]),
        ("dora", "dora", Diffusers, &["dit"]),
        ("lora_bias", "lora_bias", Diffusers, &["dit"]),
        ("plain", "plain", Diffusers, &["dit"]),
        ("bare", "bare", Diffusers, &["dit"]),
        ("two", "two", Diffusers, &["unet", "clip"]),
        ("old", "old", DiffusersOld, &["unet", "clip"]),
        ("processors.safetensors", "processors", DiffusersOld, &["unet", "clip"]),
        ("kohya.safetensors", "kohya", Kohya, &["unet", "clip"]),
        ("kohya_mixed.safetensors", "kohya_mixed", Kohya, &["unet", "clip"]),
        ("sdxl.safetensors", "sdxl", Kohya, &["sdxl"]),
        ("flux.safetensors", "flux", Kohya, &["flux"]),
        ("flux_single.safetensors", "flux_single", ComfyUi, &["flux"]),
        ("comfyui.safetensors", "comfyui", ComfyUi, &["dit"]),
    ];
    for (path, case, format, models) in cases {
        for name in models.iter().copied() {
            let model = Model::new(dir, name);
            let mut file = AdapterFile::new(dir.join(path));
            let found = file.detect().unwrap();
            assert_eq!(found.format, format, "{case}: {found}");
            if models.len() > 1 {
                let error = LoraModel::init_lora(model.base(), file.clone()).unwrap_err().to_string();
                assert!(error.contains("component") && error.contains("text_encoder, unet"), "{error}");
                file = file.component(model.component());
            }
            let loaded = LoraModel::from_pretrained(model.base(), file.clone()).unwrap();
            let what = format!("{case}, {name}");
            assert_close(&what, &model.run(&loaded), model.expected(case), TOLERANCE);
            assert_differs(&what, model.expected(case), model.plain(), 1e-2);

            // The report speaks of the file's own keys.
            let report = loaded.load_report().unwrap();
            assert_eq!(report.format, format, "{what}");
            // Of a fused layer, A is that of several modules.
            let tensors = loaded.parameters().len();
            assert!(report.loaded.len() == tensors || name == "flux", "{what}: {report}");
            let path = match format {
                Peft => dir.join(path).join("adapter_model.safetensors"),
                _ if dir.join(path).is_dir() => dir.join(path).join("pytorch_lora_weights.safetensors"),
                _ => dir.join(path),
            };
            let keys = read(path);
            assert!(report.loaded.iter().all(|key| keys.contains_key(key)), "{what}: {report}");

            if name == "dit" {
                let (base, mapping) = wrapped(dir);
                let other = LoraModel::from_pretrained(base, file.key_mapping(mapping)).unwrap();
                assert_same(&what, &model.run(&other), &model.run(&loaded));
                assert!(other.layers().iter().all(|path| path.starts_with("net.")), "{:?}", other.layers());
            }
        }
    }
}

/// A SimpleTuner checkpoint on a base that is quantised as SimpleTuner does it.
#[test]
fn a_checkpoint_of_simpletuner_is_taken_over_on_a_quantised_base() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let model = Model::new(dir, "dit");
    // quanto takes convolutions as well.
    let base = model.base().quantize(&QuantConfig::int8().convolutions(true).build().unwrap()).unwrap();
    let mut taken = LoraModel::init_lora(base, dir.join("simpletuner")).unwrap();
    assert_eq!(taken.config().as_lora().unwrap().r(), 4);
    assert_eq!(taken.config().as_lora().unwrap().lora_alpha(), 10.0);
    taken.eval().unwrap();
    assert_close("int8, as quanto has it", &model.run(&taken), model.expected("quantised"), TOLERANCE);
    assert_differs("int8", model.expected("quantised"), model.expected("quantised_base"), 1e-2);
    assert_differs("int8", model.expected("quantised"), model.expected("metadata"), 1e-4);

    // It goes on training.
    taken.train().unwrap();
    model.run(&taken).square().mean(Kind::Float).backward();
    let parameters = taken.trainable_parameters();
    assert_eq!(parameters.len(), taken.parameters().len());
    for p in &parameters {
        assert!(f64::try_from(p.tensor.grad().norm()).unwrap() > 0.0, "{}", p.name);
    }

    // On nf4, and beside another adapter, the file means what PEFT's folder means.
    let nf4 = || model.base().quantize(&QuantConfig::nf4().double_quant(true).build().unwrap()).unwrap();
    let one = LoraModel::from_pretrained(nf4(), dir.join("simpletuner/pytorch_lora_weights.safetensors")).unwrap();
    let mut other = LoraModel::from_pretrained(nf4(), dir.join("peft")).unwrap();
    assert_same("nf4", &model.run(&one), &model.run(&other));
    assert!(one.config().differences(other.config()).is_empty(), "{:?}", one.config().differences(other.config()));
    let before = model.run(&other);
    other.load_adapter(dir.join("comfyui.safetensors"), "comfyui").unwrap();
    other.hotswap_adapter(dir.join("simpletuner"), "comfyui").unwrap();
    other.set_adapter("comfyui").unwrap();
    assert_same("nf4, swapped in", &model.run(&other), &before);
}

fn attention() -> LoraConfigBuilder {
    let targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_out"];
    LoraConfig::builder().r(4).lora_alpha(10.0).target_modules(targets).rank_pattern([("to_v", 3)])
}

/// What is written here computes the same in diffusers and PEFT, and when it is read again.
#[test]
fn files_written_here_answer_the_same_elsewhere() {
    use AdapterFormat::{ComfyUi, Diffusers, DiffusersOld, Kohya, Peft};
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let convs = || {
        let targets = ["to_q", "to_out.0", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.0.proj", "proj_in"];
        LoraConfig::builder().r(4).lora_alpha(0.3).target_modules(targets).rank_pattern([("to_out.0", 2)])
    };
    let texts = || LoraConfig::builder().r(2).lora_alpha(3.0).target_modules(["q_proj", "out_proj", "fc1", "fc2"]);
    let mixed = || convs().alpha_pattern([("to_q", 5.0), ("conv1", 0.7)]);
    let cases: [(&str, &str, LoraConfigBuilder, AdapterFormat); 14] = [
        ("diffusers", "dit", attention().alpha_pattern([("to_q", 3.5)]), Diffusers),
        ("diffusers_rslora", "dit", attention().use_rslora(true), Diffusers),
        ("diffusers_dora", "dit", attention().use_dora(true), Diffusers),
        ("diffusers_two", "unet", convs(), Diffusers),
        ("diffusers_text", "clip", texts(), Diffusers),
        ("bare", "dit", attention(), Diffusers),
        ("old", "unet", convs(), DiffusersOld),
        ("old_text", "clip", texts(), DiffusersOld),
        ("kohya", "unet", convs(), Kohya),
        ("kohya_mixed", "unet", mixed(), Kohya),
        ("kohya_text", "clip", texts(), Kohya),
        ("kohya_rslora", "unet", convs().rank_pattern([("x", 1)]).use_rslora(true), Kohya),
        ("comfyui", "dit", attention().alpha_pattern([("to_q", 3.5), ("to_k", 4.0)]), ComfyUi),
        ("peft", "dit", attention().alpha_pattern([("to_q", 3.5)]), Peft),
    ];
    for (case, name, config, format) in cases {
        let model = Model::new(dir, name);
        let adapted = model.adapted(model.base(), config.clone());
        let output = model.run(&adapted);
        let folder = dir.join("from_rust").join(format!("{case}.{name}"));
        let place = if format == Peft { folder.join("adapter") } else { folder.join("lora.safetensors") };
        let file = match case {
            "bare" => AdapterFile::new(&place).component(""),
            _ => AdapterFile::new(&place).component(model.component()),
        };
        adapted.save_as("default", format, file).unwrap();
        common::write(folder.join("output.safetensors"), &[("output".into(), output.copy())]);

        let again = LoraModel::from_pretrained(model.base(), &place).unwrap();
        let report = again.load_report().unwrap();
        assert_eq!(report.format, format, "{case}: {report}");
        assert_close(case, &model.run(&again), &output, 1e-6);
        if format != DiffusersOld {
            let [found, expected] = [&again, &adapted].map(|m| m.config().layer_settings(m.layers()));
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.r, expected.r, "{case}");
                // With rsLoRA the layout has another alpha, for the same scale.
                let error = (found.scaling - expected.scaling).abs();
                assert!(error <= expected.scaling * 1e-15, "{case}: {found:?} instead of {expected:?}");
            }
            assert_same(case, &model.run(&again), &output);
        }
        if name == "dit" {
            let (base, mapping) = wrapped(dir);
            let adapted = model.adapted(base, config);
            let output = model.run(&adapted);
            let folder = dir.join("from_rust").join(format!("{case}.{name}.wrapped"));
            let place = if format == Peft { folder.join("adapter") } else { folder.join("lora.safetensors") };
            let component = if case == "bare" { "" } else { "transformer" };
            let file = AdapterFile::new(&place).component(component).key_mapping(mapping.clone());
            adapted.save_as("default", format, file).unwrap();
            common::write(folder.join("output.safetensors"), &[("output".into(), output.copy())]);
            let again =
                LoraModel::from_pretrained(wrapped(dir).0, AdapterFile::new(&place).key_mapping(mapping)).unwrap();
            assert_same(case, &model.run(&again), &output);
        }
    }
    // The parts of a pipeline in one file.
    let parts = ["diffusers_two.unet", "diffusers_text.clip"].map(|case| dir.join("from_rust").join(case));
    for (name, part) in ["unet", "clip"].into_iter().zip(&parts) {
        let folder = dir.join("from_rust").join(format!("joined.{name}"));
        let files = parts.each_ref().map(|part| AdapterFile::new(part.join("lora.safetensors")));
        AdapterFile::join(&files, folder.join("lora.safetensors")).unwrap();
        let output = read(part.join("output.safetensors")).remove("output").unwrap();
        common::write(folder.join("output.safetensors"), &[("output".into(), output.copy())]);
        let model = Model::new(dir, name);
        let file = AdapterFile::new(folder.join("lora.safetensors")).component(model.component());
        assert_eq!(file.detect().unwrap().components, ["text_encoder", "unet"]);
        assert_same(name, &model.run(&LoraModel::from_pretrained(model.base(), file).unwrap()), &output);
    }
    peer("formats_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

/// The configuration in a header is held against the tensors.
#[test]
fn a_header_that_contradicts_the_tensors_is_refused() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let model = Model::new(dir, "dit");
    let error = LoraModel::init_lora(model.base(), dir.join("lost.safetensors")).unwrap_err();
    let Error::Keys { missing, .. } = &error else { panic!("{error}") };
    assert_eq!(missing, &["those of transformer_blocks.1.attn.to_k"]);
    let error = LoraModel::init_lora(model.base(), dir.join("other_rank.safetensors")).unwrap_err().to_string();
    assert!(error.contains("r = 8") && error.contains("transformer_blocks.0.attn.to_k.lora_A.weight"), "{error}");
}
