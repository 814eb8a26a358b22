//! Two streams of a CUDA device, so that work may go on beside other work.

use crate::error::Result;
use crate::ffi::check;
use std::ffi::c_char;
use std::marker::PhantomData;

/// As in the shim.
#[repr(C)]
struct RawStreams {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn tp_streams_new(device: i32, streams: *mut *mut RawStreams) -> *mut c_char;
    fn tp_streams_free(streams: *mut RawStreams);
    fn tp_streams_wait(streams: *mut RawStreams, side: bool) -> *mut c_char;
    fn tp_streams_use(streams: *mut RawStreams, side: bool) -> *mut c_char;
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// The one that libtorch's operators of this thread run on.
    Main,
    /// The one beside it.
    Side,
}

/// Two queues of work. Each does its own in order, and waits for the other only
/// where it is told to.
pub(crate) trait Streams {
    /// Makes a stream wait for all that the other one was given so far.
    fn wait(&self, stream: Stream) -> Result<()>;

    /// Gives what follows on this thread to a stream.
    fn give_to(&self, stream: Stream) -> Result<()>;
}

/// The streams of a device, for this thread. Nothing here makes the host wait.
pub(crate) struct CudaStreams {
    raw: *mut RawStreams,
    /// The main stream is the thread's.
    _not_send: PhantomData<*const ()>,
}

impl CudaStreams {
    /// Of a CUDA device.
    pub(crate) fn new(device: usize) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` is a cell of ours.
        check(unsafe { tp_streams_new(device as i32, &mut raw) })?;
        Ok(CudaStreams { raw, _not_send: PhantomData })
    }
}

impl Streams for CudaStreams {
    fn wait(&self, stream: Stream) -> Result<()> {
        // SAFETY: made by `new`, and alive.
        check(unsafe { tp_streams_wait(self.raw, stream == Stream::Side) })
    }

    fn give_to(&self, stream: Stream) -> Result<()> {
        // SAFETY: as above.
        check(unsafe { tp_streams_use(self.raw, stream == Stream::Side) })
    }
}

impl Drop for CudaStreams {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and freed once, here.
        unsafe { tp_streams_free(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn without_cuda_there_are_no_streams() {
        if !crate::cuda_status().starts_with("loaded") {
            assert!(matches!(CudaStreams::new(0).err(), Some(Error::Torch(_))));
        }
    }
}
