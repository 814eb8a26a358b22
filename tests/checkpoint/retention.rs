//! Which checkpoints stay.

use super::common::{fresh_dir, rng};
use super::steps;
use super::toy::{Setup, Toy};
use tch_peft::checkpoint::Manifest;
use tch_peft::{Best, Error, Run};

#[test]
fn the_newest_some_by_step_and_the_best_are_kept() {
    let _rng = rng();
    let metrics = [5.0, 2.0, 7.0, 1.0, 6.0, 2.0, 9.0, 8.0];
    for (name, best, expected) in
        [("lowest", Best::Lowest, vec![3, 4, 6, 8]), ("highest", Best::Highest, vec![3, 6, 7, 8])]
    {
        for background in [false, true] {
            let dir = fresh_dir(&format!("retention-{name}"));
            let run = Run::builder(&dir).every(1).keep(1).keep_every(3).keep_best(2, best).background(background);
            let mut toy = Toy::new(Setup::default(), run);
            toy.start().unwrap();
            for metric in metrics {
                toy.run.set_metric(metric).unwrap();
                toy.step().unwrap();
            }
            toy.run.flush().unwrap();
            // Every third, the best two (of equal ones the newer), the newest.
            assert_eq!(steps(&dir), expected, "{name}");
            let manifest: Manifest = tch_peft::checkpoint::verify(dir.join("checkpoint-00000008")).unwrap();
            assert_eq!(manifest.metric, Some(8.0));
        }
    }
}

#[test]
fn a_metric_is_that_of_one_step() {
    let _rng = rng();
    let dir = fresh_dir("retention-metric");
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir).every(2).keep(0));
    toy.start().unwrap();
    // Step 1 saves nothing: its metric is not taken for that of step 2.
    toy.run.set_metric(1.0).unwrap();
    toy.train_to(2);
    let metric = |step| tch_peft::checkpoint::verify(dir.join(format!("checkpoint-{step:08}"))).unwrap().metric;
    assert_eq!(metric(2), None);
    // Set after the step, it goes into a save of the same weights.
    toy.run.set_metric(3.0).unwrap();
    toy.save().unwrap();
    assert_eq!(metric(2), Some(3.0));
    assert!(matches!(toy.run.set_metric(f64::NAN), Err(Error::Config { .. })));
    toy.train_to(8);
    assert_eq!(steps(&dir), [2, 4, 6, 8], "0 keeps all");
}

#[test]
fn what_is_not_a_checkpoint_of_this_run_stays() {
    let _rng = rng();
    let dir = fresh_dir("retention-foreign");
    for name in ["checkpoint-old", "checkpoint-00000001", "checkpoint-7", "notes"] {
        std::fs::create_dir(dir.join(name)).unwrap();
    }
    std::fs::write(dir.join("checkpoint-00000001/manifest.json"), r#"{"format": "another", "version": 1}"#).unwrap();
    let found = tch_peft::checkpoint::latest(&dir).unwrap();
    assert!(found.found.is_none());
    let reasons: Vec<_> = found.skipped.iter().map(|skipped| skipped.reason.as_str()).collect();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert!(reasons[0].contains("its format is `another`"), "{reasons:?}");
    // A run doesn't begin anew in silence: moved away, it does.
    let mut toy = Toy::new(Setup::default(), Run::builder(&dir).every(1).keep(1));
    assert!(matches!(toy.start(), Err(Error::NoCheckpoint { .. })));
    std::fs::rename(dir.join("checkpoint-00000001"), dir.join("checkpoint-foreign")).unwrap();
    std::fs::remove_file(dir.join("checkpoint-foreign/manifest.json")).unwrap();
    toy.start().unwrap();
    toy.train_to(3);
    for name in ["checkpoint-old", "checkpoint-foreign", "checkpoint-7", "checkpoint-00000003", "notes"] {
        assert!(dir.join(name).exists(), "{name}");
    }
    assert!(!dir.join("checkpoint-00000002").exists());
}
