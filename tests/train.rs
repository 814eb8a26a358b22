//! Optimizer, schedules, clipping and sampler, against torch and transformers.

mod common;

use common::{assert_close, assert_same, bits, fresh_dir, peer, python};
use serde_json::Value;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};
use tch_peft::{AdamW, Error, NamedParameter, Optimizer, OptimizerState, RngState, Sampler, Schedule, clip_grad_norm};

/// What a function of `optim_reference.py` answers.
fn reference(args: &[&str]) -> Option<Value> {
    python()?;
    let out = fresh_dir(&format!("optim-{}", args.join("-"))).join("out.json");
    peer("optim_reference.py", &[&[out.to_str().unwrap()], args].concat());
    Some(serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap())
}

/// A tensor from a list of f32 bit patterns.
fn tensor(value: &Value, shape: &Value, kind: Kind) -> Tensor {
    let values: Vec<f32> =
        value.as_array().unwrap().iter().map(|bits| f32::from_bits(bits.as_i64().unwrap() as u32)).collect();
    let shape: Vec<i64> = shape.as_array().unwrap().iter().map(|d| d.as_i64().unwrap()).collect();
    Tensor::from_slice(&values).view(shape.as_slice()).to_kind(kind)
}

fn parameter(name: &str, tensor: Tensor) -> NamedParameter {
    NamedParameter { name: name.into(), tensor: tensor.set_requires_grad(true) }
}

fn handles(parameters: &[NamedParameter]) -> Vec<NamedParameter> {
    parameters.iter().map(|p| NamedParameter { name: p.name.clone(), tensor: p.tensor.shallow_clone() }).collect()
}

/// Gives the parameter exactly this gradient.
fn set_grad(parameter: &Tensor, grad: &Tensor) {
    (parameter * grad).sum(parameter.kind()).backward();
}

/// Fifteen steps with two groups, a cosine schedule, and a parameter that is
/// left out now and then; `same` compares after each step.
fn follow_torch(kind: Kind, variant: &str, same: fn(&str, &Tensor, &Tensor)) {
    let dtype = if kind == Kind::Float { "float32" } else { "bfloat16" };
    let Some(torch) = reference(&["adamw", dtype, variant]) else { return };
    let shapes = &torch["shapes"];
    let parameters: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|name| parameter(name, tensor(&torch["start"][name], &shapes[name], kind)))
        .collect();
    let mut adamw = AdamW::builder()
        .lr(1e-2)
        .betas(0.9, 0.95)
        .eps(1e-7)
        .weight_decay(0.1)
        .group(|name| name == "b", 3e-3, 0.0)
        .build(handles(&parameters))
        .unwrap();
    let schedule = Schedule::cosine(3, 15);
    for (i, step) in torch["steps"].as_array().unwrap().iter().enumerate() {
        adamw.set_learning_rate_factor(schedule.factor(i as u64));
        let lr = f64::from_bits(step["lr"].as_i64().unwrap() as u64);
        assert_eq!(adamw.learning_rate(), lr, "learning rate at step {i}");
        for NamedParameter { name, tensor: parameter } in &parameters {
            if let Some(grad) = step["grads"].get(name) {
                set_grad(parameter, &tensor(grad, &shapes[name], kind));
            }
        }
        adamw.step().unwrap();
        adamw.zero_grad().unwrap();
        for NamedParameter { name, tensor: parameter } in &parameters {
            let expected = tensor(&step["params"][name], &shapes[name], kind);
            same(&format!("{name} after step {i}"), &parameter.detach(), &expected);
        }
    }
    for (name, found) in adamw.export_state().unwrap().tensors {
        let (parameter, what) = name.split_once('.').unwrap();
        let expected = match what {
            "step" => tensor(&torch["state"][&name], &Value::Array(vec![]), Kind::Float),
            _ => tensor(&torch["state"][&name], &shapes[parameter], kind),
        };
        same(&name, &found, &expected);
    }
}

#[test]
fn adamw_is_torchs_fused_one_bit_by_bit() {
    follow_torch(Kind::Float, "fused", |name, found, expected| assert_same(name, found, expected));
    follow_torch(Kind::BFloat16, "fused", |name, found, expected| assert_same(name, found, expected));
}

#[test]
fn adamw_follows_torchs_default_one() {
    follow_torch(Kind::Float, "default", |name, found, expected| assert_close(name, found, expected, 1e-6));
}

