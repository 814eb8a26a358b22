//! Live progress on the terminal.

use super::Result;
use super::metrics::Row;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use tch_peft::{Base, QuantizeOptions, Start};

/// A bar over the steps, for a run that goes on after some.
pub fn bar(steps: u64, done: u64) -> ProgressBar {
    let template = "{bar:24} {pos}/{len} steps  {per_sec}  ETA {eta}  {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(steps).with_style(style).with_position(done);
    bar.reset_eta();
    bar
}

/// What stands beside the bar, and in the line of an evaluation.
pub fn text(row: &Row, speed: f64, unit: &str) -> String {
    let memory = memory().map(|bytes| format!("  {} memory", HumanBytes(bytes))).unwrap_or_default();
    format!("loss {:.3}  learning rate {:.1e}  {speed:.1} {unit}/s{memory}", row.loss, row.learning_rate)
}

/// From where a run goes on.
pub fn start(start: &Start) {
    if let Start::Resumed { step, differences, .. } = start {
        println!("going on after step {step}");
        differences.iter().for_each(|difference| println!("not bit by bit as before: {difference}"));
    }
}

/// Packs a base by `load`, with a bar, and tells how small it has become.
pub fn packing<M>(load: impl FnOnce(QuantizeOptions<'_>) -> Result<Base<M>>) -> Result<Base<M>> {
    let bar = bar(0, 0);
    let base = load(QuantizeOptions::new().progress(|progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    }))?;
    bar.finish_and_clear();
    let report = base.quantization_report();
    println!(
        "{} weights packed: {:.1} MB, {:.1} MB if dense",
        report.weights().len(),
        report.bytes_after() as f64 / 1e6,
        report.bytes_before() as f64 / 1e6
    );
    Ok(base)
}

/// Bytes of this process in memory, where the system tells.
fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}
