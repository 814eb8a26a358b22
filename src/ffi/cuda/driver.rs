//! The CUDA driver, of which eleven functions are needed.

use super::told;
use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

type Status = c_int;
type Handle = *mut c_void;

/// Functions of the driver's stable interface, by the names of its library.
macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*);)*) => {
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Functions {
            fn of(library: &Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: these are the functions' declarations in cuda.h, which
                // the driver keeps for every version since CUDA 4.
                unsafe { Ok(Functions { $($field: *library.get($name)?,)* }) }
            }
        }
    };
}

functions! {
    init = b"cuInit\0": fn(c_uint);
    error_string = b"cuGetErrorString\0": fn(Status, *mut *const c_char);
    device = b"cuDeviceGet\0": fn(*mut c_int, c_int);
    attribute = b"cuDeviceGetAttribute\0": fn(*mut c_int, c_int, c_int);
    retain = b"cuDevicePrimaryCtxRetain\0": fn(*mut Handle, c_int);
    push = b"cuCtxPushCurrent_v2\0": fn(Handle);
    pop = b"cuCtxPopCurrent_v2\0": fn(*mut Handle);
    load = b"cuModuleLoadData\0": fn(*mut Handle, *const c_void);
    function = b"cuModuleGetFunction\0": fn(*mut Handle, Handle, *const c_char);
    launch = b"cuLaunchKernel\0": fn(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
    );
}

/// The driver, initialised.
pub(super) struct Driver {
    functions: Functions,
    // Never closed.
    _library: Library,
}

/// A kernel of a loaded module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function(Handle);

// SAFETY: handles of the driver are good on every thread, and the modules that
// functions belong to are never unloaded.
unsafe impl Send for Function {}
unsafe impl Sync for Function {}

/// A loaded module, which stays loaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Module(Handle);

// SAFETY: as for `Function`.
unsafe impl Send for Module {}
unsafe impl Sync for Module {}

/// The context of a device that libtorch uses too: its primary one.
#[derive(Debug)]
pub(super) struct Context {
    handle: Handle,
    /// Compute capability: 90 is 9.0.
    pub(super) capability: u32,
    pub(super) processors: u32,
}

// SAFETY: as for `Function`; the context is retained for good.
unsafe impl Send for Context {}
unsafe impl Sync for Context {}

/// Makes a context the thread's current one while it lives.
struct Current<'a>(&'a Driver);

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut before = std::ptr::null_mut();
        // SAFETY: takes away what `with` pushed on this thread.
        unsafe { (self.0.functions.pop)(&mut before) };
    }
}

const ATTRIBUTE_PROCESSORS: c_int = 16;
const ATTRIBUTE_MAJOR: c_int = 75;
const ATTRIBUTE_MINOR: c_int = 76;

impl Driver {
    /// The machine's driver.
    pub(super) fn get() -> Result<&'static Driver> {
        static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
        DRIVER.get_or_init(Driver::open).as_ref().map_err(|reason| Error::Kernel {
            kernel: "(any)".into(),
            reason: reason.clone(),
            remedy: "install NVIDIA's driver, or use the CPU".into(),
        })
    }

    fn open() -> std::result::Result<Driver, String> {
        // SAFETY: the driver's library may be loaded at any time; torch does so too.
        let library = unsafe { Library::new("libcuda.so.1") }.map_err(|e| format!("no CUDA driver: {}", told(e)))?;
        let functions = Functions::of(&library).map_err(|e| format!("the CUDA driver is too old: {}", told(e)))?;
        let driver = Driver { functions, _library: library };
        // SAFETY: may be called any number of times.
        driver.check("cuInit", unsafe { (driver.functions.init)(0) })?;
        Ok(driver)
    }

    fn check(&self, what: &str, status: Status) -> std::result::Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: answers a static string, or leaves null for a status it doesn't know.
        let text = unsafe {
            (self.functions.error_string)(status, &mut text);
            if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy() }
        };
        Err(format!("{what} failed with status {status} ({text})"))
    }

    fn attribute(&self, device: c_int, which: c_int) -> std::result::Result<u32, String> {
        let mut value = 0;
        // SAFETY: `value` is a cell of ours.
        self.check("cuDeviceGetAttribute", unsafe { (self.functions.attribute)(&mut value, which, device) })?;
        u32::try_from(value).map_err(|_| format!("attribute {which} of the device is {value}"))
    }

    /// The primary context of device `index`, as libtorch counts devices.
    pub(super) fn context(&self, index: usize) -> std::result::Result<Context, String> {
        let ordinal = c_int::try_from(index).map_err(|_| format!("no CUDA device {index}"))?;
        let (mut device, mut handle) = (0, std::ptr::null_mut());
        // SAFETY: both are cells of ours.
        self.check("cuDeviceGet", unsafe { (self.functions.device)(&mut device, ordinal) })?;
        // SAFETY: as above; it is never released, so that it stays valid.
        self.check("cuDevicePrimaryCtxRetain", unsafe { (self.functions.retain)(&mut handle, device) })?;
        let capability = 10 * self.attribute(device, ATTRIBUTE_MAJOR)? + self.attribute(device, ATTRIBUTE_MINOR)?;
        Ok(Context { handle, capability, processors: self.attribute(device, ATTRIBUTE_PROCESSORS)? })
    }

    fn with<R>(
        &self,
        context: &Context,
        f: impl FnOnce() -> std::result::Result<R, String>,
    ) -> std::result::Result<R, String> {
        // SAFETY: the context is retained; `Current` pops it again.
        self.check("cuCtxPushCurrent", unsafe { (self.functions.push)(context.handle) })?;
        let _current = Current(self);
        f()
    }

    /// Loads machine code for the context's device.
    pub(super) fn load(&self, context: &Context, cubin: &[u8]) -> std::result::Result<Module, String> {
        let mut module = std::ptr::null_mut();
        // SAFETY: a cubin is an ELF file, which holds its own size; it was made
        // by the compiler, or is the cache's copy whose hash was checked.
        self.with(context, || {
            self.check("cuModuleLoadData", unsafe { (self.functions.load)(&mut module, cubin.as_ptr().cast()) })
        })?;
        Ok(Module(module))
    }

    pub(super) fn function(
        &self,
        context: &Context,
        module: Module,
        name: &str,
    ) -> std::result::Result<Function, String> {
        let name = CString::new(name).map_err(|e| e.to_string())?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded for good, and the name a C string.
        self.with(context, || {
            self.check("cuModuleGetFunction", unsafe {
                (self.functions.function)(&mut function, module.0, name.as_ptr())
            })
        })?;
        Ok(Function(function))
    }

    /// Starts a kernel with one parameter, a struct no larger than `words`.
    ///
    /// # Safety
    /// The kernel must read and write the memory only that its words say, and that
    /// must be valid on the stream; `stream` must be one of the context.
    pub(super) unsafe fn launch<const N: usize>(
        &self,
        context: &Context,
        function: Function,
        [x, y]: [u32; 2],
        threads: u32,
        stream: *mut c_void,
        words: &[u64; N],
    ) -> std::result::Result<(), String> {
        let mut parameters = [words.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the parameters before it returns; the rest is
        // promised by the caller.
        self.with(context, || {
            self.check("cuLaunchKernel", unsafe {
                (self.functions.launch)(
                    function.0,
                    x,
                    y,
                    1,
                    threads,
                    1,
                    1,
                    0,
                    stream,
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            })
        })
    }
}
