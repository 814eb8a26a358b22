//! Initialisations from data, and those that change the base on quantised bases, against HF PEFT and
//! against their formulas. tests/python/inits_reference.py holds PEFT's side.

mod common;

use std::path::Path;

use common::{assert_close, assert_differs, assert_same, bits, device, peer, read, rng, write};
use tch::nn;
use tch::{Device, Kind, Tensor};
use tch_peft::quant::quantize;
use tch_peft::{
    AdamW, Base, CordaConfig, CordaMethod, Error, InitLoraWeights, LoftqConfig, LoraConfig, LoraModel, MergeOptions,
    Optimizer, Parts, QuantConfig, Run, Sampler, Schedule, Scheme, TargetModules, TorchScript,
};

const BATCHES: usize = 2;

fn fixtures() -> Option<&'static Path> {
    common::made("inits", "inits_reference.py", &["make"])
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, name: &str) {
    match result {
        Err(Error::Config { field, .. }) if field == name => {}
        Err(error) => panic!("expected an error about {name}, found: {error}"),
        Ok(_) => panic!("expected an error about {name}"),
    }
}

/// Input and label of each batch.
fn batches(dir: &Path) -> Vec<[Tensor; 2]> {
    let data = read(dir.join("data.safetensors"));
    (0..BATCHES).map(|i| [data[&format!("x{i}")].copy(), data[&format!("label{i}")].copy()]).collect()
}

/// What a case's `step` does.
fn step(backward: bool) -> impl FnMut(&TorchScript, &[Tensor; 2]) -> tch_peft::Result<Option<Tensor>> {
    move |module, [x, label]| {
        let y = module.forward(x)?;
        if backward {
            y.mse_loss(label, tch::Reduction::Mean).backward();
        }
        Ok(None)
    }
}

/// A model whose configuration is that of PEFT's case.
fn from_data(dir: &Path, case: &str, base: Base<TorchScript>) -> LoraModel<TorchScript> {
    let theirs = LoraConfig::from_pretrained(dir.join(case).join("adapter")).unwrap();
    let mut config = LoraConfig::builder().r(4).lora_alpha(8.0).target_modules(["up", "mid"]);
    config = config.init_lora_weights(theirs.init_lora_weights());
    config = config.eva_config(theirs.eva_config().unwrap()).corda_config(theirs.corda_config().unwrap());
    config = config.lora_ga_config(theirs.lora_ga_config().unwrap());
    if case == "eva" {
        config = config.rank_pattern([("up", 6)]);
    }
    let backward = case.starts_with("lora_ga");
    LoraModel::wrap_with_data(base, config.build().unwrap(), &batches(dir), step(backward)).unwrap()
}

fn base(dir: &Path) -> Base<TorchScript> {
    Base::torchscript_on_device(dir.join("model.pt"), device()).unwrap()
}

fn tensor(model: &LoraModel<TorchScript>, end: &str) -> Tensor {
    let parameters = model.parameters();
    let found = parameters.iter().find(|p| p.name.ends_with(end));
    found.unwrap_or_else(|| panic!("no {end}")).tensor.detach()
}

/// Row by row the same line, in whichever direction.
#[track_caller]
fn assert_same_lines(name: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let signs = (found * expected).sum_dim_intlist([1i64].as_slice(), true, Kind::Float).sign();
    assert_close(name, &(found * signs), expected, tolerance);
}

/// The output without the adapter: that of what is left of the base.
fn residual(model: &LoraModel<TorchScript>, x: &Tensor) -> Tensor {
    let _off = model.disable_adapters();
    tch::no_grad(|| model.forward(x).unwrap())
}

