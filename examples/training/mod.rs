//! What the programs that fine-tune share: options, Ctrl-C, and where losses go.

#![allow(dead_code)]

pub mod args;
pub mod events;
pub mod log;
pub mod metrics;
pub mod options;
mod plot;
pub mod show;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Errors of an application: told to a person, not acted on.
pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// How a run ended.
pub enum Outcome {
    Finished,
    /// By Ctrl-C, after a checkpoint.
    Interrupted,
}

/// A program, after its command line was read to what it is asked to do, or to
/// nothing if help is wanted. Answers the exit code.
pub fn run<A>(program: &str, help: &str, parsed: Result<Option<A>>, train: impl FnOnce(&A) -> Result<Outcome>) -> u8 {
    let outcome = match parsed {
        Ok(Some(args)) => train(&args),
        Ok(None) => {
            println!("{help}{}", args::HELP);
            return 0;
        }
        Err(error) => Err(error),
    };
    match outcome {
        Ok(Outcome::Finished) => 0,
        Ok(Outcome::Interrupted) => 130,
        Err(error) => {
            eprintln!("{program}: {error}");
            1
        }
    }
}

/// Set by Ctrl-C; the step is finished and saved. A second one ends the process.
pub fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("finishing the step; Ctrl-C once more ends at once");
    })?;
    Ok(stop)
}
