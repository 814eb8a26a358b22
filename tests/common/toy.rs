//! A small run, for tests that interrupt it.

use super::common::device;
use std::path::Path;
use tch::nn::{self, ModuleT};
use tch::{Device, Kind, Tensor};
use tch_peft::{
    Adafactor, AdamW, AdamW8bit, Base, Checkpointable, Ema, Error, Fp8Format, Generator, GradientAccumulation, Lion,
    LoraConfig, LoraModel, LossScaler, Optimizer, OwnState, Parts, QuantConfig, Result, Run, RunBuilder, Sampler,
    Schedule, Sgd, Start, State, Stateful,
};

pub fn floats() -> (Kind, Device) {
    (Kind::Float, device())
}
const IN: i64 = 32;
const ROWS: usize = 24;

/// What a run is made of.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// `dense`, or a scheme's name.
    pub scheme: &'static str,
    pub wrap_first: bool,
    pub optimizer: &'static str,
    pub dropout: f64,
    /// Micro-batches in a step.
    pub accumulate: usize,
    /// With a moving average of the weights as a further part.
    pub average: bool,
    /// One of the crate's own parts, or `none`.
    pub part: &'static str,
    pub schedule: Schedule,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            scheme: "nf4",
            wrap_first: false,
            optimizer: "adamw",
            dropout: 0.2,
            accumulate: 1,
            average: true,
            part: "none",
            schedule: Schedule::constant(),
        }
    }
}

pub const OPTIMIZERS: [&str; 6] = ["adamw", "adamw8bit", "sgd", "adafactor", "lion", "lora_plus"];

#[derive(Debug)]
pub struct Net {
    up: nn::Linear,
    down: nn::Linear,
}

impl ModuleT for Net {
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        x.apply(&self.up).tanh().dropout(0.1, train).apply(&self.down)
    }
}

/// The network, the same each time.
pub fn dense_base() -> (nn::VarStore, Net) {
    let vs = nn::VarStore::new(device());
    let linear = |name: &str, inn, out| nn::linear(vs.root() / name, inn, out, Default::default());
    let net = Net { up: linear("up", IN, 40), down: linear("down", 40, 8) };
    // By exact arithmetic, so that every processor has the same base.
    let sorted: std::collections::BTreeMap<_, _> = vs.variables().into_iter().collect();
    for (i, mut weight) in sorted.into_values().enumerate() {
        let numbers = Tensor::arange(weight.numel() as i64, floats()) * (37.0 + i as f64);
        let exact = (numbers.remainder(127) - 63) / 256;
        tch::no_grad(|| weight.copy_(&exact.view_as(&weight)));
    }
    (vs, net)
}

fn quant(scheme: &str) -> QuantConfig {
    let builder = match scheme {
        "nf4" => QuantConfig::nf4(),
        "nf4+dq" => QuantConfig::nf4().double_quant(true),
        "int8" => QuantConfig::int8(),
        "int4" => QuantConfig::int4(),
        "fp8" => QuantConfig::fp8(Fp8Format::E4m3),
        other => panic!("no scheme {other}"),
    };
    builder.build().unwrap()
}

/// A run with all that changes in it.
pub struct Toy {
    pub model: LoraModel<Net>,
    pub optimizer: Box<dyn Optimizer>,
    pub schedule: Schedule,
    pub sampler: Sampler,
    pub average: Option<Average>,
    pub part: Option<Part>,
    /// One more part.
    pub extra: Option<Box<dyn Stateful>>,
    pub run: Run,
    accumulate: usize,
}

impl Toy {
    /// Everything that a training program builds before it resumes. It draws
    /// from the default generator: hold `common::rng`.
    pub fn new(setup: Setup, run: RunBuilder) -> Self {
        // The tensors are too small to share, and the machine may be busy.
        tch::set_num_threads(1);
        super::common::repeatable();
        let (vs, net) = dense_base();
        let config = LoraConfig::builder().r(2).lora_alpha(4.0).lora_dropout(setup.dropout);
        let config = config.target_modules(["up", "down"]).build().unwrap();
        let base = Base::new(vs, net);
        tch::manual_seed(11);
        let model = match (setup.scheme, setup.wrap_first) {
            ("dense", _) => LoraModel::wrap(base, config).unwrap(),
            (scheme, false) => LoraModel::wrap(base.quantize(&quant(scheme)).unwrap(), config).unwrap(),
            (scheme, true) => {
                let mut model = LoraModel::wrap(base, config).unwrap();
                model.quantize(&quant(scheme)).unwrap();
                model
            }
        };
        let parameters = model.trainable_parameters();
        let average = setup.average.then(|| Average::new(&model));
        let part = Part::new(setup.part, &model);
        let optimizer: Box<dyn Optimizer> = match setup.optimizer {
            "adamw" => Box::new(AdamW::builder().lr(1e-2).build(parameters).unwrap()),
            "adamw8bit" => Box::new(AdamW8bit::builder().lr(1e-2).build(parameters).unwrap()),
            "sgd" => Box::new(Sgd::builder().lr(1e-1).momentum(0.9).build(parameters).unwrap()),
            "adafactor" => Box::new(Adafactor::builder().build(parameters).unwrap()),
            "lion" => Box::new(Lion::builder().lr(1e-3).build(parameters).unwrap()),
            "lora_plus" => Box::new(AdamW::builder().lr(1e-2).lora_plus(4.0).build(parameters).unwrap()),
            other => panic!("no optimizer {other}"),
        };
        let sampler = Sampler::new(ROWS, 5, 9).unwrap();
        let (schedule, accumulate) = (setup.schedule, setup.accumulate);
        Toy { model, optimizer, schedule, sampler, average, part, extra: None, run: run.build().unwrap(), accumulate }
    }

