//! What the HTTP side leaves for the model's thread.

use crate::refusal::Refusal;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::oneshot;

/// Where an answer goes. It is closed once the client has gone away.
pub type Answer<T> = oneshot::Sender<Result<T, Refusal>>;

/// A prompt to go on with.
pub struct Job {
    /// An adapter's name, or `base`.
    pub adapter: String,
    pub prompt: Vec<i64>,
    pub max_tokens: usize,
    /// 0 takes the likeliest token.
    pub temperature: f64,
    pub seed: u64,
    /// Texts that end the answer, and are left out of it.
    pub stop: Vec<String>,
    pub arrived: Instant,
    pub answer: Answer<Completion>,
}

/// What the model made of a prompt.
#[derive(Debug)]
pub struct Completion {
    pub text: String,
    /// How many tokens of the answer were computed.
    pub tokens: usize,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
}

/// A change of the adapters.
pub enum Change {
    /// Loads an adapter, or puts it in the place of the one of that name.
    Load {
        name: String,
        folder: PathBuf,
        answer: Answer<Loaded>,
    },
    Unload {
        name: String,
        answer: Answer<()>,
    },
}

#[derive(Debug)]
pub struct Loaded {
    /// Whether there was one of that name.
    pub swapped: bool,
    /// For how long the model's thread did nothing else.
    pub milliseconds: f64,
}

/// What the model's thread takes at a time.
pub struct Arrived {
    pub changes: Vec<Change>,
    pub jobs: Vec<Job>,
    /// Requests whose clients went away while they waited.
    pub cancelled: usize,
}

/// Jobs in the order in which they came, up to a capacity; changes go past them.
pub struct Queue {
    capacity: usize,
    waiting: Mutex<Waiting>,
    filled: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    changes: Vec<Change>,
    closed: bool,
}

impl Queue {
    pub fn new(capacity: usize) -> Self {
        Queue { capacity, waiting: Mutex::default(), filled: Condvar::new() }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// [`Refusal::Busy`] if it is full, [`Refusal::Closing`] once it is closed.
    pub fn push(&self, job: Job) -> Result<(), Refusal> {
        let mut waiting = self.waiting();
        if waiting.closed {
            return Err(Refusal::Closing);
        }
        if waiting.jobs.len() >= self.capacity {
            return Err(Refusal::Busy(waiting.jobs.len()));
        }
        waiting.jobs.push_back(job);
        self.filled.notify_one();
        Ok(())
    }

    /// # Errors
    /// [`Refusal::Closing`] once it is closed.
    pub fn change(&self, change: Change) -> Result<(), Refusal> {
        let mut waiting = self.waiting();
        if waiting.closed {
            return Err(Refusal::Closing);
        }
        waiting.changes.push(change);
        self.filled.notify_one();
        Ok(())
    }

    /// How many jobs wait.
    pub fn len(&self) -> usize {
        self.waiting().jobs.len()
    }

    /// Nothing is taken in any more; what waits is still given out.
    pub fn close(&self) {
        self.waiting().closed = true;
        self.filled.notify_one();
    }

    /// All changes, and those jobs that `admit` takes, asked about the oldest
    /// first. With `wait`, there is something, or it was closed: then `None`.
    pub fn take(&self, wait: bool, mut admit: impl FnMut(&Job) -> bool) -> Option<Arrived> {
        let mut waiting = self.waiting();
        while wait && waiting.jobs.is_empty() && waiting.changes.is_empty() {
            if waiting.closed {
                return None;
            }
            waiting = self.filled.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let before = waiting.jobs.len();
        waiting.jobs.retain(|job| !job.answer.is_closed());
        let cancelled = before - waiting.jobs.len();
        let (jobs, left): (Vec<Job>, Vec<Job>) = waiting.jobs.drain(..).partition(|job| admit(job));
        waiting.jobs = left.into();
        Some(Arrived { changes: std::mem::take(&mut waiting.changes), jobs, cancelled })
    }
}
