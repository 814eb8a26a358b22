//! SIGKILL at random times.

use super::common::{fresh_dir, rng};
use super::toy::{OPTIMIZERS, Setup, Toy, straight};
use super::{child, newest};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tch_peft::{Run, Schedule};

const STEPS: u64 = 30;
/// Kills in all, unless `TCH_PEFT_KILLS` says otherwise.
const KILLS: usize = 100;

fn setup(scheme: &str, optimizer: &str) -> Setup {
    let find = |names: &[&'static str], name| *names.iter().find(|n| **n == name).unwrap();
    Setup {
        scheme: find(&["nf4", "int8"], scheme),
        optimizer: find(&OPTIMIZERS, optimizer),
        schedule: Schedule::cosine(5, STEPS),
        ..Setup::default()
    }
}

#[test]
fn killed_at_random_times_a_run_ends_with_the_same_bytes() {
    let _rng = rng();
    let dir = fresh_dir("faults-kill");
    let kills = std::env::var("TCH_PEFT_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut random = Random(seed);
    let cases: Vec<_> = ["nf4", "int8"].iter().flat_map(|s| OPTIMIZERS.map(|o| (*s, o))).collect();
    let share = kills.div_ceil(cases.len());
    let (mut killed, mut in_a_save) = (0, 0);
    for (scheme, optimizer) in cases {
        let expected = straight(setup(scheme, optimizer), &dir.join("straight"), STEPS);
        // Once undisturbed, for the time that it takes; then killed several
        // times on each way to the end.
        let folder = |round: usize| dir.join(format!("{scheme}-{optimizer}-{round}"));
        let start = Instant::now();
        assert!(live(scheme, optimizer, &folder(0), None));
        let time = start.elapsed();
        let mut here = 0;
        for round in 1.. {
            let folder = folder(round);
            while !live(scheme, optimizer, &folder, Some(random.below(time / 3))) {
                here += 1;
                newest(&folder);
                in_a_save += usize::from(left_over(&folder));
                assert!(here < 20 * share, "it gets nowhere");
            }
            let found = std::fs::read(folder.join("adapter.safetensors")).unwrap();
            assert!(found == expected, "{scheme}, {optimizer}: other bytes after {here} kills");
            if here >= share {
                break;
            }
        }
        killed += here;
        std::fs::remove_dir_all(dir.join("straight")).unwrap();
    }
    println!("{killed} kills, {in_a_save} of them in the middle of a save");
}

/// Runs a child until it ends, which answers true, or is killed so long after
/// its training has begun.
fn live(scheme: &str, optimizer: &str, dir: &Path, kill: Option<Duration>) -> bool {
    let variables = [
        ("TCH_PEFT_KILL_SCHEME", scheme),
        ("TCH_PEFT_KILL_OPTIMIZER", optimizer),
        ("TCH_PEFT_KILL_DIR", dir.to_str().unwrap()),
    ];
    let mut child = child("kill::trains", &variables).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.any(|line| line.unwrap().contains("ready"));
    let begun = Instant::now();
    if let (true, Some(kill)) = (ready, kill) {
        while begun.elapsed() < kill && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_micros(100));
        }
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    assert!(status.success() || status.code().is_none(), "the child failed: {status}");
    status.success()
}

/// Whether a save was cut off.
fn left_over(dir: &Path) -> bool {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name()).any(|name| name.to_str().unwrap().starts_with(".checkpoint-"))
}

/// The child of the test above.
#[test]
fn trains() {
    let Ok(dir) = std::env::var("TCH_PEFT_KILL_DIR") else { return };
    let [scheme, optimizer] =
        ["TCH_PEFT_KILL_SCHEME", "TCH_PEFT_KILL_OPTIMIZER"].map(|variable| std::env::var(variable).unwrap());
    let dir = Path::new(&dir);
    // Every other life writes in the background.
    let background = std::process::id().is_multiple_of(2);
    let mut toy = Toy::new(setup(&scheme, &optimizer), Run::builder(dir).every(2).background(background));
    toy.start().unwrap();
    println!("ready");
    toy.train_to(STEPS);
    std::fs::write(dir.join("adapter.safetensors"), toy.adapter()).unwrap();
}

/// Marsaglia, "Xorshift RNGs" (2003).
struct Random(u64);

impl Random {
    fn below(&mut self, time: Duration) -> Duration {
        for (left, shift) in [(true, 13), (false, 7), (true, 17)] {
            self.0 ^= if left { self.0 << shift } else { self.0 >> shift };
        }
        Duration::from_nanos(self.0 % time.as_nanos().max(1) as u64)
    }
}
