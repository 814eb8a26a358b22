//! Every kind of run, straight through and interrupted.

use super::common::{fresh_dir, rng};
use super::toy::{OPTIMIZERS, Setup, Toy, straight};
use tch_peft::{Run, Schedule};

const STEPS: u64 = 6;

#[test]
fn every_kind_of_run_resumes_to_the_bit() {
    let _rng = rng();
    let dir = fresh_dir("faults-matrix");
    let plain = Setup { dropout: 0.0, average: false, ..Setup::default() };
    let mut runs = 0;
    for scheme in ["nf4", "nf4+dq", "int8", "dense"] {
        for wrap_first in [false, true] {
            for optimizer in OPTIMIZERS {
                for (what, extra) in [
                    ("dropout", Setup { dropout: 0.3, ..plain }),
                    ("accumulation", Setup { accumulate: 3, ..plain }),
                    ("average", Setup { average: true, ..plain }),
                    ("schedule", Setup { schedule: Schedule::cosine(2, STEPS), ..plain }),
                ] {
                    let setup = Setup { scheme, wrap_first, optimizer, ..extra };
                    let name = format!("{scheme}, wrap first {wrap_first}, {optimizer}, {what}");
                    let expected = straight(setup, &dir.join("straight"), STEPS);
                    let folder = dir.join("interrupted");
                    // Saved after steps 2 and 4; cut off after 3, and in the
                    // background after 5.
                    for (until, resumed) in [(3, 0), (5, 2), (STEPS, 4)] {
                        let mut toy = Toy::new(setup, Run::builder(&folder).every(2).background(resumed == 2));
                        toy.start().unwrap();
                        assert_eq!(toy.run.current_step(), resumed, "{name}");
                        toy.train_to(until);
                        assert!(until < STEPS || toy.adapter() == expected, "{name}: other bytes");
                    }
                    std::fs::remove_dir_all(&folder).unwrap();
                    runs += 1;
                }
            }
        }
    }
    println!("{runs} kinds of runs");
}

#[test]
fn each_optimizer_and_part_matters_to_the_result() {
    let _rng = rng();
    let dir = fresh_dir("faults-matrix-differs");
    let adapters: Vec<_> =
        OPTIMIZERS.map(|optimizer| straight(Setup { optimizer, ..Setup::default() }, &dir, STEPS)).into();
    for (i, one) in adapters.iter().enumerate() {
        assert!(adapters[..i].iter().all(|other| other != one), "{} trains as another", OPTIMIZERS[i]);
    }
}