#[test]
fn clipping_is_torchs_bit_by_bit() {
    let Some(torch) = reference(&["clip"]) else { return };
    for case in torch.as_array().unwrap() {
        let shape = |i: usize| [serde_json::json!([7, 9]), serde_json::json!([33])][i].clone();
        let grads: Vec<_> = (0..2).map(|i| tensor(&case["grads"][i], &shape(i), Kind::Float)).collect();
        let mut parameters: Vec<_> = grads.iter().map(|g| parameter("p", g.zeros_like())).collect();
        // One without a gradient doesn't matter.
        parameters.push(parameter("unused", Tensor::ones([2], (Kind::Float, Device::Cpu))));
        for (parameter, grad) in parameters.iter().zip(&grads) {
            set_grad(&parameter.tensor, grad);
        }
        let norm = clip_grad_norm(&parameters, case["max_norm"].as_f64().unwrap()).unwrap();
        assert_eq!(norm, f64::from(f32::from_bits(case["norm"].as_i64().unwrap() as u32)));
        for (i, parameter) in parameters.iter().take(2).enumerate() {
            let expected = tensor(&case["clipped"][i], &shape(i), Kind::Float);
            assert_same("clipped", &parameter.tensor.grad(), &expected);
        }
    }
}

#[test]
fn clipping_refuses_what_is_not_finite_and_changes_nothing() {
    let one = parameter("one", Tensor::ones([2], (Kind::Float, Device::Cpu)));
    assert_eq!(clip_grad_norm(&handles(std::slice::from_ref(&one)), 1.0).unwrap(), 0.0);
    set_grad(&one.tensor, &Tensor::from_slice(&[3.0f32, 4.0]));
    let bad = parameter("bad", Tensor::ones([2], (Kind::Float, Device::Cpu)));
    set_grad(&bad.tensor, &Tensor::from_slice(&[f32::NAN, 1.0]));
    let error = clip_grad_norm(&[one, bad], 1.0).unwrap_err();
    assert!(matches!(&error, Error::NotFinite { name, .. } if name == "the gradient of bad"), "{error}");

    let one = parameter("one", Tensor::ones([2], (Kind::Float, Device::Cpu)));
    set_grad(&one.tensor, &Tensor::from_slice(&[3.0f32, 4.0]));
    assert!(matches!(clip_grad_norm(&handles(std::slice::from_ref(&one)), f64::NAN), Err(Error::Config { .. })));
    assert_eq!(Vec::<f32>::try_from(one.tensor.grad()).unwrap(), [3.0, 4.0]);
}

#[test]
fn schedules_are_those_of_transformers() {
    let Some(factors) = reference(&["schedules"]) else { return };
    for (name, schedule) in [
        ("constant", Schedule::constant()),
        ("constant 7", Schedule::constant_with_warmup(7)),
        ("linear 0 30", Schedule::linear(0, 30)),
        ("linear 7 33", Schedule::linear(7, 33)),
        ("linear 9 5", Schedule::linear(9, 5)),
        ("cosine 0 30", Schedule::cosine(0, 30)),
        ("cosine 7 33", Schedule::cosine(7, 33)),
    ] {
        let expected = factors[name].as_array().unwrap();
        assert_eq!(expected.len(), 41);
        for (step, expected) in expected.iter().enumerate() {
            let (found, expected) = (schedule.factor(step as u64).to_bits() as i64, expected.as_i64().unwrap());
            assert!(found.abs_diff(expected) <= 1, "{name} at {step}: more than 1 ulp away");
        }
    }
}

fn three() -> Vec<NamedParameter> {
    let numbers = |n: i64| Tensor::arange(n, (Kind::Float, Device::Cpu));
    vec![
        parameter("a.weight", numbers(4).view([2, 2])),
        parameter("b.weight", numbers(3)),
        parameter("norm.bias", numbers(2)),
    ]
}

fn state_bits(state: &OptimizerState) -> BTreeMap<&str, Vec<u8>> {
    state.tensors.iter().map(|(name, tensor)| (name.as_str(), bits(tensor))).collect()
}

#[test]
fn an_exported_state_is_a_copy_and_continues_exactly() {
    let parameters = three();
    let mut adamw = AdamW::builder().lr(0.1).build(handles(&parameters)).unwrap();
    let step = |adamw: &mut AdamW, parameters: &[NamedParameter], i: i64| {
        for p in parameters {
            set_grad(&p.tensor, &(p.tensor.detach() * 0.3 - i));
        }
        adamw.step().unwrap();
        adamw.zero_grad().unwrap();
    };
    (0..3).for_each(|i| step(&mut adamw, &parameters, i));
    let state = adamw.export_state().unwrap();
    assert_eq!(state.kind, "adamw");
    let names = ["a.weight.exp_avg", "a.weight.exp_avg_sq", "a.weight.step"];
    assert_eq!(state.tensors.keys().take(3).collect::<Vec<_>>(), names);
    let before: BTreeMap<_, _> = state_bits(&state).into_iter().map(|(n, b)| (n.to_string(), b)).collect();

    let copies: Vec<_> = parameters.iter().map(|p| parameter(&p.name, p.tensor.detach().copy())).collect();
    (3..6).for_each(|i| step(&mut adamw, &parameters, i));
    assert!(state_bits(&state).into_iter().all(|(name, bits)| before[name] == bits), "the export has moved");

    let mut resumed = AdamW::builder().lr(0.1).build(handles(&copies)).unwrap();
    resumed.import_state(state).unwrap();
    (3..6).for_each(|i| step(&mut resumed, &copies, i));
    for (straight, resumed) in parameters.iter().zip(&copies) {
        assert_same(&straight.name, &resumed.tensor, &straight.tensor);
    }
    let (straight, resumed) = (adamw.export_state().unwrap(), resumed.export_state().unwrap());
    assert_eq!(state_bits(&straight), state_bits(&resumed));
}

