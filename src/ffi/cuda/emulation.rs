//! Runs kernels on the CPU, from the same source, for tests.
//!
//! `tests/cuda_emulation/device.h` stands in for CUDA; the C++ compiler that the
//! crate is built with compiles a program to a library, which is kept.

use super::{HEADERS, Launch, Launcher, Program};
use crate::error::Result;
use libloading::Library;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use tch::Device;

const DEVICE: &str = include_str!("../../../tests/cuda_emulation/device.h");

/// A device that the CPU plays; tensors are on the CPU.
#[derive(Debug)]
pub(crate) struct Emulation;

/// Values as on the device: each rounded by itself. Kernels see bytes as numbers
/// of other types; what is not aligned as a device needs it stops the test, and
/// so does an index beyond an array.
///
/// Jumps from stack to stack are none that fortified ones allow.
const OPTIONS: [&str; 9] = [
    "-std=c++17",
    "-O1",
    "-U_FORTIFY_SOURCE",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fsanitize=alignment,bounds",
    "-fsanitize-undefined-trap-on-error",
];

/// One kernel at a time: blocks and threads are global variables there.
static TURN: Mutex<()> = Mutex::new(());

impl Launcher for Emulation {
    fn launch(&self, launch: &Launch) -> Result<()> {
        let words = launch.words(Device::Cpu)?;
        let path = library(launch.program);
        let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: the library was made from our source just now, or by an
        // earlier run from the same; `KERNEL` declares its functions so.
        unsafe {
            let library = Library::new(path).unwrap();
            let kernel = library
                .get::<unsafe extern "C" fn(*const c_void, u32, u32, u32)>(launch.kernel.as_bytes())
                .unwrap_or_else(|e| panic!("{}: {e}", launch.kernel));
            kernel(words.as_ptr().cast(), launch.blocks[0], launch.blocks[1], launch.threads);
        }
        Ok(())
    }

    fn capability(&self) -> u32 {
        80
    }

    /// So few that kernels have to go round.
    fn processors(&self) -> u32 {
        3
    }
}

/// The program as a library.
fn library(program: &Program) -> PathBuf {
    let folder = Path::new(env!("OUT_DIR")).join("emulation");
    let mut hasher = blake3::Hasher::new();
    for text in HEADERS.iter().map(|(_, text)| *text).chain(OPTIONS).chain([program.name, program.source, DEVICE]) {
        hasher.update(text.as_bytes());
    }
    for option in program.defines() {
        hasher.update(option.as_bytes());
    }
    let path = folder.join(format!("{}.so", hasher.finalize().to_hex()));
    if path.exists() {
        return path;
    }
    std::fs::create_dir_all(&folder).unwrap();
    let made = tempfile::Builder::new().suffix(".so").tempfile_in(&folder).unwrap().into_temp_path();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(&compiler)
        .args(OPTIONS)
        .args(program.defines())
        .arg("-include")
        .arg(root.join("tests/cuda_emulation/device.h"))
        .args(["-x", "c++"])
        .arg(root.join(format!("csrc/kernels/{}.cu", program.name)))
        .arg("-o")
        .arg(&made)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}"));
    assert!(output.status.success(), "{program:?}: {}", String::from_utf8_lossy(&output.stderr));
    made.persist(&path).unwrap();
    path
}
