//! The formats of a byte for each element as bf16: a row has a table of the
//! values of its 128 magnitudes, and the sign is the byte's.

use super::formats::Byte;
use super::in_bf16::{InBf16, QUAD, V};
use super::{Absmax, Bytes, Dtype, E4m3, E5m2, Format, I8};
use crate::ffi::simd::{DotBf16, LANES, Simd};

/// A byte that can be looked up.
pub(crate) trait ByteInBf16: Byte {
    /// The negative number of each magnitude.
    const NEGATIVES: [[u8; LANES]; 8];

    fn look_up<D: DotBf16>(d: D, table: D::Table, bytes: &[u8; QUAD]) -> [D::P; 2];
}

/// The bytes whose upper bit is the sign, by their other bits.
const fn negatives(integers: bool) -> [[u8; LANES]; 8] {
    let (mut numbers, mut i) = ([[0; LANES]; 8], 0);
    while i < 128 {
        let magnitude = i as u8;
        // Of integers, that of -128 is 0, as zero needs none.
        numbers[i / LANES][i % LANES] = 128 | if integers { magnitude.wrapping_neg() } else { magnitude };
        i += 1;
    }
    numbers
}

impl ByteInBf16 for I8 {
    const NEGATIVES: [[u8; LANES]; 8] = negatives(true);

    #[inline(always)]
    fn look_up<D: DotBf16>(d: D, table: D::Table, bytes: &[u8; QUAD]) -> [D::P; 2] {
        d.look_up_integers(table, bytes)
    }
}

macro_rules! floats {
    ($($byte:ty)*) => { $(
        impl ByteInBf16 for $byte {
            const NEGATIVES: [[u8; LANES]; 8] = negatives(false);

            #[inline(always)]
            fn look_up<D: DotBf16>(d: D, table: D::Table, bytes: &[u8; QUAD]) -> [D::P; 2] {
                d.look_up_floats(table, bytes)
            }
        }
    )* };
}

floats!(E4m3 E5m2);

/// The table of what a row's bytes mean, by what a number is made of its value.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn table<B: ByteInBf16, D: DotBf16>(d: D, scaled: impl Fn(V<D>) -> V<D>) -> D::Table {
    let s = d.simd();
    let mut values = [s.splat(0.0); 8];
    for i in 0..8 {
        values[i] = s.mul(scaled(B::widen(s, &B::NEGATIVES[i])), s.splat(-1.0));
    }
    d.table_of_128(values)
}

/// The same of sixty-four bytes, without a table.
#[inline(always)]
fn alone<B: Byte, D: DotBf16>(d: D, bytes: &[u8; QUAD], scaled: impl Fn(V<D>) -> V<D>) -> [D::P; 2] {
    let (s, mut in_place) = (d.simd(), [0; QUAD]);
    for k in 0..2 {
        for i in 0..2 * LANES {
            in_place[2 * LANES * k + i] = bytes[place(k, i)];
        }
    }
    let pairs = in_place.as_chunks().0.as_chunks().0;
    let ([a, b], [e, f]) = (B::widen_over(s, &pairs[0]), B::widen_over(s, &pairs[1]));
    [d.pack([scaled(a), scaled(b)]), d.pack([scaled(e), scaled(f)])]
}

/// The order of [`DotBf16::look_up_floats`].
#[inline(always)]
fn place(k: usize, i: usize) -> usize {
    16 * (i / 8) + 8 * k + i % 8
}

/// A row's table and bytes.
#[derive(Clone, Copy)]
pub(crate) struct BytesRow<'a, T> {
    table: T,
    bytes: &'a [[u8; LANES]],
}

impl<'a, T: Copy> BytesRow<'a, T> {
    #[inline(always)]
    fn quad(&self, i: usize) -> &'a [u8; QUAD] {
        &self.bytes.as_flattened().as_chunks().0[i]
    }
}

impl<'a, B: ByteInBf16> InBf16 for Bytes<'a, B> {
    type BlockOf<D: DotBf16> = BytesRow<'a, D::Table>;
    const LARGE_BLOCKS: bool = true;

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    #[inline(always)]
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> BytesRow<'a, D::Table> {
        let (s, row) = (d.simd(), self.block(d.simd(), index));
        BytesRow {
            table: table::<B, D>(
                d,
                #[inline(always)]
                |v| s.mul(v, row.scale),
            ),
            bytes: row.bytes,
        }
    }

    #[inline(always)]
    fn block_over_factor<D: DotBf16>(&self, d: D, index: usize) -> BytesRow<'a, D::Table> {
        BytesRow {
            table: table::<B, D>(
                d,
                #[inline(always)]
                |v| v,
            ),
            bytes: self.block(d.simd(), index).bytes,
        }
    }

    #[inline(always)]
    fn factor_in_bf16(&self, row: usize) -> f32 {
        self.scales.at(row)
    }

    #[inline(always)]
    fn quad<D: DotBf16>(&self, d: D, block: &BytesRow<'a, D::Table>, i: usize) -> [D::P; 2] {
        B::look_up(d, block.table, block.quad(i))
    }

    #[inline(always)]
    fn quad_alone<D: DotBf16>(&self, d: D, at: usize) -> [D::P; 2] {
        let (s, row) = (d.simd(), self.block(d.simd(), at / self.block_len()));
        let scale = s.mul(row.scale, s.splat(B::OVER));
        alone::<B, D>(
            d,
            &row.bytes.as_flattened().as_chunks().0[at % self.block_len() / QUAD],
            #[inline(always)]
            |v| s.mul(v, scale),
        )
    }

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        place(k, i)
    }
}

impl<'a> InBf16 for Absmax<'a> {
    type BlockOf<D: DotBf16> = BytesRow<'a, D::Table>;
    const LARGE_BLOCKS: bool = true;

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    #[inline(always)]
    fn block_in_bf16<D: DotBf16>(&self, d: D, index: usize) -> BytesRow<'a, D::Table> {
        let (s, row) = (d.simd(), self.block(d.simd(), index));
        BytesRow {
            table: table::<I8, D>(
                d,
                #[inline(always)]
                |v| s.mul(s.mul(v, row.scale), s.splat(self.step)),
            ),
            bytes: row.bytes,
        }
    }

    #[inline(always)]
    fn block_over_factor<D: DotBf16>(&self, d: D, index: usize) -> BytesRow<'a, D::Table> {
        BytesRow {
            table: table::<I8, D>(
                d,
                #[inline(always)]
                |v| v,
            ),
            bytes: self.block(d.simd(), index).bytes,
        }
    }

    #[inline(always)]
    fn factor_in_bf16(&self, row: usize) -> f32 {
        self.factor(row)
    }

    #[inline(always)]
    fn quad<D: DotBf16>(&self, d: D, block: &BytesRow<'a, D::Table>, i: usize) -> [D::P; 2] {
        d.look_up_integers(block.table, block.quad(i))
    }

    #[inline(always)]
    fn quad_alone<D: DotBf16>(&self, d: D, at: usize) -> [D::P; 2] {
        let (s, row) = (d.simd(), self.block(d.simd(), at / self.block_len()));
        alone::<I8, D>(
            d,
            &row.bytes.as_flattened().as_chunks().0[at % self.block_len() / QUAD],
            #[inline(always)]
            |v| s.mul(s.mul(v, row.scale), s.splat(self.step)),
        )
    }

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        place(k, i)
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
