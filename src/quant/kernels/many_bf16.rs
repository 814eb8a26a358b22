//! Products with many rows of bf16 in tile registers (AMX): a strip of the
//! weight goes from its bytes into tiles that stay in the first-level cache, and
//! is multiplied by all rows there.
//!
//! A strip is a part of what is summed over. Tiles of x or g are made once, and
//! lie strip by strip. Sums are in f32, in an order that depends on the shapes
//! only. Subnormal numbers count as zero.

use super::Dtype;
use super::in_bf16::{InBf16, QUAD};
use crate::error::Result;
use crate::ffi::compute::{Columns, for_each_chunk, for_each_columns, threads};
use crate::ffi::simd::{Amx, Bf16Kernel, DotBf16, LANES, Simd, Sums, TILE, Tile, dispatch_bf16};
use half::bf16;

/// Rows of x or g at a time.
const ROWS: usize = 512;
/// Rows of W (x · Wᵀ) or columns of it (g · W) whose sums a thread holds at a time.
const PART: usize = 256;

/// Elements of a sum that a tile has.
const DEPTH: usize = 2 * TILE;
/// Rows or columns that are multiplied together.
const PAIR: usize = 2 * TILE;
/// Tiles of a strip along the sum; a pair of strips of W is 32 KiB.
const STRIP: usize = 16;

/// Sums of two tiles by two.
type Square = [[Sums; 2]; 2];
const ZEROS: Square = [[Sums::ZERO; 2]; 2];

/// The registers, if the processor has any and the layout fits.
pub(super) fn fits<F: InBf16>(format: &F, inn: usize) -> Option<Amx> {
    let block = format.block_len();
    let fits = format.dtype() == Dtype::Bf16 && block.is_multiple_of(QUAD) && inn.is_multiple_of(block);
    if fits { Amx::detect() } else { None }
}

/// The tiles of x or g: strip by strip those of each sixteen rows.
struct Side {
    tiles: Vec<Tile>,
    /// Pairs of sixteen rows.
    pairs: usize,
}

impl Side {
    /// Makes the tiles of a strip and of sixteen rows by `f(strip, i, tiles)`, on libtorch's threads.
    fn new(rows: usize, len: usize, f: impl Fn(usize, usize, &mut [Tile]) + Sync) -> Result<Self> {
        let (pairs, strips) = (rows.div_ceil(PAIR), len.div_ceil(STRIP * DEPTH));
        let mut tiles = vec![Tile::ZERO; strips * 2 * pairs * STRIP];
        for_each_chunk(&mut tiles, STRIP, |i, tiles| f(i / (2 * pairs), i % (2 * pairs), tiles))?;
        Ok(Side { tiles, pairs })
    }

    /// The tiles of a strip, for each 32 rows.
    fn strip(&self, strip: usize) -> impl Iterator<Item = [&[Tile]; 2]> {
        let len = 2 * STRIP;
        let pairs = self.tiles[strip * self.pairs * len..][..self.pairs * len].chunks_exact(len);
        pairs.map(|pair| <[&[Tile]; 2]>::from(pair.split_at(STRIP)))
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
        let x = &Side::new(rows, inn, |strip, i, tiles| {
            let (row, column) = ((i * TILE).min(rows), strip * STRIP * DEPTH);
            let x = &x[row * inn..(row + TILE).min(rows) * inn];
            dispatch_bf16(Columnwise { place: F::place, x, inn, column, tiles });
        })?;
        let part = part(out);
        for_each_columns(y, out, part, |i, y| {
            dispatch_bf16(Product { amx, format, inn, first: i * part, x, rows, y });
        })?;
    }
    Ok(())
}

/// Rows or columns that a thread takes at a time, of so many; no sum depends on it.
fn part(len: usize) -> usize {
    len.div_ceil(threads()).next_multiple_of(QUAD).min(PART)
}

/// Makes tiles of up to sixteen rows of x, the right side of a product, in the format's order.
struct Columnwise<'a> {
    /// The format's.
    place: fn(usize, usize) -> usize,
    x: &'a [bf16],
    inn: usize,
    /// Where the strip begins.
    column: usize,
    tiles: &'a mut [Tile],
}

