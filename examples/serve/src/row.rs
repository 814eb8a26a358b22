//! A request that the model is at.

use crate::adapters::Version;
use crate::llama::Config;
use crate::llama::cache::Cache;
use crate::queue::{Answer, Completion, Job};
use crate::sample;
use crate::text::Text;
use std::time::Instant;
use tch::{Device, Kind};

pub struct Row {
    /// The adapter that it began with.
    pub version: Version,
    /// The prompt and the answer so far.
    pub tokens: Vec<i64>,
    /// How many of them are the prompt.
    pub prompt: usize,
    /// Of the tokens that the model has seen.
    pub cache: Cache,
    pub arrived: Instant,
    pub answer: Answer<Completion>,
    max_tokens: usize,
    temperature: f64,
    stop: Vec<String>,
    rng: fastrand::Rng,
}

impl Row {
    pub fn new(job: Job, version: Version, config: &Config, kind: Kind, device: Device) -> Self {
        let Job { prompt: tokens, max_tokens, temperature, seed, stop, arrived, answer, .. } = job;
        let cache = Cache::new(config, tokens.len() + max_tokens, kind, device);
        let (prompt, rng) = (tokens.len(), fastrand::Rng::with_seed(seed));
        Row { version, tokens, prompt, cache, arrived, answer, max_tokens, temperature, stop, rng }
    }

    /// The next token.
    pub fn choose(&mut self, logits: &[f32]) -> i64 {
        sample::choose(logits, self.temperature, &mut self.rng)
    }

    /// Takes the next token in. Answers the completion once there is no more to come.
    pub fn push(&mut self, token: i64, ends: &[i64], text: &Text) -> Result<Option<Completion>, String> {
        let ended = ends.contains(&token);
        if !ended {
            self.tokens.push(token);
        }
        let tokens = self.tokens.len() - self.prompt;
        let done = ended || tokens == self.max_tokens;
        if !done && self.stop.is_empty() {
            return Ok(None);
        }
        let mut text = text.added(&self.tokens, self.prompt)?;
        let stop = self.stop.iter().filter_map(|stop| text.find(stop)).min();
        if let Some(at) = stop {
            text.truncate(at);
        }
        let finish_reason = if ended || stop.is_some() { "stop" } else { "length" };
        Ok((done || stop.is_some()).then_some(Completion { text, tokens, finish_reason }))
    }
}
