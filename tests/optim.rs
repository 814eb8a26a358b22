//! Optimizers against torch, transformers, bitsandbytes and PEFT.

mod common;

use common::training::{copies, float, handles, parameter, references, set_grad, tensor};
use common::{assert_close, assert_same, assert_same_on_cpu, bits, device};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use tch::{Kind, Tensor};
use tch_peft::{
    Adafactor, AdamW, AdamW8bit, Error, GroupedOptimizer, Lion, NamedParameter, Optimizer, OptimizerBuilder,
    OptimizerState, ParameterGroup, Schedule, Sgd, Update, UpdateRule,
};

const SCRIPT: &str = "optim_reference.py";

const CASES: [&str; 18] = [
    "adamw float32 fused",
    "adamw bfloat16 fused",
    "adamw float32 default",
    "sgd float32 fused 0.9 0 nesterov",
    "sgd float32 fused 0.8 0.3 plain",
    "sgd float32 fused 0 0 plain",
    "sgd float32 default 0.8 0.3 plain",
    "sgd bfloat16 default 0.9 0 nesterov",
    "sgd bfloat16 default 0.8 0.3 plain",
    "lion float32",
    "lion bfloat16",
    "lion_paper",
    "adafactor float32 relative",
    "adafactor bfloat16 relative",
    "adafactor float32 warmup",
    "adafactor float32 own",
    "adafactor float32 scaled",
    "lora_plus",
];

/// What the script answers to one of the cases.
fn reference(case: &str) -> Option<&'static Value> {
    static ANSWERS: OnceLock<Option<Value>> = OnceLock::new();
    let answers = ANSWERS.get_or_init(|| references(SCRIPT, &CASES)).as_ref()?;
    Some(answers.get(case).unwrap_or_else(|| panic!("`{case}` is not among the cases")))
}

/// Fifteen steps with two groups, a cosine schedule, and a parameter that is
/// left out now and then; `same` compares after each step.
fn follow<R: UpdateRule>(case: &str, kind: Kind, builder: OptimizerBuilder<R>, same: fn(&str, &Tensor, &Tensor)) {
    let Some(torch) = reference(case) else { return };
    let shapes = &torch["shapes"];
    let parameters: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|name| parameter(name, tensor(&torch["start"][name], &shapes[name], kind)))
        .collect();
    let mut optimizer = builder.build(handles(&parameters)).unwrap();
    // Adafactor's relative steps come without a schedule.
    let schedule = match float(&torch["steps"][1]["lr"]) {
        1.0 => Schedule::constant(),
        _ => Schedule::cosine(3, 15),
    };
    for (i, step) in torch["steps"].as_array().unwrap().iter().enumerate() {
        optimizer.set_learning_rate_factor(schedule.factor(i as u64));
        assert_eq!(optimizer.learning_rate(), float(&step["lr"]), "learning rate at step {i}");
        for NamedParameter { name, tensor: parameter } in &parameters {
            if let Some(grad) = step["grads"].get(name) {
                set_grad(parameter, &tensor(grad, &shapes[name], kind));
            }
        }
        optimizer.step().unwrap();
        optimizer.zero_grad().unwrap();
        for NamedParameter { name, tensor: parameter } in &parameters {
            let expected = tensor(&step["params"][name], &shapes[name], kind);
            same(&format!("{case}: {name} after step {i}"), &parameter.detach(), &expected);
        }
    }
    let state = optimizer.export_state().unwrap();
    for (name, expected) in torch["state"].as_object().unwrap() {
        let found = &state.tensors[name];
        same(&format!("{case}: {name}"), found, &tensor(expected, &torch["sizes"][name], found.kind()));
    }
}

#[test]
fn adamw_is_torchs_fused_one_bit_by_bit() {
    let builder =
        || AdamW::builder().lr(1e-2).betas(0.9, 0.95).eps(1e-7).weight_decay(0.1).group(|name| name == "b", 3e-3, 0.0);
    follow("adamw float32 fused", Kind::Float, builder(), assert_same_on_cpu);
    follow("adamw bfloat16 fused", Kind::BFloat16, builder(), assert_same_on_cpu);
    let near = |name: &str, found: &Tensor, expected: &Tensor| assert_close(name, found, expected, 1e-6);
    follow("adamw float32 default", Kind::Float, builder(), near);
}

