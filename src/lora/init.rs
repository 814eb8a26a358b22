//! How A and B start.

use super::InitLoraWeights;
use super::layer::{LayerForm, LayerSpec};
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// New A and B of these sizes and the bias of `lora_B` if there is one, drawn
/// from the device's default generator.
pub(super) fn initial(
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
        InitLoraWeights::Default => kaiming(&mut a)?,
        InitLoraWeights::Gaussian => drop(a.f_normal_(0.0, 1.0 / spec.r as f64)?),
        InitLoraWeights::Random => {
            kaiming(&mut a)?;
            kaiming(&mut b)?;
            if let Some(mut bias) = bias.as_ref().map(Tensor::shallow_clone) {
                let bound = kaiming_bound(&b);
                let _ = bias.f_uniform_(-bound, bound)?;
            }
        }
        // Refused by name before it comes to this.
        other => return Err(Error::Unsupported { fields: vec![format!("init_lora_weights = {other:?}")] }),
    }
    Ok((a, b, bias))
}

/// torch's default for linear layers and convolutions: Kaiming uniform with
/// a = √5, hence the bound √(6 / (1 + 5) / fan_in).
fn kaiming(tensor: &mut Tensor) -> Result<()> {
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
    use super::*;

    fn drawn(init: InitLoraWeights, [out, inn]: [i64; 2]) -> (Tensor, Tensor) {
        let form = LayerForm::Linear { fan_in_fan_out: false };
        let spec =
            LayerSpec { form, r: 16, scaling: 1.0, dropout: 0.0, lora_bias: false, use_dora: false, init, kind: None };
        let sizes = spec.factor_sizes(&[out, inn]).unwrap();
        let (a, b, _) = initial(&spec, sizes, (Kind::Float, Device::Cpu)).unwrap();
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
