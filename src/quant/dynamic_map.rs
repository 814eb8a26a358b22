//! The 8-bit code in which bitsandbytes keeps quantised scales, and the states
//! of 8-bit optimizers.

use crate::error::Result;
use tch::{Device, Kind, Tensor};

/// The dynamic 8-bit map, sorted: 256 f32 values in [-1, 1], or in [0, 1] of
/// the unsigned one.
///
/// Dettmers, "8-Bit Approximations for Parallelism in Deep Learning"
/// (arXiv:1511.04561): for each of 7 exponents, the midpoints of evenly spaced
/// fractions between 0.1 and 1, twice as many from one exponent to the next;
/// plus 0 and 1. The unsigned map has twice as many fractions instead of the
/// negative half. The arithmetic is f32 in this order, which fixes the bits.
pub(crate) fn dynamic_map(signed: bool) -> Result<Vec<f32>> {
    let mut values: Vec<f32> = vec![0.0, 1.0];
    for i in 0..7 {
        let fractions = if signed { 1 << i } else { 2 << i };
        let bounds = Tensor::f_linspace(0.1, 1.0, fractions + 1, (Kind::Float, Device::Cpu))?;
        let sum = bounds.f_narrow(0, 0, fractions)?.f_add(&bounds.f_narrow(0, 1, fractions)?)?;
        let means = sum.f_div_scalar(2.0)?.f_mul_scalar(10f64.powi(i - 6))?;
        for mean in Vec::<f32>::try_from(means)? {
            values.push(mean);
            values.extend(signed.then_some(-mean));
        }
    }
    // The unsigned map has one value less, and 0 twice.
    values.resize(256, 0.0);
    values.sort_by(f32::total_cmp);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_its_known_landmarks() {
        let map = dynamic_map(true).unwrap();
        assert_eq!(map.len(), 256);
        assert_eq!(map[127], 0.0);
        assert_eq!(map[255], 1.0);
        assert!((map[0] + 0.992_968_75).abs() < 1e-6, "{}", map[0]);
    }
}
