//! Adapted layers on a GPU, beside PEFT on bitsandbytes and the dense layer, and beside what the device allows.
//!
//!     cargo bench --bench cuda
//!     cargo bench --bench cuda -- --csv docs/data/cuda.csv
//!     cargo bench --bench cuda -- --device cpu --quick      # tiny sizes, to try the program without a GPU
//!
//! Three tables, in bf16: unpacking a weight, beside a copy; an adapted layer, beside its peers and
//! the dense layer; the peak memory of a step. Each round times every contestant once, one after the
//! other; a figure is the median of the rounds. A time is that of many calls in a row, between two
//! waits for the device. `TCH_PEFT_PYTHON` names the Python that has the peers; empty leaves them out.

#![allow(missing_docs)]

mod common;
mod median;
mod peer;

use std::time::{Duration, Instant};

use median::median;
use peer::{Failure, Peer};
use serde_json::json;
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::quant::quantize;
use tch_peft::{Base, LoraConfig, LoraModel, QuantConfig, Scheme};

const RANK: i64 = 16;
const ROUNDS: usize = 7;
const KIND: Kind = Kind::BFloat16;
/// Ours, by the names in the tables.
const OURS: [(&str, Scheme); 4] =
    [("nf4", Scheme::NF4), ("nf4 dq", Scheme::NF4_DOUBLE), ("int8", Scheme::Int8), ("fp8", Scheme::FP8)];
const PEERS: [&str; 3] = ["PEFT bnb nf4", "PEFT bnb int8", "PEFT dense"];
/// A layer in Python that is only evaluated.
const PACKED: &str = "bnb nf4 packed";

struct Sizes {
    /// (out, in)
    layers: &'static [(i64, i64)],
    tokens: &'static [i64],
    /// Of the memory of a step: layers, their width, tokens.
    stack: (usize, i64, i64),
    /// How long the calls of one time take, at least, in seconds.
    batch: f64,
}

const FULL: Sizes = Sizes {
    layers: &[(4096, 4096), (14336, 4096), (8192, 8192)],
    tokens: &[1, 16, 512, 4096, 16384],
    stack: (32, 4096, 4096),
    batch: 0.05,
};
const QUICK: Sizes = Sizes { layers: &[(256, 128)], tokens: &[1, 16], stack: (3, 64, 32), batch: 0.001 };

/// What the device can do: the limits that figures stand beside.
struct Limits {
    /// Bytes read and written by a copy, a second.
    bandwidth: f64,
    /// Multiplications and additions of the fastest dense product, a second.
    arithmetic: f64,
}

impl Limits {
    fn measure(device: Device, sizes: &Sizes) -> Result<Self, Failure> {
        let (out, inn) = sizes.layers[sizes.layers.len() - 1];
        // Larger than any cache of a GPU.
        let from = Tensor::zeros([8 * out * inn], (Kind::Uint8, device));
        let mut to = Tensor::zeros_like(&from);
        let copy = fastest(device, sizes.batch, || to.f_copy_(&from))?;
        let (x, w) = (normal([out, inn], device), normal([inn, out], device));
        let product = fastest(device, sizes.batch, || x.f_mm(&w).map(drop))?;
        Ok(Limits { bandwidth: 16.0 * (out * inn) as f64 / copy, arithmetic: 2.0 * (out * out * inn) as f64 / product })
    }

    /// The least seconds for so much to compute and so many bytes to move.
    fn bound(&self, operations: f64, bytes: f64) -> f64 {
        (operations / self.arithmetic).max(bytes / self.bandwidth)
    }
}

fn normal(shape: [i64; 2], device: Device) -> Tensor {
    Tensor::randn(shape, (Kind::Float, device)).to_kind(KIND)
}

