//! Adapters and training steps against HF PEFT, both ways: for a `tch::nn` model that is mirrored
//! in PyTorch (tests/python/mirror.py), and for a TorchScript export of a tiny `transformers` Llama.

mod common;
mod twin;

use std::path::Path;

use common::{assert_close, assert_differs, assert_same, bits, device, peer, read, rng};
use tch::nn::Module;
use tch::{Kind, Tensor};
use tch_peft::{
    AdamW, Base, Error, InitLoraWeights, LoraConfig, LoraModel, NamedParameter, Optimizer, TargetModules, TorchScript,
};
use twin::{LAYERS, Net};

/// f32, relative to the norm.
const TOLERANCE: f64 = 1e-5;

/// What PEFT made: written once by the first test that asks.
fn fixtures() -> Option<&'static Path> {
    common::made("peft_interop", "peft_interop.py", &["make"])
}

fn llama(dir: &Path) -> Base<TorchScript> {
    Base::torchscript_on_device(dir.join("llama/model.pt"), device()).unwrap()
}

fn next_token_loss(logits: &Tensor, ids: &Tensor) -> Tensor {
    let length = ids.size()[1];
    let logits = logits.narrow(1, 0, length - 1).flatten(0, 1);
    logits.cross_entropy_for_logits(&ids.narrow(1, 1, length - 1).flatten(0, 1))
}

/// Draws A and B: B is 0 at first, and then an adapter does nothing.
fn randomise(parameters: &[NamedParameter]) {
    let _no_grad = tch::no_grad_guard();
    for p in parameters {
        let _ = p.tensor.shallow_clone().normal_(0.0, 0.1);
    }
}

#[test]
fn adapters_from_peft_answer_as_in_peft() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("net_outputs.safetensors"));
    let ids = &expected["ids"];
    let plain = Net::load(dir).module().forward(ids);
    assert_close("the base", &plain, &expected["base"], TOLERANCE);
    for case in ["list", "regex", "rslora", "all_linear", "one_path", "dropout"] {
        let folder = dir.join("from_peft").join(case);
        let model = LoraModel::from_pretrained(Net::load(dir), &folder).unwrap();
        let found = model.forward(ids).unwrap();
        assert_close(case, &found, &expected[case], TOLERANCE);
        assert_differs(case, &found, &plain, 1e-2);

        let stored = read(folder.join("adapter_model.safetensors"));
        let report = model.load_report().unwrap();
        assert_eq!(report.loaded, stored.keys().cloned().collect::<Vec<_>>(), "{case}");
        assert_eq!((&report.missing, &report.unexpected), (&vec![], &vec![]), "{case}");
        assert!(report.unknown_config_keys.is_empty(), "{case}: {:?}", report.unknown_config_keys);
        assert!(model.trainable_parameters().is_empty(), "{case}: nothing is trainable after from_pretrained");

        let off = model.disable_adapters();
        assert_same(case, &model.forward(ids).unwrap(), &plain);
        drop(off);
        assert_same(case, &model.forward(ids).unwrap(), &found);
    }
}

#[test]
fn adapters_from_peft_answer_as_in_peft_on_a_torchscript_llama() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("llama_outputs.safetensors"));
    let ids = &expected["ids"];
    let plain = llama(dir).module().forward(ids).unwrap();
    assert_close("the base", &plain, &expected["base"], TOLERANCE);
    for case in ["attention", "everything", "head"] {
        let folder = dir.join("llama_from_peft").join(case);
        let model = LoraModel::from_pretrained(llama(dir), &folder).unwrap();
        // The first runs are profiled, later ones may run another graph.
        for run in 0..4 {
            let found = model.forward(ids).unwrap();
            assert_close(&format!("{case}, run {run}"), &found, &expected[case], TOLERANCE);
            assert_differs(case, &found, &plain, 1e-2);
        }
    }
}

/// PEFT's default writes a copy of the base's output embedding into an adapter that targets it.
#[test]
fn an_adapter_with_a_copy_of_the_output_embedding_loads() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("llama_outputs.safetensors"));
    let model = LoraModel::from_pretrained(llama(dir), dir.join("llama_with_base_layer")).unwrap();
    assert_close("head", &model.forward(&expected["ids"]).unwrap(), &expected["head"], TOLERANCE);
}

