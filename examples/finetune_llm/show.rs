//! Live progress on the terminal.

use super::metrics::Row;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// A bar over the steps, for a run that goes on after some.
pub fn bar(steps: u64, done: u64) -> ProgressBar {
    let template = "{bar:24} {pos}/{len} steps  {per_sec}  ETA {eta}  {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(steps).with_style(style).with_position(done);
    bar.reset_eta();
    bar
}

/// What stands beside the bar, and in the line of an evaluation.
pub fn text(row: &Row) -> String {
    let memory = memory().map(|bytes| format!("  {} memory", HumanBytes(bytes))).unwrap_or_default();
    format!(
        "loss {:.3}  learning rate {:.1e}  {:.0} tokens/s{memory}",
        row.loss, row.learning_rate, row.tokens_per_second
    )
}

/// Bytes of this process in memory, where the system tells.
fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}