#[test]
fn states_that_do_not_fit_are_refused_by_name() {
    let parameters = three();
    let mut adamw = AdamW::builder().lr(1e-4).build(handles(&parameters)).unwrap();
    let before = adamw.export_state().unwrap();
    let mut refuse = |change: &dyn Fn(&mut OptimizerState)| {
        let mut state = adamw.export_state().unwrap();
        // What must not arrive.
        state.tensors.values_mut().for_each(|t| drop(t.fill_(7.0)));
        change(&mut state);
        let error = adamw.import_state(state).unwrap_err();
        assert_eq!(state_bits(&before), state_bits(&adamw.export_state().unwrap()), "{error}");
        error
    };

    let error = refuse(&|state| state.kind = "sgd".into());
    assert!(error.to_string().contains(r#"kind: recorded "sgd", given "adamw""#), "{error}");

    let next = 1e-4f64.next_up();
    let error = refuse(&|state| state.hyperparameters["groups"][0]["lr"] = next.into());
    let Error::DifferentConfig { what, differences } = &error else { panic!("{error}") };
    assert_eq!((what.as_str(), differences.len()), ("optimizer", 1));
    assert!(differences[0].starts_with("groups.0.lr: recorded "), "{error}");

    let error = refuse(&|state| {
        let tensor = state.tensors.remove("b.weight.exp_avg").unwrap();
        state.tensors.insert("c.weight.exp_avg".into(), tensor);
    });
    let Error::Keys { missing, unexpected, .. } = &error else { panic!("{error}") };
    assert_eq!((&missing[..], &unexpected[..]), (&["b.weight.exp_avg".into()][..], &["c.weight.exp_avg".into()][..]));

    // `copy_` would have broadcast it.
    let one = || Tensor::ones([1], (Kind::Float, Device::Cpu));
    let error = refuse(&|state| drop(state.tensors.insert("b.weight.exp_avg_sq".into(), one())));
    assert!(error.to_string().contains("b.weight.exp_avg_sq: expected Float [3], found Float [1]"), "{error}");
    let error = refuse(&|state| {
        let half = state.tensors["b.weight.exp_avg"].to_kind(Kind::BFloat16);
        state.tensors.insert("b.weight.exp_avg".into(), half);
    });
    assert!(error.to_string().contains("expected Float [3], found BFloat16 [3]"), "{error}");
}

#[test]
fn groups_are_part_of_the_state() {
    let grouped = |pattern: &'static str| {
        let builder = AdamW::builder().group(move |name| name.ends_with(pattern), 1e-3, 0.0);
        builder.build(three()).unwrap()
    };
    let error = grouped("bias").import_state(grouped("b.weight").export_state().unwrap()).unwrap_err();
    let Error::DifferentConfig { differences, .. } = &error else { panic!("{error}") };
    let lines = ["members.b.weight: recorded 1, given nothing", "members.norm.bias: recorded nothing, given 1"];
    assert_eq!(differences, &lines);
}

#[test]
fn unusable_settings_are_refused() {
    let refused = |builder: tch_peft::AdamWBuilder, field: &str| match builder.build(three()) {
        Err(Error::Config { field: found, .. }) => assert_eq!(found, field),
        other => panic!("{field}: {other:?}"),
    };
    refused(AdamW::builder().lr(-1.0), "lr");
    refused(AdamW::builder().lr(f64::NAN), "lr");
    refused(AdamW::builder().betas(1.0, 0.9), "beta1");
    refused(AdamW::builder().betas(0.9, -0.1), "beta2");
    refused(AdamW::builder().eps(f64::INFINITY), "eps");
    refused(AdamW::builder().weight_decay(-0.1), "weight_decay");
    refused(AdamW::builder().group(|_| true, 1.0, f64::NAN), "weight_decay");
    refused(AdamW::builder().group(|name| name == "typo", 1.0, 0.0), "group");

    let twice = || [three(), three()].into_iter().flatten().collect();
    assert!(matches!(AdamW::builder().build(twice()), Err(Error::Config { .. })));
    assert!(matches!(AdamW::builder().build(Vec::new()), Err(Error::Config { .. })));
    let frozen = NamedParameter { name: "frozen".into(), tensor: Tensor::from(1.0f32) };
    assert!(matches!(AdamW::builder().build(vec![frozen]), Err(Error::Mismatch { name, .. }) if name == "frozen"));
    let strided = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).tr().set_requires_grad(true);
    let strided = NamedParameter { name: "strided".into(), tensor: strided };
    assert!(matches!(AdamW::builder().build(vec![strided]), Err(Error::Mismatch { .. })));
}

