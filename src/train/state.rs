//! State that is exported by name, compared, and brought back.

use super::compare::same_config;
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use tch::Tensor;

/// Something of a run that changes from step to step and comes back exactly:
/// an EMA, a loss scaler, accumulated gradients, a random generator, …
///
/// The optimizer has a trait of its own, [`Optimizer`](super::Optimizer).
///
/// ```
/// use serde_json::json;
/// use tch_peft::{Result, State, Stateful};
///
/// /// How many examples were too long.
/// struct Skipped(u64);
///
/// impl Stateful for Skipped {
///     fn export_state(&self) -> Result<State> {
///         let (settings, values) = (json!(null), json!(self.0));
///         Ok(State { kind: "skipped".into(), settings, values, tensors: Default::default() })
///     }
///
///     fn check_state(&self, state: &State) -> Result<()> {
///         let found = format!("{} of kind {}", state.values, state.kind);
///         let right = state.kind == "skipped" && state.values.is_u64();
///         let wrong = tch_peft::Error::Mismatch { name: "skipped".into(), expected: "a count".into(), found };
///         if right { Ok(()) } else { Err(wrong) }
///     }
///
///     fn import_state(&mut self, state: State) -> Result<()> {
///         self.check_state(&state)?;
///         self.0 = state.values.as_u64().unwrap_or_default();
///         Ok(())
///     }
/// }
/// # let mut skipped = Skipped(3);
/// # let state = skipped.export_state()?;
/// # skipped.0 = 5;
/// # skipped.import_state(state)?;
/// # assert_eq!(skipped.0, 3);
/// // A plain value that serde knows needs none of this: `OwnState::new("skipped", 0u64)`.
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub trait Stateful {
    /// A copy of the state, which later steps don't change.
    ///
    /// # Errors
    /// libtorch's.
    fn export_state(&self) -> Result<State>;

    /// The same for who is done with it before the next step: the tensors may
    /// be the run's own, to be read only. Checkpoints are made of it.
    ///
    /// # Errors
    /// libtorch's.
    fn lend_state(&self) -> Result<State> {
        self.export_state()
    }

    /// Tells whether [`Stateful::import_state`] would accept the state.
    ///
    /// # Errors
    /// [`Error::DifferentConfig`] for another kind or other settings,
    /// [`Error::Keys`] for missing or unexpected tensors, [`Error::Mismatch`]
    /// for another shape or dtype or for values that can't be read.
    fn check_state(&self, state: &State) -> Result<()>;

    /// Replaces the state. On an error nothing has changed.
    ///
    /// # Errors
    /// Those of [`Stateful::check_state`], and libtorch's.
    fn import_state(&mut self, state: State) -> Result<()>;
}

/// The state of a [`Stateful`].
#[derive(Debug)]
pub struct State {
    /// Which type it is of, such as `ema`.
    pub kind: String,
    /// What was chosen when it was made. That of the checkpoint and that of the
    /// run must be the same, field by field.
    pub settings: Value,
    /// What changes from step to step and is not a tensor.
    pub values: Value,
    /// What changes from step to step, by name.
    pub tensors: BTreeMap<String, Tensor>,
}

/// The tensors that a state must have, by name.
pub(super) type Expected<'a> = BTreeMap<String, &'a Tensor>;

/// Copies of lent tensors, which later steps don't change.
pub(super) fn owned(lent: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    lent.into_iter().map(|(name, tensor)| Ok((name, tensor.f_detach_copy()?))).collect()
}

/// Refuses a state of another kind.
pub(super) fn same_kind(what: &str, recorded: &str, given: &str) -> Result<()> {
    same_config(what, &json!({"kind": recorded}), &json!({"kind": given}))
}

/// Refuses tensors that lack a name or have one too many.
pub(super) fn same_names(what: &str, expected: &Expected<'_>, found: &BTreeMap<String, Tensor>) -> Result<()> {
    let missing: Vec<_> = expected.keys().filter(|name| !found.contains_key(*name)).cloned().collect();
    let unexpected: Vec<_> = found.keys().filter(|name| !expected.contains_key(*name)).cloned().collect();
    if missing.is_empty() && unexpected.is_empty() {
        return Ok(());
    }
    Err(Error::Keys { path: PathBuf::from(format!("{what} state")), missing, unexpected })
}

/// Refuses tensors of another shape or dtype; the names are the same.
pub(super) fn same_shapes(expected: &Expected<'_>, found: &BTreeMap<String, Tensor>) -> Result<()> {
    let describe = |t: &Tensor| Ok::<_, Error>(format!("{:?} {:?}", t.f_kind()?, t.size()));
    for (name, tensor) in expected {
        let (expected, found) = (describe(tensor)?, describe(&found[name])?);
        if expected != found {
            return Err(Error::Mismatch { name: name.clone(), expected, found });
        }
    }
    Ok(())
}

/// A tensor for each expected one, on its device, with the value found; all
/// are made before any is used, so that a device out of memory changes nothing.
pub(super) fn copies(expected: &Expected<'_>, found: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    let copy = |(name, tensor): (&String, &&Tensor)| {
        let mut copy = tensor.f_detach()?.f_empty_like()?;
        copy.f_copy_(&found[name])?;
        Ok((name.clone(), copy))
    };
    expected.iter().map(copy).collect()
}

/// The values of a state as a type.
pub(super) fn read_values<T: DeserializeOwned>(values: &Value) -> Result<T> {
    T::deserialize(values).map_err(|error| Error::Mismatch {
        name: "values".into(),
        expected: format!("{} ({error})", std::any::type_name::<T>()),
        found: values.to_string(),
    })
}
