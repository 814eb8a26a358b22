//! The Python environment `target/python`: torch, which brings libtorch, and
//! the libraries that tests and benches compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Result;
use crate::tools::Python;

/// Prints a line `name version` for each of the given packages that is installed.
const PRINT_VERSIONS: &str = "
import sys
from importlib import metadata
for name in sys.argv[1:]:
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
";

/// Prints torch's folder without the seconds that importing it would take.
const PRINT_TORCH_DIR: &str = "
from importlib.util import find_spec
print(find_spec('torch').submodule_search_locations[0])
";

/// One pinned package.
#[derive(Debug, PartialEq)]
struct Pin {
    name: String,
    version: String,
}

/// The packages to install, with the files that pin them.
#[derive(Debug)]
pub struct Requirements {
    files: Vec<PathBuf>,
    pins: Vec<Pin>,
}

impl Requirements {
    /// What the build needs.
    pub fn base(root: &Path) -> Result<Self> {
        Self::read(root, &["requirements-base.txt"])
    }

    /// What tests and benches need: the base and the Python peers.
    pub fn with_peers(root: &Path) -> Result<Self> {
        Self::read(root, &["requirements-base.txt", "requirements-peers.txt"])
    }

    fn read(root: &Path, names: &[&str]) -> Result<Self> {
        let files: Vec<_> = names.iter().map(|n| root.join("python").join(n)).collect();
        let mut pins = Vec::new();
        for file in &files {
            let path = file.display();
            let text = fs::read_to_string(file).map_err(|e| format!("cannot read {path}: {e}"))?;
            pins.extend(parse_pins(&text).map_err(|e| format!("{path}: {e}"))?);
        }
        Ok(Self { files, pins })
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.pins.iter().map(|pin| pin.name.as_str())
    }

    /// Whether a listing as of [`PRINT_VERSIONS`] has every pin.
    fn met_by(&self, listing: &str) -> bool {
        self.pins.iter().all(|pin| {
            listing.lines().any(|line| {
                line.split_once(' ').is_some_and(|(name, version)| {
                    // A build's local part, as in 2.11.0+cpu, is as good.
                    let public = version.split('+').next();
                    name == pin.name && public == Some(pin.version.as_str())
                })
            })
        })
    }
}

/// Reads `name==version` lines; the rest of a line from `#` on is a comment.
fn parse_pins(text: &str) -> Result<Vec<Pin>, String> {
    let lines = text.lines().map(|line| {
        let content = line.split_once('#').map_or(line, |(content, _)| content);
        content.trim()
    });
    let pins = lines.filter(|line| !line.is_empty()).map(|line| {
        let (name, version) =
            line.split_once("==").ok_or_else(|| format!("`{line}` is not of the form name==version"))?;
        Ok(Pin { name: name.trim().to_owned(), version: version.trim().to_owned() })
    });
    pins.collect()
}

/// The environment, made or yet to be made.
#[derive(Debug)]
pub struct Venv {
    dir: PathBuf,
}