/// Waits until the device has done all that it was asked for.
fn wait(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// Seconds of one of `calls` calls in a row.
fn seconds<E>(device: Device, calls: u32, mut call: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    wait(device);
    let start = Instant::now();
    for _ in 0..calls {
        call()?;
    }
    wait(device);
    Ok(start.elapsed().as_secs_f64() / f64::from(calls))
}

/// How many calls make up a time.
fn calls(once: f64, batch: f64) -> u32 {
    (batch / once.max(1e-9)).clamp(1.0, 4096.0) as u32
}

/// Seconds of a call, the least of all rounds: for limits.
fn fastest<E>(device: Device, batch: f64, mut call: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    seconds(device, 1, &mut call)?;
    let calls = calls(seconds(device, 1, &mut call)?, batch);
    (0..ROUNDS).try_fold(f64::INFINITY, |least, _| Ok(least.min(seconds(device, calls, &mut call)?)))
}

/// Times every contestant once in each round; the median of each, in seconds a call.
fn rounds(
    names: &[String],
    batch: f64,
    mut run: impl FnMut(&str, u32) -> Result<f64, Failure>,
) -> Result<Vec<f64>, Failure> {
    let (mut times, mut repeat) = (vec![Vec::new(); names.len()], vec![1; names.len()]);
    for round in 0..ROUNDS + 2 {
        for (i, name) in names.iter().enumerate() {
            let time = run(name, repeat[i])?;
            match round {
                // The first warms up, and the second tells how many calls make up a time.
                0 => {}
                1 => repeat[i] = calls(time, batch),
                _ => times[i].push(time),
            }
        }
    }
    Ok(times.into_iter().map(median).collect())
}

/// Unpacking to bf16, beside a copy of as many bytes as it reads and writes.
fn unpacking(device: Device, sizes: &Sizes, limits: &Limits, lines: &mut Vec<String>) -> Result<(), Failure> {
    println!(
        "\n### unpacking to bf16\n\n| scheme | weight | ms | copy, ms | of its bandwidth |\n|---|---|---|---|---|"
    );
    let schemes = [
        Scheme::NF4,
        Scheme::NF4_DOUBLE,
        Scheme::FP4,
        Scheme::INT4,
        Scheme::INT2,
        Scheme::Int8,
        Scheme::FP8,
        Scheme::Mxfp4,
    ];
    for &(out, inn) in sizes.layers {
        let weight = normal([out, inn], device) * 0.02;
        for scheme in schemes {
            let packed = quantize("weight", &weight, scheme)?;
            let mut tile = Tensor::empty([out, inn], (KIND, device));
            let names = [String::new()];
            let run = |_: &str, calls| Ok(seconds(device, calls, || packed.unpack_rows(0, &mut tile))?);
            let time = rounds(&names, sizes.batch, run)?[0];
            let bound = limits.bound(0.0, (packed.nbytes()? as i64 + 2 * out * inn) as f64);
            let share = bound / time;
            println!("| {scheme} | {out} x {inn} | {:.4} | {:.4} | {:.0} % |", time * 1e3, bound * 1e3, share * 100.0);
            lines.push(format!("unpack,{scheme},{out},{inn},,,{:.5},{:.5}", time * 1e3, bound * 1e3));
        }
    }
    Ok(())
}

fn config(scheme: Scheme) -> Result<QuantConfig, Failure> {
    Ok(QuantConfig::builder(scheme).build()?)
}

/// One of ours: a linear layer with LoRA on a packed weight.
fn adapted(device: Device, out: i64, inn: i64, scheme: Scheme) -> Result<LoraModel<nn::Linear>, Failure> {
    let mut vs = nn::VarStore::new(device);
    let no_bias = nn::LinearConfig { bias: false, ..Default::default() };
    let layer = nn::linear(vs.root() / "layer", inn, out, no_bias);
    vs.bfloat16();
    let base = Base::new(vs, layer).quantize(&config(scheme)?)?;
    let lora = LoraConfig::builder().r(RANK).lora_alpha(2.0 * RANK as f64).target_modules(["layer"]).build()?;
    Ok(LoraModel::wrap(base, lora)?)
}

/// A forward pass, or with `g` a step: that and a backward pass from `g`.
fn pass(x: &Tensor, g: Option<&Tensor>, forward: impl Fn(&Tensor) -> Result<Tensor, Failure>) -> Result<(), Failure> {
    let Some(g) = g else {
        let _no_grad = tch::no_grad_guard();
        return forward(x).map(drop);
    };
    // Gradients pile up, as the peers' do.
    Ok((forward(x)? * g).f_sum(KIND)?.f_backward()?)
}

/// An adapted layer beside its peers.
fn layers(device: Device, sizes: &Sizes, limits: &Limits, peer: &mut Option<Peer>) -> Result<Vec<String>, Failure> {
    let (mut lines, with_peers) = (Vec::new(), peer.is_some());
    for &(out, inn) in sizes.layers {
        let ours = OURS.iter().map(|(name, scheme)| Ok((*name, adapted(device, out, inn, *scheme)?)));
        let ours = ours.collect::<Result<Vec<_>, Failure>>()?;
        let dense = normal([out, inn], device) * 0.02;
        let packed = quantize("weight", &dense, Scheme::NF4)?.nbytes()? as f64;
        for &n in sizes.tokens {
            let x = normal([n, inn], device).set_requires_grad(true);
            let g = normal([n, out], device);
            let mut able = Vec::new();
            for name in PEERS.iter().chain([&PACKED]).filter(|_| with_peers) {
                let request = json!({"make": name, "out": out, "in": inn, "rows": n, "rank": RANK});
                match ask(peer, request)? {
                    answer if answer["ok"] == true => able.push(name.to_string()),
                    answer => println!("{name} can't do {out} x {inn}: {}", answer["why"]),
                }
            }
            for what in ["forward", "step"] {
                let step = what == "step";
                let peers = able.iter().filter(|name| !step || *name != PACKED).cloned();
                let names: Vec<String> =
                    ours.iter().map(|(name, _)| name.to_string()).chain(["dense bf16".into()]).chain(peers).collect();
                let times = rounds(&names, sizes.batch, |name, calls| {
                    let g = step.then_some(&g);
                    if name == "dense bf16" {
                        return seconds(device, calls, || pass(&x, g, |x| Ok(x.f_linear(&dense, None::<&Tensor>)?)));
                    }
                    match ours.iter().find(|(ours, _)| *ours == name) {
                        Some((_, model)) => seconds(device, calls, || pass(&x, g, |x| Ok(model.forward(x)?))),
                        None => {
                            let answer = ask(peer, json!({"time": name, "what": what, "repeat": calls}))?;
                            answer["seconds"].as_f64().ok_or_else(|| format!("{name}: {answer}").into())
                        }
                    }
                })?;
                // A step multiplies by the weight twice, and reads it twice.
                let passes = if step { 2.0 } else { 1.0 };
                let bytes = passes * (packed + 2.0 * (n * (inn + out)) as f64);
                let bound = limits.bound(passes * 2.0 * (n * out * inn) as f64, bytes);
                println!("\n### {out} x {inn}, {n} tokens, {what}; the device allows {:.4} ms with nf4\n", bound * 1e3);
                println!("| layer | ms | to the first |\n|---|---|---|");
                for (name, time) in names.iter().zip(&times) {
                    println!("| {name} | {:.4} | {:.2} |", time * 1e3, time / times[0]);
                    lines.push(format!("layer,{name},{out},{inn},{n},{what},{:.5},{:.5}", time * 1e3, bound * 1e3));
                }
            }
            if with_peers {
                ask(peer, json!({"drop": true}))?;
            }
        }
    }
    Ok(lines)
}

#[derive(Debug)]
struct Stack(Vec<nn::Linear>);

impl Module for Stack {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.0.iter().fold(x.shallow_clone(), |x, layer| x.apply(layer))
    }
}