#[test]
fn sgd_is_that_of_torch_bit_by_bit() {
    let builder = || Sgd::builder().lr(1e-2).weight_decay(0.1).group(|name| name == "b", 3e-3, 0.0);
    let fused = |case, builder| follow(&format!("sgd float32 fused {case}"), Kind::Float, builder, assert_same_on_cpu);
    fused("0.9 0 nesterov", builder().momentum(0.9).nesterov(true));
    fused("0.8 0.3 plain", builder().momentum(0.8).dampening(0.3));
    fused("0 0 plain", builder());
    let plain =
        |case, builder| follow(&format!("sgd bfloat16 default {case}"), Kind::BFloat16, builder, assert_same_on_cpu);
    plain("0.9 0 nesterov", builder().momentum(0.9).nesterov(true));
    plain("0.8 0.3 plain", builder().momentum(0.8).dampening(0.3));
    let near = |name: &str, found: &Tensor, expected: &Tensor| assert_close(name, found, expected, 1e-6);
    let momentum = builder().momentum(0.8).dampening(0.3);
    follow("sgd float32 default 0.8 0.3 plain", Kind::Float, momentum, near);
}

#[test]
fn lion_is_that_of_bitsandbytes_bit_by_bit_and_that_of_the_paper() {
    let builder = || Lion::builder().lr(1e-2).betas(0.9, 0.95).weight_decay(0.1).group(|name| name == "b", 3e-3, 0.0);
    follow("lion float32", Kind::Float, builder(), assert_same_on_cpu);
    follow("lion bfloat16", Kind::BFloat16, builder(), assert_same_on_cpu);
    // The references are handed over as f32.
    let near = |name: &str, found: &Tensor, expected: &Tensor| assert_close(name, found, expected, 1e-6);
    follow("lion_paper", Kind::Double, builder(), near);
}

#[test]
fn adafactor_is_that_of_transformers_bit_by_bit() {
    let decay = || Adafactor::builder().weight_decay(0.1);
    follow("adafactor float32 relative", Kind::Float, decay(), assert_same_on_cpu);
    follow("adafactor bfloat16 relative", Kind::BFloat16, decay(), assert_same_on_cpu);
    follow("adafactor float32 warmup", Kind::Float, decay().warmup_init(true), assert_same_on_cpu);
    let own = || decay().relative_step(false).lr(1e-2).group(|name| name == "b", 3e-3, 0.0);
    follow("adafactor float32 own", Kind::Float, own().scale_parameter(false), assert_same_on_cpu);
    let scaled = own().beta1(0.9).clip_threshold(0.5).decay_rate(-0.7).eps(1e-28, 1e-2);
    follow("adafactor float32 scaled", Kind::Float, scaled, assert_same_on_cpu);
}

/// Each step of bitsandbytes, taken again from what went into it.
#[test]
fn adamw_8bit_is_that_of_bitsandbytes() {
    for (dtype, kind) in [("float32", Kind::Float), ("bfloat16", Kind::BFloat16)] {
        let case = format!("adamw8bit {dtype}");
        let Some(bnb) = references(SCRIPT, &[&case]) else { return };
        let bnb = &bnb[case];
        let shapes = &bnb["shapes"];
        for (i, step) in bnb["steps"].as_array().unwrap().iter().enumerate() {
            let start = |name| parameter(name, tensor(&step["start"][name], &shapes[name], kind));
            let parameters = ["a", "b", "c"].map(start);
            let builder = AdamW8bit::builder().lr(1e-2).betas(0.9, 0.95).eps(1e-7).weight_decay(0.1);
            let mut optimizer = builder.build(handles(&parameters)).unwrap();

            let mut state = optimizer.export_state().unwrap();
            for (name, found) in &mut state.tensors {
                match step["before"].get(name) {
                    Some(before) => *found = tensor(before, &json!(found.size()), found.kind()),
                    None if name.ends_with(".step") => *found = Tensor::from(i as i64),
                    None => assert_eq!(i, 0, "{name} is not of bitsandbytes' state"),
                }
            }
            optimizer.import_state(state).unwrap();
            for p in &parameters {
                set_grad(&p.tensor, &tensor(&step["grads"][&p.name], &shapes[&p.name], kind));
            }
            optimizer.step().unwrap();

            for p in &parameters {
                let expected = tensor(&step["params"][&p.name], &shapes[&p.name], kind);
                assert_same_on_cpu(&format!("{} in step {i}", p.name), &p.tensor.detach(), &expected);
            }
            let state = optimizer.export_state().unwrap();
            for (name, expected) in step["after"].as_object().unwrap() {
                let found = &state.tensors[name];
                let expected = tensor(expected, &json!(found.size()), found.kind());
                match found.kind() {
                    Kind::Uint8 => codes_are_nearest(name, bnb, &step["exact"][name], &state, &expected),
                    _ => assert_same_on_cpu(&format!("{name} in step {i}"), found, &expected),
                }
            }
        }
    }
}

