//! What changes from step to step besides the optimizer, against torch and
//! diffusers, and brought back exactly.

mod common;

use common::training::{copies, float, handles, parameter, references, set_grad, tensor};
use common::{assert_close, assert_same, assert_same_on_cpu, bits, device};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock};
use tch::{Device, Kind, Tensor};
use tch_peft::{
    AdamW, Autocast, Ema, Error, Generator, GradientAccumulation, LossScaler, NamedParameter, Optimizer, OwnState, Sgd,
    State, Stateful, checkpoint_activations,
};

const SCRIPT: &str = "training_reference.py";

const CASES: [&str; 7] = [
    "ema 0.9 0 0 plain",
    "ema 0.4 0.3 3 plain",
    "ema 0.9999 0 1 warmup",
    "scaler",
    "normal",
    "checkpoint float32",
    "checkpoint bfloat16",
];

/// What the script answers to one of the cases.
fn reference(case: &str) -> Option<&'static Value> {
    static ANSWERS: OnceLock<Option<Value>> = OnceLock::new();
    let answers = ANSWERS.get_or_init(|| references(SCRIPT, &CASES)).as_ref()?;
    Some(answers.get(case).unwrap_or_else(|| panic!("`{case}` is not among the cases")))
}

/// All that a state is, as text.
fn text(state: &State) -> String {
    let tensors: Vec<_> = state.tensors.iter().map(|(name, tensor)| (name, tensor.size(), bits(tensor))).collect();
    format!("{} {} {} {tensors:?}", state.kind, state.settings, state.values)
}

/// Through JSON, as in a checkpoint.
fn saved(state: State) -> State {
    let read = |value: &Value| serde_json::from_str(&value.to_string()).unwrap();
    State { settings: read(&state.settings), values: read(&state.values), ..state }
}

/// The error for a state that was changed; nothing has arrived.
#[track_caller]
fn refuse(stateful: &mut dyn Stateful, change: impl Fn(&mut State)) -> String {
    let before = text(&stateful.export_state().unwrap());
    let mut state = stateful.export_state().unwrap();
    state.tensors.values_mut().for_each(|tensor| drop(tensor.fill_(7.0)));
    change(&mut state);
    assert!(stateful.check_state(&state).is_err());
    let error = stateful.import_state(state).unwrap_err();
    assert_eq!(text(&stateful.export_state().unwrap()), before, "{error}");
    error.to_string()
}

fn two() -> Vec<NamedParameter> {
    let numbers = |n: i64| Tensor::arange(n, (Kind::Float, device()));
    vec![parameter("a", numbers(6).view([2, 3])), parameter("b", numbers(4))]
}

#[test]
fn the_average_is_that_of_diffusers() {
    for (case, builder) in [
        ("ema 0.9 0 0 plain", Ema::builder().decay(0.9)),
        ("ema 0.4 0.3 3 plain", Ema::builder().decay(0.4).min_decay(0.3).update_after_step(3)),
        ("ema 0.9999 0 1 warmup", Ema::builder().update_after_step(1).warmup(2.0, 0.75)),
    ] {
        let Some(theirs) = reference(case) else { return };
        let shape = json!([3, 7]);
        let p = parameter("p", tensor(&theirs["start"], &shape, Kind::Float));
        let mut ema = builder.build(handles(std::slice::from_ref(&p))).unwrap();
        for (i, step) in theirs["steps"].as_array().unwrap().iter().enumerate() {
            let value = tensor(&step["param"], &shape, Kind::Float);
            tch::no_grad(|| p.tensor.shallow_clone().copy_(&value));
            ema.update().unwrap();
            let (found, expected) = (ema.decay(), float(&step["decay"]));
            assert!((found.to_bits() as i64).abs_diff(expected.to_bits() as i64) <= 1, "{case} at {i}: {found}");
            let state = ema.export_state().unwrap();
            let expected = tensor(&step["average"], &shape, Kind::Float);
            assert_same_on_cpu(&format!("{case} at {i}"), &state.tensors["p"], &expected);
            let swap = ema.swap_in().unwrap();
            assert_same("swapped in", &p.tensor.detach(), &state.tensors["p"]);
            drop(swap);
            assert_same("swapped out", &p.tensor.detach(), &value);
        }
    }
}