impl Bf16Kernel for Columnwise<'_> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn run<D: DotBf16>(self, d: D) {
        let mut places = [[0; DEPTH]; 2];
        for k in 0..2 {
            for i in 0..DEPTH {
                places[k][i] = (self.place)(k, i) as u16;
            }
        }
        let len = (self.inn - self.column).min(self.tiles.len() * DEPTH);
        for (quad, tiles) in self.tiles.as_chunks_mut::<2>().0.iter_mut().take(len / QUAD).enumerate() {
            let mut rows = [[d.splat([bf16::ZERO; 2]); TILE]; 2];
            for (r, x) in self.x.chunks_exact(self.inn).enumerate() {
                let [a, b] = x[self.column + quad * QUAD..][..QUAD].as_chunks().0 else { continue };
                let x = [d.load(a), d.load(b)];
                rows[0][r] = d.shuffle(x, &places[0]);
                rows[1][r] = d.shuffle(x, &places[1]);
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
        let mut w = [[Tile::ZERO; STRIP]; 2];
        let mut sums = vec![ZEROS; self.x.pairs * out.div_ceil(PAIR)];
        for (strip, start) in (0..self.inn).step_by(STRIP * DEPTH).enumerate() {
            let len = (self.inn - start).min(STRIP * DEPTH);
            for (i, sums) in sums.chunks_exact_mut(self.x.pairs).enumerate() {
                // Rows that are not there give sums that nobody reads.
                for row in 0..PAIR.min(out - i * PAIR) {
                    self.unpack(d, i * PAIR + row, start, len, row % TILE, &mut w[row / TILE]);
                }
                let w = [&w[0][..len / DEPTH], &w[1][..len / DEPTH]];
                for (x, sums) in self.x.strip(strip).zip(sums) {
                    registers.multiply(w, x, sums);
                }
            }
        }
        self.finish(d, &sums);
    }
}

