//! Steps over several micro-batches.

use super::state::{Expected, State, Stateful, copies, owned, read_values, same_kind, same_names, same_shapes};
use crate::error::{Error, Result};
use crate::ffi::context::set_grad;
use crate::model::NamedParameter;
use crate::train::compare::same_config;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tch::Tensor;

const KIND: &str = "gradient_accumulation";

/// Counts the micro-batches of a step, and saves the gradients gathered so
/// far, so that a checkpoint in mid-accumulation resumes there.
///
/// ```no_run
/// # use tch_peft::{AdamW, GradientAccumulation, NamedParameter, Optimizer};
/// # fn train(mut optimizer: AdamW, parameters: Vec<NamedParameter>, loss: tch::Tensor) -> tch_peft::Result<()> {
/// let mut accumulation = GradientAccumulation::new(4, parameters)?;
/// // For each micro-batch:
/// accumulation.scale(&loss)?.f_backward()?;
/// if accumulation.count() {
///     optimizer.step()?;
///     optimizer.zero_grad()?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GradientAccumulation {
    steps: u64,
    done: u64,
    parameters: Vec<NamedParameter>,
}

/// What changes from one micro-batch to the next, besides the gradients.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    micro_step: u64,
    /// The parameters that have a gradient.
    gradients: Vec<String>,
}

impl GradientAccumulation {
    /// Steps of `steps` micro-batches, over the parameters that the optimizer has.
    ///
    /// # Errors
    /// [`Error::Config`] for no steps, and for a name given twice.
    pub fn new(steps: u64, parameters: Vec<NamedParameter>) -> Result<Self> {
        if steps == 0 {
            return Err(Error::config("gradient_accumulation_steps", "at least 1", steps));
        }
        let mut names: Vec<_> = parameters.iter().map(|parameter| &parameter.name).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::config("parameters", "each name once", format!("{} twice", pair[0])));
        }
        Ok(GradientAccumulation { steps, done: 0, parameters })
    }

    /// The loss of a micro-batch as its share in the step's mean.
    ///
    /// # Errors
    /// libtorch's.
    pub fn scale(&self, loss: &Tensor) -> Result<Tensor> {
        Ok(loss.f_div_scalar(self.steps as f64)?)
    }

    /// Counts a micro-batch whose backward pass is done; true when it was the
    /// last of its step.
    pub fn count(&mut self) -> bool {
        self.done = (self.done + 1) % self.steps;
        self.done == 0
    }

    /// Micro-batches of the current step that are done.
    pub fn micro_step(&self) -> u64 {
        self.done
    }

    fn settings(&self) -> Value {
        let names: Vec<_> = self.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        json!({"gradient_accumulation_steps": self.steps, "parameters": names})
    }

    /// The parameters that have a gradient there; gradients are like them.
    fn expected(&self, position: &Position) -> Expected<'_> {
        let recorded = self.parameters.iter().filter(|parameter| position.gradients.contains(&parameter.name));
        recorded.map(|parameter| (parameter.name.clone(), &parameter.tensor)).collect()
    }

    fn read(&self, state: &State) -> Result<Position> {
        same_kind("gradient accumulation", &state.kind, KIND)?;
        same_config("gradient accumulation", &state.settings, &self.settings())?;
        let position: Position = read_values(&state.values)?;
        if position.micro_step >= self.steps {
            return Err(Error::config("micro_step", format!("below {}", self.steps), position.micro_step));
        }
        let expected = self.expected(&position);
        same_names("gradient accumulation", &expected, &state.tensors)?;
        same_shapes(&expected, &state.tensors)?;
        Ok(position)
    }
}

impl Stateful for GradientAccumulation {
    fn export_state(&self) -> Result<State> {
        let lent = self.lend_state()?;
        Ok(State { tensors: owned(lent.tensors)?, ..lent })
    }

    fn lend_state(&self) -> Result<State> {
        let mut tensors = BTreeMap::new();
        for NamedParameter { name, tensor } in &self.parameters {
            let grad = tensor.f_grad()?;
            if grad.defined() {
                tensors.insert(name.clone(), grad);
            }
        }
        let position = Position { micro_step: self.done, gradients: tensors.keys().cloned().collect() };
        Ok(State { kind: KIND.into(), settings: self.settings(), values: json!(position), tensors })
    }

    fn check_state(&self, state: &State) -> Result<()> {
        self.read(state).map(drop)
    }

    fn import_state(&mut self, state: State) -> Result<()> {
        let position = self.read(&state)?;
        let grads = copies(&self.expected(&position), &state.tensors)?;
        for NamedParameter { name, tensor } in &self.parameters {
            set_grad(tensor, grads.get(name))?;
        }
        self.done = position.micro_step;
        Ok(())
    }
}
