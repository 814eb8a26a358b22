//! libtorch's threads and oneDNN's matrix product, which tch doesn't bind.

use super::{CppString, check, guard, own, raw};
use crate::error::Result;
use std::ffi::{c_char, c_void};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};
use tch::Tensor;
use torch_sys::C_tensor;

type RangeCall = unsafe extern "C" fn(*mut c_void, usize, usize, *mut CppString) -> bool;

unsafe extern "C" {
    fn tp_parallel_for(n: usize, context: *mut c_void, call: RangeCall) -> *mut c_char;
    fn tp_has_onednn() -> bool;
    fn tp_onednn_linear(x: *mut C_tensor, w: *mut C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    fn tp_addmm(out: *mut C_tensor, a: *mut C_tensor, b: *mut C_tensor, beta: f64, alpha: f64) -> *mut c_char;
}

/// How many threads libtorch uses.
pub(crate) fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// Calls `f(i)` for `i` in `0..n` on libtorch's threads, as many as
/// `tch::get_num_threads` says; a thread that is done takes the next `i`, so
/// that none waits for a slower core.
///
/// A second pool would compete with libtorch's own, whose idle threads spin.
///
/// # Errors
/// A panic of `f`.
pub(crate) fn parallel_for(n: usize, f: impl Fn(usize) + Sync) -> Result<()> {
    unsafe extern "C" fn call<F: Fn(usize) + Sync>(
        context: *mut c_void,
        begin: usize,
        end: usize,
        error: *mut CppString,
    ) -> bool {
        guard(error, || {
            // SAFETY: the context is the closure lent below, of this type; it
            // is `Sync`, so that several threads may call it.
            let f = unsafe { &*context.cast_const().cast::<F>() };
            (begin..end).for_each(f);
            Ok(())
        })
        .is_some()
    }
    fn of<F: Fn(usize) + Sync>(_: &F) -> RangeCall {
        call::<F>
    }
    match n {
        0 => Ok(()),
        1 => {
            f(0);
            Ok(())
        }
        _ => {
            let next = AtomicUsize::new(0);
            let take = |_| {
                let mut i = next.fetch_add(1, Ordering::Relaxed);
                while i < n {
                    f(i);
                    i = next.fetch_add(1, Ordering::Relaxed);
                }
            };
            // SAFETY: the closure is borrowed until all threads are done, and
            // the function fits its type.
            check(unsafe { tp_parallel_for(n.min(threads()), (&raw const take).cast_mut().cast(), of(&take)) })
        }
    }
}

/// Elements that threads share among them.
struct Shared<'a, T>(*mut T, PhantomData<&'a mut [T]>);

// SAFETY: below, each thread makes slices of its own elements only.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<T> Shared<'_, T> {
    fn start(&self) -> *mut T {
        self.0
    }
}

/// Calls `f(i, chunk)` for consecutive chunks of `len` elements (the last may
/// be shorter), on libtorch's threads.
///
/// # Errors
/// A panic of `f`.
pub(crate) fn for_each_chunk<T: Send>(out: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) -> Result<()> {
    let (total, len) = (out.len(), len.max(1));
    let shared = Shared(out.as_mut_ptr(), PhantomData);
    parallel_for(total.div_ceil(len), |i| {
        let start = i * len;
        // SAFETY: `i` is below the number of chunks, so `start` is below
        // `total`; chunks of different `i` don't overlap, and each `i` is
        // visited once; the exclusive borrow of `out` outlives all calls.
        let chunk = unsafe { std::slice::from_raw_parts_mut(shared.start().add(start), len.min(total - start)) };
        f(i, chunk);
    })
}

/// A range of the columns of a matrix in rows.
pub(crate) struct Columns<'a, T> {
    /// The range in the first row.
    start: *mut T,
    /// Elements from a row to the next.
    stride: usize,
    rows: usize,
    len: usize,
    matrix: PhantomData<&'a mut [T]>,
}

impl<T> Columns<'_, T> {
    /// How many columns.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The range in a row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: it lies in the matrix, which is borrowed exclusively; other
        // ranges are of other columns, and `&mut self` is the only way to this one.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.len) }
    }
}

/// Calls `f(i, columns)` for consecutive ranges of `len` columns (the last may
/// be shorter) of a matrix with rows of `width` elements, on libtorch's threads.
///
/// # Errors
/// A panic of `f`.
pub(crate) fn for_each_columns<T: Send>(
    matrix: &mut [T],
    width: usize,
    len: usize,
    f: impl Fn(usize, Columns<T>) + Sync,
) -> Result<()> {
    let (rows, len) = (matrix.len() / width.max(1), len.max(1));
    let shared = Shared(matrix.as_mut_ptr(), PhantomData);
    parallel_for(width.div_ceil(len), |i| {
        let first = i * len;
        // SAFETY: `i` is below the number of ranges, so `first` is below `width`.
        let start = unsafe { shared.start().add(first) };
        f(i, Columns { start, stride: width, rows, len: len.min(width - first), matrix: PhantomData });
    })
}

/// Whether this libtorch carries oneDNN.
pub(crate) fn has_onednn() -> bool {
    // SAFETY: looks an operator up.
    unsafe { tp_has_onednn() }
}

/// x · wᵀ by oneDNN: x (n, in), w (out, in), both f32 on the CPU; a new (n, out).
pub(crate) fn onednn_linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: both are borrowed for the call; `out` is a cell of ours, and on
    // success holds a tensor made by `new`.
    unsafe {
        check(tp_onednn_linear(raw(x), raw(w), &mut out))?;
        Ok(own(out))
    }
}

/// out = beta · out + alpha · a · b: a (n, k), b (k, m), out (n, m), all of the
/// same dtype. With beta = 0 what `out` held is ignored, NaN included.
pub(crate) fn add_product(out: &mut Tensor, a: &Tensor, b: &Tensor, beta: f64, alpha: f64) -> Result<()> {
    // SAFETY: all are borrowed for the call.
    check(unsafe { tp_addmm(raw(out), raw(a), raw(b), beta, alpha) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn every_chunk_is_visited_once() {
        for (len, chunk) in [(0, 4), (1, 4), (4, 4), (1000, 7), (5, 0)] {
            let mut out = vec![0usize; len];
            for_each_chunk(&mut out, chunk, |i, part| part.iter_mut().for_each(|v| *v += i + 1)).unwrap();
            for (at, value) in out.iter().enumerate() {
                assert_eq!(*value, at / chunk.max(1) + 1);
            }
        }
    }

    #[test]
    fn a_panic_is_an_error() {
        let error = parallel_for(16, |i| assert!(i != 11, "eleven")).unwrap_err();
        assert!(error.to_string().contains("eleven"), "{error}");
    }

    #[test]
    fn onednn_multiplies() {
        if !has_onednn() {
            return;
        }
        let [x, w] = [[5, 24], [7, 24]].map(|shape| Tensor::randn(shape, (Kind::Float, Device::Cpu)));
        let error = (onednn_linear(&x, &w).unwrap() - x.mm(&w.tr())).abs().max();
        assert!(f64::try_from(error).unwrap() < 1e-4);
    }
}
