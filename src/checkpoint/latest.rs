//! Finding the newest checkpoint by reading what is there.

use super::layout;
use super::manifest::{Manifest, verify};
use crate::error::{Error, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What [`latest`] found in a run's folder.
#[derive(Debug)]
pub struct Latest {
    /// The newest checkpoint that is whole.
    pub found: Option<(PathBuf, Manifest)>,
    /// Checkpoints that can't be used, apart from those older than `found`
    /// whose manifests are whole: those are not looked into.
    pub skipped: Vec<SkippedCheckpoint>,
}

/// A checkpoint that can't be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedCheckpoint {
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// The newest whole checkpoint among the folders `checkpoint-*` of a run.
///
/// Steps are read from the manifests, not from the names. Folders without a
/// manifest are left out silently if their names are not of this crate's form.
/// A run's folder that doesn't exist has no checkpoints.
///
/// # Errors
/// [`Error::Io`] if the folder can't be read, [`Error::NewerFormat`] if a
/// checkpoint in it is of a newer version of this crate: going on from an
/// older one would throw away what that version trained.
pub fn latest(run_dir: impl AsRef<Path>) -> Result<Latest> {
    let mut skipped = Vec::new();
    let mut whole = Vec::new();
    for (name, path) in candidates(run_dir.as_ref())? {
        match Manifest::read(&path) {
            Ok(manifest) => whole.push((name, path, manifest)),
            Err(error) => skip(&mut skipped, path, error)?,
        }
    }
    // Newest last; of two of the same step, the one with the proper name.
    whole.sort_by_key(|(name, _, manifest)| (manifest.step, *name == layout::folder(manifest.step)));
    while let Some((_, path, manifest)) = whole.pop() {
        match verify(&path) {
            Ok(_) => return Ok(Latest { found: Some((path, manifest)), skipped }),
            Err(error) => skip(&mut skipped, path, error)?,
        }
    }
    Ok(Latest { found: None, skipped })
}

fn skip(skipped: &mut Vec<SkippedCheckpoint>, path: PathBuf, error: Error) -> Result<()> {
    if matches!(error, Error::NewerFormat { .. }) {
        return Err(error);
    }
    skipped.push(SkippedCheckpoint { path, reason: error.to_string() });
    Ok(())
}

/// Name and path of each folder that is a checkpoint, or should be one, sorted.
fn candidates(run_dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for name in folder_names(run_dir)? {
        let path = run_dir.join(&name);
        let known = layout::is_own(&name) || path.join(layout::MANIFEST).exists();
        if layout::may_be_checkpoint(&name) && path.is_dir() && known {
            found.push((name, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Names in a folder; none if there is no such folder.
pub(super) fn folder_names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io(dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        // Names that are not UTF-8 are not ours.
        if let Ok(name) = entry.map_err(Error::io(dir))?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}
