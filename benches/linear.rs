//! An adapted linear layer against its peers in Python: forward, and forward
//! plus backward.
//!
//! `cargo xtask bench` (all sizes), `cargo xtask bench --bench linear -- --quick` (one size). With
//! `--csv docs/data/linear.csv` it writes what `cargo run --example charts` draws. `--sizes 2048x2048,11008x4096`,
//! `--rows 1,16` and `--dtypes f32` choose some of the cases.
//!
//! In f32 ours run a second time, "medium": with `set_float32_matmul_precision(Medium)`.
//!
//! Peers run in a process of their own; each round times every contestant
//! once, one after the other, and a figure is the median of the rounds; a
//! contestant that takes more than two seconds is timed once only. Results
//! go to stdout as a table and to `target/bench/linear.json`.

#![allow(missing_docs)]

mod common;
mod median;
mod peer;

use std::path::Path;
use std::time::{Duration, Instant};

use median::median;
use peer::{Failure, Peer};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, nn};
use tch_peft::Float32MatmulPrecision::{self, Highest, Medium};
use tch_peft::{Base, Fp8Format, LoraConfig, LoraModel, QuantConfig, set_float32_matmul_precision};

const RANK: i64 = 16;
/// Seconds that are too many for seven rounds.
const SLOW: f64 = 2.0;

/// Layers in Python that train.
const PEERS: [&str; 7] = [
    "dense (mm)",
    "dense (oneDNN)",
    "PEFT dense",
    "PEFT bnb nf4",
    "PEFT bnb int8",
    "PEFT quanto int8",
    "PEFT quanto int4",
];
/// Layers in Python that can only be evaluated.
const PACKED: [&str; 2] = ["bnb nf4 packed", "bnb int8 packed"];

/// One of ours: a linear layer with LoRA on a packed weight.
struct Ours {
    name: &'static str,
    model: LoraModel<nn::Linear>,
    /// Medium lets products of f32 round to bf16.
    precision: Float32MatmulPrecision,
}

impl Ours {
    fn make(out: i64, inn: i64, kind: Kind) -> Result<Vec<Self>, Failure> {
        let [nf4, int8] = [QuantConfig::nf4().build()?, QuantConfig::int8().build()?];
        let [int4, fp8] = [QuantConfig::int4().build()?, QuantConfig::fp8(Fp8Format::E4m3).build()?];
        let mut schemes =
            vec![("nf4", &nf4, Highest), ("int8", &int8, Highest), ("int4", &int4, Highest), ("fp8", &fp8, Highest)];
        if kind == Kind::Float {
            schemes.extend([
                ("nf4 (medium)", &nf4, Medium),
                ("int8 (medium)", &int8, Medium),
                ("int4 (medium)", &int4, Medium),
                ("fp8 (medium)", &fp8, Medium),
            ]);
        }
        let mut all = Vec::new();
        for (name, config, precision) in schemes {
            let mut vs = nn::VarStore::new(Device::Cpu);
            let linear = nn::LinearConfig { bias: false, ..Default::default() };
            let layer = nn::linear(vs.root() / "layer", inn, out, linear);
            match kind {
                Kind::BFloat16 => vs.bfloat16(),
                _ => vs.float(),
            }
            let base = Base::new(vs, layer).quantize(config)?;
            let lora = LoraConfig::builder().r(RANK).lora_alpha(2.0 * RANK as f64).target_modules(["layer"]).build()?;
            all.push(Ours { name, model: LoraModel::wrap(base, lora)?, precision });
        }
        Ok(all)
    }

    fn time(&self, x: &Tensor, g: &Tensor, step: bool, repeat: u32) -> Result<f64, Failure> {
        let before = set_float32_matmul_precision(self.precision)?;
        if before != self.precision {
            // The first call after a change takes some milliseconds longer.
            (self.model.forward(x)? * g).sum(g.kind()).backward();
        }
        let start = Instant::now();
        for _ in 0..repeat {
            if step {
                (self.model.forward(x)? * g).sum(g.kind()).backward();
            } else {
                let _no_grad = tch::no_grad_guard();
                let _ = self.model.forward(x)?;
            }
        }
        let seconds = start.elapsed().as_secs_f64() / f64::from(repeat);
        let mut x = x.shallow_clone();
        x.zero_grad();
        Ok(seconds)
    }
}

/// Times every contestant once in each round, on some calls in a row that `run(i, calls)` makes; the
/// median of each, in seconds for a call.
fn rounds(
    count: usize,
    names: &[String],
    mut run: impl FnMut(usize, u32) -> Result<f64, Failure>,
) -> Result<Vec<(String, f64)>, Failure> {
    let mut times = vec![Vec::new(); names.len()];
    let mut calls = vec![1; names.len()];
    let mut slow = vec![false; names.len()];
    for round in 0..=count {
        for (i, times) in times.iter_mut().enumerate() {
            if slow[i] {
                continue;
            }
            // The other process's threads spin for a while before they sleep.
            std::thread::sleep(Duration::from_millis(10));
            let seconds = run(i, calls[i])?;
            match round {
                // The first warms up, and tells how many calls make a tenth of a second.
                0 if seconds > SLOW => {
                    slow[i] = true;
                    times.push(seconds);
                }
                0 => calls[i] = (0.1 / seconds).clamp(1.0, 64.0) as u32,
                _ => times.push(seconds),
            }
        }
    }
    Ok(names.iter().cloned().zip(times.into_iter().map(median)).collect())
}

