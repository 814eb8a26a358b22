//! Products with many rows of bf16 in tile registers (AMX): the weight goes
//! from its bytes into tiles that stay in the second-level cache, and from
//! there into the sums.
//!
//! Each product is of tiles of x or g, made once, and tiles of W, made strip by
//! strip and used for all rows; a strip is a part of what is summed over. Sums
//! are in f32, in an order that depends on the shapes only. Subnormal numbers
//! count as zero.

use super::Dtype;
use super::in_bf16::{InBf16, QUAD};
use crate::error::Result;
use crate::ffi::compute::{Columns, for_each_chunk, for_each_columns};
use crate::ffi::simd::{Amx, Bf16Kernel, DotBf16, LANES, Simd, Sums, TILE, Tile, dispatch_bf16};
use half::bf16;

/// Rows of x or g at a time.
const ROWS: usize = 512;
/// Rows of W (x · Wᵀ) or columns of it (g · W) at a time.
const PART: usize = 256;
/// Elements of a sum at a time: two tiles' worth of x is half of the first-level cache.
const STRIP: usize = 512;

/// Elements of a sum that a tile has.
const DEPTH: usize = 2 * TILE;
/// Rows or columns that are multiplied together.
const PAIR: usize = 2 * TILE;

/// Sums of two tiles by two.
type Square = [[Sums; 2]; 2];
const ZEROS: Square = [[Sums::ZERO; 2]; 2];

/// The registers, if the processor has any and the layout fits.
pub(super) fn fits<F: InBf16>(format: &F, inn: usize) -> Option<Amx> {
    let block = format.block_len();
    let fits = format.dtype() == Dtype::Bf16 && block.is_multiple_of(QUAD) && inn.is_multiple_of(block);
    if fits { Amx::detect() } else { None }
}

/// Tiles of a side of a product: for each sixteen rows or columns, those along the sum.
struct Side {
    tiles: Vec<Tile>,
    /// How many there are along the sum.
    depth: usize,
}

impl Side {
    fn new(rows: usize, len: usize) -> Self {
        let depth = len.div_ceil(DEPTH);
        Side { tiles: vec![Tile::ZERO; 2 * rows.div_ceil(PAIR) * depth], depth }
    }

    /// The pair `i` of rows of tiles, from tile `first` on.
    #[inline(always)]
    fn pair(&self, i: usize, first: usize) -> [&[Tile]; 2] {
        let (a, b) = self.tiles[2 * i * self.depth..][..2 * self.depth].split_at(self.depth);
        [&a[first..], &b[first..]]
    }
}

/// y = x · Wᵀ.
pub(super) fn product<F: InBf16>(
    amx: Amx,
    format: &F,
    [out, inn]: [usize; 2],
    x: &[bf16],
    y: &mut [bf16],
) -> Result<()> {
    for (x, y) in x.chunks(ROWS * inn).zip(y.chunks_mut(ROWS * out)) {
        let rows = x.len() / inn;
        let mut side = Side::new(rows, inn);
        let depth = side.depth;
        for_each_chunk(&mut side.tiles, depth, |i, tiles| {
            let first = (i * TILE).min(rows);
            let x = &x[first * inn..(first + TILE).min(rows) * inn];
            dispatch_bf16(Columnwise { format, x, inn, tiles });
        })?;
        for_each_columns(y, out, PART, |i, y| {
            dispatch_bf16(Product { amx, format, inn, first: i * PART, x: &side, rows, y });
        })?;
    }
    Ok(())
}

/// Makes tiles of up to sixteen rows of x, the right side of a product, in the format's order.
struct Columnwise<'a, F> {
    format: &'a F,
    x: &'a [bf16],
    inn: usize,
    tiles: &'a mut [Tile],
}

impl<F: InBf16> Bf16Kernel for Columnwise<'_, F> {
    #[inline(always)]
    fn run<D: DotBf16>(self, d: D) {
        let places: [[u16; DEPTH]; 2] = std::array::from_fn(|k| std::array::from_fn(|i| F::place(k, i) as u16));
        for (quad, tiles) in self.tiles.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let mut rows = [[d.splat([bf16::ZERO; 2]); TILE]; 2];
            for (r, x) in self.x.chunks_exact(self.inn).enumerate() {
                let [a, b] = [&x[quad * QUAD..][..DEPTH], &x[quad * QUAD + DEPTH..][..DEPTH]];
                if let (Some(a), Some(b)) = (a.first_chunk(), b.first_chunk()) {
                    let x = [d.load(a), d.load(b)];
                    rows[0][r] = d.shuffle(x, &places[0]);
                    rows[1][r] = d.shuffle(x, &places[1]);
                }
            }
            for k in 0..2 {
                let columns = d.transpose_pairs(&rows[k]);
                for p in 0..TILE {
                    d.store(columns[p], &mut tiles[k].0[p]);
                }
            }
        }
    }
}

