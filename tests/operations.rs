//! Operations on several adapters, against PEFT: tests/python/operations_reference.py holds its side.

mod common;
mod twin;

use common::{assert_close, assert_differs, assert_same, bits, device, peer, read, rng};
use std::path::Path;
use tch::nn::Module;
use tch::{Device, Kind, Tensor};
use tch_peft::{
    BASE_ROW, Base, Bias, Combination, Error, LoraConfig, LoraModel, MajoritySign, Merge, MergeOptions, QuantConfig,
};
use twin::Net;

/// f32, relative to the norm.
const TOLERANCE: f64 = 1e-5;

fn fixtures() -> Option<&'static Path> {
    common::made("operations", "operations_reference.py", &["make"])
}

/// The base with PEFT's adapters `default`, `b` and `c`, of which `default` is active.
fn with_adapters(dir: &Path) -> LoraModel<Net> {
    let mut model = LoraModel::from_pretrained(Net::load(dir), dir.join("from_peft")).unwrap();
    for name in ["b", "c"] {
        let report = model.load_adapter(dir.join("from_peft").join(name), name).unwrap();
        assert!(!report.loaded.is_empty() && report.missing.is_empty() && report.unexpected.is_empty());
    }
    model
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, name: &str) {
    match result {
        Err(Error::Config { field, .. }) if field == name => {}
        Err(error) => panic!("expected an error about {name}, found: {error}"),
        Ok(_) => panic!("expected an error about {name}"),
    }
}

#[test]
fn adapters_answer_one_by_one_and_summed_as_in_peft() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("outputs.safetensors"));
    let ids = &expected["ids"];
    let mut model = with_adapters(dir);
    assert_eq!(model.adapter_names(), ["default", "b", "c"]);
    let plain = expected["base"].shallow_clone();
    for name in ["default", "b", "c", "default"] {
        model.set_adapter(name).unwrap();
        assert_eq!(model.active_adapters(), [name]);
        let found = model.forward(ids).unwrap();
        assert_close(name, &found, &expected[name], TOLERANCE);
        assert_differs(name, &found, &plain, 1e-2);
    }
    model.set_adapter(["default", "b"]).unwrap();
    assert_close("sum", &model.forward(ids).unwrap(), &expected["default+b"], TOLERANCE);
    model.set_adapter("default").unwrap();
    model.set_adapter_scale("default", 0.25).unwrap();
    assert_close("scaled", &model.forward(ids).unwrap(), &expected["scaled"], TOLERANCE);
    model.set_adapter_scale("default", 1.0).unwrap();
    assert_close("back", &model.forward(ids).unwrap(), &expected["default"], TOLERANCE);

    model.rename_adapter("default", "first").unwrap();
    assert_eq!(model.active_adapters(), ["first"]);
    assert_close("renamed", &model.forward(ids).unwrap(), &expected["default"], TOLERANCE);
    model.set_adapter(["b", "c"]).unwrap();
    model.delete_adapter("c").unwrap();
    assert_eq!((model.adapter_names(), model.active_adapters()), (vec!["first", "b"], vec!["b"]));
    assert_close("b alone", &model.forward(ids).unwrap(), &expected["b"], TOLERANCE);
    model.delete_adapter("first").unwrap();
    assert_eq!(model.config().as_lora().unwrap().lora_alpha(), 12.0);
    refused(model.delete_adapter("b"), "adapter_name");
}

#[test]
fn merging_answers_as_in_peft_and_unmerging_brings_back_every_bit() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("outputs.safetensors"));
    let ids = &expected["ids"];
    for quantized in [false, true] {
        let mut model = with_adapters(dir);
        if quantized {
            model.quantize(&QuantConfig::nf4().skip(["head"]).build().unwrap()).unwrap();
        }
        model.set_adapter(["default", "b"]).unwrap();
        let before = model.forward(ids).unwrap();
        let print = model.base().fingerprint().unwrap();
        let base = {
            let _off = model.disable_adapters();
            model.forward(ids).unwrap()
        };
        let report = model.merge_adapter(&MergeOptions::new()).unwrap();
        assert_eq!(report.layers.len(), 6, "{report}");
        assert!(report.worst().unwrap().error < 1e-6, "{report}");
        let merged = model.forward(ids).unwrap();
        assert_close("merged", &merged, &before, TOLERANCE);
        if !quantized {
            assert_close("merged in PEFT", &merged, &expected["merged default+b"], TOLERANCE);
        }
        // PEFT unmerges for good when a merged adapter is turned off for a while.
        {
            let _off = model.disable_adapters();
            assert_same("off while merged", &model.forward(ids).unwrap(), &base);
        }
        assert_same("still merged", &model.forward(ids).unwrap(), &merged);
        assert_eq!(model.model_status().merged, ["default", "b"]);
        assert_eq!(model.base().fingerprint().unwrap(), print, "the base is what it was");
        for again in 0..3 {
            model.unmerge_adapter().unwrap();
            assert_same("unmerged", &model.forward(ids).unwrap(), &before);
            let _off = model.disable_adapters();
            assert_same(&format!("base after {again} times"), &model.forward(ids).unwrap(), &base);
            model.merge_adapter(&MergeOptions::new()).unwrap();
        }
    }
}

