//! Writing a checkpoint so that it is there as a whole, or not at all.

use super::latest::folder_names;
use super::layout;
use super::manifest::{Manifest, verify};
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes the files into a hidden sibling, the manifest last, syncs and reads
/// them back, and gives the folder its name.
///
/// Killed at any instant, it leaves the checkpoints from before, and at most a
/// hidden folder that the next call removes. On an error it leaves nothing.
pub(super) fn commit(run_dir: &Path, step: u64, files: &[(String, Vec<u8>)]) -> Result<PathBuf> {
    sweep(run_dir)?;
    let temporary = run_dir.join(layout::temporary(step));
    let result = fill(&temporary, step, files).and_then(|()| publish(run_dir, step, &temporary));
    if result.is_err() {
        // What went wrong matters more than whether this works; the next sweep
        // tries again.
        let _ = fs::remove_dir_all(&temporary);
    }
    result
}

fn fill(dir: &Path, step: u64, files: &[(String, Vec<u8>)]) -> Result<()> {
    fs::create_dir(dir).map_err(Error::io(dir))?;
    for (name, bytes) in files {
        write_synced(&dir.join(name), bytes)?;
    }
    let path = dir.join(layout::MANIFEST);
    let manifest = Manifest::new(step, files);
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::corrupt(&path, e))?;
    write_synced(&path, &text)?;
    sync_dir(dir)?;
    verify(dir)?;
    Ok(())
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create_new(path).map_err(Error::io(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(path))
}

/// Renames the finished folder, past one of the same step if there is any.
fn publish(run_dir: &Path, step: u64, temporary: &Path) -> Result<PathBuf> {
    let path = run_dir.join(layout::folder(step));
    let replaced = run_dir.join(layout::replaced(step));
    let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(Error::io(to));
    if fs::symlink_metadata(&path).is_ok() {
        discard(run_dir, &layout::replaced(step))?;
        rename(&path, &replaced)?;
    }
    if let Err(error) = rename(temporary, &path) {
        // Under its other name the one from before would do as well.
        let _ = fs::rename(&replaced, &path);
        return Err(error);
    }
    sync_dir(run_dir)?;
    if let Err(error) = discard(run_dir, &layout::replaced(step)) {
        tracing::warn!(%error, "a replaced checkpoint could not be deleted");
    }
    Ok(path)
}

/// Deletes a folder of a run, if it is there. It loses its name first: killed
/// halfway, this leaves nothing that looks like a checkpoint.
pub(super) fn discard(run_dir: &Path, name: &str) -> Result<()> {
    let path = run_dir.join(name);
    if fs::symlink_metadata(&path).is_err() {
        return Ok(());
    }
    let hidden = run_dir.join(layout::discarded(name));
    fs::rename(&path, &hidden).map_err(Error::io(&path))?;
    remove(&hidden)
}

/// Removes what killed runs left behind, known by its name.
fn sweep(run_dir: &Path) -> Result<()> {
    let names = folder_names(run_dir)?;
    let left_over = names.iter().filter(|name| layout::is_left_over(name));
    left_over.map(|name| run_dir.join(name)).try_for_each(|path| remove(&path))
}

/// Removes a folder with all in it, or a link or file in its place.
fn remove(path: &Path) -> Result<()> {
    let is_dir = fs::symlink_metadata(path).map_err(Error::io(path))?.is_dir();
    if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(Error::io(path))
}

/// Makes the names in a folder durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    // Elsewhere a folder can't be opened as a file.
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))?;
    }
    Ok(())
}