/// The peak of a step of many layers over what was there before it, beside what it can't do without.
fn memory(device: Device, sizes: &Sizes, peer: &mut Option<Peer>, lines: &mut Vec<String>) -> Result<(), Failure> {
    let (count, width, n) = sizes.stack;
    println!("\n### peak memory of a step of {count} layers of {width}², {n} tokens\n");
    if device == Device::Cpu {
        println!("On the CPU, `cargo bench --bench memory` measures it.");
        return Ok(());
    }
    println!("| layers | MB | packed weights + activations + one tile, MB |\n|---|---|---|");
    let megabytes = |bytes: f64| bytes / 1e6;
    for (name, scheme) in OURS {
        let mut vs = nn::VarStore::new(device);
        let no_bias = nn::LinearConfig { bias: false, ..Default::default() };
        let layer = |i: usize| nn::linear(vs.root() / "h" / i, width, width, no_bias);
        let net = Stack((0..count).map(layer).collect());
        vs.bfloat16();
        let base = Base::new(vs, net).quantize(&config(scheme)?)?;
        let packed = base.quantization_report().bytes_after() as f64;
        let lora = LoraConfig::builder().r(RANK).target_modules("all-linear").build()?;
        let model = LoraModel::wrap(base, lora)?;
        let x = normal([n, width], device).set_requires_grad(true);
        let step = || -> Result<(), Failure> { Ok(model.forward(&x)?.f_sum(KIND)?.f_backward()?) };
        step()?;
        wait(device);
        tch_peft::reset_peak_memory(device)?;
        step()?;
        let peak = tch_peft::peak_memory(device)? as f64;
        // x, each layer's result and x · Aᵀ; two gradients as they go; a tile of 4 MiB.
        let rows = n as f64 * 2.0;
        let activations = rows * (width * (count as i64 + 3)) as f64 + rows * (RANK * count as i64) as f64;
        let needed = packed + activations + f64::from(1 << 22);
        println!("| {name} | {:.1} | {:.1} |", megabytes(peak), megabytes(needed));
        lines.push(format!("memory,{name},{width},{width},{n},step,{:.2},{:.2}", megabytes(peak), megabytes(needed)));
    }
    let with_peers = peer.is_some();
    for name in PEERS.iter().filter(|_| with_peers) {
        let request = json!({"memory": name, "layers": count, "width": width, "rows": n, "rank": RANK});
        match ask(peer, request)? {
            answer if answer["ok"] == true => {
                let peak = megabytes(answer["bytes"].as_f64().unwrap_or(f64::NAN));
                println!("| {name} | {peak:.1} | |");
                lines.push(format!("memory,{name},{width},{width},{n},step,{peak:.2},"));
            }
            answer => println!("{name} can't: {}", answer["why"]),
        }
    }
    Ok(())
}