#[test]
fn merge_and_unload_leaves_a_plain_base_and_measures_what_was_lost() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("outputs.safetensors"));
    let ids = &expected["ids"];
    let mut model = with_adapters(dir);
    model.set_adapter("b").unwrap();
    let (base, report) = model.merge_and_unload(&MergeOptions::new()).unwrap();
    assert_close("unloaded", &base.module().forward(ids), &expected["unloaded b"], TOLERANCE);
    assert_eq!(report.layers.len(), 4, "{report}");
    // Plain tensors again, that can be written to.
    let mut weight = base.module().h[0].q_proj.ws.shallow_clone();
    tch::no_grad(|| weight.f_zero_().map(drop)).unwrap();
    assert_eq!(f64::try_from(base.module().h[0].q_proj.ws.norm()).unwrap(), 0.0);

    let quantized = || Net::load(dir).quantize(&QuantConfig::nf4().build().unwrap()).unwrap();
    let load = || LoraModel::from_pretrained(quantized(), dir.join("from_peft")).unwrap();
    let exact = load().forward(ids).unwrap();
    let packed = load().base().quantization_report().weights().len();

    let (base, report) = load().merge_and_unload(&MergeOptions::new()).unwrap();
    assert_close("dense by default", &base.module().forward(ids), &exact, TOLERANCE);
    assert!(report.layers.iter().all(|layer| layer.scheme.is_none() && layer.error < 1e-6), "{report}");
    assert_eq!(base.quantization_report().weights().len(), packed - 4, "the others stay packed");
    assert_eq!(base.module().h[0].q_proj.ws.kind(), Kind::Float);

    let (base, report) = load().merge_and_unload(&MergeOptions::new().dtype(Kind::BFloat16)).unwrap();
    assert_eq!(base.module().h[0].q_proj.ws.kind(), Kind::BFloat16);
    assert!(report.layers.iter().all(|layer| layer.error > 1e-4 && layer.error < 0.1), "{report}");

    // Packing again: the report is ‖W' − (W + ΔW)‖ / ‖ΔW‖, and not nothing.
    let model = load();
    let delta = {
        let parameters = model.parameters();
        let [a, b] = [&parameters[0].tensor, &parameters[1].tensor];
        b.matmul(a) * 2.0
    };
    let before = {
        let _off = model.disable_adapters();
        model.module().h[0].q_proj.ws.detach()
    };
    let (base, report) = model.merge_and_unload(&MergeOptions::new().requantize(true)).unwrap();
    let after = base.module().h[0].q_proj.ws.detach();
    let lost = f64::try_from((after - &before - &delta).norm() / delta.norm()).unwrap();
    let layer = &report.layers[0];
    assert_eq!(layer.name, "h.0.q_proj.weight");
    assert!(layer.scheme.is_some() && layer.error > 0.01, "{report}");
    assert!((layer.error - lost).abs() < 1e-4 * lost, "{} instead of {lost}", layer.error);
    assert_eq!(base.quantization_report().weights().len(), packed);

    let base = load().unload().unwrap();
    assert_same("unload", &base.module().forward(ids), &quantized().module().forward(ids));
}

/// DoRA's magnitude goes into the merged weight; PEFT's weighted sums leave it out.
#[test]
fn dora_is_merged_with_its_magnitude_and_has_no_weighted_sum() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let ids = &read(dir.join("outputs.safetensors"))["ids"];
    let config = LoraConfig::builder().r(4).target_modules(["q_proj", "fc"]).use_dora(true).init_lora_weights(false);
    let mut model = LoraModel::wrap(Net::load(dir), config.build().unwrap()).unwrap();
    for p in model.parameters().iter().filter(|p| p.name.ends_with("lora_magnitude_vector")) {
        let factors = Tensor::rand(p.tensor.size(), (Kind::Float, device())) + 0.5;
        tch::no_grad(|| p.tensor.shallow_clone().f_mul_(&factors).map(drop)).unwrap();
    }
    let before = model.forward(ids).unwrap();
    model.merge_adapter(&MergeOptions::new()).unwrap();
    assert_close("merged", &model.forward(ids).unwrap(), &before, TOLERANCE);
    model.unmerge_adapter().unwrap();
    assert_same("unmerged", &model.forward(ids).unwrap(), &before);
    refused(model.add_weighted_adapter(&[("default", 1.0)], "x", Combination::Cat), "adapters");
    refused(model.save_as_lora("default", dir.join("no"), dir.join("no")), "use_dora");
}

