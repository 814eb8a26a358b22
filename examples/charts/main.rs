//! Draws the charts of the guides, and writes their tables, from the figures in docs/data.
//!
//!     cargo run --release --example charts
//!     cargo run --release --example charts -- --measure   # measures the errors of quantising first
//!
//! The other figures come from the benches:
//!
//!     cargo bench --bench linear -- --csv docs/data/linear.csv
//!     cargo bench --bench memory -- --csv docs/data/memory.csv
//!     cargo bench --bench lora -- --csv docs/data/lora.csv

pub mod draw;
pub mod figures;
pub mod measure;
pub mod tables;

use figures::Figures;
use lexopt::prelude::*;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What any part of the program may fail with.
pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const HELP: &str = "\
Draws docs/img and writes the tables of the guides from the figures in docs/data.

Usage: charts [--measure] [--docs DIR]

  --measure     Measure docs/data/quantization.csv first
  --docs DIR    The folder of the guides (this repository's)
  -h, --help    This text";

/// What is to be done.
pub struct Task {
    measure: bool,
    docs: PathBuf,
}

fn main() -> ExitCode {
    let result = parse(std::env::args_os().skip(1)).and_then(|task| match task {
        Some(task) => run(&task),
        None => {
            println!("{HELP}");
            Ok(())
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("charts: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Reads the command line; `None` if help is wanted.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Task>> {
    let mut task = Task { measure: false, docs: Path::new(env!("CARGO_MANIFEST_DIR")).join("docs") };
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(None),
            Long("measure") => task.measure = true,
            Long("docs") => task.docs = parser.value()?.into(),
            _ => return Err(arg.unexpected().into()),
        }
    }
    Ok(Some(task))
}

fn run(Task { measure, docs }: &Task) -> Result<()> {
    if *measure {
        let rows = measure::all(measure::ROWS)?;
        std::fs::write(docs.join("data/quantization.csv"), measure::csv(&rows))?;
    }
    let figures = Figures::read(&docs.join("data"))?;
    draw::all(&docs.join("img"), &figures)?;
    for (file, text) in tables::written(docs, &figures)? {
        std::fs::write(&file, text)?;
        println!("{}", file.display());
    }
    Ok(())
}
