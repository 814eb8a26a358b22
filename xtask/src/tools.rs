//! The programs that must be on the machine, and how to get the missing ones.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::process::{Command, Stdio};

use crate::Result;

/// The Python versions that have wheels of every pinned package.
const PYTHON_MINORS: std::ops::RangeInclusive<u32> = 11..=14;

/// Fails if it cannot make an environment; prints the version.
const PROBE: &str = "
import ensurepip, sys, venv
print(*sys.version_info[:2])
";

/// Prints the version.
const PRINT_VERSION: &str = "import sys; print(*sys.version_info[:2])";

/// A Python that can make an environment.
#[derive(Debug)]
pub struct Python {
    program: String,
    minor: u32,
}

impl Python {
    /// The command.
    pub fn program(&self) -> &str {
        &self.program
    }
}

impl fmt::Display for Python {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, Python 3.{}", self.program, self.minor)
    }
}

/// Something that is not there.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Missing {
    /// A C++ compiler.
    Cxx,
    /// Any Python.
    Python,
    /// Python of a version that will do, beside one that will not.
    OtherPython,
    /// Python's `venv` with `ensurepip`, which Debian packages apart.
    Venv,
}

/// The systems whose package managers we know.
#[derive(Debug, Clone, Copy, PartialEq)]
enum System {
    Debian,
    Fedora,
    MacOs,
}

impl System {
    const ALL: [Self; 3] = [Self::Debian, Self::Fedora, Self::MacOs];

    fn name(self) -> &'static str {
        match self {
            Self::Debian => "Debian, Ubuntu",
            Self::Fedora => "Fedora",
            Self::MacOs => "macOS",
        }
    }

    /// The command that installs something.
    fn install(self, missing: Missing) -> &'static str {
        match (self, missing) {
            (Self::Debian, Missing::Cxx) => "sudo apt-get install g++",
            (Self::Debian, Missing::OtherPython) => "sudo apt-get install python3.11 python3.11-venv",
            (Self::Debian, _) => "sudo apt-get install python3 python3-venv",
            (Self::Fedora, Missing::Cxx) => "sudo dnf install gcc-c++",
            (Self::Fedora, Missing::OtherPython) => "sudo dnf install python3.12",
            (Self::Fedora, _) => "sudo dnf install python3",
            (Self::MacOs, Missing::Cxx) => "xcode-select --install",
            (Self::MacOs, _) => "brew install python@3.13",
        }
    }

    /// This machine's, if it is one of them.
    fn here() -> Option<Self> {
        if cfg!(target_os = "macos") {
            return Some(Self::MacOs);
        }
        Self::from_os_release(&fs::read_to_string("/etc/os-release").ok()?)
    }

    /// Reads `ID` and `ID_LIKE` of an os-release file.
    fn from_os_release(text: &str) -> Option<Self> {
        let ids = text.lines().filter_map(|line| {
            let value = line.strip_prefix("ID=").or(line.strip_prefix("ID_LIKE="));
            value.map(|value| value.trim_matches('"'))
        });
        let mut ids = ids.flat_map(str::split_whitespace);
        ids.find_map(|id| match id {
            "debian" | "ubuntu" => Some(Self::Debian),
            "fedora" | "rhel" | "centos" => Some(Self::Fedora),
            _ => None,
        })
    }
}