#[test]
fn an_average_of_bf16_weights_still_moves() {
    let p = Tensor::ones([8], (Kind::BFloat16, device())).set_requires_grad(true);
    let parameters = vec![NamedParameter { name: "p".into(), tensor: p.shallow_clone() }];
    let mut ema = Ema::builder().decay(0.999).min_decay(0.999).build(parameters).unwrap();
    // The first update copies; the second moves by a thousandth of 0.5, which
    // bf16 can't hold next to 1.
    ema.update().unwrap();
    tch::no_grad(|| drop(p.shallow_clone().fill_(1.5)));
    ema.update().unwrap();
    let average = &ema.export_state().unwrap().tensors["p"];
    assert_eq!(average.kind(), Kind::Float);
    assert_close("average", average, &Tensor::full([8], 1.0005, (Kind::Float, device())), 1e-6);
}

#[test]
fn an_average_goes_on_exactly_and_refuses_by_name() {
    let parameters = two();
    let new = |p: &[NamedParameter]| Ema::builder().decay(0.9).warmup(1.0, 0.5).build(handles(p)).unwrap();
    let mut ema = new(&parameters);
    let step = |parameters: &[NamedParameter], ema: &mut Ema, i: i64| {
        for p in parameters {
            tch::no_grad(|| drop(p.tensor.shallow_clone().g_add_scalar_(0.1 * i as f64)));
        }
        ema.update().unwrap();
    };
    (0..4).for_each(|i| step(&parameters, &mut ema, i));
    let (state, copied) = (saved(ema.export_state().unwrap()), copies(&parameters));
    (4..7).for_each(|i| step(&parameters, &mut ema, i));
    let mut resumed = new(&copied);
    resumed.import_state(state).unwrap();
    (4..7).for_each(|i| step(&copied, &mut resumed, i));
    assert_eq!(text(&ema.export_state().unwrap()), text(&resumed.export_state().unwrap()));

    let error = refuse(&mut ema, |state| state.kind = "swa".into());
    assert!(error.contains(r#"kind: recorded "swa", given "ema""#), "{error}");
    let error = refuse(&mut ema, |state| state.settings["decay"] = 0.5.into());
    assert!(error.contains("decay: recorded 0.5, given 0.9"), "{error}");
    let error = refuse(&mut ema, |state| drop(state.tensors.remove("b")));
    assert!(error.contains("missing keys: [b]"), "{error}");
    let error = refuse(&mut ema, |state| drop(state.tensors.insert("b".into(), Tensor::from(1.0f32))));
    assert!(error.contains("b: expected Float [4], found Float []"), "{error}");
    let error = refuse(&mut ema, |state| state.values = json!({"updates": -1}));
    assert!(error.contains("updates"), "{error}");
    assert!(matches!(Ema::builder().decay(1.5).build(two()), Err(Error::Config { field, .. }) if field == "decay"));
    assert!(matches!(Ema::builder().warmup(0.0, 1.0).build(two()), Err(Error::Config { .. })));
    assert!(matches!(Ema::builder().build(vec![]), Err(Error::Config { .. })));
}

#[test]
fn the_loss_scale_is_that_of_torch() {
    let Some(torch) = reference("scaler") else { return };
    let new = || LossScaler::with_settings(1024.0, 1.7, 0.3, 3).unwrap();
    let mut scaler = new();
    let p = [parameter("p", Tensor::from_slice(&[1.0f32, 2.0]).to_device(device()))];
    let mut sgd = Sgd::builder().lr(0.5).build(handles(&p)).unwrap();
    for (i, step) in torch.as_array().unwrap().iter().enumerate() {
        let value = |name: &str| tensor(&step[name], &json!([2]), Kind::Float);
        sgd.zero_grad().unwrap();
        scaler.scale(&(&p[0].tensor * value("grad")).sum(Kind::Float)).unwrap().backward();
        assert_eq!(format!("{:?}", floats(&p[0].tensor.grad())), format!("{:?}", floats(&value("scaled"))));
        let finite = scaler.unscale(&p).unwrap();
        assert_eq!(finite, value("grad").isfinite().all().int64_value(&[]) == 1);
        assert_eq!(format!("{:?}", floats(&p[0].tensor.grad())), format!("{:?}", floats(&value("unscaled"))));
        // Only the first call of a step divides.
        assert_eq!(scaler.unscale(&p).unwrap(), finite);
        assert!(matches!(scaler.export_state(), Err(Error::Config { .. })));
        assert_eq!(scaler.step(&mut sgd, &p).unwrap(), finite);
        assert_same(&format!("parameter after step {i}"), &p[0].tensor.detach(), &value("param"));
        assert_eq!(f64::from(scaler.current_scale()), float(&step["scale"]), "step {i}");
        // A fresh one goes on from here.
        let state = saved(scaler.export_state().unwrap());
        assert_eq!(state.values["growth_tracker"], step["growth_tracker"], "step {i}");
        scaler = new();
        scaler.import_state(state).unwrap();
    }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor).unwrap()
}

#[test]
fn a_loss_scaler_refuses_by_name() {
    let mut scaler = LossScaler::new();
    let error = refuse(&mut scaler, |state| state.settings["growth_interval"] = 7.into());
    assert!(error.contains("growth_interval: recorded 7, given 2000"), "{error}");
    let error = refuse(&mut scaler, |state| state.values["scale"] = (-1.0).into());
    assert!(error.contains("`scale`"), "{error}");
    let error = refuse(&mut scaler, |state| state.values["growth_tracker"] = 2000.into());
    assert!(error.contains("`growth_tracker`"), "{error}");
    for (settings, field) in [
        ((0.0, 2.0, 0.5, 1), "init_scale"),
        ((1.0, 1.0, 0.5, 1), "growth_factor"),
        ((1.0, 2.0, 1.0, 1), "backoff_factor"),
        ((1.0, 2.0, 0.5, 0), "growth_interval"),
    ] {
        let (scale, growth, backoff, interval) = settings;
        let refused = LossScaler::with_settings(scale, growth, backoff, interval);
        assert!(matches!(refused, Err(Error::Config { field: found, .. }) if found == field));
    }
    let half = [parameter("half", Tensor::ones([2], (Kind::Half, device())))];
    set_grad(&half[0].tensor, &half[0].tensor.detach());
    assert!(matches!(scaler.unscale(&half), Err(Error::Mismatch { name, .. }) if name == "the gradient of half"));
}

#[test]
fn a_stop_in_mid_accumulation_goes_on_there() {
    let micro = |parameters: &[NamedParameter], accumulation: &mut GradientAccumulation, adamw: &mut AdamW, i: i64| {
        // One parameter has a gradient in the first micro-batches only.
        for p in parameters.iter().filter(|p| p.name == "a" || i % 3 == 0) {
            let loss = (&p.tensor * (&p.tensor.detach() + i).sin()).sum(Kind::Float);
            accumulation.scale(&loss).unwrap().backward();
        }
        if accumulation.count() {
            adamw.step().unwrap();
            adamw.zero_grad().unwrap();
        }
    };
    let new = |p: &[NamedParameter]| {
        (GradientAccumulation::new(3, handles(p)).unwrap(), AdamW::builder().lr(0.1).build(handles(p)).unwrap())
    };
    for stop in 0..7 {
        let parameters = two();
        let (mut accumulation, mut adamw) = new(&parameters);
        (0..stop).for_each(|i| micro(&parameters, &mut accumulation, &mut adamw, i));
        assert_eq!(accumulation.micro_step(), stop as u64 % 3);

        let copied = copies(&parameters);
        let (mut resumed, mut optimizer) = new(&copied);
        // What a resumed run finds must go.
        set_grad(&copied[1].tensor, &copied[1].tensor.ones_like());
        resumed.import_state(saved(accumulation.export_state().unwrap())).unwrap();
        optimizer.import_state(adamw.export_state().unwrap()).unwrap();
        (stop..9).for_each(|i| micro(&parameters, &mut accumulation, &mut adamw, i));
        (stop..9).for_each(|i| micro(&copied, &mut resumed, &mut optimizer, i));
        for (straight, resumed) in parameters.iter().zip(&copied) {
            assert_same(&format!("{} after a stop at {stop}", straight.name), &resumed.tensor, &straight.tensor);
        }
    }
}

#[test]
fn accumulated_gradients_are_refused_by_name() {
    let parameters = two();
    let mut accumulation = GradientAccumulation::new(2, handles(&parameters)).unwrap();
    set_grad(&parameters[0].tensor, &parameters[0].tensor.detach());
    assert!(!accumulation.count());
    let error = refuse(&mut accumulation, |state| drop(state.tensors.remove("a")));
    assert!(error.contains("missing keys: [a]"), "{error}");
    let error = refuse(&mut accumulation, |state| drop(state.tensors.insert("b".into(), Tensor::from(1.0f32))));
    assert!(error.contains("unexpected keys: [b]"), "{error}");
    let error = refuse(&mut accumulation, |state| drop(state.tensors.insert("a".into(), Tensor::from(1.0f32))));
    assert!(error.contains("a: expected Float [2, 3], found Float []"), "{error}");
    let error = refuse(&mut accumulation, |state| state.settings["gradient_accumulation_steps"] = 4.into());
    assert!(error.contains("gradient_accumulation_steps: recorded 4, given 2"), "{error}");
    let error = refuse(&mut accumulation, |state| state.values["micro_step"] = 2.into());
    assert!(error.contains("`micro_step` is 2; expected below 2"), "{error}");
    assert!(matches!(GradientAccumulation::new(0, two()), Err(Error::Config { .. })));
    let twice = [two(), two()].into_iter().flatten().collect();
    assert!(matches!(GradientAccumulation::new(1, twice), Err(Error::Config { .. })));
}

#[test]
fn the_generators_stream_is_that_of_a_second_implementation() {
    let Some(python) = reference("normal") else { return };
    let mut random = Generator::new(42);
    let list = |name: &str| python[name].as_array().unwrap().iter().map(float).collect::<Vec<f64>>();
    let uniform = random.uniform(&[10, 100], device()).unwrap();
    assert_eq!(uniform.size(), [10, 100]);
    assert_eq!(
        Vec::<f32>::try_from(uniform.flatten(0, -1)).unwrap(),
        list("uniform").iter().map(|&x| x as f32).collect::<Vec<_>>()
    );
    let normal = Vec::<f32>::try_from(random.normal(&[1000], device()).unwrap()).unwrap();
    for (found, expected) in normal.iter().zip(list("normal")) {
        // f64 arithmetic that differs in the last digits, rounded to f32.
        assert!((f64::from(*found) - expected).abs() <= 6e-8 * expected.abs().max(1e-3), "{found}, not {expected}");
    }
    let integers = Vec::<i64>::try_from(random.integers(-7, 993, &[1000], device()).unwrap()).unwrap();
    assert_eq!(json!(integers), python["integers"]);
    assert_eq!(random.drawn(), 3000);
}

#[test]
fn a_generators_stream_never_changes_and_goes_on_exactly() {
    let mut random = Generator::new(7);
    // From this crate's first version; runs that are under way rely on them.
    let first = random.integers(0, 1 << 40, &[3], device()).unwrap();
    let state = saved(random.export_state().unwrap());
    assert_eq!(
        (state.settings.to_string(), state.values.to_string()),
        (r#"{"seed":7}"#.into(), r#"{"drawn":3}"#.into())
    );
    let straight = random.normal(&[5, 2], device()).unwrap();
    let mut resumed = Generator::new(7);
    resumed.import_state(state).unwrap();
    assert_same("resumed", &resumed.normal(&[5, 2], device()).unwrap(), &straight);
    assert_same("again", &Generator::new(7).integers(0, 1 << 40, &[3], device()).unwrap(), &first);
    let other = Generator::new(8).integers(0, 1 << 40, &[3], device()).unwrap();
    assert_ne!(bits(&other), bits(&first));

    let many = random.normal(&[400_000], device()).unwrap().to_kind(Kind::Double);
    let moment = |power: i32| many.pow_tensor_scalar(i64::from(power)).mean(Kind::Double).double_value(&[]);
    assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.01 && (moment(4) - 3.0).abs() < 0.1);

    let error = refuse(&mut random, |state| state.settings["seed"] = 8.into());
    assert!(error.contains("seed: recorded 8, given 7"), "{error}");
    assert!(matches!(random.integers(3, 3, &[1], device()), Err(Error::Config { .. })));
    assert!(matches!(random.normal(&[-1], device()), Err(Error::Config { .. })));
}

#[test]
fn a_callers_own_value_comes_back_typed() {
    let new = || OwnState::new("buckets", vec![VecDeque::<usize>::new(); 3]);
    let mut buckets = new();
    buckets[1].extend([4, 9]);
    let state = saved(buckets.export_state().unwrap());
    buckets[1].clear();
    let mut resumed = new();
    resumed.import_state(state).unwrap();
    assert_eq!(resumed[1], [4, 9]);
    let error = refuse(&mut resumed, |state| state.kind = "other".into());
    assert!(error.contains(r#"recorded "other", given "buckets""#), "{error}");
    let error = refuse(&mut resumed, |state| state.values = json!("text"));
    assert!(error.contains("text"), "{error}");
    assert!(matches!(OwnState::new("loss", f64::INFINITY).export_state(), Err(Error::Config { .. })));
}

#[test]
fn autocast_regions_nest_and_end() {
    let x = Tensor::ones([4, 4], (Kind::Float, device()));
    let product = || x.matmul(&x).kind();
    {
        let _outer = Autocast::new(device(), Kind::BFloat16).unwrap();
        assert_eq!(product(), Kind::BFloat16);
        {
            let _inner = Autocast::disabled(device()).unwrap();
            assert_eq!(product(), Kind::Float);
            let _half = Autocast::new(device(), Kind::Half).unwrap();
            assert_eq!(product(), Kind::Half);
        }
        assert_eq!(product(), Kind::BFloat16);
        // Settings are the thread's.
        let copy = x.copy();
        assert_eq!(std::thread::spawn(move || copy.matmul(&copy).kind()).join().unwrap(), Kind::Float);
    }
    assert_eq!(product(), Kind::Float);
    assert!(matches!(Autocast::new(device(), Kind::Float), Err(Error::Config { .. })));
    assert!(matches!(Autocast::new(Device::Mps, Kind::Half), Err(Error::Config { .. })));
}

/// A block with parameters of its own: linear, gelu, linear.
fn block(up: &Tensor, down: &Tensor) -> impl Fn(&[Tensor]) -> Result<Tensor, Error> + Send + 'static {
    let (up, down) = (up.shallow_clone(), down.shallow_clone());
    move |x| Ok(x[0].f_linear(&up, None::<Tensor>)?.f_gelu("none")?.f_linear(&down, None::<Tensor>)?)
}

#[test]
fn checkpointed_gradients_are_those_of_torch() {
    for (dtype, kind) in [("float32", Kind::Float), ("bfloat16", Kind::BFloat16)] {
        let Some(torch) = reference(&format!("checkpoint {dtype}")) else { return };
        let value =
            |name: &str, shape: [i64; 2]| tensor(&torch[name], &json!(shape), Kind::Float).set_requires_grad(true);
        let (x, up, down) = (value("x", [4, 8]), value("up", [32, 8]), value("down", [8, 32]));
        let loss = {
            let _autocast = match kind {
                Kind::BFloat16 => Some(Autocast::new(device(), kind).unwrap()),
                _ => None,
            };
            let y = checkpoint_activations(block(&up, &down), &[&x]).unwrap();
            assert_eq!(y.kind(), kind);
            assert_close("y", &y.to_kind(Kind::Float), &tensor(&torch["y"], &json!([4, 8]), Kind::Float), 1e-6);
            y.to_kind(Kind::Float).square().sum(Kind::Float)
        };
        loss.backward();
        for (name, leaf) in [("x", &x), ("up", &up), ("down", &down)] {
            let expected = tensor(&torch["grads"][name], &json!(leaf.size()), Kind::Float);
            assert_close(&format!("{dtype}: {name}"), &leaf.grad(), &expected, 1e-6);
        }
    }
}

#[test]
fn checkpointing_changes_no_bit_not_even_of_dropout() {
    let _rng = common::rng();
    let gradients = |checkpointed: bool, input_wants: bool| {
        tch::manual_seed(3);
        let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, device())).set_requires_grad(true);
        let blocks: Vec<_> = (0..3).map(|_| (random([64, 16]), random([16, 64]))).collect();
        let start = random([8, 16]).set_requires_grad(input_wants);
        let mut x = start.shallow_clone();
        for (up, down) in &blocks {
            let inner = block(up, down);
            let f = move |x: &[Tensor]| Ok(inner(x)?.f_dropout(0.5, true)?.f_add(&x[0])?);
            x = if checkpointed { checkpoint_activations(f, &[&x]).unwrap() } else { f(&[x]).unwrap() };
        }
        let drawn = bits(&Tensor::randn([4], (Kind::Float, device())));
        x.square().sum(Kind::Float).backward();
        // The backward pass leaves the generator as it was.
        let after = bits(&Tensor::randn([4], (Kind::Float, device())));
        let grads: Vec<_> = blocks.iter().flat_map(|(up, down)| [bits(&up.grad()), bits(&down.grad())]).collect();
        (bits(&x), grads, if input_wants { bits(&start.grad()) } else { vec![] }, drawn, after)
    };
    assert!(gradients(false, true) == gradients(true, true));
    assert!(gradients(false, false) == gradients(true, false));
    // Without gradients it is a plain call.
    let x = Tensor::ones([1, 2], (Kind::Float, device()));
    let y = tch::no_grad(|| checkpoint_activations(|x| Ok(x[0].f_add_scalar(1.0)?), &[&x]).unwrap());
    assert!(!y.requires_grad());
}

