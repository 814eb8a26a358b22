//! NVRTC, the CUDA C++ compiler that torch brings along.
//!
//! It is looked for where libtorch's packages put it: beside libtorch (the zip
//! file), in the folders of PyPI's `nvidia` packages, and then wherever the
//! loader looks. Its `builtins` library lies beside it and must be loaded first,
//! since NVRTC asks for it by name only.

use super::{HEADERS, Program, told};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

type Status = c_int;
type Handle = *mut c_void;
type Outcome<T> = Result<T, String>;

unsafe extern "C" {
    fn tp_libtorch_folder() -> *const c_char;
}

/// The compiler.
#[derive(Debug)]
pub(crate) struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Handle) -> Status,
    log_size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    version: (c_int, c_int),
    // Never closed.
    _library: Library,
}

/// What came of compiling a program.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) cubin: Vec<u8>,
    /// Warnings, and what the options ask to be told.
    #[cfg_attr(not(test), expect(dead_code))]
    pub(crate) log: String,
}

/// The compiler's name for a compute capability: 90 is `sm_90`.
pub(crate) fn architecture(capability: u32) -> String {
    format!("sm_{capability}")
}

/// Options of every program. Products and sums are rounded one by one, as the
/// CPU's kernels do it; where they need not be, kernels say `fmaf`.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

impl Nvrtc {
    /// The compiler, or why there is none.
    pub(crate) fn get() -> Outcome<&'static Nvrtc> {
        static NVRTC: OnceLock<Outcome<Nvrtc>> = OnceLock::new();
        NVRTC.get_or_init(|| Nvrtc::open(&candidates(&libtorch_folder()))).as_ref().map_err(Clone::clone)
    }

    fn open(candidates: &[PathBuf]) -> Outcome<Nvrtc> {
        let mut reasons = Vec::new();
        for path in candidates {
            match Nvrtc::load(path) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(reason) => reasons.push(format!("{}: {reason}", path.display())),
            }
        }
        Err(format!("expected NVRTC beside libtorch or where the loader looks, found none ({})", reasons.join("; ")))
    }

    fn load(path: &Path) -> Outcome<Nvrtc> {
        for builtins in path.parent().map(|folder| libraries(folder, "libnvrtc-builtins")).unwrap_or_default() {
            // SAFETY: a library of data and functions that NVRTC loads itself,
            // whose initialisers have no effect on others. If it can't be
            // loaded, compiling says so.
            if let Ok(library) = unsafe { Library::open(Some(builtins), RTLD_LAZY | RTLD_GLOBAL) } {
                std::mem::forget(library);
            }
        }
        // SAFETY: the declarations are those of nvrtc.h, the same since CUDA
        // 11.1; loading has no effect on others.
        unsafe {
            let library = Library::open(Some(path), RTLD_LAZY).map_err(told)?;
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status =
                *library.get(b"nvrtcVersion\0").map_err(told)?;
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            Ok(Nvrtc {
                create: *library.get(b"nvrtcCreateProgram\0").map_err(told)?,
                compile: *library.get(b"nvrtcCompileProgram\0").map_err(told)?,
                destroy: *library.get(b"nvrtcDestroyProgram\0").map_err(told)?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0").map_err(told)?,
                log: *library.get(b"nvrtcGetProgramLog\0").map_err(told)?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0").map_err(told)?,
                cubin: *library.get(b"nvrtcGetCUBIN\0").map_err(told)?,
                version: (major, minor),
                _library: library,
            })
        }
    }

    /// A hash of all that the machine code depends on.
    pub(crate) fn key(&self, program: &Program, architecture: &str) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        add(&format!("NVRTC {}.{} {architecture}", self.version.0, self.version.1));
        add(program.name);
        add(program.source);
        HEADERS.iter().for_each(|(name, text)| [name, text].into_iter().for_each(|text| add(text)));
        OPTIONS.iter().for_each(|option| add(option));
        program.defines().for_each(|option| add(&option));
        hasher.finalize()
    }

    /// Compiles a program for an architecture.
    pub(crate) fn compile(&self, program: &Program, architecture: &str, more: &[&str]) -> Outcome<Compiled> {
        let c = |text: &str| CString::new(text).map_err(|e| format!("{}: {e}", program.name));
        let options = OPTIONS.iter().chain(more).map(|option| c(option));
        let options = options.chain(program.defines().map(|option| c(&option)));
        let options = options.chain([c(&format!("--gpu-architecture={architecture}"))]).collect::<Outcome<Vec<_>>>()?;
        let names = HEADERS.iter().map(|(name, _)| c(name)).collect::<Outcome<Vec<_>>>()?;
        let texts = HEADERS.iter().map(|(_, text)| c(text)).collect::<Outcome<Vec<_>>>()?;
        let [options, names, texts] =
            [&options, &names, &texts].map(|list| list.iter().map(|text| text.as_ptr()).collect::<Vec<_>>());
        let (source, name) = (c(program.source)?, c(&format!("{}.cu", program.name))?);
        let mut handle = std::ptr::null_mut();
        // SAFETY: all strings outlive the program, which `Created` destroys.
        let status = unsafe {
            let count = names.len() as c_int;
            (self.create)(&mut handle, source.as_ptr(), name.as_ptr(), count, texts.as_ptr(), names.as_ptr())
        };
        if status != 0 {
            return Err(format!("NVRTC refused {} with status {status}", program.name));
        }
        let created = Created { nvrtc: self, handle };
        // SAFETY: the program was created above; the options are C strings.
        let status = unsafe { (self.compile)(handle, options.len() as c_int, options.as_ptr()) };
        let log = created.bytes(self.log_size, self.log);
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_string();
        if status != 0 {
            return Err(format!(
                "NVRTC could not compile {} for {architecture} (status {status}): {log}",
                program.name
            ));
        }
        Ok(Compiled { cubin: created.bytes(self.cubin_size, self.cubin), log })
    }
}

