//! What a run's folder holds, what is kept of it, and what may be resumed.

mod background;
mod corpus;
mod interop;
mod resume_with;
mod retention;

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/toy.rs"]
mod toy;

use std::path::Path;

/// The steps of the checkpoints in a run's folder.
fn steps(dir: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut steps: Vec<u64> =
        names.filter_map(|name| name.strip_prefix("checkpoint-").map(|step| step.parse().unwrap())).collect();
    steps.sort();
    steps
}

/// Changes a checkpoint's file and its manifest with it, as an older or another
/// program might have written it.
fn rewrite(checkpoint: &Path, name: &str, change: impl FnOnce(String) -> Option<String>) {
    let path = checkpoint.join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    let manifest = checkpoint.join("manifest.json");
    let mut list: serde_json::Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    match change(text) {
        Some(text) => {
            list["files"][name]["size"] = text.len().into();
            list["files"][name]["blake3"] = blake3::hash(text.as_bytes()).to_hex().to_string().into();
            std::fs::write(&path, text).unwrap();
        }
        None => std::fs::remove_file(&path).unwrap(),
    }
    std::fs::write(manifest, sealed(list)).unwrap();
}

/// A manifest's text with its seal: the hash of all before it.
fn sealed(mut manifest: serde_json::Value) -> String {
    manifest.as_object_mut().unwrap().remove("seal");
    let text = serde_json::to_string_pretty(&manifest).unwrap();
    let body = text.strip_suffix("\n}").unwrap();
    format!("{body},\n  \"seal\": \"{}\"\n}}", blake3::hash(body.as_bytes()).to_hex())
}
