//! Saving and resuming 224 sites of width 2048 with r = 16 and AdamW's state
//! (176 MB), beside a plain copy, torch and PEFT on the same data.
//!
//!     cargo bench --bench checkpoint
//!
//! All times of a line are medians of rounds that alternate, so that their
//! ratios hold though the machine may be busy. Without the Python peers their
//! lines are left out.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tch::{Device, Kind, nn};
use tch_peft::{AdamW, Base, LoraConfig, LoraModel, Parts, Run, RunBuilder, Sampler, Schedule};

const SITES: usize = 224;
const WIDTH: i64 = 2048;
const ROUNDS: usize = 7;

type Model = LoraModel<()>;

fn main() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-checkpoint");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    let mut times = Times::default();
    let mut model = model(&mut times);
    let mut optimizer = AdamW::builder().build(model.trainable_parameters()).unwrap();
    let (schedule, mut sampler) = (Schedule::constant(), Sampler::new(8, 1, 0).unwrap());
    let mut peer = Peer::start(&dir);

    for round in 0..=ROUNDS {
        // The first round warms up.
        times.on = round > 0;
        let mut parts = Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler);

        let folder = fresh(&dir.join("background"));
        let mut run = started(Run::builder(&folder).every(1).keep(1).background(true), &mut parts);
        run.step(&mut parts).unwrap();
        run.flush().unwrap();
        times.measure("stop of training, in the background", || run.step(&mut parts).unwrap());
        run.flush().unwrap();
        drop(run);

        let folder = fresh(&dir.join("run"));
        let mut run = started(Run::builder(&folder), &mut parts);
        let path = times.measure("save", || run.save(&mut parts).unwrap());
        drop(run);
        let files = files(&path);
        let copy = fresh(&dir.join("copy"));
        fs::create_dir(&copy).unwrap();
        times.measure("plain copy of the same files, with fsync", || {
            files.iter().for_each(|file| plain_copy(file, &copy))
        });

        times.measure("resume", || started(Run::builder(&folder), &mut parts));
        times.measure("plain read of the same files", || {
            files.iter().for_each(|file| drop(black_box(fs::read(file).unwrap())));
        });
        if let Some(peer) = &mut peer {
            for what in ["torch.save", "torch.load", "save_pretrained"] {
                times.add(what, peer.time(what));
            }
        }
    }

    let total: u64 =
        files(&dir.join("run/checkpoint-00000000")).iter().map(|f| fs::metadata(f).map_or(0, |m| m.len())).sum();
    println!("{} MB, medians of {ROUNDS}:", total / 1_000_000);
    let ms = |what: &str| times.median(what).as_secs_f64() * 1e3;
    for (what, _) in &times.all {
        println!("  {what:44} {:8.1} ms", ms(what));
    }
    let ratio = |a: &str, b: &str| 100.0 * ms(a) / ms(b);
    println!("write at {:.0} % of the plain copy's speed", ratio("plain copy of the same files, with fsync", "save"));
    println!("resume at {:.0} % of the read's speed", ratio("plain read of the same files", "resume"));
    println!(
        "fingerprint at {:.0} % of blake3's speed",
        ratio("blake3 of the same bytes, all threads", "fingerprint of the base")
    );
    fs::remove_dir_all(&dir).unwrap();
}

/// The sites over a base in half precision, the smallest that a dense one can
/// be; its fingerprint is timed beside plain blake3.
fn model(times: &mut Times) -> Model {
    tch::manual_seed(0);
    // In memory of its own, as the base's bytes are.
    let bytes = vec![1u8; SITES * (2 * WIDTH * WIDTH) as usize];
    let mut kept = None;
    for round in 0..=ROUNDS {
        times.on = round > 0;
        drop(kept.take());
        // A base remembers its fingerprint.
        let base = base();
        times.measure("fingerprint of the base", || black_box(base.fingerprint().unwrap()));
        times.measure("blake3 of the same bytes, all threads", || {
            black_box(blake3::Hasher::new().update_rayon(&bytes).finalize())
        });
        kept = Some(base);
    }
    let config = LoraConfig::builder().r(16).target_modules(["proj"]).build().unwrap();
    LoraModel::wrap(kept.unwrap(), config).unwrap()
}

fn base() -> Base<()> {
    let mut vs = nn::VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Half);
    for i in 0..SITES {
        let _ = vs.root().sub("layers").sub(i).sub("proj").ones("weight", &[WIDTH, WIDTH]);
    }
    Base::from(vs)
}

fn started(run: RunBuilder, parts: &mut Parts<'_>) -> Run {
    let mut run = run.build().unwrap();
    run.resume_or_start(parts).unwrap();
    run
}

fn fresh(path: &Path) -> PathBuf {
    let _ = fs::remove_dir_all(path);
    path.into()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

fn plain_copy(file: &Path, to: &Path) {
    let bytes = fs::read(file).unwrap();
    let mut copy = File::create(to.join(file.file_name().unwrap())).unwrap();
    copy.write_all(&bytes).unwrap();
    copy.sync_all().unwrap();
}

/// What was measured, in the order of its first time.
#[derive(Default)]
struct Times {
    on: bool,
    all: Vec<(String, Vec<Duration>)>,
}

impl Times {
    fn measure<T>(&mut self, what: &str, f: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = f();
        self.add(what, start.elapsed());
        result
    }

    fn add(&mut self, what: &str, time: Duration) {
        if !self.on {
            return;
        }
        match self.all.iter_mut().find(|(name, _)| name == what) {
            Some((_, times)) => times.push(time),
            None => self.all.push((what.into(), vec![time])),
        }
    }

    fn median(&self, what: &str) -> Duration {
        let mut times = self.all.iter().find(|(name, _)| name == what).map_or(Vec::new(), |(_, times)| times.clone());
        times.sort();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

/// The Python process, which times what it is told to do.
struct Peer {
    process: Child,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Peer {
    fn start(dir: &Path) -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = std::env::var_os("TCH_PEFT_PYTHON").map_or(root.join("target/python/bin/python"), PathBuf::from);
        if !python.exists() {
            println!("without the Python peers");
            return None;
        }
        let mut command = Command::new(python);
        command.arg(root.join("benches/checkpoint.py")).arg(dir).args([SITES.to_string(), WIDTH.to_string()]);
        command.env("PYTHONDONTWRITEBYTECODE", "1").env("HF_HUB_OFFLINE", "1").stderr(Stdio::null());
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap()).lines();
        Some(Peer { process, answers })
    }

    fn time(&mut self, what: &str) -> Duration {
        writeln!(self.process.stdin.as_mut().unwrap(), "{what}").unwrap();
        let seconds = self.answers.next().expect("the peer answers").unwrap();
        Duration::from_secs_f64(seconds.parse().unwrap())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
