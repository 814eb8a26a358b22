//! Settings and module facts of libtorch that tch doesn't bind.

use super::{check, generator::device_index, own};
use crate::error::{Error, Result};
use std::ffi::{CStr, c_char, c_void};
use tch::{CModule, Device, Kind, Tensor};
use torch_sys::C_tensor;

type TypeVisitor = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char, i64);
type BufferVisitor = unsafe extern "C" fn(*mut c_void, *const c_char, *mut C_tensor);

unsafe extern "C" {
    fn tp_autocast_kind(device: i32) -> i32;
    fn tp_set_graph_executor_optimize(on: bool) -> bool;
    fn tp_module_types(module: *mut c_void, sink: *mut c_void, visit: TypeVisitor) -> *mut c_char;
    fn tp_module_buffers(module: *mut c_void, sink: *mut c_void, visit: BufferVisitor) -> *mut c_char;
    fn tp_module_set_training(module: *mut c_void, on: bool) -> *mut c_char;
    fn tp_trim_heap();
    fn tp_cuda_status() -> *const c_char;
    fn tp_set_deterministic(on: bool) -> bool;
    fn tp_set_float32_matmul_precision(to: i32, before: *mut i32) -> *mut c_char;
    fn tp_float32_matmul_precision(now: *mut i32) -> *mut c_char;
    fn tp_rounds_f32_products() -> bool;
    fn tp_peak_memory(device: i32, bytes: *mut i64) -> *mut c_char;
    fn tp_reset_peak_memory(device: i32) -> *mut c_char;
}

