//! Tied embeddings: `ensure_weight_tying`, and what is adapted of a tied weight without it, against PEFT.

mod common;

use common::{assert_close, assert_differs, assert_same, device, fresh_dir, peer, python, read, rng};
use tch::{Kind, Tensor, nn};
use tch_peft::{Base, Error, LoraConfig, LoraModel, MergeOptions};

const STEPS: usize = 3;
/// As in tying_reference.py.
const LR: f64 = 0.05;

#[test]
fn tied_weights_follow_peft_and_peft_follows_us() {
    if python().is_none() {
        return;
    }
    let (dir, _rng) = (fresh_dir("tying"), rng());
    peer("tying_reference.py", &["make".as_ref(), dir.as_os_str()]);
    let base = || Base::torchscript_on_device(dir.join("model.pt"), device()).unwrap();
    let mut cases = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.is_dir() {
            continue;
        }
        let name = folder.file_name().unwrap().to_str().unwrap();
        let record = read(folder.join("record.safetensors"));
        let mut model = LoraModel::init_lora(base(), folder.join("adapter")).unwrap();
        model.eval().unwrap();
        let run = |model: &LoraModel<_>| tch::no_grad(|| model.forward(&record["ids"]).unwrap());
        assert_close(&format!("{name}: before"), &run(&model), &record["before"], 1e-5);
        for _ in 0..STEPS {
            let logits = model.forward(&record["ids"]).unwrap().flatten(0, 1);
            logits.cross_entropy_for_logits(&record["labels"].flatten(0, 1)).backward();
            let _no_grad = tch::no_grad_guard();
            for p in model.trainable_parameters() {
                let mut value = p.tensor.shallow_clone();
                value -= p.tensor.grad() * LR;
                let _ = p.tensor.grad().zero_();
            }
        }
        assert_close(&format!("{name}: after"), &run(&model), &record["after"], 1e-5);
        model.save_pretrained(folder.join("ours")).unwrap();
        for file in ["ours", "trained"] {
            let mut again = LoraModel::from_pretrained(base(), folder.join(file)).unwrap();
            again.eval().unwrap();
            assert_close(&format!("{name}: {file}"), &run(&again), &record["after"], 1e-5);
        }
        // The same tensors under the same keys.
        let keys = |file: &str| read(folder.join(file).join("adapter_model.safetensors"));
        let (ours, theirs) = (keys("ours"), keys("trained"));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}");
        for (key, tensor) in &ours {
            assert_close(&format!("{name}: {key}"), tensor, &theirs[key], 1e-5);
        }
        // A file in which the two uses differ isn't that of a tied weight.
        if ["embedding", "saved_head"].contains(&name) {
            let torn = fresh_dir("tying_torn");
            let tensors = ours.iter().map(|(key, tensor)| match key.contains("lm_head") {
                true => (key.clone(), tensor + 1.0),
                false => (key.clone(), tensor.shallow_clone()),
            });
            common::write(torn.join("adapter_model.safetensors"), &tensors.collect::<Vec<_>>());
            std::fs::copy(folder.join("ours/adapter_config.json"), torn.join("adapter_config.json")).unwrap();
            let error = LoraModel::from_pretrained(base(), &torn).unwrap_err();
            assert!(matches!(&error, Error::Keys { .. }) && error.to_string().contains("lm_head"), "{name}: {error}");
        }
        let before = run(&model);
        if name.starts_with("untied") {
            let error = model.merge_adapter(&MergeOptions::new()).unwrap_err();
            assert!(matches!(&error, Error::Config { field, .. } if field == "ensure_weight_tying"), "{name}: {error}");
        } else {
            model.merge_adapter(&MergeOptions::new()).unwrap();
            assert_close(&format!("{name}: merged"), &run(&model), &record["after"], 1e-5);
            model.unmerge_adapter().unwrap();
            assert_same(&format!("{name}: unmerged"), &run(&model), &before);
        }
        cases += 1;
    }
    assert_eq!(cases, 12);
    peer("tying_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

/// Dropout is on what goes into the output layer, not on rows that are looked up, as in PEFT.
#[test]
fn dropout_is_on_the_output_layer_alone() {
    let _rng = rng();
    let vs = nn::VarStore::new(device());
    let embed = nn::embedding(vs.root() / "embed", 9, 8, Default::default());
    let config = LoraConfig::builder().r(2).target_modules(["embed"]).ensure_weight_tying(true).lora_dropout(0.5);
    let mut model = LoraModel::wrap(vs, config.build().unwrap()).unwrap();
    let _no_grad = tch::no_grad_guard();
    for p in model.parameters() {
        let _ = p.tensor.shallow_clone().normal_(0.0, 0.5);
    }
    model.add_adapter("second", LoraConfig::builder().target_modules(["embed"]).build().unwrap()).unwrap();
    let ids = Tensor::from_slice(&[0i64, 3, 5, 8]).to_device(device());
    let x = Tensor::randn([4, 8], (Kind::Float, device()));
    // First of two, and second: the node, and what is added to it.
    for order in [["default", "second"], ["second", "default"]] {
        model.set_adapter(order).unwrap();
        let product = || x.matmul(&embed.ws.tr());
        assert_same("rows", &ids.apply(&embed), &ids.apply(&embed));
        assert_differs("products", &product(), &product(), 1e-2);
        let mean =
            Tensor::stack(&(0..3000).map(|_| product()).collect::<Vec<_>>(), 0).mean_dim(0i64, false, Kind::Float);
        assert_close("mean", &mean, &x.matmul(&(&embed.ws * 1.0).tr()), 5e-2);
    }
}

/// A tch model that uses one variable twice has one name for it; its adapter takes part in both uses.
#[test]
fn one_variable_with_two_uses() {
    let _rng = rng();
    for tied in [false, true] {
        let vs = nn::VarStore::new(device());
        let embed = nn::embedding(vs.root() / "embed", 9, 8, Default::default());
        let run = |ids: &Tensor| ids.apply(&embed).tanh().matmul(&embed.ws.tr());
        let ids = Tensor::from_slice(&[0i64, 3, 5, 8]).to_device(device());
        let table = embed.ws.detach().copy();
        let config = LoraConfig::builder().r(2).target_modules(["embed"]).ensure_weight_tying(tied).build().unwrap();
        let model = LoraModel::wrap(vs, config).unwrap();
        let parameters = model.trainable_parameters();
        assert_eq!(parameters.len(), 2);
        let [a, b] = [&parameters[0].tensor, &parameters[1].tensor];
        let _ = tch::no_grad(|| a.shallow_clone().normal_(0.0, 0.3));
        let adapted = &table + a.tr().matmul(&b.tr()) * 4.0;
        let output = if tied { &adapted } else { &table };
        let expected = Tensor::embedding(&adapted, &ids, -1, false, false).tanh().matmul(&output.tr());
        let found = run(&ids);
        assert_close("output", &found, &expected, 1e-5);
        let grads = |y: &Tensor| Tensor::run_backward(&[y.square().sum(Kind::Float)], &[a, b], false, false);
        for (found, expected) in grads(&found).iter().zip(&grads(&expected)) {
            assert_close("gradient", found, expected, 1e-5);
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let _rng = rng();
    let wrap = |config: tch_peft::LoraConfigBuilder| {
        let vs = nn::VarStore::new(device());
        let embed = nn::embedding(vs.root() / "embed", 9, 8, Default::default());
        let _ = (vs.root() / "head").add("weight", embed.ws.shallow_clone(), true);
        let _ = nn::linear(vs.root() / "lin", 8, 8, Default::default());
        LoraModel::wrap(vs, config.build().unwrap())
    };
    let config = || LoraConfig::builder().target_modules(["lin"]);
    let tables = config().target_modules(["embed", "head"]).ensure_weight_tying(true);
    assert_eq!(wrap(tables.clone()).unwrap().layers(), ["embed"]);
    let rows = |head: [i64; 2]| config().trainable_token_indices([("embed", [1, 2]), ("head", head)]);
    assert!(wrap(rows([1, 2])).is_ok());
    for (config, name) in [
        (tables.use_dora(true), "use_dora"),
        (rows([1, 3]), "trainable_token_indices"),
        (rows([1, 3]).ensure_weight_tying(true), "trainable_token_indices"),
    ] {
        let error = wrap(config).unwrap_err();
        assert!(matches!(&error, Error::Config { field, .. } if field == name), "{name}: {error}");
    }
    // Layers are handles on the base's modules; another order needs other modules.
    let error = wrap(config().layer_replication([(0, 2), (1, 2)])).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Unsupported { .. }) && text.contains("layer_replication"), "{text}");
    assert!(text.contains("build the deeper model"), "{text}");
}