/// Each code is that of the table value nearest to the exact one, which is
/// also what bitsandbytes' CPU kernel answers for most.
fn codes_are_nearest(name: &str, bnb: &Value, exact: &Value, state: &OptimizerState, theirs: &Tensor) {
    let (_, moment) = name.split_once('.').unwrap();
    let map: Vec<f32> = (&tensor(&bnb["maps"][moment], &json!([256]), Kind::Float)).try_into().unwrap();
    let codes = Vec::<u8>::try_from(state.tensors[name].flatten(0, -1)).unwrap();
    let scales = Vec::<f32>::try_from(&state.tensors[&format!("{name}_absmax")]).unwrap();
    let exact = Vec::<f32>::try_from(tensor(exact, &json!([codes.len()]), Kind::Float)).unwrap();
    for (i, (&code, &value)) in codes.iter().zip(&exact).enumerate() {
        let part = f64::from(value) / f64::from(scales[i / 256]);
        let distance = |value: &f32| (f64::from(*value) - part).abs();
        let least = map.iter().map(distance).fold(f64::INFINITY, f64::min);
        assert!(distance(&map[usize::from(code)]) <= least + 1e-7, "{name}, value {i}: {part} became {code}");
    }
    let equal = Vec::<u8>::try_from(theirs.flatten(0, -1)).unwrap().iter().zip(&codes).filter(|(a, b)| a == b).count();
    assert!(equal * 10 > codes.len() * 9, "{name}: {equal} of {} codes are bitsandbytes'", codes.len());
}

#[test]
fn lora_plus_has_the_groups_of_peft() {
    let Some(rates) = reference("lora_plus") else { return };
    for (name, expected) in rates.as_object().unwrap() {
        let shape: Vec<i64> = serde_json::from_value(expected["shape"].clone()).unwrap();
        let zeros = || Tensor::zeros(shape.as_slice(), (Kind::Float, device()));
        // Without momentum or decay, a gradient of 1 shows the learning rate;
        // the other parameter keeps the first group from being empty.
        let pair = [parameter(name, zeros()), parameter("x.lora_B.weight", zeros())];
        let mut sgd = Sgd::builder().lora_plus(16.0).lr(1e-3).build(handles(&pair)).unwrap();
        set_grad(&pair[0].tensor, &zeros().ones_like());
        sgd.step().unwrap();
        let expected = zeros().ones_like() * -float(&expected["lr"]);
        assert_close(name, &pair[0].tensor.detach(), &expected, 1e-6);
    }
}

/// An optimizer of the caller's own: Adagrad without its extras.
#[derive(Debug)]
struct Adagrad;

impl UpdateRule for Adagrad {
    const KIND: &'static str = "adagrad";

    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }

    fn check(&self, _: &[ParameterGroup]) -> Result<(), Error> {
        Ok(())
    }

    fn init(&self, parameter: &NamedParameter) -> Result<Vec<(&'static str, Tensor)>, Error> {
        Ok(vec![("sum", parameter.tensor.f_detach()?.f_zeros_like()?)])
    }

    fn update(&self, batch: &mut [Update<'_>], group: ParameterGroup) -> Result<(), Error> {
        for Update { param, grad, state } in batch {
            let _ = state[0].f_add_(&grad.f_square()?)?;
            let change = grad.f_div(&state[0].f_sqrt()?.f_add_scalar(1e-10)?)?.f_mul_scalar(group.lr)?;
            let _ = param.f_sub_(&change)?;
        }
        Ok(())
    }
}

