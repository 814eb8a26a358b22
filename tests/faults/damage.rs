//! Bits flipped and files cut off.

use super::common::{fresh_dir, rng};
use super::toy::{Setup, Toy};
use std::fs;
use std::path::{Path, PathBuf};
use tch_peft::checkpoint::{CheckpointFiles, latest, verify};
use tch_peft::{Run, Start};

/// Offsets spread over a file of this size, its ends among them.
fn offsets(size: usize, count: usize) -> Vec<usize> {
    let mut offsets: Vec<usize> = (0..count).map(|i| i * size / count).chain([size - 1]).collect();
    offsets.dedup();
    offsets
}

/// The damage is seen, and the checkpoint before is the one to go on from.
fn detected(dir: &Path, newest: &Path, what: &str) {
    assert!(verify(newest).is_err(), "{what}: not detected");
    assert!(CheckpointFiles::read(newest).is_err(), "{what}: not detected on reading");
    let found = latest(dir).unwrap_or_else(|error| panic!("{what}: {error}"));
    let step = found.found.map(|(_, manifest)| manifest.step);
    assert_eq!(step, Some(1), "{what}: the checkpoint before it was not used");
    assert_eq!(found.skipped.len(), 1, "{what}");
    assert!(found.skipped[0].path == newest && !found.skipped[0].reason.is_empty(), "{what}");
}

fn two_checkpoints(name: &str) -> (PathBuf, PathBuf, Vec<PathBuf>) {
    let dir = fresh_dir(name);
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir).every(1));
    toy.start().unwrap();
    toy.train_to(2);
    let newest = dir.join("checkpoint-00000002");
    let files: Vec<_> = fs::read_dir(&newest).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 8);
    (dir, newest, files)
}

#[test]
fn a_flipped_bit_anywhere_is_detected() {
    let _rng = rng();
    let (dir, newest, files) = two_checkpoints("faults-flips");
    let mut flips = 0;
    for file in &files {
        let whole = fs::read(file).unwrap();
        // Every byte of the manifest, which no other file vouches for.
        let count = if file.ends_with("manifest.json") { whole.len() } else { 60 };
        for (i, offset) in offsets(whole.len(), count).into_iter().enumerate() {
            let mut flipped = whole.clone();
            flipped[offset] ^= 1 << (i % 8);
            fs::write(file, &flipped).unwrap();
            detected(&dir, &newest, &format!("{}: bit {} of byte {offset}", file.display(), i % 8));
            flips += 1;
        }
        fs::write(file, &whole).unwrap();
    }
    verify(&newest).unwrap();
    println!("{flips} flipped bits in {} files", files.len());
}

#[test]
fn a_file_cut_off_lengthened_or_gone_is_detected() {
    let _rng = rng();
    let (dir, newest, files) = two_checkpoints("faults-cuts");
    let mut cuts = 0;
    for file in &files {
        let whole = fs::read(file).unwrap();
        let name = file.display();
        for length in offsets(whole.len(), 40) {
            fs::write(file, &whole[..length]).unwrap();
            detected(&dir, &newest, &format!("{name}: cut to {length}"));
            cuts += 1;
        }
        fs::write(file, [&whole[..], b"\n"].concat()).unwrap();
        detected(&dir, &newest, &format!("{name}: a byte more"));
        // A terabyte that isn't there: its size alone tells.
        fs::File::options().write(true).open(file).unwrap().set_len(1 << 40).unwrap();
        if !file.ends_with("manifest.json") {
            detected(&dir, &newest, &format!("{name}: a terabyte"));
        }
        fs::remove_file(file).unwrap();
        detected(&dir, &newest, &format!("{name}: gone"));
        fs::create_dir(file).unwrap();
        detected(&dir, &newest, &format!("{name}: a folder"));
        fs::remove_dir(file).unwrap();
        fs::write(file, &whole).unwrap();
        cuts += 4;
    }
    verify(&newest).unwrap();
    println!("{cuts} files cut off, lengthened, gone or replaced");
}

#[test]
fn a_run_with_a_damaged_checkpoint_ends_with_the_same_bytes() {
    let _rng = rng();
    let (dir, _, files) = two_checkpoints("faults-damaged-run");
    let expected = super::toy::straight(Setup::default(), &fresh_dir("faults-damaged-straight"), 4);
    for file in files {
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, &bytes).unwrap();
        let mut toy = Toy::new(Setup::default(), Run::builder(&dir));
        let Start::Resumed { step: 1, skipped, .. } = toy.start().unwrap() else { panic!("{}", file.display()) };
        assert_eq!(skipped.len(), 1);
        toy.train_to(4);
        assert_eq!(toy.adapter(), expected);
        bytes[middle] ^= 1;
        fs::write(&file, &bytes).unwrap();
    }
}

#[test]
fn a_damaged_checkpoint_does_not_count_as_kept() {
    let _rng = rng();
    let (dir, newest, files) = two_checkpoints("faults-damaged-kept");
    fs::write(&files[0], b"").unwrap();
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir).keep(2));
    toy.start().unwrap();
    assert_eq!(toy.run.current_step(), 1);
    toy.train_to(3);
    toy.save().unwrap();
    // 1 and 3 are kept, and 2 is left for somebody to look at.
    assert!(dir.join("checkpoint-00000001").exists() && newest.exists());
    toy.train_to(4);
    toy.save().unwrap();
    assert!(!dir.join("checkpoint-00000001").exists() && newest.exists());
}
