//! Loading a packed base: time beside that of reading its files, and the peak of
//! memory over what the packed weights take.
//!
//!     cargo bench --bench load
//!
//! A base of 24 linear layers of 4096² is packed as nf4 with double quantisation
//! and written in shards. Each run is a process of its own; rounds alternate
//! between reading the files into memory and loading the base, with the files in
//! the system's cache and, by coreutils' `dd`, out of it. Linux only.

mod median;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use median::median;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, QuantConfig};

const LAYERS: usize = 24;
const WIDTH: i64 = 4096;
const SHARD: usize = 64 << 20;
const ROUNDS: usize = 7;
/// What one process is to do.
const CHILD: &str = "TCH_PEFT_BENCH_LOAD";

/// A store whose weights, one expanded element each, are filled on loading.
fn places() -> VarStore {
    let vs = VarStore::new(Device::Cpu);
    for i in 0..LAYERS {
        let element = Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand([WIDTH, WIDTH], false);
        let _ = (vs.root() / "h" / i).add("weight", element, false);
    }
    vs
}

/// A value of `/proc/self/status`, in MB.
fn status(field: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1024.0 / 1e6
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Prints the milliseconds and the peak of memory over that before, in MB.
fn child(what: &str, folder: &Path) {
    let vs = places();
    let (before, start) = (status("VmRSS"), Instant::now());
    match what {
        "read" => drop(files(folder).iter().map(|file| fs::read(file).unwrap()).collect::<Vec<_>>()),
        _ => drop(Base::from(vs).load_quantized(folder).unwrap()),
    }
    println!("{} {}", start.elapsed().as_secs_f64() * 1e3, status("VmHWM") - before);
}

fn run(what: &str, folder: &Path, cached: bool) -> [f64; 2] {
    for file in files(folder) {
        if cached {
            fs::read(file).unwrap();
        } else {
            let from = format!("if={}", file.display());
            let dropped = Command::new("dd").args([&from, "iflag=nocache", "count=0", "status=none"]).status();
            assert!(dropped.unwrap().success());
        }
    }
    let output = Command::new(std::env::current_exe().unwrap()).env(CHILD, what).arg(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let mut numbers = text.split_whitespace().map(|number| number.parse().unwrap());
    std::array::from_fn(|_| numbers.next().unwrap())
}

fn main() {
    if let Ok(what) = std::env::var(CHILD) {
        return child(&what, Path::new(&std::env::args_os().nth(1).unwrap()));
    }
    let folder = tempfile::tempdir().unwrap();
    let vs = places();
    for (_, mut weight) in vs.variables() {
        let values = Tensor::randn([WIDTH, WIDTH], (Kind::Float, Device::Cpu));
        weight.set_data(&values);
    }
    let config = QuantConfig::nf4().double_quant(true).build().unwrap();
    let base = Base::from(vs).quantize(&config).unwrap();
    base.save_quantized_sharded(folder.path(), SHARD).unwrap();
    drop(base);
    let bytes: u64 = files(folder.path()).iter().map(|file| file.metadata().unwrap().len()).sum();
    println!(
        "{LAYERS} layers of {WIDTH}², nf4+dq: {:.1} MB in {} files",
        bytes as f64 / 1e6,
        files(folder.path()).len()
    );
    for cached in [true, false] {
        let [mut read, mut load] = [(); 2].map(|()| Vec::new());
        for _ in 0..ROUNDS {
            read.push(run("read", folder.path(), cached));
            load.push(run("load", folder.path(), cached));
        }
        let times = [&read, &load].map(|runs| median(runs.iter().map(|run| run[0]).collect()));
        let peak = median(load.iter().map(|run| run[1]).collect());
        println!(
            "{}: read {:.0} ms, load {:.0} ms ({:.0} % of reading's speed); peak of loading {peak:.1} MB",
            if cached { "cached" } else { "not cached" },
            times[0],
            times[1],
            100.0 * times[0] / times[1],
        );
    }
}
