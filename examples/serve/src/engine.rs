//! The model's thread: every step runs all requests that have a row, whatever
//! their adapters are, and whether they are at their prompt or at their answer.

use crate::adapters::Adapters;
use crate::args::Settings;
use crate::files::{base, found};
use crate::llama::cache::Part;
use crate::llama::{Config, Result};
use crate::queue::{Arrived, Change, Job, Loaded};
use crate::refusal::Refusal;
use crate::row::Row;
use crate::shared::Shared;
use std::cmp::Reverse;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Which requests may be in one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batching {
    /// Those of any adapters.
    Mixed,
    /// Those of one adapter, in turns of up to two batches; to compare with.
    Single,
}

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests in a batch.
    pub rows: usize,
    /// Tokens in a step. Longer prompts take several steps, so that they don't
    /// hold up the answers of others.
    pub step_tokens: usize,
    pub batching: Batching,
}

pub struct Engine {
    adapters: Adapters,
    config: Config,
    /// Of keys and values.
    kind: Kind,
    device: Device,
    limits: Limits,
    shared: Arc<Shared>,
    rows: Vec<Row>,
    /// With [`Batching::Single`], whose turn it is and for how many more requests.
    turn: Option<(String, usize)>,
}

impl Engine {
    /// The base, and the adapters in the folder of all and of the command line;
    /// each with how many milliseconds it took.
    pub fn load_all(settings: &Settings, shared: Arc<Shared>) -> Result<(Self, Vec<(String, f64)>)> {
        let config = Config::read(&settings.model)?;
        let (kind, device, limits) = (settings.dtype.unwrap_or(config.kind()), settings.device, settings.limits);
        let start = Instant::now();
        let adapters = Adapters::new(base(settings, kind)?)?;
        let mut times = vec![("base".to_string(), start.elapsed().as_secs_f64() * 1e3)];
        let mut engine = Engine { adapters, config, kind, device, limits, shared, rows: Vec::new(), turn: None };
        for (name, folder) in found(settings)? {
            let at = |error| format!("{}: {error}", folder.display());
            times.push((name.clone(), engine.load(&name, &folder).map_err(at)?.milliseconds));
        }
        Ok((engine, times))
    }

