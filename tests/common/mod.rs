//! What the integration tests share: the Python peers, and how tensors are compared.

#![allow(dead_code, missing_docs)]

pub mod follow;
pub mod program;
pub mod training;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock};

use tch::{Device, Kind, Tensor};

/// The Python that has the peers, or `None` where the comparison was switched off.
///
/// `TCH_PEFT_PYTHON` names it (`cargo xtask` sets that); empty means off, and so
/// does `TCH_PEFT_NO_PEERS=1`.
pub fn python() -> Option<PathBuf> {
    let off = std::env::var_os("TCH_PEFT_NO_PEERS").is_some_and(|value| value == "1");
    let python = match std::env::var_os("TCH_PEFT_PYTHON") {
        Some(python) => PathBuf::from(python),
        None => root().join("target/python/bin/python"),
    };
    if off || python.as_os_str().is_empty() {
        eprintln!("without the Python peers: this test checks nothing");
        return None;
    }
    assert!(
        python.exists(),
        "no {}: run `cargo xtask setup --peers`, or set TCH_PEFT_NO_PEERS=1 to leave the comparison out",
        python.display()
    );
    Some(python)
}

/// Runs a script of `tests/python` (or another path below the repository) to its end.
pub fn peer<A: AsRef<OsStr>>(script: &str, args: &[A]) {
    let python = python().expect("a test that calls a peer asks for python() first");
    let script = match script.contains('/') {
        true => root().join(script),
        false => root().join("tests/python").join(script),
    };
    let output = Command::new(&python)
        .arg(&script)
        .args(args)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HF_HUB_OFFLINE", "1")
        // What stands in for a GPU here is not for Python.
        .env_remove("LD_PRELOAD")
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", python.display()));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{} failed ({})\n{stdout}\n{stderr}", script.display(), output.status);
    print!("{stdout}");
}

/// The repository, or the bundle that the tests were taken away in
/// (`cargo xtask test --device cuda`), as its `run` says by `TCH_PEFT_ROOT`.
pub fn root() -> &'static Path {
    moved().unwrap_or(Path::new(env!("CARGO_MANIFEST_DIR")))
}

fn moved() -> Option<&'static Path> {
    static MOVED: OnceLock<Option<PathBuf>> = OnceLock::new();
    MOVED.get_or_init(|| std::env::var_os("TCH_PEFT_ROOT").map(PathBuf::from)).as_deref()
}

/// Where test binaries make their folders.
pub fn scratch() -> PathBuf {
    moved().map_or(env!("CARGO_TARGET_TMPDIR").into(), |root| root.join("tmp"))
}

/// Where tensors of tests are that can be anywhere: the CPU, or what
/// `TCH_PEFT_TEST_DEVICE` says (`cpu` or `cuda`), which must be there.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    *DEVICE.get_or_init(|| match std::env::var("TCH_PEFT_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => {
            let status = tch_peft::cuda_status();
            assert!(tch::Cuda::is_available(), "TCH_PEFT_TEST_DEVICE is cuda, and libtorch sees none: {status}");
            Device::Cuda(0)
        }
        Ok(other) => panic!("TCH_PEFT_TEST_DEVICE is `{other}`; it can be `cpu` or `cuda`"),
    })
}

/// Lets a GPU give the same bits twice, for tests that compare them.
pub fn repeatable() {
    if device() != Device::Cpu {
        tch_peft::set_deterministic(true);
    }
}

