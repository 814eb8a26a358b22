//! Losses scaled up, so that small f16 gradients don't vanish.

use super::Optimizer;
use super::state::{State, Stateful, read_values, same_kind, same_names};
use crate::error::{Error, Result};
use crate::ffi::optim::unscale;
use crate::model::NamedParameter;
use crate::train::compare::same_config;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

const KIND: &str = "loss_scaler";

/// Scales the loss for f16 autocast, and leaves out steps whose gradients
/// overflowed: the algorithm of `torch.amp.GradScaler` with its defaults
/// (Micikevicius et al., "Mixed precision training", arXiv:1710.03740).
///
/// The scale is halved after a step that was left out, and doubled after 2,000
/// good ones in a row.
///
/// ```no_run
/// # use tch_peft::{AdamW, LossScaler, NamedParameter, Optimizer, clip_grad_norm};
/// # fn train(mut optimizer: AdamW, parameters: Vec<NamedParameter>, loss: tch::Tensor) -> tch_peft::Result<()> {
/// let mut scaler = LossScaler::new();
/// scaler.scale(&loss)?.f_backward()?;
/// if scaler.unscale(&parameters)? {
///     clip_grad_norm(&parameters, 1.0)?;
/// }
/// let stepped = scaler.step(&mut optimizer, &parameters)?;
/// optimizer.zero_grad()?;
/// # let _ = stepped;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LossScaler {
    settings: Settings,
    scale: f32,
    /// Good steps since the scale last changed.
    growth_tracker: u32,
    /// Whether the gradients of this step, unscaled already, are all finite.
    unscaled: Option<bool>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Settings {
    growth_factor: f64,
    backoff_factor: f64,
    growth_interval: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    scale: f32,
    growth_tracker: u32,
}

impl Default for LossScaler {
    fn default() -> Self {
        Self::new()
    }
}

impl LossScaler {
    /// A scale of 65,536 to start with.
    pub fn new() -> Self {
        let settings = Settings { growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 };
        LossScaler { settings, scale: 65536.0, growth_tracker: 0, unscaled: None }
    }

    /// With other settings: the scale to start with (above 0), by how much it
    /// grows (above 1) after how many good steps (at least 1), and by how much
    /// it shrinks (below 1) after a bad one.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting out of range.
    pub fn with_settings(scale: f32, growth_factor: f64, backoff_factor: f64, growth_interval: u32) -> Result<Self> {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::config("init_scale", "a finite number above 0", scale));
        }
        if !(growth_factor.is_finite() && growth_factor > 1.0) {
            return Err(Error::config("growth_factor", "a finite number above 1", growth_factor));
        }
        if !(backoff_factor > 0.0 && backoff_factor < 1.0) {
            return Err(Error::config("backoff_factor", "above 0 and below 1", backoff_factor));
        }
        if growth_interval == 0 {
            return Err(Error::config("growth_interval", "at least 1", growth_interval));
        }
        let settings = Settings { growth_factor, backoff_factor, growth_interval };
        Ok(LossScaler { settings, scale, growth_tracker: 0, unscaled: None })
    }

    /// The loss times the scale; its `backward` makes scaled gradients.
    ///
    /// # Errors
    /// libtorch's.
    pub fn scale(&self, loss: &Tensor) -> Result<Tensor> {
        Ok(loss.f_mul_scalar(f64::from(self.scale))?)
    }

    /// The current scale.
    pub fn current_scale(&self) -> f32 {
        self.scale
    }

    /// Divides the gradients by the scale, in place, and tells whether all are
    /// finite. Needed before clipping; otherwise [`LossScaler::step`] does it.
    /// The second call before a step only answers again.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for an f16 gradient, in which the unscaled values
    /// would vanish: keep trainable parameters in f32. libtorch's.
    pub fn unscale(&mut self, parameters: &[NamedParameter]) -> Result<bool> {
        if let Some(finite) = self.unscaled {
            return Ok(finite);
        }
        let mut by_device: Vec<(Device, Vec<Tensor>)> = Vec::new();
        for NamedParameter { name, tensor } in parameters {
            let grad = tensor.f_grad()?;
            if !grad.defined() {
                continue;
            }
            if grad.f_kind()? == Kind::Half {
                let name = format!("the gradient of {name}");
                return Err(Error::Mismatch { name, expected: "f32 or bf16".into(), found: "f16".into() });
            }
            match by_device.iter_mut().find(|(device, _)| *device == grad.device()) {
                Some((_, grads)) => grads.push(grad),
                None => by_device.push((grad.device(), vec![grad])),
            }
        }
        let inverse = (1.0 / f64::from(self.scale)) as f32;
        let mut finite = true;
        for (device, grads) in by_device {
            let found_inf = Tensor::f_zeros([], (Kind::Float, device))?;
            let inverse = Tensor::f_full([], f64::from(inverse), (Kind::Float, device))?;
            unscale(&grads, &found_inf, &inverse)?;
            finite &= f64::try_from(&found_inf)? == 0.0;
        }
        self.unscaled = Some(finite);
        Ok(finite)
    }

    /// Unscales the gradients unless that is done, lets the optimizer step if
    /// all are finite, and adjusts the scale. Answers whether it stepped.
    ///
    /// # Errors
    /// Those of [`LossScaler::unscale`] and of the optimizer.
    pub fn step(&mut self, optimizer: &mut dyn Optimizer, parameters: &[NamedParameter]) -> Result<bool> {
        let finite = self.unscale(parameters)?;
        if finite {
            optimizer.step()?;
        }
        self.unscaled = None;
        self.adjust(finite);
        Ok(finite)
    }

    fn adjust(&mut self, finite: bool) {
        let Settings { growth_factor, backoff_factor, growth_interval } = self.settings;
        if !finite {
            self.scale = (f64::from(self.scale) * backoff_factor) as f32;
            self.growth_tracker = 0;
            return;
        }
        self.growth_tracker += 1;
        if self.growth_tracker >= growth_interval {
            let grown = (f64::from(self.scale) * growth_factor) as f32;
            if grown.is_finite() {
                self.scale = grown;
            }
            self.growth_tracker = 0;
        }
    }

    fn settings(&self) -> Value {
        json!(self.settings)
    }
}

impl Stateful for LossScaler {
    /// # Errors
    /// [`Error::Config`] between `unscale` and `step`, of which a resumed run
    /// would not know.
    fn export_state(&self) -> Result<State> {
        if self.unscaled.is_some() {
            return Err(Error::config("loss scaler", "`step` before the state is exported", "gradients just unscaled"));
        }
        let values = json!(Position { scale: self.scale, growth_tracker: self.growth_tracker });
        Ok(State { kind: KIND.into(), settings: self.settings(), values, tensors: BTreeMap::new() })
    }

    fn check_state(&self, state: &State) -> Result<()> {
        same_kind("loss scaler", &state.kind, KIND)?;
        same_names("loss scaler", &BTreeMap::new(), &state.tensors)?;
        same_config("loss scaler", &state.settings, &self.settings())?;
        let Position { scale, growth_tracker } = read_values(&state.values)?;
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::config("scale", "a finite number above 0", scale));
        }
        let interval = self.settings.growth_interval;
        if growth_tracker >= interval {
            return Err(Error::config("growth_tracker", format!("below {interval}"), growth_tracker));
        }
        Ok(())
    }

    fn import_state(&mut self, state: State) -> Result<()> {
        self.check_state(&state)?;
        let Position { scale, growth_tracker } = read_values(&state.values)?;
        (self.scale, self.growth_tracker, self.unscaled) = (scale, growth_tracker, None);
        Ok(())
    }
}