/// Writes an adapter with random factors, and what the model answers with it.
fn write_adapter<M: tch_peft::ForwardModule>(model: &mut LoraModel<M>, folder: &Path, ids: &Tensor) {
    randomise(&model.trainable_parameters());
    model.eval().unwrap();
    let output = model.forward(ids).unwrap();
    model.save_pretrained(folder).unwrap();
    common::write(folder.join("output.safetensors"), &[("output".into(), output)]);
}

/// Writes adapters of every kind; peft_interop.py then loads them into PEFT, and compares keys,
/// values, outputs, the bytes of the safetensors file and the configuration.
#[test]
fn adapters_from_here_answer_the_same_in_peft() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    tch::manual_seed(3);
    let ids = &read(dir.join("net_outputs.safetensors"))["ids"];
    let config = || LoraConfig::builder();
    let cases = [
        ("list", config().r(4).lora_alpha(8.0).target_modules(["q_proj", "v_proj"])),
        ("regex", config().r(3).lora_alpha(5.0).target_modules(r"h\.\d+\.(fc|q_proj)")),
        ("rslora", config().r(4).lora_alpha(8.0).target_modules(["fc"]).use_rslora(true)),
        ("all_linear", config().r(2).lora_alpha(4.0).target_modules("all-linear")),
        (
            "one_path",
            config().r(2).lora_alpha(16.0).target_modules(["h.1.v_proj"]).init_lora_weights(InitLoraWeights::Gaussian),
        ),
        ("dropout", config().r(4).lora_alpha(8.0).target_modules(["q_proj", "head"]).lora_dropout(0.5)),
        ("fractional_alpha", config().r(4).lora_alpha(2.5).target_modules(["q_proj"])),
    ];
    for (case, config) in cases {
        let mut model = LoraModel::wrap(Net::load(dir), config.build().unwrap()).unwrap();
        write_adapter(&mut model, &dir.join("from_rust").join(case), ids);
    }

    let ids = &read(dir.join("llama_outputs.safetensors"))["ids"];
    let cases = [
        ("attention", config().r(4).lora_alpha(8.0).target_modules(["q_proj", "v_proj"])),
        ("all_linear", config().r(8).lora_alpha(16.0).target_modules("all-linear")),
        ("output_layer", config().r(2).lora_alpha(4.0).target_modules(r"model\.layers\.1\.mlp\.down_proj|lm_head")),
    ];
    for (case, config) in cases {
        let mut model = LoraModel::wrap(llama(dir), config.build().unwrap()).unwrap();
        write_adapter(&mut model, &dir.join("llama_from_rust").join(case), ids);
        if case == "all_linear" {
            let layers = model.layers();
            assert_eq!(layers.len(), 14, "{layers:?}");
            assert!(!layers.contains(&"lm_head"), "PEFT leaves the output layer out");
        }
    }
    // An adapter of PEFT's that passed through here.
    let model = LoraModel::from_pretrained(llama(dir), dir.join("llama_from_peft/everything")).unwrap();
    let folder = dir.join("llama_from_rust/everything");
    model.save_pretrained(&folder).unwrap();
    let output = model.forward(ids).unwrap();
    common::write(folder.join("output.safetensors"), &[("output".into(), output)]);

    peer("peft_interop.py", &["check".as_ref(), dir.as_os_str()]);
}

#[test]
fn what_peft_wrote_is_written_again_byte_for_byte() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for (kind, case) in [("from_peft", "list"), ("from_peft", "one_path"), ("llama_from_peft", "everything")] {
        let folder = dir.join(kind).join(case);
        let again = dir.join("again").join(kind).join(case);
        match kind {
            "from_peft" => LoraModel::from_pretrained(Net::load(dir), &folder).unwrap().save_pretrained(&again),
            _ => LoraModel::from_pretrained(llama(dir), &folder).unwrap().save_pretrained(&again),
        }
        .unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let [theirs, ours] = [&folder, &again].map(|folder| std::fs::read(folder.join(file)).unwrap());
            assert!(theirs == ours, "{case}: {file} differs from PEFT's");
        }
    }
}

