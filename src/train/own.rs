//! A caller's own value among the states of a run.

use super::state::{State, Stateful, read_values, same_kind, same_names};
use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

/// A value of the caller's that changes from step to step and comes back with
/// the run: the buckets of a sampler of one's own, a running loss, …
///
/// ```
/// # use std::collections::VecDeque;
/// use tch_peft::OwnState;
/// // Examples that wait in buckets of one length each.
/// let mut buckets = OwnState::new("buckets", vec![VecDeque::<usize>::new(); 4]);
/// buckets[2].push_back(17);
/// ```
#[derive(Debug, Clone)]
pub struct OwnState<T> {
    kind: String,
    value: T,
}

impl<T: Serialize + DeserializeOwned> OwnState<T> {
    /// `kind` tells values of different meaning apart when they come back.
    pub fn new(kind: impl Into<String>, value: T) -> Self {
        OwnState { kind: kind.into(), value }
    }

    /// The value alone.
    pub fn into_inner(self) -> T {
        self.value
    }
}

impl<T> Deref for OwnState<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for OwnState<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: Serialize + DeserializeOwned> Stateful for OwnState<T> {
    /// # Errors
    /// [`Error::Config`] for a value that would not come back from JSON, such
    /// as an infinite number.
    fn export_state(&self) -> Result<State> {
        let refused = |error| {
            let expected = format!("a value of {} that JSON can hold", std::any::type_name::<T>());
            Error::config(&self.kind, expected, error)
        };
        let values = serde_json::to_value(&self.value).map_err(refused)?;
        T::deserialize(&values).map_err(refused)?;
        Ok(State { kind: self.kind.clone(), settings: json!({}), values, tensors: BTreeMap::new() })
    }

    fn check_state(&self, state: &State) -> Result<()> {
        same_kind("own state", &state.kind, &self.kind)?;
        same_names("own state", &BTreeMap::new(), &state.tensors)?;
        read_values::<T>(&state.values).map(drop)
    }

    fn import_state(&mut self, state: State) -> Result<()> {
        self.check_state(&state)?;
        let State { values, .. } = state;
        self.value = read_values::<T>(&values)?;
        Ok(())
    }
}
