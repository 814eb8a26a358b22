//! Resume, put to the test on a real model: `cargo xtask demo`.
//!
//! A small Llama is trained on one text, then fine-tuned on another over its
//! quantised weights, twice: once straight through, and once in processes that
//! are killed with SIGKILL at random moments. Both must come to the same bits.

mod args;
mod base;
mod data;
mod kill;
mod losses;
mod model;
mod plot;
mod report;
mod train;

use args::{Job, Settings, Task};
use indicatif::{ProgressBar, ProgressStyle};
use kill::Random;
use report::Findings;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let result = args::parse(std::env::args_os().skip(1)).and_then(|task| match task {
        Task::Demo(settings) => demo(&settings),
        Task::Train(job) => train::train(&job),
        Task::Evaluate(job) => train::evaluate(&job),
        Task::Help(text) => {
            println!("{text}");
            Ok(())
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The whole story. The first thing that is not as it should be ends it.
fn demo(settings: &Settings) -> Result<()> {
    fs::create_dir_all(&settings.out)?;
    let mut random = Random::new(settings.seed);
    println!("moments of the kills: --seed {}", settings.seed);

    println!("base: a small Llama on the King James Bible");
    let base_path = settings.out.join("base.safetensors");
    let bar = bar("base", settings.base_time.as_millis() as u64);
    let base = base::train(&base_path, settings.base_time, 1, &bar)?;
    bar.finish_and_clear();
    println!(
        "  {} weights, {} steps, {:.3} bits a byte held out; saved as {}",
        base.weights,
        base.steps,
        base.held_out / std::f64::consts::LN_2,
        base_path.display()
    );

    let mut findings = Vec::new();
    for scheme in ["nf4", "int8"] {
        findings.push(try_scheme(scheme, &base_path, settings, &mut random)?);
    }

    let picture = settings.out.join("loss.png");
    plot::draw(&picture, &findings)?;
    println!("The losses as a picture: {}\n", picture.display());
    report::print(&base, &findings);
    let kills: Vec<String> = findings.iter().map(Findings::kills).collect();
    println!("\nresume: bit-exact ({})", kills.join(", "));
    Ok(())
}

/// Fine-tunes over one scheme, straight and killed, and compares.
fn try_scheme(scheme: &'static str, base: &Path, settings: &Settings, random: &mut Random) -> Result<Findings> {
    let steps = settings.steps;
    let job = |name: &str| Job {
        base: base.into(),
        scheme: scheme.into(),
        dir: settings.out.join(format!("{scheme}-{name}")),
        steps,
        every: 4,
        seed: 7,
    };
    let (straight_job, killed_job) = (job("straight"), job("killed"));

    println!("{scheme}: LoRA on The Devil's Dictionary, straight through");
    let straight_bar = bar(&format!("{scheme} straight"), steps);
    let straight = kill::straight(&straight_job, &straight_bar)?;
    straight_bar.finish_and_clear();
    println!("  held-out loss {:.4}, from {:.4}", straight.tuned_loss, straight.base_loss);

    println!("{scheme}: the same, killed on the way");
    let killed_bar = bar(&format!("{scheme} killed"), steps);
    let killed = kill::killed(&killed_job, settings.kills, random, &killed_bar)?;
    killed_bar.finish_and_clear();

    println!("{scheme}: the two compared");
    let adapter = report::same_adapter(&straight_job, &killed_job)?;
    straight.losses.check_equal(&killed.losses, steps)?;
    report::same_loss("killed run", straight.tuned_loss, killed.tuned_loss)?;
    println!("  same adapter, same {} losses", steps);

    println!("{scheme}: base and adapter loaded by a fresh process");
    let reloaded = kill::evaluate(&killed_job)?;
    report::same_loss("fresh process", straight.tuned_loss, reloaded)?;
    println!("  same held-out loss");
    Ok(Findings { scheme, steps, straight, killed, adapter, reloaded })
}

fn bar(name: &str, length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("  {prefix:14} {wide_bar} {percent:>3} %  {elapsed}  {msg}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style).with_prefix(name.to_string())
}