/// The initial adapter of a training run by PEFT, and the record of its five steps of AdamW.
fn follow_training(name: &str) {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let record = read(dir.join(format!("{name}.safetensors")));
    let model = LoraModel::init_lora(Net::load(dir), dir.join(name)).unwrap();
    assert!(model.is_training());
    let parameters = model.trainable_parameters();
    assert_eq!(parameters.len(), 2 * 3 * LAYERS);
    let mut optimizer = AdamW::builder().lr(1e-2).build(model.trainable_parameters()).unwrap();

    tch::manual_seed(1234);
    for step in 0..5 {
        let ids = &record[&format!("{step}.ids")];
        let loss = next_token_loss(&model.forward(ids).unwrap(), ids);
        assert_close(&format!("loss of step {step}"), &loss, &record[&format!("{step}.loss")], TOLERANCE);
        loss.backward();
        for p in &parameters {
            let expected = &record[&format!("{step}.grad.{}", p.name)];
            let found = p.tensor.grad();
            if f64::try_from(expected.norm()).unwrap() == 0.0 {
                // A's at first, since B is 0.
                assert_eq!(f64::try_from(found.norm()).unwrap(), 0.0, "step {step}, gradient of {}", p.name);
            } else {
                assert_close(&format!("step {step}, gradient of {}", p.name), &found, expected, TOLERANCE);
            }
        }
        optimizer.step().unwrap();
        optimizer.zero_grad().unwrap();
        for p in &parameters {
            let expected = &record[&format!("{step}.value.{}", p.name)];
            assert_close(&format!("step {step}, {}", p.name), &p.tensor, expected, TOLERANCE);
        }
    }
}

#[test]
fn five_steps_of_training_equal_pefts() {
    follow_training("train");
}

/// The masks are drawn as PEFT draws them: the same seed gives the same steps.
#[test]
fn five_steps_with_dropout_equal_pefts() {
    follow_training("train_dropout");
}

#[test]
fn features_that_are_not_had_are_refused_by_name() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let cases = [("alora", "alora_invocation_tokens")];
    for (case, field) in cases {
        let folder = dir.join("other_features").join(case);
        let loaded = LoraModel::from_pretrained(Net::load(dir), &folder);
        for loaded in [loaded, LoraModel::init_lora(Net::load(dir), &folder)] {
            let error = loaded.expect_err(case);
            let Error::Unsupported { fields } = &error else { panic!("{case}: {error}") };
            assert!(fields.iter().any(|f| f.starts_with(&format!("{field} = "))), "{case}: {fields:?}");
            assert!(error.to_string().contains(field), "{case}: {error}");
        }
    }
}

/// Ranks, scales and layers that differ from layer to layer; biases and full copies.
#[test]
fn adapters_with_patterns_filters_and_copies_answer_as_in_peft() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("net_outputs.safetensors"));
    let plain = &expected["base"];
    let cases = [
        ("rank_pattern", 2),
        ("exclude_modules", 1),
        ("layers_to_transform", 1),
        ("dora", 2),
        ("lora_bias", 2),
        ("bias", 2),
        ("modules_to_save", 2),
    ];
    for (case, layers) in cases {
        let model = LoraModel::from_pretrained(Net::load(dir), dir.join("other_features").join(case)).unwrap();
        assert_eq!(model.layers().len(), layers, "{case}: {:?}", model.layers());
        let found = model.forward(&expected["ids"]).unwrap();
        assert_close(case, &found, &expected[&format!("other.{case}")], TOLERANCE);
        assert_differs(case, &found, plain, 1e-2);
    }
}

