//! `target_parameters`: stacks of expert weights, and other parameters by their names, against PEFT.

mod common;

use common::{assert_close, device, follow, rng};
use tch::{Device, Kind, Tensor, nn};
use tch_peft::{
    Base, Combination, Error, InitLoraWeights, LoraConfig, LoraConfigBuilder, LoraModel, MergeOptions, QuantConfig,
    WeightRole,
};

#[test]
fn parameters_follow_peft_and_peft_follows_us() {
    let (Some(dir), _rng) = (follow::make("parameters", &["parameter"]), rng()) else { return };
    follow::follow(&dir, "parameter");
    follow::check(&dir);
}

fn floats() -> (Kind, Device) {
    (Kind::Float, device())
}

/// A model of one parameter `experts.w`, with the handle that a network would keep, and random factors.
fn adapted(sizes: &[i64], is_transposed: bool, quantised: bool) -> (Tensor, LoraModel<()>) {
    let vs = nn::VarStore::new(device());
    let weight = (vs.root() / "experts").var("weight", sizes, nn::Init::Randn { mean: 0.0, stdev: 0.3 });
    let base = Base::from(vs);
    let base = if quantised {
        // A rule by name packs a stack, one row of scales for each matrix.
        let config = QuantConfig::int8().convolutions(true).build().unwrap();
        let base = base.quantize(&config).unwrap();
        assert_eq!(base.quantization_report().weights().len(), 1);
        base
    } else {
        base
    };
    let base = base.declare("experts", WeightRole::Experts { is_transposed });
    let config = LoraConfig::builder().r(2).lora_alpha(4.0).target_parameters(["experts.weight"]).build().unwrap();
    let model = LoraModel::wrap(base, config).unwrap();
    let _no_grad = tch::no_grad_guard();
    for p in model.parameters() {
        let _ = p.tensor.shallow_clone().normal_(0.0, 0.2);
    }
    (weight, model)
}

/// The formula of PEFT's `ParamWrapper`, spelt out.
fn expected_delta(model: &LoraModel<()>, n: i64, is_transposed: bool) -> Tensor {
    let tensors: Vec<Tensor> = model.parameters().into_iter().map(|p| p.tensor).collect();
    let (a, b) = (&tensors[0], &tensors[1]);
    let (a, b) = (a.view([n, -1, a.size()[1]]), b.view([b.size()[0], -1, n]));
    let path = None::<&[i64]>;
    let form = if is_transposed { "ore,eri->eio" } else { "ore,eri->eoi" };
    Tensor::einsum(form, &[b, a], path) * 2.0
}

/// Every use of a stack gives what it gives on the dense value: results and gradients.
#[test]
fn uses_of_a_stack() {
    let _rng = rng();
    for (is_transposed, quantised) in [(false, false), (true, false), (false, true), (true, true)] {
        let sizes = if is_transposed { [3, 16, 6] } else { [3, 6, 16] };
        let (weight, model) = adapted(&sizes, is_transposed, quantised);
        let base = tch::no_grad(|| {
            let _off = model.disable_adapters();
            &weight * 1.0
        });
        let dense = || &base + expected_delta(&model, 3, is_transposed);
        let adapters: Vec<Tensor> = model.parameters().into_iter().map(|p| p.tensor).collect();
        let input = |sizes: &[i64]| Tensor::randn(sizes, floats()).set_requires_grad(true);
        let check = |name: &str, inputs: &[&Tensor], f: &dyn Fn(&Tensor) -> Tensor| {
            let all: Vec<&Tensor> = inputs.iter().copied().chain(&adapters).collect();
            let run = |weight: &Tensor| {
                let y = f(weight);
                let probe = Tensor::arange(y.numel() as i64, floats()).sin().reshape(y.size());
                (y.shallow_clone(), Tensor::run_backward(&[(&y * &probe).sum(Kind::Float)], &all, false, false))
            };
            let (found, expected) = (run(&weight), run(&dense()));
            let name = format!("{name}, transposed: {is_transposed}, quantised: {quantised}");
            assert_close(&name, &found.0, &expected.0, 1e-5);
            for (i, (found, expected)) in found.1.iter().zip(&expected.1).enumerate() {
                assert_close(&format!("{name}: gradient {i}"), found, expected, 1e-5);
            }
        };
        let [_, rows, columns] = sizes;
        let (x, cube, left) = (input(&[5, columns]), input(&[2, 3, columns]), input(&[5, rows]));
        let (stack, left_stack, bias) = (input(&[3, 5, columns]), input(&[3, 5, rows]), input(&[rows]));
        check("one matrix, linear", &[&cube, &bias], &|w| cube.linear(&w.get(1), Some(&bias)));
        check("one matrix from the end", &[&x], &|w| x.linear(&w.select(-3, -1), None::<Tensor>));
        check("one matrix, matmul", &[&left], &|w| left.matmul(&w.get(2)));
        check("one matrix, turned", &[&x], &|w| x.mm(&w.get(0).tr()));
        check("one matrix of the turned stack", &[&x], &|w| x.mm(&w.transpose(1, 2).get(0)));
        check("one matrix, another operator", &[], &|w| w.get(1).tr().square());
        check("all, one by one", &[&x], &|w| {
            Tensor::stack(&(0..3).map(|e| x.linear(&w.get(e), None::<Tensor>)).collect::<Vec<_>>(), 0)
        });
        check("bmm", &[&left_stack], &|w| left_stack.bmm(w));
        check("bmm of the turned stack", &[&stack], &|w| stack.bmm(&w.transpose(-1, 1)));
        check("bmm of the stack turned twice", &[&left_stack], &|w| left_stack.bmm(&w.mt().mt()));
        check("matmul", &[&left_stack], &|w| left_stack.matmul(w));
        check("matmul with one matrix", &[&left], &|w| left.matmul(w));
        check("einsum", &[&x], &|w| {
            Tensor::einsum("ni,eoi->eno", &[x.shallow_clone(), w.shallow_clone()], None::<i64>)
        });
        check("index_select", &[], &|w| w.index_select(0, &Tensor::from_slice(&[2i64, 0, 2]).to_device(device())));
        check("index", &[], &|w| w.index(&[Some(Tensor::from_slice(&[1i64, 1]).to_device(device()))]));
        check("another dimension", &[], &|w| w.select(1, 2));
        check("turned otherwise", &[], &|w| w.transpose(0, 2).square());
        let error = weight.f_get(3).unwrap_err().to_string();
        assert!(error.contains("out of range") || error.contains("index 3"), "{error}");

        let merged = expected_delta(&model, 3, is_transposed) + &base;
        let (plain, report) = model.merge_and_unload(&MergeOptions::new()).unwrap();
        assert_eq!((report.layers.len(), report.layers[0].name.as_str()), (1, "experts.weight"));
        drop(plain);
        assert_close("merged", &weight, &merged, 1e-6);
    }
}

