//! The weight hook: a weight that asks Rust what to do.

use super::{CppString, check, drop_boxed, give, guard, into_opaque, raw};
use crate::error::Result;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::Arc;
use tch::Tensor;
use torch_sys::C_tensor;

/// One use of an adapted weight by the model.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operator<'a> {
    /// x (…, in) · Wᵀ + bias, or x · W + bias where `transposed`.
    Linear {
        /// (…, in)
        x: &'a Tensor,
        /// (out)
        bias: Option<&'a Tensor>,
        /// Whether the weight is used as (in, out).
        transposed: bool,
    },
    /// x (…, in) · Wᵀ + bias, or x · W + bias where `transposed`, with one
    /// matrix W of a stack (n, rows, columns).
    Matrix {
        /// (…, in)
        x: &'a Tensor,
        /// (out)
        bias: Option<&'a Tensor>,
        /// The number of the matrix.
        index: i64,
        transposed: bool,
    },
    /// x (n, rows, in) · Wᵀ, or x · W where `transposed`, each with its own
    /// matrix of a stack (n, rows, columns).
    Stack {
        /// (n, rows, in)
        x: &'a Tensor,
        transposed: bool,
    },
    /// The rows of a table (rows, dim) at `indices`: (…, dim).
    Embedding {
        /// i64 or i32, of any shape.
        indices: &'a Tensor,
        form: EmbeddingForm,
    },
    /// A convolution over a batch: x (n, in, size…), weight (out, in / groups, kernel…).
    Convolution {
        /// (n, in, size…)
        x: &'a Tensor,
        /// (out)
        bias: Option<&'a Tensor>,
        form: &'a ConvolutionForm,
    },
}

impl<'a> Operator<'a> {
    /// What the weight is used on: x, or the indices.
    pub(crate) fn input(&self) -> &'a Tensor {
        match *self {
            Operator::Linear { x, .. } | Operator::Convolution { x, .. } => x,
            Operator::Matrix { x, .. } | Operator::Stack { x, .. } => x,
            Operator::Embedding { indices, .. } => indices,
        }
    }

    pub(crate) fn bias(&self) -> Option<&'a Tensor> {
        match *self {
            Operator::Linear { bias, .. } | Operator::Convolution { bias, .. } | Operator::Matrix { bias, .. } => bias,
            Operator::Embedding { .. } | Operator::Stack { .. } => None,
        }
    }

    /// The same operator on another input.
    pub(crate) fn with_input<'b>(&self, input: &'b Tensor) -> Operator<'b>
    where
        'a: 'b,
    {
        match *self {
            Operator::Linear { bias, transposed, .. } => Operator::Linear { x: input, bias, transposed },
            Operator::Convolution { bias, form, .. } => Operator::Convolution { x: input, bias, form },
            Operator::Matrix { bias, index, transposed, .. } => Operator::Matrix { x: input, bias, index, transposed },
            Operator::Stack { transposed, .. } => Operator::Stack { x: input, transposed },
            Operator::Embedding { form, .. } => Operator::Embedding { indices: input, form },
        }
    }

    /// The same operator without its bias.
    pub(crate) fn without_bias(&self) -> Operator<'a> {
        match *self {
            Operator::Linear { x, transposed, .. } => Operator::Linear { x, bias: None, transposed },
            Operator::Convolution { x, form, .. } => Operator::Convolution { x, bias: None, form },
            Operator::Matrix { x, index, transposed, .. } => Operator::Matrix { x, bias: None, index, transposed },
            other => other,
        }
    }

    /// Whether the weight is used as a stack of matrices.
    pub(crate) fn is_of_stack(&self) -> bool {
        matches!(self, Operator::Matrix { .. } | Operator::Stack { .. })
    }
}

/// The arguments of `embedding` that shape its gradient.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EmbeddingForm {
    /// A row without gradient, or -1.
    pub(crate) padding_idx: i64,
    /// Whether gradients are divided by how often a row is looked up.
    pub(crate) scale_grad_by_freq: bool,
    /// Whether gradients are sparse tensors.
    pub(crate) sparse: bool,
}

/// How a convolution moves over its input; one number per dimension of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConvolutionForm {
    pub(crate) stride: Vec<i64>,
    pub(crate) padding: Vec<i64>,
    pub(crate) dilation: Vec<i64>,
    pub(crate) groups: i64,
}

/// What an adapted weight answers when libtorch's operators meet it.
pub(crate) trait WeightSite: Send + Sync {
    /// The result of an operator that consumes the weight.
    fn apply(&self, operator: &Operator) -> Result<Tensor>;

