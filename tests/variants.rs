//! LoHa and LoKr against HF PEFT: configurations, outputs, gradients, training steps, merging and files, on
//! dense and quantised bases; and what the model does with them.
//!
//! tests/python/variants_reference.py makes the bases and PEFT's record.

mod common;

use std::path::Path;

use common::{assert_close, assert_differs, assert_same, device, peer, python, rng};
use tch::nn::{self, ModuleT};
use tch::{Device, Kind, Tensor};
use tch_peft::{
    AdapterConfig, BASE_ROW, Base, Combination, Error, LohaConfig, LokrConfig, LokrInit, LoraConfig, LoraModel,
    MergeOptions, QuantConfig, WeightRole,
};

fn fixtures() -> Option<&'static Path> {
    common::made("variants", "variants_reference.py", &["steps"])
}

#[test]
fn loha_and_lokr_follow_peft_which_loads_what_they_save() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    common::follow::follow(dir, "loha");
    common::follow::follow(dir, "lokr");
    peer("variants_reference.py", &["load".as_ref(), dir.as_os_str()]);
}

#[test]
fn every_field_that_peft_writes_is_written_again_byte_for_byte() {
    if python().is_none() {
        return;
    }
    let dir = common::fresh_dir("variants_configs");
    peer("variants_reference.py", &["configs".as_ref(), dir.as_os_str()]);
    let mut seen = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        let folder = entry.unwrap().path();
        let config = AdapterConfig::from_pretrained(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let again = folder.join("again");
        config.save_pretrained(&again).unwrap();
        let [theirs, ours] =
            [&folder, &again].map(|folder| std::fs::read_to_string(folder.join("adapter_config.json")).unwrap());
        assert_eq!(ours, theirs, "{}", folder.display());
        assert_eq!(AdapterConfig::from_pretrained(&again).unwrap(), config);
        seen += 1;
    }
    assert!(seen >= 16, "{seen} configurations");
    let lokr = LokrConfig::from_pretrained(dir.join("lokr_lycoris")).unwrap();
    assert_eq!(lokr.method().init_weights, LokrInit::Lycoris);
    assert!(LohaConfig::from_pretrained(dir.join("lokr_lycoris")).is_err(), "another kind");
}