/// The dtype that autocast asks for on this device and thread, if it is on.
pub(crate) fn autocast_kind(device: Device) -> Option<Kind> {
    let index = device_index(device).ok()?;
    // SAFETY: reads a thread-local setting.
    match unsafe { tp_autocast_kind(index) } {
        5 => Some(Kind::Half),
        6 => Some(Kind::Float),
        15 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// Keeps TorchScript from differentiating graphs by itself, on this thread,
/// while it lives.
///
/// The optimising executor cuts a graph out, detaches its inputs and applies
/// derivative formulas of its own: gradients of adapters would be lost.
pub(crate) struct PlainGraphs {
    before: bool,
    /// The setting is the thread's, so the guard must not leave it.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl PlainGraphs {
    pub(crate) fn new() -> Self {
        // SAFETY: sets a thread-local setting.
        let before = unsafe { tp_set_graph_executor_optimize(false) };
        PlainGraphs { before, _not_send: std::marker::PhantomData }
    }
}

impl Drop for PlainGraphs {
    fn drop(&mut self) {
        // SAFETY: sets a thread-local setting.
        unsafe { tp_set_graph_executor_optimize(self.before) };
    }
}

/// The `torch::jit::Module*` inside tch's handle.
fn module_ptr(module: &CModule) -> *mut c_void {
    const { assert!(size_of::<CModule>() == size_of::<*mut c_void>()) };
    // SAFETY: `CModule` has one field, that pointer, and its size leaves room
    // for nothing else; it is read while the module is borrowed.
    unsafe { *std::ptr::from_ref(module).cast::<*mut c_void>() }
}

/// What TorchScript keeps of a module's Python class.
#[derive(Debug)]
pub(crate) struct ModuleType {
    /// Empty for the root.
    pub(crate) path: String,
    pub(crate) class: String,
    /// The constant `groups`, which a scripted convolution has.
    pub(crate) groups: Option<i64>,
}

/// Each submodule, the root included.
pub(crate) fn module_types(module: &CModule) -> Result<Vec<ModuleType>> {
    unsafe extern "C" fn visit(sink: *mut c_void, path: *const c_char, class: *const c_char, groups: i64) {
        // SAFETY: `sink` is the vector below, lent for the call; both strings
        // are C strings that live for the length of this call.
        unsafe {
            let text = |s| CStr::from_ptr(s).to_string_lossy().into_owned();
            let groups = (groups > 0).then_some(groups);
            (*sink.cast::<Vec<ModuleType>>()).push(ModuleType { path: text(path), class: text(class), groups });
        }
    }
    let mut types: Vec<ModuleType> = Vec::new();
    // SAFETY: the module is borrowed; `visit` fits the sink.
    check(unsafe { tp_module_types(module_ptr(module), (&raw mut types).cast::<c_void>(), visit) })?;
    Ok(types)
}

/// (name, tensor) of each buffer, such as a batch norm's running mean.
pub(crate) fn module_buffers(module: &CModule) -> Result<Vec<(String, Tensor)>> {
    unsafe extern "C" fn visit(sink: *mut c_void, path: *const c_char, tensor: *mut C_tensor) {
        // SAFETY: `sink` is the vector below; `path` is a C string and
        // `tensor` a cell made by `new`, which becomes ours.
        unsafe {
            let path = CStr::from_ptr(path).to_string_lossy().into_owned();
            (*sink.cast::<Vec<(String, Tensor)>>()).push((path, own(tensor)));
        }
    }
    let mut buffers: Vec<(String, Tensor)> = Vec::new();
    // SAFETY: the module is borrowed; `visit` fits the sink.
    check(unsafe { tp_module_buffers(module_ptr(module), (&raw mut buffers).cast::<c_void>(), visit) })?;
    Ok(buffers)
}

/// Sets the training flag of a TorchScript module and all its children.
pub(crate) fn set_training(module: &mut CModule, on: bool) -> Result<()> {
    // SAFETY: the module is borrowed exclusively.
    check(unsafe { tp_module_set_training(module_ptr(module), on) })
}

/// Gives freed memory back to the system.
///
/// A model's dense weights lie in the C library's heap one after the other;
/// freed one by one, most of their pages would stay with the process.
pub(crate) fn trim_heap() {
    // SAFETY: `malloc_trim` may be called at any time, from any thread.
    unsafe { tp_trim_heap() };
}

/// What came of loading libtorch's CUDA half when the program started.
///
/// One of `loaded <path>`, `no CUDA driver …`, or `CPU-only: <reason>`.
///
/// ```
/// println!("CUDA: {}", tch_peft::cuda_status());
/// ```
pub fn cuda_status() -> String {
    // SAFETY: a static, NUL-terminated string.
    unsafe { CStr::from_ptr(tp_cuda_status()) }.to_string_lossy().into_owned()
}

/// The most bytes of a GPU's memory that tensors held at once since the program
/// started, or since [`reset_peak_memory`]: `torch.cuda.max_memory_allocated`.
///
/// ```no_run
/// use tch::{Device, Kind, Tensor};
///
/// let device = Device::Cuda(0);
/// tch_peft::reset_peak_memory(device)?;
/// drop(Tensor::zeros([1024, 1024], (Kind::Float, device)));
/// assert!(tch_peft::peak_memory(device)? >= 4 << 20);
/// # Ok::<(), tch_peft::Error>(())
/// ```
///
/// # Errors
/// [`Error::Config`] for another device than CUDA's; libtorch's.
pub fn peak_memory(device: Device) -> Result<u64> {
    let (index, mut bytes) = (cuda_index(device)?, 0);
    // SAFETY: `bytes` is a cell of ours.
    check(unsafe { tp_peak_memory(index, &mut bytes) })?;
    Ok(bytes.max(0) as u64)
}

/// Lets [`peak_memory`] start again from what is held now.
///
/// # Errors
/// [`Error::Config`] for another device than CUDA's; libtorch's.
pub fn reset_peak_memory(device: Device) -> Result<()> {
    // SAFETY: a plain call.
    check(unsafe { tp_reset_peak_memory(cuda_index(device)?) })
}

fn cuda_index(device: Device) -> Result<i32> {
    match device {
        Device::Cuda(_) => device_index(device),
        other => Err(Error::config("device", "a CUDA device, whose memory libtorch counts", format!("{other:?}"))),
    }
}

/// Lets libtorch take algorithms only that give the same bits each time, and
/// refuse operators that have none: `torch.use_deterministic_algorithms`, with
/// cuDNN's search for the fastest convolution off. Answers whether it was on.
///
/// It holds for the whole program. On CUDA, libtorch also wants
/// `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the environment, and refuses products
/// without it.
///
/// ```standalone_crate
/// use tch::{Device, Kind, Tensor};
///
/// let mut values = Tensor::zeros([3], (Kind::Float, Device::Cpu));
/// // Which of two values stays isn't said: an operator without a fixed order.
/// let (both, two) = (Tensor::from_slice(&[1i64, 1]), Tensor::from_slice(&[5f32, 6.0]));
/// assert!(!tch_peft::set_deterministic(true));
/// assert!(values.f_put_(&both, &two, false).is_err());
/// assert!(tch_peft::set_deterministic(false));
/// assert!(values.f_put_(&both, &two, false).is_ok());
/// ```
pub fn set_deterministic(on: bool) -> bool {
    // SAFETY: sets plain values of libtorch's.
    unsafe { tp_set_deterministic(on) }
}

/// How exact products of f32 are: `torch.get_float32_matmul_precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float32MatmulPrecision {
    /// In f32.
    Highest,
    /// On CUDA in TF32, of ten bits.
    High,
    /// What is multiplied may be rounded to bf16, of eight bits; sums stay in f32. On CUDA in TF32.
    Medium,
}

impl Float32MatmulPrecision {
    fn of(number: i32) -> Self {
        match number {
            0 => Self::Highest,
            1 => Self::High,
            _ => Self::Medium,
        }
    }

    /// libtorch's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Highest => "highest",
            Self::High => "high",
            Self::Medium => "medium",
        }
    }
}

