//! Running cargo from a program that cargo itself started.

use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use crate::libtorch::Libtorch;
use crate::{Failure, Result};

/// Names the Python that tests and benches compare with; empty means none.
pub const PEER_PYTHON: &str = "TCH_PEFT_PYTHON";

/// A cargo command in the repository's root.
pub struct Cargo(Command);

impl Cargo {
    /// A command in the environment that a plain `cargo` of the user would have,
    /// so that switching between the two rebuilds nothing, plus [`PEER_PYTHON`].
    pub fn new(root: &Path, libtorch: &Libtorch, peers: Option<&Path>) -> Self {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(program);
        command.current_dir(root);
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(is_set_by_cargo_run) {
                command.env_remove(name);
            }
        }
        // Cargo exported the default of `.cargo/config.toml` to this process.
        // Build scripts would take it for a change: the child sets it itself.
        if let Libtorch::Venv = libtorch {
            command.env_remove("LIBTORCH");
        }
        if let Some(python) = peers {
            command.env(PEER_PYTHON, python);
        }
        Self(command)
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.0.args(args);
        self
    }

    /// Sets a variable for this command only.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.0.env(name, value);
        self
    }

    /// The command as one would type it.
    pub fn display(&self) -> String {
        let flags = self.0.get_envs().filter(|(name, _)| *name == "RUSTDOCFLAGS");
        let flags = flags.map(|(_, value)| format!("RUSTDOCFLAGS={:?}", value.unwrap_or_default()));
        let args = self.0.get_args().map(|arg| arg.to_string_lossy().into());
        let words = flags.chain([String::from("cargo")]).chain(args);
        words.collect::<Vec<String>>().join(" ")
    }

    /// Whether the command succeeds; what it prints is dropped.
    pub fn succeeds_quietly(mut self) -> bool {
        let quiet = self.0.stdout(Stdio::null()).stderr(Stdio::null());
        quiet.status().is_ok_and(|status| status.success())
    }

    /// Runs the command, and fails with its status if it fails.
    pub fn run(mut self) -> Result<()> {
        let status = self.0.status();
        self.finish(status)
    }

    /// As [`run`](Self::run) for a `cargo test`, passing its output on and
    /// adding up the results of the test programs.
    pub fn run_counting_tests(mut self) -> Result<TestCount> {
        let mut count = TestCount::default();
        let status = self.0.stdout(Stdio::piped()).spawn().and_then(|mut child| {
            if let Some(output) = child.stdout.take() {
                let mut output = BufReader::new(output);
                let mut line = Vec::new();
                let mut stdout = std::io::stdout().lock();
                while output.read_until(b'\n', &mut line)? > 0 {
                    stdout.write_all(&line)?;
                    count.take_in(&String::from_utf8_lossy(&line));
                    line.clear();
                }
            }
            child.wait()
        });
        self.finish(status).map(|()| count)
    }

    /// Builds with a `--no-run`, and answers the test and bench programs that it made.
    pub fn programs(mut self) -> Result<Vec<PathBuf>> {
        self.0.args(["--message-format", "json-render-diagnostics"]);
        let output = self.0.stderr(Stdio::inherit()).output();
        let (status, text) = match output {
            Ok(output) => (Ok(output.status), output.stdout),
            Err(error) => (Err(error), Vec::new()),
        };
        self.finish(status)?;
        Ok(String::from_utf8_lossy(&text).lines().filter_map(program).collect())
    }

    fn finish(&self, status: std::io::Result<ExitStatus>) -> Result<()> {
        let command = self.display();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Failure {
                message: format!("`{command}` failed ({status})"),
                status: status.code().and_then(|c| c.try_into().ok()).unwrap_or(1),
            }),
            Err(error) => Err(format!("cannot run `{command}`: {error}").into()),
        }
    }
}

/// Whether `cargo run` sets this variable for the program it starts. The
/// settings that users make (`CARGO_HOME`, `CARGO_TARGET_DIR`, …) are not among them.
fn is_set_by_cargo_run(name: &str) -> bool {
    const PREFIXES: [&str; 3] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"];
    name == "CARGO_CRATE_NAME"
        || name == "CARGO_PRIMARY_PACKAGE"
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The program that a line of cargo's messages is about, if it is one of tests or of benches.
fn program(message: &str) -> Option<PathBuf> {
    let is_one = message.contains("\"test\":true},\"features\"") || message.contains("\"kind\":[\"bench\"]");
    let (_, rest) = message.split_once("\"executable\":\"").filter(|_| is_one)?;
    let (path, _) = rest.split_once('"')?;
    Some(PathBuf::from(path.replace("\\\\", "\\")))
}

/// The sum over all test programs.
#[derive(Debug, Default, PartialEq)]
pub struct TestCount {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl TestCount {
    /// Adds what another `cargo test` counted.
    pub fn add(&mut self, other: TestCount) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// Takes in a line of output; only those that close a test program count.
    fn take_in(&mut self, line: &str) {
        let Some((_, results)) = line.strip_prefix("test result: ").and_then(|verdict| verdict.split_once(". ")) else {
            return;
        };
        for result in results.split(';') {
            let mut words = result.split_whitespace();
            let (Some(number), Some(kind)) = (words.next(), words.next()) else {
                continue;
            };
            let total = match kind {
                "passed" => &mut self.passed,
                "failed" => &mut self.failed,
                "ignored" => &mut self.ignored,
                _ => continue,
            };
            *total += number.parse::<u64>().unwrap_or(0);
        }
    }
}

impl fmt::Display for TestCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        match self.ignored {
            0 => Ok(()),
            ignored => write!(f, ", {ignored} skipped"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_own_cargo_settings_are_kept() {
        for name in ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH"] {
            assert!(is_set_by_cargo_run(name), "{name}");
        }
        for name in ["CARGO", "CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_BUILD_JOBS"] {
            assert!(!is_set_by_cargo_run(name), "{name}");
        }
    }

    #[test]
    fn programs_are_found_among_the_messages() {
        let message = |kind: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"resume","test":true}},"profile":{{"opt_level":"1","test":{test}}},"features":[],"executable":{executable},"fresh":true}}"#
            )
        };
        let path = || Some(PathBuf::from("/repo/target/debug/deps/resume-62"));
        let quoted = r#""/repo/target/debug/deps/resume-62""#;
        assert_eq!(program(&message("test", true, quoted)), path());
        assert_eq!(program(&message("bench", false, quoted)), path());
        assert_eq!(program(&message("example", false, quoted)), None);
        assert_eq!(program(&message("test", true, "null")), None);
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let mut count = TestCount::default();
        for line in [
            "running 4 tests\n",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s\n",
            "test result: FAILED. 40 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s\n",
            "test a_result: 9 passed ... ok\n",
        ] {
            count.take_in(line);
        }
        count.add(TestCount { passed: 5, failed: 0, ignored: 2 });
        assert_eq!(count.to_string(), "48 passed, 2 failed, 3 skipped");
    }
}