#[test]
fn a_broken_adapter_is_not_merged_and_nothing_changes() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let ids = &read(dir.join("outputs.safetensors"))["ids"];
    let mut model = with_adapters(dir);
    let before = model.forward(ids).unwrap();
    let mut a = model.parameters().remove(2).tensor;
    let kept = a.copy();
    tch::no_grad(|| a.get(0).f_fill_(f64::NAN).map(drop)).unwrap();
    let error = model.merge_adapter(&MergeOptions::new()).unwrap_err();
    assert!(matches!(&error, Error::NotFinite { .. }), "{error}");
    tch::no_grad(|| a.copy_(&kept));
    assert_same("as before", &model.forward(ids).unwrap(), &before);
}

#[test]
fn combinations_of_adapters_answer_as_in_peft() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("outputs.safetensors"));
    let ids = &expected["ids"];
    let svd = |merge| Combination::Svd { merge, rank: None, clamp: None };
    let ties = |density, sign| Merge::Ties { density, sign };
    let cases = [
        ("cat", Combination::Cat),
        ("linear", Combination::Factors(Merge::Linear)),
        ("svd", svd(Merge::Linear)),
        ("svd_rank", Combination::Svd { merge: Merge::Linear, rank: Some(3), clamp: None }),
        ("svd_clamp", Combination::Svd { merge: Merge::Linear, rank: None, clamp: Some(0.9) }),
        ("ties", Combination::Factors(ties(0.5, MajoritySign::Total))),
        ("ties_frequency", Combination::Factors(ties(0.7, MajoritySign::Frequency))),
        ("ties_svd", svd(ties(0.5, MajoritySign::Total))),
        ("magnitude_prune", Combination::Factors(Merge::MagnitudePrune { density: 0.4 })),
        ("magnitude_prune_svd", svd(Merge::MagnitudePrune { density: 0.4 })),
    ];
    let mut model = with_adapters(dir);
    for (name, how) in cases {
        model.add_weighted_adapter(&[("default", 0.7), ("b", -0.4)], name, how).unwrap();
        assert_eq!(model.active_adapters(), ["default"], "a new adapter is not active");
        model.set_adapter(name).unwrap();
        assert_close(name, &model.forward(ids).unwrap(), &expected[&format!("weighted {name}")], TOLERANCE);
        model.set_adapter("default").unwrap();
    }
    // One layer, and the same seed: DARE draws the same masks.
    let mut model = LoraModel::from_pretrained(Net::load(dir), dir.join("one_layer")).unwrap();
    model.load_adapter(dir.join("one_layer/b"), "b").unwrap();
    let (linear, ties) =
        (Merge::DareLinear { density: 0.6 }, Merge::DareTies { density: 0.6, sign: MajoritySign::Total });
    let cases = [
        ("dare_linear", Combination::Factors(linear)),
        ("dare_ties", Combination::Factors(ties)),
        ("dare_linear_svd", svd(linear)),
        ("dare_ties_svd", svd(ties)),
    ];
    for (name, how) in cases {
        tch::manual_seed(5);
        model.add_weighted_adapter(&[("default", 0.7), ("b", -0.4)], name, how).unwrap();
        model.set_adapter(name).unwrap();
        let output = model.forward(ids).unwrap();
        // Another device's generator draws other masks.
        if device() == Device::Cpu {
            assert_close(name, &output, &expected[&format!("weighted {name}")], TOLERANCE);
        }
    }
}

/// PEFT gives every layer the largest rank of a `rank_pattern`, and what it then saves can't be loaded.
#[test]
fn a_combination_with_rank_patterns_is_exact_and_survives_a_save() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("outputs.safetensors"));
    let ids = &expected["ids"];
    let mut model = with_adapters(dir);
    model.add_weighted_adapter(&[("default", 1.0), ("c", 1.0)], "both", Combination::Cat).unwrap();
    model.set_adapter(["default", "c"]).unwrap();
    let sum = model.forward(ids).unwrap();
    model.set_adapter("both").unwrap();
    let combined = model.forward(ids).unwrap();
    assert_close("cat of patterns", &combined, &sum, TOLERANCE);
    let folder = dir.join("from_rust/cat_of_patterns");
    model.save_adapter("both", &folder, None).unwrap();
    common::write(folder.join("output.safetensors"), &[("output".into(), combined.shallow_clone())]);
    let again = LoraModel::from_pretrained(Net::load(dir), &folder).unwrap();
    assert_same("reloaded", &again.forward(ids).unwrap(), &combined);
    let linear = Combination::Factors(Merge::Linear);
    refused(model.add_weighted_adapter(&[("default", 1.0), ("c", 1.0)], "no", linear), "adapters");
}

