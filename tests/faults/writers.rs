//! Others at work in the same folder.

use super::child;
use super::common::{fresh_dir, rng};
use super::toy::{Setup, Toy, straight};
use std::sync::atomic::{AtomicBool, Ordering};
use tch_peft::checkpoint::{CheckpointFiles, latest};
use tch_peft::{Error, Run};

#[test]
fn a_second_writer_is_refused_in_this_process_and_in_another() {
    let _rng = rng();
    let dir = fresh_dir("faults-two-writers");
    let mut first = Toy::new(Setup::default(), Run::builder(&dir).every(1).background(true));
    first.start().unwrap();
    first.train_to(2);
    let mut second = Toy::new(Setup::default(), Run::builder(&dir));
    let before = second.everything();
    assert!(matches!(second.start(), Err(Error::RunInUse { .. })));
    assert!(second.everything() == before, "refused, but something changed");
    let variables = [("TCH_PEFT_SECOND_DIR", dir.to_str().unwrap())];
    let output = child("writers::is_refused", &variables).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    // It is the first one's still, until that ends.
    first.train_to(3);
    drop(first);
    second.start().unwrap();
    assert_eq!(second.run.current_step(), 3);
}

/// The child of the test above.
#[test]
fn is_refused() {
    let Ok(dir) = std::env::var("TCH_PEFT_SECOND_DIR") else { return };
    let error = Toy::new(Setup::default(), Run::builder(dir)).start().unwrap_err();
    assert!(matches!(error, Error::RunInUse { .. }), "{error}");
}

#[test]
fn a_reader_never_sees_half_a_checkpoint() {
    let _rng = rng();
    const STEPS: u64 = 40;
    let dir = fresh_dir("faults-reader");
    let expected = straight(Setup::default(), &fresh_dir("faults-reader-straight"), STEPS);
    // Each save deletes the one before, under the reader's eyes.
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir).every(1).keep(1).background(true));
    toy.start().unwrap();
    toy.train_to(1);
    let done = AtomicBool::new(false);
    let reads = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut reads, mut newest) = (0, 1);
            while !done.load(Ordering::Relaxed) {
                let found = latest(&dir).unwrap();
                assert!(found.skipped.is_empty(), "{:?}", found.skipped);
                let (path, manifest) = found.found.expect("there is one at every instant");
                assert!(manifest.step >= newest, "{} after {newest}", manifest.step);
                newest = manifest.step;
                // By now it may have been deleted, but not damaged.
                if let Err(error) = CheckpointFiles::read(&path) {
                    assert!(matches!(error, Error::Io { .. }), "{error}");
                }
                reads += 1;
            }
            reads
        });
        toy.train_to(STEPS);
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert_eq!(toy.adapter(), expected);
    assert!(reads > 10, "{reads} reads");
    println!("{reads} reads during {STEPS} saves");
}
