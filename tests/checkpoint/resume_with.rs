//! Resuming with something that is not as it was: the rows of the table in
//! docs/resume.md.

use super::common::{device, fresh_dir, rng};
use super::toy::{Setup, Toy, straight};
use super::{rewrite, sealed};
use std::path::{Path, PathBuf};
use tch::Device;
use tch_peft::{Error, Run, RunBuilder, Schedule, Start};

const STEPS: u64 = 6;

fn four_steps(name: &str, setup: Setup) -> (PathBuf, PathBuf) {
    let dir = fresh_dir(name);
    let mut toy = Toy::new(setup, Run::builder(&dir).every(4));
    toy.start().unwrap();
    toy.train_to(4);
    let checkpoint = dir.join("checkpoint-00000004");
    (dir, checkpoint)
}

/// The error, after which everything is as before.
fn refused(setup: Setup, run: RunBuilder) -> Error {
    let mut toy = Toy::new(setup, run);
    let before = toy.everything();
    let error = toy.start().expect_err("it must be refused");
    assert!(toy.everything() == before, "refused, but something changed: {error}");
    error
}

fn resumed(toy: &mut Toy) -> Vec<String> {
    match toy.start().unwrap() {
        Start::Resumed { step: 4, differences, .. } => differences,
        other => panic!("{other:?}"),
    }
}

fn state(checkpoint: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(checkpoint.join("training_state.json")).unwrap()).unwrap()
}

#[test]
fn the_same_everything_is_the_same_to_the_bit() {
    let _rng = rng();
    let (dir, _) = four_steps("with-same", Setup::default());
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir));
    assert_eq!(resumed(&mut toy), [""; 0]);
    toy.train_to(STEPS);
    assert!(toy.adapter() == straight(Setup::default(), &fresh_dir("with-same-straight"), STEPS));
}

#[test]
fn another_number_of_threads_or_device_is_allowed_and_said() {
    // What is rewritten below is of a run on the CPU.
    if device() != Device::Cpu {
        return;
    }
    let _rng = rng();
    let (dir, checkpoint) = four_steps("with-device", Setup::default());
    rewrite(&checkpoint, "environment.json", |text| {
        let text = text.replace("\"threads\": 1", "\"threads\": 96");
        Some(text.replace("\"cpu\"\n", "\"cpu\",\n    \"cuda:0\"\n"))
    });
    // The run had a generator on a device that isn't there any more.
    rewrite(&checkpoint, "training_state.json", |text| {
        let text = text.replace("\"rng\": {", "\"rng\": {\n    \"cuda:0\": \"00112233\",");
        Some(text)
    });
    assert_eq!(state(&checkpoint)["rng"].as_object().unwrap().len(), 2);
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir));
    let lines = resumed(&mut toy);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines.contains(&"threads: recorded 96, given 1".to_string()), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("devices: recorded [\"cpu\",\"cuda:0\"]")), "{lines:?}");
    // What the devices have in common comes back.
    toy.train_to(STEPS);
    assert!(toy.adapter() == straight(Setup::default(), &fresh_dir("with-device-straight"), STEPS));
}

#[test]
fn a_longer_schedule_is_refused_unless_allowed_by_name() {
    let _rng = rng();
    let short = Setup { schedule: Schedule::cosine(0, 4), ..Setup::default() };
    let long = Setup { schedule: Schedule::cosine(0, 40), ..short };
    let (dir, _) = four_steps("with-schedule", short);
    let error = refused(long, Run::builder(&dir));
    let Error::DifferentConfig { what, differences } = &error else { panic!("{error}") };
    assert_eq!((what.as_str(), differences.len()), ("schedule", 1));
    assert_eq!(differences[0], "total: recorded 4, given 40");

    let allowed = || Run::builder(&dir).every(1).allow_schedule_change(true);
    let mut toy = Toy::new(long, allowed());
    assert_eq!(resumed(&mut toy), ["total: recorded 4, given 40"]);
    assert_eq!(toy.optimizer.learning_rate(), 1e-2 * long.schedule.factor(4));
    toy.train_to(5);
    drop(toy);
    // What follows says so, and is resumed as it is.
    let recorded = state(&dir.join("checkpoint-00000005"));
    assert_eq!(recorded["schedule"]["total"], 40);
    assert_eq!(recorded["allowed_changes"][0]["step"], 4);
    assert_eq!(recorded["allowed_changes"][0]["what"], "schedule");
    let mut toy = Toy::new(long, Run::builder(&dir));
    assert!(matches!(toy.start().unwrap(), Start::Resumed { step: 5, differences, .. } if differences.is_empty()));
}