/// Checks for the C++ compiler and, with `need_python`, for a Python that can
/// make an environment. The error names all that is missing.
pub fn check(need_python: bool) -> Result<Option<Python>> {
    let mut problems = Vec::new();
    if let Err(problem) = find_cxx(std::env::var_os("CXX")) {
        problems.push((Missing::Cxx, problem));
    }
    let mut found = None;
    if need_python {
        match find_python() {
            Ok(python) => found = Some(python),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() {
        return Ok(found);
    }
    Err(describe(&problems, System::here()).into())
}

/// Checks for rustfmt and clippy, which minimal toolchains leave out; `has`
/// tells whether cargo has a command.
pub fn check_components(has: impl Fn(&str) -> bool) -> Result<()> {
    let missing: Vec<_> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(command, _)| !has(command))
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.join(" ");
    Err(format!("missing: {missing}\n  install with: rustup component add {missing}").into())
}

/// The message for all that is missing: on a known system its command, on
/// others the commands of all.
fn describe(problems: &[(Missing, String)], here: Option<System>) -> String {
    let mut text = String::from("a tool is missing");
    for (missing, problem) in problems {
        text += &format!("\n  {problem}");
        match here {
            Some(system) => text += &format!("\n    install with: {}", system.install(*missing)),
            None => {
                for system in System::ALL {
                    let command = system.install(*missing);
                    text += &format!("\n    install with: {command}   ({})", system.name());
                }
            }
        }
    }
    text
}

/// Looks for the compiler that build scripts will call: `$CXX`, else `c++`.
fn find_cxx(setting: Option<OsString>) -> Result<(), String> {
    if let Some(cxx) = setting.filter(|cxx| !cxx.is_empty()) {
        // May hold a launcher and options, as in `ccache g++ -m64`.
        let cxx = cxx.to_string_lossy();
        let program = cxx.split_whitespace().next().unwrap_or_default();
        return match runs(program.as_ref()) {
            true => Ok(()),
            false => Err(format!("C++ compiler: CXX is `{cxx}`, which does not run")),
        };
    }
    if runs("c++".as_ref()) {
        return Ok(());
    }
    Err(match ["g++", "clang++"].into_iter().find(|cxx| runs(cxx.as_ref())) {
        Some(other) => format!("C++ compiler: no `c++`; to use `{other}`, set CXX={other}"),
        None => "C++ compiler: no `c++`, and CXX is not set".into(),
    })
}

/// Whether a program is there and tells its version.
fn runs(program: &OsStr) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null());
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Looks for a Python that will do, the usual name first.
fn find_python() -> Result<Python, (Missing, String)> {
    let versioned = PYTHON_MINORS.rev().map(|minor| format!("python3.{minor}"));
    let programs = ["python3".to_owned()].into_iter().chain(versioned);
    let mut problem = None;
    for program in programs {
        let Some(version) = answer(&program, PRINT_VERSION) else {
            continue;
        };
        match (usable_minor(&version), answer(&program, PROBE)) {
            (Some(minor), Some(_)) => return Ok(Python { program, minor }),
            (Some(_), None) => {
                let text = format!("python3-venv: `{program}` has no venv with ensurepip");
                problem = Some((Missing::Venv, text));
            }
            (None, _) => {
                let version = version.trim().replace(' ', ".");
                problem.get_or_insert((
                    Missing::OtherPython,
                    format!("Python {}: `{program}` is Python {version}", versions()),
                ));
            }
        }
    }
    Err(problem.unwrap_or_else(|| {
        let text = format!("Python {}: no `python3`", versions());
        (Missing::Python, text)
    }))
}

/// The versions that will do, for messages.
fn versions() -> String {
    format!("3.{} to 3.{}", PYTHON_MINORS.start(), PYTHON_MINORS.end())
}

/// The minor version in `3 11`, if it will do.
fn usable_minor(version: &str) -> Option<u32> {
    let minor = version.trim().strip_prefix("3 ")?.parse().ok()?;
    PYTHON_MINORS.contains(&minor).then_some(minor)
}

/// What a script prints, if it succeeds.
fn answer(program: &str, script: &str) -> Option<String> {
    let mut command = Command::new(program);
    command.args(["-I", "-c", script]).stdin(Stdio::null());
    let output = command.stderr(Stdio::null()).output().ok()?;
    let printed = String::from_utf8(output.stdout).ok()?;
    output.status.success().then_some(printed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_are_recognised_by_id_or_likeness() {
        for (text, system) in [
            ("NAME=x\nID=debian\n", Some(System::Debian)),
            ("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", Some(System::Debian)),
            ("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", Some(System::Fedora)),
            ("ID=arch\n", None),
            ("VERSION_ID=debian\n", None),
        ] {
            assert_eq!(System::from_os_release(text), system, "{text}");
        }
    }

    #[test]
    fn every_missing_tool_comes_with_its_command() {
        let problems = [(Missing::Cxx, "no compiler".to_owned()), (Missing::Venv, "no venv".to_owned())];
        let text = describe(&problems, Some(System::Debian));
        assert!(text.contains("apt-get install g++"), "{text}");
        assert!(text.contains("apt-get install python3 python3-venv"), "{text}");
        assert!(!text.contains("dnf"), "{text}");
    }

    #[test]
    fn an_unknown_system_is_told_all_commands() {
        let text = describe(&[(Missing::Cxx, "no compiler".into())], None);
        for system in System::ALL {
            assert!(text.contains(system.install(Missing::Cxx)), "{text}");
        }
    }

    #[test]
    fn only_versions_with_wheels_will_do() {
        assert_eq!(usable_minor("3 11\n"), Some(11));
        for version in ["3 9\n", "3 10\n", "3 99\n", "2 12\n", "4 11\n", ""] {
            assert_eq!(usable_minor(version), None, "{version}");
        }
    }

    #[test]
    fn a_cxx_that_does_not_run_is_named() {
        let error = find_cxx(Some("no-such-compiler -m64".into())).unwrap_err();
        assert!(error.contains("no-such-compiler -m64"), "{error}");
    }
}
