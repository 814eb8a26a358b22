//! The losses, in a file that outlives the process. It holds nothing that
//! depends on the clock: a resumed run writes the same bytes.

use super::Result;
use std::fs::File;
use std::io::Write;
use std::path::Path;

const HEADER: &str = "step,loss,learning_rate,held_out_loss\n";

/// A line of the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    pub step: u64,
    /// Of the batch, before the step.
    pub loss: f32,
    pub learning_rate: f64,
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
        let rows: Vec<Row> = text.lines().filter_map(parse).filter(|row| row.step <= step).collect();
        // Beside the old file, which it replaces as a whole.
        let partial = path.with_extension("csv.tmp");
        let mut file = File::create(&partial)?;
        let lines: String = rows.iter().map(line).collect();
        file.write_all(format!("{HEADER}{lines}").as_bytes())?;
        std::fs::rename(partial, path)?;
        Ok(Metrics { rows, file })
    }

    pub fn append(&mut self, row: Row) -> Result<()> {
        self.rows.push(row);
        Ok(self.file.write_all(line(&row).as_bytes())?)
    }
}

fn line(row: &Row) -> String {
    let Row { step, loss, learning_rate, held_out } = row;
    let held_out = held_out.map(|loss| loss.to_string()).unwrap_or_default();
    format!("{step},{loss},{learning_rate},{held_out}\n")
}

/// `None` for the header, and for half a line that a killed process left.
fn parse(line: &str) -> Option<Row> {
    let cells: Vec<&str> = line.split(',').collect();
    let [step, loss, rate, held_out] = cells[..] else { return None };
    let held_out = if held_out.is_empty() { None } else { Some(held_out.parse().ok()?) };
    Some(Row { step: step.parse().ok()?, loss: loss.parse().ok()?, learning_rate: rate.parse().ok()?, held_out })
}
