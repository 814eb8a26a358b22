//! Writing on a thread, while training goes on.

use super::common::{fresh_dir, rng};
use super::steps;
use super::toy::{Setup, Toy, straight};
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use tch_peft::checkpoint::{FileSystem, OsFileSystem, SyncWrite, latest};
use tch_peft::{Error, Run};

/// A disk that stands still, once told to, until it is told to go on.
#[derive(Debug, Default)]
struct Stopped {
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Stopped {
    fn set(&self, stopped: bool) {
        *self.stopped.lock().unwrap() = stopped;
        self.changed.notify_all();
    }
}

impl FileSystem for Stopped {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let _gone_on = self.changed.wait_while(self.stopped.lock().unwrap(), |stopped| *stopped).unwrap();
        OsFileSystem.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn SyncWrite>> {
        OsFileSystem.create(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        OsFileSystem.sync_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        OsFileSystem.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        OsFileSystem.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        OsFileSystem.remove_dir(path)
    }
}

#[test]
fn a_checkpoint_is_of_the_step_it_was_taken_at_however_long_it_takes() {
    let _rng = rng();
    let dir = fresh_dir("background-slow");
    let expected = straight(Setup::default(), &fresh_dir("background-slow-straight"), 5);
    let disk = Arc::new(Stopped::default());
    let run = Run::builder(&dir).every(2).background(true).file_system(Arc::clone(&disk) as _);
    let mut toy = Toy::new(Setup::default(), run);
    toy.start().unwrap();
    disk.set(true);
    toy.step().unwrap();
    let report = toy.step().unwrap();
    assert_eq!((report.step, report.saved), (2, None));
    // Training goes on, and what is saved doesn't see it.
    let report = toy.step().unwrap();
    assert_eq!((report.step, report.saved), (3, None));
    assert!(latest(&dir).unwrap().found.is_none() && steps(&dir).is_empty());
    disk.set(false);
    let path = dir.join("checkpoint-00000002");
    assert_eq!(toy.run.flush().unwrap(), Some(path.clone()));
    assert_eq!(toy.run.flush().unwrap(), None);
    drop(toy);
    let mut again = Toy::new(Setup::default(), Run::builder(&dir));
    again.start().unwrap();
    assert_eq!(again.run.current_step(), 2);
    again.train_to(5);
    assert!(again.adapter() == expected);
}

#[test]
fn dropping_a_run_waits_for_what_is_being_written() {
    let _rng = rng();
    let dir = fresh_dir("background-drop");
    let disk = Arc::new(Stopped::default());
    let run = Run::builder(&dir).every(1).background(true).file_system(Arc::clone(&disk) as _);
    let mut toy = Toy::new(Setup::default(), run);
    toy.start().unwrap();
    disk.set(true);
    toy.step().unwrap();
    // The folder is locked until the thread is done with it.
    assert!(matches!(Toy::new(Setup::default(), Run::builder(&dir)).start(), Err(Error::RunInUse { .. })));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            disk.set(false);
        });
        drop(toy);
    });
    assert_eq!(steps(&dir), [1]);
    Toy::new(Setup::default(), Run::builder(&dir)).start().unwrap();
}

#[test]
fn the_files_are_those_written_in_the_foreground() {
    let _rng = rng();
    let manifests = [false, true].map(|background| {
        let dir = fresh_dir(&format!("background-{background}"));
        let mut toy = Toy::new(Setup::default(), Run::builder(&dir).every(1).background(background));
        toy.start().unwrap();
        toy.train_to(3);
        latest(&dir).unwrap().found.unwrap().1
    });
    assert_eq!(manifests[0], manifests[1]);
}
