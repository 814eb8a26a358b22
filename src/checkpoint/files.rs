//! A checkpoint's files, read once.

use super::layout::OPTIMIZER;
use super::manifest::{FileEntry, Manifest};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// A checkpoint's files in memory, just as its manifest says they are: what is
/// used later is what was verified, whatever happens to the folder.
pub struct CheckpointFiles {
    dir: PathBuf,
    files: BTreeMap<String, Vec<u8>>,
}

impl CheckpointFiles {
    /// Reads and verifies the files that the manifest of `dir` lists.
    ///
    /// # Errors
    /// Those of [`verify`](super::verify).
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        Self::of(dir, &Manifest::read(dir)?, false)
    }

    /// The same where the manifest is known; the optimizer's file may be
    /// missing if the caller says so.
    pub(super) fn of(dir: &Path, manifest: &Manifest, without_optimizer: bool) -> Result<Self> {
        let mut files = BTreeMap::new();
        for (name, entry) in &manifest.files {
            match read(&dir.join(name), entry) {
                Ok(bytes) => {
                    files.insert(name.clone(), bytes);
                }
                Err(Error::Io { source, .. })
                    if without_optimizer && name == OPTIMIZER && source.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(CheckpointFiles { dir: dir.into(), files })
    }

    /// Files that are only in memory, as if they had been read from `dir`.
    pub(super) fn in_memory(dir: &Path, files: Vec<(String, Vec<u8>)>) -> Self {
        CheckpointFiles { dir: dir.into(), files: files.into_iter().collect() }
    }

    /// The content of a file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the checkpoint has no such file.
    pub fn get(&self, name: &str) -> Result<&[u8]> {
        let missing = || Error::corrupt(self.path(name), "the checkpoint has no such file");
        self.find(name).ok_or_else(missing)
    }

    pub(super) fn find(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(Vec::as_slice)
    }

    /// Where a file was read from; for errors.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl fmt::Debug for CheckpointFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: BTreeMap<_, _> = self.files.iter().map(|(name, bytes)| (name, bytes.len())).collect();
        f.debug_struct("CheckpointFiles").field("dir", &self.dir).field("sizes", &sizes).finish()
    }
}

fn read(path: &Path, entry: &FileEntry) -> Result<Vec<u8>> {
    let mut file = entry.open(path)?;
    // `open` has compared the size with the file's: it is no larger than that.
    let mut bytes = Vec::with_capacity(usize::try_from(entry.size).unwrap_or(0));
    file.read_to_end(&mut bytes).map_err(Error::io(path))?;
    entry.check(path, blake3::Hasher::new().update_rayon(&bytes).finalize())?;
    Ok(bytes)
}