impl Venv {
    /// The environment of the repository at `root`.
    pub fn at(root: &Path) -> Self {
        Self { dir: root.join("target").join("python") }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its interpreter.
    pub fn python(&self) -> PathBuf {
        match cfg!(windows) {
            true => self.dir.join("Scripts").join("python.exe"),
            false => self.dir.join("bin").join("python"),
        }
    }

    /// Whether everything is installed in the pinned version, and no
    /// installation was broken off.
    pub fn has(&self, wanted: &Requirements) -> bool {
        !self.unfinished().exists()
            && self.ask(PRINT_VERSIONS, wanted.names()).is_ok_and(|listing| wanted.met_by(&listing))
    }

    /// Makes the environment with `python` if there is none that works, and
    /// installs the packages.
    pub fn install(&self, python: &Python, wanted: &Requirements) -> Result<()> {
        let dir = self.dir.display();
        // pip too: a broken-off `-m venv` leaves an interpreter without it.
        if self.ask("import pip", []).is_err() {
            println!("Making a Python environment in {dir} ({python}).");
            let mut make = Command::new(python.program());
            make.args(["-m", "venv", "--clear"]).arg(&self.dir);
            finish(&mut make, "make the Python environment")?;
        }
        println!("Installing the pinned Python packages (the first time, gigabytes).");
        let marker = self.unfinished();
        fs::write(&marker, "").map_err(|e| format!("cannot write {}: {e}", marker.display()))?;
        let mut pip = self.isolated();
        pip.args(["-m", "pip", "install", "--disable-pip-version-check"]);
        for file in &wanted.files {
            pip.arg("-r").arg(file);
        }
        finish(&mut pip, "install the Python packages")?;
        fs::remove_file(&marker).map_err(|e| format!("cannot remove {}: {e}", marker.display()).into())
    }

    /// The folder of the installed torch, which is a libtorch.
    pub fn torch_dir(&self) -> Result<PathBuf> {
        let printed = self.ask(PRINT_TORCH_DIR, []);
        let dir = PathBuf::from(printed.as_deref().unwrap_or_default().trim_end());
        if dir.join("lib").is_dir() {
            return Ok(dir);
        }
        let venv = self.dir.display();
        Err(format!("no torch in {venv}; remove that folder and run `cargo xtask setup`").into())
    }

    /// Exists from before an installation until it is complete.
    fn unfinished(&self) -> PathBuf {
        self.dir.join("installation-unfinished")
    }

    /// The interpreter, blind to the user's PYTHONPATH and own packages.
    fn isolated(&self) -> Command {
        let mut command = Command::new(self.python());
        command.arg("-I");
        command
    }

    /// What a script prints, if the interpreter is there and the script succeeds.
    fn ask<'a>(&self, script: &str, args: impl IntoIterator<Item = &'a str>) -> Result<String, String> {
        let mut command = self.isolated();
        command.args(["-c", script]).args(args);
        let output = command.stderr(Stdio::null()).output();
        match output {
            Ok(output) if output.status.success() => String::from_utf8(output.stdout).map_err(|e| e.to_string()),
            Ok(output) => Err(output.status.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Runs a command to its end; `purpose` completes "cannot …" in the error.
fn finish(command: &mut Command, purpose: &str) -> Result<()> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cannot {purpose}: {command:?} failed ({status})").into()),
        Err(error) => Err(format!("cannot {purpose}: {command:?}: {error}").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(name: &str, version: &str) -> Pin {
        Pin { name: name.into(), version: version.into() }
    }

    #[test]
    fn pins_are_read_without_comments() {
        let text = "# libtorch\ntorch==2.11.0\n\nnumpy == 2.4.6  # arrays\n";
        let pins = vec![pin("torch", "2.11.0"), pin("numpy", "2.4.6")];
        assert_eq!(parse_pins(text), Ok(pins));
    }

    #[test]
    fn an_unpinned_package_is_refused_by_name() {
        let error = parse_pins("torch==2.11.0\nnumpy>=2\n").unwrap_err();
        assert!(error.contains("numpy>=2"), "{error}");
    }

    #[test]
    fn only_the_pinned_versions_will_do() {
        let wanted = Requirements { files: vec![], pins: vec![pin("torch", "2.11.0"), pin("numpy", "2.4.6")] };
        assert!(wanted.met_by("torch 2.11.0\nnumpy 2.4.6\n"));
        assert!(wanted.met_by("numpy 2.4.6\ntorch 2.11.0+cpu\n"));
        assert!(!wanted.met_by("torch 2.11.0\n"));
        assert!(!wanted.met_by("torch 2.11.01\nnumpy 2.4.6\n"));
        assert!(!wanted.met_by(""));
    }

    #[test]
    fn the_checked_in_files_pin_everything() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let base = Requirements::base(root).unwrap();
        let all = Requirements::with_peers(root).unwrap();
        assert!(base.names().any(|name| name == "torch"));
        assert!(all.names().any(|name| name == "peft"));
        assert!(all.pins.len() > base.pins.len());
    }
}