    /// The dense effective weight, for `op`, an operator without a kernel.
    fn dense(&self, op: &str) -> Result<Tensor>;
}

/// What C++ holds: the site, and its name as C reads it.
struct Held<S> {
    site: Arc<S>,
    name: CString,
}

/// The C face of [`ConvolutionForm`].
#[repr(C)]
struct CForm {
    stride: *const i64,
    padding: *const i64,
    dilation: *const i64,
    dims: usize,
    groups: i64,
}

type LinearCall = unsafe extern "C" fn(
    *mut c_void,
    *mut C_tensor,
    *mut C_tensor,
    i64,
    bool,
    *mut *mut C_tensor,
    *mut CppString,
) -> bool;
type BatchedCall = unsafe extern "C" fn(*mut c_void, *mut C_tensor, bool, *mut *mut C_tensor, *mut CppString) -> bool;
type EmbeddingCall =
    unsafe extern "C" fn(*mut c_void, *mut C_tensor, i64, bool, bool, *mut *mut C_tensor, *mut CppString) -> bool;
type ConvolutionCall = unsafe extern "C" fn(
    *mut c_void,
    *mut C_tensor,
    *mut C_tensor,
    *const CForm,
    *mut *mut C_tensor,
    *mut CppString,
) -> bool;
type DenseCall = unsafe extern "C" fn(*mut c_void, *const c_char, *mut *mut C_tensor, *mut CppString) -> bool;

#[repr(C)]
struct SiteCalls {
    linear: LinearCall,
    batched: BatchedCall,
    embedding: EmbeddingCall,
    convolution: ConvolutionCall,
    dense: DenseCall,
    name: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    drop: unsafe extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    fn tp_attach(weight: *mut C_tensor, calls: *const SiteCalls, site: *mut c_void) -> *mut c_char;
    fn tp_release(weight: *mut C_tensor, dense: *mut C_tensor) -> *mut c_char;
    fn tp_site_of(weight: *mut C_tensor, calls: *const SiteCalls) -> *mut c_void;
}

/// The table for sites of type `S`; its address also tells our sites apart.
struct Table<S>(std::marker::PhantomData<S>);

impl<S: WeightSite + 'static> Table<S> {
    const CALLS: &'static SiteCalls = &SiteCalls {
        linear: call_linear::<S>,
        batched: call_batched::<S>,
        embedding: call_embedding::<S>,
        convolution: call_convolution::<S>,
        dense: call_dense::<S>,
        name: call_name::<S>,
        drop: drop_boxed::<Held<S>>,
    };
}

/// Reads the object that C++ passed back.
///
/// # Safety
/// `site` must be a live `Held<S>` made by [`attach`].
unsafe fn held<'a, S>(site: *mut c_void) -> &'a Held<S> {
    // SAFETY: promised by the caller; C++ keeps the object alive for the call.
    unsafe { &*site.cast::<Held<S>>() }
}

/// Reads a tensor that may be absent.
///
/// # Safety
/// `cell` must be null or a valid `at::Tensor*`.
unsafe fn borrow_some(cell: *mut C_tensor) -> Option<Tensor> {
    // SAFETY: promised by the caller.
    (!cell.is_null()).then(|| unsafe { super::borrow(cell) })
}

unsafe extern "C" fn call_linear<S: WeightSite>(
    site: *mut c_void,
    x: *mut C_tensor,
    bias: *mut C_tensor,
    matrix: i64,
    transposed: bool,
    out: *mut *mut C_tensor,
    error: *mut CppString,
) -> bool {
    let result = guard(error, || {
        // SAFETY: C++ passes the object that `attach` gave it, and tensors
        // that live for the length of this call; `bias` is null or valid.
        let (held, x, bias) = unsafe { (held::<S>(site), super::borrow(x), borrow_some(bias)) };
        let (x, bias) = (&x, bias.as_ref());
        held.site.apply(&match matrix {
            index @ 0.. => Operator::Matrix { x, bias, index, transposed },
            _ => Operator::Linear { x, bias, transposed },
        })
    });
    // SAFETY: `out` points to a cell on the caller's stack.
    result.map(|y| unsafe { *out = give(y) }).is_some()
}

