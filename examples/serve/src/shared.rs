//! What the HTTP side and the model's thread both see.

use crate::adapters::BASE;
use crate::metrics::Metrics;
use crate::queue::Queue;
use crate::text::Text;
use std::sync::{PoisonError, RwLock};

pub struct Shared {
    pub queue: Queue,
    pub metrics: Metrics,
    pub text: Text,
    adapters: RwLock<Vec<String>>,
}

impl Shared {
    pub fn new(queue: Queue, text: Text) -> Self {
        Shared { queue, metrics: Metrics::default(), text, adapters: RwLock::default() }
    }

    /// What requests can name: the base, then the adapters, sorted.
    pub fn models(&self) -> Vec<String> {
        let adapters = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        std::iter::once(BASE.to_string()).chain(adapters.iter().cloned()).collect()
    }

    pub fn set_adapters(&self, names: Vec<String>) {
        *self.adapters.write().unwrap_or_else(PoisonError::into_inner) = names;
    }
}