/// A program inside the compiler.
struct Created<'a> {
    nvrtc: &'a Nvrtc,
    handle: Handle,
}

impl Created<'_> {
    /// What two functions of the compiler answer: how long it is, and it.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
        get: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    ) -> Vec<u8> {
        let mut len = 0;
        // SAFETY: the program lives; `bytes` has the room that is asked for.
        unsafe {
            if size(self.handle, &mut len) != 0 {
                return Vec::new();
            }
            let mut bytes = vec![0u8; len];
            if get(self.handle, bytes.as_mut_ptr().cast()) != 0 {
                return Vec::new();
            }
            bytes
        }
    }
}

impl Drop for Created<'_> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { (self.nvrtc.destroy)(&mut self.handle) };
    }
}

/// The folder that libtorch was loaded from, links followed.
fn libtorch_folder() -> PathBuf {
    // SAFETY: a static, NUL-terminated string.
    let folder = unsafe { CStr::from_ptr(tp_libtorch_folder()) }.to_string_lossy().into_owned();
    std::fs::canonicalize(&folder).unwrap_or_else(|_| folder.into())
}

/// Where NVRTC may be, the likeliest first.
fn candidates(libtorch: &Path) -> Vec<PathBuf> {
    let mut found = libraries(libtorch, "libnvrtc");
    // PyPI: torch/lib, and nvidia/cu13/lib or nvidia/cuda_nvrtc/lib.
    let nvidia = libtorch.join("../../nvidia");
    let packages = std::fs::read_dir(&nvidia).into_iter().flatten().flatten();
    let mut packaged: Vec<PathBuf> =
        packages.flat_map(|package| libraries(&package.path().join("lib"), "libnvrtc")).collect();
    packaged.sort_by(|a, b| b.file_name().cmp(&a.file_name()));
    found.extend(packaged);
    found.extend(["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from));
    found
}

/// The files of a folder called `stem.so…` or `stem-<hash>.so…`, the highest
/// version first.
fn libraries(folder: &Path, stem: &str) -> Vec<PathBuf> {
    let named = |name: &str| {
        let Some((before, _)) = name.split_once(".so") else { return false };
        let rest = before.strip_prefix(stem);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-') && !rest.starts_with("-builtins"))
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(named))
        .collect();
    found.sort();
    found.reverse();
    found
}

/// For tests: the program compiles for this compute capability without a warning,
/// and no kernel of it keeps registers in memory. Nothing is checked where torch
/// brought no NVRTC.
#[cfg(test)]
pub(crate) fn assert_compiles(program: &Program, capability: u32) {
    let nvrtc = match Nvrtc::get() {
        Ok(nvrtc) => nvrtc,
        Err(reason) => return eprintln!("without NVRTC: this test checks nothing ({reason})"),
    };
    let architecture = architecture(capability);
    let what = format!("{} {:?} for {architecture}", program.name, program.macros);
    let compiled = nvrtc.compile(program, &architecture, &["--ptxas-options=-v"]).unwrap_or_else(|e| panic!("{e}"));
    let log = &compiled.log;
    assert!(!log.contains("warning") && compiled.cubin.starts_with(b"\x7fELF"), "{what}: {log}");
    let frames: Vec<&str> = log.lines().filter(|line| line.contains("stack frame")).collect();
    let none = |line: &&str| line.contains(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads");
    assert!(!frames.is_empty() && frames.iter().all(none), "{what}: {log}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvrtc_is_found_in_every_layout_of_torch() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("torch/lib");
        for file in [
            "torch/lib/libtorch_cpu.so",
            "torch/lib/libcaffe2_nvrtc.so",
            "torch/lib/libnvrtc-builtins-0a1b.so.13.0",
            "nvidia/cu13/lib/libnvrtc.so.13",
            "nvidia/cu13/lib/libnvrtc.alt.so.13",
            "nvidia/cu13/lib/libnvrtc-builtins.so.13.0",
            "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "nvidia/cudnn/lib/libcudnn.so.9",
        ] {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let names = |paths: Vec<PathBuf>| -> Vec<String> {
            paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_string()).collect()
        };
        let of_loader = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
        assert_eq!(names(candidates(&lib)), [["libnvrtc.so.13", "libnvrtc.so.12"].as_slice(), &of_loader].concat());
        std::fs::write(lib.join("libnvrtc-0a1b.so.13"), "").unwrap();
        assert_eq!(names(candidates(&lib))[0], "libnvrtc-0a1b.so.13");
        assert_eq!(names(libraries(&lib, "libnvrtc-builtins")), ["libnvrtc-builtins-0a1b.so.13.0"]);
        assert_eq!(names(candidates(root.path())), of_loader);
    }

    // A cache may hand out a program for that very source and device only.
    #[test]
    fn keys_tell_programs_apart() {
        let Ok(nvrtc) = Nvrtc::get() else { return eprintln!("without NVRTC: this test checks nothing") };
        let program = Program { name: "a", source: "b", macros: vec![("W", "f32")] };
        let key = nvrtc.key(&program, "sm_90");
        assert_eq!(nvrtc.key(&program.clone(), "sm_90"), key);
        assert_ne!(nvrtc.key(&program, "sm_80"), key);
        for other in [
            Program { name: "b", ..program.clone() },
            Program { source: "c", ..program.clone() },
            Program { macros: vec![("W", "f16")], ..program.clone() },
            Program { macros: vec![], ..program.clone() },
        ] {
            assert_ne!(nvrtc.key(&other, "sm_90"), key, "{other:?}");
        }
    }

    #[test]
    fn a_compiler_that_is_none_is_told_with_the_reason() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reason = Nvrtc::open(&[file.path().into(), "/not/there/libnvrtc.so".into()]).unwrap_err();
        assert!(reason.contains(file.path().to_str().unwrap()) && reason.contains("/not/there"), "{reason}");
    }

    #[test]
    fn architectures_are_named_as_nvcc_names_them() {
        assert_eq!([80, 90, 120].map(architecture), ["sm_80", "sm_90", "sm_120"]);
    }
}
