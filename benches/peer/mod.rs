//! The peers of a bench: a Python process that answers on request.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

pub type Failure = Box<dyn std::error::Error>;

/// A script of `benches/python`, which answers a line of JSON with another one.
pub struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts the script in a process of its own.
    pub fn start(script: &str) -> Result<Self, Failure> {
        // As in the tests: a bundle says where its scripts are.
        let root = std::env::var_os("TCH_PEFT_ROOT").map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let python = std::env::var_os("TCH_PEFT_PYTHON").map_or(root.join("target/python/bin/python"), PathBuf::from);
        let mut child = Command::new(&python)
            .arg(root.join("benches/python").join(script))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("{}: {e}; run `cargo xtask setup --peers`", python.display()))?;
        let (input, output) = (child.stdin.take().ok_or("no stdin")?, child.stdout.take().ok_or("no stdout")?);
        Ok(Peer { child, input, output: BufReader::new(output) })
    }

    /// Waits for the answer to a request.
    pub fn ask(&mut self, request: Value) -> Result<Value, Failure> {
        writeln!(self.input, "{request}")?;
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err(format!("the peers died ({:?})", self.child.try_wait()?).into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
