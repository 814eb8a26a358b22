//! The formats of a byte for each element as bf16.

use super::formats::{Byte, Scaled};
use super::in_bf16::{InBf16, QUAD, V};
use super::{Absmax, Bytes, Dtype, E4m3, E5m2, Format, I8};
use crate::ffi::simd::{DotBf16, LANES, Simd};

/// How a byte of [`Bytes`] is made bf16.
pub(crate) trait ByteInBf16: Byte {
    /// What the elements of a row share.
    type Shared<D: DotBf16>: Copy;
    /// As [`InBf16`]'s.
    const TOO_FEW: usize = 0;

    fn share<D: DotBf16>(d: D, scale: V<D>) -> Self::Shared<D>;
    fn quad<D: DotBf16>(d: D, shared: Self::Shared<D>, bytes: &[u8; QUAD]) -> [D::P; 2];
    /// The same without what is shared.
    fn quad_alone<D: DotBf16>(d: D, scale: V<D>, bytes: &[u8; QUAD]) -> [D::P; 2];
    fn place(k: usize, i: usize) -> usize;
}

impl ByteInBf16 for I8 {
    type Shared<D: DotBf16> = V<D>;
    const TOO_FEW: usize = 4;

    #[inline(always)]
    fn share<D: DotBf16>(_: D, scale: V<D>) -> V<D> {
        scale
    }

    #[inline(always)]
    fn quad<D: DotBf16>(d: D, scale: V<D>, bytes: &[u8; QUAD]) -> [D::P; 2] {
        scaled::<I8, D>(
            d,
            bytes,
            #[inline(always)]
            |v| d.simd().mul(v, scale),
        )
    }

    #[inline(always)]
    fn quad_alone<D: DotBf16>(d: D, scale: V<D>, bytes: &[u8; QUAD]) -> [D::P; 2] {
        Self::quad(d, scale, bytes)
    }

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        2 * LANES * k + i
    }
}

/// The numbers of seven bits.
const MAGNITUDES: [[u8; LANES]; 8] = {
    let (mut numbers, mut i) = ([[0; LANES]; 8], 0);
    while i < 128 {
        numbers[i / LANES][i % LANES] = i as u8;
        i += 1;
    }
    numbers
};

/// Floats of eight bits: of each magnitude, times the scale, a table is made once for a row.
macro_rules! floats_in_bf16 {
    ($($byte:ty)*) => { $(
        impl ByteInBf16 for $byte {
            type Shared<D: DotBf16> = D::Table;

            #[inline(always)]
            fn share<D: DotBf16>(d: D, scale: V<D>) -> D::Table {
                let s = d.simd();
                let mut values = [scale; 8];
                for i in 0..8 {
                    values[i] = s.mul(<$byte>::widen(s, &MAGNITUDES[i]), scale);
                }
                d.table_of_128(values)
            }

            #[inline(always)]
            fn quad<D: DotBf16>(d: D, table: D::Table, bytes: &[u8; QUAD]) -> [D::P; 2] {
                d.look_up_bytes(table, bytes)
            }

            #[inline(always)]
            fn quad_alone<D: DotBf16>(d: D, scale: V<D>, bytes: &[u8; QUAD]) -> [D::P; 2] {
                let s = d.simd();
                let scale = s.mul(scale, s.splat(<$byte>::OVER));
                let mut in_place = [0; QUAD];
                for k in 0..2 {
                    for i in 0..2 * LANES {
                        in_place[2 * LANES * k + i] = bytes[Self::place(k, i)];
                    }
                }
                scaled::<$byte, D>(
                    d,
                    &in_place,
                    #[inline(always)]
                    |v| s.mul(v, scale),
                )
            }

            #[inline(always)]
            fn place(k: usize, i: usize) -> usize {
                // The order of `look_up_bytes`.
                16 * (i / 8) + 8 * k + i % 8
            }
        }
    )* };
}

floats_in_bf16!(E4m3 E5m2);

/// Sixty-four numbers of one byte each, over [`Byte::OVER`], by a factor.
#[inline(always)]
fn scaled<B: Byte, D: DotBf16>(d: D, bytes: &[u8; QUAD], scale: impl Fn(V<D>) -> V<D>) -> [D::P; 2] {
    let (s, bytes) = (d.simd(), bytes.as_chunks().0.as_chunks().0);
    let ([p, q], [r, t]) = (B::widen_over(s, &bytes[0]), B::widen_over(s, &bytes[1]));
    [d.pack([scale(p), scale(q)]), d.pack([scale(r), scale(t)])]
}

/// What the elements of a row share, and their bytes.
#[derive(Clone, Copy)]
pub(crate) struct BytesRow<'a, T> {
    shared: T,
    bytes: &'a [[u8; LANES]],
}

