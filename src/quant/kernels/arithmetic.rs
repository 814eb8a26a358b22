//! What multiplies in the products of [`few`](super::few): f32 on every
//! instruction set, or bf16 where the processor has products of these, so that
//! nothing is widened and an instruction does two products in each lane.
//!
//! Sums are in f32 in either. Subnormal bf16 count as zero.

use super::in_bf16::{InBf16, QUAD};
use super::{Float, Format};
use crate::ffi::simd::{Bf16Kernel, DotBf16, Kernel, LANES, Simd, dispatch, dispatch_bf16};
use half::bf16;
use std::marker::PhantomData;

/// Sixteen sums, in a cache line of their own.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Lanes(pub(super) [f32; LANES]);

/// The elements of a row that are unpacked together, in the order in which the
/// format answers them, in cache lines of their own.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Unit<E: Vector>(pub(super) [E::Vector; 2]);

impl<E: Vector> Default for Unit<E> {
    fn default() -> Self {
        Unit([E::ZERO; 2])
    }
}

impl<E: Vector> Unit<E> {
    /// Takes a unit of a row of x, in the order of a format.
    pub(super) fn fill<F: Format, X: Copy + Into<E>>(&mut self, from: &[X])
    where
        E: Element<F>,
    {
        for (k, part) in self.0.iter_mut().enumerate() {
            part.as_mut().iter_mut().enumerate().for_each(|(i, to)| *to = from[E::place(k, i)].into());
        }
    }
}

/// An element that fills vectors.
pub(super) trait Vector: Float {
    /// The elements of one.
    type Vector: Copy + Send + Sync + AsMut<[Self]>;
    const ZERO: Self::Vector;
}

impl Vector for f32 {
    type Vector = [f32; LANES];
    const ZERO: Self::Vector = [0.0; LANES];
}

impl Vector for bf16 {
    type Vector = [bf16; 2 * LANES];
    const ZERO: Self::Vector = [bf16::ZERO; 2 * LANES];
}

/// What x and W are multiplied as.
pub(super) trait Element<F: Format>: Vector {
    /// Elements of a [`Unit`].
    const UNIT: usize;
    /// Where in a unit of the row lane `i` of vector `k` is.
    fn place(k: usize, i: usize) -> usize;

    /// Rows of W that an instruction takes for g · W.
    const ROWS: usize;
    /// That many elements of g.
    type Group: Copy + Default + Send + Sync + AsMut<[Self]>;
    /// The sums of a unit of dX.
    type Sums: Copy + Default + Send + Sync + AsRef<[Lanes]> + AsMut<[Lanes]>;
    /// Where in a unit of the row lane `i` of vector `k` of the sums is.
    fn place_of_sum(k: usize, i: usize) -> usize;
    /// An element of g, times what the values of its row of W lack.
    fn scaled(g: Self, format: &F, row: usize) -> Self;

    /// Runs a product on the best instruction set of this processor.
    fn run(product: impl Multiplies<F, Self>);
}

/// A product, compiled for each instruction set; see [`Kernel`].
pub(super) trait Multiplies<F: Format, E: Element<F>> {
    fn run<A: Arithmetic<F, Element = E>>(self, a: A);
}

/// Products of an element's type on an instruction set.
pub(super) trait Arithmetic<F: Format>: Copy {
    type Element: Element<F>;
    type S: Simd;
    /// The elements of a vector.
    type V: Copy;

    fn simd(self) -> Self::S;
    fn load(self, from: &<Self::Element as Vector>::Vector) -> Self::V;
    fn splat(self, group: <Self::Element as Element<F>>::Group) -> Self::V;
    /// c + a · b, in each lane of c.
    fn multiply_add(self, a: Self::V, b: Self::V, c: <Self::S as Simd>::V) -> <Self::S as Simd>::V;

    /// What the elements of a block of W share.
    type Block: Copy;
    fn block(self, format: &F, index: usize) -> Self::Block;
    /// Unit `i` of a block, over the [`factor`](Self::factor) of its row.
    fn values(self, format: &F, block: &Self::Block, i: usize) -> [Self::V; 2];
    fn factor(self, format: &F, row: usize) -> f32;

    /// Whether what blocks share is too much for the registers if these are many.
    const LARGE_BLOCKS: bool;
    /// Block `b` of the rows that are multiplied at once, from `row` of `out` on.
    type Blocks: Copy;
    fn blocks(self, format: &F, row: [usize; 2], blocks: usize, b: usize) -> Self::Blocks;
    /// Unit `i` of these rows, in the order of the sums.
    type Rows: Copy + AsRef<[Self::V]>;
    fn rows(self, format: &F, blocks: &Self::Blocks, i: usize) -> Self::Rows;
}

impl<F: Format> Element<F> for f32 {
    const UNIT: usize = 2 * LANES;

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        if F::INTERLEAVED { 2 * i + k } else { LANES * k + i }
    }

    const ROWS: usize = 1;
    type Group = [f32; 1];
    type Sums = [Lanes; 2];

    #[inline(always)]
    fn place_of_sum(k: usize, i: usize) -> usize {
        <f32 as Element<F>>::place(k, i)
    }

    #[inline(always)]
    fn scaled(g: f32, format: &F, row: usize) -> f32 {
        g * format.factor(row)
    }

    fn run(product: impl Multiplies<F, f32>) {
        dispatch(RunF32::new(product));
    }
}