#[test]
fn a_rule_of_the_callers_own_has_groups_and_names_too() {
    let parameters = three();
    let builder = || OptimizerBuilder::new(Adagrad, 0.1, 0.0).group(|name| name.ends_with("bias"), 0.2, 0.0);
    let mut optimizer = builder().build(handles(&parameters)).unwrap();
    let before = copies(&parameters);
    for p in &parameters {
        set_grad(&p.tensor, &p.tensor.ones_like());
    }
    optimizer.step().unwrap();
    // The first step of Adagrad is that of the gradient's sign.
    for (p, before) in parameters.iter().zip(&before) {
        let lr = if p.name.ends_with("bias") { 0.2 } else { 0.1 };
        assert_close(&p.name, &p.tensor.detach(), &(before.tensor.detach() - lr), 1e-6);
    }
    let state = optimizer.export_state().unwrap();
    assert_eq!(state.kind, "adagrad");
    assert_eq!(state.tensors.keys().collect::<Vec<_>>(), ["a.weight.sum", "b.weight.sum", "norm.bias.sum"]);
    builder().build(copies(&parameters)).unwrap().import_state(state).unwrap();
}

fn three() -> Vec<NamedParameter> {
    let numbers = |n: i64| Tensor::arange(n, (Kind::Float, device()));
    vec![
        parameter("a.weight", numbers(4).view([2, 2])),
        parameter("b.weight", numbers(3)),
        parameter("norm.bias", numbers(2)),
    ]
}

fn state_bits(state: &OptimizerState) -> BTreeMap<&str, Vec<u8>> {
    state.tensors.iter().map(|(name, tensor)| (name.as_str(), bits(tensor))).collect()
}

/// Each optimizer, with settings under which all of its state counts.
fn optimizers() -> Vec<(&'static str, Make)> {
    fn boxed<R: UpdateRule + 'static>(optimizer: Result<GroupedOptimizer<R>, Error>) -> Box<dyn Optimizer> {
        Box::new(optimizer.unwrap())
    }
    fn bias(name: &str) -> bool {
        name.ends_with("bias")
    }
    vec![
        ("adamw", |p| boxed(AdamW::builder().lr(0.1).build(p))),
        ("adamw_8bit", |p| boxed(AdamW8bit::builder().lr(0.1).min_8bit_size(3).build(p))),
        ("sgd", |p| boxed(Sgd::builder().lr(0.1).momentum(0.9).dampening(0.2).weight_decay(0.1).build(p))),
        ("lion", |p| boxed(Lion::builder().lr(0.01).weight_decay(0.1).group(bias, 0.1, 0.0).build(p))),
        ("adafactor", |p| boxed(Adafactor::builder().beta1(0.9).warmup_init(true).build(p))),
    ]
}

type Make = fn(Vec<NamedParameter>) -> Box<dyn Optimizer>;

#[test]
fn an_exported_state_is_a_copy_and_continues_exactly() {
    for (kind, make) in optimizers() {
        let parameters = three();
        let mut optimizer = make(handles(&parameters));
        let step = |optimizer: &mut Box<dyn Optimizer>, parameters: &[NamedParameter], i: i64| {
            // One parameter begins late, and one is left out now and then.
            for (k, p) in parameters.iter().enumerate().filter(|(k, _)| (*k != 1 || i > 1) && (*k != 2 || i % 2 == 0)) {
                set_grad(&p.tensor, &(p.tensor.detach() * 0.3 - i - k as i64));
            }
            optimizer.set_learning_rate_factor(1.0 / (i + 1) as f64);
            optimizer.step().unwrap();
            optimizer.zero_grad().unwrap();
        };
        for stop in 1..4 {
            let name = |p: &NamedParameter| format!("{kind}, {} after {stop}", p.name);
            step(&mut optimizer, &parameters, stop - 1);
            let state = optimizer.export_state().unwrap();
            assert_eq!(state.kind, kind);
            let before: BTreeMap<_, _> = state_bits(&state).into_iter().map(|(n, b)| (n.to_string(), b)).collect();

            let (ahead, copied) = (copies(&parameters), copies(&parameters));
            let mut straight = make(handles(&ahead));
            straight.import_state(optimizer.export_state().unwrap()).unwrap();
            (stop..stop + 3).for_each(|i| step(&mut straight, &ahead, i));
            let mut resumed = make(handles(&copied));
            resumed.import_state(state).unwrap();
            assert!(state_bits(&optimizer.export_state().unwrap()).into_iter().all(|(n, b)| before[n] == b), "{kind}");
            (stop..stop + 3).for_each(|i| step(&mut resumed, &copied, i));
            // The one that was never exported, in the end.
            let mut own = copies(&parameters);
            if stop == 3 {
                (stop..stop + 3).for_each(|i| step(&mut optimizer, &parameters, i));
                own = copies(&parameters);
                assert_eq!(
                    state_bits(&optimizer.export_state().unwrap()),
                    state_bits(&resumed.export_state().unwrap()),
                    "{kind}"
                );
            }
            for ((straight, resumed), own) in ahead.iter().zip(&copied).zip(&own) {
                assert_same(&name(straight), &resumed.tensor, &straight.tensor);
                if stop == 3 {
                    assert_same(&name(straight), &resumed.tensor, &own.tensor);
                }
            }
        }
    }
}

