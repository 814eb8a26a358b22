//! Options after the dashes of `cargo bench`: `--csv FILE` for the figures, and `--trial`.

#![allow(dead_code)]

use std::path::{Path, PathBuf};

/// The file that the command line asks for.
pub fn csv_file() -> Option<PathBuf> {
    value("--csv").map(PathBuf::from)
}

/// Whether to run only as much, and on what is as small, as shows that the bench works (`--trial`): its figures mean
/// nothing.
pub fn trial() -> bool {
    std::env::args().any(|arg| arg == "--trial")
}

/// What stands behind this option.
pub fn value(option: &str) -> Option<String> {
    let mut args = std::env::args();
    args.find(|arg| arg == option)?;
    args.next()
}

/// Writes the lines below one that tells what was measured, and where, and one with the columns' names.
pub fn write_csv(file: &Path, what: &str, columns: &str, lines: &[String]) -> std::io::Result<()> {
    let threads = tch::get_num_threads();
    let text = format!("# {what}. {}, {threads} threads.\n{columns}\n{}\n", processor(), lines.join("\n"));
    std::fs::write(file, text)?;
    println!("\n{}", file.display());
    Ok(())
}

/// The processor's name, as Linux has it.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(": ")).map_or(std::env::consts::ARCH, |(_, name)| name);
    name.trim().replace(',', "")
}
