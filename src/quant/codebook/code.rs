//! The two 4-bit codes.

use crate::error::Result;
use crate::quant::kernels::packing::SortedCode;
use tch::{Device, Tensor};

/// 16 values, and what packing and unpacking need of them.
#[derive(Debug)]
pub(in crate::quant) struct Code {
    /// What `csrc/kernels/formats.cuh` calls it.
    name: &'static str,
    /// The value of each code.
    pub(super) values: [f32; 16],
    /// The codes by rising value.
    pub(super) order: [u8; 16],
    /// Midpoints between values that are neighbours in that order, and one more.
    pub(super) bounds: [f32; 16],
    /// The byte of two values by their places in that order, that of the first
    /// in the high half.
    pub(super) pairs: [u8; 256],
}

impl Code {
    const fn new(name: &'static str, values: [f32; 16], order: [u8; 16]) -> Self {
        let mut bounds = [f32::INFINITY; 16];
        let mut i = 0;
        while i < 15 {
            bounds[i] = (values[order[i] as usize] + values[order[i + 1] as usize]) / 2.0;
            i += 1;
        }
        let mut pairs = [0; 256];
        let mut places = 0;
        while places < 256 {
            pairs[places] = order[places >> 4] << 4 | order[places & 15];
            places += 1;
        }
        Code { name, values, order, bounds, pairs }
    }

    /// What the kernel needs of it.
    pub(in crate::quant) fn sorted(&self) -> SortedCode<'_> {
        SortedCode { name: self.name, bounds: &self.bounds, pairs: &self.pairs }
    }

    /// The values, on a device.
    pub(super) fn tensor(&self, device: Device) -> Result<Tensor> {
        Ok(Tensor::f_from_slice(&self.values)?.f_to_device(device)?)
    }

    /// The code of 0 as bitsandbytes' torch kernel picks it.
    pub(super) fn zero(&self) -> u8 {
        self.order[self.bounds.iter().filter(|bound| **bound < 0.0).count()]
    }
}

/// 4-bit NormalFloat, in order.
#[rustfmt::skip]
pub(in crate::quant) static NF4: Code = Code::new(
    "Nf4",
    [
        -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5, -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
        0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24, 0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
    ],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
);

/// bitsandbytes' 4-bit float: 0, 0.0625, 8, 12, 4, 6, 2 and 3 over 12, and the
/// same with a sign. Of the two codes of zero the one with a sign comes last,
/// so that a tiny positive value has that and a tiny negative one the other, as
/// in bitsandbytes.
#[rustfmt::skip]
pub(in crate::quant) static FP4: Code = Code::new(
    "Fp4",
    [
        0.0, 0.005_208_333_5, 0.666_666_7, 1.0, 0.333_333_34, 0.5, 0.166_666_67, 0.25,
        0.0, -0.005_208_333_5, -0.666_666_7, -1.0, -0.333_333_34, -0.5, -0.166_666_67, -0.25,
    ],
    [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_orders_rise() {
        for code in [&NF4, &FP4] {
            let sorted = code.order.map(|c| code.values[usize::from(c)]);
            assert!(sorted.windows(2).all(|pair| pair[0] < pair[1] || pair == [0.0, 0.0]), "{sorted:?}");
            assert_eq!(code.values[usize::from(code.zero())], 0.0);
        }
    }
}
