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
/// ```no_run
/// use tch_peft::checkpoint::latest;
///
/// let found = latest("runs/a")?;
/// if let Some((path, manifest)) = found.found {
///     println!("{}: step {}, {} files", path.display(), manifest.step, manifest.files.len());
/// }
/// for skipped in found.skipped {
///     println!("{}: {}", skipped.path.display(), skipped.reason);
/// }
/// # Ok::<(), tch_peft::Error>(())
/// ```
///
/// # Errors
/// [`Error::Io`] if the folder can't be read, [`Error::NewerFormat`] if a
/// checkpoint in it is of a newer version of this crate: going on from an
/// older one would throw away what that version trained.
pub fn latest(run_dir: impl AsRef<Path>) -> Result<Latest> {
    let (found, skipped) = newest(run_dir.as_ref(), |path, _| verify(path))?;
    Ok(Latest { found, skipped })
}

/// The newest checkpoint that `open` accepts, with what it made of it, and
/// those that can't be used.
pub(super) fn newest<T>(run_dir: &Path, open: impl Fn(&Path, Manifest) -> Result<T>) -> Result<Found<T>> {
    let mut names = candidates(run_dir)?;
    loop {
        let (found, skipped) = newest_of(&names, &open)?;
        let listed = std::mem::replace(&mut names, candidates(run_dir)?);
        // A writer may have put a newer one in the place of each.
        if found.is_some() || names == listed {
            return Ok((found, skipped));
        }
    }
}

type Found<T> = (Option<(PathBuf, T)>, Vec<SkippedCheckpoint>);

fn newest_of<T>(candidates: &[(String, PathBuf)], open: &impl Fn(&Path, Manifest) -> Result<T>) -> Result<Found<T>> {
    let mut skipped = Vec::new();
    let mut whole = Vec::new();
    for (name, path) in candidates {
        match Manifest::read(path) {
            Ok(manifest) => whole.push((name, path, manifest)),
            Err(error) => skip(&mut skipped, path, error)?,
        }
    }
    // Newest last; of two of the same step, the one with the proper name.
    whole.sort_by_key(|(name, _, manifest)| (manifest.step, **name == layout::folder(manifest.step)));
    while let Some((_, path, manifest)) = whole.pop() {
        match open(path, manifest) {
            Ok(opened) => return Ok((Some((path.clone(), opened)), skipped)),
            Err(error) => skip(&mut skipped, path, error)?,
        }
    }
    Ok((None, skipped))
}

fn skip(skipped: &mut Vec<SkippedCheckpoint>, path: &Path, error: Error) -> Result<()> {
    if matches!(error, Error::NewerFormat { .. }) {
        return Err(error);
    }
    // One that a writer has deleted meanwhile was not damaged.
    if fs::symlink_metadata(path).is_ok() {
        skipped.push(SkippedCheckpoint { path: path.into(), reason: error.to_string() });
    }
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