/// Says how exact products of f32 have to be, in the whole program: `torch.set_float32_matmul_precision`. Answers what
/// was said before; at first that is [`Highest`](Float32MatmulPrecision::Highest).
///
/// It is libtorch's setting, for its own products too. With [`Medium`](Float32MatmulPrecision::Medium), products of f32
/// with packed weights round both sides to bf16 where AMD's processors multiply these (AVX512-BF16 and AVX512-VBMI),
/// which bitsandbytes' packed kernel on the CPU always does. Each of their terms is then within `2⁻⁸ · |x · w|`. Say it
/// once, at the start: the first products after a change take some milliseconds longer.
///
/// # Errors
/// [`Error::Torch`] where libtorch's newer settings, one for each library, contradict each other.
///
/// ```standalone_crate
/// use tch_peft::{Float32MatmulPrecision, set_float32_matmul_precision};
///
/// # fn main() -> tch_peft::Result<()> {
/// let before = set_float32_matmul_precision(Float32MatmulPrecision::Medium)?;
/// assert_eq!(before, Float32MatmulPrecision::Highest);
/// assert_eq!(set_float32_matmul_precision(before)?, Float32MatmulPrecision::Medium);
/// # Ok(())
/// # }
/// ```
pub fn set_float32_matmul_precision(precision: Float32MatmulPrecision) -> Result<Float32MatmulPrecision> {
    let mut before = 0;
    // SAFETY: a cell of ours.
    check(unsafe { tp_set_float32_matmul_precision(precision as i32, &mut before) })?;
    Ok(Float32MatmulPrecision::of(before))
}

/// How exact they have to be now.
pub(crate) fn float32_matmul_precision() -> Result<Float32MatmulPrecision> {
    let mut now = 0;
    // SAFETY: a cell of ours.
    check(unsafe { tp_float32_matmul_precision(&mut now) })?;
    Ok(Float32MatmulPrecision::of(now))
}

/// Whether the CPU's products of f32 may round to bf16.
pub(crate) fn rounds_f32_products() -> bool {
    // SAFETY: reads plain values of libtorch's.
    unsafe { tp_rounds_f32_products() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_gpus_memory_is_counted() {
        for error in [peak_memory(Device::Cpu).unwrap_err(), reset_peak_memory(Device::Mps).unwrap_err()] {
            assert!(matches!(&error, Error::Config { .. }) && error.to_string().contains("CUDA"), "{error}");
        }
    }
}
