//! Memory of one training step of 16 chained linear layers of 2048², over what
//! the packed weights take, beside PEFT on bitsandbytes nf4 and on dense layers.
//!
//!     cargo bench --bench memory
//!     cargo bench --bench memory -- --csv docs/data/memory.csv
//!
//! Each contestant runs in a process of its own: the peak of its resident
//! memory in the second and third step, less what was resident before the
//! first. Without the Python peers theirs are left out. Linux only.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::{AdamW, Base, Fp8Format, LoraConfig, LoraModel, Optimizer, QuantConfig};

const LAYERS: usize = 16;
const WIDTH: i64 = 2048;
const ROWS: [i64; 3] = [16, 64, 256];
/// What one process is to run: a scheme and a number of rows.
const CHILD: &str = "TCH_PEFT_BENCH_MEMORY";

#[derive(Debug)]
struct Net(Vec<nn::Linear>);

impl Module for Net {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.0.iter().fold(x.shallow_clone(), |x, layer| x.apply(layer))
    }
}

/// A value of `/proc/self/status`, in MB.
fn status(field: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1024.0 / 1e6
}

fn quantized(base: Base<Net>, scheme: &str) -> Base<Net> {
    let config = match scheme {
        "dense" => return base,
        "nf4" => QuantConfig::nf4(),
        "int8" => QuantConfig::int8(),
        "int4" => QuantConfig::int4(),
        "fp8" => QuantConfig::fp8(Fp8Format::E4m3),
        other => panic!("{other}"),
    };
    base.quantize(&config.build().unwrap()).unwrap()
}

/// Prints the peak over what is resident before the first step, in MB.
fn child(scheme: &str, rows: i64) {
    let vs = nn::VarStore::new(Device::Cpu);
    let linear = |i| nn::linear(vs.root() / "h" / i, WIDTH, WIDTH, Default::default());
    let net = Net((0..LAYERS).map(linear).collect());
    let base = quantized(Base::new(vs, net), scheme);
    let config = LoraConfig::builder().r(16).target_modules("all-linear").build().unwrap();
    let model = LoraModel::wrap(base, config).unwrap();
    let mut optimizer = AdamW::builder().build(model.trainable_parameters()).unwrap();
    let x = Tensor::randn([rows, WIDTH], (Kind::Float, Device::Cpu));
    let before = status("VmRSS");
    for step in 0..3 {
        if step == 1 {
            // Makes the peak start again from here.
            fs::write("/proc/self/clear_refs", "5").unwrap();
        }
        optimizer.zero_grad().unwrap();
        model.forward(&x).unwrap().square().mean(Kind::Float).backward();
        optimizer.step().unwrap();
    }
    println!("{}", status("VmHWM") - before);
}

fn megabytes(command: &mut Command) -> Option<f64> {
    let output = command.output().ok()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().last()?.trim().parse().ok()
}

fn main() {
    if let Ok(what) = std::env::var(CHILD) {
        let (scheme, rows) = what.split_once(' ').unwrap();
        return child(scheme, rows.parse().unwrap());
    }
    // All of them, or the first.
    let part = |all: usize| if common::trial() { 1 } else { all };
    let rows = &ROWS[..part(ROWS.len())];
    let dense = LAYERS as f64 * (WIDTH * WIDTH) as f64 * 4.0 / 1e6;
    println!(
        "{LAYERS} layers of {WIDTH}², r = 16, f32: peak of a step over the model, MB (% of {dense:.0} MB, the dense weights)"
    );
    let mut figures = Vec::new();
    let mut line = |name: &str, peak: &dyn Fn(i64) -> Option<f64>| {
        let cells = rows.iter().map(|&rows| {
            let Some(mb) = peak(rows) else { return "-".into() };
            figures.push(format!("{name},{rows},{mb:.1},{dense:.1}"));
            format!("{mb:6.1} ({:4.1} %)", 100.0 * mb / dense)
        });
        println!("| {name:20} | {} |", cells.collect::<Vec<String>>().join(" | "));
    };
    println!("| | {} |", rows.iter().map(|rows| format!("{rows} rows")).collect::<Vec<_>>().join(" | "));
    let schemes = ["nf4", "int8", "int4", "fp8", "dense"];
    for scheme in &schemes[..part(schemes.len())] {
        line(scheme, &|rows| {
            megabytes(Command::new(std::env::current_exe().unwrap()).env(CHILD, format!("{scheme} {rows}")))
        });
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("TCH_PEFT_PYTHON").map_or(root.join("target/python/bin/python"), PathBuf::from);
    let peers = [("nf4", "PEFT bnb nf4"), ("int8", "PEFT bnb int8"), ("dense", "PEFT dense")];
    if !python.exists() {
        println!("without the Python peers");
    }
    for &(peer, name) in peers[..part(peers.len())].iter().filter(|_| python.exists()) {
        line(name, &|rows| {
            let mut command = Command::new(&python);
            command.arg(root.join("benches/python/memory.py")).args([peer, &rows.to_string()]);
            megabytes(command.env("PYTHONDONTWRITEBYTECODE", "1").env("HF_HUB_OFFLINE", "1"))
        });
    }
    if let Some(file) = common::csv_file() {
        let what = format!("cargo bench --bench memory: {LAYERS} layers of {WIDTH} x {WIDTH}, r = 16, f32, AdamW");
        common::write_csv(&file, &what, "layer,rows,megabytes,dense_megabytes", &figures).unwrap();
    }
}
