//! What a run tells while it goes: a bar, `metrics.csv`, `loss.png`, and
//! TensorBoard's event files.

use super::events::Events;
use super::metrics::{Metrics, Row};
use super::{Result, plot, show};
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};

pub struct Log {
    folder: PathBuf,
    metrics: Metrics,
    events: Events,
    bar: ProgressBar,
    /// What the speed is counted in.
    unit: &'static str,
}

impl Log {
    /// For a run into `folder` that goes on after `done` of its `steps`.
    pub fn open(folder: &Path, done: u64, steps: u64, unit: &'static str) -> Result<Self> {
        let metrics = Metrics::open(&folder.join("metrics.csv"), done)?;
        let events = Events::create(folder, done + 1)?;
        Ok(Log { folder: folder.into(), metrics, events, bar: show::bar(steps, done), unit })
    }

    /// A step is done, at so many units a second.
    pub fn step(&mut self, row: Row, speed: f64) -> Result<()> {
        let Row { step, loss, learning_rate, held_out } = row;
        self.metrics.append(row)?;
        let tag = format!("{}_per_second", self.unit);
        let values = [("loss", loss), ("learning_rate", learning_rate as f32), (tag.as_str(), speed as f32)];
        self.events.scalars(step, &values)?;
        let text = show::text(&row, speed, self.unit);
        if let Some(held_out) = held_out {
            self.events.scalars(step, &[("held_out_loss", held_out)])?;
            self.bar.suspend(|| println!("step {step}  held-out loss {held_out:.4}  {text}"));
        }
        self.bar.set_message(text);
        self.bar.inc(1);
        Ok(())
    }

    /// Leaves the bar, and the losses as a picture.
    pub fn close(self, loss: &str) -> Result<()> {
        self.bar.abandon();
        plot::draw(&self.folder.join("loss.png"), &self.metrics.rows, loss)
    }
}
