//! The command line.

use super::Result;
use lexopt::prelude::*;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const HELP: &str = "\
Trains a small base, fine-tunes it straight through and with kills, and shows
that both give the same bits.

Usage: demo [OPTIONS]

  --quick               Shorter in all parts, for CI
  --base-seconds N      How long to train the base (60; quick: 8)
  --steps N             Fine-tuning steps, 8 for each kill (120; quick: 40)
  --kills N             Kills of each run, at least 5 (6; quick: 5)
  --seed N              Seed of the moments of the kills (from the clock)
  --out DIR             Where to write (target/demo)
  -h, --help            This text";

/// What the program is asked to do.
pub enum Task {
    Demo(Settings),
    /// In a child process: `train`.
    Train(Job),
    /// In a child process: `evaluate`.
    Evaluate(Job),
    Help(&'static str),
}

/// The demo's settings.
pub struct Settings {
    pub base_time: Duration,
    pub steps: u64,
    pub kills: u64,
    pub seed: u64,
    pub out: PathBuf,
}

/// A child's settings: which base to fine-tune, how, and where.
#[derive(Default)]
pub struct Job {
    pub base: PathBuf,
    pub scheme: String,
    /// The run's folder.
    pub dir: PathBuf,
    pub steps: u64,
    /// Steps between checkpoints.
    pub every: u64,
    pub seed: u64,
}

impl Job {
    /// Where the run leaves its adapter in the end.
    pub fn adapter(&self) -> PathBuf {
        self.dir.join("adapter")
    }

    /// This program as a child, with the sub-command `train` or `evaluate`.
    pub fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(name).arg("--base").arg(&self.base).arg("--dir").arg(&self.dir);
        command.args(["--scheme", &self.scheme]);
        for (option, value) in [("--steps", self.steps), ("--every", self.every), ("--seed", self.seed)] {
            command.args([option, &value.to_string()]);
        }
        Ok(command)
    }
}

/// Reads the command line.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Task> {
    let (mut name, mut quick) = (None, false);
    let (mut base_seconds, mut steps, mut kills, mut seed) = (None, None, None, None);
    let mut out = PathBuf::from("target/demo");
    let mut job = Job::default();
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(Task::Help(HELP)),
            Long("quick") => quick = true,
            Long("base-seconds") => base_seconds = Some(parser.value()?.parse()?),
            Long("steps") => steps = Some(parser.value()?.parse()?),
            Long("kills") => kills = Some(parser.value()?.parse()?),
            Long("seed") => seed = Some(parser.value()?.parse()?),
            Long("out") => out = parser.value()?.into(),
            Long("base") => job.base = parser.value()?.into(),
            Long("dir") => job.dir = parser.value()?.into(),
            Long("scheme") => job.scheme = parser.value()?.parse()?,
            Long("every") => job.every = parser.value()?.parse()?,
            Value(value) if name.is_none() => name = Some(value.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    let either = |given: Option<u64>, full, short| given.unwrap_or(if quick { short } else { full });
    if let Some(name) = name {
        job.steps = steps.ok_or("--steps is missing")?;
        job.seed = seed.ok_or("--seed is missing")?;
        return match name.as_str() {
            "train" => Ok(Task::Train(job)),
            "evaluate" => Ok(Task::Evaluate(job)),
            _ => Err(format!("no command {name}").into()),
        };
    }
    let settings = Settings {
        base_time: Duration::from_secs(either(base_seconds, 60, 8)),
        steps: either(steps, 120, 40),
        kills: either(kills, 6, 5),
        seed: seed.unwrap_or(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos().into()),
        out,
    };
    if settings.kills < 5 || settings.steps < 8 * settings.kills {
        return Err("at least 5 kills, and 8 steps for each".into());
    }
    Ok(Task::Demo(settings))
}
