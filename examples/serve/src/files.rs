//! What is served, from its folders.

use crate::args::Settings;
use crate::http::check_name;
use crate::llama::{self, Llama, Result};
use std::path::{Path, PathBuf};
use tch::Kind;
use tch_peft::{Base, Error, QuantizeOptions};

/// Packed on the way, unless the files are packed already.
pub fn base(settings: &Settings, kind: Kind) -> Result<Base<Llama>> {
    let load = |quantize| llama::load(&settings.model, settings.device, kind, quantize, QuantizeOptions::new());
    let Some(quantize) = &settings.quantize else { return load(None) };
    match load(Some(&quantize.clone().build()?)) {
        Err(error) if matches!(error.downcast_ref(), Some(Error::AlreadyQuantized { .. })) => load(None),
        outcome => outcome,
    }
}

/// The adapters that the command line names, and those in the folder of all.
pub fn found(settings: &Settings) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    if let Some(all) = &settings.adapters {
        let at = |error| format!("--adapters {}: {error}", all.display());
        for entry in std::fs::read_dir(all).map_err(at)? {
            let folder = entry?.path();
            if !is_adapter(&folder) {
                continue;
            }
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            check_name(&name).map_err(|error| format!("{}: {error}", folder.display()))?;
            found.push((name, folder));
        }
    }
    found.sort();
    found.extend(settings.adapter.iter().cloned());
    Ok(found)
}

fn is_adapter(folder: &Path) -> bool {
    folder.join("adapter_config.json").exists()
}
