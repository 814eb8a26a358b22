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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `tch-peft-checkpoint`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// Steps that had been taken.
    pub step: u64,
    /// What [`Run::set_metric`](crate::Run::set_metric) said of this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<f64>,
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

/// The part that every version has, before the seal.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

impl Manifest {
    pub(super) fn new(step: u64, metric: Option<f64>, files: BTreeMap<String, FileEntry>) -> Self {
        Manifest { format: FORMAT.into(), version: VERSION, step, metric, files }
    }

    /// The file's text: JSON, with a hash of all that stands before it as the
    /// last field, so that damage to the manifest itself shows too.
    pub(super) fn to_text(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| Error::corrupt(MANIFEST, e))?;
        text.truncate(text.len().saturating_sub("\n}".len()));
        let seal = seal(&text);
        text.extend(seal);
        Ok(text)
    }

    /// Reads `manifest.json` alone, not the files it lists.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let text = fs::read(&path).map_err(Error::io(&path))?;
        let head: Head = serde_json::from_slice(&text).map_err(|e| Error::corrupt(&path, e))?;
        if head.format != FORMAT {
            return Err(Error::corrupt(path, format!("its format is `{}`, not `{FORMAT}`", head.format)));
        }
        let (body, found) = text.split_at(text.len().saturating_sub(SEAL_LENGTH));
        if found != seal(body) {
            return Err(Error::corrupt(path, "it was changed after it was written (its seal is broken)"));
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

/// Bytes of [`seal`].
const SEAL_LENGTH: usize = ",\n  \"seal\": \"\"\n}".len() + 64;

/// The manifest's last field, a hash of the bytes before it, and its end.
fn seal(body: &[u8]) -> Vec<u8> {
    format!(",\n  \"seal\": \"{}\"\n}}", blake3::hash(body).to_hex()).into_bytes()
}

impl FileEntry {
    /// The entry of a file with these bytes.
    pub(super) fn of(pieces: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for piece in pieces {
            hasher.update_rayon(piece);
        }
        let size = pieces.iter().map(|piece| piece.len() as u64).sum();
        FileEntry { size, blake3: hasher.finalize().to_hex().to_string() }
    }

    /// Opens a file of this size. The size is compared before anything is
    /// read, so that a wrong one costs no memory.
    pub(super) fn open(&self, path: &Path) -> Result<File> {
        let file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if !metadata.is_file() {
            return Err(Error::corrupt(path, "it is not a file"));
        }
        match metadata.len() {
            size if size == self.size => Ok(file),
            size => Err(Error::corrupt(path, format!("{size} bytes, but the manifest says {}", self.size))),
        }
    }

    /// Compares the hash of the content.
    pub(super) fn check(&self, path: &Path, hash: blake3::Hash) -> Result<()> {
        if hash.to_hex().as_str() != self.blake3 {
            return Err(Error::corrupt(path, "its content is not what the manifest says (blake3 differs)"));
        }
        Ok(())
    }

    fn verify(&self, path: &Path) -> Result<()> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(self.open(path)?).map_err(Error::io(path))?;
        self.check(path, hasher.finalize())
    }
}

/// Reads a checkpoint's manifest and checks size and hash of each file in it.
/// Files that the manifest doesn't list are left alone.
///
/// ```no_run
/// // Before a checkpoint is copied elsewhere, say.
/// let manifest = tch_peft::checkpoint::verify("runs/a/checkpoint-00000400")?;
/// assert_eq!(manifest.step, 400);
/// # Ok::<(), tch_peft::Error>(())
/// ```
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
