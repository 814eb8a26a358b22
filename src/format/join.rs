//! Several adapters in one file: those of the parts of a pipeline.

use super::file::{AdapterFile, Found};
use super::write::place;
use super::{diffusers, safetensors, write_files};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

impl AdapterFile {
    /// Writes the adapters in `files` into one file of the same layout, such as
    /// those of a transformer and of its text encoders, each saved with its
    /// component.
    ///
    /// ```no_run
    /// use tch_peft::{AdapterFile, AdapterFormat, LoraModel, TorchScript};
    ///
    /// fn save(unet: LoraModel<TorchScript>, text: LoraModel<TorchScript>) -> tch_peft::Result<()> {
    ///     let parts = [("unet", &unet), ("text_encoder", &text)].map(|(component, model)| {
    ///         let file = AdapterFile::new(format!("{component}.safetensors")).component(component);
    ///         model.save_as("default", AdapterFormat::Diffusers, file.clone()).map(|()| file)
    ///     });
    ///     AdapterFile::join(&parts.into_iter().collect::<Result<Vec<_>, _>>()?, "out")
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for none, for PEFT's folder, and for files of several
    /// layouts; [`Error::Corrupt`] for a key that two of them have; those of
    /// [`AdapterFile::detect`].
    pub fn join(files: &[AdapterFile], to: impl Into<AdapterFile>) -> Result<()> {
        let (mut tensors, mut fields) = (BTreeMap::new(), Map::new());
        let mut joined = None;
        for file in files {
            let Found::File(path) = file.find()? else {
                let expected = "files of a layout that has several components, which PEFT's folder has not";
                return Err(Error::config("files", expected, file.path().display()));
            };
            let format = file.detect()?.format;
            if let Some(other) = joined.replace(format).filter(|other| *other != format) {
                return Err(Error::config("files", "files of one layout", format!("{other} and {format}")));
            }
            let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
            let twice = |key: &str| Error::corrupt(&path, format!("{key} is in another of the files too"));
            for (key, tensor) in safetensors::deserialize(&path, &bytes)? {
                if tensors.contains_key(&key) {
                    return Err(twice(&key));
                }
                tensors.insert(key, tensor);
            }
            for (key, value) in diffusers::recorded(&path, &bytes)?.into_iter().flatten() {
                if fields.contains_key(&key) {
                    return Err(twice(&key));
                }
                fields.insert(key, value);
            }
        }
        let format = joined.ok_or_else(|| Error::config("files", "at least one", "none"))?;
        let mut metadata = BTreeMap::new();
        if !fields.is_empty() {
            let mut fields = Value::Object(fields);
            fields.sort_all_objects();
            let text = serde_json::to_string_pretty(&fields);
            let text = text.map_err(|error| Error::config(diffusers::METADATA_KEY, "JSON", error))?;
            metadata.insert(diffusers::METADATA_KEY.into(), text);
        }
        let (folder, name) = place(&to.into(), format)?;
        write_files(&folder, &[(name, safetensors::serialize_with(&tensors, metadata)?)])
    }
}
