//! What was measured at each step, in a file that outlives the process.

use super::Result;
use std::fs::File;
use std::io::Write;
use std::path::Path;

const HEADER: &str = "step,loss,learning_rate,tokens_per_second,held_out_loss\n";

/// A line of the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    pub step: u64,
    /// Of the batch, in nats a token.
    pub loss: f32,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
    /// Of the weights after the step, where they were evaluated.
    pub held_out: Option<f32>,
}

/// The rows so far, and the file that they are in.
pub struct Metrics {
    pub rows: Vec<Row>,
    file: File,
}

impl Metrics {
    /// Keeps the rows of steps up to `step`, from which the run goes on; those
    /// after it were not in the checkpoint and come again.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let text = if path.exists() { std::fs::read_to_string(path)? } else { String::new() };
        let rows = text.lines().filter_map(parse).filter(|row| row.step <= step).collect();
        let mut metrics = Metrics { rows, file: File::create(path)? };
        metrics.file.write_all(HEADER.as_bytes())?;
        metrics.rows.clone().iter().try_for_each(|row| metrics.write(row))?;
        Ok(metrics)
    }

    pub fn append(&mut self, row: Row) -> Result<()> {
        self.rows.push(row);
        self.write(&row)
    }

    fn write(&mut self, row: &Row) -> Result<()> {
        let Row { step, loss, learning_rate, tokens_per_second, held_out } = row;
        let held_out = held_out.map(|loss| loss.to_string()).unwrap_or_default();
        let line = format!("{step},{loss},{learning_rate},{tokens_per_second:.1},{held_out}\n");
        Ok(self.file.write_all(line.as_bytes())?)
    }
}

/// `None` for the header, and for half a line that a killed process left.
fn parse(line: &str) -> Option<Row> {
    let cells: Vec<&str> = line.split(',').collect();
    let [step, loss, rate, speed, held_out] = cells[..] else { return None };
    let held_out = if held_out.is_empty() { None } else { Some(held_out.parse().ok()?) };
    Some(Row {
        step: step.parse().ok()?,
        loss: loss.parse().ok()?,
        learning_rate: rate.parse().ok()?,
        tokens_per_second: speed.parse().ok()?,
        held_out,
    })
}
