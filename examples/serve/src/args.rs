//! The command line.

use crate::engine::{Batching, Limits};
use crate::http::check_name;
use crate::llama::Result;
use crate::options::{device, dtype, scheme};
use lexopt::prelude::*;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tch::{Device, Kind};
use tch_peft::QuantConfigBuilder;

pub const HELP: &str = "\
Serves a quantised model and adapters over HTTP. Ctrl-C finishes what was begun.

Usage: serve --model DIR [OPTIONS]
       serve bench --model DIR [OPTIONS]

  --model DIR            Hugging Face folder: config.json, *.safetensors, tokenizer.json;
                         dense, or packed as `save_quantized` and others write it
  --adapters DIR         Where PUT may load adapters from; those in it at the
                         start are served by their folders' names
  --adapter NAME=DIR     One more adapter, from anywhere

  --scheme NAME          nf4, fp4, int8, int4, int2, fp8, for a dense model; none:
                         as it is in the files (nf4)
  --dtype NAME           f32 or bf16, of all that is not packed (the model's)
  --device NAME          cpu or cuda (cuda where there is one)
  --address HOST:PORT    Where to listen (127.0.0.1:8080)
  --rows N               Requests in a batch (8)
  --step-tokens N        Tokens in a step, prompts and answers together (256)
  --queue N              Requests that may wait; more are refused (64)
  --max-length N         Tokens of a prompt and its answer (2048)
  --batching NAME        mixed; or single, one adapter at a time, to compare with

`bench` serves on a free port, with both kinds of batching one after the other,
and asks for completions by all adapters. Halfway, it swaps the first one.

  --clients N            That ask at the same time (8)
  --rate X               Requests a second that arrive at random (Poisson), not
                         each after the client's last answer
  --seconds X            For each kind of batching (20)
  --prompt N             Tokens of a prompt (32)
  --tokens N             Tokens of an answer (32)

  -h, --help             This text";

/// What to serve, and how.
#[derive(Clone)]
pub struct Settings {
    pub model: PathBuf,
    pub adapters: Option<PathBuf>,
    pub adapter: Vec<(String, PathBuf)>,
    pub quantize: Option<QuantConfigBuilder>,
    pub dtype: Option<Kind>,
    pub device: Device,
    pub address: SocketAddr,
    pub limits: Limits,
    pub queue: usize,
    pub max_length: usize,
}

/// The load of `bench`.
pub struct Load {
    pub clients: usize,
    /// Requests a second; none: each client asks again once it was answered.
    pub rate: Option<f64>,
    pub time: Duration,
    pub prompt: usize,
    pub tokens: usize,
}

/// Reads the command line; `None` if help is wanted. The load is that of
/// `bench`, if that was asked for.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<(Settings, Option<Load>)>> {
    let mut settings = Settings {
        model: PathBuf::new(),
        adapters: None,
        adapter: Vec::new(),
        quantize: scheme("nf4")?,
        dtype: None,
        device: Device::cuda_if_available(),
        address: SocketAddr::from(([127, 0, 0, 1], 8080)),
        limits: Limits { rows: 8, step_tokens: 256, batching: Batching::Mixed },
        queue: 64,
        max_length: 2048,
    };
    let mut load = Load { clients: 8, rate: None, time: Duration::from_secs(20), prompt: 32, tokens: 32 };
    let mut bench = false;
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(None),
            Value(command) if command == "bench" => bench = true,
            Long("model") => settings.model = parser.value()?.into(),
            Long("adapters") => settings.adapters = Some(parser.value()?.into()),
            Long("adapter") => settings.adapter.push(parser.value()?.parse_with(named)?),
            Long("scheme") => settings.quantize = scheme(&parser.value()?.string()?)?,
            Long("dtype") => settings.dtype = Some(parser.value()?.parse_with(dtype)?),
            Long("device") => settings.device = parser.value()?.parse_with(device)?,
            Long("address") => settings.address = parser.value()?.parse()?,
            Long("rows") => settings.limits.rows = parser.value()?.parse()?,
            Long("step-tokens") => settings.limits.step_tokens = parser.value()?.parse()?,
            Long("queue") => settings.queue = parser.value()?.parse()?,
            Long("max-length") => settings.max_length = parser.value()?.parse()?,
            Long("batching") => settings.limits.batching = parser.value()?.parse_with(batching)?,
            Long("clients") if bench => load.clients = parser.value()?.parse()?,
            Long("rate") if bench => load.rate = Some(parser.value()?.parse()?),
            Long("seconds") if bench => load.time = parser.value()?.parse_with(seconds)?,
            Long("prompt") if bench => load.prompt = parser.value()?.parse()?,
            Long("tokens") if bench => load.tokens = parser.value()?.parse()?,
            _ => return Err(arg.unexpected().into()),
        }
    }
    if settings.model.as_os_str().is_empty() {
        return Err("--model is missing; see --help".into());
    }
    let Limits { rows, step_tokens, .. } = settings.limits;
    if [rows, step_tokens, settings.queue, settings.max_length, load.clients].contains(&0) {
        return Err("--rows, --step-tokens, --queue, --max-length and --clients: expected numbers above 0".into());
    }
    Ok(Some((settings, bench.then_some(load))))
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, folder) = text.split_once('=').ok_or("expected NAME=DIR")?;
    check_name(name)?;
    Ok((name.into(), folder.into()))
}

fn batching(name: &str) -> Result<Batching, &'static str> {
    match name {
        "mixed" => Ok(Batching::Mixed),
        "single" => Ok(Batching::Single),
        _ => Err("expected mixed or single"),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "expected a number")?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
