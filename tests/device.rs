//! Training where the tests' device says: on a GPU nothing of a step may come back to the host, and
//! what is saved on one device is loaded on another.
//!
//! On the stand-in for a GPU (tests/standin) what would make the host wait is counted; a real one has
//! nothing that counts it, nor has the CPU anything to wait for.

mod common;

use common::{assert_close, assert_same, device, fresh_dir, repeatable, rng};
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::quant::quantize;
use tch_peft::{
    Adafactor, AdamW, AdamW8bit, Base, Generator, GradientAccumulation, Lion, LoraConfig, LoraModel, Optimizer, Parts,
    QuantConfig, Run, Sampler, Schedule, Scheme, Sgd,
};

const WIDTH: i64 = 64;

#[derive(Debug)]
struct Net {
    embed: nn::Embedding,
    up: nn::Linear,
    conv: nn::Conv1D,
    down: nn::Linear,
}

impl Net {
    fn new(vs: &nn::Path) -> Self {
        Net {
            embed: nn::embedding(vs / "embed", 40, WIDTH, Default::default()),
            up: nn::linear(vs / "up", WIDTH, 2 * WIDTH, Default::default()),
            conv: nn::conv1d(vs / "conv", 2 * WIDTH, WIDTH, 3, nn::ConvConfig { padding: 1, ..Default::default() }),
            down: nn::linear(vs / "down", WIDTH, 8, Default::default()),
        }
    }
}

impl Module for Net {
    fn forward(&self, ids: &Tensor) -> Tensor {
        let h = ids.apply(&self.embed).apply(&self.up).gelu("none");
        h.transpose(1, 2).apply(&self.conv).transpose(1, 2).apply(&self.down)
    }
}

/// The same base on any device.
fn base(device: Device, scheme: Option<Scheme>) -> Base<Net> {
    let vs = nn::VarStore::new(device);
    let net = Net::new(&vs.root());
    let mut numbers = Generator::new(5);
    let sorted: std::collections::BTreeMap<_, _> = vs.variables().into_iter().collect();
    for mut weight in sorted.into_values() {
        let values = numbers.normal(&weight.size(), Device::Cpu).unwrap() * 0.2;
        tch::no_grad(|| weight.copy_(&values));
    }
    let base = Base::new(vs, net);
    let Some(scheme) = scheme else { return base };
    let config = QuantConfig::builder(scheme).embeddings(true).convolutions(true).build().unwrap();
    base.quantize(&config).unwrap()
}

fn adapted(device: Device, scheme: Option<Scheme>, dora: bool, dropout: f64) -> LoraModel<Net> {
    let config = LoraConfig::builder().r(4).lora_alpha(8.0).use_dora(dora).lora_dropout(dropout);
    let config = config.target_modules(["embed", "up", "conv", "down"]).init_lora_weights(false).build().unwrap();
    let model = LoraModel::wrap(base(device, scheme), config).unwrap();
    let mut numbers = Generator::new(6);
    for parameter in model.trainable_parameters() {
        let values = numbers.normal(&parameter.tensor.size(), Device::Cpu).unwrap() * 0.1;
        tch::no_grad(|| parameter.tensor.shallow_clone().copy_(&values));
    }
    model
}

fn ids(device: Device) -> Tensor {
    Generator::new(7).integers(0, 40, &[3, 10], device).unwrap()
}

fn loss(model: &LoraModel<Net>, ids: &Tensor) -> Tensor {
    model.forward(ids).unwrap().square().mean(Kind::Float)
}

const SCHEMES: [Option<Scheme>; 11] = [
    None,
    Some(Scheme::NF4),
    Some(Scheme::NF4_DOUBLE),
    Some(Scheme::FP4),
    Some(Scheme::INT4),
    Some(Scheme::INT2),
    Some(Scheme::Int8),
    Some(Scheme::LlmInt8),
    Some(Scheme::FP8),
    Some(Scheme::Mxfp4),
    Some(Scheme::Bf16),
];

/// How often the host had to wait, on the stand-in; elsewhere a constant.
fn waits() -> i64 {
    if device() == Device::Cpu { 0 } else { tch::utils::version_cudart() }
}

#[test]
fn no_step_waits_for_the_device() {
    let _rng = rng();
    let ids = ids(device());
    for scheme in SCHEMES {
        for (dora, dropout) in [(false, 0.0), (false, 0.1), (true, 0.0), (true, 0.1)] {
            let model = adapted(device(), scheme, dora, dropout);
            // What is made once, such as the norms of the weights.
            loss(&model, &ids).backward();
            let before = waits();
            loss(&model, &ids).backward();
            let waited = waits() - before;
            assert_eq!(waited, 0, "{scheme:?}, DoRA {dora}, dropout {dropout}");
        }
    }
}

#[test]
fn no_optimizer_waits_for_the_device() {
    let _rng = rng();
    let ids = ids(device());
    for name in ["adamw", "adamw8bit", "sgd", "adafactor", "lion"] {
        let model = adapted(device(), Some(Scheme::NF4), false, 0.0);
        let parameters = model.trainable_parameters();
        let mut optimizer: Box<dyn Optimizer> = match name {
            "adamw" => Box::new(AdamW::builder().build(parameters).unwrap()),
            "adamw8bit" => Box::new(AdamW8bit::builder().min_8bit_size(1).build(parameters).unwrap()),
            "sgd" => Box::new(Sgd::builder().momentum(0.9).build(parameters).unwrap()),
            "adafactor" => Box::new(Adafactor::builder().weight_decay(0.1).build(parameters).unwrap()),
            _ => Box::new(Lion::builder().build(parameters).unwrap()),
        };
        let accumulation = GradientAccumulation::new(2, model.trainable_parameters()).unwrap();
        let mut before = 0;
        for step in 0..3 {
            if step == 1 {
                before = waits();
            }
            accumulation.scale(&loss(&model, &ids)).unwrap().backward();
            optimizer.step().unwrap();
            optimizer.zero_grad().unwrap();
        }
        assert_eq!(waits() - before, 0, "{name}");
    }
}

