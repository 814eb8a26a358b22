//! A moving average of the weights.

use super::state::{Expected, State, Stateful, copies, owned, read_values, same_kind, same_names, same_shapes};
use crate::error::{Error, Result};
use crate::model::NamedParameter;
use crate::train::compare::same_config;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

const KIND: &str = "ema";

/// An exponential moving average of trainable weights, the same as diffusers'
/// `EMAModel`: same settings, same arithmetic.
///
/// After each step, `shadow -= (1 - decay) * (shadow - parameter)`, where the
/// decay of the n-th update is, with `m = n - update_after_step - 1`, 0 up to
/// `m = 0` and then
///
/// ```text
/// (1 + m) / (10 + m)                         or, with warm-up,
/// 1 - (1 + m / inv_gamma) ^ -power
/// ```
///
/// brought into `min_decay..=decay`. The shadow has the parameters' shapes and
/// devices and is f32 (f64 for f64): in bf16, a high decay would never move it.
#[derive(Debug)]
pub struct Ema {
    settings: Settings,
    updates: u64,
    shadow: Vec<Shadow>,
}

#[derive(Debug)]
struct Shadow {
    name: String,
    param: Tensor,
    average: Tensor,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Settings {
    decay: f64,
    min_decay: f64,
    update_after_step: u64,
    warmup: Option<Warmup>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Warmup {
    inv_gamma: f64,
    power: f64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    updates: u64,
}

/// Settings of an [`Ema`], with diffusers' defaults.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let model = LoraModel::wrap(Base::new(vs, net), config)?;
/// let mut ema = Ema::builder().decay(0.999).warmup(1.0, 0.75).build(model.trainable_parameters())?;
/// ema.update()?;
/// assert!(ema.decay() < 0.999); // it grows with the updates
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct EmaBuilder(Settings);

impl EmaBuilder {
    /// The largest decay, 0.9999 by default.
    pub fn decay(mut self, decay: f64) -> Self {
        self.0.decay = decay;
        self
    }

    /// The least decay once updates have begun, 0 by default.
    pub fn min_decay(mut self, decay: f64) -> Self {
        self.0.min_decay = decay;
        self
    }

    /// For how many updates the average only follows the parameters, 0 by default.
    pub fn update_after_step(mut self, updates: u64) -> Self {
        self.0.update_after_step = updates;
        self
    }

    /// Lets the decay grow as `1 - (1 + m / inv_gamma) ^ -power`; diffusers'
    /// defaults are 1 and 2/3.
    pub fn warmup(mut self, inv_gamma: f64, power: f64) -> Self {
        self.0.warmup = Some(Warmup { inv_gamma, power });
        self
    }

    /// Makes the average, which begins as a copy of the parameters.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting out of range and for no or repeated
    /// parameters; libtorch's.
    pub fn build(self, parameters: Vec<NamedParameter>) -> Result<Ema> {
        let EmaBuilder(settings) = self;
        for (field, decay) in [("decay", settings.decay), ("min_decay", settings.min_decay)] {
            if !(0.0..=1.0).contains(&decay) {
                return Err(Error::config(field, "0 to 1", decay));
            }
        }
        if let Some(Warmup { inv_gamma, power }) = settings.warmup {
            for (field, value) in [("inv_gamma", inv_gamma), ("power", power)] {
                if !(value.is_finite() && value > 0.0) {
                    return Err(Error::config(field, "a finite number above 0", value));
                }
            }
        }
        if parameters.is_empty() {
            return Err(Error::config("parameters", "at least one", "none"));
        }
        let mut shadow: Vec<Shadow> = Vec::with_capacity(parameters.len());
        for NamedParameter { name, tensor } in parameters {
            if shadow.iter().any(|other| other.name == name) {
                return Err(Error::config("parameters", "each name once", format!("{name} twice")));
            }
            let kind = if tensor.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
            let average = tensor.f_detach_copy()?.f_to_kind(kind)?;
            shadow.push(Shadow { name, param: tensor, average });
        }
        Ok(Ema { settings, updates: 0, shadow })
    }
}

impl Ema {
    /// Settings to start from.
    pub fn builder() -> EmaBuilder {
        EmaBuilder(Settings { decay: 0.9999, min_decay: 0.0, update_after_step: 0, warmup: None })
    }

    /// Follows the parameters; call it after each step of the optimizer.
    ///
    /// # Errors
    /// libtorch's.
    pub fn update(&mut self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        self.updates += 1;
        let rest = 1.0 - self.decay();
        for Shadow { param, average, .. } in &mut self.shadow {
            let change = average.f_sub(param)?.f_mul_scalar(rest)?;
            let _ = average.f_sub_(&change)?;
        }
        Ok(())
    }

    /// The decay of the last update; 0 before the first.
    pub fn decay(&self) -> f64 {
        let Settings { decay, min_decay, update_after_step, warmup } = self.settings;
        let m = self.updates.saturating_sub(update_after_step).saturating_sub(1) as f64;
        if m == 0.0 {
            return 0.0;
        }
        let grown = match warmup {
            Some(Warmup { inv_gamma, power }) => 1.0 - (1.0 + m / inv_gamma).powf(-power),
            None => (1.0 + m) / (10.0 + m),
        };
        grown.min(decay).max(min_decay)
    }

    /// How often [`Ema::update`] was called.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Puts the average into the parameters until the guard is dropped: to
    /// evaluate with it, or to save it as an adapter.
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
    /// let mut ema = Ema::builder().decay(0.9).build(model.trainable_parameters())?;
    /// // After each step of the optimizer:
    /// ema.update()?;
    /// // To save the average as an adapter:
    /// let average = ema.swap_in()?;
    /// model.save_pretrained(dir.path())?;
    /// drop(average); // and the parameters are there again
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// libtorch's; then the parameters are as before.
    pub fn swap_in(&self) -> Result<EmaSwap<'_>> {
        let _no_grad = tch::no_grad_guard();
        let before = self.shadow.iter().map(|shadow| shadow.param.f_detach_copy());
        let swap = EmaSwap { ema: self, before: before.collect::<Result<_, _>>()? };
        // From here on an error puts back what was before, as the guard is dropped.
        for Shadow { param, average, .. } in &self.shadow {
            param.shallow_clone().f_copy_(average)?;
        }
        Ok(swap)
    }

    fn settings(&self) -> Value {
        json!(self.settings)
    }

    fn expected(&self) -> Expected<'_> {
        self.shadow.iter().map(|shadow| (shadow.name.clone(), &shadow.average)).collect()
    }
}

