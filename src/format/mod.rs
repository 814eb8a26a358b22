//! Floor 4: adapter files, in and out.
//!
//! A layout is how keys are spelt; one file each. Reading turns any of them
//! into PEFT's tensors and configuration, writing goes back.

mod comfyui;
mod convert;
mod detect;
mod diffusers;
mod file;
mod flux;
mod join;
mod keys;
mod kohya;
mod kronecker;
mod lycoris;
mod mapping;
mod parts;
pub(crate) mod peft;
mod read;
mod resolve;
pub(crate) mod safetensors;
mod settings;
mod sgm;
mod write;

pub use detect::DetectedFormat;
pub use file::AdapterFile;
pub use mapping::{KeyMapping, KeyMappingBuilder};
pub(crate) use read::{BaseLayer, ReadAdapter, read};
pub(crate) use write::{Outgoing, OutgoingLayer, write};

use crate::error::{Error, Result};
use std::fmt;
use std::io::Write;
use std::path::Path;

/// A layout of adapter files. docs/formats.md shows the keys of each.
///
/// ```no_run
/// # fn run(model: tch_peft::LoraModel<tch::nn::Linear>) -> tch_peft::Result<()> {
/// use tch_peft::{AdapterFile, AdapterFormat};
///
/// let file = AdapterFile::new("kohya.safetensors").component("unet");
/// model.save_as("default", AdapterFormat::Kohya, file)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AdapterFormat {
    /// HF PEFT's folder: `base_model.model.….lora_A.weight` and a
    /// configuration.
    #[default]
    Peft,
    /// diffusers' `pytorch_lora_weights.safetensors`, which SimpleTuner writes
    /// too: `transformer.….lora_A.weight`, the configuration in the header.
    Diffusers,
    /// The same before PEFT: `unet.….lora.down.weight`,
    /// `text_encoder.….lora_linear_layer.down.weight`, and attention processors. It has no
    /// alpha, which is the rank.
    DiffusersOld,
    /// kohya's sd-scripts: `lora_unet_….lora_down.weight` with `….alpha`.
    Kohya,
    /// ComfyUI and ai-toolkit: `diffusion_model.….lora_A.weight`, with or
    /// without `….alpha`.
    ComfyUi,
    /// LyCORIS' own wrapper, which SimpleTuner trains with:
    /// `lycoris_….lokr_w1`, with `….alpha`.
    Lycoris,
}

impl AdapterFormat {
    /// Its name, as in a report.
    pub fn name(self) -> &'static str {
        match self {
            AdapterFormat::Peft => "PEFT",
            AdapterFormat::Diffusers => "diffusers",
            AdapterFormat::DiffusersOld => "diffusers before PEFT",
            AdapterFormat::Kohya => "kohya",
            AdapterFormat::ComfyUi => "ComfyUI",
            AdapterFormat::Lycoris => "LyCORIS",
        }
    }
}

impl fmt::Display for AdapterFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Writes files into a folder, which is made; each appears whole or not at all.
pub(crate) fn write_files(folder: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    for (name, bytes) in files {
        let path = folder.join(name);
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(folder))?;
        file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io(&path))?;
        file.persist(&path).map_err(|error| error.error).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// What came of loading an adapter.
///
/// ```no_run
/// # fn run(mut model: tch_peft::LoraModel<tch::nn::Linear>) -> tch_peft::Result<()> {
/// let report = model.load_adapter("poet.safetensors", "poet")?;
/// println!("{report}");
/// for key in &report.unknown_config_keys {
///     println!("kept, but not understood: {key}");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// The layout of the file.
    pub format: AdapterFormat,
    /// Keys of the file that were loaded.
    pub loaded: Vec<String>,
    /// Keys that the model needs and the file lacks. Loading is strict, so
    /// this is empty in a report of success.
    pub missing: Vec<String>,
    /// Keys of the file that have no place in the model. Empty likewise.
    pub unexpected: Vec<String>,
    /// Keys of copies of base weights, which PEFT adds to an adapter that
    /// targets `lm_head` or `embed_tokens`. They are compared with the base,
    /// where that is dense, and never loaded.
    pub base_copies: Vec<String>,
    /// Keys of the configuration that this version doesn't know. They are
    /// kept and written again when the adapter is saved.
    pub unknown_config_keys: Vec<String>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors loaded ({})", self.loaded.len(), self.format)?;
        let lists = [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("copies of base weights", &self.base_copies),
            ("unknown config keys", &self.unknown_config_keys),
        ];
        for (what, keys) in lists.into_iter().filter(|(_, keys)| !keys.is_empty()) {
            write!(f, "; {what}: {}", keys.join(", "))?;
        }
        Ok(())
    }
}
