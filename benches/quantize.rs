//! Packing a weight of 4096² by each scheme, and its peers in Python: time, and
//! relative error in the Frobenius norm.
//!
//! `cargo xtask bench --bench quantize`; with `-- --quick`, of 1024².
//!
//! Peers run in a process of their own; each round times every contestant
//! once, one after the other, and a figure is the median of seven rounds (of
//! one for the peer's search for scales, which takes half a minute). Results go
//! to stdout as tables and to `target/bench/quantize.json`.

#![allow(missing_docs)]

mod median;
mod peer;

use std::path::Path;
use std::time::{Duration, Instant};

use median::median;
use peer::{Failure, Peer};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tch_peft::Scheme;
use tch_peft::quant::quantize;

const ROUNDS: usize = 7;

fn schemes() -> Vec<Scheme> {
    let hqq = Scheme::Int4 { group_size: 128, hqq: true };
    let (int4, int2) = (Scheme::INT4, Scheme::INT2);
    let floats = [Scheme::FP8, Scheme::NF4, Scheme::NF4_DOUBLE, Scheme::FP4, Scheme::Mxfp4];
    [Scheme::Int8, Scheme::LlmInt8, int4, hqq, int2].into_iter().chain(floats).collect()
}

/// What was measured of a scheme.
#[derive(Debug, Default)]
struct Figures {
    ours: Vec<f64>,
    peers: Vec<f64>,
    our_error: f64,
    peers_error: Option<f64>,
}

fn relative_error(values: &Tensor, weight: &Tensor) -> Result<f64, Failure> {
    let [values, weight] = [values, weight].map(|t| t.to_kind(Kind::Double));
    Ok(f64::try_from((values - &weight).norm() / weight.norm())?)
}

fn main() -> Result<(), Failure> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let size = if quick { 1024 } else { 4096 };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join("quantize.safetensors");
    let mut peer = Peer::start("quantize.py")?;
    peer.ask(json!({"threads": tch::get_num_threads()}))?;
    tch::manual_seed(0);
    let mut results = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        let dtype = if kind == Kind::Float { "float32" } else { "bfloat16" };
        let weight = (Tensor::randn([size, size], (Kind::Float, Device::Cpu)) * 0.02).to_kind(kind);
        Tensor::write_safetensors(&[("weight", &weight)], &file)?;
        peer.ask(json!({"weight": file}))?;
        let mut all: Vec<(Scheme, Figures)> =
            schemes().into_iter().map(|scheme| (scheme, Figures::default())).collect();
        for round in 0..=ROUNDS {
            for (scheme, figures) in &mut all {
                // The other process's threads spin for a while before they sleep.
                std::thread::sleep(Duration::from_millis(10));
                let start = Instant::now();
                let packed = quantize("weight", &weight, *scheme)?;
                let seconds = start.elapsed().as_secs_f64();
                if round == 0 {
                    figures.our_error = relative_error(&packed.dequantize(kind)?, &weight)?;
                } else {
                    figures.ours.push(seconds);
                }
                if matches!(scheme, Scheme::Int4 { hqq: true, .. }) && round > 0 {
                    continue;
                }
                std::thread::sleep(Duration::from_millis(10));
                let name = scheme.to_string();
                let Some(seconds) = peer.ask(json!({"time": name}))?["seconds"].as_f64() else { continue };
                if round == 0 {
                    figures.peers_error = peer.ask(json!({"error": name}))?["error"].as_f64();
                }
                if round > 0 || matches!(scheme, Scheme::Int4 { hqq: true, .. }) {
                    figures.peers.push(seconds);
                }
            }
        }
        println!("\n### {size} x {size}, {dtype}\n");
        println!("| scheme | ms | peer, ms | peer / ours | error | peer's error |\n|---|---|---|---|---|---|");
        for (scheme, figures) in all {
            let ours = median(figures.ours);
            let peers = Some(median(figures.peers)).filter(|seconds| !seconds.is_nan());
            let or_none = |value: Option<f64>, digits: usize| value.map_or("none".into(), |v| format!("{v:.digits$}"));
            println!(
                "| {scheme} | {:.1} | {} | {} | {:.5} | {} |",
                ours * 1e3,
                or_none(peers.map(|p| p * 1e3), 1),
                or_none(peers.map(|p| p / ours), 1),
                figures.our_error,
                or_none(figures.peers_error, 5),
            );
            results.push(json!({
                "size": size, "dtype": dtype, "scheme": scheme.to_string(),
                "milliseconds": ours * 1e3, "peer": peers.map(|p| p * 1e3),
                "error": figures.our_error, "peers_error": figures.peers_error,
            }));
        }
    }
    std::fs::remove_file(&file)?;
    let report = folder.join("quantize.json");
    let content = json!({"threads": tch::get_num_threads(), "rounds": ROUNDS, "results": results});
    std::fs::write(&report, serde_json::to_string_pretty(&content)?)?;
    println!("\n{}", report.display());
    Ok(())
}
