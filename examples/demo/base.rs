//! The base: an ordinary training run, without adapters, by the clock.

use crate::Result;
use crate::data::{self, Text};
use crate::model::Llama;
use indicatif::ProgressBar;
use std::convert::Infallible;
use std::path::Path;
use std::time::{Duration, Instant};
use tch::nn::{self, Module, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor};

const BATCH: i64 = 8;
const LEARNING_RATE: f64 = 3e-3;

/// What came of the training.
pub struct Trained {
    pub steps: u64,
    pub weights: i64,
    /// Held-out loss in nats per byte.
    pub held_out: f64,
}

/// Trains for so long and saves the weights as safetensors.
pub fn train(path: &Path, time: Duration, seed: u64, bar: &ProgressBar) -> Result<Trained> {
    tch::manual_seed(seed as i64);
    let vs = VarStore::new(Device::Cpu);
    let net = Llama::new(&vs.root());
    let text = Text::new(data::BASE_TEXT);
    let forward = |x: &Tensor| Ok::<_, Infallible>(net.forward(x));
    let mut optimizer = nn::AdamW { wd: 0.1, ..Default::default() }.build(&vs, LEARNING_RATE)?;

    let start = Instant::now();
    let mut steps = 0;
    while start.elapsed() < time {
        let passed = start.elapsed().as_secs_f64() / time.as_secs_f64();
        let warmup = (steps as f64 + 1.0) / 10.0;
        optimizer.set_lr(LEARNING_RATE * warmup.min(1.0 - 0.95 * passed));
        let rows = Tensor::randint(text.len() as i64, [BATCH], (Kind::Int64, Device::Cpu));
        let rows: Vec<usize> = Vec::<i64>::try_from(&rows)?.into_iter().map(|row| row as usize).collect();
        let loss = data::loss(&text.batch(&rows), forward)?;
        optimizer.backward_step_clip_norm(&loss, 1.0);
        steps += 1;
        bar.set_position(start.elapsed().as_millis().min(time.as_millis()) as u64);
        bar.set_message(format!("loss {:.3}", loss.double_value(&[])));
    }

    vs.save(path)?;
    let weights = vs.variables().values().map(|w| w.numel() as i64).sum();
    Ok(Trained { steps, weights, held_out: text.held_out_loss(forward)? })
}

/// A network with the saved weights.
pub fn load(path: &Path) -> Result<(VarStore, Llama)> {
    let mut vs = VarStore::new(Device::Cpu);
    let net = Llama::new(&vs.root());
    vs.load(path)?;
    Ok((vs, net))
}