#[test]
fn a_missing_optimizer_is_refused_unless_asked_for() {
    let _rng = rng();
    let (dir, checkpoint) = four_steps("with-optimizer", Setup::default());
    let before = {
        let mut toy = Toy::new(Setup::default(), Run::builder(&dir));
        toy.start().unwrap();
        toy.adapter()
    };
    std::fs::remove_file(checkpoint.join("optimizer.safetensors")).unwrap();
    let error = refused(Setup::default(), Run::builder(&dir));
    let Error::NoCheckpoint { reasons, .. } = &error else { panic!("{error}") };
    assert!(reasons[0].contains("optimizer.safetensors"), "{error}");

    let mut toy = Toy::new(Setup::default(), Run::builder(&dir).every(1).allow_missing_optimizer(true));
    let fresh = toy.optimizer.export_state().unwrap().tensors;
    let lines = resumed(&mut toy);
    assert_eq!(lines, ["optimizer.safetensors: missing; the optimizer starts anew"]);
    assert!(toy.adapter() == before, "the adapter comes back all the same");
    let now = toy.optimizer.export_state().unwrap().tensors;
    assert!(now.iter().all(|(name, tensor)| *tensor == fresh[name]));
    toy.train_to(5);
    drop(toy);
    assert_eq!(state(&dir.join("checkpoint-00000005"))["allowed_changes"][0]["what"], "optimizer");
    // Damaged is not missing.
    let optimizer = dir.join("checkpoint-00000005/optimizer.safetensors");
    std::fs::write(&optimizer, b"x").unwrap();
    std::fs::remove_dir_all(&checkpoint).unwrap();
    let error = refused(Setup::default(), Run::builder(&dir).allow_missing_optimizer(true));
    assert!(matches!(error, Error::NoCheckpoint { .. }), "{error}");
}

#[test]
fn other_parts_are_refused_by_name() {
    let _rng = rng();
    let without = Setup { average: false, ..Setup::default() };
    let (dir, _) = four_steps("with-parts", Setup::default());
    let error = refused(without, Run::builder(&dir)).to_string();
    assert!(error.contains("average: recorded, but not given"), "{error}");
    let (dir, checkpoint) = four_steps("without-parts", without);
    assert!(!checkpoint.join("parts.safetensors").exists());
    let error = refused(Setup::default(), Run::builder(&dir)).to_string();
    assert!(error.contains("average: given, but not recorded"), "{error}");
}

#[test]
fn a_newer_format_is_not_passed_over() {
    let _rng = rng();
    let (dir, checkpoint) = four_steps("with-version", Setup::default());
    let path = checkpoint.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    manifest["version"] = 2.into();
    std::fs::write(&path, sealed(manifest)).unwrap();
    let error = refused(Setup::default(), Run::builder(&dir));
    assert!(matches!(error, Error::NewerFormat { found: 2, supported: 1, .. }), "{error}");
}

/// A part that fails when it is too late to refuse.
struct Failing;

impl tch_peft::Stateful for Failing {
    fn export_state(&self) -> tch_peft::Result<tch_peft::State> {
        let (settings, values, tensors) = (().into(), ().into(), Default::default());
        Ok(tch_peft::State { kind: "failing".into(), settings, values, tensors })
    }
    fn check_state(&self, _: &tch_peft::State) -> tch_peft::Result<()> {
        Ok(())
    }
    fn import_state(&mut self, _: tch_peft::State) -> tch_peft::Result<()> {
        Err(tch_peft::Error::Torch(tch::TchError::Torch("out of memory".into())))
    }
}

#[test]
fn a_failure_in_the_middle_of_a_resume_puts_everything_back() {
    let _rng = rng();
    let dir = fresh_dir("with-failure");
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir).every(4));
    toy.extra = Some(Box::new(Failing));
    toy.start().unwrap();
    toy.train_to(4);
    drop(toy);
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir));
    toy.extra = Some(Box::new(Failing));
    toy.train();
    let before = toy.everything();
    let error = toy.start().unwrap_err();
    assert!(error.to_string().contains("out of memory"), "{error}");
    assert!(toy.everything() == before, "something stayed changed");
    assert_eq!(toy.run.current_step(), 0);
}