#[test]
fn every_row_of_a_mixed_batch_has_its_own_adapter_and_gradient() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("outputs.safetensors"));
    let ids = &expected["ids"];
    let mut model = with_adapters(dir);
    let before = model.forward(ids).unwrap();
    let rows = ["b", BASE_ROW, "default", "b"];
    {
        let _mixed = model.mixed_batch(&rows).unwrap();
        assert_close("mixed", &model.forward(ids).unwrap(), &expected["mixed"], TOLERANCE);
        assert_close("again", &model.forward(ids).unwrap(), &expected["mixed"], TOLERANCE);
        refused(model.mixed_batch(&rows), "mixed_batch");
        assert!(ids.narrow(0, 0, 3).size()[0] == 3);
        let three = model.module().h[0].q_proj.ws.f_linear(&model.module().h[0].q_proj.ws, None::<&Tensor>);
        assert!(three.is_err(), "a weight as a whole has no rows");
        let _off = model.disable_adapters();
        assert_close("off", &model.forward(ids).unwrap(), &expected["base"], TOLERANCE);
    }
    // The same rows, those of an adapter next to each other.
    let (order, sorted) = (Tensor::from_slice(&[0i64, 3, 1, 2]).to_device(device()), ["b", "b", BASE_ROW, "default"]);
    let (sorted_ids, sorted_mixed) = (ids.index_select(0, &order), expected["mixed"].index_select(0, &order));
    {
        let _mixed = model.mixed_batch(&sorted).unwrap();
        assert_close("sorted", &model.forward(&sorted_ids).unwrap(), &sorted_mixed, TOLERANCE);
    }
    assert_same("as before", &model.forward(ids).unwrap(), &before);
    refused(model.mixed_batch(&["nobody"]), "adapter_name");
    refused(model.mixed_batch(&[]), "mixed_batch");

    // Gradients: the sum of those of the adapters, each on its rows alone.
    model.set_requires_grad("default", true).unwrap();
    model.set_requires_grad("b", true).unwrap();
    model.set_adapter(["default", "b"]).unwrap();
    let loss = |y: &Tensor| y.square().sum(Kind::Float);
    let mut mixed = Vec::new();
    for (rows, ids) in [(rows, ids), (sorted, &sorted_ids)] {
        let _mixed = model.mixed_batch(&rows).unwrap();
        loss(&model.forward(ids).unwrap()).backward();
        let parameters = model.trainable_parameters();
        mixed.push(parameters.iter().map(|p| p.tensor.grad().copy()).collect::<Vec<_>>());
        assert_eq!(parameters.len(), 16);
        for p in parameters {
            let _ = p.tensor.grad().zero_();
        }
    }
    for (name, rows) in [("default", vec![2i64]), ("b", vec![0, 3])] {
        model.set_adapter(name).unwrap();
        let part = ids.index_select(0, &Tensor::from_slice(&rows).to_device(device()));
        loss(&model.forward(&part).unwrap()).backward();
    }
    model.set_adapter(["default", "b"]).unwrap();
    for mixed in mixed {
        for (p, found) in model.trainable_parameters().iter().zip(mixed) {
            assert_close(&p.name, &found, &p.tensor.grad(), TOLERANCE);
        }
    }
}

/// PEFT trains an adapter that was loaded for inference as soon as it is activated again, and scales a
/// swapped adapter by the patterns of the old one.
#[test]
fn adapters_for_inference_stay_frozen_and_swapped_ones_bring_their_own_scales() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let expected = read(dir.join("outputs.safetensors"));
    let ids = &expected["ids"];
    let mut model = with_adapters(dir);
    for name in ["b", "default", "c"] {
        model.set_adapter(name).unwrap();
        assert!(model.trainable_parameters().is_empty(), "{name} was loaded for inference");
    }
    model.set_requires_grad("b", true).unwrap();
    assert!(model.trainable_parameters().is_empty(), "b is not active");
    model.set_adapter("b").unwrap();
    let names: Vec<String> = model.trainable_parameters().into_iter().map(|p| p.name).collect();
    assert_eq!(names.len(), 8);
    assert_eq!(names[0], "base_model.model.h.0.fc.lora_A.b.weight");

    let mut model = LoraModel::from_pretrained(Net::load(dir), dir.join("from_peft")).unwrap();
    model.hotswap_adapter(dir.join("from_peft/c"), "default").unwrap();
    assert_close("swapped", &model.forward(ids).unwrap(), &expected["c"], TOLERANCE);
    model.hotswap_adapter(dir.join("from_peft"), "default").unwrap();
    assert_close("swapped back", &model.forward(ids).unwrap(), &expected["default"], TOLERANCE);
    refused(model.hotswap_adapter(dir.join("from_peft"), "other"), "adapter_name");
    assert!(model.hotswap_adapter(dir.join("nowhere"), "default").is_err());
    assert_close("untouched", &model.forward(ids).unwrap(), &expected["default"], TOLERANCE);
}

