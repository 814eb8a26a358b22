//! Which examples come next, as a position that can be saved.

use super::splitmix::SplitMix64;
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
/// With [`Sampler::shard`], several processes share the epochs. All follow the
/// same order and have the same position, which counts the examples of all:
/// the checkpoint of one resumes each of them.
///
/// A batch counts as used once [`Sampler::next_batch`] has handed it out; a
/// program that fetches batches ahead of the step that uses them must not save
/// in between.
///
/// ```
/// use tch_peft::Sampler;
///
/// let mut sampler = Sampler::new(5, 2, 42)?; // five examples, in batches of two
/// let mut epoch: Vec<usize> = (0..3).flat_map(|_| sampler.next_batch()).collect();
/// epoch.sort();
/// assert_eq!((epoch, sampler.epoch(), sampler.samples()), (vec![0, 1, 2, 3, 4], 0, 5));
/// sampler.next_batch();
/// assert_eq!(sampler.epoch(), 1);
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    state: SamplerState,
    /// Which of the shards this is.
    rank: usize,
    /// The order of the current epoch.
    order: Vec<usize>,
}

/// The settings and the position of a [`Sampler`].
///
/// ```
/// use tch_peft::Sampler;
///
/// let mut sampler = Sampler::new(100, 10, 42)?;
/// sampler.next_batch();
/// assert_eq!((sampler.state().epoch, sampler.state().index), (0, 10));
/// # Ok::<(), tch_peft::Error>(())
/// ```
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
    /// How many processes share each epoch.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub world: usize,
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// Examples of this epoch that were handed out, to all shards together.
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
        let state =
            SamplerState { seed, len, batch_size, shuffle: true, drop_last: false, world: 1, epoch: 0, index: 0 };
        Ok(Sampler { order: order(&state), rank: 0, state })
    }

    /// The part of process `rank` among `world` processes, each with batches of
    /// `batch_size`: of each `world * batch_size` examples in the common order,
    /// the `rank`-th `batch_size`. What is left over at the end of an epoch is
    /// divided evenly, so that some may get one example less than others, or an
    /// empty batch; [`Sampler::drop_last`] leaves it out.
    ///
    /// ```
    /// use tch_peft::Sampler;
    ///
    /// let mut first = Sampler::new(8, 2, 42)?.shard(0, 2)?; // in the first of two processes
    /// let mut second = Sampler::new(8, 2, 42)?.shard(1, 2)?;
    /// let mut all: Vec<usize> = (0..2).flat_map(|_| [first.next_batch(), second.next_batch()].concat()).collect();
    /// all.sort();
    /// assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7]);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] unless `rank` is below `world` and there are examples
    /// for a batch of each.
    pub fn shard(mut self, rank: usize, world: usize) -> Result<Self> {
        if rank >= world {
            return Err(Error::config("rank", format!("below {world}, the number of processes"), rank));
        }
        let SamplerState { len, batch_size, .. } = self.state;
        if batch_size.checked_mul(world).is_none_or(|all| all > len) {
            let expected = format!("at most {}, for a batch of each from {len} examples", len / batch_size);
            return Err(Error::config("world", expected, world));
        }
        (self.rank, self.state.world) = (rank, world);
        Ok(self)
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

    /// The next batch. Epochs follow each other without end. Never empty,
    /// except as [`Sampler::shard`] tells.
    pub fn next_batch(&mut self) -> Vec<usize> {
        let SamplerState { len, batch_size, drop_last, world, index, .. } = self.state;
        let rest = len - index;
        if rest == 0 || (drop_last && rest < batch_size * world) {
            self.state.epoch += 1;
            self.state.index = 0;
            self.order = order(&self.state);
        }
        let start = self.state.index;
        let all = (batch_size * world).min(len - start);
        self.state.index = start + all;
        // For a whole batch of each, these are multiples of `batch_size`.
        let bound = |rank: usize| start + all * rank / world;
        self.order[bound(self.rank)..bound(self.rank + 1)].to_vec()
    }

    /// The epoch of the batch handed out last, counted from 0.
    pub fn epoch(&self) -> u64 {
        self.state.epoch
    }

    /// How many examples were handed out since the start of the run, to all
    /// shards together.
    pub fn samples(&self) -> u64 {
        let SamplerState { len, batch_size, drop_last, world, epoch, index, .. } = self.state;
        let step = batch_size * world;
        let in_epoch = if drop_last { len / step * step } else { len };
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
    /// ```
    /// use tch_peft::Sampler;
    ///
    /// let mut sampler = Sampler::new(100, 10, 42)?;
    /// sampler.next_batch();
    /// let state = sampler.state().clone(); // a run does this by itself
    /// let next = sampler.next_batch();
    /// sampler.set_state(&state)?;
    /// assert_eq!(sampler.next_batch(), next);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
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
    let SamplerState { seed, len, batch_size, shuffle, drop_last, world, .. } = state;
    json!({
        "seed": seed, "len": len, "batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last, "world": world
    })
}

/// States of the first version have no `world`.
fn one() -> usize {
    1
}

fn is_one(world: &usize) -> bool {
    *world == 1
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_beyond_the_data_are_refused() {
        let mut sampler = Sampler::new(4, 2, 0).unwrap();
        let beyond = SamplerState { index: 5, ..sampler.state().clone() };
        assert!(matches!(sampler.set_state(&beyond), Err(Error::Config { .. })));
        assert_eq!(sampler.state().index, 0);
    }
}