/// The average is in the parameters while this lives.
#[must_use = "the parameters are themselves again once the guard is dropped"]
#[derive(Debug)]
pub struct EmaSwap<'a> {
    ema: &'a Ema,
    before: Vec<Tensor>,
}

impl Drop for EmaSwap<'_> {
    fn drop(&mut self) {
        let _no_grad = tch::no_grad_guard();
        for (Shadow { name, param, .. }, before) in self.ema.shadow.iter().zip(&self.before) {
            if let Err(error) = param.shallow_clone().f_copy_(before) {
                tracing::error!(name, %error, "the parameter could not be put back after its average");
            }
        }
    }
}

impl Stateful for Ema {
    fn export_state(&self) -> Result<State> {
        let lent = self.lend_state()?;
        Ok(State { tensors: owned(lent.tensors)?, ..lent })
    }

    fn lend_state(&self) -> Result<State> {
        let lend = |shadow: &Shadow| (shadow.name.clone(), shadow.average.shallow_clone());
        let tensors = self.shadow.iter().map(lend).collect();
        let values = json!(Position { updates: self.updates });
        Ok(State { kind: KIND.into(), settings: self.settings(), values, tensors })
    }

    fn check_state(&self, state: &State) -> Result<()> {
        same_kind("EMA", &state.kind, KIND)?;
        same_names("EMA", &self.expected(), &state.tensors)?;
        same_config("EMA", &state.settings, &self.settings())?;
        same_shapes(&self.expected(), &state.tensors)?;
        read_values::<Position>(&state.values).map(drop)
    }

    fn import_state(&mut self, state: State) -> Result<()> {
        self.check_state(&state)?;
        let Position { updates } = read_values(&state.values)?;
        let mut copies = copies(&self.expected(), &state.tensors)?;
        for shadow in &mut self.shadow {
            if let Some(copy) = copies.remove(&shadow.name) {
                shadow.average = copy;
            }
        }
        self.updates = updates;
        Ok(())
    }
}
