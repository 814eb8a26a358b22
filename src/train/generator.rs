//! A random generator of the crate's own.

use super::normal::inverse_normal;
use super::splitmix::SplitMix64;
use super::state::{State, Stateful, read_values, same_kind, same_names};
use crate::error::{Error, Result};
use crate::train::compare::same_config;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

const KIND: &str = "generator";

/// Random tensors for what a training loop draws itself, such as noise and
/// timesteps in diffusion.
///
/// The numbers depend on the seed and on how many were drawn before, and on
/// nothing else: they are the same in every version of this crate and of
/// libtorch, on every machine and whatever the device of the result. Each
/// value takes one number of a SplitMix64 stream, so the state is a count.
/// Not for secrets.
///
/// ```
/// use tch::Device;
/// use tch_peft::Generator;
///
/// let mut generator = Generator::new(7);
/// let noise = generator.normal(&[2, 4], Device::Cpu)?;
/// let timesteps = generator.integers(0, 1000, &[2], Device::Cpu)?;
/// assert_eq!((noise.size(), timesteps.size(), generator.drawn()), (vec![2, 4], vec![2], 10));
/// # assert!(Generator::new(7).normal(&[2, 4], Device::Cpu)?.equal(&noise));
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Generator {
    seed: u64,
    drawn: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    drawn: u64,
}

impl Generator {
    /// The stream of this seed, from its beginning.
    pub fn new(seed: u64) -> Self {
        Generator { seed, drawn: 0 }
    }

    /// How many values were drawn so far.
    pub fn drawn(&self) -> u64 {
        self.drawn
    }

    /// f32 values, evenly spread over `0 <= x < 1` in steps of 2^-24.
    ///
    /// # Errors
    /// [`Error::Config`] for a negative size; libtorch's.
    pub fn uniform(&mut self, shape: &[i64], device: Device) -> Result<Tensor> {
        let value = |bits: u64| (bits >> 40) as f32 / (1u32 << 24) as f32;
        place(&self.draw(shape, value)?, shape, device)
    }

    /// f32 values of the standard normal distribution: its inverse (Wichura,
    /// algorithm AS 241) at evenly spread probabilities of 53 bits, so that
    /// magnitudes go up to 8.2.
    ///
    /// # Errors
    /// [`Error::Config`] for a negative size; libtorch's.
    pub fn normal(&mut self, shape: &[i64], device: Device) -> Result<Tensor> {
        // Never 0 or 1: the odd multiples of 2^-53.
        let value = |bits: u64| inverse_normal(((bits >> 12) as f64 + 0.5) / (1u64 << 52) as f64) as f32;
        place(&self.draw(shape, value)?, shape, device)
    }

    /// i64 values in `low..high`, all equally likely but for a bias below
    /// (high - low) / 2^64.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty range or a negative size; libtorch's.
    pub fn integers(&mut self, low: i64, high: i64, shape: &[i64], device: Device) -> Result<Tensor> {
        if low >= high {
            return Err(Error::config("high", format!("above low, which is {low}"), high));
        }
        let range = u128::from(high.abs_diff(low));
        let value = |bits: u64| low.wrapping_add(((u128::from(bits) * range) >> 64) as i64);
        place(&self.draw(shape, value)?, shape, device)
    }

    fn draw<T: Send>(&mut self, shape: &[i64], value: impl Fn(u64) -> T + Sync) -> Result<Vec<T>> {
        let size = |&d: &i64| u64::try_from(d).ok();
        let count = shape.iter().try_fold(1u64, |n, d| n.checked_mul(size(d)?));
        let count = count.ok_or_else(|| Error::config("shape", "sizes of at least 0", format!("{shape:?}")))?;
        let start = SplitMix64::of(self.seed, 0).skip(self.drawn);
        let values = (0..count).into_par_iter().map(|i| value(start.skip(i).next())).collect();
        self.drawn = self.drawn.wrapping_add(count);
        Ok(values)
    }

    fn settings(&self) -> Value {
        json!({"seed": self.seed})
    }
}

fn place<T: tch::kind::Element>(values: &[T], shape: &[i64], device: Device) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?.f_view(shape)?.f_to_device(device)?)
}

impl Stateful for Generator {
    fn export_state(&self) -> Result<State> {
        let values = json!(Position { drawn: self.drawn });
        Ok(State { kind: KIND.into(), settings: self.settings(), values, tensors: BTreeMap::new() })
    }

    fn check_state(&self, state: &State) -> Result<()> {
        same_kind("generator", &state.kind, KIND)?;
        same_names("generator", &BTreeMap::new(), &state.tensors)?;
        same_config("generator", &state.settings, &self.settings())?;
        read_values::<Position>(&state.values).map(drop)
    }

    fn import_state(&mut self, state: State) -> Result<()> {
        self.check_state(&state)?;
        self.drawn = read_values::<Position>(&state.values)?.drawn;
        Ok(())
    }
}
