//! How A and B start.
//!
//! `draw` has the initialisations that need nothing but random numbers,
//! `decompose` those that are made from the weight and may change it.

pub(super) mod data;
mod decompose;

use super::InitLoraWeights;
use super::layer::{LayerForm, LayerSpec};
use crate::error::{Error, Result};
use crate::quant::PackedWeight;
use data::LayerData;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// What an adapter starts from.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    /// The bias of `lora_B`, if there is one.
    pub(super) bias: Option<Tensor>,
    /// What takes the weight's place, where A and B were taken out of it.
    pub(super) residual: Option<Arc<dyn PackedWeight>>,
}

/// The start of an adapter on this weight, in `kind`. Nothing is changed yet.
pub(super) fn start(spec: &LayerSpec, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Start> {
    let sizes = spec.factor_sizes(weight.sizes())?;
    match spec.init {
        InitLoraWeights::Default | InitLoraWeights::Gaussian | InitLoraWeights::Random => {
            let (a, b, bias) = draw(spec, sizes, (kind, weight.device()))?;
            Ok(Start { a, b, bias, residual: None })
        }
        InitLoraWeights::Eva => {
            let Some(LayerData::Directions(a)) = spec.data.as_deref() else { return Err(no_data(spec.init)) };
            let a = a.get().f_to_device(weight.device())?.f_to_kind(kind)?;
            Ok(Start { a, b: Tensor::f_zeros(sizes.1, (kind, weight.device()))?, bias: None, residual: None })
        }
        init => {
            let LayerForm::Linear { fan_in_fan_out } = spec.form else {
                let found = format!("{:?} for {:?}", init.name().unwrap_or_default(), spec.form);
                return Err(Error::config("init_lora_weights", "true, false or \"gaussian\" for this layer", found));
            };
            decompose::start(spec, weight, fan_in_fan_out, kind)
        }
    }
}

/// For an initialisation from data where there is none.
fn no_data(init: InitLoraWeights) -> Error {
    let expected = "one that needs no data here: `LoraModel::wrap_with_data` makes an adapter from data, and \
                    `save_pretrained` then writes what changed the base as plain LoRA, which loads anywhere";
    Error::config("init_lora_weights", expected, init.name().unwrap_or_default())
}

/// New A and B of these sizes and the bias of `lora_B` if there is one, drawn
/// from the device's default generator.
fn draw(
    spec: &LayerSpec,
    (a, b): (Vec<i64>, Vec<i64>),
    options: (Kind, Device),
) -> Result<(Tensor, Tensor, Option<Tensor>)> {
    let bias = spec.lora_bias.then(|| Tensor::f_zeros([b[0]], options)).transpose()?;
    let mut a = Tensor::f_zeros(a, options)?;
    let mut b = Tensor::f_zeros(b, options)?;
    if spec.form == LayerForm::Embedding {
        // As PEFT: B is drawn as a table is, and A starts at zero.
        let _ = b.f_normal_(0.0, 1.0)?;
        if spec.init == InitLoraWeights::Random {
            let _ = a.f_normal_(0.0, 1.0)?;
        }
        return Ok((a, b, bias));
    }
    match spec.init {
        InitLoraWeights::Gaussian => drop(a.f_normal_(0.0, 1.0 / spec.r as f64)?),
        InitLoraWeights::Random => {
            kaiming(&mut a)?;
            kaiming(&mut b)?;
            if let Some(mut bias) = bias.as_ref().map(Tensor::shallow_clone) {
                let bound = kaiming_bound(&b);
                let _ = bias.f_uniform_(-bound, bound)?;
            }
        }
        _ => kaiming(&mut a)?,
    }
    Ok((a, b, bias))
}

/// torch's default for linear layers and convolutions: Kaiming uniform with
/// a = √5, hence the bound √(6 / (1 + 5) / fan_in).
pub(in crate::lora) fn kaiming(tensor: &mut Tensor) -> Result<()> {
    let bound = kaiming_bound(tensor);
    let _ = tensor.f_uniform_(-bound, bound)?;
    Ok(())
}

fn kaiming_bound(tensor: &Tensor) -> f64 {
    let fan_in: i64 = tensor.size().iter().skip(1).product();
    1.0 / (fan_in as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::config::LoftqConfig;
    use super::*;

    fn drawn(init: InitLoraWeights, [out, inn]: [i64; 2]) -> (Tensor, Tensor) {
        let form = LayerForm::Linear { fan_in_fan_out: false };
        let spec = LayerSpec {
            form,
            r: 16,
            scaling: 1.0,
            dropout: 0.0,
            lora_bias: false,
            use_dora: false,
            qalora: None,
            init,
            loftq: LoftqConfig::default(),
            data: None,
            kind: None,
        };
        let sizes = spec.factor_sizes(&[out, inn]).unwrap();
        let (a, b, _) = draw(&spec, sizes, (Kind::Float, Device::Cpu)).unwrap();
        (a, b)
    }

    #[test]
    fn the_draws_have_their_bounds_and_spread() {
        let value = |t: Tensor| f64::try_from(t).unwrap();
        let (a, b) = drawn(InitLoraWeights::Default, [32, 4096]);
        let bound = 1.0 / 64.0;
        assert!(value(a.abs().max()) <= bound && value(a.abs().max()) > 0.99 * bound);
        assert!((value(a.std(true)) - bound / 3f64.sqrt()).abs() < 0.02 * bound);
        assert_eq!(value(b.abs().max()), 0.0);
        let (a, b) = drawn(InitLoraWeights::Gaussian, [32, 4096]);
        assert!((value(a.std(true)) - 1.0 / 16.0).abs() < 0.002);
        assert_eq!(value(b.abs().max()), 0.0);
        let (_, b) = drawn(InitLoraWeights::Random, [4096, 32]);
        assert!(value(b.abs().max()) <= 0.25 && value(b.abs().max()) > 0.24);
    }
}