    /// Resumes or starts; what was drawn before doesn't matter to a resumed run.
    pub fn start(&mut self) -> Result<Start> {
        let (run, mut parts) = self.split();
        run.resume_or_start(&mut parts)
    }

    /// One step, without telling the run of it.
    pub fn train(&mut self) {
        let features = (Tensor::arange(ROWS as i64 * IN, floats()) * 12.9898).sin().view([ROWS as i64, IN]);
        let labels = Tensor::arange(ROWS as i64, (Kind::Int64, device())).remainder(8);
        for _ in 0..self.accumulate {
            let rows: Vec<i64> = self.sampler.next_batch().into_iter().map(|row| row as i64).collect();
            let rows = Tensor::from_slice(&rows).to_device(device());
            let output = self.model.forward(&features.index_select(0, &rows)).unwrap();
            let loss = output.cross_entropy_for_logits(&labels.index_select(0, &rows));
            self.part.as_mut().map_or(loss.shallow_clone(), |part| part.loss(loss)).backward();
        }
        match &mut self.part {
            // A step is one micro-batch: the run saves amid them.
            Some(Part::Accumulation(accumulation)) => {
                if !accumulation.count() {
                    return;
                }
                self.optimizer.step().unwrap();
            }
            Some(Part::Scaler(scaler)) => {
                scaler.step(self.optimizer.as_mut(), &self.model.trainable_parameters()).unwrap();
            }
            _ => self.optimizer.step().unwrap(),
        }
        self.optimizer.zero_grad().unwrap();
        if let Some(Part::Ema(ema)) = &mut self.part {
            ema.update().unwrap();
        }
        if let Some(average) = &mut self.average {
            average.update(&self.model);
        }
    }

    /// One step, counted and saved if due.
    pub fn step(&mut self) -> Result<tch_peft::StepReport> {
        self.train();
        let (run, mut parts) = self.split();
        run.step(&mut parts)
    }

    pub fn save(&mut self) -> Result<std::path::PathBuf> {
        let (run, mut parts) = self.split();
        run.save(&mut parts)
    }

    pub fn train_to(&mut self, step: u64) {
        while self.run.current_step() < step {
            self.step().unwrap();
        }
        self.run.flush().unwrap();
    }

    fn split(&mut self) -> (&mut Run, Parts<'_>) {
        let parts = Parts::new(&mut self.model, self.optimizer.as_mut(), &self.schedule, &mut self.sampler);
        let parts = match &mut self.average {
            Some(average) => parts.with("average", average),
            None => parts,
        };
        let parts = match &mut self.part {
            Some(part) => parts.with("part", part.stateful()),
            None => parts,
        };
        let parts = match &mut self.extra {
            Some(extra) => parts.with("extra", extra.as_mut()),
            None => parts,
        };
        (&mut self.run, parts)
    }

    /// The adapter's file.
    pub fn adapter(&self) -> Vec<u8> {
        self.model.adapter_files().unwrap().remove(0).1.to_bytes().unwrap()
    }

    /// All that a checkpoint would bring back, to be compared.
    pub fn everything(&self) -> Vec<u8> {
        let mut bytes = self.adapter();
        let mut add = |tensors: std::collections::BTreeMap<String, Tensor>| {
            for (name, tensor) in tensors {
                bytes.extend(name.bytes());
                bytes.extend(super::common::bits(&tensor));
            }
        };
        add(self.optimizer.export_state().unwrap().tensors);
        if let Some(average) = &self.average {
            add(average.export_state().unwrap().tensors);
        }
        if let Some(part) = &self.part {
            let state = part.export();
            add(state.tensors);
            bytes.extend(state.values.to_string().bytes());
        }
        // The fields that the first version had: the corpus's hashes are of them.
        let s = self.sampler.state();
        let (seed, len, batch, epoch, index) = (s.seed, s.len, s.batch_size, s.epoch, s.index);
        let (shuffle, last) = (s.shuffle, s.drop_last);
        bytes.extend(
            format!(
                "SamplerState {{ seed: {seed}, len: {len}, batch_size: {batch}, shuffle: {shuffle}, \
                 drop_last: {last}, epoch: {epoch}, index: {index} }}"
            )
            .bytes(),
        );
        bytes.extend(serde_json::to_vec(&tch_peft::RngState::capture(&[]).unwrap()).unwrap());
        bytes
    }
}