/// A product in f32.
pub(super) struct RunF32<P, F>(P, PhantomData<F>);

impl<P: Multiplies<F, f32>, F: Format> RunF32<P, F> {
    pub(super) fn new(product: P) -> Self {
        RunF32(product, PhantomData)
    }
}

impl<F: Format, P: Multiplies<F, f32>> Kernel for RunF32<P, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run(InF32(s));
    }
}

#[derive(Clone, Copy)]
struct InF32<S>(S);

impl<F: Format, S: Simd> Arithmetic<F> for InF32<S> {
    type Element = f32;
    type S = S;
    type V = S::V;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> S::V {
        self.0.load(from)
    }

    #[inline(always)]
    fn splat(self, [g]: [f32; 1]) -> S::V {
        self.0.splat(g)
    }

    #[inline(always)]
    fn multiply_add(self, a: S::V, b: S::V, c: S::V) -> S::V {
        self.0.mul_add(a, b, c)
    }

    type Block = F::Block<S>;

    #[inline(always)]
    fn block(self, format: &F, index: usize) -> F::Block<S> {
        format.block(self.0, index)
    }

    #[inline(always)]
    fn values(self, format: &F, block: &F::Block<S>, i: usize) -> [S::V; 2] {
        format.pair(self.0, block, i)
    }

    #[inline(always)]
    fn factor(self, format: &F, row: usize) -> f32 {
        format.factor(row)
    }

    const LARGE_BLOCKS: bool = false;
    type Blocks = F::Block<S>;

    #[inline(always)]
    fn blocks(self, format: &F, [row, _]: [usize; 2], blocks: usize, b: usize) -> F::Block<S> {
        format.block(self.0, row * blocks + b)
    }

    type Rows = [S::V; 2];

    #[inline(always)]
    fn rows(self, format: &F, block: &F::Block<S>, i: usize) -> [S::V; 2] {
        format.pair(self.0, block, i)
    }
}

impl<F: InBf16> Element<F> for bf16 {
    const UNIT: usize = QUAD;

    #[inline(always)]
    fn place(k: usize, i: usize) -> usize {
        F::place(k, i)
    }

    const ROWS: usize = 2;
    type Group = [bf16; 2];
    type Sums = [Lanes; 4];

    #[inline(always)]
    fn place_of_sum(k: usize, i: usize) -> usize {
        // The order of `interleave`.
        F::place(k / 2, 8 * (i / 4) + 4 * (k % 2) + i % 4)
    }

    #[inline(always)]
    fn scaled(g: bf16, _: &F, _: usize) -> bf16 {
        g
    }

    fn run(product: impl Multiplies<F, bf16>) {
        struct Run<P, F>(P, PhantomData<F>);
        impl<F: InBf16, P: Multiplies<F, bf16>> Bf16Kernel for Run<P, F> {
            #[inline(always)]
            fn run<D: DotBf16>(self, d: D) {
                self.0.run(Bf16(d));
            }
        }
        dispatch_bf16(Run(product, PhantomData));
    }
}

#[derive(Clone, Copy)]
struct Bf16<D>(D);

impl<F: InBf16, D: DotBf16> Arithmetic<F> for Bf16<D> {
    type Element = bf16;
    type S = D::S;
    type V = D::P;

    #[inline(always)]
    fn simd(self) -> D::S {
        self.0.simd()
    }

    #[inline(always)]
    fn load(self, from: &[bf16; 2 * LANES]) -> D::P {
        self.0.load(from)
    }

    #[inline(always)]
    fn splat(self, group: [bf16; 2]) -> D::P {
        self.0.splat(group)
    }

    #[inline(always)]
    fn multiply_add(self, a: D::P, b: D::P, c: <D::S as Simd>::V) -> <D::S as Simd>::V {
        self.0.dot(a, b, c)
    }

    type Block = F::BlockOf<D>;

    #[inline(always)]
    fn block(self, format: &F, index: usize) -> F::BlockOf<D> {
        format.block_over_factor(self.0, index)
    }

    #[inline(always)]
    fn values(self, format: &F, block: &F::BlockOf<D>, i: usize) -> [D::P; 2] {
        format.quad(self.0, block, i)
    }

    #[inline(always)]
    fn factor(self, format: &F, row: usize) -> f32 {
        format.factor_in_bf16(row)
    }

    const LARGE_BLOCKS: bool = F::LARGE_BLOCKS;
    type Blocks = [F::BlockOf<D>; 2];

    #[inline(always)]
    fn blocks(self, format: &F, [row, out]: [usize; 2], blocks: usize, b: usize) -> [F::BlockOf<D>; 2] {
        let second = (row + 1).min(out - 1);
        [format.block_in_bf16(self.0, row * blocks + b), format.block_in_bf16(self.0, second * blocks + b)]
    }

    type Rows = [D::P; 4];

    #[inline(always)]
    fn rows(self, format: &F, blocks: &[F::BlockOf<D>; 2], i: usize) -> [D::P; 4] {
        let (a, b) = (format.quad(self.0, &blocks[0], i), format.quad(self.0, &blocks[1], i));
        let ([p, q], [r, t]) = (self.0.interleave(a[0], b[0]), self.0.interleave(a[1], b[1]));
        [p, q, r, t]
    }
}
