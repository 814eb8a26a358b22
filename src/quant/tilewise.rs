//! A product with a weight that is unpacked tile by tile. On a CUDA device the
//! next tile is unpacked on a second stream while one is multiplied.

use super::tiles::{KEPT, elements, ranges, with_scratch};
use crate::error::Result;
use crate::ffi::cuda::{CudaStreams, Stream, Streams};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// What a tile takes of a weight (out, in).
#[derive(Debug, Clone, Copy)]
pub(super) enum Cut {
    Rows,
    Columns,
}

/// Columns of a tile of columns: fewer would be slow to unpack.
const COLUMNS: i64 = 512;

impl Cut {
    /// Rows or columns of a tile of so many elements, or of one row or 64 columns.
    fn step(self, elements: i64, [out, inn]: [i64; 2]) -> i64 {
        match self {
            Cut::Rows => (elements / inn.max(1)).max(1),
            Cut::Columns => {
                let wanted = (elements / out.max(1)).max(COLUMNS.min(KEPT / out.max(1)));
                // Whole cache lines and whole blocks of most formats, and whole groups of 128 where there is room:
                // matrix products of other widths run slower.
                let group = if wanted < 128 { 64 } else { 128 };
                (wanted / group * group).max(64)
            }
        }
    }

    /// Rows or columns of the weight.
    fn len(self, [out, inn]: [i64; 2]) -> i64 {
        match self {
            Cut::Rows => out,
            Cut::Columns => inn,
        }
    }

    /// The shape of a tile of so many rows or columns.
    fn tile(self, count: i64, [out, inn]: [i64; 2]) -> [i64; 2] {
        match self {
            Cut::Rows => [count, inn],
            Cut::Columns => [out, count],
        }
    }
}

/// A range of a dimension.
pub(super) fn narrow(tensor: &Tensor, dim: i64, range: &Range<i64>) -> Result<Tensor> {
    Ok(tensor.f_narrow(dim, range.start, range.end - range.start)?)
}

/// Fills a tile with these rows or columns, and answers whether that could be done.
pub(super) trait Unpack: FnMut(&Range<i64>, &mut Tensor) -> Result<bool> {}

impl<F: FnMut(&Range<i64>, &mut Tensor) -> Result<bool>> Unpack for F {}

/// Does with a tile of these rows or columns what the product is made of.
pub(super) trait Multiply: FnMut(&Range<i64>, &Tensor) -> Result<()> {}

impl<F: FnMut(&Range<i64>, &Tensor) -> Result<()>> Multiply for F {}