struct Product<'a, F> {
    amx: Amx,
    format: &'a F,
    inn: usize,
    /// The first row of W.
    first: usize,
    x: &'a Side,
    rows: usize,
    y: Columns<'a, bf16>,
}

impl<F: InBf16> Bf16Kernel for Product<'_, F> {
    #[inline(always)]
    fn run<D: DotBf16>(mut self, d: D) {
        let mut registers = self.amx.registers();
        let out = self.y.len();
        let mut w = Side::new(out, STRIP.min(self.inn));
        let across = out.div_ceil(PAIR);
        let mut sums = vec![ZEROS; across * self.rows.div_ceil(PAIR)];
        for start in (0..self.inn).step_by(STRIP) {
            let len = STRIP.min(self.inn - start);
            for row in 0..out {
                self.unpack(d, row, start, len, &mut w);
            }
            for (j, sums) in sums.chunks_exact_mut(across).enumerate() {
                let x = self.x.pair(j, start / DEPTH);
                for (i, sums) in sums.iter_mut().enumerate() {
                    let [a, b] = w.pair(i, 0);
                    registers.multiply([&a[..len / DEPTH], &b[..len / DEPTH]], x, sums);
                }
            }
        }
        self.finish(d, &sums, across);
    }
}

impl<F: InBf16> Product<'_, F> {
    /// Elements from `start` on of a row into tiles, whose rows they are.
    #[inline(always)]
    fn unpack<D: DotBf16>(&self, d: D, row: usize, start: usize, len: usize, w: &mut Side) {
        let block = self.format.block_len();
        let mut at = (self.first + row) * self.inn + start;
        let end = at + len;
        let mut tiles = w.tiles[row / TILE * w.depth..][..w.depth].as_chunks_mut::<2>().0.iter_mut();
        while at < end {
            let part = self.format.block_in_bf16(d, at / block);
            let quads = (block - at % block).min(end - at) / QUAD;
            let first = at % block / QUAD;
            for (quad, to) in (first..first + quads).zip(&mut tiles) {
                let values = self.format.quad(d, &part, quad);
                d.store(values[0], &mut to[0].0[row % TILE]);
                d.store(values[1], &mut to[1].0[row % TILE]);
            }
            at += quads * QUAD;
        }
    }

    /// Writes the sums, which are yᵀ.
    #[inline(always)]
    fn finish<D: DotBf16>(&mut self, d: D, sums: &[Square], across: usize) {
        let out = self.y.len();
        for (j, sums) in sums.chunks_exact(across).enumerate() {
            for (i, square) in sums.iter().enumerate() {
                let width = PAIR.min(out - i * PAIR);
                for half in 0..2 {
                    let parts = [d.transpose(&square[0][half].0), d.transpose(&square[1][half].0)];
                    let first = j * PAIR + half * TILE;
                    for r in 0..TILE.min(self.rows.saturating_sub(first)) {
                        let mut values = [bf16::ZERO; PAIR];
                        d.store(d.pack([parts[0][r], parts[1][r]]), &mut values);
                        self.y.row(first + r)[i * PAIR..][..width].copy_from_slice(&values[..width]);
                    }
                }
            }
        }
    }
}

/// dX = g · W.
pub(super) fn product_transposed<F: InBf16>(
    amx: Amx,
    format: &F,
    [out, inn]: [usize; 2],
    g: &[bf16],
    dx: &mut [bf16],
) -> Result<()> {
    for (g, dx) in g.chunks(ROWS * out).zip(dx.chunks_mut(ROWS * inn)) {
        let rows = g.len() / out;
        let mut side = Side::new(rows, out);
        let depth = side.depth;
        for_each_chunk(&mut side.tiles, depth, |i, tiles| {
            for (r, g) in g.chunks_exact(out).skip(i * TILE).take(TILE).enumerate() {
                for (tile, g) in tiles.iter_mut().zip(g.chunks(DEPTH)) {
                    tile.0[r][..g.len()].copy_from_slice(g);
                }
            }
        })?;
        for_each_columns(dx, inn, PART, |i, dx| {
            dispatch_bf16(Transposed { amx, format, shape: [out, inn], first: i * PART, g: &side, rows, dx });
        })?;
    }
    Ok(())
}

