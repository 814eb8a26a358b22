//! A tensor that several threads may read.

use tch::Tensor;

/// A frozen tensor inside a site or a node.
///
/// tch's `Tensor` is `Send` but not `Sync`. A site is reached from whatever
/// thread runs the model and from autograd's threads, so its tensors must be
/// shared. This wrapper offers one operation: making a handle of one's own.
#[derive(Debug)]
pub(crate) struct SharedTensor(Tensor);

// SAFETY: the only access is `get`, which copies the C++ handle: it reads one
// pointer that is never written after construction and raises an atomic
// reference count. `Tensor` is `Send`, so the copy may live on any thread.
// Operators that write in place through such copies race just as they do with
// tch's own shallow clones on two threads; nothing here adds to that.
unsafe impl Sync for SharedTensor {}

impl SharedTensor {
    pub(crate) fn new(tensor: Tensor) -> Self {
        SharedTensor(tensor)
    }

    /// A handle on the same tensor.
    pub(crate) fn get(&self) -> Tensor {
        self.0.shallow_clone()
    }
}
