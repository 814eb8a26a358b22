//! The losses of a run, in a file that outlives its process: one line a step
//! with the step, the loss's exact bits, and the loss for human eyes.

use crate::Result;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

const FILE: &str = "losses.txt";

/// The file, open for appending.
pub struct Writer(File);

impl Writer {
    /// A process killed while writing leaves half a line, which is cut off.
    pub fn open(run: &Path) -> Result<Self> {
        let path = run.join(FILE);
        let mut file = File::options().create(true).append(true).open(&path)?;
        let whole = fs::read(&path)?.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Writer(file))
    }

    /// In one write, so that it is there once the step is over.
    pub fn append(&mut self, step: u64, loss: f32) -> Result<()> {
        Ok(self.0.write_all(format!("{step} {:08x} {loss:.4}\n", loss.to_bits()).as_bytes())?)
    }
}

/// What a file of losses says.
#[derive(Default)]
pub struct Losses {
    pub by_step: BTreeMap<u64, f32>,
    /// Lines of steps that an earlier line had already: they were done again
    /// after a kill.
    pub repeated: u64,
}

impl Losses {
    /// Reads the whole lines. A step that was done again must have come to the
    /// same bits.
    pub fn read(run: &Path) -> Result<Self> {
        let path = run.join(FILE);
        let mut losses = Losses::default();
        let text = if path.exists() { fs::read_to_string(&path)? } else { String::new() };
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            let (step, loss) = parse(line).ok_or_else(|| format!("{}: not a loss: {line:?}", path.display()))?;
            match losses.by_step.insert(step, loss) {
                Some(before) if before.to_bits() != loss.to_bits() => {
                    return Err(format!(
                        "{}: the loss of step {step} was {before}, but {loss} when repeated",
                        path.display()
                    )
                    .into());
                }
                Some(_) => losses.repeated += 1,
                None => {}
            }
        }
        Ok(losses)
    }

    /// The newest step.
    pub fn last(&self) -> u64 {
        self.by_step.last_key_value().map_or(0, |(step, _)| *step)
    }

    /// Checks that both have the steps 1 to `steps`, with the same bits.
    pub fn check_equal(&self, other: &Losses, steps: u64) -> Result<()> {
        for step in 1..=steps {
            let [a, b] = [self, other].map(|losses| losses.by_step.get(&step).map(|loss| loss.to_bits()));
            if a.is_none() || a != b {
                return Err(format!("losses differ at step {step}: bits {a:x?} and {b:x?}").into());
            }
        }
        match self.last() == steps && other.last() == steps {
            true => Ok(()),
            false => Err(format!("losses go on after step {steps}").into()),
        }
    }
}

fn parse(line: &str) -> Option<(u64, f32)> {
    let mut words = line.split_whitespace();
    let step = words.next()?.parse().ok()?;
    let bits = words.next().filter(|bits| bits.len() == 8)?;
    Some((step, f32::from_bits(u32::from_str_radix(bits, 16).ok()?)))
}
