//! Which examples come next, as a position that can be saved.

use crate::error::{Error, Result};
use crate::train::compare::same_config;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Hands out batches of indices into a data set, epoch after epoch.
///
/// Each epoch visits each index once, in an order that depends on the seed and
/// the epoch only: the same on every platform and in every version of this
/// crate. The position is two numbers, so resuming costs nothing.
///
/// A batch counts as used once [`Sampler::next_batch`] has handed it out; a
/// program that fetches batches ahead of the step that uses them must not save
/// in between.
#[derive(Debug, Clone)]
pub struct Sampler {
    state: SamplerState,
    /// The order of the current epoch.
    order: Vec<usize>,
}

/// The settings and the position of a [`Sampler`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// Seed of the orders.
    pub seed: u64,
    /// Examples in the data set.
    pub len: usize,
    /// Examples in a batch.
    pub batch_size: usize,
    /// Whether epochs are shuffled.
    pub shuffle: bool,
    /// Whether a last batch with fewer examples is left out.
    pub drop_last: bool,
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// Examples of this epoch that were handed out.
    pub index: usize,
}

impl Sampler {
    /// Shuffled epochs of `len` examples in batches of `batch_size`; the last
    /// batch of an epoch may be smaller.
    ///
    /// # Errors
    /// [`Error::Config`] if there are no examples, or `batch_size` is not in
    /// `1..=len`.
    pub fn new(len: usize, batch_size: usize, seed: u64) -> Result<Self> {
        if len == 0 {
            return Err(Error::config("len", "at least 1 example", len));
        }
        if !(1..=len).contains(&batch_size) {
            return Err(Error::config("batch_size", format!("1 to {len}, the number of examples"), batch_size));
        }
        let state = SamplerState { seed, len, batch_size, shuffle: true, drop_last: false, epoch: 0, index: 0 };
        Ok(Sampler { order: order(&state), state })
    }

    /// Whether to leave out a last batch with fewer than `batch_size` examples.
    pub fn drop_last(mut self, on: bool) -> Self {
        self.state.drop_last = on;
        self
    }

    /// Whether to shuffle; if not, each epoch runs from 0 to `len - 1`.
    pub fn shuffle(mut self, on: bool) -> Self {
        self.state.shuffle = on;
        self.order = order(&self.state);
        self
    }

    /// The next batch; never empty. Epochs follow each other without end.
    pub fn next_batch(&mut self) -> Vec<usize> {
        let SamplerState { len, batch_size, drop_last, index, .. } = self.state;
        let rest = len - index;
        if rest == 0 || (drop_last && rest < batch_size) {
            self.state.epoch += 1;
            self.state.index = 0;
            self.order = order(&self.state);
        }
        let start = self.state.index;
        self.state.index = len.min(start + batch_size);
        self.order[start..self.state.index].to_vec()
    }

    /// The epoch of the batch handed out last, counted from 0.
    pub fn epoch(&self) -> u64 {
        self.state.epoch
    }

    /// How many examples were handed out since the start of the run.
    pub fn samples(&self) -> u64 {
        let SamplerState { len, batch_size, drop_last, epoch, index, .. } = self.state;
        let in_epoch = if drop_last { len / batch_size * batch_size } else { len };
        epoch.saturating_mul(in_epoch as u64).saturating_add(index as u64)
    }

    /// The settings and the position.
    pub fn state(&self) -> &SamplerState {
        &self.state
    }

    /// Tells whether [`Sampler::set_state`] would accept the state.
    ///
    /// # Errors
    /// [`Error::DifferentConfig`] if it was saved by a sampler with other
    /// settings, [`Error::Config`] for a position beyond the data.
    pub fn check_state(&self, state: &SamplerState) -> Result<()> {
        same_config("sampler", &settings(state), &settings(&self.state))?;
        if state.index > state.len {
            return Err(Error::config("index", format!("at most {}", state.len), state.index));
        }
        Ok(())
    }

    /// Moves to a saved position. On an error nothing has changed.
    ///
    /// # Errors
    /// Those of [`Sampler::check_state`].
    pub fn set_state(&mut self, state: &SamplerState) -> Result<()> {
        self.check_state(state)?;
        self.order = order(state);
        self.state = state.clone();
        Ok(())
    }
}

fn settings(state: &SamplerState) -> serde_json::Value {
    let SamplerState { seed, len, batch_size, shuffle, drop_last, .. } = state;
    json!({"seed": seed, "len": len, "batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last})
}

/// The order of the state's epoch.
fn order(state: &SamplerState) -> Vec<usize> {
    let mut order: Vec<usize> = (0..state.len).collect();
    if state.shuffle {
        let mut random = SplitMix64::of(state.seed, state.epoch);
        // Fisher and Yates, from the back.
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i as u64 + 1) as usize);
        }
    }
    order
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators"
/// (2014). Written out here since the orders must never change.
struct SplitMix64(u64);

impl SplitMix64 {
    const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

    /// A stream of its own for each pair: the epoch is mixed first, so that
    /// neighbouring seeds and epochs don't give neighbouring streams.
    fn of(seed: u64, epoch: u64) -> Self {
        SplitMix64(seed ^ SplitMix64(epoch).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::GAMMA);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n` (not 0), each equally likely: Lemire, "Fast random
    /// integer generation in an interval" (2019).
    fn below(&mut self, n: u64) -> u64 {
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_follows_its_reference() {
        // First outputs of the reference C code (prng.di.unimi.it/splitmix64.c)
        // for state 1234567.
        let mut random = SplitMix64(1_234_567);
        let first = [random.next(), random.next(), random.next()];
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn bounded_numbers_are_even() {
        let mut random = SplitMix64(7);
        let mut counts = [0u32; 3];
        (0..30_000).for_each(|_| counts[random.below(3) as usize] += 1);
        assert!(counts.iter().all(|c| (9_700..10_300).contains(c)), "{counts:?}");
    }

    #[test]
    fn positions_beyond_the_data_are_refused() {
        let mut sampler = Sampler::new(4, 2, 0).unwrap();
        let beyond = SamplerState { index: 5, ..sampler.state().clone() };
        assert!(matches!(sampler.set_state(&beyond), Err(Error::Config { .. })));
        assert_eq!(sampler.state().index, 0);
    }
}
