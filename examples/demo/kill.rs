//! Running a child process, and killing it again and again on its way.

use crate::Result;
use crate::args::Job;
use crate::losses::Losses;
use crate::train::Message;
use indicatif::ProgressBar;
use std::fmt::{self, Display};
use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

/// Kills that miss the checkpoint they were meant for are tried again, in all
/// at most so many times.
const MOST_KILLS: usize = 25;

/// When a child is to be killed.
struct Moment {
    /// Not before this step's loss is in the file …
    step: u64,
    /// … and, if set, a checkpoint is being written …
    writing: bool,
    /// … and then so much later.
    delay: Duration,
}

/// A kill that happened.
pub struct Kill {
    /// The newest step whose loss was in the file.
    pub step: u64,
    /// The half-written checkpoint that it left behind, if any.
    pub torn: Option<Torn>,
    /// The step after which the next process went on; none if it was killed
    /// even before that.
    pub resumed: Option<u64>,
}

/// A checkpoint that was being written when the process was killed.
pub struct Torn {
    pub folder: String,
    pub files: usize,
}

/// A run to its end.
pub struct Outcome {
    pub kills: Vec<Kill>,
    pub losses: Losses,
    pub weight_bytes: [usize; 2],
    pub base_loss: f64,
    pub tuned_loss: f64,
}

/// Runs `train` straight through.
pub fn straight(job: &Job, bar: &ProgressBar) -> Result<Outcome> {
    live(job, Vec::new(), bar)
}

/// Runs `train` and kills it at least so many times at random moments, every
/// other time while it writes a checkpoint.
pub fn killed(job: &Job, kills: u64, random: &mut Random, bar: &ProgressBar) -> Result<Outcome> {
    // One moment in each of as many stretches of the run, so that the whole
    // run is tried and each life gets on a little.
    let stretch = job.steps / kills;
    let moment = |n| Moment {
        step: n * stretch + random.within(1..stretch - job.every + 1),
        writing: n % 2 == 1,
        delay: Duration::from_micros(random.within(0..if n % 2 == 1 { 4_000 } else { 200_000 })),
    };
    let outcome = live(job, (0..kills).map(moment).collect(), bar)?;
    let writing = outcome.kills.iter().filter(|kill| kill.torn.is_some()).count();
    match outcome.kills.len() as u64 >= kills && writing >= 2 {
        true => Ok(outcome),
        false => Err(format!("{} kills, {writing} while writing: too few", outcome.kills.len()).into()),
    }
}

/// Starts the child again after each kill until it ends by itself.
fn live(job: &Job, mut moments: Vec<Moment>, bar: &ProgressBar) -> Result<Outcome> {
    if job.dir.exists() {
        fs::remove_dir_all(&job.dir)?;
    }
    moments.reverse();
    let mut kills: Vec<Kill> = Vec::new();
    // What the last kill left behind stays until the next checkpoint is due,
    // and must not be taken for that one.
    let mut stale = Vec::new();
    loop {
        let mut child = Guard(job.command("train")?.stdout(Stdio::piped()).spawn()?);
        let moment = moments.pop();
        wait(&mut child.0, job, moment.as_ref(), &stale, bar)?;
        let status = child.0.wait()?;
        let messages = messages(&mut child.0)?;
        let number = kills.len();
        if let Some(kill) = kills.last_mut() {
            kill.resumed = started(&messages)?;
            bar.suspend(|| println!("  kill {number}: {kill}"));
        }
        // A process that was killed has no exit code.
        if status.code().is_some() {
            if !status.success() {
                return Err(format!("the child failed: {status}").into());
            }
            let Some(Message::Trained { weight_bytes, base_loss, tuned_loss }) = messages.into_iter().last() else {
                return Err("the child ended without a result".into());
            };
            return Ok(Outcome { kills, losses: Losses::read(&job.dir)?, weight_bytes, base_loss, tuned_loss });
        }
        let left = temporary(&job.dir)?;
        let torn = left.clone().filter(|left| !stale.contains(left)).map(Torn::new).transpose()?;
        let step = Losses::read(&job.dir)?.last();
        // It was too late for that checkpoint: the next will do.
        if torn.is_none() && moment.is_some_and(|moment| moment.writing) && kills.len() < MOST_KILLS {
            moments.push(Moment { step, writing: true, delay: Duration::ZERO });
        }
        // Each process gets on by a step at least.
        moments.iter_mut().for_each(|moment| moment.step = moment.step.max(step + 1));
        stale = left.into_iter().collect();
        kills.push(Kill { step, torn, resumed: None });
        bar.set_message(format!("{} kills", kills.len()));
    }
}

