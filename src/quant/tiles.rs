//! Tiles: how much of a weight is dense at a time.

use crate::error::Result;
use std::cell::RefCell;
use tch::{Device, Kind, Tensor};

/// Elements of one tile: 4 MiB of f32, small enough for the last-level cache
/// and large enough for a matrix product to run at full speed.
const TILE: i64 = 1 << 20;

/// Calls `f(start, rows)` for consecutive ranges of rows of an (out, in)
/// weight, each of at most one tile (or one row).
pub(super) fn for_each(out: i64, inn: i64, mut f: impl FnMut(i64, i64) -> Result<()>) -> Result<()> {
    let step = (TILE / inn.max(1)).max(1);
    let mut start = 0;
    while start < out {
        let rows = step.min(out - start);
        f(start, rows)?;
        start += rows;
    }
    Ok(())
}

thread_local! {
    /// One tile per dtype that is used again and again: a fresh buffer costs
    /// more in page faults than the unpacking itself.
    static SCRATCH: RefCell<Vec<(Kind, Tensor)>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with a scratch tile (rows, in), contents undefined.
///
/// The tile must not outlive the call.
pub(super) fn with_scratch<R>(
    rows: i64,
    inn: i64,
    kind: Kind,
    device: Device,
    f: impl FnOnce(&mut Tensor) -> Result<R>,
) -> Result<R> {
    // CUDA's caching allocator does this already.
    if device != Device::Cpu {
        return f(&mut Tensor::f_empty([rows, inn], (kind, device))?);
    }
    let len = rows * inn;
    let kept = SCRATCH.with_borrow_mut(|scratch| {
        let at = scratch.iter().position(|(k, _)| *k == kind)?;
        Some(scratch.swap_remove(at).1)
    });
    let buffer = match kept {
        Some(buffer) if buffer.numel() as i64 >= len => buffer,
        _ => Tensor::f_empty([len.max(TILE)], (kind, device))?,
    };
    let result = f(&mut buffer.f_narrow(0, 0, len)?.f_view([rows, inn])?);
    // Weights wider than a tile are rare: their rows are not kept.
    if buffer.numel() as i64 == TILE {
        SCRATCH.with_borrow_mut(|scratch| scratch.push((kind, buffer)));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once() {
        for (out, inn) in [(1, 1), (7, TILE), (5, TILE + 1), (3000, 2048), (0, 4)] {
            let mut next = 0;
            for_each(out, inn, |start, rows| {
                assert_eq!(start, next);
                assert!(rows == 1 || rows * inn <= TILE);
                next += rows;
                Ok(())
            })
            .unwrap();
            assert_eq!(next, out);
        }
    }
}