/// The adapter after so many steps without any interruption.
pub fn straight(setup: Setup, dir: &Path, steps: u64) -> Vec<u8> {
    let mut toy = Toy::new(setup, Run::builder(dir));
    toy.start().unwrap();
    toy.train_to(steps);
    toy.adapter()
}

/// One of the crate's own parts, on which what is learnt depends.
pub enum Part {
    Ema(Ema),
    Scaler(LossScaler),
    Accumulation(GradientAccumulation),
    Generator(Generator),
    Own(OwnState<f64>),
}

impl Part {
    fn new(name: &str, model: &LoraModel<Net>) -> Option<Self> {
        let parameters = model.trainable_parameters();
        Some(match name {
            "none" => return None,
            "ema" => Part::Ema(Ema::builder().warmup(1.0, 0.7).build(parameters).unwrap()),
            // It grows every second step, from a scale that small gradients round at.
            "loss_scaler" => Part::Scaler(LossScaler::with_settings(0.3, 1.7, 0.5, 2).unwrap()),
            "gradient_accumulation" => Part::Accumulation(GradientAccumulation::new(3, parameters).unwrap()),
            "generator" => Part::Generator(Generator::new(7)),
            "own_state" => Part::Own(OwnState::new("running loss", 1.0)),
            other => panic!("no part {other}"),
        })
    }

    /// The loss to go back from.
    fn loss(&mut self, loss: Tensor) -> Tensor {
        match self {
            Part::Ema(_) => loss,
            Part::Scaler(scaler) => scaler.scale(&loss).unwrap(),
            Part::Accumulation(accumulation) => accumulation.scale(&loss).unwrap(),
            Part::Generator(generator) => loss * generator.uniform(&[], device()).unwrap(),
            Part::Own(running) => {
                **running = 0.9 * **running + 0.1 * loss.double_value(&[]);
                loss / **running
            }
        }
    }

    fn export(&self) -> State {
        let part: &dyn Stateful = match self {
            Part::Ema(ema) => ema,
            Part::Scaler(scaler) => scaler,
            Part::Accumulation(accumulation) => accumulation,
            Part::Generator(generator) => generator,
            Part::Own(own) => own,
        };
        part.export_state().unwrap()
    }

    fn stateful(&mut self) -> &mut dyn Stateful {
        match self {
            Part::Ema(ema) => ema,
            Part::Scaler(scaler) => scaler,
            Part::Accumulation(accumulation) => accumulation,
            Part::Generator(generator) => generator,
            Part::Own(own) => own,
        }
    }
}

/// A moving average of the adapter: a part that the crate doesn't know.
pub struct Average {
    shadow: Vec<(String, Tensor)>,
    updates: u64,
}

impl Average {
    fn new(model: &LoraModel<Net>) -> Self {
        let shadow = model.parameters().into_iter().map(|p| (p.name, p.tensor.detach().copy())).collect();
        Average { shadow, updates: 0 }
    }

    fn update(&mut self, model: &LoraModel<Net>) {
        for ((_, shadow), parameter) in self.shadow.iter_mut().zip(model.parameters()) {
            *shadow = &*shadow * 0.9 + parameter.tensor.detach() * 0.1;
        }
        self.updates += 1;
    }
}

impl Stateful for Average {
    fn export_state(&self) -> Result<State> {
        Ok(State {
            kind: "average".into(),
            settings: serde_json::json!({"decay": 0.9}),
            values: serde_json::json!({"updates": self.updates}),
            tensors: self.shadow.iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect(),
        })
    }

    fn check_state(&self, state: &State) -> Result<()> {
        let names = self.shadow.iter().all(|(name, _)| state.tensors.contains_key(name));
        if state.kind != "average" || !names || state.values["updates"].as_u64().is_none() {
            let differences = vec![format!("kind: recorded {}, given average", state.kind)];
            return Err(Error::DifferentConfig { what: "average".into(), differences });
        }
        Ok(())
    }

    fn import_state(&mut self, state: State) -> Result<()> {
        self.check_state(&state)?;
        self.updates = state.values["updates"].as_u64().unwrap();
        for (name, shadow) in &mut self.shadow {
            *shadow = state.tensors[name].copy().to_device(shadow.device());
        }
        Ok(())
    }
}
