//! Tiles: how much of a weight is dense at a time.

use crate::error::Result;
use crate::ffi::bytes::element_size;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;
use tch::{Device, Kind, Tensor};

/// Elements of one tile: 4 MiB of f32, small enough for the last-level cache
/// and large enough for a matrix product to run at full speed.
const TILE: i64 = 1 << 20;

/// Elements of a tile that a product reads: on the CPU 4 MiB, of which 16-bit
/// numbers are twice as many.
pub(super) fn elements(kind: Kind, device: Device) -> i64 {
    match (device, kind) {
        (Device::Cuda(_), _) => cuda_bytes() / element_size(kind) as i64,
        (_, Kind::BFloat16 | Kind::Half) => 2 * TILE,
        _ => TILE,
    }
}

/// Bytes of a tile on a CUDA device: as many MiB as `TCH_PEFT_CUDA_TILE_MIB` says.
fn cuda_bytes() -> i64 {
    static BYTES: OnceLock<i64> = OnceLock::new();
    *BYTES.get_or_init(|| cuda_bytes_of(std::env::var("TCH_PEFT_CUDA_TILE_MIB").ok().as_deref()))
}

/// 64 MiB if nothing else is said: a matrix product of fewer rows or columns
/// would not fill a large card.
fn cuda_bytes_of(mib: Option<&str>) -> i64 {
    let default = 64;
    let mib = mib.map_or(default, |text| match text.parse() {
        Ok(mib) if (1..=1 << 20).contains(&mib) => mib,
        _ => {
            tracing::warn!(
                found = text,
                expected = "a whole number of MiB",
                default,
                "TCH_PEFT_CUDA_TILE_MIB is ignored"
            );
            default
        }
    });
    mib << 20
}

/// Rows of a tile of rows of `inn` elements of any dtype.
pub(super) fn rows(device: Device, inn: i64) -> i64 {
    let elements = if device == Device::Cpu { TILE } else { elements(Kind::Float, device) };
    (elements / inn.max(1)).max(1)
}

/// Calls `f(start, rows)` for consecutive ranges of rows of an (out, in)
/// weight, each of at most one tile of the CPU's (or one row).
pub(super) fn for_each(out: i64, inn: i64, f: impl FnMut(i64, i64) -> Result<()>) -> Result<()> {
    for_each_of(rows(Device::Cpu, inn), out, f)
}

/// The same, of `step` rows.
pub(super) fn for_each_of(step: i64, out: i64, mut f: impl FnMut(i64, i64) -> Result<()>) -> Result<()> {
    ranges(step, out).try_for_each(|range| f(range.start, range.end - range.start))
}

/// Consecutive ranges of at most `step`, which is at least one.
pub(super) fn ranges(step: i64, len: i64) -> impl Iterator<Item = Range<i64>> {
    (0..len).step_by(step as usize).map(move |start| start..len.min(start + step))
}

/// Elements of the largest scratch tile that is kept.
pub(super) const KEPT: i64 = 4 * TILE;

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
    // Weights longer or wider than that are rare.
    if buffer.numel() as i64 <= KEPT {
        SCRATCH.with_borrow_mut(|scratch| scratch.push((kind, buffer)));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_on_cuda_are_as_large_as_they_may_be() {
        for (said, mib) in [(None, 64), (Some("16"), 16), (Some("0"), 64), (Some("-3"), 64), (Some("much"), 64)] {
            assert_eq!(cuda_bytes_of(said), mib << 20, "{said:?}");
        }
        for (kind, size) in [(Kind::Float, 4), (Kind::BFloat16, 2), (Kind::Double, 8)] {
            assert_eq!(elements(kind, Device::Cuda(0)) * size, cuda_bytes());
        }
    }
}
