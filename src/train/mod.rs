//! Floor 4: what a training loop needs besides the model.
//!
//! Everything here that changes from step to step can be exported and brought
//! back exactly: the optimizer's state by parameter name ([`OptimizerState`]),
//! the position in the data ([`SamplerState`]), libtorch's random generators
//! ([`RngState`]), and all else as a [`Stateful`]. The learning rate needs no
//! state: [`Schedule::factor`] is a pure function of the step.

mod accumulate;
mod autocast;
mod clip;
pub(crate) mod compare;
mod ema;
mod generator;
mod normal;
mod optim;
mod own;
mod recompute;
mod rng;
mod sampler;
mod scaler;
mod schedule;
mod splitmix;
mod state;

pub use accumulate::GradientAccumulation;
pub use autocast::Autocast;
pub use clip::{clip_grad_norm, clip_grad_value};
pub use ema::{Ema, EmaBuilder, EmaSwap};
pub use generator::Generator;
pub use optim::{
    Adafactor, AdafactorRule, AdamW, AdamW8bit, AdamW8bitRule, AdamWBuilder, AdamWRule, GroupedOptimizer, Lion,
    LionRule, OptimizerBuilder, ParameterGroup, Sgd, SgdRule, Update, UpdateRule,
};
pub use own::OwnState;
pub use recompute::checkpoint_activations;
pub use rng::RngState;
pub(crate) use rng::device_name;
pub use sampler::{Sampler, SamplerState};
pub use scaler::LossScaler;
pub use schedule::{Anneal, Schedule};
pub use state::{State, Stateful};

use crate::error::Result;
use serde_json::Value;
use std::collections::BTreeMap;
use tch::Tensor;

/// A gradient-descent method whose whole state can be saved.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let dir = tempfile::tempdir().unwrap();
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let mut model = LoraModel::wrap(Base::new(vs, net), config)?;
/// # let mut optimizer = AdamW::builder().build(model.trainable_parameters())?;
/// # let (schedule, mut sampler) = (Schedule::constant(), Sampler::new(100, 10, 0)?);
/// let mut optimizers: Vec<Box<dyn Optimizer>> = vec![
///     Box::new(AdamW::builder().lr(1e-4).build(model.trainable_parameters())?),
///     Box::new(Lion::builder().lr(1e-5).build(model.trainable_parameters())?),
/// ];
/// for optimizer in &mut optimizers {
///     optimizer.set_learning_rate_factor(0.5); // what a run does, by its schedule
///     optimizer.step()?;
///     optimizer.zero_grad()?;
/// }
/// assert_eq!(optimizers[0].learning_rate(), 5e-5);
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub trait Optimizer {
    /// Updates the parameters from their gradients. Parameters without a
    /// gradient stay as they are, and so do their moments.
    ///
    /// # Errors
    /// libtorch's.
    fn step(&mut self) -> Result<()>;

    /// Removes the gradients, so that the next `backward` starts anew.
    ///
    /// # Errors
    /// libtorch's.
    fn zero_grad(&mut self) -> Result<()>;

    /// The learning rate that the next step uses, of the first group.
    fn learning_rate(&self) -> f64;

    /// Multiplies each group's base learning rate from now on. A schedule's
    /// factor replaces the one before it; factors don't pile up.
    fn set_learning_rate_factor(&mut self, factor: f64);

    /// A copy of the state, which later steps don't change.
    ///
    /// # Errors
    /// libtorch's.
    fn export_state(&self) -> Result<OptimizerState>;

    /// The same for who is done with it before the next step: the tensors may
    /// be the optimizer's own, to be read only. Checkpoints are made of it.
    ///
    /// # Errors
    /// libtorch's.
    fn lend_state(&self) -> Result<OptimizerState> {
        self.export_state()
    }

    /// Tells whether [`Optimizer::import_state`] would accept the state.
    ///
    /// # Errors
    /// [`Error::DifferentConfig`](crate::Error::DifferentConfig) for another
    /// optimizer or other hyperparameters, [`Error::Keys`](crate::Error::Keys)
    /// for missing or unexpected tensors,
    /// [`Error::Mismatch`](crate::Error::Mismatch) for another shape or dtype.
    fn check_state(&self, state: &OptimizerState) -> Result<()>;

    /// Replaces the state. On an error nothing has changed.
    ///
    /// # Errors
    /// Those of [`Optimizer::check_state`], and libtorch's.
    fn import_state(&mut self, state: OptimizerState) -> Result<()>;
}

/// The state of an [`Optimizer`], keyed by parameter name.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let model = LoraModel::wrap(Base::new(vs, net), config)?;
/// let mut optimizer = AdamW::builder().build(model.trainable_parameters())?;
/// let state = optimizer.export_state()?; // what a run saves and brings back by itself
/// assert_eq!(state.kind, "adamw");
/// assert!(state.tensors.contains_key("base_model.model.proj.lora_A.weight.exp_avg"));
/// optimizer.import_state(state)?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug)]
pub struct OptimizerState {
    /// Which optimizer: `adamw`, `adamw_8bit`, `sgd`, `lion`, `adafactor`.
    pub kind: String,
    /// Its settings. Those of the checkpoint and those of the run must be the
    /// same, field by field.
    pub hyperparameters: Value,
    /// `<parameter name>.<what>`, such as `exp_avg`; each optimizer's page lists
    /// them with shapes and dtypes.
    pub tensors: BTreeMap<String, Tensor>,
}