#[test]
fn eva_finds_pefts_directions_and_ranks() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for case in ["eva", "eva_whiten"] {
        let model = from_data(dir, case, base(dir));
        let (ours, theirs) =
            (model.config().as_lora().unwrap(), LoraConfig::from_pretrained(dir.join(case).join("adapter")).unwrap());
        let theirs_of = theirs.layer_settings(["up", "mid"]);
        assert_eq!(ours.layer_settings(["up", "mid"]), theirs_of, "{case}");
        // What was asked for is moved where it explains more.
        assert!(case != "eva" || theirs_of[0].r < 6 && theirs_of[1].r > 4, "{case}: {theirs_of:?}");
        let adapter = read(dir.join(case).join("adapter/adapter_model.safetensors"));
        for path in ["up", "mid"] {
            let key = format!("base_model.model.{path}.lora_A.weight");
            assert_same_lines(&format!("{case}: {path}"), &tensor(&model, &key), &adapter[&key], 2e-3);
            assert_eq!(f64::try_from(tensor(&model, &format!("{path}.lora_B.weight")).abs().max()).unwrap(), 0.0);
        }
        // Nothing is taken out of the base, so a file of it loads.
        let folder = dir.join(case).join("saved");
        model.save_pretrained(&folder).unwrap();
        let again = LoraModel::from_pretrained(base(dir), &folder).unwrap();
        assert_same(case, &tensor(&again, "up.lora_A.weight"), &tensor(&model, "up.lora_A.weight"));
        assert!(again.config().differences(model.config()).is_empty(), "{case}");
    }
    // The first rows alone.
    let config = LoraConfig::builder().r(2).target_modules(["up"]).init_lora_weights(InitLoraWeights::Eva);
    let data = batches(dir);
    let mask = Tensor::arange(192, (Kind::Int64, device())).lt(100);
    let masked = LoraModel::wrap_with_data(base(dir), config.clone().build().unwrap(), &data, |module, [x, _]| {
        let _ = module.forward(x)?;
        Ok(Some(mask.shallow_clone()))
    });
    let cut = LoraModel::wrap_with_data(base(dir), config.build().unwrap(), &data, |module, [x, _]| {
        let _ = module.forward(&x.narrow(0, 0, 100))?;
        Ok(None)
    });
    let [masked, cut] = [masked, cut].map(|model| tensor(&model.unwrap(), "up.lora_A.weight"));
    assert_close("masked", &masked, &cut, 1e-6);
}

#[test]
fn corda_takes_out_what_peft_takes_out() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for case in ["corda_ipm", "corda_kpm"] {
        let model = from_data(dir, case, base(dir));
        let adapter = read(dir.join(case).join("adapter/adapter_model.safetensors"));
        for path in ["up", "mid"] {
            let product = |a: &Tensor, b: &Tensor| b.mm(a);
            let key = |half: &str| format!("base_model.model.{path}.lora_{half}.weight");
            let ours = product(&tensor(&model, &key("A")), &tensor(&model, &key("B")));
            assert_close(&format!("{case}: {path}"), &ours, &product(&adapter[&key("A")], &adapter[&key("B")]), 1e-3);
        }
    }
}

#[test]
fn lora_ga_takes_pefts_directions_of_the_gradient() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for case in ["lora_ga_stable", "lora_ga_unit", "lora_ga_gd_scale", "lora_ga_weight_svd"] {
        // PEFT estimates the weight's largest singular value.
        let tolerance = if case == "lora_ga_weight_svd" { 2e-2 } else { 5e-3 };
        let model = from_data(dir, case, base(dir));
        let adapter = read(dir.join(case).join("adapter/adapter_model.safetensors"));
        for path in ["up", "mid"] {
            let key = |half: &str| format!("base_model.model.{path}.lora_{half}.weight");
            let (a, b) = (tensor(&model, &key("A")), tensor(&model, &key("B")));
            assert_same_lines(&format!("{case}: A of {path}"), &a, &adapter[&key("A")], tolerance);
            assert_same_lines(&format!("{case}: B of {path}"), &b.tr(), &adapter[&key("B")].tr(), tolerance);
        }
    }
}

