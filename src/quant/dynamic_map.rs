//! The 8-bit code in which bitsandbytes keeps quantised scales.

use crate::error::Result;
use tch::{Device, Kind, Tensor};

/// The signed dynamic 8-bit map, sorted: 256 f32 values in [-1, 1].
///
/// Dettmers, "8-Bit Approximations for Parallelism in Deep Learning"
/// (arXiv:1511.04561): for each of 7 exponents, the midpoints of evenly spaced
/// fractions between 0.1 and 1, twice as many from one exponent to the next;
/// plus 0 and 1. The arithmetic is f32 in this order, which fixes the bits.
pub(super) fn dynamic_map(device: Device) -> Result<Tensor> {
    let mut values: Vec<f32> = vec![0.0, 1.0];
    for i in 0..7 {
        let bounds = Tensor::f_linspace(0.1, 1.0, (1 << i) + 1, (Kind::Float, Device::Cpu))?;
        let n = bounds.size1()?;
        let sum = bounds.f_narrow(0, 0, n - 1)?.f_add(&bounds.f_narrow(0, 1, n - 1)?)?;
        let means = sum.f_div_scalar(2.0)?.f_mul_scalar(10f64.powi(i - 6))?;
        for mean in Vec::<f32>::try_from(means)? {
            values.extend([mean, -mean]);
        }
    }
    values.sort_by(f32::total_cmp);
    Ok(Tensor::f_from_slice(&values)?.f_to_device(device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_its_known_landmarks() {
        let map = Vec::<f32>::try_from(dynamic_map(Device::Cpu).unwrap()).unwrap();
        assert_eq!(map.len(), 256);
        assert_eq!(map[127], 0.0);
        assert_eq!(map[255], 1.0);
        assert!((map[0] + 0.992_968_75).abs() < 1e-6, "{}", map[0]);
    }
}
