//! Where an adapter is on disk, and what its keys alone don't tell.

use super::detect::{self, DetectedFormat};
use super::mapping::KeyMapping;
use super::{AdapterFormat, diffusers, peft, safetensors};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// An adapter's file or folder, with what a reader or writer must be told.
///
/// A path is enough wherever one of these is taken:
///
/// ```no_run
/// use tch_peft::{AdapterFile, Base, LoraModel};
/// # fn base() -> Base<tch_peft::TorchScript> { unimplemented!() }
/// let model = LoraModel::init_lora(base(), "simpletuner/checkpoint-500")?;
/// let model = LoraModel::init_lora(base(), AdapterFile::new("sdxl.safetensors").component("unet"))?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct AdapterFile {
    pub(super) path: PathBuf,
    pub(super) format: Option<AdapterFormat>,
    pub(super) component: Option<String>,
    pub(super) key_mapping: KeyMapping,
}

impl<P: AsRef<Path>> From<P> for AdapterFile {
    fn from(path: P) -> Self {
        AdapterFile::new(path)
    }
}

/// What a path leads to.
pub(super) enum Found {
    /// A folder in PEFT's layout.
    Peft(PathBuf),
    /// One safetensors file.
    File(PathBuf),
}

impl AdapterFile {
    /// A safetensors file, PEFT's folder, or a folder with diffusers'
    /// `pytorch_lora_weights.safetensors` or one other safetensors file.
    pub fn new(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref().to_path_buf();
        AdapterFile { path, format: None, component: None, key_mapping: KeyMapping::default() }
    }

    /// The layout, which else is told by the keys.
    pub fn format(mut self, format: AdapterFormat) -> Self {
        self.format = Some(format);
        self
    }

    /// The part of a pipeline that the base is, as diffusers calls it:
    /// `transformer`, `unet`, `text_encoder`, `text_encoder_2`, …; `""` for
    /// keys that name none. Needed for a file with several, and to write
    /// diffusers' layouts.
    ///
    /// ```no_run
    /// use tch_peft::{AdapterFile, Base, LoraModel};
    ///
    /// let unet = Base::torchscript("unet.pt")?;
    /// let model = LoraModel::from_pretrained(unet, AdapterFile::new("sdxl.safetensors").component("unet"))?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn component(mut self, component: impl Into<String>) -> Self {
        self.component = Some(component.into());
        self
    }

    /// What the modules of the base are called in the file.
    pub fn key_mapping(mut self, mapping: KeyMapping) -> Self {
        self.key_mapping = mapping;
        self
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The layout, the components, and what tells them. The tensors are not
    /// read.
    ///
    /// ```no_run
    /// let found = tch_peft::AdapterFile::new("lora.safetensors").detect()?;
    /// println!("{found}"); // kohya: 36 keys such as lora_unet_….lora_down.weight; components: text_encoder, unet
    /// assert!(found.components.contains(&"unet".to_string()));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unsupported`] for an adapter of another kind than
    /// LoRA, LoHa and LoKr;
    /// [`Error::Corrupt`] for a file that is no adapter or has keys of more
    /// than one layout, [`Error::Keys`] for one with other keys among them.
    pub fn detect(&self) -> Result<DetectedFormat> {
        match self.find()? {
            Found::Peft(folder) => {
                let reason = format!("{} holds {}", folder.display(), peft::CONFIG_FILE);
                Ok(DetectedFormat { format: AdapterFormat::Peft, components: vec![String::new()], reason })
            }
            Found::File(path) => {
                let keys = safetensors::names(&path)?;
                detect::detect(&path, keys.iter().map(String::as_str))
            }
        }
    }

    pub(super) fn find(&self) -> Result<Found> {
        let path = &self.path;
        if path.is_file() {
            let folder = path.parent().unwrap_or(Path::new(""));
            let of_peft = path.ends_with(peft::WEIGHTS_FILE) && folder.join(peft::CONFIG_FILE).is_file();
            return Ok(if of_peft { Found::Peft(folder.into()) } else { Found::File(path.clone()) });
        }
        let (config, weights) = (path.join(peft::CONFIG_FILE), path.join(diffusers::WEIGHTS_FILE));
        match (config.is_file(), weights.is_file()) {
            (true, true) if self.format.is_none() => {
                let expected = format!(
                    "the format or the file, where a folder holds an adapter of PEFT and {}",
                    diffusers::WEIGHTS_FILE
                );
                Err(Error::config("format", expected, "none given"))
            }
            (true, true) if self.format != Some(AdapterFormat::Peft) => Ok(Found::File(weights)),
            (false, true) => Ok(Found::File(weights)),
            (true, _) => Ok(Found::Peft(path.clone())),
            (false, false) => match safetensors_in(path).as_slice() {
                // The reader names what is missing.
                [] => Ok(Found::Peft(path.clone())),
                [only] if only.ends_with(peft::WEIGHTS_FILE) => Ok(Found::Peft(path.clone())),
                [only] => Ok(Found::File(only.clone())),
                several => {
                    let names = several.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
                    Err(Error::corrupt(path, format!("several adapters, of which one must be named: {names}")))
                }
            },
        }
    }
}

/// The safetensors files in a folder, sorted; none where there is no folder.
fn safetensors_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.is_file() && path.extension().is_some_and(|end| end == "safetensors")).collect();
    found.sort();
    found
}