#[test]
fn what_the_builders_make_is_read_by_peft() {
    if python().is_none() {
        return;
    }
    let dir = common::fresh_dir("variants_from_rust");
    macro_rules! with_shared {
        ($builder:expr) => {
            $builder
                .r(3)
                .alpha(2.5)
                .rank_dropout(0.25)
                .module_dropout(0.5)
                .use_effective_conv2d(true)
                .target_modules(["q", "v"])
                .exclude_modules(r"h\.0\..*")
                .layers_to_transform([1, 2])
                .layers_pattern("h")
                .rank_pattern([("b", 2), ("a", 4)])
                .alpha_pattern([("a", 3.0)])
                .modules_to_save(["head"])
                .task_type("CAUSAL_LM")
                .base_model_name_or_path("org/model")
        };
    }
    let loha = with_shared!(LohaConfig::builder().init_weights(false)).build().unwrap();
    loha.save_pretrained(dir.join("loha")).unwrap();
    let lokr = LokrConfig::builder().init_weights(LokrInit::Lycoris).decompose_both(true).decompose_factor(8);
    let lokr = with_shared!(lokr.rank_dropout_scale(true)).build().unwrap();
    lokr.save_pretrained(dir.join("lokr")).unwrap();
    peer("variants_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

fn floats() -> (Kind, Device) {
    (Kind::Float, device())
}

#[derive(Debug)]
struct Net {
    up: nn::Linear,
    down: nn::Linear,
}

impl ModuleT for Net {
    fn forward_t(&self, x: &Tensor, _: bool) -> Tensor {
        x.apply(&self.up).tanh().apply(&self.down)
    }
}

fn base() -> Base<Net> {
    let vs = nn::VarStore::new(device());
    let linear = |name: &str, inn, out| nn::linear(vs.root() / name, inn, out, Default::default());
    let net = Net { up: linear("up", 32, 48), down: linear("down", 48, 8) };
    Base::new(vs, net)
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, name: &str) {
    match result {
        Err(Error::Config { field, .. }) if field == name => {}
        Err(error) => panic!("expected an error about {name}, found: {error}"),
        Ok(_) => panic!("expected an error about {name}"),
    }
}

fn loha() -> LohaConfig {
    LohaConfig::builder().alpha(64.0).init_weights(false).target_modules(["up", "down"]).build().unwrap()
}

fn lokr() -> LokrConfig {
    LokrConfig::builder().alpha(64.0).init_weights(false).target_modules(["up"]).build().unwrap()
}

/// One model with an adapter of each kind.
#[test]
fn kinds_of_adapters_stand_side_by_side() {
    let _rng = rng();
    tch::manual_seed(1);
    let x = Tensor::randn([6, 32], floats());
    for quantized in [false, true] {
        let base = if quantized { base().quantize(&QuantConfig::nf4().build().unwrap()).unwrap() } else { base() };
        let lora = LoraConfig::builder().target_modules(["down"]).init_lora_weights(false).build().unwrap();
        let mut model = LoraModel::wrap(base, lora).unwrap();
        model.add_adapter("loha", loha()).unwrap();
        model.add_adapter("lokr", lokr()).unwrap();
        model.eval().unwrap();
        let forward = |model: &LoraModel<Net>| tch::no_grad(|| model.forward(&x).unwrap());
        let plain = {
            let _off = model.disable_adapters();
            forward(&model)
        };
        let mut alone = Vec::new();
        for name in ["default", "loha", "lokr"] {
            model.set_adapter(name).unwrap();
            let found = forward(&model);
            assert_differs(name, &found, &plain, 1e-3);
            // A scale of nothing turns it off.
            model.set_adapter_scale(name, 0.0).unwrap();
            assert_close(name, &forward(&model), &plain, 1e-6);
            model.set_adapter_scale(name, 1.0).unwrap();
            alone.push(found);
        }
        let rows = ["default", "loha", BASE_ROW, "lokr", "loha", "default"];
        {
            let _mixed = model.mixed_batch(&rows).unwrap();
            let mixed = forward(&model);
            for (i, name) in rows.iter().enumerate() {
                let one = ["default", "loha", "lokr"].iter().position(|other| other == name);
                let expected = one.map_or(&plain, |i| &alone[i]).get(i as i64);
                assert_close(name, &mixed.get(i as i64), &expected, 1e-5);
            }
        }

        model.set_adapter(["default", "loha", "lokr"]).unwrap();
        let all = forward(&model);
        model.merge_adapter(&MergeOptions::new()).unwrap();
        assert_close("all merged", &forward(&model), &all, 1e-5);
        model.unmerge_adapter().unwrap();
        assert_same("all unmerged", &forward(&model), &all);
        let status = model.layer_status();
        assert_eq!(status.iter().map(|s| s.available.len()).collect::<Vec<_>>(), [2, 2]);
        let names: Vec<String> = model.parameters().into_iter().map(|p| p.name).collect();
        assert!(names.contains(&"base_model.model.up.lokr_w1.lokr".into()), "{names:?}");

        let dir = common::fresh_dir("side_by_side");
        model.save_pretrained(&dir).unwrap();
        model.delete_adapter("lokr").unwrap();
        model.load_adapter(dir.join("lokr"), "lokr").unwrap();
        model.set_adapter("lokr").unwrap();
        assert_close("loaded again", &forward(&model), &alone[2], 1e-6);

        refused(model.add_weighted_adapter(&[("loha", 1.0)], "sum", Combination::Cat), "peft_type");
        refused(model.save_as_lora("lokr", &dir, &dir), "peft_type");
    }
}

#[test]
fn what_has_no_such_adapter_is_refused_by_name() {
    let _rng = rng();
    let targets = |base: Base<()>| {
        refused(
            LoraModel::wrap(base, LohaConfig::builder().target_modules(["layer"]).build().unwrap()),
            "target_modules",
        );
    };
    let weight = |sizes: &[i64]| {
        let vs = nn::VarStore::new(device());
        let _ = vs.root().sub("layer").var("weight", sizes, nn::Init::Const(0.5));
        Base::from(vs)
    };
    targets(weight(&[4, 4, 1, 1, 1]));
    targets(weight(&[9, 4]).declare("layer", WeightRole::Embedding));
    targets(weight(&[9, 4]).declare("layer", WeightRole::Conv1D));
    let fields = [("r", 0), ("decompose_factor", 0)];
    for (field, value) in fields {
        let config = LokrConfig::builder().target_modules(["layer"]);
        refused(if field == "r" { config.r(value) } else { config.decompose_factor(value) }.build(), field);
    }
    refused(LohaConfig::builder().target_modules(["layer"]).rank_dropout(1.0).build(), "rank_dropout");
    refused(LohaConfig::builder().build(), "target_modules");
}

/// A rank dropout that drops every row adds nothing, where PEFT divides by zero.
#[test]
fn dropping_everything_is_not_a_number_less() {
    let _rng = rng();
    tch::manual_seed(5);
    let config = LohaConfig::builder().init_weights(false).rank_dropout(0.99).target_modules(["down"]).build().unwrap();
    let model = LoraModel::wrap(base(), config).unwrap();
    let x = Tensor::randn([3, 32], floats());
    for _ in 0..20 {
        assert!(bool::try_from(model.forward(&x).unwrap().isfinite().all()).unwrap());
    }
}