struct Transposed<'a, F> {
    amx: Amx,
    format: &'a F,
    shape: [usize; 2],
    /// The first column of W.
    first: usize,
    g: &'a Side,
    rows: usize,
    dx: Columns<'a, bf16>,
}

impl<F: InBf16> Bf16Kernel for Transposed<'_, F> {
    #[inline(always)]
    fn run<D: DotBf16>(mut self, d: D) {
        let mut registers = self.amx.registers();
        let (out, inn) = (self.shape[0], self.dx.len());
        let mut w = Side::new(inn, STRIP.min(out));
        let across = inn / PAIR;
        let mut sums = vec![ZEROS; across * self.rows.div_ceil(PAIR)];
        for start in (0..out).step_by(STRIP) {
            let len = STRIP.min(out - start);
            // What lies beyond the last row is multiplied by zeros of g.
            for row in (0..len).step_by(2) {
                self.unpack(d, start + row, row / 2, &mut w);
            }
            for (i, sums) in sums.chunks_exact_mut(across).enumerate() {
                let g = self.g.pair(i, start / DEPTH);
                for (j, sums) in sums.iter_mut().enumerate() {
                    let [a, b] = w.pair(j, 0);
                    let depth = len.div_ceil(DEPTH);
                    registers.multiply(g, [&a[..depth], &b[..depth]], sums);
                }
            }
        }
        self.finish(d, &sums, across);
    }
}

impl<F: InBf16> Transposed<'_, F> {
    /// Two rows of W, from `row` on, side by side into row `pair` of the tiles.
    #[inline(always)]
    fn unpack<D: DotBf16>(&self, d: D, row: usize, pair: usize, w: &mut Side) {
        let ([out, inn], block) = (self.shape, self.format.block_len());
        let (tile, p) = (pair / TILE, pair % TILE);
        let (mut at, end) = (self.first, self.first + self.dx.len());
        let mut columns = w.tiles.chunks_exact_mut(4 * w.depth);
        // A last row alone stands for two: the second is multiplied by a zero of g.
        let rows = [row, (row + 1).min(out - 1)];
        while at < end {
            let parts = [
                self.format.block_in_bf16(d, (rows[0] * inn + at) / block),
                self.format.block_in_bf16(d, (rows[1] * inn + at) / block),
            ];
            let quads = (block - at % block).min(end - at) / QUAD;
            let first = at % block / QUAD;
            for (quad, to) in (first..first + quads).zip(&mut columns) {
                let [a, b] = [self.format.quad(d, &parts[0], quad), self.format.quad(d, &parts[1], quad)];
                for k in 0..2 {
                    let both = d.interleave(a[k], b[k]);
                    d.store(both[0], &mut to[2 * k * w.depth + tile].0[p]);
                    d.store(both[1], &mut to[(2 * k + 1) * w.depth + tile].0[p]);
                }
            }
            at += quads * QUAD;
        }
    }

    /// Writes the sums, whose columns are in the order of the format and of `interleave`.
    #[inline(always)]
    fn finish<D: DotBf16>(&mut self, d: D, sums: &[Square], across: usize) {
        let s = d.simd();
        let mut places = [[0u16; DEPTH]; 2];
        for k in 0..2 {
            for i in 0..DEPTH {
                let place = F::place(k, i);
                let (half, lane) = (i / 4 % 2, 4 * (i / 8) + i % 4);
                places[place / DEPTH][place % DEPTH] = (DEPTH * k + LANES * half + lane) as u16;
            }
        }
        for (i, sums) in sums.chunks_exact(across).enumerate() {
            for (quad, squares) in sums.as_chunks::<2>().0.iter().enumerate() {
                for half in 0..2 {
                    let first = i * PAIR + half * TILE;
                    for r in 0..TILE.min(self.rows.saturating_sub(first)) {
                        let row = |k: usize, j: usize| s.load(&squares[k][half][j].0[r]);
                        let from = [d.pack([row(0, 0), row(0, 1)]), d.pack([row(1, 0), row(1, 1)])];
                        let to = &mut self.dx.row(first + r)[quad * QUAD..][..QUAD];
                        for (to, places) in to.as_chunks_mut().0.iter_mut().zip(&places) {
                            d.store(d.shuffle(from, places), to);
                        }
                    }
                }
            }
        }
    }
}