unsafe extern "C" fn call_batched<S: WeightSite>(
    site: *mut c_void,
    x: *mut C_tensor,
    transposed: bool,
    out: *mut *mut C_tensor,
    error: *mut CppString,
) -> bool {
    let result = guard(error, || {
        // SAFETY: as in `call_linear`.
        let (held, x) = unsafe { (held::<S>(site), super::borrow(x)) };
        held.site.apply(&Operator::Stack { x: &x, transposed })
    });
    // SAFETY: `out` points to a cell on the caller's stack.
    result.map(|y| unsafe { *out = give(y) }).is_some()
}

unsafe extern "C" fn call_embedding<S: WeightSite>(
    site: *mut c_void,
    indices: *mut C_tensor,
    padding_idx: i64,
    scale_grad_by_freq: bool,
    sparse: bool,
    out: *mut *mut C_tensor,
    error: *mut CppString,
) -> bool {
    let result = guard(error, || {
        // SAFETY: as in `call_linear`.
        let (held, indices) = unsafe { (held::<S>(site), super::borrow(indices)) };
        let form = EmbeddingForm { padding_idx, scale_grad_by_freq, sparse };
        held.site.apply(&Operator::Embedding { indices: &indices, form })
    });
    // SAFETY: `out` points to a cell on the caller's stack.
    result.map(|y| unsafe { *out = give(y) }).is_some()
}

unsafe extern "C" fn call_convolution<S: WeightSite>(
    site: *mut c_void,
    x: *mut C_tensor,
    bias: *mut C_tensor,
    form: *const CForm,
    out: *mut *mut C_tensor,
    error: *mut CppString,
) -> bool {
    let result = guard(error, || {
        // SAFETY: as in `call_linear`; `form` and its lists, each of `dims`
        // numbers, live for the length of this call.
        let (held, x, bias, form) = unsafe {
            let form = &*form;
            let list = |start: *const i64| std::slice::from_raw_parts(start, form.dims).to_vec();
            let form = ConvolutionForm {
                stride: list(form.stride),
                padding: list(form.padding),
                dilation: list(form.dilation),
                groups: form.groups,
            };
            (held::<S>(site), super::borrow(x), borrow_some(bias), form)
        };
        held.site.apply(&Operator::Convolution { x: &x, bias: bias.as_ref(), form: &form })
    });
    // SAFETY: `out` points to a cell on the caller's stack.
    result.map(|y| unsafe { *out = give(y) }).is_some()
}

unsafe extern "C" fn call_dense<S: WeightSite>(
    site: *mut c_void,
    op: *const c_char,
    out: *mut *mut C_tensor,
    error: *mut CppString,
) -> bool {
    let result = guard(error, || {
        // SAFETY: as in `call_linear`; `op` is the operator's name, a C string.
        let (held, op) = unsafe { (held::<S>(site), CStr::from_ptr(op)) };
        held.site.dense(&op.to_string_lossy())
    });
    // SAFETY: `out` points to a cell on the caller's stack.
    result.map(|w| unsafe { *out = give(w) }).is_some()
}

unsafe extern "C" fn call_name<S>(site: *mut c_void) -> *const c_char {
    // SAFETY: as in `call_linear`; the string lives as long as the object.
    unsafe { held::<S>(site) }.name.as_ptr()
}

/// Makes `weight`, and with it every handle on the same tensor, answer
/// through `site`. Its dense storage is let go; take `weight.f_detach()`
/// before, if it is still wanted.
pub(crate) fn attach<S: WeightSite + 'static>(weight: &Tensor, name: &str, site: Arc<S>) -> Result<()> {
    let name = CString::new(name.replace('\0', " ")).unwrap_or_default();
    let object = into_opaque(Held { site, name });
    // SAFETY: the weight is borrowed; the table is static and fits `Held<S>`;
    // the shim owns the object from here on, and drops it if it fails.
    check(unsafe { tp_attach(raw(weight), Table::<S>::CALLS, object) })
}

/// Makes an adapted weight, and with it every handle on the same tensor, the
/// plain tensor that `dense` is: the site is let go.
pub(crate) fn release(weight: &Tensor, dense: &Tensor) -> Result<()> {
    // SAFETY: both tensors are borrowed for the length of the call.
    check(unsafe { tp_release(raw(weight), raw(dense)) })
}

/// The site of an adapted weight, if it has one of type `S`.
pub(crate) fn site_of<S: WeightSite + 'static>(weight: &Tensor) -> Option<Arc<S>> {
    // SAFETY: the weight is borrowed; the answer is null or an object that was
    // attached with this very table, hence a `Held<S>`, alive while the weight is.
    unsafe {
        let site = tp_site_of(raw(weight), Table::<S>::CALLS);
        (!site.is_null()).then(|| Arc::clone(&held::<S>(site).site))
    }
}
