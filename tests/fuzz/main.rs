//! The fuzz targets of `fuzz/`, each with a fixed number of damaged files: errors or something sound, no panics, and
//! no memory beyond what the files account for.
//!
//! `TCH_PEFT_FUZZ=20000` gives another number for each target. Files that fail are kept under the target's name; so
//! `cargo +nightly fuzz run adapter_file target/tmp/fuzz/adapter_file` runs them again.

#[path = "../common/mod.rs"]
mod common;
mod mutate;
#[path = "../../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod targets;

use mutate::{Random, mutate};
use std::panic::{AssertUnwindSafe, catch_unwind};
use targets::{TARGETS, Target, joined};

/// Damaged files for each target.
const COUNT: usize = 500;
/// Memory that a reader may ask for at most, above what the valid files took: they are of a few KiB, and threads have
/// stacks.
const MEMORY: usize = 1 << 30;

/// The most address space that this process ever had, in bytes.
fn peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? << 10)
}

fn fuzz(target: &Target) {
    let _rng = common::rng();
    tch::set_num_threads(1);
    let dir = common::fresh_dir(&format!("fuzz/{}", target.name));
    let made = tempfile::tempdir().unwrap();
    let seeds = (target.seeds)(made.path());
    // Where cargo-fuzz may begin.
    let corpus = common::fresh_dir(&format!("fuzz-seeds/{}", target.name));
    for (i, seed) in seeds.iter().enumerate() {
        assert!(target.run(seed), "{}: valid files {i} are refused", target.name);
        std::fs::write(corpus.join(i.to_string()), joined(seed)).unwrap();
    }
    let count = std::env::var("TCH_PEFT_FUZZ").map_or(COUNT, |count| count.parse().unwrap());
    let (before, mut accepted) = (peak(), 0);
    for number in 0..count {
        let mut random = Random(number as u64);
        let mut files = seeds[random.below(seeds.len())].clone();
        let other = &seeds[random.below(seeds.len())];
        mutate(&mut random, &mut files, other);
        let kept = dir.join(number.to_string());
        let outcome = catch_unwind(AssertUnwindSafe(|| target.run(&files)));
        let grown = peak().zip(before).map_or(0, |(now, before)| now - before);
        if outcome.is_err() || grown > MEMORY {
            std::fs::write(&kept, joined(&files)).unwrap();
            let kept = kept.display();
            panic!("{}: {kept} panics or takes too much memory ({} MiB)", target.name, grown >> 20);
        }
        accepted += usize::from(outcome.unwrap());
    }
    println!("{}: {count} damaged files, {} refused, {accepted} sound", target.name, count - accepted);
    // A reader that refuses everything would prove nothing, and one that takes everything neither.
    assert!(count < 100 || (1..count).contains(&accepted), "{}: {accepted} of {count} accepted", target.name);
}

macro_rules! fuzzed {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            fuzz(TARGETS.iter().find(|target| target.name == stringify!($name)).unwrap());
        }
    )*};
}

fuzzed!(adapter_peft, adapter_file, quantized, dense_shards, checkpoint, manifest);
