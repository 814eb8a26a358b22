//! Products with few rows: values go from the packed bytes through registers
//! into the sums, and no decoded weight is written anywhere.
//!
//! For weights whose rows are whole blocks of a multiple of a unit's elements.
//! Sums are in f32, in an order that depends on the shapes and the instruction
//! set only, not on the number of threads.

mod ahead;
mod forward;
mod passing;
mod transposed;

pub(super) use forward::product;
pub(super) use transposed::product_transposed;

/// Elements that are worth a thread of their own to be laid side by side.
const SHARE: usize = 8 << 10;

/// Bytes of x or of dX, all rows together, that stay in the first-level cache.
const STRIP: usize = 24 << 10;

#[cfg(test)]
mod tests {
    use super::forward::{Product, product_by};
    use super::transposed::{Transposed, product_transposed_by};
    use crate::ffi::simd::tests::on_all;
    use crate::ffi::simd::{Kernel, LANES, Simd};
    use crate::quant::kernels::arithmetic::RunF32;
    use crate::quant::kernels::{Bytes, Codes, Floats, Format, I8};

    /// Both products with `N` rows, on an instruction set.
    #[derive(Debug)]
    struct Both<'a, F, const N: usize> {
        format: &'a F,
        shape: [usize; 2],
        x: &'a [f32],
        g: &'a [f32],
    }

    impl<F, const N: usize> Clone for Both<'_, F, N> {
        fn clone(&self) -> Self {
            *self
        }
    }

    impl<F, const N: usize> Copy for Both<'_, F, N> {}

    impl<F: Format, const N: usize> Kernel for Both<'_, F, N> {
        type Output = [Vec<f32>; 2];

        fn run<S: Simd>(self, s: S) -> Self::Output {
            let Both { format, shape: [out, inn], x, g } = self;
            let (mut y, mut dx) = (vec![f32::NAN; N * out], vec![f32::NAN; N * inn]);
            product_by(format, self.shape, x, &mut y, |part: Product<F, f32, N>| s.vectorize(RunF32::new(part)))
                .unwrap();
            product_transposed_by(format, self.shape, g, &mut dx, |part: Transposed<F, f32, N>| {
                s.vectorize(RunF32::new(part));
            })
            .unwrap();
            [y, dx]
        }
    }

    /// Numbers in [-1, 1), the same for each call.
    fn numbers(count: usize) -> Vec<f32> {
        let mut bits = 1u32;
        let next = || {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bits as f32 / (1u32 << 31) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    /// Against f64, within the rounding of an f32 sum.
    fn multiplies<F: Format, const N: usize>(both: Both<F, N>) {
        let Both { format, shape: [out, inn], x, g } = both;
        let w = |row: usize, column: usize| {
            let at = row * inn + column;
            let value = format.value(at / format.block_len(), at % format.block_len());
            f64::from(value)
        };
        for (set, [y, dx]) in on_all(both).into_iter().enumerate() {
            let close = |found: f32, terms: &mut dyn Iterator<Item = f64>| {
                let (mut sum, mut size, mut count) = (0.0, 0.0, 0);
                terms.for_each(|term| (sum, size, count) = (sum + term, size + term.abs(), count + 1));
                let bound = f64::from(count) * size / f64::from(1 << 24);
                let error = (f64::from(found) - sum).abs();
                assert!(error <= bound, "set {set}, {N} rows: {found}, not {sum} within {bound}");
            };
            for n in 0..N {
                for row in 0..out {
                    close(y[n * out + row], &mut (0..inn).map(|c| f64::from(x[n * inn + c]) * w(row, c)));
                }
                for column in 0..inn {
                    close(dx[n * inn + column], &mut (0..out).map(|r| f64::from(g[n * out + r]) * w(r, column)));
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_multiplies() {
        // More than a strip of either number of rows, rows left over of any group, and units of any number together.
        const SHAPE: [usize; 2] = [39, 1120];
        let bytes: Vec<u8> = numbers(SHAPE[0] * SHAPE[1]).iter().map(|v| (v * 127.0) as i8 as u8).collect();
        let scales = numbers(bytes.len() / 32);
        let code: [f32; LANES] = std::array::from_fn(|i| i as f32 / 8.0 - 1.0);
        let codes =
            |block| Codes::<_, f32>::new(&bytes[..bytes.len() / 2], &scales[..bytes.len() / block], &code, block);
        let (small, large) = (codes(32), codes(224));
        let integers = Bytes::<I8>::new(&bytes, Floats::F32(&scales[..SHAPE[0]]), SHAPE[1]);
        let (x, g) = (numbers(16 * SHAPE[1]), numbers(16 * SHAPE[0]));
        macro_rules! rows {
            ($($n:literal)*) => { $(
                let (some_x, some_g) = (&x[..$n * SHAPE[1]], &g[..$n * SHAPE[0]]);
                multiplies(Both::<_, $n> { format: &small, shape: SHAPE, x: some_x, g: some_g });
                multiplies(Both::<_, $n> { format: &large, shape: SHAPE, x: some_x, g: some_g });
                multiplies(Both::<_, $n> { format: &integers, shape: SHAPE, x: some_x, g: some_g });
            )* };
        }
        rows!(1 2 4 8 16);
    }
}