#[test]
fn nothing_between_is_kept_for_the_backward_pass() {
    for checkpointed in [false, true] {
        let between = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&between);
        // exp keeps its result for the backward pass.
        let f = move |x: &[Tensor]| {
            let y = x[0].f_exp()?;
            sink.lock().unwrap().push(y.shallow_clone());
            Ok(y.f_mul_scalar(2.0)?)
        };
        let x = Tensor::zeros([4], (Kind::Float, device())).set_requires_grad(true);
        let y = if checkpointed { checkpoint_activations(f, &[&x]) } else { f(&[x.shallow_clone()]) }.unwrap();
        // What is kept must not be changed in place.
        let mut kept = between.lock().unwrap().remove(0);
        tch::no_grad(|| drop(kept.fill_(7.0)));
        match y.sum(Kind::Float).f_backward() {
            Ok(()) => {
                assert!(checkpointed);
                assert_eq!(floats(&x.grad()), [2.0; 4]);
            }
            Err(error) => {
                assert!(!checkpointed, "{error}");
                assert!(error.to_string().contains("modified by an inplace operation"), "{error}");
            }
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn checkpointed_blocks_take_less_memory() {
    let resident = || {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<i64>().unwrap() * 4096
    };
    // 3 blocks of 4 operators that keep 40 MiB each. The C library gives blocks
    // of this size back to the system as they are freed.
    let grown = |checkpointed: bool| {
        let f = |x: &[Tensor]| Ok(x[0].f_sin()?.f_cos()?.f_sin()?.f_cos()?);
        let mut x = Tensor::zeros([10 << 20], (Kind::Float, device())).set_requires_grad(true);
        let before = resident();
        for _ in 0..3 {
            x = if checkpointed { checkpoint_activations(f, &[&x]).unwrap() } else { f(&[x]).unwrap() };
        }
        (resident() - before) >> 20
    };
    let (checkpointed, kept) = (grown(true), grown(false));
    println!("kept {kept} MiB, checkpointed {checkpointed} MiB");
    assert!(kept > 400, "{kept}");
    assert!(checkpointed < 200, "{checkpointed}");
}

#[test]
fn errors_and_misuse_of_checkpointing_surface() {
    let x = Tensor::ones([2, 2], (Kind::Float, device())).set_requires_grad(true);
    let refused = checkpoint_activations(
        |_| Err(Error::Config { field: "f".into(), expected: "no".into(), found: "error".into() }),
        &[&x],
    );
    assert!(matches!(refused, Err(Error::Config { field, .. }) if field == "f"));
    assert!(
        tch::Tensor::ones([1], (Kind::Float, device()))
            .set_requires_grad(true)
            .f_mul_scalar(1.0)
            .unwrap()
            .requires_grad()
    );

    // The second run fails.
    let runs = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&runs);
    let f = move |x: &[Tensor]| {
        *counted.lock().unwrap() += 1;
        match *counted.lock().unwrap() {
            1 => Ok(x[0].f_mul_scalar(2.0)?),
            _ => Err(Error::Config { field: "second".into(), expected: "none".into(), found: "one".into() }),
        }
    };
    let error = checkpoint_activations(f, &[&x]).unwrap().sum(Kind::Float).f_backward().unwrap_err();
    assert!(error.to_string().contains("second"), "{error}");
    assert_eq!(*runs.lock().unwrap(), 2);

    // Gradients of chosen inputs would miss parameters inside.
    let y = checkpoint_activations(|x| Ok(x[0].f_mul_scalar(2.0)?), &[&x]).unwrap().sum(Kind::Float);
    let error = Tensor::f_run_backward(&[&y], &[&x], false, false).unwrap_err();
    assert!(error.to_string().contains("chosen inputs"), "{error}");
}
