//! diffusers' `pytorch_lora_weights.safetensors`.
//!
//! A key is a component of the pipeline, a module's path, and PEFT's end. Files
//! of versions before PEFT spell the ends otherwise, and files of the first
//! ones name attention processors, which were modules of their own.

use super::keys::{KeyLayout, PEFT_ENDS, Part};
use super::safetensors;
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// Name of the tensors' file.
pub(super) const WEIGHTS_FILE: &str = "pytorch_lora_weights.safetensors";

/// The entry of the header's metadata that holds each component's `LoraConfig`,
/// as JSON, its keys after the component's name and a dot.
pub(super) const METADATA_KEY: &str = "lora_adapter_metadata";

/// That entry of a file, if it has one.
///
/// # Errors
/// [`Error::Corrupt`] for anything but a JSON object.
pub(super) fn recorded(path: &Path, bytes: &[u8]) -> Result<Option<Map<String, Value>>> {
    let Some(text) = safetensors::metadata(path, bytes)?.remove(METADATA_KEY) else { return Ok(None) };
    let fields = serde_json::from_str(&text)
        .map_err(|error| Error::corrupt(path, format!("`{METADATA_KEY}` is not a JSON object ({error})")))?;
    Ok(Some(fields))
}

/// The components of pipelines that adapters are loaded into.
pub(super) const COMPONENTS: [&str; 11] = [
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
    "text_conditioner",
    "connectors",
    "prior",
];

/// Ends that only files from before PEFT have.
pub(super) const OLD_ENDS: [(&str, Part); 6] = [
    (".lora.down.weight", Part::A),
    (".lora.up.weight", Part::B),
    (".lora_linear_layer.down.weight", Part::A),
    (".lora_linear_layer.up.weight", Part::B),
    PROCESSOR_ENDS[0],
    PROCESSOR_ENDS[1],
];

/// Those of attention processors, after a name of their own for a module.
pub(super) const PROCESSOR_ENDS: [(&str, Part); 2] = [("_lora.down.weight", Part::A), ("_lora.up.weight", Part::B)];

const ENDS: [(&str, Part); 16] = [
    PEFT_ENDS[0],
    PEFT_ENDS[1],
    PEFT_ENDS[2],
    PEFT_ENDS[3],
    PEFT_ENDS[4],
    PEFT_ENDS[5],
    // PEFT's names in memory, which some trainers save.
    (".lora_A.default.weight", Part::A),
    (".lora_B.default.weight", Part::B),
    (".alpha", Part::Alpha),
    ("_lora.alpha", Part::Alpha),
    OLD_ENDS[0],
    OLD_ENDS[1],
    OLD_ENDS[2],
    OLD_ENDS[3],
    OLD_ENDS[4],
    OLD_ENDS[5],
];

/// What attention processors called the linear layers beside them, in
/// diffusers' own models and in those of transformers.
const PROCESSORS: [(&str, &str); 8] = [
    ("to_q", "to_q"),
    ("to_k", "to_k"),
    ("to_v", "to_v"),
    ("to_out.0", "to_out"),
    ("q_proj", "to_q"),
    ("k_proj", "to_k"),
    ("v_proj", "to_v"),
    ("out_proj", "to_out"),
];

pub(super) struct Keys;

impl KeyLayout for Keys {
    fn component<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)> {
        match key.split_once('.') {
            Some((component, rest)) if COMPONENTS.contains(&component) => Some((component, rest)),
            // Those of other layouts.
            Some(("diffusion_model" | "text_encoders" | "base_model", _)) => None,
            Some((name, _)) if name.starts_with("lycoris_") => None,
            _ => Some(("", key)),
        }
    }

    fn prefix(&self, component: &str) -> String {
        if component.is_empty() { String::new() } else { format!("{component}.") }
    }

    fn names(&self, component: &str, path: &str) -> Vec<String> {
        let mut names = vec![path.to_string()];
        if component.starts_with("text_encoder") {
            names.extend(other_clip_name(path));
        }
        for i in 0..names.len() {
            let Some(name) = names.get(i).cloned() else { continue };
            for (module, processor) in PROCESSORS {
                if let Some(head) = name.strip_suffix(module).filter(|head| head.ends_with('.')) {
                    names.extend([format!("{head}{processor}"), format!("{head}processor.{processor}")]);
                }
            }
        }
        // Some trainers keep PEFT's prefix after the component.
        names.push(format!("base_model.model.{path}"));
        names
    }

    fn ends(&self) -> &'static [(&'static str, Part)] {
        &ENDS
    }
}

/// The names of a module of CLIP's text model, the older one first.
pub(super) fn clip_names(path: &str) -> Vec<String> {
    let mut names = vec![path.to_string()];
    match other_clip_name(path) {
        Some(older) if older.starts_with("text_model.") => names.insert(0, older),
        Some(newer) => names.push(newer),
        None => {}
    }
    names
}

/// CLIP's text model lay in a module `text_model` until transformers 5 took
/// that level away; files of both times are about.
fn other_clip_name(path: &str) -> Option<String> {
    match path.strip_prefix("text_model.") {
        Some(rest) => Some(rest.to_string()),
        None if path.starts_with("encoder.layers.") => Some(format!("text_model.{path}")),
        None => None,
    }
}
