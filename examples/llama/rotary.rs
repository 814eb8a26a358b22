//! Rotary positions: each pair of features is turned by an angle that grows with
//! the position. The tables are computed, so they are no weights.

use super::Config;
use super::config::{Rope, RopeType};
use std::f32::consts::TAU;
use tch::{Device, Kind, Tensor};

/// The angles by which a step turns the pairs.
#[derive(Debug)]
pub struct Rotary {
    /// (head_dim / 2), f32.
    frequencies: Tensor,
}

/// The turns of some positions, each (time, head_dim).
pub struct Turns {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    pub fn new(config: &Config, device: Device) -> Self {
        let (dim, rope) = (config.head_dim(), config.rope());
        let theta = rope.theta as f32;
        let frequency = |pair| scale(&rope, 1.0 / theta.powf((2 * pair) as f32 / dim as f32));
        let frequencies: Vec<f32> = (0..dim / 2).map(frequency).collect();
        Rotary { frequencies: Tensor::from_slice(&frequencies).to_device(device) }
    }

    /// Of these positions (time), f32.
    pub fn turns(&self, positions: &Tensor, kind: Kind) -> Turns {
        let angles = positions.outer(&self.frequencies);
        let angles = Tensor::cat(&[&angles, &angles], 1);
        Turns { cos: angles.cos().to_kind(kind), sin: angles.sin().to_kind(kind) }
    }
}

impl Turns {
    /// Of queries or keys (batch, heads, time, head_dim). A pair is a feature of
    /// the first half and one of the second.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let turned = Tensor::cat(&[&-&halves[1], &halves[0]], -1);
        x * &self.cos + turned * &self.sin
    }
}

/// What models do that see longer texts than they were first trained on.
fn scale(rope: &Rope, frequency: f32) -> f32 {
    match rope.kind {
        RopeType::Default => frequency,
        RopeType::Linear { factor } => frequency / factor,
        // Slow turns are slowed further, fast ones kept, and those between blended.
        RopeType::Llama3 { factor, low, high, original } => {
            let turns = original * frequency / TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 - kept) * frequency / factor + kept * frequency
        }
    }
}