/// In PEFT, a second adapter called `weight` empties the file of the first, and one called `model`
/// slips into it.
#[test]
fn names_of_adapters_never_change_what_is_saved() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let ids = &read(dir.join("outputs.safetensors"))["ids"];
    let file = |folder: &Path| std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let original = file(&dir.join("from_peft"));
    for name in ["weight", "model", "lora_A", "base_model", "q_proj", "h", "0", "bias", "é"] {
        let mut model = LoraModel::from_pretrained(Net::load(dir), dir.join("from_peft")).unwrap();
        model.load_adapter(dir.join("from_peft/b"), name).unwrap();
        let folder = dir.join("names").join(name);
        model.save_pretrained(&folder).unwrap();
        assert!(file(&folder) == original, "{name}: the default adapter's file");
        assert!(file(&folder.join(name)) == file(&dir.join("from_peft/b")), "{name}: its own file");
        let unique: std::collections::BTreeSet<String> = model.parameters().into_iter().map(|p| p.name).collect();
        assert_eq!(unique.len(), model.parameters().len());
    }
    let mut model = with_adapters(dir);
    for name in ["", "a.b", "a/b", "__base__", ".", "a\n"] {
        let config = LoraConfig::builder().target_modules(["fc"]).build().unwrap();
        refused(model.add_adapter(name, config), "adapter_name");
    }
    refused(model.load_adapter(dir.join("from_peft"), "b"), "adapter_name");
    refused(model.rename_adapter("b", "c"), "adapter_name");
    // All of them, for PEFT to load.
    let folder = dir.join("from_rust/multi");
    model.save_pretrained(&folder).unwrap();
    for (name, folder) in [("default", folder.clone()), ("b", folder.join("b")), ("c", folder.join("c"))] {
        model.set_adapter(name).unwrap();
        let output = model.forward(ids).unwrap();
        common::write(folder.join("output.safetensors"), &[("output".into(), output)]);
    }
}

/// Three steps of SGD on A, B and on full copies or biases, from the state that PEFT started from.
#[test]
fn copies_and_biases_are_trained_and_saved_as_in_peft() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let cases = ["modules", "norms", "bias_all", "bias_lora_only", "modules_and_bias", "tokens"];
    for case in cases {
        let folder = dir.join("saved").join(case);
        let record = read(folder.join("record.safetensors"));
        let model = LoraModel::init_lora(Net::load(dir), folder.join("before")).unwrap();
        let ids = &record["ids"];
        let base = Net::load(dir).module().forward(ids);
        for step in 0..3 {
            let loss = model.forward(ids).unwrap().logsumexp([-1i64].as_slice(), false).mean(Kind::Float);
            assert_close(&format!("{case}, loss {step}"), &loss, &record[&format!("{step}.loss")], TOLERANCE);
            loss.backward();
            for p in model.trainable_parameters() {
                let grad = p.tensor.grad();
                tch::no_grad(|| p.tensor.shallow_clone().f_sub_(&(&grad * 0.1)).map(drop)).unwrap();
                let _ = grad.shallow_clone().zero_();
            }
        }
        let output = model.forward(ids).unwrap();
        assert_close(case, &output, &record["output"], TOLERANCE);
        // PEFT leaves trained biases in place when adapters are off.
        {
            let _off = model.disable_adapters();
            assert_same(case, &model.forward(ids).unwrap(), &base);
        }
        let after = read(folder.join("after/adapter_model.safetensors"));
        let parameters = model.parameters();
        assert_eq!(parameters.iter().map(|p| &p.name).collect::<Vec<_>>(), after.keys().collect::<Vec<_>>(), "{case}");
        for p in &parameters {
            assert_close(&format!("{case}, {}", p.name), &p.tensor, &after[&p.name], TOLERANCE);
        }
        let ours = dir.join("from_rust").join(case);
        model.save_pretrained(&ours).unwrap();
        let ids = &read(dir.join("outputs.safetensors"))["ids"];
        common::write(ours.join("output.safetensors"), &[("output".into(), model.forward(ids).unwrap())]);

        // The copies are merged and taken off like adapters.
        let (merged, _) = model.merge_and_unload(&MergeOptions::new()).unwrap();
        assert_close(case, &merged.module().forward(&record["ids"]), &output, TOLERANCE);
    }
}

