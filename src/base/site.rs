//! What an adapted weight carries: the frozen weight and the adapters on it.

use super::mixed::MixedRows;
use crate::error::{Error, Result};
use crate::ffi::hook::{Operator, WeightSite};
use crate::quant::PackedWeight;
use crate::quant::frozen::{frozen, on_dense};
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

    /// Whether it takes part where the weight is used as a stack of matrices.
    fn follows_stacks(&self) -> bool {
        false
    }

    /// What it adds to the weight: of the weight's sizes, in `kind`, differentiable.
    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor>;

    /// The value that takes the weight's place, if it doesn't add to the weight.
    fn replacement(&self) -> Option<Tensor> {
        None
    }
}

/// Adapters in the order in which they were activated.
pub(crate) type Adapters = Arc<[Arc<dyn Adapter>]>;

/// The content of an adapted weight.
pub(crate) struct Site {
    name: String,
    state: RwLock<State>,
    /// Operators that were served with the dense value, each told once.
    told: Mutex<BTreeSet<String>>,
}

#[derive(Clone)]
struct State {
    /// The base's own weight, which nothing changes but quantising it.
    frozen: Arc<dyn PackedWeight>,
    /// Adapters that are summed in the forward pass.
    active: Adapters,
    /// A weight into which adapters were merged, and those.
    merged: Option<(Arc<dyn PackedWeight>, Adapters)>,
    /// The adapter of each row, while a batch is mixed.
    mixed: Option<Arc<MixedRows>>,
}

impl State {
    /// The weight of the forward pass: the merged one, unless its adapters are
    /// turned off.
    fn weight(&self) -> &Arc<dyn PackedWeight> {
        match &self.merged {
            Some((weight, adapters)) if adapters.iter().any(|adapter| adapter.active()) => weight,
            _ => &self.frozen,
        }
    }

    fn live(&self) -> impl Iterator<Item = &Arc<dyn Adapter>> {
        self.active.iter().filter(|adapter| adapter.active())
    }
}

impl Site {
    pub(crate) fn new(name: &str, frozen: Arc<dyn PackedWeight>) -> Self {
        let state = RwLock::new(State { frozen, active: Arc::new([]), merged: None, mixed: None });
        Site { name: name.into(), state, told: Mutex::default() }
    }

    fn state(&self) -> State {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// The name of the weight.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The base's own weight, whatever was merged into it.
    pub(crate) fn frozen(&self) -> Arc<dyn PackedWeight> {
        self.state().frozen
    }

    pub(crate) fn replace_frozen(&self, frozen: Arc<dyn PackedWeight>) {
        self.change(|state| state.frozen = frozen);
    }

    /// Whether adapters are active on it or merged into it.
    pub(crate) fn is_adapted(&self) -> bool {
        let state = self.state();
        !state.active.is_empty() || state.merged.is_some()
    }

    /// The adapters that take part from now on.
    pub(crate) fn set_active(&self, adapters: impl IntoIterator<Item = Arc<dyn Adapter>>) {
        let active = adapters.into_iter().collect();
        self.change(|state| state.active = active);
    }

    /// Uses `merged`, into which these adapters went, in place of the frozen
    /// weight; `None` takes the frozen one again, bit by bit as it was.
    pub(crate) fn set_merged(&self, merged: Option<(Arc<dyn PackedWeight>, Adapters)>) {
        self.change(|state| state.merged = merged);
    }

    /// Gives each row of a batch its own adapter, in place of the active ones.
    pub(crate) fn set_mixed(&self, mixed: Option<Arc<MixedRows>>) {
        self.change(|state| state.mixed = mixed);
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let State { frozen, active, merged, .. } = self.state();
        let (name, merged) = (&self.name, merged.map(|(weight, _)| weight));
        let mut s = f.debug_struct("Site");
        s.field("name", name).field("frozen", &frozen).field("active", &active).field("merged", &merged).finish()
    }
}

impl WeightSite for Site {
    fn apply(&self, operator: &Operator) -> Result<Tensor> {
        let state = self.state();
        let weight = state.weight();
        let stacks = state.mixed.is_none() && state.live().all(|adapter| adapter.follows_stacks());
        if operator.is_of_stack() && !stacks {
            return on_dense(&self.dense("select")?, operator);
        }
        if let Some(mixed) = &state.mixed {
            return mixed.apply(weight, operator);
        }
        let mut live = state.live();
        let Some(first) = live.next() else { return frozen(weight, operator) };
        let mut y = first.apply(weight, operator)?;
        for adapter in live {
            if let Some(addition) = adapter.addition(weight, operator)? {
                y = y.f_add(&addition)?.f_to_kind(y.f_kind()?)?;
            }
        }
        Ok(y)
    }

    fn dense(&self, op: &str) -> Result<Tensor> {
        let state = self.state();
        if state.mixed.is_some() {
            let expected = "operators on one row of the batch each (linear, convolution, embedding)";
            return Err(Error::config("mixed_batch", expected, format!("`{op}` on {}", self.name)));
        }
        let weight = state.weight();
        if let Some(value) = state.live().find_map(|adapter| adapter.replacement()) {
            return Ok(value.f_to_kind(weight.kind())?);
        }
        let first = self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(op.to_string());
        if first {
            tracing::debug!(weight = %self.name, op, "served with the dense weight: right, but slower than a kernel");
        }
        let dense = match weight.as_dense() {
            Some(dense) => dense,
            None => weight.dequantize(weight.kind())?,
        };
        let mut sum: Option<Tensor> = None;
        for adapter in state.live() {
            let delta = adapter.delta(weight, weight.kind())?;
            sum = Some(sum.as_ref().unwrap_or(&dense).f_add(&delta)?);
        }
        match sum {
            Some(sum) => Ok(sum),
            // A copy of its own, so that no operator reaches the frozen bytes.
            None if weight.as_dense().is_some() => {
                let mut copy = dense.f_empty_like()?;
                copy.f_copy_(&dense)?;
                Ok(copy)
            }
            None => Ok(dense),
        }
    }
}
