//! `serve bench`: throughput and latency under a load of several adapters, one
//! of which is swapped meanwhile.

use crate::args::{Load, Settings};
use crate::engine::Batching;
use crate::llama::{Config, Result};
use crate::metrics::percentile;
use crate::server::Server;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

/// What came of the load.
#[derive(Default)]
struct Outcome {
    /// Seconds from when a request was due to its answer, sorted.
    latencies: Vec<f64>,
    tokens: u64,
    refused: usize,
    /// Neither answered nor refused.
    lost: Vec<String>,
}

/// An adapter to swap, by the folder of another one.
struct Swap {
    name: String,
    path: PathBuf,
}

pub fn run(settings: &Settings, load: &Load) -> Result<()> {
    let mut rates = Vec::new();
    for batching in [Batching::Mixed, Batching::Single] {
        let mut settings = settings.clone();
        settings.limits.batching = batching;
        settings.address.set_port(0);
        let server = Server::start(&settings)?;
        let names: Vec<String> = server.loaded.iter().skip(1).map(|(name, _)| name.clone()).collect();
        if names.len() < 2 || settings.adapters.is_none() {
            return Err("bench: expected --adapters DIR with two adapters or more in it".into());
        }
        if rates.is_empty() {
            for (name, milliseconds) in &server.loaded {
                println!("{name} loaded in {milliseconds:.1} ms");
            }
            println!("\n| batching | requests | tokens/s | p50 ms | p90 | p99 | max | rows a step | swap, ms |");
            println!("|---|---|---|---|---|---|---|---|---|");
        }
        let swap = Swap { name: names[0].clone(), path: names[1].clone().into() };
        let vocabulary = Config::read(&settings.model)?.vocab_size;
        let start = Instant::now();
        let (outcome, swapped) = drive(server.address, load, &names, vocabulary, &swap);
        let seconds = start.elapsed().as_secs_f64();
        let rows = gauge(server.address, "serve_batch_rows_mean")?;
        server.stop()?;
        if let Some(error) = outcome.lost.first() {
            return Err(format!("{} requests were lost; the first: {error}", outcome.lost.len()).into());
        }
        let rate = outcome.tokens as f64 / seconds;
        let latency = |quantile| 1e3 * percentile(&outcome.latencies, quantile);
        let latencies = [0.5, 0.9, 0.99, 1.0].map(|quantile| format!("{:.0}", latency(quantile))).join(" | ");
        let requests = format!("{} ({} refused)", outcome.latencies.len(), outcome.refused);
        println!("| {batching:?} | {requests} | {rate:.0} | {latencies} | {rows:.2} | {:.1} |", swapped?);
        rates.push(rate);
    }
    println!("\nmixed batches give {:.2} times the tokens of one adapter at a time", rates[0] / rates[1]);
    Ok(())
}

/// The load from all clients, and halfway the swap: how long it held the model up.
fn drive(address: SocketAddr, load: &Load, names: &[String], vocabulary: i64, swap: &Swap) -> (Outcome, Result<f64>) {
    thread::scope(|scope| {
        let clients: Vec<_> = (0..load.clients)
            .map(|n| scope.spawn(move || client(address, load, &names[n % names.len()], vocabulary, n as u64)))
            .collect();
        thread::sleep(load.time / 2);
        let swapped = put(address, swap);
        let mut all = Outcome::default();
        for client in clients {
            match client.join() {
                Ok(one) => {
                    all.latencies.extend(one.latencies);
                    all.tokens += one.tokens;
                    all.refused += one.refused;
                    all.lost.extend(one.lost);
                }
                Err(_) => all.lost.push("a client panicked".into()),
            }
        }
        all.latencies.sort_by(f64::total_cmp);
        (all, swapped)
    })
}

/// One client. With a rate, its requests are due at random times, and latency
/// counts from then even if the client wasn't ready.
fn client(address: SocketAddr, load: &Load, model: &str, vocabulary: i64, seed: u64) -> Outcome {
    let agent = ureq::Agent::new_with_defaults();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut outcome = Outcome::default();
    let start = Instant::now();
    let mut due = Duration::ZERO;
    loop {
        due = match load.rate {
            Some(rate) => due + Duration::from_secs_f64(-(1.0 - rng.f64()).ln() * load.clients as f64 / rate),
            None => start.elapsed(),
        };
        if due > load.time {
            return outcome;
        }
        thread::sleep(due.saturating_sub(start.elapsed()));
        let prompt: Vec<i64> = (0..load.prompt).map(|_| rng.i64(0..vocabulary)).collect();
        let body = json!({ "model": model, "prompt": prompt, "max_tokens": load.tokens, "temperature": 0 });
        let answer = agent.post(format!("http://{address}/v1/completions")).send(body.to_string());
        match answer.and_then(|mut answer| answer.body_mut().read_to_string()) {
            Ok(text) => {
                let answer: Value = serde_json::from_str(&text).unwrap_or_default();
                outcome.tokens += answer["usage"]["completion_tokens"].as_u64().unwrap_or(0);
                outcome.latencies.push((start.elapsed() - due).as_secs_f64());
            }
            Err(ureq::Error::StatusCode(429)) => outcome.refused += 1,
            Err(error) => outcome.lost.push(error.to_string()),
        }
    }
}

/// Swaps an adapter; answers the milliseconds for which the model did nothing else.
fn put(address: SocketAddr, swap: &Swap) -> Result<f64> {
    let url = format!("http://{address}/v1/adapters/{}", swap.name);
    let text = ureq::put(url).send(json!({ "path": swap.path }).to_string())?.body_mut().read_to_string()?;
    let answer: Value = serde_json::from_str(&text)?;
    Ok(answer["milliseconds"].as_f64().unwrap_or(f64::NAN))
}

/// A number of `/metrics`.
fn gauge(address: SocketAddr, name: &str) -> Result<f64> {
    let text = ureq::get(format!("http://{address}/metrics")).call()?.body_mut().read_to_string()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).ok_or(format!("/metrics has no {name}"))?;
    Ok(line.trim().parse()?)
}
