//! The list of a checkpoint's files, with size and hash of each.

use super::layout::{self, MANIFEST};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

const FORMAT: &str = "tch-peft-checkpoint";
/// Raised whenever this version couldn't read what the new one writes.
const VERSION: u32 = 1;

/// What `manifest.json` says of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// `tch-peft-checkpoint`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// Steps that had been taken.
    pub step: u64,
    /// The checkpoint's files by name.
    pub files: BTreeMap<String, FileEntry>,
}

/// What the manifest says of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Bytes.
    pub size: u64,
    /// blake3 of the content, in hex.
    pub blake3: String,
}

/// The part that every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

impl Manifest {
    pub(super) fn new(step: u64, files: &[(String, Vec<u8>)]) -> Self {
        let entry = |bytes: &[u8]| FileEntry {
            size: bytes.len() as u64,
            blake3: blake3::Hasher::new().update_rayon(bytes).finalize().to_hex().to_string(),
        };
        let files = files.iter().map(|(name, bytes)| (name.clone(), entry(bytes))).collect();
        Manifest { format: FORMAT.into(), version: VERSION, step, files }
    }

    /// Reads `manifest.json` alone, not the files it lists.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let text = fs::read(&path).map_err(Error::io(&path))?;
        let head: Head = serde_json::from_slice(&text).map_err(|e| Error::corrupt(&path, e))?;
        if head.format != FORMAT {
            return Err(Error::corrupt(path, format!("its format is `{}`, not `{FORMAT}`", head.format)));
        }
        if head.version > VERSION {
            return Err(Error::NewerFormat { path, found: head.version, supported: VERSION });
        }
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| Error::corrupt(&path, e))?;
        if let Some(name) = manifest.files.keys().find(|name| !layout::is_plain(name)) {
            return Err(Error::corrupt(path, format!("`{name}` is not a file's name")));
        }
        if let Some(name) = layout::REQUIRED.iter().find(|name| !manifest.files.contains_key(**name)) {
            return Err(Error::corrupt(path, format!("it doesn't list {name}")));
        }
        Ok(manifest)
    }
}

impl FileEntry {
    fn verify(&self, path: &Path) -> Result<()> {
        let size = fs::metadata(path).map_err(Error::io(path))?.len();
        if size != self.size {
            return Err(Error::corrupt(path, format!("{size} bytes, but the manifest says {}", self.size)));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file).map_err(Error::io(path))?;
        if hasher.finalize().to_hex().as_str() != self.blake3 {
            return Err(Error::corrupt(path, "its content is not what the manifest says (blake3 differs)"));
        }
        Ok(())
    }
}

/// Reads a checkpoint's manifest and checks size and hash of each file in it.
/// Files that the manifest doesn't list are left alone.
///
/// # Errors
/// [`Error::Io`] for a file that is missing or can't be read,
/// [`Error::Corrupt`] for one that is not what the manifest says and for a
/// damaged manifest, [`Error::NewerFormat`] for a checkpoint of a newer
/// version of this crate.
pub fn verify(dir: impl AsRef<Path>) -> Result<Manifest> {
    let dir = dir.as_ref();
    let manifest = Manifest::read(dir)?;
    for (name, entry) in &manifest.files {
        entry.verify(&dir.join(name))?;
    }
    Ok(manifest)
}
