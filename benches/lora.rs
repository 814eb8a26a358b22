//! What adapting costs, against HF PEFT in a Python process of its own: rounds of the two take
//! turns, and the figures are medians of the rounds.
//!
//!     cargo bench --bench lora
//!     cargo bench --bench lora -- --csv docs/data/lora.csv
//!
//! One step is a forward and a backward pass of 64 linear layers of width 256 on 64 rows, in f32,
//! with two threads. `TCH_PEFT_PYTHON` names the Python that has PEFT.

mod common;
mod median;
mod peer;

use std::time::Instant;

use median::median;
use peer::{Failure, Peer};
use serde_json::json;
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, LoraConfig, LoraModel};

const LAYERS: usize = 64;
const WIDTH: i64 = 256;
const ROWS: i64 = 64;
/// Sites of a larger model, of this width.
const SITES: usize = 224;
const SITE: i64 = 2048;
const STEPS: usize = 5;
const CASES: [&str; 4] = ["base", "lora", "dropout", "dora"];

struct Net {
    layers: Vec<nn::Linear>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} layers", self.layers.len())
    }
}

impl Module for Net {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.layers.iter().fold(x.shallow_clone(), |x, layer| x.apply(layer))
    }
}

fn base(layers: usize, width: i64) -> Base<Net> {
    let vs = nn::VarStore::new(Device::Cpu);
    let layer = |i| nn::linear(vs.root() / "h" / i, width, width, Default::default());
    let net = Net { layers: (0..layers).map(layer).collect() };
    Base::new(vs, net)
}

fn model(case: &str) -> LoraModel<Net> {
    let config = LoraConfig::builder().r(8).lora_alpha(16.0).target_modules(r"h\.\d+").use_dora(case == "dora");
    let config = config.lora_dropout(if case == "dropout" { 0.1 } else { 0.0 }).build().unwrap();
    LoraModel::wrap(base(LAYERS, WIDTH), config).unwrap()
}

/// Seconds for one of `steps` steps.
fn seconds(steps: usize, x: &Tensor, forward: impl Fn(&Tensor) -> Tensor) -> f64 {
    let start = Instant::now();
    for _ in 0..steps {
        forward(x).sum(Kind::Float).backward();
    }
    start.elapsed().as_secs_f64() / steps as f64
}

/// PEFT's seconds for one step of the case.
fn theirs(peer: &mut Peer, case: &str) -> Result<f64, Failure> {
    let answer = peer.ask(json!({"case": case, "steps": STEPS}))?;
    Ok(answer["seconds"].as_f64().ok_or("no seconds")?)
}

fn main() -> Result<(), Failure> {
    tch::set_num_threads(2);
    let (rounds, wraps) = if common::trial() { (1, 1) } else { (7, 5) };
    let mut peer = Peer::start("lora.py")?;
    peer.ask(json!({"threads": tch::get_num_threads()}))?;
    let x = Tensor::randn([ROWS, WIDTH], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let models: Vec<_> = CASES.iter().map(|case| model(case)).collect();
    let mut ours = vec![Vec::new(); CASES.len()];
    let mut pefts = vec![Vec::new(); CASES.len()];
    for round in 0..=rounds {
        for (i, case) in CASES.iter().enumerate() {
            let off = (*case == "base").then(|| models[i].disable_adapters());
            let here = seconds(STEPS, &x, |x| models[i].forward(x).unwrap());
            drop(off);
            let there = theirs(&mut peer, case)?;
            // The first round warms up.
            if round > 0 {
                ours[i].push(here);
                pefts[i].push(there);
            }
        }
    }
    let [ours, pefts] = [ours, pefts].map(|times| times.into_iter().map(median).collect::<Vec<f64>>());
    println!("{LAYERS} layers of {WIDTH}², {ROWS} rows, f32: ms per step");
    println!(
        "{:8}  {:>9}  {:>9}  {:>11}  {:>9}  {:>12}",
        "", "tch-peft", "PEFT", "PEFT / ours", "of LoRA's", "PEFT's of it"
    );
    let mut figures = Vec::new();
    for (i, case) in CASES.iter().enumerate() {
        let (a, b) = (ours[i] * 1e3, pefts[i] * 1e3);
        figures.push(format!("{case},{a:.2},{b:.2}"));
        let of = |all: &[f64]| all[i] / all[1];
        println!("{case:8}  {a:9.2}  {b:9.2}  {:11.2}  {:9.2}  {:12.2}", b / a, of(&ours), of(&pefts));
    }
    if let Some(file) = common::csv_file() {
        let what = format!("cargo bench --bench lora: {LAYERS} layers of {WIDTH} x {WIDTH}, {ROWS} rows, r = 8, f32");
        common::write_csv(&file, &what, "case,tch_peft,peft", &figures)?;
    }

    let mut times = Vec::new();
    for _ in 0..wraps {
        let base = base(2000, 32);
        let config = LoraConfig::builder().r(8).target_modules("all-linear").build().unwrap();
        let start = Instant::now();
        let model = LoraModel::wrap(base, config).unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
        drop(model);
    }
    let (here, there) = (median(times), theirs(&mut peer, "wrap")? * 1e3);
    println!("wrap, 2000 linears of 32²: {here:.0} ms, PEFT {there:.0} ms ({:.0}x)", there / here);

    let (mut times, mut draws) = (Vec::new(), Vec::new());
    for _ in 0..wraps {
        let mut vs = nn::VarStore::new(Device::Cpu);
        vs.set_kind(Kind::Half);
        for i in 0..SITES {
            let _ = vs.root().sub("h").sub(i).zeros("weight", &[SITE, SITE]);
        }
        let config = LoraConfig::builder().r(16).target_modules("all-linear").build().unwrap();
        let start = Instant::now();
        drop(LoraModel::wrap(Base::from(vs), config).unwrap());
        times.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        let a: Vec<_> =
            (0..SITES).map(|_| Tensor::empty([16, SITE], (Kind::Float, Device::Cpu)).uniform_(-0.1, 0.1)).collect();
        draws.push(start.elapsed().as_secs_f64() * 1e3);
        drop(a);
    }
    println!("wrap, {SITES} linears of {SITE}²: {:.0} ms; drawing as many A: {:.0} ms", median(times), median(draws));
    Ok(())
}