/// Waits for the child's end, or for the moment, and kills it.
fn wait(child: &mut Child, job: &Job, moment: Option<&Moment>, stale: &[Temporary], bar: &ProgressBar) -> Result<()> {
    while child.try_wait()?.is_none() {
        let step = Losses::read(&job.dir)?.last();
        bar.set_position(step);
        match moment {
            Some(moment) if step >= moment.step => {
                while moment.writing && temporary(&job.dir)?.is_none_or(|found| stale.contains(&found)) {
                    if child.try_wait()?.is_some() {
                        return Ok(());
                    }
                    sleep(Duration::from_micros(200));
                }
                sleep(moment.delay);
                return Ok(child.kill()?); // SIGKILL
            }
            _ => sleep(Duration::from_millis(20)),
        }
    }
    Ok(())
}

/// The hidden folder in which a checkpoint is being written, with the time of
/// its making, since one of the same name may follow.
type Temporary = (PathBuf, Option<SystemTime>);

fn temporary(run: &Path) -> io::Result<Option<Temporary>> {
    for entry in fs::read_dir(run)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(".checkpoint-") && name.ends_with(".tmp") {
            // It may be gone by now.
            let made = entry.metadata().and_then(|metadata| metadata.created()).ok();
            return Ok(Some((entry.path(), made)));
        }
    }
    Ok(None)
}

impl Torn {
    fn new((path, _): Temporary) -> io::Result<Self> {
        let folder = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Torn { folder, files: fs::read_dir(&path)?.count() })
    }
}

impl Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "after step {}", self.step)?;
        if let Some(Torn { folder, files }) = &self.torn {
            write!(f, ", while writing {folder} ({files} of 7 files there)")?;
        }
        match self.resumed {
            Some(step) => write!(f, "; resumed after step {step}"),
            None => write!(f, "; killed again before it resumed"),
        }
    }
}

/// All that a child said before its end; half a line at the end is dropped.
fn messages(child: &mut Child) -> Result<Vec<Message>> {
    let mut text = String::new();
    if let Some(stdout) = &mut child.stdout {
        stdout.read_to_string(&mut text)?;
    }
    let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    Ok(lines.map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// Where the child took up the run, if it came so far.
fn started(messages: &[Message]) -> Result<Option<u64>> {
    match messages.first() {
        Some(Message::Started { step, checkpoints_skipped: 0 }) => Ok(Some(*step)),
        Some(other) => Err(format!("unexpected: {other:?}").into()),
        None => Ok(None),
    }
}

/// Runs `evaluate` in a fresh process and answers the held-out loss.
pub fn evaluate(job: &Job) -> Result<f64> {
    let mut child = Guard(job.command("evaluate")?.stdout(Stdio::piped()).spawn()?);
    let status = child.0.wait()?;
    match messages(&mut child.0)?.as_slice() {
        [Message::Evaluated { loss }] if status.success() => Ok(*loss),
        _ => Err(format!("the child that evaluates failed: {status}").into()),
    }
}

/// A child that doesn't outlive us if something goes wrong.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // If it has ended already, there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A small random generator (xorshift64*), enough for choosing moments.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn within(&mut self, range: Range<u64>) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        range.start + (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) % (range.end - range.start)
    }
}