/// An empty folder of this name for what a test binary makes; kept until its next run.
pub fn fresh_dir(name: &str) -> PathBuf {
    let dir = scratch().join(name);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// The folder of this name that a script fills, once for all tests of a binary: called with `args` and
/// the folder. None without the Python peers.
pub fn made(name: &'static str, script: &str, args: &[&str]) -> Option<&'static Path> {
    static MADE: Mutex<BTreeMap<&str, &Path>> = Mutex::new(BTreeMap::new());
    python()?;
    let mut made = MADE.lock().unwrap();
    if let Some(dir) = made.get(name) {
        return Some(dir);
    }
    let dir: &'static Path = Box::leak(fresh_dir(name).into_boxed_path());
    let args: Vec<_> = args.iter().map(AsRef::as_ref).chain([dir.as_os_str()]).collect();
    peer(script, &args);
    made.insert(name, dir);
    Some(dir)
}

/// Held by every test that draws from libtorch's default generator, or seeds it:
/// the tests of a binary run on threads of one process and share it.
pub fn rng() -> MutexGuard<'static, ()> {
    static RNG: Mutex<()> = Mutex::new(());
    RNG.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The tensors of a safetensors file by name, on the [`device`].
pub fn read(path: impl AsRef<Path>) -> BTreeMap<String, Tensor> {
    let path = path.as_ref();
    let tensors = Tensor::read_safetensors(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    tensors.into_iter().map(|(name, tensor)| (name, tensor.to_device(device()))).collect()
}

/// Writes a safetensors file for a peer to read.
pub fn write(path: impl AsRef<Path>, tensors: &[(String, Tensor)]) {
    let contiguous: Vec<(&str, Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), on_cpu(tensor).contiguous())).collect();
    Tensor::write_safetensors(&contiguous, path).unwrap();
}

/// The values, without a history, where any two can be compared.
fn on_cpu(tensor: &Tensor) -> Tensor {
    tensor.detach().to_device(Device::Cpu)
}

/// The bytes of a tensor's values, so that NaN, -0.0 and the dtype count.
pub fn bits(tensor: &Tensor) -> Vec<u8> {
    let tensor = on_cpu(tensor).contiguous();
    let integers = match tensor.kind() {
        Kind::Double | Kind::Int64 => Kind::Int64,
        Kind::Float | Kind::Int => Kind::Int,
        Kind::Half | Kind::BFloat16 | Kind::Int16 => Kind::Int16,
        Kind::Bool | Kind::Uint8 | Kind::Int8 => Kind::Uint8,
        other => panic!("no bits of {other:?}"),
    };
    let tensor = tensor.view_dtype(integers).flatten(0, -1);
    match integers {
        Kind::Int64 => bytes(&Vec::<i64>::try_from(tensor).unwrap(), |v| v.to_le_bytes().to_vec()),
        Kind::Int => bytes(&Vec::<i32>::try_from(tensor).unwrap(), |v| v.to_le_bytes().to_vec()),
        Kind::Int16 => bytes(&Vec::<i16>::try_from(tensor).unwrap(), |v| v.to_le_bytes().to_vec()),
        _ => Vec::<u8>::try_from(tensor).unwrap(),
    }
}

fn bytes<T: Copy>(values: &[T], to: impl Fn(T) -> Vec<u8>) -> Vec<u8> {
    values.iter().flat_map(|v| to(*v)).collect()
}

/// Same dtype, shape and bits.
#[track_caller]
pub fn assert_same(name: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.kind(), expected.kind(), "{name}: dtype");
    assert_eq!(found.size(), expected.size(), "{name}: shape");
    let (f, e) = (bits(found), bits(expected));
    if f != e {
        let differing = f.iter().zip(&e).filter(|(a, b)| a != b).count();
        let first = f.iter().zip(&e).position(|(a, b)| a != b).unwrap();
        panic!(
            "{name}: {differing} of {} bytes differ, first at byte {first} ({} instead of {}); {}",
            f.len(),
            f[first],
            e[first],
            difference(found, expected)
        );
    }
}

/// What was expected was computed on the CPU: there the same bits, and a few roundings away on another device, which
/// adds and multiplies in steps of its own.
#[track_caller]
pub fn assert_same_on_cpu(name: &str, found: &Tensor, expected: &Tensor) {
    if device() == Device::Cpu {
        return assert_same(name, found, expected);
    }
    assert_eq!(found.kind(), expected.kind(), "{name}: dtype");
    let tolerance = if matches!(found.kind(), Kind::Float | Kind::Double) { 1e-5 } else { 1e-2 };
    assert_close(name, found, expected, tolerance);
}

/// The norm of the difference relative to the expected norm.
#[track_caller]
pub fn relative_error(name: &str, found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size(), "{name}: shape");
    let [found, expected] = [found, expected].map(|t| on_cpu(t).to_kind(Kind::Double));
    let norm = |t: &Tensor| f64::try_from(t.norm()).unwrap();
    let (error, scale) = (norm(&(&found - &expected)), norm(&expected));
    if error == 0.0 { 0.0 } else { error / scale }
}

/// At most `tolerance` away from the expected values, in norm and relative to it.
#[track_caller]
pub fn assert_close(name: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let error = relative_error(name, found, expected);
    // A NaN fails too.
    assert!(
        error <= tolerance,
        "{name}: |found - expected| / |expected| is {error:.3e}, more than {tolerance:.0e}; {}",
        difference(found, expected)
    );
}

/// More than `least` away in the same measure: a test that the two are not alike.
#[track_caller]
pub fn assert_differs(name: &str, found: &Tensor, other: &Tensor, least: f64) {
    let error = relative_error(name, found, other);
    assert!(error > least, "{name}: differs by {error:.3e} only, expected more than {least:.0e}");
}

fn difference(found: &Tensor, expected: &Tensor) -> String {
    let [found, expected] = [found, expected].map(|t| on_cpu(t).to_kind(Kind::Double));
    if found.numel() == 0 {
        return "both are empty".into();
    }
    let at = (&found - &expected).abs().flatten(0, -1).argmax(0, false);
    let value = |t: &Tensor| f64::try_from(t.flatten(0, -1).take(&at)).unwrap();
    format!(
        "largest difference at element {}: {} instead of {}",
        i64::try_from(&at).unwrap(),
        value(&found),
        value(&expected)
    )
}