/// Calls `unpack` and then `multiply` for a tile of each range of a weight (out, in), as `kind`. Ends as soon as
/// `unpack` answers no, and answers whether it never did.
///
/// Tiles have as many bytes as [`super::tiles`] says; two that are there at a time have half of them each. They must
/// not outlive the calls.
pub(super) fn for_each_tile(
    cut: Cut,
    (kind, device): (Kind, Device),
    shape: [i64; 2],
    mut unpack: impl Unpack,
    mut multiply: impl Multiply,
) -> Result<bool> {
    let (budget, len) = (elements(kind, device), cut.len(shape));
    let step = cut.step(budget, shape);
    if let Device::Cuda(index) = device
        && step < len
    {
        let step = cut.step(budget / 2, shape);
        let tiles = ranges(step, len).map(|range| (cut.tile(range.end - range.start, shape), range));
        let buffers = [(); 2].map(|()| Tensor::f_empty(cut.tile(step, shape), (kind, device)));
        let [one, other] = buffers;
        return overlapped(&CudaStreams::new(index)?, tiles, [one?, other?], unpack, multiply);
    }
    for range in ranges(step, len) {
        let [rows, columns] = cut.tile(range.end - range.start, shape);
        let unpacked = with_scratch(rows, columns, kind, device, |tile| {
            let unpacked = unpack(&range, tile)?;
            if unpacked {
                multiply(&range, tile)?;
            }
            Ok(unpacked)
        })?;
        if !unpacked {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives later work to the main stream again, and makes that wait for the side: so that what was written there may be
/// freed, whatever happened.
struct Joined<'a, S: Streams>(&'a S);

impl<S: Streams> Drop for Joined<'_, S> {
    fn drop(&mut self) {
        let joined = self.0.give_to(Stream::Main).and_then(|()| self.0.wait(Stream::Main));
        if let Err(error) = joined {
            tracing::error!(%error, "two streams of a CUDA device could not be joined");
        }
    }
}

/// The same for tiles of these shapes, unpacked into the two buffers in turn, on the side, each while the one before it
/// is multiplied.
fn overlapped(
    streams: &impl Streams,
    mut tiles: impl Iterator<Item = ([i64; 2], Range<i64>)>,
    buffers: [Tensor; 2],
    mut unpack: impl Unpack,
    mut multiply: impl Multiply,
) -> Result<bool> {
    let _joined = Joined(streams);
    let mut buffers = buffers.iter().cycle();
    // The tile to come, if there is one, and whether it could be unpacked.
    let mut unpacked = || {
        let (Some((shape, range)), Some(buffer)) = (tiles.next(), buffers.next()) else { return Ok(None) };
        let mut tile = buffer.f_view([-1])?.f_narrow(0, 0, shape[0] * shape[1])?.f_view(shape)?;
        // All that reads the buffer was given to the main stream already.
        streams.wait(Stream::Side)?;
        streams.give_to(Stream::Side)?;
        let served = unpack(&range, &mut tile)?;
        streams.give_to(Stream::Main)?;
        Ok::<_, crate::Error>(Some((range, tile, served)))
    };
    let mut next = unpacked()?;
    while let Some((range, tile, served)) = next {
        if !served {
            return Ok(false);
        }
        streams.wait(Stream::Main)?;
        next = unpacked()?;
        multiply(&range, &tile)?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::cell::{Cell, RefCell};
    use std::collections::HashMap;

    const TILE: i64 = 1 << 20;

    #[test]
    fn tiles_cover_every_row_and_every_column_once() {
        let shapes = [[1, 1], [7, TILE], [5, TILE + 1], [3000, 2048], [0, 4], [7, 2 * TILE], [4096, 4096]];
        for shape in shapes.into_iter().chain([[11008, 4100], [1 << 23, 100], [4, 0]]) {
            for (cut, least) in [(Cut::Rows, 1), (Cut::Columns, 64)] {
                for kind in [Kind::Float, Kind::BFloat16] {
                    let budget = elements(kind, Device::Cpu);
                    let mut next = 0;
                    for range in ranges(cut.step(budget, shape), cut.len(shape)) {
                        assert_eq!(range.start, next);
                        assert!(range.end > next);
                        let [rows, columns] = cut.tile(range.end - range.start, shape);
                        let most = if least == 1 { budget } else { KEPT };
                        assert!(range.end - range.start <= least || rows * columns <= most, "{cut:?} of {shape:?}");
                        next = range.end;
                    }
                    assert_eq!(next, cut.len(shape));
                }
            }
        }
    }

    #[test]
    fn a_weight_that_can_not_be_unpacked_is_asked_for_once() {
        let (mut asked, shape) = (0, [4096, 4096]);
        let unpack = |_: &Range<i64>, _: &mut Tensor| {
            asked += 1;
            Ok(false)
        };
        let multiply = |_: &Range<i64>, _: &Tensor| panic!("nothing was unpacked");
        let all = for_each_tile(Cut::Columns, (Kind::Float, Device::Cpu), shape, unpack, multiply);
        assert!(!all.unwrap() && asked == 1);
    }

    /// Of each stream, how many pieces of work of either are sure to be done before what it is given next.
    type Clock = [u64; 2];

    /// A stream's piece of work, by number, and whether it wrote.
    type Piece = (usize, u64, bool);

    /// Streams that check: of two pieces of work on one buffer, of which one writes, the later one has to wait for the
    /// other.
    #[derive(Default)]
    struct Checked {
        given_to: Cell<usize>,
        clocks: RefCell<[Clock; 2]>,
        /// The work on each buffer, by address.
        done: RefCell<HashMap<usize, Vec<Piece>>>,
        /// What was given, in order.
        log: RefCell<Vec<String>>,
        /// Whether something did not wait for the other stream's last piece.
        beside: Cell<u32>,
    }

    impl Checked {
        fn work(&self, what: &str, range: &Range<i64>, tile: &Tensor, writes: bool) {
            let me = self.given_to.get();
            let mut clocks = self.clocks.borrow_mut();
            let other = clocks[1 - me][1 - me];
            self.beside.set(self.beside.get() + u32::from(clocks[me][1 - me] < other));
            clocks[me][me] += 1;
            let mut done = self.done.borrow_mut();
            let done = done.entry(tile.data_ptr().addr()).or_default();
            for &(who, piece, wrote) in done.iter() {
                assert!(clocks[me][who] >= piece || !(writes || wrote), "{what} {range:?} doesn't wait");
            }
            done.push((me, clocks[me][me], writes));
            let stream = ["main", "side"][me];
            self.log.borrow_mut().push(format!("{stream} {what} {}..{}", range.start, range.end));
        }
    }

    impl Streams for Checked {
        fn wait(&self, stream: Stream) -> Result<()> {
            let (me, mut clocks) = (usize::from(stream == Stream::Side), self.clocks.borrow_mut());
            let other = clocks[1 - me];
            clocks[me].iter_mut().zip(other).for_each(|(mine, theirs)| *mine = theirs.max(*mine));
            Ok(())
        }

        fn give_to(&self, stream: Stream) -> Result<()> {
            self.given_to.set(usize::from(stream == Stream::Side));
            Ok(())
        }
    }

    /// x · Wᵀ by tiles of two rows, until `fails` does.
    fn multiply(streams: &Checked, fails: Option<&str>) -> Result<bool> {
        let options = (Kind::Float, Device::Cpu);
        let (w, x) = (Tensor::arange(35, options).view([7, 5]), Tensor::ones([1, 5], options));
        let y = Tensor::full([1, 7], f64::NAN, options);
        let buffers = [(); 2].map(|()| Tensor::full([2, 5], f64::NAN, options));
        let tiles = ranges(2, 7).map(|range| ([range.end - range.start, 5], range));
        let fail = |what: &str, range: &Range<i64>| match fails {
            Some(name) if range.start == 4 && name == what => Err(Error::config("test", "no error", what)),
            _ => Ok(()),
        };
        let unpack = |range: &Range<i64>, tile: &mut Tensor| {
            streams.work("unpacks", range, tile, true);
            tile.copy_(&w.narrow(0, range.start, range.end - range.start));
            fail("unpacks", range)?;
            Ok(range.start != 4 || fails != Some("can't unpack"))
        };
        let multiply = |range: &Range<i64>, tile: &Tensor| {
            streams.work("multiplies", range, tile, false);
            y.narrow(1, range.start, range.end - range.start).copy_(&x.mm(&tile.tr()));
            fail("multiplies", range)
        };
        let all = overlapped(streams, tiles, buffers, unpack, multiply)?;
        if all {
            assert_eq!(y, x.mm(&w.tr()));
        }
        Ok(all)
    }

    // On a card nothing else would show that a stream didn't wait, most of the time.
    #[test]
    fn a_tile_is_unpacked_while_the_one_before_it_is_multiplied() {
        let streams = Checked::default();
        assert!(multiply(&streams, None).unwrap());
        let expected = [
            "side unpacks 0..2",
            "side unpacks 2..4",
            "main multiplies 0..2",
            "side unpacks 4..6",
            "main multiplies 2..4",
            "side unpacks 6..7",
            "main multiplies 4..6",
            "main multiplies 6..7",
        ];
        assert_eq!(streams.log.into_inner(), expected);
        // Each product but the last goes on beside an unpacking.
        assert_eq!(streams.beside.get(), 3);
    }

    #[test]
    fn streams_are_joined_whatever_happens() {
        for fails in [None, Some("unpacks"), Some("multiplies"), Some("can't unpack")] {
            let streams = Checked::default();
            let outcome = multiply(&streams, fails);
            match fails {
                None => assert!(outcome.unwrap()),
                Some("can't unpack") => assert!(!outcome.unwrap()),
                Some(_) => assert!(outcome.is_err()),
            }
            assert_eq!(streams.given_to.get(), 0, "{fails:?}");
            let clocks = streams.clocks.borrow();
            assert_eq!(clocks[0][1], clocks[1][1], "{fails:?}: the main stream doesn't wait for the side");
        }
    }
}