    /// Until the queue is closed and all that it held is answered.
    pub fn run(mut self) {
        let _no_grad = tch::no_grad_guard();
        while let Some(arrived) = self.take() {
            self.shared.metrics.cancelled(arrived.cancelled);
            arrived.changes.into_iter().for_each(|change| self.change(change));
            // A `tch::nn` module has no way to report an error and panics. That
            // ends the requests of this step, not the server.
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                arrived.jobs.into_iter().for_each(|job| self.admit(job));
                self.drop_cancelled();
                self.step()?;
                self.adapters.sweep()
            }));
            let error = match outcome {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(panic) => panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "panicked".into()),
            };
            self.shared.metrics.failed(self.rows.len());
            for row in self.rows.drain(..) {
                let _ = row.answer.send(Err(Refusal::Failed(error.clone())));
            }
        }
    }

    fn take(&mut self) -> Option<Arrived> {
        let mut room = self.limits.rows - self.rows.len();
        if self.rows.is_empty() {
            self.turn = None;
        }
        let Engine { limits, turn, rows, shared, .. } = self;
        shared.queue.take(rows.is_empty(), |job| {
            let may = room > 0
                && match limits.batching {
                    Batching::Mixed => true,
                    Batching::Single => {
                        let (adapter, left) = turn.get_or_insert_with(|| (job.adapter.clone(), 2 * limits.rows));
                        let may = *adapter == job.adapter && *left > 0;
                        *left -= usize::from(may);
                        may
                    }
                };
            room -= usize::from(may);
            may
        })
    }

    fn change(&mut self, change: Change) {
        // Whoever asked may have gone away; the change is made all the same.
        match change {
            Change::Load { name, folder, answer } => {
                let _ = answer.send(self.load(&name, &folder).map_err(|error| Refusal::Adapter(error.to_string())));
            }
            Change::Unload { name, answer } => {
                let found = self.adapters.unload(&name);
                self.shared.set_adapters(self.adapters.names());
                let unknown = || Refusal::UnknownAdapter { name, known: self.shared.models() };
                let _ = answer.send(found.then_some(()).ok_or_else(unknown));
            }
        }
    }

    /// Loads an adapter and tells the HTTP side.
    fn load(&mut self, name: &str, folder: &Path) -> Result<Loaded> {
        let start = Instant::now();
        let swapped = self.adapters.load(name, folder)?;
        self.shared.set_adapters(self.adapters.names());
        Ok(Loaded { swapped, milliseconds: start.elapsed().as_secs_f64() * 1e3 })
    }

    fn admit(&mut self, job: Job) {
        match self.adapters.get(&job.adapter) {
            Some(version) => self.rows.push(Row::new(job, version, &self.config, self.kind, self.device)),
            None => {
                let refusal = Refusal::UnknownAdapter { name: job.adapter, known: self.shared.models() };
                let _ = job.answer.send(Err(refusal));
            }
        }
    }

    fn drop_cancelled(&mut self) {
        let before = self.rows.len();
        self.rows.retain(|row| !row.answer.is_closed());
        self.shared.metrics.cancelled(before - self.rows.len());
    }

    /// One forward pass, and the tokens that come of it.
    fn step(&mut self) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let Engine { adapters, rows, limits, shared, config, device, .. } = self;
        let model = adapters.model();
        let mut budget = limits.step_tokens;
        // The next tokens of each row, the older rows first.
        let mut next = Vec::with_capacity(rows.len());
        for (place, row) in rows.iter_mut().enumerate() {
            let left = row.tokens.len() - row.cache.length() as usize;
            // An answer takes one token, and that in every step.
            let count = if left == 1 { 1 } else { left.min(budget) };
            budget = budget.saturating_sub(count);
            next.push((place, row, count, left));
        }
        // Rows of one adapter together: such batches are faster.
        next.retain(|(_, _, count, _)| *count > 0);
        next.sort_by(|(_, one, ..), (_, other, ..)| one.version.cmp(&other.version));

        // Of each token, its adapter; of each row that is at its end, its place
        // among the rows, the place of its last token, and its adapter.
        let (mut of_tokens, mut ready, mut ends, mut of_rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut parts = Vec::with_capacity(next.len());
        for (place, row, count, left) in next {
            let Row { tokens, cache, version, .. } = row;
            of_tokens.extend(std::iter::repeat_n(&**version, count));
            if count == left {
                ready.push(place);
                ends.push(of_tokens.len() as i64 - 1);
                of_rows.push(&**version);
            }
            let from = tokens.len() - left;
            parts.push(Part { tokens: &tokens[from..from + count], cache });
        }
        shared.metrics.step(parts.len(), ready.len());
        let mixed = model.mixed_batch(&of_tokens)?;
        let features = model.module().extend(&mut parts);
        drop(mixed);
        if ready.is_empty() {
            return Ok(());
        }
        // The last layer's output for other tokens isn't needed.
        let features = features.f_index_select(0, &Tensor::from_slice(&ends).f_to_device(*device)?)?;
        let mixed = model.mixed_batch(&of_rows)?;
        let logits = model.module().logits(&features).f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        drop(mixed);
        let logits = Vec::<Vec<f32>>::try_from(&logits)?;
        // From behind, since finished rows leave.
        let mut ready: Vec<_> = ready.into_iter().zip(logits).collect();
        ready.sort_by_key(|(place, _)| Reverse(*place));
        for (place, logits) in ready {
            let token = rows[place].choose(&logits);
            let Some(outcome) = rows[place].push(token, config.ends(), &shared.text).transpose() else { continue };
            let row = rows.remove(place);
            match &outcome {
                Ok(_) => shared.metrics.completed(row.prompt, row.arrived.elapsed()),
                Err(_) => shared.metrics.failed(1),
            }
            let _ = row.answer.send(outcome.map_err(Refusal::Failed));
        }
        Ok(())
    }
}

impl Drop for Engine {
    /// However the thread ends, nobody is left waiting for it.
    fn drop(&mut self) {
        self.shared.queue.close();
        self.shared.queue.take(false, |_| true);
    }
}
