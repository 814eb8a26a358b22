//! Prints what a checkpoint holds, or what a run's folder does.
//!
//!     cargo run --example inspect_checkpoint -- runs/a
//!     cargo run --example inspect_checkpoint -- runs/a/checkpoint-00000400

use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use tch_peft::checkpoint::{CheckpointFiles, Manifest, latest, verify};

fn main() -> Result<(), Box<dyn Error>> {
    let path: PathBuf = std::env::args_os().nth(1).ok_or("usage: inspect_checkpoint FOLDER")?.into();
    if path.join("manifest.json").exists() {
        return checkpoint(&path, &verify(&path)?);
    }
    let found = latest(&path)?;
    for skipped in &found.skipped {
        println!("skipped  {}: {}", skipped.path.display(), skipped.reason);
    }
    match found.found {
        Some((path, manifest)) => checkpoint(&path, &manifest),
        None => Err(format!("no whole checkpoint in {}", path.display()).into()),
    }
}

fn checkpoint(path: &Path, manifest: &Manifest) -> Result<(), Box<dyn Error>> {
    println!("{}: whole, format version {}", path.display(), manifest.version);
    println!("step     {}", manifest.step);
    if let Some(metric) = manifest.metric {
        println!("metric   {metric}");
    }
    let files = CheckpointFiles::read(path)?;
    let json = |name: &str| -> Result<Value, Box<dyn Error>> { Ok(serde_json::from_slice(files.get(name)?)?) };

    let state = json("training_state.json")?;
    println!("epoch    {}, after {} samples", state["epoch"], state["samples"]);
    println!("schedule {}", state["schedule"]);
    println!("optimizer {} {}", state["optimizer"]["kind"], state["optimizer"]["hyperparameters"]);
    println!("sampler  {}", state["sampler"]);
    println!("random generators of {}", keys(&state["rng"]));
    println!("further parts: {}", keys(&state["parts"]));
    if !state["user"].is_null() {
        println!("user     {}", state["user"]);
    }

    let base = json("base.json")?;
    let mut schemes: BTreeMap<String, usize> = BTreeMap::new();
    for weight in base["weights"].as_array().into_iter().flatten() {
        let scheme = if weight["scheme"].is_null() { "dense".into() } else { weight["scheme"].to_string() };
        *schemes.entry(scheme).or_default() += 1;
    }
    let schemes: Vec<_> = schemes.into_iter().map(|(scheme, count)| format!("{count} {scheme}")).collect();
    println!("base     {} weights", schemes.join(", "));
    for changes in [&base["allowed_changes"], &state["allowed_changes"]] {
        for change in changes.as_array().into_iter().flatten() {
            println!("allowed  {change}");
        }
    }

    let environment = json("environment.json")?;
    for key in ["tch_peft", "libtorch", "os", "arch", "cpu", "threads", "devices"] {
        println!("made with {key} {}", environment[key]);
    }

    for (name, entry) in &manifest.files {
        println!("\n{name}: {} bytes, blake3 {}", entry.size, entry.blake3);
        if name.ends_with(".safetensors") {
            let tensors = SafeTensors::deserialize(files.get(name)?)?;
            let mut names = tensors.names();
            names.sort_unstable();
            for name in names {
                let tensor = tensors.tensor(name)?;
                println!("  {name}  {:?} {:?}", tensor.dtype(), tensor.shape());
            }
        }
    }
    Ok(())
}

/// The names in an object.
fn keys(value: &Value) -> String {
    let keys: Vec<_> = value.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    if keys.is_empty() { "none".into() } else { keys.join(", ") }
}