/// What stands behind this option, or else what is usual, read item by item.
fn items<T>(option: &str, usual: &str, read: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, Failure> {
    let text = common::value(option).unwrap_or_else(|| usual.into());
    let item =
        |item: &str| read(item).ok_or_else(|| format!("{option}: expected some of {usual}, found {item}").into());
    text.split(',').map(item).collect()
}

fn main() -> Result<(), Failure> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (sizes, rows, count) = match (common::trial(), quick) {
        (true, _) => ("64x64", "1,16", 1),
        (_, true) => ("2048x2048", "1,256", 7),
        _ => ("2048x2048,4096x4096,11008x4096", "1,16,256,1024", 7),
    };
    let sizes = items("--sizes", sizes, |size| {
        let (out, inn) = size.split_once('x')?;
        Some((out.parse::<i64>().ok()?, inn.parse::<i64>().ok()?))
    })?;
    let rows = items("--rows", rows, |rows| rows.parse::<i64>().ok())?;
    let kinds = items("--dtypes", "f32,bf16", |dtype| match dtype {
        "f32" => Some(Kind::Float),
        "bf16" => Some(Kind::BFloat16),
        _ => None,
    })?;
    // For its int4, quanto compiles an extension first, for minutes.
    let peers = if common::trial() { &PEERS[..PEERS.len() - 1] } else { &PEERS };
    let mut peer = Peer::start("linear.py")?;
    peer.ask(json!({"threads": tch::get_num_threads()}))?;
    let mut results = Vec::new();
    for &(out, inn) in &sizes {
        for &kind in &kinds {
            let dtype = if kind == Kind::Float { "float32" } else { "bfloat16" };
            let ours = Ours::make(out, inn, kind)?;
            for &n in &rows {
                let x = Tensor::randn([n, inn], (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true);
                let g = Tensor::randn([n, out], (Kind::Float, Device::Cpu)).to_kind(kind);
                let mut able = Vec::new();
                for name in peers.iter().chain(&PACKED) {
                    let request = json!({"make": name, "out": out, "in": inn, "rows": n, "dtype": dtype, "rank": RANK});
                    let answer = peer.ask(request)?;
                    match answer["ok"].as_bool() {
                        Some(true) => able.push(name.to_string()),
                        _ => println!("{name} can't do {out} x {inn} {dtype}: {}", answer["why"]),
                    }
                }
                for what in ["step", "forward"] {
                    let peers = able.iter().filter(|name| what == "forward" || !PACKED.contains(&name.as_str()));
                    let names: Vec<String> =
                        ours.iter().map(|ours| ours.name.to_string()).chain(peers.cloned()).collect();
                    let found = rounds(count, &names, |i, calls| match ours.get(i) {
                        Some(ours) => ours.time(&x, &g, what == "step", calls),
                        None => {
                            let answer = peer.ask(json!({"time": names[i], "what": what, "repeat": calls}))?;
                            answer["seconds"].as_f64().ok_or_else(|| format!("{}: {answer}", names[i]).into())
                        }
                    })?;
                    println!("\n### {out} x {inn}, {n} rows, {dtype}, {what}\n\n| layer | ms |\n|---|---|");
                    for (name, seconds) in &found {
                        println!("| {name} | {:.3} |", seconds * 1e3);
                        results.push(json!({
                            "out": out, "in": inn, "rows": n, "dtype": dtype, "what": what,
                            "layer": name, "milliseconds": seconds * 1e3,
                        }));
                    }
                }
                peer.ask(json!({"drop": true}))?;
            }
        }
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join("linear.json");
    let report = json!({"threads": tch::get_num_threads(), "rounds": count, "results": results});
    std::fs::write(&file, serde_json::to_string_pretty(&report)?)?;
    println!("\n{}", file.display());
    if let Some(file) = common::csv_file() {
        let lines: Vec<String> = report["results"].as_array().into_iter().flatten().map(csv_line).collect();
        let what = format!("cargo bench --bench linear: LoRA of rank {RANK}, medians of {count} interleaved rounds");
        common::write_csv(&file, &what, "out,in,rows,dtype,what,layer,milliseconds", &lines)?;
    }
    Ok(())
}

fn csv_line(result: &Value) -> String {
    let text = |key: &str| result[key].as_str().map_or_else(|| result[key].to_string(), String::from);
    let milliseconds = result["milliseconds"].as_f64().unwrap_or(f64::NAN);
    let case = ["out", "in", "rows", "dtype", "what", "layer"].map(text).join(",");
    format!("{case},{milliseconds:.3}")
}