/// PEFT copies `bighead` as well where `modules_to_save` says `head`.
#[test]
fn modules_to_save_end_at_a_dot() {
    let _rng = rng();
    let vs = tch::nn::VarStore::new(device());
    for name in ["q", "head", "bighead"] {
        let _ = tch::nn::linear(vs.root() / name, 4, 4, Default::default());
    }
    let config = || LoraConfig::builder().target_modules(["q"]);
    let mut model = LoraModel::wrap(vs, config().modules_to_save(["head"]).build().unwrap()).unwrap();
    let names: Vec<String> = model.parameters().into_iter().map(|p| p.name).collect();
    let expected = ["head.bias", "head.weight", "q.lora_A.weight", "q.lora_B.weight"];
    assert_eq!(names, expected.map(|end| format!("base_model.model.{end}")));
    // Another adapter on what is replaced can't be summed with it.
    let other = LoraConfig::builder().target_modules(["head"]).build().unwrap();
    model.add_adapter("other", other).unwrap();
    refused(model.set_adapter(["default", "other"]), "adapter_name");
    model.set_adapter("other").unwrap();
    let nowhere = config().modules_to_save(["heads"]).build().unwrap();
    let error = model.add_adapter("nowhere", nowhere).unwrap_err();
    let Error::NoTarget { target, near } = &error else { panic!("{error}") };
    assert_eq!(target, "heads");
    assert!(near.contains(&"head".to_string()), "{near:?}");
    assert_eq!(model.adapter_names(), ["default", "other"]);
}

#[test]
fn an_adapter_becomes_plain_lora_as_in_peft() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for case in ["plain", "rslora", "patterns"] {
        let folder = dir.join("convert").join(case);
        let model = LoraModel::from_pretrained(Net::load(dir), folder.join("trained")).unwrap();
        let ours = folder.join("ours");
        model.save_as_lora("default", &ours, folder.join("initial")).unwrap();
        let [found, expected] = [&ours, &folder.join("lora")].map(|f| read(f.join("adapter_model.safetensors")));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (key, tensor) in &found {
            assert_same(key, tensor, &expected[key]);
        }
        let [found, expected] = [&ours, &folder.join("lora")].map(|f| LoraConfig::from_pretrained(f).unwrap());
        assert_eq!(found.differences(&expected), Vec::<String>::new(), "{case}");
    }
}

#[test]
fn the_status_tells_what_is_where() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let mut model = with_adapters(dir);
    model.set_adapter(["b", "c"]).unwrap();
    model.set_requires_grad("c", true).unwrap();
    model.merge_adapter(&MergeOptions::new().adapters("b")).unwrap();
    let status = model.model_status();
    assert_eq!(status.available, ["default", "b", "c"]);
    assert_eq!((status.active, status.merged), (vec!["b".to_string(), "c".into()], vec!["b".to_string()]));
    assert_eq!((status.requires_grad, status.enabled, status.layers), (vec!["c".to_string()], true, 6));
    let layers = model.layer_status();
    assert_eq!(layers.len(), 6);
    let v = layers.iter().find(|layer| layer.name == "h.1.v_proj.weight").unwrap();
    assert_eq!((&v.available, &v.active), (&vec!["default".to_string(), "c".into()], &vec!["c".to_string()]));
    assert!(v.merged.is_empty() && v.scheme.is_none() && v.enabled);
    // A part of what is active is merged: the result is that of the sum.
    let ids = &read(dir.join("outputs.safetensors"))["ids"];
    let partly = model.forward(ids).unwrap();
    model.unmerge_adapter().unwrap();
    assert_close("partly merged", &partly, &model.forward(ids).unwrap(), TOLERANCE);
}