#[test]
fn each_optimizer_refuses_the_states_of_the_others() {
    let all = optimizers();
    for (kind, make) in &all {
        for (other, theirs) in &all {
            let state = theirs(three()).export_state().unwrap();
            match make(three()).import_state(state) {
                Ok(()) => assert_eq!(kind, other),
                Err(error) => {
                    let line = format!("kind: recorded \"{other}\", given \"{kind}\"");
                    assert!(error.to_string().contains(&line), "{error}");
                }
            }
        }
        // Other names, and each tensor in turn gone.
        let names: Vec<_> = make(three()).export_state().unwrap().tensors.into_keys().collect();
        for name in names {
            let mut state = make(three()).export_state().unwrap();
            state.tensors.remove(&name);
            let error = make(three()).import_state(state).unwrap_err();
            assert!(matches!(&error, Error::Keys { missing, .. } if *missing == [name]), "{kind}: {error}");
        }
    }
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
    let one = || Tensor::ones([1], (Kind::Float, device()));
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
    fn refused<R: UpdateRule + std::fmt::Debug>(builder: OptimizerBuilder<R>, field: &str) {
        match builder.build(three()) {
            Err(Error::Config { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    refused(AdamW::builder().lr(-1.0), "lr");
    refused(AdamW::builder().lr(f64::NAN), "lr");
    refused(AdamW::builder().betas(1.0, 0.9), "beta1");
    refused(AdamW::builder().betas(0.9, -0.1), "beta2");
    refused(AdamW::builder().eps(f64::INFINITY), "eps");
    refused(AdamW::builder().weight_decay(-0.1), "weight_decay");
    refused(AdamW::builder().group(|_| true, 1.0, f64::NAN), "weight_decay");
    refused(AdamW::builder().group(|name| name == "typo", 1.0, 0.0), "group");
    refused(AdamW::builder().lora_plus(-1.0), "lora_plus");
    refused(AdamW8bit::builder().betas(0.9, 1.0), "beta2");
    refused(AdamW8bit::builder().eps(-1.0), "eps");
    refused(Sgd::builder().momentum(-0.1), "momentum");
    refused(Sgd::builder().dampening(f64::NAN), "dampening");
    refused(Sgd::builder().nesterov(true), "nesterov");
    refused(Sgd::builder().momentum(0.9).dampening(0.1).nesterov(true), "nesterov");
    refused(Lion::builder().betas(1.0, 0.9), "beta1");
    refused(Adafactor::builder().lr(1e-3), "lr");
    refused(Adafactor::builder().relative_step(false).lr(1e-3).warmup_init(true), "warmup_init");
    refused(Adafactor::builder().clip_threshold(0.0), "clip_threshold");
    refused(Adafactor::builder().decay_rate(0.8), "decay_rate");
    refused(Adafactor::builder().beta1(1.0), "beta1");
    let double = vec![parameter("double", Tensor::zeros([4], (Kind::Double, device())))];
    assert!(matches!(AdamW8bit::builder().build(double), Err(Error::Mismatch { name, .. }) if name == "double"));

    let twice = || [three(), three()].into_iter().flatten().collect();
    assert!(matches!(AdamW::builder().build(twice()), Err(Error::Config { .. })));
    assert!(matches!(AdamW::builder().build(Vec::new()), Err(Error::Config { .. })));
    let frozen = NamedParameter { name: "frozen".into(), tensor: Tensor::from(1.0f32) };
    assert!(matches!(AdamW::builder().build(vec![frozen]), Err(Error::Mismatch { name, .. }) if name == "frozen"));
    let strided = Tensor::zeros([2, 3], (Kind::Float, device())).tr().set_requires_grad(true);
    let strided = NamedParameter { name: "strided".into(), tensor: strided };
    assert!(matches!(AdamW::builder().build(vec![strided]), Err(Error::Mismatch { .. })));
}