/// PEFT saves `rank_pattern` and `alpha_pattern` sorted, and after a reload another pattern may be the
/// first that matches: {"q_proj": 2, ".*": 3} turns around. Here the meaning survives, in PEFT too.
#[test]
fn the_order_of_patterns_survives_a_save() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let ids = &read(dir.join("net_outputs.safetensors"))["ids"];
    let config = LoraConfig::builder()
        .r(4)
        .target_modules(["q_proj", "v_proj", "fc"])
        .rank_pattern([("h.1.q_proj", 5), ("q_proj", 2), (".*", 3)])
        .alpha_pattern([("q_proj", 16.0), (".*", 3.0)]);
    let mut model = LoraModel::wrap(Net::load(dir), config.build().unwrap()).unwrap();
    let ranks: Vec<i64> = model.parameters().iter().step_by(2).map(|p| p.tensor.size()[0]).collect();
    assert_eq!(ranks, [3, 2, 3, 3, 5, 3], "fc, q_proj and v_proj of both layers");
    let folder = dir.join("from_rust/ordered_patterns");
    write_adapter(&mut model, &folder, ids);
    let again = LoraModel::from_pretrained(Net::load(dir), &folder).unwrap();
    assert_same("reloaded", &again.forward(ids).unwrap(), &model.forward(ids).unwrap());
    assert!(model.config().differences(again.config()).is_empty());
    peer("peft_interop.py", &["check".as_ref(), dir.as_os_str()]);
}

#[test]
fn unknown_keys_of_a_configuration_are_told_and_kept() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let folder = dir.join("unknown_keys");
    std::fs::create_dir_all(&folder).unwrap();
    let source = dir.join("from_peft/list");
    std::fs::copy(source.join("adapter_model.safetensors"), folder.join("adapter_model.safetensors")).unwrap();
    let text = std::fs::read_to_string(source.join("adapter_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["zz_later"] = serde_json::json!({"b": [1, 2.5, null], "a": "x"});
    config["a_later_flag"] = true.into();
    config["revision"] = "abc".into();
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();

    let model = LoraModel::from_pretrained(Net::load(dir), &folder).unwrap();
    let mut unknown = model.load_report().unwrap().unknown_config_keys.clone();
    unknown.sort();
    assert_eq!(unknown, ["a_later_flag", "zz_later"]);

    let again = dir.join("unknown_keys_again");
    model.save_pretrained(&again).unwrap();
    let written: serde_json::Value =
        serde_json::from_slice(&std::fs::read(again.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(written, config);
}

#[test]
fn a_new_adapter_leaves_the_outputs_as_they_were() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("net_outputs.safetensors"));
    let plain = Net::load(dir).module().forward(&expected["ids"]);
    for init in [InitLoraWeights::Default, InitLoraWeights::Gaussian] {
        let config = LoraConfig::builder()
            .r(4)
            .target_modules(TargetModules::AllLinear)
            .init_lora_weights(init)
            .build()
            .unwrap();
        let model = LoraModel::wrap(Net::load(dir), config).unwrap();
        assert_close("at the start", &model.forward(&expected["ids"]).unwrap(), &plain, 1e-6);
        for p in model.trainable_parameters() {
            let norm = f64::try_from(p.tensor.norm()).unwrap();
            assert_eq!(norm == 0.0, p.name.ends_with("lora_B.weight"), "{}", p.name);
            assert_eq!(p.tensor.kind(), Kind::Float);
        }
    }
}

/// Saving twice writes the same bytes; so does loading and saving.
#[test]
fn saving_is_deterministic() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let config = LoraConfig::builder().r(4).target_modules(["fc", "v_proj"]).build().unwrap();
    let model = LoraModel::wrap(Net::load(dir), config).unwrap();
    randomise(&model.trainable_parameters());
    let folders = [1, 2, 3].map(|i| dir.join(format!("twice_{i}")));
    model.save_pretrained(&folders[0]).unwrap();
    model.save_pretrained(&folders[1]).unwrap();
    let again = LoraModel::init_lora(Net::load(dir), &folders[0]).unwrap();
    again.save_pretrained(&folders[2]).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let [a, b, c] = folders.each_ref().map(|folder| std::fs::read(folder.join(file)).unwrap());
        assert!(a == b && a == c, "{file}");
    }
    for (ours, theirs) in model.trainable_parameters().iter().zip(again.trainable_parameters()) {
        assert_eq!(ours.name, theirs.name);
        assert_eq!(bits(&ours.tensor), bits(&theirs.tensor), "{}", ours.name);
    }
}