#[test]
fn a_mixed_batch_refuses_stacks() {
    let _rng = rng();
    let (weight, model) = adapted(&[3, 6, 16], false, false);
    let mixed = model.mixed_batch(&["default", "__base__"]).unwrap();
    let error = Tensor::randn([2, 16], floats()).f_linear(&weight.get(1), None::<Tensor>).unwrap_err().to_string();
    assert!(error.contains("mixed_batch") && error.contains("experts.weight"), "{error}");
    drop(mixed);
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let _rng = rng();
    let wrap = |config: LoraConfigBuilder| {
        let vs = nn::VarStore::new(device());
        let root = vs.root();
        let _ = (&root / "experts").var("up", &[3, 6, 16], nn::Init::Const(0.5));
        let _ = (&root / "experts").var("norm", &[6], nn::Init::Const(0.5));
        let _ = nn::linear(&root / "experts" / "router", 16, 3, Default::default());
        let _ = nn::linear(&root / "lin", 16, 16, Default::default());
        let _ = root.var("top", &[3, 6], nn::Init::Const(0.5));
        LoraModel::wrap(Base::from(vs), config.r(4).build().unwrap())
    };
    let up = || LoraConfig::builder().target_parameters(["experts.up"]);
    assert_eq!(wrap(up()).unwrap().layers(), ["experts.up"]);
    for (config, name) in [
        (up().lora_dropout(0.1), "lora_dropout"),
        (up().fan_in_fan_out(true), "fan_in_fan_out"),
        (up().lora_bias(true), "lora_bias"),
        (up().use_dora(true), "use_dora"),
        (up().init_lora_weights(InitLoraWeights::Pissa), "init_lora_weights"),
        (up().init_lora_weights(InitLoraWeights::Orthogonal), "init_lora_weights"),
        (up().modules_to_save(["router"]), "modules_to_save"),
        (LoraConfig::builder().target_parameters(["lin.weight"]).target_modules(["lin"]), "target_parameters"),
        (LoraConfig::builder().target_parameters(["norm"]), "target_parameters"),
        (LoraConfig::builder().target_parameters(["top"]), "target_parameters"),
    ] {
        let error = wrap(config).unwrap_err();
        assert!(matches!(&error, Error::Config { field, .. } if field == name), "{name}: {error}");
    }
    let error = wrap(up().target_parameters(["experts.up", "experts.upp"])).unwrap_err();
    let Error::NoTarget { target, near } = &error else { panic!("{error}") };
    assert_eq!((target.as_str(), near[0].as_str()), ("experts.upp", "experts.up"));

    let mut model = wrap(up()).unwrap();
    let error = model.add_weighted_adapter(&[("default", 1.0)], "sum", Combination::Cat).unwrap_err();
    assert!(error.to_string().contains("target_parameters"), "{error}");
    let dir = common::fresh_dir("parameters_convert");
    model.save_pretrained(&dir).unwrap();
    let error = model.save_as_lora("default", dir.join("lora"), &dir).unwrap_err();
    assert!(matches!(&error, Error::Config { field, .. } if field == "target_parameters"), "{error}");
}

/// The order in which a store's variables are made is that of PEFT's wrappers, not the alphabet's.
#[test]
fn keys_follow_the_order_of_making() {
    let _rng = rng();
    for names in [["zeta", "alpha"], ["alpha", "zeta"]] {
        let vs = nn::VarStore::new(device());
        for name in names {
            let columns = if name == "zeta" { 16 } else { 20 };
            let _ = (vs.root() / "experts").var(name, &[3, 6, columns], nn::Init::Const(0.5));
        }
        let config = LoraConfig::builder().target_parameters(["zeta", "alpha"]).r(2).build().unwrap();
        let model = LoraModel::wrap(Base::from(vs), config).unwrap();
        let columns = |key: &str| {
            let name = format!("base_model.model.experts.{key}lora_A.weight");
            model.parameters().into_iter().find(|p| p.name == name).unwrap().tensor.size()[1]
        };
        let expected = if names[0] == "zeta" { [16, 20] } else { [20, 16] };
        assert_eq!([columns("base_layer."), columns("")], expected, "the first is the inner one");
    }
}
