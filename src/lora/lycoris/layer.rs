//! The adapter on one weight, whatever its formula.

use super::config::LycorisConfig;
use super::formula::{Formula, Method, Place, Start};
use super::product::product;
use crate::base::Adapter;
use crate::error::{Error, Result};
use crate::ffi::hook::Operator;
use crate::ffi::shared::SharedTensor;
use crate::lora::LayerSettings;
use crate::lora::layer::{LayerForm, LoraLayer, OutputChannels, Switches, parameter_kind, same_groups};
use crate::quant::PackedWeight;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tch::{Device, Kind, Tensor};

/// y = W·x + s · ΔW·x.
///
/// While training, rank dropout drops rows of ΔW, hence output features, and
/// module dropout the whole of it.
#[derive(Debug)]
struct Layer {
    form: LayerForm,
    /// The weight's.
    sizes: Vec<i64>,
    formula: Arc<dyn Formula>,
    tensors: Vec<(&'static str, SharedTensor)>,
    /// The bits of an f64.
    scaling: AtomicU64,
    rank_dropout: f64,
    /// Whether kept rows are scaled so that the sum stays.
    rescale: bool,
    module_dropout: f64,
    switches: Arc<Switches>,
}

/// A new, trainable adapter for the weight of the module at `path`.
///
/// # Errors
/// [`Error::Config`] for a layer that PEFT has no such adapter for.
pub(crate) fn layer<M: Method>(
    config: &LycorisConfig<M>,
    settings: LayerSettings,
    form: LayerForm,
    path: &str,
    weight: &Arc<dyn PackedWeight>,
    switches: &Arc<Switches>,
) -> Result<Arc<dyn LoraLayer>> {
    let sizes = weight.sizes();
    let fits = match form {
        LayerForm::Linear { fan_in_fan_out } => !fan_in_fan_out && sizes.len() == 2,
        LayerForm::Conv { .. } => (3..=4).contains(&sizes.len()),
        _ => false,
    };
    if !fits {
        let expected = "linear layers and convolutions over one or two dimensions for this kind of adapter";
        return Err(Error::config("target_modules", expected, format!("{path}, {form:?} {sizes:?}")));
    }
    let kind = parameter_kind(config.dtype, weight.kind());
    let options = (kind, weight.device());
    let LayerSettings { r, w1, .. } = settings;
    let place = Place { sizes, r, w1, effective: config.use_effective_conv2d, options };
    if let Some([a, c]) = w1
        && (sizes[0] % a != 0 || sizes[1] % c != 0)
    {
        let expected = format!("sizes that divide {} and {} for {path}", sizes[0], sizes[1]);
        return Err(Error::config("w1_pattern", expected, format!("[{a}, {c}]")));
    }
    let Start { formula, tensors } = config.method.start(&place)?;
    let trainable = |(name, tensor): (&'static str, Tensor)| {
        Ok::<_, Error>((name, SharedTensor::new(tensor.f_set_requires_grad(true)?)))
    };
    Ok(Arc::new(Layer {
        form,
        sizes: sizes.to_vec(),
        formula,
        tensors: tensors.into_iter().map(trainable).collect::<Result<_>>()?,
        scaling: AtomicU64::new(settings.scaling.to_bits()),
        rank_dropout: config.rank_dropout,
        rescale: config.method.rescale(),
        module_dropout: config.module_dropout,
        switches: Arc::clone(switches),
    }))
}

/// What the dropouts of one pass leave of ΔW.
enum Kept {
    All,
    None,
    /// A factor for each output feature (out).
    Rows(Tensor),
}

impl Layer {
    fn values(&self) -> Vec<Tensor> {
        self.tensors.iter().map(|(_, tensor)| tensor.get()).collect()
    }

    fn takes_part(&self, operator: &Operator) -> Result<bool> {
        match (operator, self.form) {
            (Operator::Linear { transposed: false, .. }, LayerForm::Linear { .. }) => Ok(true),
            (Operator::Linear { transposed: true, .. }, LayerForm::Linear { .. }) => {
                let expected = "layers that use their weight as x · Wᵀ for this kind of adapter";
                Err(Error::config("target_modules", expected, "one that uses it as x · W"))
            }
            (Operator::Convolution { form, .. }, LayerForm::Conv { groups }) => same_groups(groups, form.groups),
            _ => Ok(false),
        }
    }

    /// Drawn on the CPU in PEFT's order, so that a seeded step equals PEFT's.
    fn kept(&self) -> Result<Kept> {
        let live = self.switches.training.load(Ordering::Relaxed);
        if !live || (self.rank_dropout == 0.0 && self.module_dropout == 0.0) {
            return Ok(Kept::All);
        }
        let draw = |n: i64| Tensor::f_rand([n], (Kind::Float, Device::Cpu));
        if f64::try_from(draw(1)?)? <= self.module_dropout {
            return Ok(Kept::None);
        }
        if self.rank_dropout == 0.0 {
            return Ok(Kept::All);
        }
        let rows = draw(self.sizes[0])?.f_gt(self.rank_dropout)?.f_to_kind(Kind::Float)?;
        let share = f64::try_from(rows.f_mean(Kind::Float)?)?;
        // PEFT divides by zero here.
        if share == 0.0 {
            return Ok(Kept::None);
        }
        Ok(Kept::Rows(if self.rescale { rows.f_div_scalar(share)? } else { rows }))
    }
}

impl Adapter for Layer {
    fn active(&self) -> bool {
        self.switches.enabled.load(Ordering::Relaxed)
    }

    fn addition(&self, _: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        if !self.takes_part(operator)? {
            return Ok(None);
        }
        let kept = self.kept()?;
        if matches!(kept, Kept::None) {
            return Ok(None);
        }
        let y = product(&self.formula, &self.sizes, operator, &self.values(), self.scaling())?;
        let Kept::Rows(rows) = kept else { return Ok(Some(y)) };
        let channels = match self.form {
            LayerForm::Conv { .. } => OutputChannels::Second,
            _ => OutputChannels::Last,
        };
        let rows = channels.broadcast(&rows.f_to_kind(y.f_kind()?)?.f_to_device(y.device())?, y.dim())?;
        Ok(Some(y.f_mul(&rows)?))
    }

    fn delta(&self, _: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        Ok(self.formula.weight(&self.values(), self.scaling())?.f_to_kind(kind)?)
    }
}

impl LoraLayer for Layer {
    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor.get())).collect()
    }

    fn scaling(&self) -> f64 {
        f64::from_bits(self.scaling.load(Ordering::Relaxed))
    }

    fn set_scaling(&self, scaling: f64) {
        self.scaling.store(scaling.to_bits(), Ordering::Relaxed);
    }
}
