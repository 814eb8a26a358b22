//! Floor 4: adapter files, in and out.

pub(crate) mod peft;
pub(crate) mod safetensors;

use crate::error::{Error, Result};
use std::fmt;
use std::io::Write;
use std::path::Path;

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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadReport {
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
    /// Keys of `adapter_config.json` that this version doesn't know. They are
    /// kept and written again when the adapter is saved.
    pub unknown_config_keys: Vec<String>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors loaded", self.loaded.len())?;
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
