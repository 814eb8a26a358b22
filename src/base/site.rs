//! What an adapted weight carries: the frozen weight and the adapter on it.

use crate::error::Result;
use crate::ffi::hook::{Operator, WeightSite};
use crate::quant::PackedWeight;
use crate::quant::frozen::frozen;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tch::{Kind, Tensor};

/// An adapter on one weight. Implemented a floor above.
pub(crate) trait Adapter: fmt::Debug + Send + Sync {
    /// Whether it takes part in the forward pass now.
    fn active(&self) -> bool;

    /// What it adds to the base's result; `None` for an operator that it has
    /// no part in, as a tied weight meets them.
    fn addition(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>>;

    /// The adapted operator: the base's result and the addition, summed in the
    /// wider dtype and rounded once to the base's.
    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        let base = frozen(weight, operator)?;
        match self.addition(weight, operator)? {
            Some(addition) => Ok(base.f_add(&addition)?.f_to_kind(base.f_kind()?)?),
            None => Ok(base),
        }
    }

    /// What it adds to the weight: of the weight's sizes, in `kind`, differentiable.
    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor>;
}

/// The content of an adapted weight.
pub(crate) struct Site {
    name: String,
    state: RwLock<State>,
    /// Operators that were served with the dense value, each told once.
    told: Mutex<BTreeSet<String>>,
}

#[derive(Clone)]
struct State {
    frozen: Arc<dyn PackedWeight>,
    adapter: Option<Arc<dyn Adapter>>,
}

impl Site {
    pub(crate) fn new(name: &str, frozen: Arc<dyn PackedWeight>) -> Self {
        let state = RwLock::new(State { frozen, adapter: None });
        Site { name: name.into(), state, told: Mutex::default() }
    }

    fn state(&self) -> State {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn frozen(&self) -> Arc<dyn PackedWeight> {
        self.state().frozen
    }

    pub(crate) fn replace_frozen(&self, frozen: Arc<dyn PackedWeight>) {
        self.change(|state| state.frozen = frozen);
    }

    pub(crate) fn adapter(&self) -> Option<Arc<dyn Adapter>> {
        self.state().adapter
    }

    pub(crate) fn set_adapter(&self, adapter: Option<Arc<dyn Adapter>>) {
        self.change(|state| state.adapter = adapter);
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let State { frozen, adapter } = self.state();
        f.debug_struct("Site").field("name", &self.name).field("frozen", &frozen).field("adapter", &adapter).finish()
    }
}

impl WeightSite for Site {
    fn apply(&self, operator: &Operator) -> Result<Tensor> {
        let State { frozen: weight, adapter } = self.state();
        match adapter.filter(|adapter| adapter.active()) {
            Some(adapter) => adapter.apply(&weight, operator),
            None => frozen(&weight, operator),
        }
    }

    fn dense(&self, op: &str) -> Result<Tensor> {
        let first = self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(op.to_string());
        if first {
            tracing::debug!(weight = %self.name, op, "served with the dense weight: right, but slower than a kernel");
        }
        let State { frozen, adapter } = self.state();
        let dense = match frozen.as_dense() {
            Some(dense) => dense,
            None => frozen.dequantize(frozen.kind())?,
        };
        match adapter.filter(|adapter| adapter.active()) {
            Some(adapter) => Ok(dense.f_add(&adapter.delta(&frozen, frozen.kind())?)?),
            // A copy of its own, so that no operator reaches the frozen bytes.
            None if frozen.scheme().is_none() => {
                let mut copy = dense.f_empty_like()?;
                copy.f_copy_(&dense)?;
                Ok(copy)
            }
            None => Ok(dense),
        }
    }
}
