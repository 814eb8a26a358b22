//! The raw elements of a CPU tensor.

use crate::error::{Error, Result};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Bytes per element.
pub(crate) fn element_size(kind: Kind) -> usize {
    match kind {
        Kind::Uint8 | Kind::Int8 | Kind::Bool | Kind::QInt8 | Kind::QUInt8 => 1,
        Kind::Float8e5m2 | Kind::Float8e4m3fn | Kind::Float8e5m2fnuz | Kind::Float8e4m3fnuz => 1,
        Kind::Int16 | Kind::Half | Kind::BFloat16 => 2,
        Kind::Int | Kind::Float | Kind::QInt32 | Kind::ComplexHalf => 4,
        Kind::Int64 | Kind::Double | Kind::ComplexFloat => 8,
        Kind::ComplexDouble => 16,
    }
}

/// The element types that a slice can be read as.
pub(crate) trait Plain: Copy + Send + Sync + 'static {
    const KIND: Kind;
}

macro_rules! plain {
    ($($rust:ty => $kind:ident),*) => { $(impl Plain for $rust { const KIND: Kind = Kind::$kind; })* };
}
plain!(u8 => Uint8, i8 => Int8, f32 => Float, half::f16 => Half, half::bf16 => BFloat16, i64 => Int64);

fn pointer(tensor: &Tensor, kind: Kind) -> Result<*mut u8> {
    let found = (tensor.f_kind()?, tensor.device(), tensor.is_contiguous());
    if found != (kind, Device::Cpu, true) {
        return Err(Error::Mismatch {
            name: "tensor".into(),
            expected: format!("{kind:?}, contiguous, on the CPU"),
            found: format!("{:?}, contiguous {}, on {:?}", found.0, found.2, found.1),
        });
    }
    let pointer = tensor.data_ptr();
    if pointer.is_null() && tensor.numel() > 0 {
        return Err(Error::Mismatch {
            name: "tensor".into(),
            expected: "a tensor with storage".into(),
            found: "none".into(),
        });
    }
    Ok(pointer.cast())
}

/// Reads the elements of a contiguous CPU tensor.
pub(crate) fn read<T: Plain, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let data = pointer(tensor, T::KIND)?.cast::<T>().cast_const();
    if data.is_null() {
        return Ok(f(&[]));
    }
    // SAFETY: the tensor is contiguous, on the CPU and of type `T`, so `numel`
    // elements stand at `data`, aligned by libtorch's allocator; the borrow
    // keeps it alive. Nothing in this crate writes to a tensor it lends here.
    Ok(f(unsafe { std::slice::from_raw_parts(data, tensor.numel()) }))
}

/// Writes the elements of a contiguous CPU tensor that the caller just made.
pub(crate) fn write<T: Plain, R>(tensor: &mut Tensor, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    let data = pointer(tensor, T::KIND)?.cast::<T>();
    if data.is_null() {
        return Ok(f(&mut []));
    }
    // SAFETY: as in `read`; the exclusive borrow is of a tensor that the
    // caller made and has not shared, so nobody else reads or writes it.
    Ok(f(unsafe { std::slice::from_raw_parts_mut(data, tensor.numel()) }))
}

/// The bytes of a tensor, row-major, little-endian, from any device; those of
/// a contiguous CPU tensor are lent, not copied.
#[derive(Debug)]
pub(crate) struct TensorBytes(Tensor);

impl TensorBytes {
    pub(crate) fn of(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        pointer(&tensor, tensor.f_kind()?)?;
        Ok(TensorBytes(tensor))
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        let data = self.0.data_ptr().cast::<u8>();
        if data.is_null() {
            return &[];
        }
        let len = self.0.numel() * element_size(self.0.kind());
        // SAFETY: contiguous and on the CPU, as `of` made sure, so `len` bytes
        // stand at `data`; any byte is a valid `u8`; the handle keeps them
        // alive, and nothing in this crate writes to a tensor it lends.
        unsafe { std::slice::from_raw_parts(data.cast_const(), len) }
    }
}

/// A copy of the bytes of a tensor.
pub(crate) fn tensor_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(TensorBytes::of(tensor)?.as_slice().to_vec())
}

