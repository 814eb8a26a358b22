//! A checkpoint's files, read once.

use super::layout::OPTIMIZER;
use super::manifest::{FileEntry, Manifest};
use crate::error::{Error, Result};
use crate::ffi::bytes::Buffer;
use crate::format::safetensors;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use tch::Tensor;

/// A thread reads so many bytes at a time.
const PIECE: usize = 4 << 20;

/// A checkpoint's files in memory, just as its manifest says they are: what is
/// used later is what was verified, whatever happens to the folder.
///
/// ```no_run
/// use tch_peft::checkpoint::CheckpointFiles;
///
/// let files = CheckpointFiles::read("runs/a/checkpoint-00000400")?;
/// println!("{}", String::from_utf8_lossy(files.get("base.json")?));
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub struct CheckpointFiles {
    dir: PathBuf,
    files: BTreeMap<String, Buffer>,
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
    pub(super) fn in_memory(dir: &Path, files: Vec<(String, Buffer)>) -> Self {
        CheckpointFiles { dir: dir.into(), files: files.into_iter().collect() }
    }

    /// The content of a file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the checkpoint has no such file.
    pub fn get(&self, name: &str) -> Result<&[u8]> {
        self.buffer(name).map(Buffer::as_slice)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// The tensors of a file in safetensors format: views of it, to be read only.
    pub(super) fn tensors(&self, name: &str) -> Result<BTreeMap<String, Tensor>> {
        safetensors::views(&self.path(name), self.buffer(name)?)
    }

    fn buffer(&self, name: &str) -> Result<&Buffer> {
        let missing = || Error::corrupt(self.path(name), "the checkpoint has no such file");
        self.files.get(name).ok_or_else(missing)
    }

    /// Where a file was read from; for errors.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl fmt::Debug for CheckpointFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: BTreeMap<_, _> = self.files.iter().map(|(name, bytes)| (name, bytes.as_slice().len())).collect();
        f.debug_struct("CheckpointFiles").field("dir", &self.dir).field("sizes", &sizes).finish()
    }
}

/// Reads a file by all threads, then hashes it.
fn read(path: &Path, entry: &FileEntry) -> Result<Buffer> {
    // Compares the size with the file's: no more memory is taken than that.
    entry.open(path)?;
    let size = usize::try_from(entry.size).map_err(|error| Error::corrupt(path, error))?;
    let read_piece = |(i, piece): (usize, &mut [u8])| {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start((i * PIECE) as u64))?;
        file.read_exact(piece)
    };
    let bytes = Buffer::filled(size, |bytes| bytes.par_chunks_mut(PIECE).enumerate().try_for_each(read_piece))?;
    let bytes = bytes.map_err(Error::io(path))?;
    entry.check(path, blake3::Hasher::new().update_rayon(bytes.as_slice()).finalize())?;
    Ok(bytes)
}