impl<'a, B: ByteInBf16> InBf16 for Bytes<'a, B> {
    type BlockOf<D: DotBf16> = BytesRow<'a, B::Shared<D>>;
    const TOO_FEW: usize = B::TOO_FEW;
    const LARGE_BLOCKS: bool = true;

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    #[inline(always)]
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> BytesRow<'a, B::Shared<D>> {
        let Scaled { scale, bytes } = self.block(d.simd(), index);
        BytesRow { shared: B::share(d, scale), bytes }
    }

    #[inline(always)]
    fn block_over_factor<D: DotBf16>(&self, d: D, index: usize) -> BytesRow<'a, B::Shared<D>> {
        let s = d.simd();
        BytesRow { shared: B::share(d, s.splat(1.0)), bytes: self.block(s, index).bytes }
    }

    #[inline(always)]
    fn factor_in_bf16(&self, row: usize) -> f32 {
        self.scales.at(row)
    }

    #[inline(always)]
    fn quad<D: DotBf16>(&self, d: D, block: &BytesRow<'a, B::Shared<D>>, i: usize) -> [D::P; 2] {
        B::quad(d, block.shared, &block.bytes.as_flattened().as_chunks().0[i])
    }

    #[inline(always)]
    fn quad_alone<D: DotBf16>(&self, d: D, at: usize) -> [D::P; 2] {
        let Scaled { scale, bytes } = self.block(d.simd(), at / self.block_len());
        B::quad_alone(d, scale, &bytes.as_flattened().as_chunks().0[at % self.block_len() / QUAD])
    }

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        B::place(k, i)
    }
}

impl<'a> InBf16 for Absmax<'a> {
    type BlockOf<D: DotBf16> = Scaled<'a, V<D>>;
    const TOO_FEW: usize = 4;

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    #[inline(always)]
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> Scaled<'a, V<D>> {
        self.block(d.simd(), index)
    }

    #[inline(always)]
    fn quad<D: DotBf16>(&self, d: D, block: &Scaled<'a, V<D>>, i: usize) -> [D::P; 2] {
        let (s, bytes) = (d.simd(), &block.bytes.as_flattened().as_chunks().0[i]);
        scaled::<I8, D>(
            d,
            bytes,
            #[inline(always)]
            |v| s.mul(s.mul(v, block.scale), s.splat(self.step)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::simd::{Bf16Kernel, dispatch_bf16};
    use crate::quant::kernels::{Codes, Floats};
    use half::bf16;

    /// Reads all elements of a format, in each of its ways, and compares them with those that are read one by one.
    struct Compare<'a, F>(&'a F, usize);

    impl<F: InBf16> Bf16Kernel for Compare<'_, F> {
        fn run<D: DotBf16>(self, d: D) {
            let Compare(format, len) = self;
            for at in (0..len).step_by(QUAD) {
                let (block, i) = (at / format.block_len(), at % format.block_len() / QUAD);
                let over = format.quad(d, &format.block_over_factor(d, block), i);
                let ways = [format.quad(d, &format.block_in_bf16(d, block), i), format.quad_alone(d, at), over];
                for (way, answers) in ways.into_iter().enumerate() {
                    let factor = if way == 2 { format.factor_in_bf16(block) } else { 1.0 };
                    for (k, answer) in answers.into_iter().enumerate() {
                        let mut found = [bf16::ZERO; 2 * LANES];
                        d.store(answer, &mut found);
                        for (i, found) in found.into_iter().enumerate() {
                            let place = at % format.block_len() + F::place(k, i);
                            let found = bf16::from_f32(found.to_f32() * factor);
                            assert_eq!(found, bf16::from_f32(format.value(block, place)), "way {way}, {at}, {k}, {i}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_way_reads_the_same_elements() {
        const ROW: usize = 320;
        // Of every byte, and the last ones again; but for those of fp8 that are no numbers.
        let finite = |largest: u8| -> Vec<u8> {
            (0..2 * ROW).map(|i| i as u8).map(|byte| if byte & 127 > largest { byte & 128 } else { byte }).collect()
        };
        let scales = [bf16::from_f32(0.017), bf16::from_f32(3.4)];
        let scales = Floats::Bf16(&scales);
        dispatch_bf16(Compare(&Bytes::<E4m3>::new(&finite(126), scales, ROW), 2 * ROW));
        dispatch_bf16(Compare(&Bytes::<E5m2>::new(&finite(123), scales, ROW), 2 * ROW));
        let any = finite(127);
        dispatch_bf16(Compare(&Bytes::<I8>::new(&any, scales, ROW), 2 * ROW));
        let absmax = Absmax { bytes: &any, scales: &[1.5, 1000.0], step: 1.0 / 127.0, row: ROW, dtype: Dtype::Bf16 };
        dispatch_bf16(Compare(&absmax, 2 * ROW));
        let (code, scales) = (std::array::from_fn(|i| i as f32 / 8.0 - 1.0), [0.3, 1.1, 7.0, 90.0, 0.01]);
        dispatch_bf16(Compare(&Codes::<_, bf16>::new(&any[..ROW], &scales[..], &code, 2 * QUAD), 2 * ROW));
    }
}