/// The model starts as the base, is trained, and is saved as plain LoRA for the base as it was.
fn follow_residual(dir: &Path, case: &str, mut model: LoraModel<TorchScript>) {
    let (data, record) = (batches(dir), read(dir.join(case).join("record.safetensors")));
    let [x, label] = &data[0];
    let forward = |model: &LoraModel<TorchScript>| tch::no_grad(|| model.forward(x).unwrap());
    assert_close(&format!("{case}: start"), &forward(&model), &record["output"], 1e-5);
    let plain = tch::no_grad(|| base(dir).module().forward(x).unwrap());
    assert_close(&format!("{case}: as the base"), &forward(&model), &plain, 1e-5);
    assert_differs(&format!("{case}: what is left"), &residual(&model, x), &plain, 1e-4);

    // The same data takes the same part out again.
    let again = from_data(dir, case, base(dir));
    assert_eq!(again.base().fingerprint().unwrap(), model.base().fingerprint().unwrap(), "{case}");
    let config = model.config().as_lora().unwrap().clone();
    refused(model.add_adapter("second", config), "init_lora_weights");
    refused(LoraModel::from_pretrained(base(dir), dir.join(case).join("adapter")), "init_lora_weights");

    for _ in 0..3 {
        model.forward(x).unwrap().mse_loss(label, tch::Reduction::Mean).backward();
        let _no_grad = tch::no_grad_guard();
        for p in model.trainable_parameters() {
            let mut value = p.tensor.shallow_clone();
            value -= p.tensor.grad() * 0.05;
            let _ = p.tensor.grad().zero_();
        }
    }
    let trained = forward(&model);
    assert_differs(&format!("{case}: trained"), &trained, &plain, 1e-4);
    let folder = dir.join(case).join("ours");
    model.save_pretrained(&folder).unwrap();
    let converted = LoraModel::from_pretrained(base(dir), &folder).unwrap();
    assert_eq!(converted.config().as_lora().unwrap().init_lora_weights(), InitLoraWeights::Default);
    assert_close(&format!("{case}: converted"), &forward(&converted), &trained, 1e-5);
    write(dir.join(case).join("trained.safetensors"), &[("output".into(), trained)]);
}

