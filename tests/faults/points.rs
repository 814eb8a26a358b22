//! Every call by which a save changes the disk, failed in turn.

use super::common::{fresh_dir, rng};
use super::toy::{Setup, Toy, straight};
use super::{child, newest};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tch_peft::checkpoint::{FileSystem, OsFileSystem, SyncWrite};
use tch_peft::{Error, Run};

const STEPS: u64 = 3;

/// What happens at a fault point.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// This error number.
    Error(i32),
    /// The process ends, as by a signal.
    Death,
}

/// The real file system, with one fault in it.
#[derive(Debug)]
struct Faulty {
    /// Calls so far.
    calls: Arc<AtomicU64>,
    /// The call, counted from 1, that goes wrong; 0 for none.
    at: u64,
    fault: Fault,
}

impl Faulty {
    fn new(at: u64, fault: Fault) -> Arc<Self> {
        Arc::new(Faulty { calls: Arc::default(), at, fault })
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Counts a call, which goes on or does not.
    fn pass(&self) -> io::Result<()> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        match self.fault {
            _ if call != self.at => Ok(()),
            Fault::Error(number) => Err(io::Error::from_raw_os_error(number)),
            Fault::Death => std::process::abort(),
        }
    }
}

impl FileSystem for Faulty {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.pass().and_then(|()| OsFileSystem.create_dir(path))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SyncWrite>> {
        self.pass()?;
        let file = OsFileSystem.create(path)?;
        let faulty = Faulty { calls: Arc::clone(&self.calls), ..*self };
        Ok(Box::new(FaultyFile { file, faulty }))
    }

    // Nothing here cuts the power: what is synced need not reach the disk.
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        self.pass()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.pass().and_then(|()| OsFileSystem.rename(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.pass().and_then(|()| OsFileSystem.remove_file(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.pass().and_then(|()| OsFileSystem.remove_dir(path))
    }
}

struct FaultyFile {
    file: Box<dyn SyncWrite>,
    faulty: Faulty,
}

impl Write for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // What goes wrong has gone half its way.
        if self.faulty.calls() + 1 == self.faulty.at {
            self.file.write_all(&bytes[..bytes.len() / 2])?;
        }
        self.faulty.pass()?;
        self.file.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl SyncWrite for FaultyFile {
    fn sync(&mut self) -> io::Result<()> {
        self.faulty.pass()
    }
}

/// Three steps, each saved, the first one twice, of which the newest is kept:
/// making, replacing and deleting. `at_error` looks at each failed save.
fn scenario(dir: &Path, disk: Arc<Faulty>, background: bool, mut at_error: impl FnMut(&Toy, Error)) -> Toy {
    let run = Run::builder(dir).every(1).keep(1).background(background).file_system(disk);
    let mut toy = Toy::new(Setup::default(), run);
    toy.start().unwrap();
    while toy.run.current_step() < STEPS {
        if let Err(error) = toy.step() {
            at_error(&toy, error);
        }
        if toy.run.current_step() == 1
            && let Err(error) = toy.save()
        {
            at_error(&toy, error);
        }
    }
    if let Err(error) = toy.run.flush() {
        at_error(&toy, error);
    }
    toy
}

fn count(dir: &Path) -> u64 {
    let disk = Faulty::new(0, Fault::Death);
    scenario(dir, Arc::clone(&disk), false, |_, error| panic!("{error}"));
    disk.calls()
}

/// Goes on from what is there, to the end.
fn finish(dir: &Path) -> Vec<u8> {
    let mut toy = Toy::new(Setup::default(), Run::builder(dir).every(1).keep(1));
    toy.start().unwrap();
    toy.train_to(STEPS);
    toy.adapter()
}

#[test]
fn an_error_at_any_point_leaves_a_checkpoint_and_training_able_to_go_on() {
    let _rng = rng();
    let dir = fresh_dir("faults-errors");
    let expected = straight(Setup::default(), &dir.join("straight"), STEPS);
    let points = count(&dir.join("count"));
    let (mut walked, mut reported) = (0, 0);
    // EIO, ENOSPC, EACCES
    for (name, number) in [("EIO", 5), ("ENOSPC", 28), ("EACCES", 13)] {
        for at in 1..=points {
            let dir = dir.join(format!("{name}-{at}"));
            let mut failures = 0;
            let background = at % 2 == 0;
            let mut toy = scenario(&dir, Faulty::new(at, Fault::Error(number)), background, |toy, error| {
                failures += 1;
                let Error::NotSaved { step, source } = &error else { panic!("{name} at {at}: {error}") };
                assert!(*step <= toy.run.current_step());
                let Error::Io { source, .. } = source.as_ref() else { panic!("{name} at {at}: {error}") };
                assert_eq!(source.raw_os_error(), Some(number), "{name} at {at}");
                // Nothing that was whole is lost by it.
                assert!(background || newest(&dir) + 1 >= toy.run.current_step(), "{name} at {at}");
            });
            assert!(failures <= 1, "{name} at {at}: one fault, {failures} failures");
            assert_eq!(toy.adapter(), expected, "{name} at {at}: training went on otherwise");
            // The next save works, and nothing is left over from the failed one.
            toy.save().unwrap();
            drop(toy);
            assert_eq!(names(&dir), [".run.lock", "checkpoint-00000003"], "{name} at {at}");
            assert_eq!(finish(&dir), expected, "{name} at {at}: resumed otherwise");
            std::fs::remove_dir_all(&dir).unwrap();
            (walked, reported) = (walked + 1, reported + failures);
        }
    }
    assert!(points > 100 && reported > points, "{points} points, {reported} errors");
    println!("{walked} faults: 3 errors at each of {points} points; {reported} were reported");
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_death_at_any_point_is_resumed_from_to_the_bit() {
    let _rng = rng();
    let dir = fresh_dir("faults-deaths");
    let expected = straight(Setup::default(), &dir.join("straight"), STEPS);
    let points = count(&dir.join("count"));
    for at in 1..=points {
        let dir = dir.join(at.to_string());
        let (at, folder) = (at.to_string(), dir.to_str().unwrap().to_string());
        let variables = [("TCH_PEFT_FAULT_AT", at.as_str()), ("TCH_PEFT_FAULT_DIR", &folder)];
        let output = child("points::dies_at_a_point", &variables).output().unwrap();
        // Dead by a signal, not by a failed test.
        assert_eq!(output.status.code(), None, "point {at}: {}", String::from_utf8_lossy(&output.stdout));
        newest(&dir);
        assert_eq!(finish(&dir), expected, "point {at}: resumed otherwise");
        std::fs::remove_dir_all(&dir).unwrap();
    }
    println!("{points} deaths, one at each point");
}

/// The child of the test above.
#[test]
fn dies_at_a_point() {
    let Ok(at) = std::env::var("TCH_PEFT_FAULT_AT") else { return };
    let dir = std::env::var("TCH_PEFT_FAULT_DIR").unwrap();
    let at: u64 = at.parse().unwrap();
    scenario(Path::new(&dir), Faulty::new(at, Fault::Death), at.is_multiple_of(2), |_, error| panic!("{error}"));
}