#[test]
fn combinations_that_make_no_sense_are_refused_by_name() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let ids = &read(dir.join("outputs.safetensors"))["ids"];
    let mut model = with_adapters(dir);
    let before = bits(&model.forward(ids).unwrap());
    let merge = MergeOptions::new();
    refused(model.set_adapter("nobody"), "adapter_name");
    refused(model.set_adapter(["b", "b"]), "adapter_name");
    refused(model.merge_adapter(&merge.clone().adapters("b")), "adapter_name");
    refused(model.merge_adapter(&merge.clone().adapters("nobody")), "adapter_name");
    refused(model.merge_adapter(&merge.clone().dtype(Kind::Half)), "dtype");
    refused(model.set_adapter_scale("b", f64::NAN), "adapter_scale");
    refused(model.add_weighted_adapter(&[], "x", Combination::Cat), "adapters");
    refused(model.add_weighted_adapter(&[("b", f64::NAN)], "x", Combination::Cat), "weights");
    refused(model.add_weighted_adapter(&[("b", 1.0)], "default", Combination::Cat), "adapter_name");
    let dare = Combination::Factors(Merge::DareLinear { density: 0.0 });
    refused(model.add_weighted_adapter(&[("b", 1.0)], "x", dare), "density");
    model.merge_adapter(&merge).unwrap();
    refused(model.merge_adapter(&merge), "adapter_name");
    refused(model.set_adapter("b"), "set_adapter");
    refused(model.delete_adapter("b"), "delete_adapter");
    refused(model.hotswap_adapter(dir.join("from_peft"), "b"), "hotswap_adapter");
    refused(model.mixed_batch(&["b"]), "mixed_batch");
    refused(model.quantize(&QuantConfig::int8().build().unwrap()), "quantize");
    model.unmerge_adapter().unwrap();
    assert_eq!(model.adapter_names(), ["default", "b", "c"]);
    assert_eq!(bits(&model.forward(ids).unwrap()), before);
    let both = merge.dtype(Kind::Half).requantize(true);
    refused(model.merge_and_unload(&both), "dtype");

    let config = LoraConfig::builder().target_modules(["q_proj"]).modules_to_save(["head"]);
    let mut model = LoraModel::wrap(Net::load(dir), config.build().unwrap()).unwrap();
    refused(model.add_weighted_adapter(&[("default", 1.0)], "x", Combination::Cat), "adapters");
    let bias = LoraConfig::builder().target_modules(["v_proj"]).bias(Bias::LoraOnly).lora_bias(true).build().unwrap();
    model.add_adapter("bias", bias).unwrap();
    model.set_adapter("bias").unwrap();
    // v_proj has no bias that could take that of lora_B.
    refused(model.merge_adapter(&MergeOptions::new()), "lora_bias");
}

#[test]
fn dtypes_are_what_was_asked_for() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let ids = &read(dir.join("outputs.safetensors"))["ids"];
    let config = || LoraConfig::builder().r(4).target_modules(["q_proj"]).init_lora_weights(false);
    let model = LoraModel::wrap(Net::load(dir), config().build().unwrap()).unwrap();
    assert!(model.parameters().iter().all(|p| p.tensor.kind() == Kind::Float));
    let folder = dir.join("saved_in_bf16");
    model.save_adapter("default", &folder, Some(Kind::BFloat16)).unwrap();
    let stored = read(folder.join("adapter_model.safetensors"));
    assert!(stored.values().all(|tensor| tensor.kind() == Kind::BFloat16));
    let again = LoraModel::from_pretrained(Net::load(dir), &folder).unwrap();
    assert!(again.parameters().iter().all(|p| p.tensor.kind() == Kind::Float), "trained and kept in f32 as by default");
    assert_close("rounded", &again.forward(ids).unwrap(), &model.forward(ids).unwrap(), 2e-2);

    let half = LoraModel::wrap(Net::load(dir), config().dtype(Kind::BFloat16).build().unwrap()).unwrap();
    assert!(half.parameters().iter().all(|p| p.tensor.kind() == Kind::BFloat16));
    assert_eq!(half.forward(ids).unwrap().kind(), Kind::Float);
    refused(config().dtype(Kind::Int64).build(), "dtype");
}

/// PEFT leaves copies and biases in the base's dtype, whatever the adapters have.
#[test]
fn copies_and_rows_follow_the_dtype_of_adapters() {
    let _rng = rng();
    for (asked, kind) in [(None, Kind::Float), (Some(Kind::BFloat16), Kind::BFloat16)] {
        let mut vs = tch::nn::VarStore::new(device());
        let net = Net::new(&vs.root());
        vs.bfloat16();
        let ids = Tensor::from_slice2(&[[1i64, 2, 3], [0, 5, 1]]).to_device(device());
        let plain = net.forward(&ids);
        let config = LoraConfig::builder().target_modules(["q_proj"]).trainable_token_indices([1, 5]).bias(Bias::All);
        let config = config.modules_to_save(["head", "norm"]);
        let config = asked.into_iter().fold(config, |config, kind| config.dtype(kind)).build().unwrap();
        let model = LoraModel::wrap(Base::new(vs, net), config).unwrap();
        let output = model.forward(&ids).unwrap();
        assert_eq!(output.kind(), Kind::BFloat16);
        assert_close("at first", &output, &plain, 1e-2);
        output.square().sum(Kind::Float).backward();
        for p in model.trainable_parameters() {
            assert_eq!((p.tensor.kind(), p.tensor.grad().kind()), (kind, kind), "{}", p.name);
        }
        assert!(model.layer_status().iter().all(|status| status.kind == Kind::BFloat16));
        let (base, _) = model.merge_and_unload(&MergeOptions::new()).unwrap();
        let after = base.module().forward(&ids);
        assert_eq!(after.kind(), Kind::BFloat16);
        assert_close("merged", &after, &plain, 1e-2);
    }
}

