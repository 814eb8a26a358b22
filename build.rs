//! Builds the C++ shim against the libtorch that torch-sys found.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    for name in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    // docs.rs has no libtorch.
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() {
        return;
    }
    let lib = PathBuf::from(env::var_os("DEP_TCH_LIBTORCH_LIB").expect(
        "torch-sys exported no libtorch folder; set LIBTORCH (or LIBTORCH_USE_PYTORCH=1), see docs/building.md",
    ));
    let include = match env::var_os("LIBTORCH_INCLUDE") {
        Some(root) => PathBuf::from(root).join("include"),
        None => lib.join("../include"),
    };
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    cc::Build::new()
        .cpp(true)
        .pic(true)
        .warnings(false)
        .debug(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .flag("-std=c++17")
        .flag(format!("-D_GLIBCXX_USE_CXX11_ABI={abi}"))
        .files(
            ["autograd", "compute", "context", "cuda", "hook", "optim", "runtime"]
                .map(|name| format!("csrc/{name}.cpp")),
        )
        .compile("tch_peft");
    // For this package's own tests, examples and benches; a program that
    // depends on the crate finds libtorch as it does for tch.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