fn ask(peer: &mut Option<Peer>, request: serde_json::Value) -> Result<serde_json::Value, Failure> {
    // Its threads spin for a while before they sleep.
    std::thread::sleep(Duration::from_millis(2));
    peer.as_mut().ok_or("no peers")?.ask(request)
}

fn main() -> Result<(), Failure> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let sizes = if quick { &QUICK } else { &FULL };
    let device = match common::value("--device").as_deref() {
        None | Some("cuda") => Device::Cuda(0),
        Some("cpu") => Device::Cpu,
        Some(other) => return Err(format!("--device can be cuda or cpu, not `{other}`").into()),
    };
    if device != Device::Cpu && !tch::Cuda::is_available() {
        let status = tch_peft::cuda_status();
        return Err(format!("no GPU ({status}); `--device cpu --quick` tries the program without one").into());
    }
    let mut peer = match std::env::var("TCH_PEFT_PYTHON").as_deref() {
        Ok("") => None,
        _ => Some(Peer::start("cuda.py")?),
    };
    let name = match device {
        Device::Cpu => "cpu",
        _ => "cuda",
    };
    let versions = match &mut peer {
        Some(peer) => peer.ask(json!({"device": name}))?["versions"].to_string(),
        None => "no peers".into(),
    };
    let limits = Limits::measure(device, sizes)?;
    println!(
        "{versions}. A copy: {:.0} GB/s. A dense bf16 product: {:.1} TFLOP/s.",
        limits.bandwidth / 1e9,
        limits.arithmetic / 1e12
    );
    let mut lines = Vec::new();
    unpacking(device, sizes, &limits, &mut lines)?;
    lines.extend(layers(device, sizes, &limits, &mut peer)?);
    memory(device, sizes, &mut peer, &mut lines)?;
    if let Some(file) = common::csv_file() {
        let what = format!(
            "cargo bench --bench cuda: LoRA of rank {RANK}; medians of {ROUNDS} interleaved rounds; {}",
            versions.replace(',', ";")
        );
        common::write_csv(&file, &what, "table,layer,out,in,tokens,what,figure,bound", &lines)?;
    }
    Ok(())
}