/// Every scheme packs and multiplies there as on the CPU.
#[test]
fn a_step_is_that_of_the_cpu() {
    let _rng = rng();
    for scheme in SCHEMES {
        for dora in [false, true] {
            let [here, there] = [Device::Cpu, device()].map(|device| {
                let model = adapted(device, scheme, dora, 0.0);
                let loss = loss(&model, &ids(device));
                loss.backward();
                (model, loss)
            });
            let what = format!("{scheme:?}, DoRA {dora}");
            assert_close(&what, &there.1, &here.1, 1e-5);
            let weights = |model: &LoraModel<Net>| model.base().fingerprint().unwrap();
            assert_eq!(weights(&there.0), weights(&here.0), "{what}: packed bytes");
            for (there, here) in there.0.trainable_parameters().iter().zip(here.0.trainable_parameters()) {
                assert_close(&format!("{what}: {}", here.name), &there.tensor.grad(), &here.tensor.grad(), 1e-4);
            }
        }
    }
}

/// More than a tile of a GPU's: the next one is unpacked on a second stream there while one is multiplied. The stand-in
/// refuses what doesn't wait for the other stream where it has to.
#[test]
fn a_weight_of_several_tiles_multiplies() {
    let _rng = rng();
    let [out, inn] = [4096 + 64, 4096];
    let numbers = |seed, shape| Generator::new(seed).normal(shape, Device::Cpu).unwrap();
    let [weight, x, g] = [numbers(9, &[out, inn]) * 0.02, numbers(10, &[20, inn]), numbers(11, &[20, out])];
    for scheme in [Scheme::NF4, Scheme::Int8] {
        let vs = nn::VarStore::new(device());
        let linear = nn::linear(vs.root() / "large", inn, out, nn::LinearConfig { bias: false, ..Default::default() });
        tch::no_grad(|| linear.ws.shallow_clone().copy_(&weight));
        let base = Base::new(vs, linear).quantize(&QuantConfig::builder(scheme).build().unwrap()).unwrap();
        let x_there = x.copy().to_device(device()).set_requires_grad(true);
        let y = base.module().forward(&x_there);
        (&y * g.to_device(device())).sum(Kind::Float).backward();
        let dense = quantize("large", &weight, scheme).unwrap().dequantize(Kind::Float).unwrap();
        assert_close(&format!("{scheme}: y"), &y, &x.mm(&dense.tr()), 1e-5);
        assert_close(&format!("{scheme}: dX"), &x_there.grad(), &g.mm(&dense), 1e-5);
    }
}

/// The adapter's values after the steps up to `end`, in a run that may have been begun on another device.
fn train(folder: &std::path::Path, device: Device, dropout: f64, end: u64) -> Vec<(String, Tensor)> {
    repeatable();
    let mut model = adapted(device, Some(Scheme::NF4), false, dropout);
    let mut optimizer = AdamW::builder().lr(1e-2).build(model.trainable_parameters()).unwrap();
    let (schedule, mut sampler) = (Schedule::constant(), Sampler::new(12, 3, 1).unwrap());
    let mut run = Run::builder(folder).every(2).build().unwrap();
    // A resumed run goes on with the masks of the checkpoint, and doesn't begin with these again.
    tch::manual_seed(1);
    run.resume_or_start(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler)).unwrap();
    let data = Generator::new(8).integers(0, 40, &[12, 10], device).unwrap();
    while run.current_step() < end {
        let rows: Vec<i64> = sampler.next_batch().into_iter().map(|row| row as i64).collect();
        let ids = data.index_select(0, &Tensor::from_slice(&rows).to_device(device));
        loss(&model, &ids).backward();
        optimizer.step().unwrap();
        optimizer.zero_grad().unwrap();
        run.step(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler)).unwrap();
    }
    run.flush().unwrap();
    model.parameters().into_iter().map(|p| (p.name, p.tensor.detach().copy())).collect()
}

/// The masks of dropout come from the device's own generator, whose state is in the checkpoint.
#[test]
fn a_run_resumes_to_the_same_bits() {
    let _rng = rng();
    let straight = train(&fresh_dir("device-straight"), device(), 0.3, 6);
    let folder = fresh_dir("device-resumed");
    train(&folder, device(), 0.3, 2);
    let resumed = train(&folder, device(), 0.3, 6);
    for ((name, found), (_, expected)) in resumed.iter().zip(&straight) {
        assert_same(name, found, expected);
    }
}

#[test]
fn a_run_moves_between_devices() {
    let _rng = rng();
    let expected = train(&fresh_dir("device-stayed"), Device::Cpu, 0.0, 6);
    for (name, from, to) in [("there", Device::Cpu, device()), ("back", device(), Device::Cpu)] {
        let folder = fresh_dir(&format!("device-{name}"));
        train(&folder, from, 0.0, 2);
        let moved = train(&folder, to, 0.0, 6);
        for ((name, found), (_, expected)) in moved.iter().zip(&expected) {
            assert_eq!(found.device(), to, "{name}");
            assert_close(name, found, expected, 1e-4);
        }
    }
}
