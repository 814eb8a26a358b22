//! How A and B start.

use super::InitLoraWeights;
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// New A (r, in) and B (out, r), drawn from the device's default generator.
pub(super) fn initial(
    init: InitLoraWeights,
    [out, inn]: [i64; 2],
    r: i64,
    options: (Kind, Device),
) -> Result<(Tensor, Tensor)> {
    let mut a = Tensor::f_empty([r, inn], options)?;
    let mut b = Tensor::f_zeros([out, r], options)?;
    // Kaiming uniform with a = √5 has the bound √(6 / (1 + 5) / fan_in).
    let bound = |fan_in: i64| 1.0 / (fan_in as f64).sqrt();
    match init {
        InitLoraWeights::Default => drop(a.f_uniform_(-bound(inn), bound(inn))?),
        InitLoraWeights::Gaussian => drop(a.f_normal_(0.0, 1.0 / r as f64)?),
        InitLoraWeights::Random => {
            drop(a.f_uniform_(-bound(inn), bound(inn))?);
            drop(b.f_uniform_(-bound(r), bound(r))?);
        }
        // Refused by name before it comes to this.
        other => return Err(Error::Unsupported { fields: vec![format!("init_lora_weights = {other:?}")] }),
    }
    Ok((a, b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_draws_have_their_bounds_and_spread() {
        let options = (Kind::Float, Device::Cpu);
        let value = |t: Tensor| f64::try_from(t).unwrap();
        let (a, b) = initial(InitLoraWeights::Default, [32, 4096], 16, options).unwrap();
        let bound = 1.0 / 64.0;
        assert!(value(a.abs().max()) <= bound && value(a.abs().max()) > 0.99 * bound);
        assert!((value(a.std(true)) - bound / 3f64.sqrt()).abs() < 0.02 * bound);
        assert_eq!(value(b.abs().max()), 0.0);
        let (a, b) = initial(InitLoraWeights::Gaussian, [32, 4096], 16, options).unwrap();
        assert!((value(a.std(true)) - 1.0 / 16.0).abs() < 0.002);
        assert_eq!(value(b.abs().max()), 0.0);
        let (_, b) = initial(InitLoraWeights::Random, [4096, 32], 16, options).unwrap();
        assert!(value(b.abs().max()) <= 0.25 && value(b.abs().max()) > 0.24);
    }
}
