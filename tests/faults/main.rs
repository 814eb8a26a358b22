//! What can happen to a run, made to happen.

mod damage;
mod kill;
mod matrix;
mod points;
mod small_disk;
mod writers;

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/toy.rs"]
mod toy;

use std::path::Path;
use std::process::{Command, Stdio};

/// This test binary as a process of its own that runs only the named test,
/// which does nothing unless it finds the variables.
fn child(test: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.envs(variables.iter().copied()).stderr(Stdio::null());
    command
}

/// The step of the newest whole checkpoint, 0 for none; none may be damaged.
fn newest(dir: &Path) -> u64 {
    let found = tch_peft::checkpoint::latest(dir).unwrap();
    assert!(found.skipped.is_empty(), "{:?}", found.skipped);
    found.found.map_or(0, |(_, manifest)| manifest.step)
}
