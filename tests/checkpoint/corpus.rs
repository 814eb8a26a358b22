//! Checkpoints that earlier versions wrote: each later one resumes them.
//!
//! `tests/corpus/<format version>-<what>/` is a run's folder with one
//! checkpoint and `expected.json`: how the run was set up, and a hash of all
//! that resuming it brings back. With `TCH_PEFT_MAKE_CORPUS=1` the ones that
//! are missing are made; the ones that are there never change.

use super::common::{fresh_dir, rng, root};
use super::toy::{OPTIMIZERS, Setup, Toy};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tch_peft::checkpoint::CheckpointFiles;
use tch_peft::{Run, Schedule, Start};

const STEP: u64 = 4;
const SCHEMES: [&str; 3] = ["nf4", "int8", "dense"];

fn corpus() -> PathBuf {
    root().join("tests/corpus")
}

fn setup(scheme: &str, optimizer: &str) -> Setup {
    let find = |names: &[&'static str], name| *names.iter().find(|n| **n == name).unwrap();
    Setup {
        scheme: find(&SCHEMES, scheme),
        optimizer: find(&OPTIMIZERS, optimizer),
        schedule: Schedule::cosine(2, 20),
        ..Setup::default()
    }
}

fn hash(toy: &Toy) -> String {
    blake3::hash(&toy.everything()).to_hex().to_string()
}

#[test]
fn every_checkpoint_of_the_corpus_resumes() {
    let _rng = rng();
    if std::env::var_os("TCH_PEFT_MAKE_CORPUS").is_some() {
        make();
    }
    let work = fresh_dir("corpus");
    let mut resumed = 0;
    for entry in fs::read_dir(corpus()).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_type().unwrap().is_dir() {
            continue;
        }
        let name = entry.file_name().into_string().unwrap();
        let text = fs::read(entry.path().join("expected.json")).unwrap();
        let expected: Value = serde_json::from_slice(&text).unwrap();
        let dir = work.join(&name);
        copy(&entry.path(), &dir);
        let setup = setup(expected["scheme"].as_str().unwrap(), expected["optimizer"].as_str().unwrap());
        let mut toy = Toy::new(setup, Run::builder(&dir).every(1).keep(0));
        let start = toy.start().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(matches!(start, Start::Resumed { step: STEP, .. }), "{name}: {start:?}");
        assert_eq!(hash(&toy), expected["hash"].as_str().unwrap(), "{name}: other values came back");
        assert_eq!(toy.run.user_state::<String>().unwrap().as_deref(), Some("kept"), "{name}");
        // Whether the next steps are the same bits depends on the processor.
        toy.train_to(STEP + 2);
        CheckpointFiles::read(dir.join("checkpoint-00000006")).unwrap();
        resumed += 1;
    }
    assert!(resumed >= 6, "{resumed} checkpoints in the corpus");
}

fn make() {
    for (scheme, optimizer) in [
        ("nf4", "adamw"),
        ("int8", "adamw8bit"),
        ("dense", "sgd"),
        ("nf4", "lion"),
        ("int8", "adafactor"),
        ("nf4", "lora_plus"),
    ] {
        let dir = corpus().join(format!("1-{scheme}-{optimizer}"));
        if dir.exists() {
            continue;
        }
        let mut toy = Toy::new(setup(scheme, optimizer), Run::builder(&dir).every(STEP));
        toy.start().unwrap();
        toy.run.set_user_state(&"kept".to_string()).unwrap();
        toy.train_to(STEP);
        let expected = json!({"scheme": scheme, "optimizer": optimizer, "hash": hash(&toy)});
        fs::write(dir.join("expected.json"), serde_json::to_string_pretty(&expected).unwrap()).unwrap();
        drop(toy);
        fs::remove_file(dir.join(".run.lock")).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