impl<F: InBf16> Product<'_, F> {
    /// Elements from `start` on of a row of W into row `to` of the tiles.
    #[inline(always)]
    fn unpack<D: DotBf16>(&self, d: D, row: usize, start: usize, len: usize, to: usize, tiles: &mut [Tile; STRIP]) {
        let block = self.format.block_len();
        let mut at = (self.first + row) * self.inn + start;
        let end = at + len;
        let mut tiles = tiles.as_chunks_mut::<2>().0.iter_mut();
        while at < end {
            let part = self.format.block_in_bf16(d, at / block);
            let (first, quads) = (at % block / QUAD, (block - at % block).min(end - at) / QUAD);
            for (quad, tiles) in (first..first + quads).zip(&mut tiles) {
                let values = self.format.quad(d, &part, quad);
                d.store(values[0], &mut tiles[0].0[to]);
                d.store(values[1], &mut tiles[1].0[to]);
            }
            at += quads * QUAD;
        }
    }

    /// Writes the sums, which are yᵀ.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn finish<D: DotBf16>(&mut self, d: D, sums: &[Square]) {
        for (i, sums) in sums.chunks_exact(self.x.pairs).enumerate() {
            for (j, square) in sums.iter().enumerate() {
                for half in 0..2 {
                    let parts = [d.transpose(&square[0][half].0), d.transpose(&square[1][half].0)];
                    let first = j * PAIR + half * TILE;
                    for r in 0..TILE.min(self.rows.saturating_sub(first)) {
                        let (values, to) = (d.pack([parts[0][r], parts[1][r]]), &mut self.y.row(first + r)[i * PAIR..]);
                        if let Some(to) = to.first_chunk_mut() {
                            d.store(values, to);
                        } else {
                            let mut last = [bf16::ZERO; PAIR];
                            d.store(values, &mut last);
                            to.copy_from_slice(&last[..to.len()]);
                        }
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
        let g = &Side::new(rows, out, |strip, i, tiles| {
            for (r, g) in g.chunks_exact(out).skip(i * TILE).take(TILE).enumerate() {
                for (tile, g) in tiles.iter_mut().zip(g[strip * STRIP * DEPTH..].chunks(DEPTH)) {
                    tile.0[r][..g.len()].copy_from_slice(g);
                }
            }
        })?;
        let part = part(inn);
        for_each_columns(dx, inn, part, |i, dx| {
            dispatch_bf16(Transposed { amx, format, shape: [out, inn], first: i * part, g, rows, dx });
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

/// The tiles of 64 columns, in the order of the format and of `interleave`.
type Strips = [[[Tile; STRIP]; 2]; 2];

impl<F: InBf16> Bf16Kernel for Transposed<'_, F> {
    #[inline(always)]
    fn run<D: DotBf16>(mut self, d: D) {
        let mut registers = self.amx.registers();
        let out = self.shape[0];
        let mut w: Strips = [[[Tile::ZERO; STRIP]; 2]; 2];
        let mut sums = vec![[ZEROS; 2]; self.g.pairs * self.dx.len() / QUAD];
        for (strip, start) in (0..out).step_by(STRIP * DEPTH).enumerate() {
            let len = (out - start).min(STRIP * DEPTH);
            for (quad, sums) in sums.chunks_exact_mut(self.g.pairs).enumerate() {
                // What the tiles hold beyond the last row is multiplied by zeros of g.
                for row in (0..len).step_by(2) {
                    self.unpack(d, start + row, quad, row / 2, &mut w);
                }
                let depth = len.div_ceil(DEPTH);
                for (g, sums) in self.g.strip(strip).zip(sums) {
                    for (w, sums) in w.iter().zip(sums) {
                        registers.multiply(g, [&w[0][..depth], &w[1][..depth]], sums);
                    }
                }
            }
        }
        self.finish(d, &sums);
    }
}

impl<F: InBf16> Transposed<'_, F> {
    /// Two rows of W, from `row` on, side by side into row `pair` of the tiles.
    #[inline(always)]
    fn unpack<D: DotBf16>(&self, d: D, row: usize, quad: usize, pair: usize, w: &mut Strips) {
        let [out, inn] = self.shape;
        let (tile, p) = (pair / TILE, pair % TILE);
        // A last row alone stands for two: the second is multiplied by a zero of g.
        let at = [row, (row + 1).min(out - 1)].map(
            #[inline(always)]
            |row| row * inn + self.first + quad * QUAD,
        );
        let (a, b) = (self.format.quad_alone(d, at[0]), self.format.quad_alone(d, at[1]));
        for k in 0..2 {
            let both = d.interleave(a[k], b[k]);
            d.store(both[0], &mut w[k][0][tile].0[p]);
            d.store(both[1], &mut w[k][1][tile].0[p]);
        }
    }

    /// Writes the sums, with their columns in order again.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn finish<D: DotBf16>(&mut self, d: D, sums: &[[Square; 2]]) {
        let s = d.simd();
        let mut places = [[0u16; DEPTH]; 2];
        for k in 0..2 {
            for i in 0..DEPTH {
                let place = F::place(k, i);
                // The order of `interleave`.
                let (half, lane) = (i / 4 % 2, 4 * (i / 8) + i % 4);
                places[place / DEPTH][place % DEPTH] = (DEPTH * k + LANES * half + lane) as u16;
            }
        }
        for (quad, sums) in sums.chunks_exact(self.g.pairs).enumerate() {
            for (i, squares) in sums.iter().enumerate() {
                for half in 0..2 {
                    let first = i * PAIR + half * TILE;
                    for r in 0..TILE.min(self.rows.saturating_sub(first)) {
                        let [a, b] = [&squares[0][half], &squares[1][half]];
                        let from = [
                            d.pack([s.load(&a[0].0[r]), s.load(&a[1].0[r])]),
                            d.pack([s.load(&b[0].0[r]), s.load(&b[1].0[r])]),
                        ];
                        let to = self.dx.row(first + r)[quad * QUAD..][..QUAD].as_chunks_mut().0;
                        for (to, places) in to.iter_mut().zip(&places) {
                            d.store(d.shuffle(from, places), to);
                        }
                    }
                }
            }
        }
    }
}
