//! The bundle: the tests and the GPU's bench, built here, to be run on a machine
//! that has a torch and a driver, and no Rust.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cli::Bundle;
use crate::libtorch::Libtorch;
use crate::python::Venv;
use crate::{Ready, Result};

/// Runs what is in the bundle; it lies there as `run`.
const RUN: &str = include_str!("bundle.sh");

/// What test binaries read, below the root.
const DATA: [&str; 6] = ["tests", "python", "benches", "examples", "docs", "README.md"];

/// Test binaries that ask cargo about this repository, whose answer no device changes.
const AT_HOME: [&str; 2] = ["docs", "xtask"];

impl Bundle {
    /// Builds the programs and lays them out with their data.
    pub fn make(&self, ready: &Ready) -> Result<()> {
        let folder = self.out.clone().unwrap_or_else(|| ready.root.join("target/bundle"));
        clear(&folder)?;
        let failed = |error: io::Error| format!("cannot write {}: {error}", folder.display());
        let tests = ready.cargo(["test", "--no-run", "--tests"]).programs()?;
        let benches = match self.stand_in {
            None => ready.cargo(["bench", "--no-run", "--bench", "cuda"]).programs()?,
            Some(_) => Vec::new(),
        };
        for (kind, programs) in [("tests", &tests), ("benches", &benches)] {
            let bin = folder.join("bin").join(kind);
            fs::create_dir_all(&bin).map_err(failed)?;
            for program in programs {
                let name = name_of(program);
                if !AT_HOME.contains(&name.as_str()) {
                    let copied = bin.join(name);
                    fs::copy(program, &copied).map_err(failed)?;
                    strip(&copied);
                }
            }
        }
        for name in DATA {
            copy(&ready.root.join(name), &folder.join(name)).map_err(failed)?;
        }
        let run = folder.join("run");
        fs::write(&run, RUN).map_err(failed)?;
        make_executable(&run).map_err(failed)?;
        if self.tar {
            println!("{}", pack(&folder)?.display());
        }
        let Some(args) = &self.stand_in else {
            println!("{}: {} test programs.", folder.display(), tests.len());
            println!("There, with a Python that has torch with CUDA: ./run --python PYTHON");
            return Ok(());
        };
        build_stand_in(ready, &folder.join("bin/standin.so"))?;
        let mut command = Command::new(&run);
        command.args(["--device", "stand-in", "--python"]).arg(Venv::at(&ready.root).python()).args(args);
        succeed(&mut command, "run the bundle")
    }
}

/// Builds tests/standin, which libtorch takes for its CUDA half.
fn build_stand_in(ready: &Ready, to: &Path) -> Result<()> {
    let torch = match &ready.libtorch {
        Libtorch::Venv => Venv::at(&ready.root).torch_dir()?,
        Libtorch::Own { path, .. } => path.clone(),
    };
    let include = torch.join("include");
    let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    compiler.args(["-shared", "-fPIC", "-std=c++17", "-O1", "-w"]).arg(ready.root.join("tests/standin/standin.cpp"));
    compiler.arg("-I").arg(&include).arg("-I").arg(include.join("torch/csrc/api/include"));
    compiler.arg("-L").arg(torch.join("lib")).args(["-ltorch_cpu", "-lc10", "-o"]).arg(to);
    succeed(&mut compiler, "build the stand-in for a GPU")
}

/// Runs a command to its good end; `purpose` completes "cannot …" in the error.
fn succeed(command: &mut Command, purpose: &str) -> Result<()> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cannot {purpose}: {:?} failed ({status})", command.get_program()).into()),
        Err(error) => Err(format!("cannot {purpose}: {:?}: {error}", command.get_program()).into()),
    }
}

/// Takes the debugger's information out of a program, three quarters of its bytes, where binutils are installed.
fn strip(program: &Path) {
    if !Command::new("strip").arg("-S").arg(program).status().is_ok_and(|status| status.success()) {
        eprintln!("{} keeps its debug information: `strip` could not be run.", program.display());
    }
}

/// Removes a bundle that was made before, and nothing else.
fn clear(folder: &Path) -> Result<()> {
    match fs::read_dir(folder).map(|mut entries| entries.next().is_none()) {
        Err(_) | Ok(true) => return Ok(()),
        Ok(false) => {}
    }
    let path = folder.display();
    if !folder.join("run").is_file() || !folder.join("bin").is_dir() {
        return Err(format!("{path} is there and is no bundle; name another folder with --out").into());
    }
    fs::remove_dir_all(folder).map_err(|e| format!("cannot remove {path}: {e}").into())
}

/// `resume` of `target/debug/deps/resume-6264cb9911e37032`.
fn name_of(program: &Path) -> String {
    let stem = program.file_stem().unwrap_or_default().to_string_lossy();
    stem.rsplit_once('-').map_or_else(|| stem.to_string(), |(name, _)| name.to_owned())
}

/// A file or a folder with all that is in it, but for what builds and Python leave behind.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    if !from.is_dir() {
        return fs::copy(from, to).map(drop);
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        if name != "target" && name != "__pycache__" {
            copy(&from.join(&name), &to.join(&name))?;
        }
    }
    Ok(())
}

/// Packs the folder, and answers the file.
fn pack(folder: &Path) -> Result<PathBuf> {
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else {
        return Err(format!("{} can't be packed", folder.display()).into());
    };
    let file = folder.with_extension("tar.gz");
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let mut tar = Command::new("tar");
    succeed(tar.arg("-C").arg(parent).arg("-czf").arg(&file).arg(name), "pack the bundle")?;
    Ok(file)
}

#[cfg(unix)]
fn make_executable(file: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn make_executable(_file: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_lose_their_hash() {
        assert_eq!(name_of(Path::new("target/debug/deps/bf16_memory-6264cb9911e37032")), "bf16_memory");
    }

    #[test]
    fn only_a_bundle_is_removed() {
        let folder = std::env::temp_dir().join(format!("tch-peft-bundle-{}", std::process::id()));
        let kept = folder.join("thesis.tex");
        fs::create_dir_all(&folder).unwrap();
        clear(&folder).unwrap();
        fs::write(&kept, "").unwrap();
        assert!(clear(&folder).unwrap_err().message.contains("--out"));
        assert!(kept.exists());
        fs::create_dir(folder.join("bin")).unwrap();
        fs::write(folder.join("run"), "").unwrap();
        clear(&folder).unwrap();
        assert!(!folder.exists());
    }
}