/// A new CPU tensor from its bytes.
pub(crate) fn tensor_from_bytes(bytes: &[u8], shape: &[i64], kind: Kind) -> Result<Tensor> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?));
    let len = elements.and_then(|n| n.checked_mul(element_size(kind)));
    if len != Some(bytes.len()) {
        return Err(Error::Mismatch {
            name: "tensor".into(),
            expected: format!("bytes of {kind:?} {shape:?}"),
            found: format!("{} bytes", bytes.len()),
        });
    }
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu))?;
    let data = pointer(&tensor, kind)?;
    if !data.is_null() {
        // SAFETY: the tensor was just made with room for `bytes.len()` bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), data, bytes.len()) };
    }
    Ok(tensor)
}

/// Copies the second of each pair over the first, by all threads.
pub(crate) fn copy_all(pairs: Vec<(Tensor, Tensor)>) -> Result<()> {
    pairs.into_par_iter().try_for_each(|(mut to, from)| {
        // Of this thread.
        let _no_grad = tch::no_grad_guard();
        to.f_copy_(&from)?;
        Ok(())
    })
}

/// Bytes in memory of libtorch's, of which tensors can be views.
#[derive(Debug)]
pub(crate) struct Buffer(Tensor);

/// Bytes that one thread copies at a time.
const CHUNK: usize = 1 << 20;

impl Buffer {
    /// `len` bytes of any value, in the memory of `spare` if that is as large:
    /// pages that are there already need not be asked of the system again.
    fn new(len: usize, spare: Option<Buffer>) -> Result<Self> {
        match spare {
            Some(spare) if spare.0.numel() == len => Ok(spare),
            _ => Ok(Buffer(Tensor::f_empty([len as i64], (Kind::Uint8, Device::Cpu))?)),
        }
    }

    /// The pieces one after the other, copied by all threads.
    pub(crate) fn gather(pieces: &[&[u8]], spare: Option<Buffer>) -> Result<Self> {
        let mut buffer = Self::new(pieces.iter().map(|piece| piece.len()).sum(), spare)?;
        write::<u8, _>(&mut buffer.0, |mut rest| {
            let mut copies = Vec::with_capacity(pieces.len());
            for piece in pieces {
                let (to, after) = rest.split_at_mut(piece.len());
                copies.extend(to.chunks_mut(CHUNK).zip(piece.chunks(CHUNK)));
                rest = after;
            }
            copies.into_par_iter().for_each(|(to, from)| to.copy_from_slice(from));
        })?;
        Ok(buffer)
    }

    /// `len` bytes that `fill` sets, all of them unless it fails.
    pub(crate) fn filled<E>(
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<Self, E>> {
        let mut buffer = Self::new(len, None)?;
        let filled = write::<u8, _>(&mut buffer.0, fill)?;
        Ok(filled.map(|()| buffer))
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        let data = self.0.data_ptr().cast::<u8>();
        if data.is_null() {
            return &[];
        }
        // SAFETY: `new` made it contiguous, on the CPU and of bytes; the borrow
        // keeps it alive, and nothing in this crate writes to one once it is
        // filled, nor to a view of it.
        unsafe { std::slice::from_raw_parts(data.cast_const(), self.0.numel()) }
    }

    /// A tensor over the bytes from `start` on, which are enough for it; a copy
    /// where they are not aligned for its elements.
    pub(crate) fn view(&self, start: usize, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let len = shape.iter().product::<i64>() as usize * element_size(kind);
        if len == 0 || !start.is_multiple_of(element_size(kind)) {
            let bytes = self.as_slice().get(start..start + len).unwrap_or_default();
            return tensor_from_bytes(bytes, shape, kind);
        }
        Ok(self.0.f_narrow(0, start as i64, len as i64)?.f_view_dtype(kind)?.f_view(shape)?)
    }
}

/// A contiguous CPU tensor whose bytes can be borrowed.
#[derive(Debug)]
pub(crate) struct CpuBytes(super::shared::SharedTensor);

impl CpuBytes {
    /// Copies the tensor only if it is elsewhere or not contiguous.
    pub(crate) fn new(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        pointer(&tensor, tensor.f_kind()?)?;
        Ok(CpuBytes(super::shared::SharedTensor::new(tensor)))
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        let tensor = self.0.get();
        let (data, len) = (tensor.data_ptr(), tensor.numel() * element_size(tensor.kind()));
        if data.is_null() {
            return &[];
        }
        // SAFETY: contiguous and on the CPU, as `new` saw to, so `len` bytes
        // stand at `data`; any byte is a valid `u8`; the tensor lives as long as
        // `self`, and frozen tensors are not written to.
        unsafe { std::slice::from_raw_parts(data.cast_const().cast(), len) }
    }
}