#[test]
fn the_order_of_the_data_never_changes() {
    let mut sampler = Sampler::new(10, 4, 42).unwrap();
    let batches: Vec<_> = (0..6).map(|_| sampler.next_batch()).collect();
    // Agreed on by this crate's first version and a second implementation in
    // Python; runs that are under way rely on them.
    let golden: [&[usize]; 6] = [&[0, 6, 9, 1], &[5, 7, 8, 2], &[4, 3], &[3, 8, 7, 1], &[9, 0, 2, 6], &[5, 4]];
    assert_eq!(batches, golden);
}

#[test]
fn each_epoch_visits_each_example_once() {
    let mut sampler = Sampler::new(1000, 64, 3).unwrap();
    let mut orders = Vec::new();
    for epoch in 0..3 {
        let batches: Vec<_> = (0..16).map(|_| sampler.next_batch()).collect();
        assert_eq!((sampler.epoch(), sampler.samples()), (epoch, 1000 * (epoch + 1)));
        assert_eq!(batches[15].len(), 1000 - 15 * 64);
        let order = batches.concat();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        orders.push(order);
    }
    assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    let other_seed = (Sampler::new(1000, 64, 4).unwrap()).next_batch();
    assert_ne!(other_seed, orders[0][..64]);

    let mut plain = Sampler::new(5, 2, 0).unwrap().shuffle(false).drop_last(true);
    let batches: Vec<_> = (0..3).map(|_| plain.next_batch()).collect();
    assert_eq!(batches, [[0, 1], [2, 3], [0, 1]]);
    assert_eq!((plain.epoch(), plain.samples()), (1, 6));
}

#[test]
fn a_sampler_goes_on_from_any_position() {
    for drop_last in [false, true] {
        let new = || Sampler::new(11, 3, 5).unwrap().drop_last(drop_last);
        let mut straight = new();
        for _ in 0..12 {
            let saved = serde_json::to_string(straight.state()).unwrap();
            let mut resumed = new();
            resumed.set_state(&serde_json::from_str(&saved).unwrap()).unwrap();
            let mut ahead = straight.clone();
            (0..5).for_each(|_| assert_eq!(resumed.next_batch(), ahead.next_batch()));
            straight.next_batch();
        }
    }
}

#[test]
fn a_sampler_refuses_other_settings_by_name() {
    let saved = Sampler::new(10, 4, 1).unwrap();
    for (mut other, line) in [
        (Sampler::new(11, 4, 1).unwrap(), "len: recorded 10, given 11"),
        (Sampler::new(10, 5, 1).unwrap(), "batch_size: recorded 4, given 5"),
        (Sampler::new(10, 4, 2).unwrap(), "seed: recorded 1, given 2"),
        (Sampler::new(10, 4, 1).unwrap().shuffle(false), "shuffle: recorded true, given false"),
        (Sampler::new(10, 4, 1).unwrap().drop_last(true), "drop_last: recorded false, given true"),
    ] {
        other.next_batch();
        let before = other.state().clone();
        let error = other.set_state(saved.state()).unwrap_err();
        assert!(matches!(&error, Error::DifferentConfig { differences, .. } if differences == &[line]), "{error}");
        assert_eq!(other.state(), &before);
    }
    for (len, batch_size) in [(0, 1), (3, 0), (3, 4)] {
        assert!(matches!(Sampler::new(len, batch_size, 0), Err(Error::Config { .. })));
    }
}

#[test]
fn random_numbers_repeat_from_a_saved_state() {
    let _rng = common::rng();
    let draw = || bits(&Tensor::randn([5], (Kind::Float, Device::Cpu)));
    tch::manual_seed(1);
    // An odd count: half of a Box-Muller pair waits in the generator.
    let _ = draw();
    let state = RngState::capture(&[Device::Cpu]).unwrap();
    let text = serde_json::to_string(&state).unwrap();
    let first = [draw(), draw()];
    let read: RngState = serde_json::from_str(&text).unwrap();
    assert_eq!(read, state);
    read.check(&[]).unwrap();
    read.restore().unwrap();
    assert_eq!([draw(), draw()], first);
}