#[test]
fn what_changed_the_base_is_converted_for_peft_which_pools_as_we_do() {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    for case in ["corda_ipm", "corda_kpm", "lora_ga_stable", "lora_ga_unit", "lora_ga_gd_scale", "lora_ga_weight_svd"] {
        follow_residual(dir, case, from_data(dir, case, base(dir)));
    }
    tch::manual_seed(4);
    let (base, weight, bias) = pooled_base(true);
    let x = Tensor::randn([2, 3, 128], floats()).set_requires_grad(true);
    let model = LoraModel::wrap(base, qalora()).unwrap();
    let y = x.apply(model.module());
    (&y * &y).mean(Kind::Float).backward();
    let mut tensors = vec![("weight".to_string(), weight), ("bias".into(), bias)];
    tensors.extend([("x".into(), x.shallow_clone()), ("grad.x".into(), x.grad()), ("y".into(), y)]);
    for p in model.parameters() {
        let half = if p.name.contains("lora_A") { "A" } else { "B" };
        tensors.extend([(half.to_string(), p.tensor.shallow_clone()), (format!("grad.{half}"), p.tensor.grad())]);
    }
    write(dir.join("qalora.safetensors"), &tensors);
    peer("inits_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

fn floats() -> (Kind, Device) {
    (Kind::Float, device())
}

fn qalora() -> LoraConfig {
    let config = LoraConfig::builder().r(4).lora_alpha(8.0).target_modules(["layer"]).init_lora_weights(false);
    config.use_qalora(true).qalora_group_size(16).build().unwrap()
}

/// A linear layer, what its weight is worth, and its bias.
fn pooled_base(quantized: bool) -> (Base<nn::Linear>, Tensor, Tensor) {
    let vs = nn::VarStore::new(device());
    let net = nn::linear(vs.root() / "layer", 128, 24, Default::default());
    let bias = net.bs.as_ref().unwrap().detach().copy();
    let weight = quantize("w", &net.ws.detach(), Scheme::INT4).unwrap().dequantize(Kind::Float).unwrap();
    let base = Base::new(vs, net);
    let base = if quantized { base.quantize(&QuantConfig::int4().build().unwrap()).unwrap() } else { base };
    (base, weight, bias)
}

#[test]
fn qalora_is_merged_saved_and_refused_where_it_has_no_meaning() {
    let _rng = rng();
    tch::manual_seed(6);
    let (base, ..) = pooled_base(true);
    let mut model = LoraModel::wrap(base, qalora()).unwrap();
    assert_eq!(model.parameters()[0].tensor.size(), [4, 8]);
    let x = Tensor::randn([5, 128], floats());
    let y = tch::no_grad(|| x.apply(model.module()));
    model.merge_adapter(&MergeOptions::new()).unwrap();
    assert_close("merged", &tch::no_grad(|| x.apply(model.module())), &y, 1e-5);
    model.unmerge_adapter().unwrap();
    assert_same("unmerged", &tch::no_grad(|| x.apply(model.module())), &y);
    let dir = common::fresh_dir("qalora");
    model.save_pretrained(&dir).unwrap();
    let base = model.unload().unwrap();
    let again = LoraModel::from_pretrained(base, &dir).unwrap();
    assert_same("loaded", &tch::no_grad(|| x.apply(again.module())), &y);

    refused(LoraModel::wrap(pooled_base(false).0, qalora()), "use_qalora");
    let int8 = pooled_base(false).0.quantize(&QuantConfig::int8().build().unwrap()).unwrap();
    refused(LoraModel::wrap(int8, qalora()), "use_qalora");
    let odd = LoraConfig::builder().target_modules(["layer"]).use_qalora(true).qalora_group_size(24).build().unwrap();
    refused(LoraModel::wrap(pooled_base(true).0, odd), "qalora_group_size");
    let dora = LoraConfig::builder().target_modules(["layer"]).use_qalora(true).use_dora(true).build();
    refused(dora, "use_dora");
}

/// One linear layer without a bias, whose weight has a few strong directions.
fn plain(seed: i64) -> (Base<nn::Linear>, Tensor) {
    tch::manual_seed(seed);
    let vs = nn::VarStore::new(device());
    let settings = nn::LinearConfig { bias: false, ..Default::default() };
    let net = nn::linear(vs.root() / "layer", 128, 96, settings);
    let weight = Tensor::randn([96, 6], floats()).mm(&Tensor::randn([6, 128], floats())) * 0.1
        + Tensor::randn([96, 128], floats()) * 0.1;
    tch::no_grad(|| net.ws.shallow_clone().copy_(&weight));
    (Base::new(vs, net), weight)
}

/// The weight that a layer without a bias computes with.
fn effective(layer: &nn::Linear) -> Tensor {
    tch::no_grad(|| Tensor::eye(128, floats()).apply(layer).tr().contiguous())
}

fn repacked(weight: &Tensor, scheme: Scheme) -> Tensor {
    quantize("w", &weight.contiguous(), scheme).unwrap().dequantize(Kind::Float).unwrap()
}

/// s · B · A of the only layer.
fn product(model: &LoraModel<nn::Linear>, s: f64) -> Tensor {
    let [a, b]: [Tensor; 2] =
        model.parameters().into_iter().map(|p| p.tensor.detach()).collect::<Vec<_>>().try_into().unwrap();
    b.mm(&a) * s
}

/// The part of rank r with the largest singular values.
fn principal(weight: &Tensor, r: i64) -> Tensor {
    let (u, s, v) = weight.svd(true, true);
    (u.narrow(1, 0, r) * s.narrow(0, 0, r)).mm(&v.narrow(1, 0, r).tr())
}

/// The definitions, taken from what a quantised weight is worth, the rest packed again by its scheme.
#[test]
fn pissa_and_olora_start_from_quantised_bases() {
    let _rng = rng();
    for (scheme, config) in
        [(Scheme::Int8, QuantConfig::int8()), (Scheme::NF4, QuantConfig::nf4()), (Scheme::INT4, QuantConfig::int4())]
    {
        for init in [InitLoraWeights::Pissa, InitLoraWeights::PissaNiter(8), InitLoraWeights::Olora] {
            let about = format!("{init:?} on {scheme}");
            let make = || {
                let (base, weight) = plain(2);
                let lora =
                    LoraConfig::builder().r(6).lora_alpha(12.0).target_modules(["layer"]).init_lora_weights(init);
                let base = base.quantize(&config.clone().build().unwrap()).unwrap();
                (LoraModel::wrap(base, lora.build().unwrap()).unwrap(), repacked(&weight, scheme))
            };
            let (model, w) = make();
            let taken = product(&model, 2.0);
            let expected = match init {
                InitLoraWeights::Olora => {
                    let (q, r) = Tensor::linalg_qr(&w, "reduced");
                    q.narrow(1, 0, 6).mm(&r.narrow(0, 0, 6)) * 2.0
                }
                _ => principal(&w, 6),
            };
            let tolerance = if matches!(init, InitLoraWeights::PissaNiter(_)) { 1e-3 } else { 1e-5 };
            assert_close(&about, &taken, &expected, tolerance);
            let left = {
                let _off = model.disable_adapters();
                effective(model.module())
            };
            assert_close(&format!("{about}: the rest"), &left, &repacked(&(&w - &taken), scheme), 1e-6);
            assert_eq!(model.layer_status()[0].scheme, Some(scheme));

            // What is saved is taken out again, once, wherever it is loaded.
            let dir = common::fresh_dir("quantised_init");
            model.save_pretrained(&dir).unwrap();
            let (base, _) = plain(2);
            let base = base.quantize(&config.clone().build().unwrap()).unwrap();
            let again = LoraModel::from_pretrained(base, &dir).unwrap();
            assert_same(&about, &effective(again.module()), &effective(model.module()));
            assert_eq!(again.base().fingerprint().unwrap(), make().0.base().fingerprint().unwrap());
        }
    }
}

#[test]
fn loftq_takes_any_scheme() {
    let _rng = rng();
    let group = Scheme::Int4 { group_size: 32, hqq: false };
    for scheme in
        [Scheme::NF4, Scheme::FP4, Scheme::INT4, group, Scheme::Mxfp4, Scheme::NF4_DOUBLE, Scheme::Int8, Scheme::INT2]
    {
        let (base, w) = plain(3);
        let config = LoraConfig::builder().r(6).lora_alpha(12.0).target_modules(["layer"]);
        let config =
            config.init_lora_weights(InitLoraWeights::Loftq).loftq_config(LoftqConfig { scheme, loftq_iter: 2 });
        let model = LoraModel::wrap(base, config.build().unwrap()).unwrap();
        // The paper's algorithm 1, with s as part of the product.
        let mut low = Tensor::zeros_like(&w);
        let mut packed = w.copy();
        for _ in 0..2 {
            packed = repacked(&(&w - &low), scheme);
            low = principal(&(&w - &packed), 6);
        }
        let left = {
            let _off = model.disable_adapters();
            effective(model.module())
        };
        assert_close(&format!("{scheme}: Q"), &left, &packed, 1e-4);
        assert_close(&format!("{scheme}: s·B·A"), &product(&model, 2.0), &low, 2e-2);
        let error = |found: &Tensor| f64::try_from((found - &w).norm()).unwrap();
        let (with, alone) = (error(&effective(model.module())), error(&repacked(&w, scheme)));
        assert!(with < 0.95 * alone, "{scheme}: {with} against {alone}");
        assert_eq!(model.layer_status()[0].scheme, Some(scheme));

        let dir = common::fresh_dir("loftq");
        model.save_pretrained(&dir).unwrap();
        assert_eq!(LoraConfig::from_pretrained(&dir).unwrap().loftq_config().unwrap().scheme, scheme);
        let again = LoraModel::from_pretrained(plain(3).0, &dir).unwrap();
        assert_same(&scheme.to_string(), &effective(again.module()), &effective(model.module()));
    }
    let wrong = LoraConfig::builder().target_modules(["layer"]);
    refused(wrong.loftq_config(LoftqConfig { scheme: Scheme::Bf16, loftq_iter: 1 }).build(), "loftq_config");
    let (base, _) = plain(3);
    let quantized = base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap();
    let config = LoraConfig::builder().target_modules(["layer"]).init_lora_weights(InitLoraWeights::Loftq);
    refused(LoraModel::wrap(quantized, config.build().unwrap()), "init_lora_weights");
}

/// On a quantised base the statistics are those of what runs, and the rest is packed again.
#[test]
fn data_initialises_on_quantised_bases_and_a_run_resumes() {
    let _rng = rng();
    let batches = [Tensor::randn([64, 128], floats()), Tensor::randn([64, 128], floats()) * 2.0];
    let make = |init, scheme: Option<QuantConfig>| {
        let (base, _) = plain(5);
        let base = match scheme {
            Some(config) => base.quantize(&config).unwrap(),
            None => base,
        };
        let config = LoraConfig::builder().r(4).lora_alpha(8.0).target_modules(["layer"]).init_lora_weights(init);
        let config = config.corda_config(CordaConfig { corda_method: CordaMethod::Ipm }).build().unwrap();
        LoraModel::wrap_with_data(base, config, &batches, |net, x| {
            let y = x.apply(net);
            if init == InitLoraWeights::LoraGa {
                (&y * &y).mean(Kind::Float).backward();
            }
            Ok(None)
        })
        .unwrap()
    };
    let (_, w) = plain(5);
    for (scheme, config) in [(Scheme::NF4, QuantConfig::nf4()), (Scheme::Int8, QuantConfig::int8())] {
        let config = config.build().unwrap();
        for init in [InitLoraWeights::Corda, InitLoraWeights::LoraGa] {
            let model = make(init, Some(config.clone()));
            let left = {
                let _off = model.disable_adapters();
                effective(model.module())
            };
            let expected = repacked(&(repacked(&w, scheme) - product(&model, 2.0)), scheme);
            assert_close(&format!("{init:?} on {scheme}"), &left, &expected, 1e-6);
        }
        let eva = make(InitLoraWeights::Eva, Some(config));
        assert_eq!(eva.config().as_lora().unwrap().target_modules(), Some(&TargetModules::List(vec!["layer".into()])));
    }

    // Straight, and interrupted after the first of two steps.
    let dir = common::fresh_dir("data_resume");
    let train = |folder: &str, until: u64| {
        let mut model = make(InitLoraWeights::Corda, Some(QuantConfig::nf4().build().unwrap()));
        let mut optimizer = AdamW::builder().lr(1e-2).build(model.trainable_parameters()).unwrap();
        let (schedule, mut sampler) = (Schedule::constant(), Sampler::new(64, 16, 3).unwrap());
        let mut run = Run::builder(dir.join(folder)).every(1).build().unwrap();
        run.resume_or_start(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler)).unwrap();
        while run.current_step() < until {
            let rows: Vec<i64> = sampler.next_batch().into_iter().map(|row| row as i64).collect();
            let y = batches[0].index_select(0, &Tensor::from_slice(&rows).to_device(device())).apply(model.module());
            (&y * &y).mean(Kind::Float).backward();
            optimizer.step().unwrap();
            optimizer.zero_grad().unwrap();
            run.step(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler)).unwrap();
        }
        model.parameters().iter().map(|p| bits(&p.tensor)).collect::<Vec<_>>()
    };
    let straight = train("straight", 2);
    train("interrupted", 1);
    assert_eq!(train("interrupted", 2), straight);
}

#[test]
fn what_data_cannot_do_is_refused_by_name() {
    let _rng = rng();
    let batches = [Tensor::randn([6, 128], floats())];
    let wrap = |config: LoraConfig| {
        LoraModel::wrap_with_data(plain(7).0, config, &batches, |net, x| {
            let _ = x.apply(net);
            Ok(None)
        })
    };
    let config = |init| LoraConfig::builder().r(4).target_modules(["layer"]).init_lora_weights(init).build().unwrap();
    refused(wrap(config(InitLoraWeights::Pissa)), "init_lora_weights");
    // No backward pass reaches the layer, and the batch has fewer rows than directions.
    refused(wrap(config(InitLoraWeights::LoraGa)), "init_lora_weights");
    refused(wrap(config(InitLoraWeights::Eva)), "eva_config");
    for init in [InitLoraWeights::Eva, InitLoraWeights::Corda, InitLoraWeights::LoraGa] {
        refused(LoraModel::wrap(plain(7).0, config(init)), "init_lora_weights");
    }
    let dora = LoraConfig::builder().target_modules(["layer"]).init_lora_weights(InitLoraWeights::Corda).use_dora(true);
    refused(dora.build(), "use_dora");
}