/// PEFT drops the bias of an output layer that is tied to a table with trained rows, and can't save
/// any other adapter of such a model.
#[test]
fn trained_rows_reach_a_tied_output_layer_with_its_bias() {
    let _rng = rng();
    let vs = tch::nn::VarStore::new(device());
    let embed = tch::nn::embedding(vs.root() / "embed", 9, 4, Default::default());
    let head = tch::nn::linear(vs.root() / "head", 4, 4, Default::default());
    let bias = Tensor::randn([9], (Kind::Float, device()));
    let run = |ids: &Tensor| ids.apply(&embed).apply(&head).f_linear(&embed.ws, Some(&bias)).unwrap();
    let ids = Tensor::from_slice(&[0i64, 3, 5, 8]).to_device(device());
    let table = embed.ws.detach().copy();
    let config = LoraConfig::builder().target_modules(["head"]).trainable_token_indices([3, 8]).build().unwrap();
    let mut model = LoraModel::wrap(vs, config).unwrap();
    let before = run(&ids);
    let rows = model.parameters().into_iter().find(|p| p.name.ends_with("trainable_tokens_delta")).unwrap();
    assert_eq!(rows.name, "base_model.model.embed.token_adapter.trainable_tokens_delta");
    assert_same(
        "rows at first",
        &rows.tensor.detach(),
        &table.index_select(0, &Tensor::from_slice(&[3i64, 8]).to_device(device())),
    );
    tch::no_grad(|| rows.tensor.shallow_clone().f_add_scalar_(1.0).map(drop)).unwrap();
    let expected = {
        let changed = table.index_copy(0, &Tensor::from_slice(&[3i64, 8]).to_device(device()), &rows.tensor.detach());
        let x = Tensor::embedding(&changed, &ids, -1, false, false).apply(&head);
        x.matmul(&changed.tr()) + &bias
    };
    assert_close("rows", &run(&ids), &expected, TOLERANCE);
    assert_differs("rows", &expected, &before, 1e-2);
    run(&ids).sum(Kind::Float).backward();
    assert!(f64::try_from(rows.tensor.grad().norm()).unwrap() > 0.0);

    let other = LoraConfig::builder().target_modules(["head"]).trainable_token_indices([5, 8]).build().unwrap();
    model.add_adapter("other", other).unwrap();
    refused(model.set_adapter(["default", "other"]), "trainable_token_indices");
    let plain = LoraConfig::builder().target_modules(["head"]).build().unwrap();
    model.add_adapter("plain", plain).unwrap();
    model.save_pretrained(common::fresh_dir("tokens")).unwrap();
    let far = LoraConfig::builder().target_modules(["head"]).trainable_token_indices([9]).build().unwrap();
    refused(model.add_adapter("far", far), "trainable_token_indices");
    let both = LoraConfig::builder().target_modules(["embed"]).trainable_token_indices([1]).build().unwrap();
    refused(model.add_adapter("both", both), "trainable_token_indices");
    model.merge_adapter(&MergeOptions::new()).unwrap();
    assert_close("merged", &run(&ids), &expected, TOLERANCE);
}

/// Every file that the tests above left in `from_rust`, each with its output, loaded by PEFT.
#[test]
fn what_operations_make_is_loaded_by_peft() {
    let (Some(dir), rng) = (fixtures(), rng()) else { return };
    drop(rng);
    a_combination_with_rank_patterns_is_exact_and_survives_a_save();
    names_of_adapters_never_change_what_is_saved();
    copies_and_biases_are_trained_and_saved_as_in_peft();
    let _rng = common::rng();
    peer("operations_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

/// A base to wrap again, once its adapters are off.
#[test]
fn an_unloaded_base_can_be_wrapped_again() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    let ids = &read(dir.join("outputs.safetensors"))["ids"];
    let base: Base<Net> = with_adapters(dir).unload().unwrap();
    let model = LoraModel::from_pretrained(base, dir.join("from_peft/c")).unwrap();
    let expected = read(dir.join("outputs.safetensors"));
    assert_close("c", &model.forward(ids).unwrap(), &expected["c"], TOLERANCE);
    let error = LoraModel::from_pretrained(model.into_base(), dir.join("from_peft")).unwrap_err();
    assert!(matches!(error, Error::AlreadyAdapted { .. }), "{error}");
}
