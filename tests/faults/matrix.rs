//! Every kind of run, straight through and interrupted.

use super::common::{fresh_dir, rng};
use super::toy::{OPTIMIZERS, Setup, Toy, straight};
use std::path::Path;
use tch_peft::{Run, Schedule};

const STEPS: u64 = 6;
/// The crate's own parts.
const PARTS: [&str; 5] = ["ema", "loss_scaler", "gradient_accumulation", "generator", "own_state"];

#[test]
fn every_kind_of_run_resumes_to_the_bit() {
    let _rng = rng();
    let dir = fresh_dir("faults-matrix");
    let plain = Setup { dropout: 0.0, average: false, ..Setup::default() };
    let mut runs = 0;
    for scheme in ["nf4", "nf4+dq", "int8", "int4", "fp8", "dense"] {
        for wrap_first in [false, true] {
            for optimizer in OPTIMIZERS {
                let dropout = Setup { dropout: 0.3, ..plain };
                let mut kinds = vec![
                    ("dropout", dropout),
                    ("accumulation", Setup { part: "gradient_accumulation", ..plain }),
                    ("ema", Setup { part: "ema", ..plain }),
                    ("schedule", Setup { schedule: Schedule::cosine(2, STEPS), ..plain }),
                ];
                if (scheme, wrap_first) == ("nf4", false) {
                    // The base is nothing to these.
                    kinds.push(("several batches in a step", Setup { accumulate: 3, ..plain }));
                    kinds.push(("a part of the caller's own", Setup { average: true, ..plain }));
                    kinds.extend(PARTS.map(|part| (part, Setup { part, ..dropout })));
                }
                for (what, extra) in kinds {
                    let setup = Setup { scheme, wrap_first, optimizer, ..extra };
                    let name = format!("{scheme}, wrap first {wrap_first}, {optimizer}, {what}");
                    let expected = run_to_end(setup, &dir.join("straight"));
                    let folder = dir.join("interrupted");
                    // Saved after steps 2 and 4; cut off after 3, and in the
                    // background after 5.
                    for (until, resumed) in [(3, 0), (5, 2), (STEPS, 4)] {
                        let mut toy = Toy::new(setup, Run::builder(&folder).every(2).background(resumed == 2));
                        toy.start().unwrap();
                        assert_eq!(toy.run.current_step(), resumed, "{name}");
                        toy.train_to(until);
                        assert!(until < STEPS || toy.everything() == expected, "{name}: other bytes");
                    }
                    std::fs::remove_dir_all(&folder).unwrap();
                    runs += 1;
                }
            }
        }
    }
    println!("{runs} kinds of runs");
}

/// All that a run has at its end.
fn run_to_end(setup: Setup, dir: &Path) -> Vec<u8> {
    let mut toy = Toy::new(setup, Run::builder(dir));
    toy.start().unwrap();
    toy.train_to(STEPS);
    toy.everything()
}

#[test]
fn each_optimizer_and_part_matters_to_the_result() {
    let _rng = rng();
    let dir = fresh_dir("faults-matrix-differs");
    let optimizers = OPTIMIZERS.map(|optimizer| Setup { optimizer, ..Setup::default() });
    // An average doesn't change what is learnt.
    let parts = PARTS[1..].iter().map(|part| Setup { part, ..Setup::default() });
    let mut adapters = Vec::new();
    for setup in optimizers.into_iter().chain(parts) {
        let adapter = straight(setup, &dir, STEPS);
        assert!(!adapters.contains(&adapter), "{}, {} trains as another", setup.optimizer, setup.part);
        adapters.push(adapter);
    }
}
