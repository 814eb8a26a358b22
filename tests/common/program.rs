//! An example that trains, run as a program: the test binary starts itself anew.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ARGUMENTS: &str = "TCH_PEFT_PROGRAM_ARGUMENTS";

/// What the ignored test `program` of a binary does: the example, in a process of its own.
pub fn child(run: impl FnOnce(Vec<OsString>) -> u8) {
    let Some(arguments) = std::env::var_os(ARGUMENTS) else { return };
    let arguments: Vec<String> = serde_json::from_str(arguments.to_str().unwrap()).unwrap();
    std::process::exit(run(arguments.into_iter().map(OsString::from).collect()).into());
}

/// A process of the program.
pub fn command(arguments: &[String]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "program", "--ignored", "--nocapture"]);
    command.env(ARGUMENTS, serde_json::to_string(arguments).unwrap()).env("OMP_NUM_THREADS", "1");
    command
}

/// Runs a process to its good end, and answers what it printed.
pub fn finished(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Runs a process to its bad end, and answers what it complained of.
pub fn refused(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}{}", String::from_utf8_lossy(&output.stdout));
    text
}

/// Whole lines of a run's metrics, without the header.
pub fn lines(run: &Path) -> usize {
    let text = std::fs::read_to_string(run.join("metrics.csv")).unwrap_or_default();
    text.matches('\n').count().saturating_sub(1)
}

/// Runs a process that writes into the folder `run`, and sends it a signal once `steps` steps are
/// done. Answers its exit code, none if it was killed, and the steps done.
pub fn stopped(mut command: Command, run: &Path, signal: &str, steps: usize) -> (Option<i32>, usize) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let patience = Instant::now() + Duration::from_secs(120);
    while lines(run) < steps {
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < patience, "the run ended early, or never ran");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    (child.wait().unwrap().code(), lines(run))
}
